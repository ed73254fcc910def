//! The gRPC service: wire types stop here. It turns calls into [`Input`]s for the runtime and carries vectors past it.

use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lockstep_model::batch::{PairSums, Sums};
use lockstep_model::checkpoint::BaseFile;
use lockstep_model::compression::{DIFFERENCE_BYTES, GradientFormat};
use lockstep_model::tree::Block;
use lockstep_proto::chunk::{self, Assembler, FLOAT_BYTES};
use lockstep_proto::v1::{self, push_message, worker_message};
use lockstep_proto::{
    CONNECTION_WINDOW_BYTES, INCARNATION_KEY, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, RUN_ID_KEY,
    STREAM_WINDOW_BYTES, WORKER_ID_KEY,
};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use crate::engine::command::Refusal;
use crate::engine::{DeviceClass, LeaseId, WorkerId};
use crate::exchange::{Publication, Staged, Staging};
use crate::input::{Applicant, Finished, Input};
use crate::replicas::Replicas;
use crate::translate;

/// Most kept blocks that a worker may offer.
const MAX_KEPT: usize = 64;

/// How long a worker that wants to join waits for a relay that is no member itself, before it is told so.
const JOIN_PATIENCE: Duration = Duration::from_secs(5);

/// The service of a coordinator or relay.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    /// What is served; none where a relay is between two memberships of its own.
    served: watch::Receiver<Option<Arc<Served>>>,
    /// Takes what is asked of the process, whatever it serves.
    questions: mpsc::UnboundedSender<Input>,
}

/// One start of a run's coordinator, or one membership of a relay: what workers join, push to and pull from.
#[derive(Debug)]
pub(crate) struct Served {
    /// What every joiner is told.
    pub(crate) invitation: v1::Invitation,
    /// Of a vector that a worker pushes.
    pub(crate) pushed_elements: usize,
    pub(crate) inputs: mpsc::UnboundedSender<Input>,
    pub(crate) staging: Arc<Staging>,
    pub(crate) publication: Publication,
    pub(crate) replicas: Replicas,
    /// In which form gradients come.
    pub(crate) format: GradientFormat,
    /// What adapters stand on, if such are trained, once it is here.
    pub(crate) base: OnceLock<Base>,
}

/// A vector that stays as it is while adapters learn.
#[derive(Clone, Debug)]
pub(crate) enum Base {
    /// A run's own.
    File(Arc<BaseFile>),
    /// As a relay has fetched it, little-endian f32.
    Memory(Bytes),
}

impl Base {
    /// How many bytes it has.
    fn len(&self) -> usize {
        match self {
            Self::File(file) => FLOAT_BYTES * file.elements(),
            Self::Memory(bytes) => bytes.len(),
        }
    }

    fn bytes(&self, range: Range<usize>) -> Bytes {
        match self {
            Self::File(file) => file.bytes(range).into(),
            Self::Memory(bytes) => bytes.slice(range),
        }
    }
}

/// The answering of calls, which ends with this value.
#[derive(Debug)]
pub(crate) struct Calls {
    server: JoinSet<Result<(), tonic::transport::Error>>,
    end: oneshot::Sender<()>,
}

impl Calls {
    /// Takes no more calls, and waits until those that came are answered, or until `give_up`.
    pub(crate) async fn finish(mut self, give_up: Instant) {
        let _ = self.end.send(());
        let _ = tokio::time::timeout_at(give_up.into(), self.server.join_next()).await;
    }
}

impl Service {
    /// Serves what `served` holds at a time; questions about the process go to `questions`.
    pub(crate) fn new(served: watch::Receiver<Option<Arc<Served>>>, questions: mpsc::UnboundedSender<Input>) -> Self {
        Self { served, questions }
    }

    /// Answers calls over `listener`.
    pub(crate) fn listen(self, listener: TcpListener) -> Calls {
        let service = v1::lockstep_server::LockstepServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(MAX_FRAME_BYTES);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let (end, ended) = oneshot::channel::<()>();
        let mut calls = JoinSet::new();
        calls.spawn(server.serve_with_incoming_shutdown(service, incoming, async { drop(ended.await) }));
        Calls { server: calls, end }
    }

    /// What is served now.
    fn served(&self) -> Result<Arc<Served>, Status> {
        self.served.borrow().clone().ok_or_else(not_a_member)
    }

    fn check_version(version: u32) -> Result<(), Status> {
        if version == PROTOCOL_VERSION {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "the worker speaks version {version} of the protocol, this coordinator version {PROTOCOL_VERSION}; run the \
             same release of lockstep on both sides"
        )))
    }
}

