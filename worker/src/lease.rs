//! What a coordinator lends: a name to decide by, and the work behind it.

use lockstep_model::batch::Batch;
use lockstep_model::tree::Block;

/// The name of a piece of work, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Unique within the coordinator's incarnation.
    pub id: u64,
    /// The optimizer step it belongs to, from 1.
    pub step: u64,
    /// The parameter version to compute with.
    pub version: u64,
    /// Which slots of the step.
    pub block: Block,
    /// What to compute of them.
    pub task: Task,
}

/// What is computed of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Loss and gradient, dropout active.
    Gradient,
    /// Loss alone, dropout inactive.
    Evaluate,
}

/// A lease with everything needed to compute it.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Its name.
    pub lease: Lease,
    /// The existing slots of the block, in order; at least one.
    pub slots: Vec<Slot>,
    /// Seed of the run, for dropout.
    pub seed: u64,
    /// W3C trace context of the lease, as the coordinator gave it; may be empty.
    pub traceparent: String,
}

impl Work {
    /// The block's first slot, which names the lease in traces.
    pub fn first_slot(&self) -> u32 {
        self.slots.first().map_or(0, |slot| slot.number)
    }
}

/// One micro-batch of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// Its number within the step.
    pub number: u32,
    /// Its rows.
    pub batch: Batch,
}
