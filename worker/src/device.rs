//! The computing device: a thread of its own that owns the model, takes jobs from a channel and answers each.

use std::any::Any;
use std::cell::Cell;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use lockstep_model::batch::Sums;
use lockstep_model::compression::{GradientFormat, Rounding};
use lockstep_model::compute::{Base, BlockGradient, ComputeError, Computer, LocalSteps, SlotKey};
use lockstep_model::config::{LocalOptimizer, ModelConfig, Objective, Precision};
use lockstep_model::device::ComputeDevice;
use lockstep_model::layout::Layout;
use lockstep_model::ledger::{block_sha256, slot_sha256};
use lockstep_model::probe;
use lockstep_model::tree::sum_leaves;
use tokio::sync::{oneshot, watch};
use tracing::Span;

use crate::compute::{Compute, Proof, Pulled};
use crate::kept::{Kept, KeptGradient};
use crate::lease::{Parameters, Slot, Task, Work};
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
    /// SHA-256 of the rows that were computed, see [`block_sha256`].
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
        let handles = Arc::downgrade(&handle);
        let (description, workers) = (device.description.clone(), watch::channel(1).1);
        let mut worker =
            DeviceWorker { device, handles, setting: None, computer: None, base: None, kept: Kept::default() };
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

/// The state of the thread.
struct DeviceWorker {
    device: ComputeDevice,
    /// Counts the handles to this thread.
    handles: Weak<()>,
    setting: Option<Setting>,
    /// `None` until something is loaded, and after a failure: what a panic leaves behind is not used again.
    computer: Option<Computer>,
    /// What adapters stand on, over memberships; `None` until it is loaded, and after a failure.
    base: Option<(BaseName, Base)>,
    kept: Kept,
}

impl DeviceWorker {
    /// Does one job and answers. A receiver that is gone wanted no answer.
    fn do_job(&mut self, job: Job) {
        match job {
            Job::Probe { setting, leases, reply } => {
                self.computer = None;
                let named = setting.adapters.as_ref().map(|adapters| adapters.base);
                self.base = self.base.take().filter(|(held, _)| Some(*held) == named);
                self.setting = Some(*setting);
                let _ = reply.send(self.guarded(|this| this.probe(&leases)));
            }
            Job::Holds { base, reply } => {
                let _ = reply.send(Ok(self.base.as_ref().is_some_and(|(held, _)| *held == base)));
            }
            Job::LoadBase { base, parameters, reply } => {
                let _ = reply.send(self.guarded(|this| this.load_base(base, &parameters)));
            }
            Job::Enter { run_id, reply } => {
                let _ = reply.send(Ok(self.kept.enter(&run_id)));
            }
            Job::Load { parameters, reply } => {
                let loaded = self.guarded(|this| this.load(&parameters));
                let _ = reply.send(loaded.map(|()| parameters));
            }
            Job::LoadShared { version, next, reply } => {
                let loaded = self.guarded(|this| this.load_shared(&version));
                let next = next.filter(|_| loaded == Ok(true));
                let _ = reply.send(loaded);
                next.into_iter().for_each(|next| self.answer(next));
            }
            Job::Compute(computation) => self.answer(computation),
        }
    }

    /// Computes a lease, and keeps its gradient if that has a name.
    fn answer(&mut self, Computation { work, moments, stop, span, reply }: Computation) {
        let (name, handles) = (work.lease.gradient_name(), self.handles.clone());
        let unheard = || reply.is_closed() && (name.is_none() || handles.strong_count() == 0);
        let abandoned = || stop.is_set() || unheard();
        let outcome = span.in_scope(|| self.guarded(|this| this.compute(&work, &moments, abandoned)));
        drop(span); // so that it can end, and be told of, with the lease's result
        if let (Some(name), Ok(Some(outcome))) = (name, &outcome) {
            let forgotten = self.kept.insert(KeptGradient { name, outcome: outcome.clone() });
            self.reuse(forgotten);
        }
        let cut_short = || DeviceFailure("the computation was cut short: its lease is no longer wanted".into());
        let _ = reply.send(outcome.and_then(|outcome| outcome.ok_or_else(cut_short)));
    }