fn not_a_member() -> Status {
    Status::unavailable("this relay is no member of a run at present: `lockstep status` says what it waits for")
}

fn over() -> Status {
    Status::unavailable("what this was meant for is over; join again")
}

impl Served {
    /// Refuses messages meant for another run, or for an earlier start of this one.
    fn check_run(&self, run_id: &str, incarnation: u64) -> Result<(), Status> {
        let ours = &self.invitation;
        if run_id == ours.run_id && incarnation == ours.incarnation {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "this is start {} of run {}, the message is for start {incarnation} of run {run_id}; join again",
            ours.incarnation, ours.run_id
        )))
    }

    fn send(&self, input: Input) -> Result<(), Status> {
        self.inputs.send(input).map_err(|_| over())
    }

    /// Takes the gradient of a lease out of the memory that its worker shares with us.
    async fn receive_shared(&self, worker: WorkerId, lease: LeaseId) -> Result<Staged, Status> {
        let no_region = || Status::failed_precondition(format!("no memory is shared with worker {worker}; join again"));
        let region = self.staging.region(worker).ok_or_else(no_region)?;
        let memory = self.staging.spare.take();
        let read = blocking(move || Staged::read(&region, lease, memory)).await.map_err(Status::internal)?;
        let lost = || Status::data_loss(format!("the vector of lease {lease} is not in shared memory; push it again"));
        read.map_err(|error| Status::unavailable(format!("shared memory cannot be read: {error}")))?.ok_or_else(lost)
    }
}

