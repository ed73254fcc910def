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
    /// What to compute with.
    pub parameters: Parameters,
    /// Which slots of the step.
    pub block: Block,
    /// Seed of the run, for dropout.
    pub seed: u64,
    /// What to compute of them.
    pub task: Task,
}

impl Lease {
    /// What names the gradient that the lease asks for. `None` where it asks for none, and where parameters are named by number
    /// alone.
    pub fn gradient_name(&self) -> Option<GradientName> {
        let &Self { step, parameters: Parameters { version, digest }, block, seed, task, .. } = self;
        match task {
            Task::Gradient => {
                digest.map(|parameters_blake3| GradientName { step, version, parameters_blake3, block, seed })
            }
            Task::Evaluate | Task::Reference => None,
        }
    }
}

/// Names a version of the parameters by what it holds: a run that went back to a checkpoint may publish another version of
/// the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Optimizer steps applied to it.
    pub version: u64,
    /// BLAKE3 of its bytes; `None` where the coordinator does not say, and nothing is checked.
    pub digest: Option<[u8; 32]>,
}

/// Names a block's gradient by everything that decides its bits, whichever lease or start of the coordinator asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GradientName {
    /// The optimizer step, from 1.
    pub step: u64,
    /// The parameter version.
    pub version: u64,
    /// BLAKE3 of its bytes.
    pub parameters_blake3: [u8; 32],
    /// Which slots of the step.
    pub block: Block,
    /// Seed of the run.
    pub seed: u64,
}

/// What is computed of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Loss and gradient, dropout active.
    Gradient,
    /// Loss alone, dropout inactive.
    Evaluate,
    /// The log-probability of each row, dropout inactive.
    Reference,
}

/// A lease with everything needed to compute it.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Its name.
    pub lease: Lease,
    /// The existing slots of the block, in order; at least one.
    pub slots: Vec<Slot>,
    /// Of each local step that a slot takes; empty where slots are no replicas.
    pub learning_rates: Vec<f64>,
    /// BLAKE3 of parameters by a difference from which the lease's can be had, if there is one.
    pub difference_from: Option<[u8; 32]>,
    /// W3C trace context of the lease, as the coordinator gave it; may be empty.
    pub traceparent: String,
    /// Slots of the whole step; `None` where the coordinator does not say.
    pub step_slots: Option<u32>,
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
    /// BLAKE3 of the moments that it begins with; `None`: they are 0, or there are none.
    pub moments_blake3: Option<[u8; 32]>,
}