    /// Lets the device compute in the memory of gradients that nobody needs any more.
    fn reuse(&self, forgotten: Vec<KeptGradient>) {
        let gradients = forgotten.into_iter().filter_map(|kept| kept.outcome.gradient);
        if let (Some(computer), Some(memory)) = (&self.computer, gradients.filter_map(Gradient::into_memory).last()) {
            computer.reuse(memory);
        }
    }

    /// Runs `job`, turning errors and panics into words; after either, the device is set up anew by the next load.
    fn guarded<T>(&mut self, job: impl FnOnce(&mut Self) -> Result<T, ComputeError>) -> Result<T, DeviceFailure> {
        let result = caught(&self.device.description.clone(), || job(self));
        if result.is_err() {
            let broken = (self.computer.take(), self.base.take());
            let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
        }
        result
    }

    fn load(&mut self, parameters: &[f32]) -> Result<(), ComputeError> {
        self.computer()?.load(parameters)
    }

    fn load_shared(&mut self, version: &SharedVersion) -> Result<bool, ComputeError> {
        let read = self.computer()?.load_from(|start, values| version.read(start, values));
        Ok(read.is_ok() && version.is_there())
    }

    fn load_base(&mut self, name: BaseName, parameters: &[f32]) -> Result<(), ComputeError> {
        let computer = self.computer()?;
        let base = computer.base(parameters)?;
        computer.stand_on(base.clone());
        self.base = Some((name, base));
        Ok(())
    }

    /// The computer of the model at hand, set up if need be, on the base that is held.
    fn computer(&mut self) -> Result<&mut Computer, ComputeError> {
        let Some(Setting { model, objective, adapters, precision, .. }) = &self.setting else {
            return Err(ComputeError::Input("parameters came before the model".into()));
        };
        if self.computer.is_none() {
            let mut computer =
                Computer::new(model, &self.device).with_objective(*objective).with_precision(*precision)?;
            if let Some(adapters) = adapters {
                computer = computer.with_adapters(&adapters.config);
            }
            if let Some((_, base)) = &self.base {
                computer.stand_on(base.clone());
            }
            self.computer = Some(computer);
        }
        self.computer.as_mut().ok_or_else(|| ComputeError::Input("no model is set up".into()))
    }

    fn probe(&mut self, leases: &[Work]) -> Result<[u8; 32], ComputeError> {
        let computer = self.computer()?;
        let elements = computer.layout().len();
        if let Some(elements) = computer.base_layout().map(Layout::len) {
            computer.stand_on(computer.base(&probe::parameters(elements))?);
        }
        computer.load(&probe::parameters(elements))?;
        let digest = self.digest(leases);
        // Not to be mistaken for the base that is named.
        self.computer = self.computer.take().filter(|computer| computer.base_layout().is_none());
        digest
    }

    /// The digest of what leases, of one slot each, give with the probe's parameters. Gradients that are rounded are in it as
    /// they were before, too: rounding hides small differences, and no device of another class may pass.
    fn digest(&self, leases: &[Work]) -> Result<[u8; 32], ComputeError> {
        let mut digest = probe::Digest::new();
        for work in leases {
            let block = self.sum(work, &[], GradientFormat::F32, || false)?;
            digest.add_sums(block.sums);
            let Some(mut gradient) = block.gradient else { continue };
            digest.add_vector(&gradient);
            let (format, lease) = (self.format(), &work.lease);
            if format != GradientFormat::F32 {
                Rounding { format, seed: lease.seed, step: lease.step }.round(lease.block, &mut gradient);
                digest.add_vector(&gradient);
            }
        }
        Ok(digest.finish())
    }

    /// What gradients are rounded to.
    fn format(&self) -> GradientFormat {
        self.setting.as_ref().map_or(GradientFormat::F32, |setting| setting.format)
    }