type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::lockstep_server::Lockstep for Service {
    type ControlStream = Reply<v1::CoordinatorMessage>;
    type PullStream = Reply<v1::Chunk>;

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::Invitation>, Status> {
        Self::check_version(request.get_ref().protocol_version)?;
        let mut served = self.served.clone();
        let member = tokio::time::timeout(JOIN_PATIENCE, served.wait_for(Option::is_some)).await;
        let served = member.ok().and_then(|served| served.ok()?.clone()).ok_or_else(not_a_member)?;
        Ok(Response::new(served.invitation.clone()))
    }

    async fn admit(&self, request: Request<v1::AdmitRequest>) -> Result<Response<v1::AdmitReply>, Status> {
        let request = request.into_inner();
        Self::check_version(request.protocol_version)?;
        let served = self.served()?;
        served.check_run(&request.run_id, request.incarnation)?;
        if request.name.len() > 64 || request.device.len() > 256 {
            return Err(Status::invalid_argument("name is limited to 64 bytes and device to 256"));
        }
        let class = digest(&request.probe_sha256, "probe_sha256")?;
        let (reply, verdict) = oneshot::channel();
        let (class, workers) = (DeviceClass(class), request.workers.max(1));
        served.send(Input::Join(Applicant { name: request.name, device: request.device, class, workers, reply }))?;
        let verdict = verdict.await.map_err(|_| over())?;
        let mut shared_memory = None;
        let verdict = match verdict {
            Ok(worker) => {
                shared_memory = served.publication.share(served.pushed_elements).map(|(region, offer)| {
                    served.staging.share(worker, region);
                    offer
                });
                v1::admit_reply::Verdict::WorkerId(worker.0)
            }
            Err(ending @ (Refusal::Ending { .. } | Refusal::Released { .. })) => {
                v1::admit_reply::Verdict::Release(ending.to_string())
            }
            Err(refusal) => v1::admit_reply::Verdict::Refusal(refusal.to_string()),
        };
        Ok(Response::new(v1::AdmitReply { verdict: Some(verdict), shared_memory }))
    }

    async fn control(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let worker = WorkerId(number(&request, WORKER_ID_KEY)?);
        // A worker's id means nothing to another start of the coordinator.
        let served = self.served()?;
        served.check_run(text(&request, RUN_ID_KEY)?, number(&request, INCARNATION_KEY)?)?;
        let (out, messages) = mpsc::unbounded_channel();
        served.send(Input::Opened { worker, out })?;
        tokio::spawn(Listener { worker, served }.run(request.into_inner()));
        let messages = UnboundedReceiverStream::new(messages);
        Ok(Response::new(Box::pin(messages.map(|kind| Ok(v1::CoordinatorMessage { kind: Some(kind) })))))
    }

    async fn push(&self, request: Request<Streaming<v1::PushMessage>>) -> Result<Response<v1::PushReply>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.kind);
        let Some(push_message::Kind::Header(header)) = first else {
            return Err(Status::invalid_argument("the first message of a push must be its header"));
        };
        let served = self.served()?;
        served.check_run(&header.run_id, header.incarnation)?;
        let elements = served.pushed_elements;
        let format = if header.shared { GradientFormat::F32 } else { served.format };
        let bytes = format.bytes(elements);
        if header.total_bytes != bytes as u64 {
            let found = header.total_bytes;
            let text = format!("a gradient of {found} bytes; that of {elements} elements as {format:?} has {bytes}");
            return Err(Status::invalid_argument(text));
        }
        let (worker, lease) = (WorkerId(header.worker_id), LeaseId(header.lease_id));
        served.send(Input::PushBegun { worker, lease })?;
        let span = tracing::debug_span!("push", worker = header.worker_id, lease = header.lease_id);
        let staged = match header.shared {
            true => served.receive_shared(worker, lease).instrument(span).await?,
            false => {
                let expected = digest(&header.vector_blake3, "vector_blake3")?;
                let staged = receive(messages, format, elements, served.staging.spare.take()).instrument(span).await?;
                if staged.digest != expected {
                    return Err(Status::data_loss("the vector's BLAKE3 is not the header's; push it again"));
                }
                staged
            }
        };
        let vector_blake3 = staged.digest.to_vec();
        match served.staging.put(worker, lease, staged) {
            true => Ok(Response::new(v1::PushReply { vector_blake3 })),
            false => {
                Err(Status::failed_precondition(format!("worker {worker} is not, or no longer, a member; join again")))
            }
        }
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        let served = self.served()?;
        served.check_run(&request.run_id, request.incarnation)?;
        if request.base {
            let none = || Status::not_found("this run trains all of its model, and no adapters: there is no base");
            let base = served.base.get().cloned().ok_or_else(none)?;
            let chunks = chunk::split_as_read(base.len(), FLOAT_BYTES, move |range| base.bytes(range));
            return Ok(Response::new(Box::pin(tokio_stream::iter(chunks.map(Ok)))));
        }
        if !request.moments_blake3.is_empty() {
            let moments = served.replicas.bytes(digest(&request.moments_blake3, "moments_blake3")?);
            let none =
                || Status::not_found("these moments are not those of a replica now: another version is published");
            return Ok(Response::new(Box::pin(tokio_stream::iter(
                chunk::split(moments.ok_or_else(none)?, FLOAT_BYTES).map(Ok),
            ))));
        }
        let published = served.publication.get();
        let bytes = match (published.version == request.version, request.difference) {
            (true, true) => published.difference.map(|difference| (difference.bytes, DIFFERENCE_BYTES)),
            (true, false) => served.publication.bytes(&published).map(|bytes| (bytes, FLOAT_BYTES)),
            (false, _) => None,
        };
        let Some((bytes, unit_bytes)) = bytes else {
            return Err(Status::not_found(format!(
                "version {} of the parameters is not published; version {} is",
                request.version,
                served.publication.get().version
            )));
        };
        Ok(Response::new(Box::pin(tokio_stream::iter(chunk::split(bytes, unit_bytes).map(Ok)))))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        let (reply, status) = oneshot::channel();
        let over = || Status::unavailable("the run is over");
        self.questions.send(Input::Status { reply }).map_err(|_| over())?;
        status.await.map(Response::new).map_err(|_| over())
    }
}

/// Takes a vector of `elements` in this `format` off the wire, into `memory`.
async fn receive(
    mut messages: Streaming<v1::PushMessage>,
    format: GradientFormat,
    elements: usize,
    memory: Vec<f32>,
) -> Result<Staged, Status> {
    let mut assembler = Assembler::new(format.bytes(elements), format.unit_bytes());
    let mut vector = memory;
    vector.clear();
    vector.reserve_exact(elements);
    while let Some(message) = messages.message().await? {
        let Some(push_message::Kind::Chunk(chunk)) = message.kind else {
            return Err(Status::invalid_argument("after its header a push holds chunks alone"));
        };
        format.decode(assembler.take(&chunk).map_err(chunk_status)?, &mut vector);
    }
    assembler.finish().map_err(chunk_status)?;
    blocking(move || Staged::of(vector)).await.map_err(Status::internal)
}

/// Does something that takes a while beside the other tasks.
///
/// # Errors
/// In words, if it panics.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())
}

/// Reads one member's control stream.
struct Listener {
    worker: WorkerId,
    served: Arc<Served>,
}

