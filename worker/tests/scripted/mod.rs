//! A coordinator that does what a test says and tells what it sees.

pub(crate) mod span_log;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use lockstep_model::batch::{Batch, Column, Values};
use lockstep_model::compression::GradientFormat;
use lockstep_model::pieces::vector_blake3;
use lockstep_proto::chunk::{self, Assembler};
use lockstep_proto::v1::lockstep_server::{Lockstep, LockstepServer};
use lockstep_proto::{PROTOCOL_VERSION, TRACEPARENT_KEY, WORKER_ID_KEY, v1};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

pub(crate) const RUN_ID: &str = "000102030405060708090a0b0c0d0e0f";
pub(crate) const INCARNATION: u64 = 3;
pub(crate) const WORKER_ID: u64 = 17;
/// Version 7.
pub(crate) const PARAMETERS: [f32; 2] = [0.35, 0.01];
/// What version 8 differs by.
const DIFFERENCES: [f32; 2] = [0.25, -0.125];

/// Version 8.
pub(crate) fn next_parameters() -> [f32; 2] {
    [PARAMETERS[0] + DIFFERENCES[0], PARAMETERS[1] + DIFFERENCES[1]]
}

/// What the coordinator saw, in order.
#[derive(Debug)]
pub(crate) enum Seen {
    Join(v1::JoinRequest),
    Admit(v1::AdmitRequest),
    Control(ToWorker),
    Pull(v1::PullRequest),
    /// A push begins that is never answered.
    StalledPush(v1::PushHeader),
    Push {
        header: v1::PushHeader,
        vector: Vec<f32>,
        traceparent: Option<String>,
    },
    Result(v1::BlockResult),
    Declined(v1::LeaseDeclined),
    Kept(v1::Kept),
}

/// The coordinator's end of a control stream; dropping it closes the stream.
#[derive(Debug)]
pub(crate) struct ToWorker {
    messages: mpsc::Sender<Result<v1::CoordinatorMessage, Status>>,
}

impl ToWorker {
    pub(crate) async fn lease(&self, lease: v1::Lease) {
        self.send(Ok(v1::coordinator_message::Kind::Lease(lease))).await;
    }

    pub(crate) async fn revoke(&self, lease_id: u64) {
        self.send(Ok(v1::coordinator_message::Kind::Revoke(v1::Revoke { lease_id }))).await;
    }

    pub(crate) async fn release(&self, reason: &str) {
        self.let_go(reason, false).await;
    }

    pub(crate) async fn let_go(&self, reason: &str, run_goes_on: bool) {
        let release = v1::Release { reason: reason.into(), run_goes_on };
        self.send(Ok(v1::coordinator_message::Kind::Release(release))).await;
    }

    pub(crate) async fn fail(&self, status: Status) {
        self.send(Err(status)).await;
    }

    async fn send(&self, kind: Result<v1::coordinator_message::Kind, Status>) {
        let message = kind.map(|kind| v1::CoordinatorMessage { kind: Some(kind) });
        self.messages.send(message).await.expect("the worker listens");
    }
}

/// How the coordinator behaves.
pub(crate) struct Script {
    pub(crate) invitation: Result<v1::Invitation, Status>,
    pub(crate) verdict: v1::admit_reply::Verdict,
    /// So many pulls deliver damaged bytes first.
    pub(crate) damaged_pulls: u32,
    /// So many pulls, after those, deliver other parameters.
    pub(crate) foreign_pulls: u32,
    /// So many differences lead to other parameters.
    pub(crate) foreign_differences: u32,
    /// So many pushes are never answered.
    pub(crate) stalled_pushes: u32,
}

impl Default for Script {
    fn default() -> Self {
        let verdict = v1::admit_reply::Verdict::WorkerId(WORKER_ID);
        Self {
            invitation: Ok(invitation()),
            verdict,
            damaged_pulls: 0,
            foreign_pulls: 0,
            foreign_differences: 0,
            stalled_pushes: 0,
        }
    }
}

/// What still goes wrong so many times.
#[derive(Clone)]
struct Faults(Arc<AtomicU32>);

impl Faults {
    fn new(count: u32) -> Self {
        Self(Arc::new(count.into()))
    }

    /// Whether it goes wrong this time.
    fn strikes(&self) -> bool {
        self.0.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok()
    }
}

/// A coordinator at work; it ends with the test.
pub(crate) struct Scripted {
    pub(crate) address: String,
    seen: mpsc::UnboundedReceiver<Seen>,
    server: JoinHandle<()>,
}

