//! The computing device: a thread of its own that owns the model, takes jobs from a channel and answers each.

mod thread;

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use lockstep_model::batch::Sums;
use lockstep_model::compression::GradientFormat;
use lockstep_model::config::{LocalOptimizer, ModelConfig, Objective, Precision};
use lockstep_model::device::ComputeDevice;
use tokio::sync::{oneshot, watch};
use tracing::Span;

use self::thread::DeviceWorker;
use crate::compute::{Compute, Proof, Pulled};
use crate::kept::KeptGradient;
use crate::lease::{Parameters, Work};
use crate::session::Departure;
use crate::shared::SharedVersion;
use crate::translate::{Adapters, BaseName, Invitation};

/// What the device made of one lease.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Sums over the block, in tree order.
    pub sums: Sums,
    /// Sums of each existing slot, in order; of a gradient they may be missing.
    pub slot_sums: Vec<Sums>,
    /// The block's gradient, for a gradient task.
    pub gradient: Option<Gradient>,
    /// The number of each row, for a reference task.
    pub row_values: Vec<f32>,
    /// SHA-256 of the rows that were computed, see [`block_sha256`](lockstep_model::ledger::block_sha256).
    pub batch_sha256: [u8; 32],
    /// How long it took.
    pub compute_time: Duration,
}

/// A gradient ready to be sent: all elements in layout order.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradient(Arc<Vec<f32>>);

impl From<Vec<f32>> for Gradient {
    fn from(vector: Vec<f32>) -> Self {
        Self(Arc::new(vector))
    }
}

impl Deref for Gradient {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl Gradient {
    /// Its memory, if nobody else has it.
    fn into_memory(self) -> Option<Vec<f32>> {
        Arc::into_inner(self.0)
    }
}

/// Why the device did not do a job: what happened and which setting to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceFailure(pub String);

/// A handle to the device's thread. The thread ends, at the latest after the slot under way, when all handles are gone.
#[derive(Clone, Debug)]
pub(crate) struct DeviceThread {
    jobs: mpsc::Sender<Job>,
    /// In words.
    description: String,
    /// Stands for one worker, for ever.
    workers: watch::Receiver<u32>,
    /// One of the handles that the thread counts.
    _handle: Arc<()>,
}

/// Cuts a computation short, between two slots or local steps, when it is no longer wanted.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on the result is not wanted.
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it is so.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where the answer to a job goes. Its receiver may be gone.
type Reply<T> = oneshot::Sender<Result<T, DeviceFailure>>;

/// The answer to a job that is queued.
#[derive(Debug)]
pub struct Answer<T>(oneshot::Receiver<Result<T, DeviceFailure>>);

impl<T> Answer<T> {
    /// Waits for it.
    pub(crate) async fn get(self) -> Result<T, DeviceFailure> {
        // A thread that has ended drops the job, and with it the reply.
        let gone = || DeviceFailure("the device's thread has ended; restart this worker".into());
        self.0.await.map_err(|_| gone())?
    }
}

/// A lease to compute.
#[derive(Debug)]
struct Computation {
    work: Arc<Work>,
    moments: Vec<f32>,
    stop: Stop,
    span: Span,
    reply: Reply<Outcome>,
}

#[derive(Debug)]
enum Job {
    Probe { setting: Box<Setting>, leases: Vec<Work>, reply: Reply<[u8; 32]> },
    Holds { base: BaseName, reply: Reply<bool> },
    LoadBase { base: BaseName, parameters: Vec<f32>, reply: Reply<()> },
    Enter { run_id: String, reply: Reply<Vec<KeptGradient>> },
    Load { parameters: Vec<f32>, reply: Reply<Vec<f32>> },
    LoadShared { version: SharedVersion, next: Option<Computation>, reply: Reply<bool> },
    Compute(Computation),
}

/// What is computed.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) model: ModelConfig,
    pub(crate) objective: Objective,
    /// What is trained alone, if not all of the model.
    pub(crate) adapters: Option<Adapters>,
    /// How replicas take their local steps, if slots are such.
    pub(crate) local_optimizer: Option<LocalOptimizer>,
    /// What gradients are rounded to.
    pub(crate) format: GradientFormat,
    /// In what products are computed.
    pub(crate) precision: Precision,
}

