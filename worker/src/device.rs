//! The computing device: a thread of its own that owns the model, takes jobs from a channel and answers each.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lockstep_model::batch::Sums;
use lockstep_model::compute::{BlockGradient, ComputeError, Computer, SlotKey};
use lockstep_model::config::ModelConfig;
use lockstep_model::device::ComputeDevice;
use lockstep_model::digest::bytes_sha256;
use lockstep_model::layout::Layout;
use lockstep_model::probe;
use lockstep_model::tree::sum_leaves;
use lockstep_proto::chunk;
use tokio::sync::oneshot;
use tracing::Span;

use crate::lease::{Slot, Task, Work};

/// What the device made of one lease.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Sums over the block, in tree order.
    pub(crate) sums: Sums,
    /// Sums of each existing slot, in order.
    pub(crate) slot_sums: Vec<Sums>,
    /// The block's gradient, for a gradient task.
    pub(crate) gradient: Option<Gradient>,
    /// How long it took.
    pub(crate) compute_time: Duration,
}

/// A gradient ready to be sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Gradient {
    /// All elements in layout order, little-endian f32.
    pub(crate) bytes: Bytes,
    /// SHA-256 of `bytes`.
    pub(crate) sha256: [u8; 32],
}

/// Why the device did not do a job: what happened and which setting to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct DeviceFailure(String);

/// A handle to the device's thread. The thread ends, at the latest after the slot under way, when all handles are gone.
#[derive(Clone, Debug)]
pub(crate) struct DeviceThread {
    jobs: mpsc::Sender<Job>,
}

/// Where the answer to a job goes. If its receiver is gone, nobody waits and the job is cut short.
type Reply<T> = oneshot::Sender<Result<T, DeviceFailure>>;

#[derive(Debug)]
enum Job {
    Probe { model: ModelConfig, leases: Vec<Work>, reply: Reply<[u8; 32]> },
    Load { parameters: Vec<f32>, reply: Reply<()> },
    Compute { work: Arc<Work>, span: Span, reply: Reply<Outcome> },
}

