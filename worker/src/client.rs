//! The coordinator as a worker sees it: the calls of the contract, in domain types.

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use lockstep_model::compression::{DIFFERENCE_BYTES, GradientFormat, add_difference};
use lockstep_model::digest::hex;
use lockstep_model::pieces::vector_blake3;
use lockstep_proto::chunk::{self, Assembler, FLOAT_BYTES};
use lockstep_proto::v1::lockstep_client::LockstepClient;
use lockstep_proto::{
    CONNECTION_WINDOW_BYTES, INCARNATION_KEY, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, RUN_ID_KEY,
    STREAM_WINDOW_BYTES, TRACEPARENT_KEY, WORKER_ID_KEY, v1,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use crate::device::Gradient;
use crate::lease::Parameters;
use crate::session::TransferFailure;
use crate::shared::Shared;
use crate::translate::{self, BaseName, Invitation, Run, shortened};

/// How long a connection, and the answer to a small call, may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Messages waiting to leave on the control stream. A coordinator that takes none of so many is lost.
const OUTGOING_MESSAGES: usize = 256;

/// Longest names the contract allows, bytes.
const NAME_LIMIT: usize = 64;
const DEVICE_LIMIT: usize = 256;

/// Why a call did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// The coordinator cannot be reached now; it may be later.
    #[error("{0}")]
    Lost(String),
    /// The run is over, or about to be.
    #[error("{0}")]
    Released(String),
    /// The coordinator says no, or is no coordinator that this build can work for.
    #[error("{0}")]
    Final(String),
}

/// Who this worker is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// For logs and status.
    pub(crate) name: String,
    /// The computing device in words.
    pub(crate) device: String,
}

/// A connection to a coordinator. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    rpc: LockstepClient<Channel>,
}

/// How a gradient gets to the coordinator.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way<'a> {
    /// By memory that both share, as f32.
    Memory(&'a Shared),
    /// In the format that it was rounded to.
    Network(GradientFormat),
}

/// The two ends of a control stream.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) outgoing: mpsc::Sender<v1::WorkerMessage>,
    pub(crate) incoming: Streaming<v1::CoordinatorMessage>,
}