impl Listener {
    async fn run(self, mut messages: Streaming<v1::WorkerMessage>) {
        let reason = loop {
            let kind = match messages.message().await {
                Ok(Some(message)) => message.kind,
                Ok(None) => break "the worker closed its control stream".to_string(),
                Err(status) => break format!("its control stream broke: {}", status.message()),
            };
            let input = match kind {
                Some(worker_message::Kind::Heartbeat(heartbeat)) => Input::Heartbeat {
                    worker: self.worker,
                    sent_unix_nanos: heartbeat.sent_unix_nanos,
                    clock_offset_nanos: heartbeat.clock_offset_nanos,
                },
                Some(worker_message::Kind::Declined(declined)) => {
                    let reason = declined.reason.chars().take(1024).collect();
                    Input::Declined { worker: self.worker, lease: LeaseId(declined.lease_id), reason }
                }
                Some(worker_message::Kind::Kept(kept)) => {
                    let blocks = kept.blocks.iter().take(MAX_KEPT).filter_map(translate::kept_block).collect();
                    Input::Kept { worker: self.worker, blocks }
                }
                Some(worker_message::Kind::Result(result)) => match self.finished(result) {
                    Ok(result) => Input::Result { worker: self.worker, result },
                    Err(reason) => break reason,
                },
                Some(worker_message::Kind::Workers(v1::Workers { workers: 0 })) => {
                    break "it stands for no workers".to_string();
                }
                Some(worker_message::Kind::Workers(v1::Workers { workers })) => {
                    Input::Workers { worker: self.worker, workers }
                }
                None => break "it sent a control message of an unknown kind".to_string(),
            };
            if self.served.inputs.send(input).is_err() {
                return;
            }
        };
        // If the runtime is gone too, nobody needs to know.
        let _ = self.served.inputs.send(Input::Closed { worker: self.worker, reason });
    }

    fn finished(&self, result: v1::BlockResult) -> Result<Finished, String> {
        let invitation = &self.served.invitation;
        if result.run_id != invitation.run_id || result.incarnation != invitation.incarnation {
            return Err(format!("it sent a result for start {} of run {}", result.incarnation, result.run_id));
        }
        let block = result.block.ok_or("it sent a result without a block")?;
        let lease = LeaseId(result.lease_id);
        let vector_digest = match result.vector_blake3.is_empty() {
            true => None,
            false => Some(digest(&result.vector_blake3, "vector_blake3").map_err(|s| s.message().to_string())?),
        };
        let batch_sha256 = digest(&result.batch_sha256, "batch_sha256").map_err(|s| s.message().to_string())?;
        // The vector of a lease that was taken back is gone: then the engine says what becomes of the result.
        let staged = self.served.staging.look(self.worker, lease);
        let norm = staged.filter(|(staged, _)| Some(*staged) == vector_digest).map(|(_, norm)| norm);
        let slot_sums = result.slot_loss_sums.iter().zip(&result.slot_weight_sums);
        let of_slots = result.slot_pairs.iter().map(translate::pair_sums);
        let slot_pairs = of_slots.chain(std::iter::repeat(PairSums::default()));
        Ok(Finished {
            lease,
            step: result.step,
            version: result.version,
            block: Block { level: block.level, index: block.index },
            sums: Sums {
                loss: result.loss_sum,
                weight: result.weight_sum,
                pairs: result.pairs.as_ref().map(translate::pair_sums).unwrap_or_default(),
            },
            slot_sums: slot_sums
                .zip(slot_pairs)
                .map(|((&loss, &weight), pairs)| Sums { loss, weight, pairs })
                .collect(),
            row_values: result.row_values,
            digest: vector_digest,
            norm,
            batch_sha256,
            compute: Duration::from_nanos(result.compute_nanos),
            upload: Duration::from_nanos(result.upload_nanos),
            spans: result.spans,
        })
    }
}

/// What a call's metadata holds under `key`.
fn text<'a, T>(request: &'a Request<T>, key: &str) -> Result<&'a str, Status> {
    let value = request.metadata().get(key).and_then(|value| value.to_str().ok());
    value.ok_or_else(|| Status::invalid_argument(format!("metadata {key:?} is missing; see the contract, step 3")))
}

/// The same, as a number.
fn number<T>(request: &Request<T>, key: &str) -> Result<u64, Status> {
    text(request, key)?
        .parse()
        .map_err(|_| Status::invalid_argument(format!("metadata {key:?} must be a number, in decimal")))
}

/// Now, as messages carry it.
pub(crate) fn unix_nanos() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn digest(bytes: &[u8], field: &str) -> Result<[u8; 32], Status> {
    bytes.try_into().map_err(|_| Status::invalid_argument(format!("{field} has {} bytes, SHA-256 has 32", bytes.len())))
}

fn chunk_status(error: chunk::ChunkError) -> Status {
    match error {
        chunk::ChunkError::Checksum { .. } => Status::data_loss(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}
