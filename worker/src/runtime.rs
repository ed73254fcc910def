//! A worker's life: connect, join, show the probe, be a member; and again whenever the connection is lost.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;

use lockstep_model::device::ComputeDevice;
use lockstep_proto::v1::SpanTiming;
use tonic::transport::Endpoint;
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::client::{CallError, Client, Identity, endpoint};
use crate::compute::{Compute, Proof};
use crate::device::{DeviceFailure, DeviceThread};
use crate::membership::Membership;
use crate::session::Departure;
use crate::shared::Shared;

/// Gives the spans of work that have finished since it was last called, each once.
pub type SpanSource = Arc<dyn Fn() -> Vec<SpanTiming> + Send + Sync>;

/// Called whenever the worker has become a member of a run.
pub type JoinedHook = Arc<dyn Fn() + Send + Sync>;

/// One worker.
#[derive(Clone)]
pub struct WorkerConfig {
    /// Where the coordinator listens, `HOST:PORT`.
    pub address: String,
    /// By which the coordinator tells workers apart and trusts them, e.g. `host:device`. The first 64 bytes are sent.
    pub name: String,
    /// Whether vectors may pass through memory that a coordinator on the same machine offers; else they take the network.
    pub shared_memory: bool,
    /// Finished spans, which travel with the next result.
    pub spans: SpanSource,
    /// Who wants to know of each membership.
    pub joined: JoinedHook,
}

impl fmt::Debug for WorkerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, name, shared_memory, spans: _, joined: _ } = self;
        let mut text = f.debug_struct("WorkerConfig");
        text.field("address", address).field("name", name).field("shared_memory", shared_memory).finish_non_exhaustive()
    }
}

/// How a worker ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The run is over; how it ended.
    Released(String),
    /// The coordinator let it go, for this reason, and the run goes on without it.
    Dismissed(String),
    /// The caller shut it down.
    Shutdown,
}

/// Why a worker cannot work; trying again as it is would not help.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The address is none.
    #[error("{address:?} is not HOST:PORT ({reason}); for example --join 192.168.1.20:7070")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The coordinator does not want this worker, or the two cannot work together.
    #[error("not admitted by the coordinator at {address}: {reason}")]
    Refused {
        /// The coordinator.
        address: String,
        /// Why, and what to change.
        reason: String,
    },
    /// The probe could not be computed.
    #[error("this worker cannot compute what the coordinator at {address} trains: {reason}")]
    Probe {
        /// The coordinator.
        address: String,
        /// What happened, and what to change.
        reason: String,
    },
    /// The operating system gave no thread.
    #[error("no thread for the computing device: {0}; raise the limit on processes (ulimit -u)")]
    Thread(#[from] std::io::Error),
}

/// Works for the coordinator at `config.address` until it releases this worker or `shutdown` completes.
///
/// Connecting is tried for ever, with waits of 100 ms doubling to 5 s, each cut by up to half; after a connection is lost the
/// worker joins anew, and offers the gradients that it computed for the same run.
///
/// # Errors
/// If the worker is refused, or cannot work; see [`WorkerError`].
pub async fn run(
    config: WorkerConfig,
    device: ComputeDevice,
    shutdown: impl Future<Output = ()>,
) -> Result<Ended, WorkerError> {
    run_with(config, DeviceThread::start(device)?, shutdown).await
}

/// The same, whatever computes.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    config: WorkerConfig,
    device: impl Compute,
    shutdown: impl Future<Output = ()>,
) -> Result<Ended, WorkerError> {
    let worker = Worker::new(config, device)?;
    // Dropping the worker's future closes its connection and ends its tasks; the device's thread follows.
    tokio::select! {
        biased;
        () = shutdown => Ok(Ended::Shutdown),
        ended = worker.work() => ended,
    }
}

struct Worker<C> {
    address: String,
    endpoint: Endpoint,
    name: String,
    device: C,
    shared_memory: bool,
    spans: SpanSource,
    joined: JoinedHook,
    backoff: Backoff,
}

/// Why there was no membership.
enum Setback {
    /// As if there had been one, and it had ended so.
    Departed(Departure),
    /// There is none to be had.
    Final(WorkerError),
}

