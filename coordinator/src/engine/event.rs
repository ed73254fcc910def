//! What the engine hears.

use std::time::Duration;

use lockstep_model::batch::Sums;
use lockstep_model::tree::Block;

use super::command::Task;
use super::id::{DeviceClass, LeaseId, Ticket, WorkerId};

/// Something that happened outside. The runtime passes events on one at a time, in the order in which they came.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker has computed the probe and asks to be admitted. Answered by `Admit` or `Refuse`.
    JoinRequested {
        /// Names the request in the answer.
        ticket: Ticket,
        /// The worker's own name.
        name: String,
        /// Its device in words.
        device: String,
        /// Its class, by the probe.
        class: DeviceClass,
        /// How many workers it stands for: 1, or more if it is a relay.
        workers: u32,
    },
    /// A relay stands for another number of workers than before, at least 1.
    Workers {
        /// Who.
        worker: WorkerId,
        /// How many.
        workers: u32,
    },
    /// A member opened its control stream: it can be leased work.
    ControlOpened {
        /// Who.
        worker: WorkerId,
    },
    /// A control stream ended, from whichever side. The membership ends with it.
    ControlClosed {
        /// Whose.
        worker: WorkerId,
    },
    /// A worker says that it lives. Its results and refusals of leases say so too.
    Heartbeat {
        /// Who.
        worker: WorkerId,
    },
    /// A worker begins to push the gradient of a lease: its device is free for another.
    PushBegun {
        /// Who.
        worker: WorkerId,
        /// What it computed.
        lease: LeaseId,
    },
    /// A worker finished a lease. A gradient's vector lies staged under (worker, lease) by now.
    BlockDone(BlockDone),
    /// A worker cannot compute a lease, and remains a member.
    Declined {
        /// Who.
        worker: WorkerId,
        /// What it was to compute.
        lease: LeaseId,
        /// Why not, in the worker's words.
        reason: String,
    },
    /// A new member still has gradients from an earlier membership: it answers at once if it is leased those blocks.
    Kept {
        /// Who.
        worker: WorkerId,
        /// What it has.
        blocks: Vec<KeptBlock>,
    },
    /// To a relay: the coordinator above lends a block. No slot of it is under way.
    Lent(Lent),
    /// To a relay: a block that was lent is not wanted any more, or was given back.
    Withdrawn {
        /// Which.
        block: Block,
    },
    /// The vectors of a step are reduced, the optimizer has applied them, and version `step` is published.
    StepApplied {
        /// The step.
        step: u64,
        /// Whether the optimizer left the parameters as they were, because the step's gradient is no use.
        skipped: bool,
    },
    /// The run is back at an earlier version, as [`Command::RollBack`](super::Command::RollBack) asked.
    RolledBack {
        /// The boundary.
        step: u64,
        /// Whether the validation due there is recorded already.
        validated: bool,
        /// Whether it comes from a checkpoint; else these are the initial parameters.
        saved: bool,
        /// Steps skipped since the last one that was applied.
        skipped_in_a_row: u32,
    },
    /// A checkpoint is safely on disk.
    CheckpointWritten {
        /// The boundary it holds.
        step: u64,
    },
    /// A checkpoint could not be written. What was on disk before still is.
    CheckpointFailed {
        /// The boundary it was to hold.
        step: u64,
        /// The error in words.
        reason: String,
    },
    /// Stop cleanly, with a checkpoint. Only the first request counts.
    StopRequested {
        /// Who or what asked, in words.
        reason: String,
    },
    /// Time has passed: sent once `next_deadline` is reached and no other event is waiting. Silence is judged on it
    /// alone, so that a coordinator that was itself asleep first hears what its workers said meanwhile.
    Tick,
}

/// A block that the coordinator above has lent to a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lent {
    /// The optimizer step; else the boundary it belongs to.
    pub step: u64,
    /// The parameter version to compute with.
    pub version: u64,
    /// What is computed.
    pub task: Task,
    /// Slots of the whole step.
    pub step_slots: u32,
    /// Which of them.
    pub block: Block,
}

/// A gradient that a worker has kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeptBlock {
    /// The optimizer step.
    pub step: u64,
    /// The parameter version it was computed with.
    pub version: u64,
    /// Which slots.
    pub block: Block,
}

/// A worker's answer to a lease.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockDone {
    /// Who computed it.
    pub worker: WorkerId,
    /// Under which lease.
    pub lease: LeaseId,
    /// As in the lease.
    pub step: u64,
    /// The parameter version it was computed with.
    pub version: u64,
    /// As in the lease.
    pub task: Task,
    /// As in the lease.
    pub block: Block,
    /// Digest of the staged vector, or of what a reference says of rows; `None` for an evaluation.
    pub digest: Option<[u8; 32]>,
    /// L2 norm of the staged vector, not finite if an element is not; `None` but for a gradient.
    pub norm: Option<f64>,
    /// Sums over the block, in tree order.
    pub sums: Sums,
    /// Evaluation and reference: the sums of each existing slot of the block, in order. Empty for a gradient.
    pub slot_sums: Vec<Sums>,
    /// Time spent computing, by the worker's clock.
    pub compute: Duration,
}