impl Scripted {
    /// Serves on a port of its own, after dropping so many connections.
    pub(crate) async fn start(script: Script, dropped_connections: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (tell, seen) = mpsc::unbounded_channel();
        let Script { damaged_pulls, foreign_pulls, foreign_differences, stalled_pushes, .. } = script;
        let [damaged_pulls, foreign_pulls, foreign_differences, stalled_pushes] =
            [damaged_pulls, foreign_pulls, foreign_differences, stalled_pushes].map(Faults::new);
        let script = Arc::new(script);
        let service = Service { script, damaged_pulls, foreign_pulls, foreign_differences, stalled_pushes, tell };
        let server = tokio::spawn(async move {
            for _ in 0..dropped_connections {
                drop(listener.accept().await);
            }
            let incoming = TcpListenerStream::new(listener);
            Server::builder().serve_with_incoming(LockstepServer::new(service), incoming).await.unwrap();
        });
        Self { address, seen, server }
    }

    /// What happens next.
    pub(crate) async fn sees(&mut self) -> Seen {
        let next = tokio::time::timeout(Duration::from_secs(60), self.seen.recv()).await;
        next.expect("something happens within a minute").expect("the coordinator runs")
    }

    /// Goes through joining, up to the control stream.
    pub(crate) async fn sees_joining(&mut self) -> (v1::AdmitRequest, ToWorker) {
        let Seen::Join(join) = self.sees().await else { panic!("Join comes first") };
        assert_eq!((join.protocol_version, join.name.as_str()), (PROTOCOL_VERSION, "test"));
        let Seen::Admit(admit) = self.sees().await else { panic!("Admit follows Join") };
        let Seen::Control(to_worker) = self.sees().await else { panic!("Control follows Admit") };
        (admit, to_worker)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// An invitation to train the straight line, with slot 0 as the probe.
pub(crate) fn invitation() -> v1::Invitation {
    let spec = |name: &str, shape: Vec<u32>, offset_elements, decay| v1::TensorSpec {
        name: name.into(),
        shape,
        offset_elements,
        decay,
        trainable: true,
    };
    v1::Invitation {
        run_id: RUN_ID.into(),
        incarnation: INCARNATION,
        model: Some(v1::Model { kind: Some(v1::model::Kind::Line(v1::Line {})) }),
        layout: Some(v1::Layout {
            tensors: vec![spec("weight", vec![1, 1], 0, true), spec("bias", vec![1], 1, false)],
            total_elements: 2,
        }),
        probe: vec![lease(1, true, &[0])],
        heartbeat_interval_ms: 50,
        liveness_timeout_ms: 60_000,
        objective: None,
        adapters: None,
        local_optimizer: None,
        gradient_format: v1::GradientFormat::F32.into(),
        precision: v1::Precision::F32.into(),
    }
}

/// The rows of one slot.
pub(crate) fn batch(slot: u32) -> Batch {
    let column =
        |name: &str, values: Vec<f32>| Column { name: name.into(), shape: [2, 1], values: Values::F32(values) };
    let x = vec![0.3 + slot as f32, 1.7 * slot as f32];
    let y = x.iter().map(|x| 1.9 * x + 0.2).collect();
    Batch { columns: vec![column("x", x), column("y", y)] }
}

/// A lease of `slots`, which start at 0, with parameter version 7.
pub(crate) fn lease(lease_id: u64, gradient: bool, slots: &[u32]) -> v1::Lease {
    let column = |column: Column| {
        let Values::F32(values) = column.values else { panic!("the line reads floats") };
        let shape = column.shape.map(|size| size as u32).to_vec();
        let element_type = v1::ElementType::F32.into();
        v1::Column { name: column.name, element_type, shape, data: chunk::to_bytes(&values) }
    };
    let slot = |&slot: &u32| v1::Slot {
        slot,
        columns: batch(slot).columns.into_iter().map(column).collect(),
        moments_blake3: Vec::new(),
    };
    v1::Lease {
        lease_id,
        step: 8,
        version: 7,
        block: Some(v1::Block { level: slots.len().next_power_of_two().trailing_zeros(), index: 0 }),
        task: Some(match gradient {
            true => v1::lease::Task::Gradient(v1::GradientTask::default()),
            false => v1::lease::Task::Evaluate(v1::EvaluateTask {}),
        }),
        slots: slots.iter().map(slot).collect(),
        seed: 1,
        traceparent: "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01".into(),
        parameters_blake3: vector_blake3(&PARAMETERS).to_vec(),
        difference_from_blake3: Vec::new(),
        step_slots: 0,
    }
}

#[derive(Clone)]
struct Service {
    script: Arc<Script>,
    damaged_pulls: Faults,
    foreign_pulls: Faults,
    foreign_differences: Faults,
    stalled_pushes: Faults,
    tell: mpsc::UnboundedSender<Seen>,
}

impl Service {
    fn tell(&self, seen: Seen) {
        self.tell.send(seen).expect("the test listens");
    }
}

#[tonic::async_trait]
impl Lockstep for Service {
    type ControlStream = ReceiverStream<Result<v1::CoordinatorMessage, Status>>;
    type PullStream = tokio_stream::Iter<std::vec::IntoIter<Result<v1::Chunk, Status>>>;

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::Invitation>, Status> {
        self.tell(Seen::Join(request.into_inner()));
        self.script.invitation.clone().map(Response::new)
    }

    async fn admit(&self, request: Request<v1::AdmitRequest>) -> Result<Response<v1::AdmitReply>, Status> {
        self.tell(Seen::Admit(request.into_inner()));
        Ok(Response::new(v1::AdmitReply { verdict: Some(self.script.verdict.clone()), shared_memory: None }))
    }

    async fn control(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        assert_eq!(request.metadata().get(WORKER_ID_KEY).unwrap(), &WORKER_ID.to_string());
        let (messages, stream) = mpsc::channel(16);
        self.tell(Seen::Control(ToWorker { messages: messages.clone() }));
        let (tell, mut incoming, acks) = (self.tell.clone(), request.into_inner(), messages.downgrade());
        tokio::spawn(async move {
            while let Ok(Some(message)) = incoming.message().await {
                let seen = match message.kind.expect("a message has a kind") {
                    v1::worker_message::Kind::Result(result) => Seen::Result(result),
                    v1::worker_message::Kind::Declined(declined) => Seen::Declined(declined),
                    v1::worker_message::Kind::Kept(kept) => Seen::Kept(kept),
                    v1::worker_message::Kind::Workers(workers) => panic!("a worker is no relay: {workers:?}"),
                    v1::worker_message::Kind::Heartbeat(v1::Heartbeat { sent_unix_nanos, .. }) => {
                        let ack = v1::HeartbeatAck { sent_unix_nanos, received_unix_nanos: sent_unix_nanos };
                        let kind = Some(v1::coordinator_message::Kind::HeartbeatAck(ack));
                        if let Some(acks) = acks.upgrade() {
                            let _ = acks.send(Ok(v1::CoordinatorMessage { kind })).await;
                        }
                        continue;
                    }
                };
                if tell.send(seen).is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn push(&self, request: Request<Streaming<v1::PushMessage>>) -> Result<Response<v1::PushReply>, Status> {
        let traceparent = request.metadata().get(TRACEPARENT_KEY).map(|value| value.to_str().unwrap().to_owned());
        let mut messages = request.into_inner();
        let mut next = async || messages.message().await.map(|message| message.and_then(|message| message.kind));
        let Some(v1::push_message::Kind::Header(header)) = next().await? else { panic!("a header comes first") };
        if self.stalled_pushes.strikes() {
            self.tell(Seen::StalledPush(header));
            return std::future::pending().await;
        }
        let invitation = self.script.invitation.as_ref().unwrap();
        let format = match invitation.gradient_format() {
            v1::GradientFormat::F32 => GradientFormat::F32,
            v1::GradientFormat::Bf16 => GradientFormat::Bf16,
            v1::GradientFormat::Int8 => GradientFormat::Int8,
        };
        let mut vector = Vec::new();
        let mut assembler = Assembler::new(header.total_bytes as usize, format.unit_bytes());
        while let Some(v1::push_message::Kind::Chunk(chunk)) = next().await? {
            format.decode(assembler.take(&chunk).unwrap(), &mut vector);
        }
        assembler.finish().unwrap();
        let vector_blake3 = header.vector_blake3.clone();
        self.tell(Seen::Push { header, vector, traceparent });
        Ok(Response::new(v1::PushReply { vector_blake3 }))
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        let (version, difference) = (request.version, request.difference);
        self.tell(Seen::Pull(request));
        let damaged = self.damaged_pulls.strikes();
        let foreign = !damaged && self.foreign_pulls.strikes() || difference && self.foreign_differences.strikes();
        let damage = |chunk: v1::Chunk| v1::Chunk { crc32: chunk.crc32 ^ u32::from(damaged), ..chunk };
        let published = if version == 8 { next_parameters() } else { PARAMETERS };
        let vector = published.map(|parameter| parameter + if foreign { 1.0 } else { 0.0 });
        let bytes = match difference {
            true => GradientFormat::Bf16.encode(&DIFFERENCES.map(|value| value + if foreign { 1.0 } else { 0.0 })),
            false => GradientFormat::F32.encode(&vector),
        };
        let chunks: Vec<_> = chunk::split(bytes.into(), 2).map(damage).map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(chunks)))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        Err(Status::unimplemented("no worker asks for it"))
    }
}
