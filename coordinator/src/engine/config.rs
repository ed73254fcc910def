//! What the engine must know of a run, and what is due when.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::id::DeviceClass;

/// One run, as far as decisions depend on it.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Gradient slots a step, at least 1.
    pub slots: u32,
    /// Slots of an evaluation; 0: there is none.
    pub eval_slots: u32,
    /// Slots of which the model that the run begins with is to say something before anything else; 0: none, or it is known.
    pub reference_slots: u32,
    /// Evaluate every so many steps, besides step 0 and the last; 0: never.
    pub evaluate_every_steps: u64,
    /// Sample every so many steps, besides step 0 and the last; 0: never.
    pub sample_every_steps: u64,
    /// Write a checkpoint every so many steps, besides where the run ends; 0: there alone.
    pub checkpoint_every_steps: u64,
    /// Write a checkpoint, besides, at the first boundary so long after the one before; `None`: at no time.
    pub checkpoint_interval: Option<Duration>,
    /// Stop after this step.
    pub stop_after: Option<u64>,
    /// Work is leased out only while so many workers are here, at least 1.
    pub min_workers: u32,
    /// Admit only workers of one device class.
    pub exact: bool,
    /// Share of the blocks that another worker computes, too, before they count: 0 to 1.
    pub audit: f64,
    /// From which the audited blocks are drawn. Not to be known to workers.
    pub audit_seed: u64,
    /// What happens when two workers disagree and there is no third.
    pub on_dispute: OnDispute,
    /// Names that earlier coordinators found to compute wrong.
    pub quarantined: BTreeSet<String>,
    /// The run halts after so many skipped steps in a row; 0: never.
    pub max_bad_steps: u32,
    /// Silence after which a worker is given up, and the time an admitted one has to open its control stream.
    pub liveness_timeout: Duration,
    /// Most slots in one lease, at least 1: what fits into one message.
    pub max_slots_per_lease: u32,
    /// Where the run begins.
    pub start: Start,
}

/// What happens when two workers disagree and there is no third.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDispute {
    /// The run waits for one.
    Wait,
    /// The run ends as failed.
    Halt,
}

/// Where a coordinator begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// With initial parameters, at step 0.
    Fresh,
    /// Nowhere: this is a relay, and computes what the coordinator above lends it.
    Relay,
    /// From a checkpoint.
    Resumed {
        /// The boundary it holds.
        step: u64,
        /// Whether the validation due at that boundary is recorded already.
        validated: bool,
        /// The device classes that computed the run so far.
        classes: BTreeSet<DeviceClass>,
        /// Steps skipped since the last one that was applied.
        skipped_in_a_row: u32,
        /// By a worker's name, the first step in which a block of its counts that nobody checked.
        unchecked_since: BTreeMap<String, u64>,
    },
}

impl EngineConfig {
    /// So many steps of so many slots each, by a worker or more of one device class, and nothing besides: neither evaluations,
    /// samples nor audits, a checkpoint at the end alone, and no step that ends the run.
    pub fn plain(total_steps: u64, slots: u32) -> Self {
        Self {
            total_steps,
            slots,
            eval_slots: 0,
            reference_slots: 0,
            evaluate_every_steps: 0,
            sample_every_steps: 0,
            checkpoint_every_steps: 0,
            checkpoint_interval: None,
            stop_after: None,
            min_workers: 1,
            exact: true,
            audit: 0.0,
            audit_seed: 5,
            on_dispute: OnDispute::Wait,
            quarantined: BTreeSet::new(),
            max_bad_steps: 0,
            liveness_timeout: Duration::from_secs(10),
            max_slots_per_lease: 64,
            start: Start::Fresh,
        }
    }

    /// A relay, which has workers of one device class and computes what is lent to it.
    pub fn relay(liveness_timeout: Duration) -> Self {
        Self { liveness_timeout, max_slots_per_lease: u32::MAX, start: Start::Relay, ..Self::plain(0, 1) }
    }

    /// The version to begin with.
    pub(super) fn start_step(&self) -> u64 {
        match self.start {
            Start::Fresh | Start::Relay => 0,
            Start::Resumed { step, .. } => step,
        }
    }

    /// Whether work is lent by a coordinator above.
    pub(super) fn is_relay(&self) -> bool {
        self.start == Start::Relay
    }

    /// Whether the validation loss of boundary `step` is to be measured.
    pub(super) fn evaluation_due(&self, step: u64) -> bool {
        self.eval_slots > 0 && self.is_due(self.evaluate_every_steps, step)
    }

    /// Whether text is to be sampled at boundary `step`.
    pub(super) fn sampling_due(&self, step: u64) -> bool {
        self.is_due(self.sample_every_steps, step)
    }

    /// Whether a checkpoint is due at boundary `step` by the count of steps.
    pub(super) fn checkpoint_due(&self, step: u64) -> bool {
        self.checkpoint_every_steps > 0 && step.is_multiple_of(self.checkpoint_every_steps)
    }

    /// Every `every` steps, at step 0 and at the last.
    fn is_due(&self, every: u64, step: u64) -> bool {
        every > 0 && (step.is_multiple_of(every) || step == self.total_steps)
    }
}