impl DeviceThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub(crate) fn start(device: ComputeDevice) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let mut worker = DeviceWorker { device, model: None, computer: None };
        std::thread::Builder::new().name("lockstep-device".into()).spawn(move || {
            for job in queue {
                worker.do_job(job);
            }
        })?;
        Ok(Self { jobs })
    }

    /// Sets the model to compute from now on, computes `leases` with the probe's parameters and gives the digest of the
    /// results. Parameters must be loaded before anything else is computed.
    pub(crate) async fn probe(&self, model: ModelConfig, leases: Vec<Work>) -> Result<[u8; 32], DeviceFailure> {
        self.ask(|reply| Job::Probe { model, leases, reply }).await
    }

    /// Takes parameters, in layout order, to the device.
    pub(crate) async fn load(&self, parameters: Vec<f32>) -> Result<(), DeviceFailure> {
        self.ask(|reply| Job::Load { parameters, reply }).await
    }

    /// Computes a lease with the parameters loaded last, within `span`. After a failure they must be loaded again.
    pub(crate) async fn compute(&self, work: Arc<Work>, span: Span) -> Result<Outcome, DeviceFailure> {
        self.ask(|reply| Job::Compute { work, span, reply }).await
    }

    async fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, DeviceFailure> {
        let gone = || DeviceFailure("the device's thread has ended; restart this worker".into());
        let (reply, answer) = oneshot::channel();
        self.jobs.send(job(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// The state of the thread.
struct DeviceWorker {
    device: ComputeDevice,
    model: Option<ModelConfig>,
    /// `None` until something is loaded, and after a failure: what a panic leaves behind is not used again.
    computer: Option<Computer>,
}

impl DeviceWorker {
    /// Does one job and answers. A receiver that is gone wanted no answer.
    fn do_job(&mut self, job: Job) {
        match job {
            Job::Probe { model, leases, reply } => {
                self.computer = None;
                self.model = Some(model);
                let _ = reply.send(self.guarded(|this| this.probe(&leases)));
            }
            Job::Load { parameters, reply } => {
                let _ = reply.send(self.guarded(|this| this.load(&parameters)));
            }
            Job::Compute { work, span, reply } => {
                let outcome = span.in_scope(|| self.guarded(|this| this.compute(&work, || reply.is_closed())));
                drop(span); // so that it can end, and be told of, with the lease's result
                let _ = reply.send(outcome);
            }
        }
    }

    /// Runs `job`, turning errors and panics into words; after either, the device is set up anew by the next load.
    fn guarded<T>(&mut self, job: impl FnOnce(&mut Self) -> Result<T, ComputeError>) -> Result<T, DeviceFailure> {
        let result = caught(&self.device.description.clone(), || job(self));
        if result.is_err() {
            let broken = self.computer.take();
            let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
        }
        result
    }

    fn load(&mut self, parameters: &[f32]) -> Result<(), ComputeError> {
        let computer = match (&mut self.computer, &self.model) {
            (Some(computer), _) => computer,
            (none, Some(model)) => none.insert(Computer::new(model, &self.device)),
            (_, None) => return Err(ComputeError::Input("parameters came before the model".into())),
        };
        computer.load(parameters)
    }

    fn probe(&mut self, leases: &[Work]) -> Result<[u8; 32], ComputeError> {
        let elements = self.model.as_ref().map_or(0, |model| Layout::of(model).len());
        self.load(&probe::parameters(elements))?;
        let mut digest = probe::Digest::new();
        for work in leases {
            let block = self.sum(work, || false)?;
            digest.add_sums(block.sums);
            if let Some(gradient) = block.gradient {
                digest.add_vector(&gradient);
            }
        }
        Ok(digest.finish())
    }

    fn compute(&self, work: &Work, abandoned: impl Fn() -> bool) -> Result<Outcome, ComputeError> {
        let started = Instant::now();
        let BlockSum { sums, slot_sums, gradient } = self.sum(work, abandoned)?;
        let compute_time = started.elapsed();
        let gradient = gradient.map(|gradient| {
            let bytes = chunk::to_bytes(&gradient);
            Gradient { sha256: bytes_sha256(&bytes), bytes }
        });
        Ok(Outcome { sums, slot_sums, gradient, compute_time })
    }

    fn sum(&self, work: &Work, abandoned: impl Fn() -> bool) -> Result<BlockSum, ComputeError> {
        let Some(computer) = &self.computer else {
            return Err(ComputeError::Input("no parameters are loaded".into()));
        };
        sum_block(computer, work, abandoned)
    }
}

/// Sums over one block, in tree order.
struct BlockSum {
    sums: Sums,
    slot_sums: Vec<Sums>,
    gradient: Option<Vec<f32>>,
}

/// Computes a lease's slots one by one and adds them up, in tree order.
fn sum_block(computer: &Computer, work: &Work, abandoned: impl Fn() -> bool) -> Result<BlockSum, ComputeError> {
    let check = || match abandoned() {
        true => Err(ComputeError::Input("the membership that the lease belonged to has ended".into())),
        false => Ok(()),
    };
    let (slot_sums, gradient) = match work.lease.task {
        Task::Gradient => {
            let key = |slot: &Slot| SlotKey { seed: work.seed, step: work.lease.step, slot: slot.number };
            let slots = work.slots.iter().map(|slot| check().map(|()| (&slot.batch, key(slot))));
            let BlockGradient { slot_sums, gradient } = computer.block_gradient(slots)?;
            (slot_sums, Some(gradient))
        }
        Task::Evaluate => (computer.losses(work.slots.iter().map(|slot| check().map(|()| &slot.batch)))?, None),
    };
    let sums = sum_leaves(slot_sums.iter().copied().map(Ok::<Sums, ComputeError>), |left, right| left + right)?;
    Ok(BlockSum { sums: sums.unwrap_or_default(), slot_sums, gradient })
}

/// Runs `job` and puts its error or panic into words. Backends panic where memory runs out or a kernel does not compile.
fn caught<T>(device: &str, job: impl FnOnce() -> Result<T, ComputeError>) -> Result<T, DeviceFailure> {
    let failed = match catch_unwind(AssertUnwindSafe(job)) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(ComputeError::Device(problem))) => problem,
        Ok(Err(disagreement)) => return Err(DeviceFailure(disagreement.to_string())),
        Err(panic) => panic_message(panic.as_ref()).to_owned(),
    };
    tracing::debug!("{device} failed: {failed}");
    Err(DeviceFailure(format!(
        "{device} failed: {}; if memory ran out, lower batch.sequences_per_slot in the recipe (and raise batch.slots); \
         else start this worker with --device cpu",
        in_one_line(&failed)
    )))
}

/// A backend's report, which may run to hundreds of lines, down to its first root cause: the first line, and each that
/// follows a line "Caused by:" without a break.
fn in_one_line(report: &str) -> String {
    let mut lines = report.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut causes: Vec<&str> = lines.next().into_iter().collect();
    while lines.next() == Some("Caused by:") {
        causes.extend(lines.next());
    }
    causes.join(": ")
}

/// What a panic said.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without words")
}

#[cfg(test)]
mod tests;