impl<C: Compute> Worker<C> {
    fn new(config: WorkerConfig, device: C) -> Result<Self, WorkerError> {
        let WorkerConfig { address, name, shared_memory, spans, joined } = config;
        let endpoint = match endpoint(&address) {
            Ok(endpoint) => endpoint,
            Err(reason) => return Err(WorkerError::Address { address, reason }),
        };
        let seed = RandomState::new().hash_one((std::process::id(), &name));
        Ok(Self { address, endpoint, name, device, shared_memory, spans, joined, backoff: Backoff::new(seed) })
    }

    /// Joins, and joins again.
    async fn work(mut self) -> Result<Ended, WorkerError> {
        info!("connecting to the coordinator at {} as {} on {}", self.address, self.name, self.device.description());
        loop {
            let departure = match self.join_and_serve().await {
                Ok(departure) | Err(Setback::Departed(departure)) => departure,
                Err(Setback::Final(error)) => return Err(error),
            };
            self.device.parted(&departure);
            let reason = match departure {
                Departure::Released(reason) => return Ok(Ended::Released(reason)),
                Departure::Dismissed(reason) => return Ok(Ended::Dismissed(reason)),
                Departure::Deserted => continue,
                Departure::Lost(reason) => reason,
            };
            let (attempt, wait) = self.backoff.failed();
            let (address, wait_secs) = (&self.address, wait.as_secs_f64());
            warn!(
                "no connection to the coordinator at {address}: {reason}; attempt {attempt}, next in {wait_secs:.1} s"
            );
            tokio::time::sleep(wait).await;
        }
    }

    /// One attempt and, if it succeeds, one membership, up to a release.
    async fn join_and_serve(&mut self) -> Result<Departure, Setback> {
        let mut client = Client::connect(&self.endpoint).await.map_err(|error| self.setback(error))?;
        let identity = Identity { name: self.name.clone(), device: self.device.description() };
        let invitation = client.join(&identity).await.map_err(|error| self.setback(error))?;
        let run = invitation.run.clone();
        let no_use = |failure: DeviceFailure| {
            Setback::Final(WorkerError::Probe { address: self.address.clone(), reason: failure.to_string() })
        };
        let (elements, kept_elements) = (invitation.elements, invitation.kept_elements);
        let base = invitation.adapters.as_ref().map(|adapters| adapters.base);
        let (format, timing) = (invitation.format, invitation.timing);
        let Proof { probe_sha256, device } = self.device.prove(invitation).await.map_err(no_use)?;
        let kept = self.device.enter(run.id.clone()).await.map_err(no_use)?;
        let identity = Identity { device, ..identity };
        let workers = (*self.device.workers().borrow()).max(1);
        let (worker_id, offer) = match client.admit(&run, &identity, probe_sha256, workers).await {
            Err(CallError::Final(reason)) if self.device.refused(&reason) => return Ok(Departure::Deserted),
            admitted => admitted.map_err(|error| self.setback(error))?,
        };
        let shared = offer
            .filter(|_| self.shared_memory)
            .and_then(|offer| Shared::open(&offer, elements, elements + kept_elements))
            .map(Arc::new);
        let control = client.control(&run, worker_id).await.map_err(|error| self.setback(error))?;
        let way = if shared.is_some() { "vectors by shared memory" } else { "vectors by network" };
        info!(
            "worker {worker_id} of run {} (start {}) at {}, {}, {way}",
            run.id, run.incarnation, self.address, identity.device
        );
        self.device.admitted();
        let membership = Membership {
            client,
            control,
            device: self.device.clone(),
            workers,
            kept,
            run,
            worker_id,
            elements,
            kept_elements,
            format,
            base,
            shared,
            timing,
            spans: self.spans.clone(),
        };
        let on_first_word = || {
            self.backoff.reset();
            (self.joined)();
        };
        Ok(membership.serve(on_first_word).await)
    }

    fn setback(&self, error: CallError) -> Setback {
        match error {
            CallError::Lost(reason) => Setback::Departed(Departure::Lost(reason)),
            CallError::Released(reason) => Setback::Departed(Departure::Released(reason)),
            CallError::Final(reason) => Setback::Final(WorkerError::Refused { address: self.address.clone(), reason }),
        }
    }
}