    /// Computes a lease; `None` if it was cut short, which leaves the device as it was.
    fn compute(
        &self,
        work: &Work,
        moments: &[f32],
        abandoned: impl Fn() -> bool,
    ) -> Result<Option<Outcome>, ComputeError> {
        let started = Instant::now();
        let cut_short = Cell::new(false);
        let abandoned = || {
            cut_short.set(abandoned());
            cut_short.get()
        };
        let summed = self.sum(work, moments, self.format(), abandoned);
        let BlockSum { sums, slot_sums, gradient, row_values } = match summed {
            Err(_) if cut_short.get() => return Ok(None),
            summed => summed?,
        };
        let compute_time = started.elapsed();
        let gradient = gradient.map(Gradient::from);
        let batch_sha256 = block_sha256(work.slots.iter().map(|slot| slot_sha256(slot.number, &slot.batch)));
        Ok(Some(Outcome { sums, slot_sums, gradient, row_values, batch_sha256, compute_time }))
    }

    fn sum(
        &self,
        work: &Work,
        moments: &[f32],
        format: GradientFormat,
        abandoned: impl Fn() -> bool,
    ) -> Result<BlockSum, ComputeError> {
        let Some(computer) = &self.computer else {
            return Err(ComputeError::Input("no parameters are loaded".into()));
        };
        let optimizer = self.setting.as_ref().and_then(|setting| setting.local_optimizer.as_ref());
        let learning_rates = &work.learning_rates[..];
        let local = match (work.lease.task, optimizer, learning_rates) {
            (Task::Evaluate | Task::Reference, ..) | (Task::Gradient, None, []) => None,
            (Task::Gradient, Some(optimizer), [_, ..]) => Some(LocalSteps { optimizer, learning_rates, moments }),
            (Task::Gradient, optimizer, learning_rates) => {
                let (steps, optimizer) = (learning_rates.len(), if optimizer.is_some() { "one" } else { "no" });
                return Err(ComputeError::Input(format!(
                    "the lease has {steps} local steps, and the invitation {optimizer} optimizer for such; coordinator and \
                     worker disagree on the step"
                )));
            }
        };
        sum_block(computer, local, work, format, abandoned)
    }
}

/// Sums over one block, in tree order.
struct BlockSum {
    sums: Sums,
    slot_sums: Vec<Sums>,
    gradient: Option<Vec<f32>>,
    row_values: Vec<f32>,
}

/// Computes a lease's slots one by one and adds them up, in tree order, rounding gradients to `format`.
fn sum_block(
    computer: &Computer,
    local: Option<LocalSteps<'_>>,
    work: &Work,
    format: GradientFormat,
    abandoned: impl Fn() -> bool,
) -> Result<BlockSum, ComputeError> {
    let check = || match abandoned() {
        true => Err(ComputeError::Input("the lease is no longer wanted".into())),
        false => Ok(()),
    };
    let mut row_values = Vec::new();
    let (slot_sums, gradient) = match work.lease.task {
        Task::Gradient => {
            let key = |slot: &Slot| SlotKey { seed: work.lease.seed, step: work.lease.step, slot: slot.number };
            let slots = work.slots.iter().map(|slot| (&slot.batch, key(slot)));
            let BlockGradient { slot_sums, gradient } = match local {
                None => computer.block_gradient(slots.map(|slot| check().map(|()| slot)), format)?,
                Some(local) => computer.block_pseudo_gradient(local, slots, format, check)?,
            };
            (slot_sums, Some(gradient))
        }
        Task::Evaluate => (computer.losses(work.slots.iter().map(|slot| check().map(|()| &slot.batch)))?, None),
        Task::Reference => {
            let of_slot = |slot: &Slot| -> Result<Sums, ComputeError> {
                check()?;
                let values = computer.row_values(&slot.batch)?;
                let loss = -values.iter().copied().map(f64::from).sum::<f64>();
                let weight = values.len() as f64;
                row_values.extend(values);
                Ok(Sums { loss, weight, ..Sums::default() })
            };
            (work.slots.iter().map(of_slot).collect::<Result<_, _>>()?, None)
        }
    };
    let sums = sum_leaves(slot_sums.iter().copied().map(Ok::<Sums, ComputeError>), |left, right, _| left + right)?;
    Ok(BlockSum { sums: sums.unwrap_or_default(), slot_sums, gradient, row_values })
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