/// The way to a coordinator at `address`, `HOST:PORT`.
///
/// # Errors
/// If it is not an address.
pub(crate) fn endpoint(address: &str) -> Result<Endpoint, String> {
    let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    if !matches!(port, Some(Ok(1..))) {
        return Err("it does not end in a port".into());
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| in_words(&error))?;
    Ok(endpoint
        .connect_timeout(CALL_TIMEOUT)
        .tcp_nodelay(true)
        .max_frame_size(MAX_FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

impl Client {
    /// Connects.
    pub(crate) async fn connect(endpoint: &Endpoint) -> Result<Self, CallError> {
        let channel = endpoint.connect().await.map_err(|error| CallError::Lost(in_words(&error)))?;
        Ok(Self { rpc: LockstepClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES) })
    }

    /// Asks what there is to train.
    pub(crate) async fn join(&mut self, identity: &Identity) -> Result<Invitation, CallError> {
        let request = v1::JoinRequest {
            protocol_version: PROTOCOL_VERSION,
            name: shortened(&identity.name, NAME_LIMIT),
            device: shortened(&identity.device, DEVICE_LIMIT),
        };
        let invitation = in_time("Join", self.rpc.join(request)).await?.into_inner();
        translate::invitation(invitation).map_err(|error| {
            CallError::Final(format!(
                "the coordinator's invitation makes no sense to this build: {error}; run the same version on both sides"
            ))
        })
    }

    /// Shows the probe's digest, for so many workers; the worker's id, if it is admitted, and what memory the coordinator would
    /// share.
    pub(crate) async fn admit(
        &mut self,
        run: &Run,
        identity: &Identity,
        probe: [u8; 32],
        workers: u32,
    ) -> Result<(u64, Option<v1::SharedMemory>), CallError> {
        let request = v1::AdmitRequest {
            run_id: run.id.clone(),
            incarnation: run.incarnation,
            protocol_version: PROTOCOL_VERSION,
            name: shortened(&identity.name, NAME_LIMIT),
            device: shortened(&identity.device, DEVICE_LIMIT),
            probe_sha256: probe.to_vec(),
            workers,
        };
        let reply = in_time("Admit", self.rpc.admit(request)).await?.into_inner();
        match reply.verdict {
            Some(v1::admit_reply::Verdict::WorkerId(id)) => Ok((id, reply.shared_memory)),
            Some(v1::admit_reply::Verdict::Release(reason)) => Err(CallError::Released(reason)),
            Some(v1::admit_reply::Verdict::Refusal(reason)) => Err(CallError::Final(reason)),
            None => Err(CallError::Final("the coordinator neither admitted nor refused this worker".into())),
        }
    }

    /// Opens the control stream, which is the membership.
    pub(crate) async fn control(&mut self, run: &Run, worker_id: u64) -> Result<Control, CallError> {
        let (outgoing, messages) = mpsc::channel(OUTGOING_MESSAGES);
        let mut request = Request::new(ReceiverStream::new(messages));
        let metadata = request.metadata_mut();
        metadata.insert(WORKER_ID_KEY, MetadataValue::from(worker_id));
        metadata.insert(INCARNATION_KEY, MetadataValue::from(run.incarnation));
        let run_id = run.id.parse().map_err(|_| CallError::Final("the run's id is no plain text".into()))?;
        metadata.insert(RUN_ID_KEY, run_id);
        let incoming = in_time("Control", self.rpc.control(request)).await?.into_inner();
        Ok(Control { outgoing, incoming })
    }

    /// Fetches the parameters of one version, `elements` in all, into `memory`, and checks that they are what their
    /// digest says.
    pub(crate) async fn pull(
        &mut self,
        run: &Run,
        Parameters { version, digest }: Parameters,
        elements: usize,
        memory: Vec<f32>,
    ) -> Result<Vec<f32>, TransferFailure> {
        let request = v1::PullRequest { version, ..pull_request(run) };
        self.receive(request, digest, elements, memory).await
    }

    /// The same by what they differ by from those that are `held`; these bytes are appended to `kept`, if that is wanted.
    pub(crate) async fn pull_difference(
        &mut self,
        run: &Run,
        Parameters { version, digest }: Parameters,
        mut held: Vec<f32>,
        mut kept: Option<&mut Vec<u8>>,
    ) -> Result<Vec<f32>, TransferFailure> {
        let request = v1::PullRequest { version, difference: true, ..pull_request(run) };
        let assembler = Assembler::new(DIFFERENCE_BYTES * held.len(), DIFFERENCE_BYTES);
        let mut at = 0;
        let add = |bytes: &[u8]| {
            let end = at + bytes.len() / DIFFERENCE_BYTES;
            add_difference(bytes, &mut held[at..end]);
            at = end;
            if let Some(kept) = &mut kept {
                kept.extend_from_slice(bytes);
            }
        };
        self.receive_bytes(request, assembler, add).await?;
        checked(held, digest).await
    }

    /// Fetches what adapters stand on, and checks that it is what its digest says.
    pub(crate) async fn pull_base(&mut self, run: &Run, base: BaseName) -> Result<Vec<f32>, TransferFailure> {
        let request = v1::PullRequest { base: true, ..pull_request(run) };
        self.receive(request, Some(base.blake3), base.elements, Vec::new()).await
    }

    /// Fetches the moments of a replica, `elements` in all, and checks that they are what their digest says.
    pub(crate) async fn pull_moments(
        &mut self,
        run: &Run,
        blake3: [u8; 32],
        elements: usize,
    ) -> Result<Vec<f32>, TransferFailure> {
        let request = v1::PullRequest { moments_blake3: blake3.to_vec(), ..pull_request(run) };
        self.receive(request, Some(blake3), elements, Vec::new()).await
    }

    /// Fetches a vector of so many `elements` into `memory`, which has this digest, if one is known.
    async fn receive(
        &mut self,
        request: v1::PullRequest,
        digest: Option<[u8; 32]>,
        elements: usize,
        memory: Vec<f32>,
    ) -> Result<Vec<f32>, TransferFailure> {
        let assembler = Assembler::new(FLOAT_BYTES * elements, FLOAT_BYTES);
        let mut vector = memory;
        vector.clear();
        vector.reserve_exact(elements);
        self.receive_bytes(request, assembler, |bytes| chunk::read_floats(bytes, &mut vector)).await?;
        checked(vector, digest).await
    }

    /// Fetches what is asked for, and gives its bytes to `take`, part by part.
    async fn receive_bytes(
        &mut self,
        request: v1::PullRequest,
        mut assembler: Assembler,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), TransferFailure> {
        let damaged = |error: chunk::ChunkError| TransferFailure::Damaged(error.to_string());
        let mut chunks = self.rpc.pull(request).await.map_err(transfer_failure)?.into_inner();
        while let Some(chunk) = chunks.message().await.map_err(transfer_failure)? {
            take(assembler.take(&chunk).map_err(damaged)?);
        }
        assembler.finish().map_err(damaged)
    }

    /// Sends the gradient of one lease; its BLAKE3. `traceparent` names the lease's span to the coordinator.
    pub(crate) async fn push(
        &mut self,
        run: &Run,
        worker_id: u64,
        lease_id: u64,
        gradient: &Gradient,
        way: Way<'_>,
        traceparent: &str,
    ) -> Result<[u8; 32], TransferFailure> {
        use v1::push_message::Kind;
        let header = v1::PushHeader {
            run_id: run.id.clone(),
            incarnation: run.incarnation,
            worker_id,
            lease_id,
            total_bytes: (FLOAT_BYTES * gradient.len()) as u64,
            vector_blake3: Vec::new(),
            shared: matches!(way, Way::Memory(_)),
        };
        // Until the coordinator has read the vector.
        let mut place = None;
        let (header, bytes, unit_bytes) = match way {
            Way::Memory(shared) => {
                place = Some(shared.put(lease_id, gradient).await?);
                (header, Bytes::new(), FLOAT_BYTES)
            }
            Way::Network(format) => {
                let gradient = gradient.clone();
                let prepared = blocking(move || {
                    let bytes = Bytes::from(format.encode(&gradient));
                    let (total_bytes, vector_blake3) = (bytes.len() as u64, vector_blake3(&gradient).to_vec());
                    (v1::PushHeader { total_bytes, vector_blake3, ..header }, bytes, format.unit_bytes())
                });
                prepared.await?
            }
        };
        let messages = std::iter::once(Kind::Header(header)).chain(chunk::split(bytes, unit_bytes).map(Kind::Chunk));
        let messages = messages.map(|kind| v1::PushMessage { kind: Some(kind) });
        let mut request = Request::new(tokio_stream::iter(messages));
        if let Ok(traceparent) = traceparent.parse::<MetadataValue<Ascii>>()
            && !traceparent.is_empty()
        {
            request.metadata_mut().insert(TRACEPARENT_KEY, traceparent);
        }
        let reply = self.rpc.push(request).await.map_err(transfer_failure)?.into_inner();
        drop(place);
        let length = reply.vector_blake3.len();
        reply.vector_blake3.try_into().map_err(|_| {
            TransferFailure::Disconnected(format!("the coordinator answered with a digest of {length} bytes"))
        })
    }
}

/// A request for nothing yet.
fn pull_request(run: &Run) -> v1::PullRequest {
    v1::PullRequest { run_id: run.id.clone(), incarnation: run.incarnation, ..v1::PullRequest::default() }
}

/// The vector, if it has this digest, where one is known.
async fn checked(vector: Vec<f32>, digest: Option<[u8; 32]>) -> Result<Vec<f32>, TransferFailure> {
    let Some(expected) = digest else { return Ok(vector) };
    let (found, vector) = blocking(move || (vector_blake3(&vector), vector)).await?;
    match found == expected {
        true => Ok(vector),
        false => {
            let (found, expected) = (hex(&found), hex(&expected));
            Err(TransferFailure::Damaged(format!("its BLAKE3 is {found}, and should be {expected}")))
        }
    }
}

/// Does something that takes a while beside the other tasks.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TransferFailure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| TransferFailure::Disconnected(error.to_string()))
}

/// Waits for the answer to a small call, but not for ever.
async fn in_time<T>(call: &str, answer: impl Future<Output = Result<T, Status>>) -> Result<T, CallError> {
    match tokio::time::timeout(CALL_TIMEOUT, answer).await {
        Ok(answer) => answer.map_err(|status| call_error(call, &status)),
        Err(_) => Err(CallError::Lost(format!("{call} was not answered within {} s", CALL_TIMEOUT.as_secs()))),
    }
}

/// Whether a call is worth another try.
fn call_error(call: &str, status: &Status) -> CallError {
    let words = status_in_words(status);
    match status.code() {
        Code::Unimplemented => {
            CallError::Final(format!("it answers {call} with {words}: it is no Lockstep coordinator"))
        }
        Code::FailedPrecondition | Code::InvalidArgument if call == "Join" => CallError::Final(words),
        _ => CallError::Lost(format!("{call}: {words}")),
    }
}

/// What can be done about a vector that did not arrive.
fn transfer_failure(status: Status) -> TransferFailure {
    let words = status_in_words(&status);
    match status.code() {
        Code::DataLoss => TransferFailure::Damaged(words),
        Code::NotFound
        | Code::InvalidArgument
        | Code::PermissionDenied
        | Code::AlreadyExists
        | Code::ResourceExhausted => TransferFailure::Refused(words),
        _ => TransferFailure::Disconnected(words),
    }
}

/// A status with what caused it, for people.
fn status_in_words(status: &Status) -> String {
    match (status.message(), status.source()) {
        ("", None) => status.code().description().to_owned(),
        (message, None) => message.to_owned(),
        (_, Some(source)) => in_words(source),
    }
}

/// An error with all its causes, each said once.
fn in_words(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !words.contains(&said) {
            words = format!("{words}: {said}");
        }
        next = cause.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for good in ["127.0.0.1:7070", "[::1]:7070", "gpu-box.local:80"] {
            assert!(endpoint(good).is_ok(), "{good}");
        }
        for bad in ["", "7070", "host", "host:0", "host:65536", "host:port", "two words:7070"] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_status_says_whether_another_try_can_help() {
        let other_version = Status::failed_precondition("protocol 2 here, 1 there");
        assert_eq!(call_error("Join", &other_version), CallError::Final("protocol 2 here, 1 there".into()));
        assert_eq!(call_error("Admit", &Status::unavailable("later")), CallError::Lost("Admit: later".into()));
        assert!(matches!(call_error("Join", &Status::unimplemented("")), CallError::Final(_)));
        assert_eq!(transfer_failure(Status::data_loss("crc")), TransferFailure::Damaged("crc".into()));
        assert_eq!(transfer_failure(Status::not_found("gone")), TransferFailure::Refused("gone".into()));
        let not_a_member = Status::failed_precondition("join again");
        assert_eq!(transfer_failure(not_a_member), TransferFailure::Disconnected("join again".into()));
        assert_eq!(transfer_failure(Status::unavailable("reset")), TransferFailure::Disconnected("reset".into()));
    }
}
