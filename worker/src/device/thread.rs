//! What the device's thread does: it owns the model, does one job after the other, and computes the slots of a lease one by one.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Weak;
use std::time::Instant;

use lockstep_model::batch::Sums;
use lockstep_model::compression::{GradientFormat, Rounding};
use lockstep_model::compute::{Base, BlockGradient, ComputeError, Computer, LocalSteps, SlotKey};
use lockstep_model::device::ComputeDevice;
use lockstep_model::layout::Layout;
use lockstep_model::ledger::{block_sha256, slot_sha256};
use lockstep_model::probe;
use lockstep_model::tree::sum_leaves;

use super::{Computation, DeviceFailure, Gradient, Job, Outcome, Setting};
use crate::kept::{Kept, KeptGradient};
use crate::lease::{Slot, Task, Work};
use crate::shared::SharedVersion;
use crate::translate::BaseName;

/// The state of the thread.
pub(super) struct DeviceWorker {
    pub(super) device: ComputeDevice,
    /// Counts the handles to this thread.
    handles: Weak<()>,
    pub(super) setting: Option<Setting>,
    /// `None` until something is loaded, and after a failure: what a panic leaves behind is not used again.
    computer: Option<Computer>,
    /// What adapters stand on, over memberships; `None` until it is loaded, and after a failure.
    base: Option<(BaseName, Base)>,
    pub(super) kept: Kept,
}

impl DeviceWorker {
    /// Nothing is set up yet. `handles` count those to this thread.
    pub(super) fn new(device: ComputeDevice, handles: Weak<()>) -> Self {
        Self { device, handles, setting: None, computer: None, base: None, kept: Kept::default() }
    }

    /// Does one job and answers. A receiver that is gone wanted no answer.
    pub(super) fn do_job(&mut self, job: Job) {
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

    pub(super) fn load(&mut self, parameters: &[f32]) -> Result<(), ComputeError> {
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
    pub(super) fn compute(
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
pub(super) fn caught<T>(device: &str, job: impl FnOnce() -> Result<T, ComputeError>) -> Result<T, DeviceFailure> {
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
pub(super) fn in_one_line(report: &str) -> String {
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