impl DeviceThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub(crate) fn start(device: ComputeDevice) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let handle = Arc::new(());
        let (description, workers) = (device.description.clone(), watch::channel(1).1);
        let mut worker = DeviceWorker::new(device, Arc::downgrade(&handle));
        std::thread::Builder::new().name("lockstep-device".into()).spawn(move || {
            let _others = worker.device.enrol();
            for job in queue {
                worker.do_job(job);
            }
        })?;
        Ok(Self { jobs, description, workers, _handle: handle })
    }

    /// Says what is computed from now on, computes `leases` with the probe's parameters and gives the digest of the results.
    /// Parameters must be loaded before anything else is computed.
    pub(crate) async fn probe(&self, setting: Setting, leases: Vec<Work>) -> Result<[u8; 32], DeviceFailure> {
        self.ask(|reply| Job::Probe { setting: Box::new(setting), leases, reply }).await
    }

    /// Whether the device holds what adapters stand on. It does from [`Self::load_base`] until it fails, or another base is
    /// named.
    pub(crate) async fn holds(&self, base: BaseName) -> Result<bool, DeviceFailure> {
        self.ask(|reply| Job::Holds { base, reply }).await
    }

    /// Takes to the device what adapters stand on, flat in its layout.
    pub(crate) async fn load_base(&self, base: BaseName, parameters: Vec<f32>) -> Result<(), DeviceFailure> {
        self.ask(|reply| Job::LoadBase { base, parameters, reply }).await
    }

    /// Says which run is computed for from now on, and gives the gradients of it that were computed before. Those of another
    /// run are forgotten.
    pub(crate) async fn enter(&self, run_id: String) -> Result<Vec<KeptGradient>, DeviceFailure> {
        self.ask(|reply| Job::Enter { run_id, reply }).await
    }

    /// Takes parameters, in layout order, to the device, and gives their memory back.
    pub(crate) async fn load(&self, parameters: Vec<f32>) -> Result<Vec<f32>, DeviceFailure> {
        self.ask(|reply| Job::Load { parameters, reply }).await
    }

    /// Takes parameters out of shared memory to the device; `false` if they were not there to the end: others must be loaded
    /// then. If they were, the lease that is `next`, if there is one, is computed with them at once, as
    /// [`compute`](Self::compute) does.
    pub(crate) fn load_shared(
        &self,
        version: SharedVersion,
        next: Option<(Arc<Work>, Stop, Span)>,
    ) -> (Answer<bool>, Option<Answer<Outcome>>) {
        let (next, outcome) = next
            .map(|(work, stop, span)| {
                let (reply, outcome) = oneshot::channel();
                (Computation { work, moments: Vec::new(), stop, span, reply }, Answer(outcome))
            })
            .unzip();
        (self.queue(|reply| Job::LoadShared { version, next, reply }), outcome)
    }

    /// Computes a lease with the parameters loaded last, and with these `moments` where its replica has kept such, within
    /// `span`. A gradient that has a name is kept. It is computed to
    /// the end even if the future that waits for the answer is dropped; anything else is then cut short.
    ///
    /// # Errors
    /// If the device fails: parameters must be loaded again. If `stop` is set before the end: they need not.
    pub(crate) fn compute(
        &self,
        work: Arc<Work>,
        moments: Vec<f32>,
        stop: Stop,
        span: Span,
    ) -> impl Future<Output = Result<Outcome, DeviceFailure>> + use<> {
        self.ask(|reply| Job::Compute(Computation { work, moments, stop, span, reply }))
    }

    /// Queues a job at once; the future waits for its answer.
    fn ask<T, J>(&self, job: J) -> impl Future<Output = Result<T, DeviceFailure>> + use<T, J>
    where
        J: FnOnce(Reply<T>) -> Job,
    {
        self.queue(job).get()
    }

    fn queue<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Answer<T> {
        let (reply, answer) = oneshot::channel();
        let _ = self.jobs.send(job(reply));
        Answer(answer)
    }
}

impl Compute for DeviceThread {
    fn places(&self) -> usize {
        1
    }

    fn workers(&self) -> watch::Receiver<u32> {
        self.workers.clone()
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn passes_on(&self) -> bool {
        false
    }

    async fn prove(&self, invitation: Invitation) -> Result<Proof, DeviceFailure> {
        let Invitation { model, objective, adapters, local_optimizer, format, precision, probe, .. } = invitation;
        let setting = Setting { model, objective, adapters, local_optimizer, format, precision };
        Ok(Proof { probe_sha256: self.probe(setting, probe).await?, device: self.description.clone() })
    }

    async fn enter(&self, run_id: String) -> Result<Vec<KeptGradient>, DeviceFailure> {
        self.enter(run_id).await
    }

    fn admitted(&self) {}

    fn refused(&self, _: &str) -> bool {
        false
    }

    fn parted(&self, _: &Departure) {}

    async fn holds(&self, base: BaseName) -> Result<bool, DeviceFailure> {
        self.holds(base).await
    }

    async fn load_base(&self, base: BaseName, parameters: Vec<f32>) -> Result<(), DeviceFailure> {
        self.load_base(base, parameters).await
    }

    async fn load(&self, pulled: Pulled) -> Result<Vec<f32>, DeviceFailure> {
        self.load(pulled.vector).await
    }

    fn load_shared(
        &self,
        _: Parameters,
        version: SharedVersion,
        next: Option<(Arc<Work>, Stop, Span)>,
    ) -> (impl Future<Output = Result<bool, DeviceFailure>> + Send, Option<Answer<Outcome>>) {
        let (loaded, outcome) = self.load_shared(version, next);
        (loaded.get(), outcome)
    }

    fn compute(
        &self,
        work: Arc<Work>,
        moments: Vec<f32>,
        stop: Stop,
        span: Span,
    ) -> impl Future<Output = Result<Outcome, DeviceFailure>> + Send + use<> {
        self.compute(work, moments, stop, span)
    }

    fn abandon(&self, _: u64) {}
}

#[cfg(test)]
mod tests;
