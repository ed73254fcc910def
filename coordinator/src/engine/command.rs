//! What the engine decides, and why.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use lockstep_model::batch::Sums;
use lockstep_model::tree::Block;

pub use super::finding::Finding;
use super::finding::in_words;
use super::id::{DeviceClass, LeaseId, Ticket, WorkerId};

/// Something for the runtime to do. Commands are carried out in order.
///
/// A lease is open from its `Lease` to the first `Accept` or `Discard` that names it, and every lease gets one.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Make the worker that holds the ticket a member.
    Admit {
        /// The request it answers.
        ticket: Ticket,
        /// The new member's id.
        worker: WorkerId,
        /// Its class, by which it was admitted.
        class: DeviceClass,
    },
    /// Turn the worker that holds the ticket away.
    Refuse {
        /// The request it answers.
        ticket: Ticket,
        /// Why, and what to change.
        reason: Refusal,
    },
    /// Send work to a member.
    Lease {
        /// To whom.
        worker: WorkerId,
        /// What.
        lease: Lease,
    },
    /// The block counts: the vector staged under (worker, lease), if the task has one, enters the step's tree.
    Accept {
        /// Who computed it.
        worker: WorkerId,
        /// Under which lease.
        lease: LeaseId,
        /// The step it belongs to.
        step: u64,
        /// What it covers.
        block: Block,
    },
    /// Whatever is or will be staged under (worker, lease) does not count: drop it.
    Discard {
        /// Whose.
        worker: WorkerId,
        /// Under which lease.
        lease: LeaseId,
        /// Why.
        reason: DiscardReason,
    },
    /// Every slot of a step is accepted: finish the sum, apply the optimizer, publish version `step`.
    ApplyStep {
        /// The step.
        step: u64,
        /// Loss and weight over all slots, added in tree order.
        sums: Sums,
    },
    /// Nobody of this name is admitted any more, by later coordinators neither.
    Quarantine {
        /// The name.
        name: String,
    },
    /// Forget what was added for step `step`: its slots are leased out anew.
    RestartStep {
        /// The step under way.
        step: u64,
    },
    /// Go back to the newest checkpoint of step `at_most` or earlier, or to the initial parameters where there is none:
    /// forget what was added since, remove newer checkpoints and lines, publish. Answered by `RolledBack`.
    RollBack {
        /// The last step whose parameters can be trusted.
        at_most: u64,
    },
    /// A relay: nobody who is here computes this block, which is one that was lent, or part of it. Decline what was lent.
    GiveBack {
        /// Which.
        block: Block,
        /// Why, in the words of the last worker that was asked.
        reason: String,
    },
    /// Something that a person should know; changes nothing.
    Report(Finding),
    /// A validation loss is measured.
    RecordValidation {
        /// The boundary, and the version evaluated.
        step: u64,
        /// Loss and weight over all evaluation slots, added in slot order.
        sums: Sums,
    },
    /// What the model that the run begins with says of every row is here: step 1 is computed with it.
    RecordReferences,
    /// Sample from the fixed prompts with version `step`, while training goes on.
    Sample {
        /// The boundary.
        step: u64,
    },
    /// Write version `step` and the optimizer's state to disk, while training goes on. One at a time.
    Checkpoint {
        /// The boundary.
        step: u64,
    },
    /// End a membership for good: the worker is not to join again.
    Release {
        /// Whose.
        worker: WorkerId,
        /// Why.
        reason: ReleaseReason,
    },
    /// Close a worker's control stream; it may join again.
    Disconnect {
        /// Whose.
        worker: WorkerId,
        /// Why.
        reason: DisconnectReason,
    },
    /// The run is over. Nothing but `Refuse`, `Release` and `Discard` follows.
    Finish {
        /// Optimizer steps applied.
        step: u64,
        /// How it ended.
        outcome: Outcome,
    },
}

/// What is to be computed for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// Loss and gradient of training slots.
    Gradient,
    /// Loss alone, of evaluation slots.
    Evaluate,
    /// What the model that the run begins with says of each row.
    Reference,
}

/// One block of work, lent to one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Unique within the incarnation.
    pub id: LeaseId,
    /// The optimizer step, counted from 1; else the boundary it belongs to.
    pub step: u64,
    /// The parameter version to compute with: `step - 1` for a gradient, else `step`.
    pub version: u64,
    /// What to compute.
    pub task: Task,
    /// For which slots.
    pub block: Block,
}

/// Why a worker is not admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It computes other bits than the run's workers.
    OtherClass {
        /// What the run's workers compute.
        run: DeviceClass,
        /// What it computes.
        worker: DeviceClass,
    },
    /// It computes other bits than the other workers of this relay.
    OtherClassThanRelay {
        /// What they compute.
        relay: DeviceClass,
        /// What it computes.
        worker: DeviceClass,
    },
    /// The coordinator above refused the relay, by what this worker computes.
    Above {
        /// Why, in its words.
        reason: String,
    },
    /// It has answered wrongly before.
    Quarantined,
    /// The run is about to stop, or over.
    Ending {
        /// How.
        outcome: Outcome,
    },
    /// To a relay the coordinator above said so.
    Released {
        /// How, in its words.
        reason: String,
    },
}

/// Why a result, or the lease it was to come under, does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DiscardReason {
    /// From one who is no member, or no longer.
    NotAMember,
    /// For another step, version or task than the one under way.
    Stale,
    /// Every slot of it is counted already.
    AlreadyCounted,
    /// Under a lease that the worker does not hold.
    LeaseNotHeld,
    /// For another block than the lease's, or without what its task needs.
    Malformed,
    /// The worker still computes it, and another worker's result for the same block counts already: revoke it.
    Overtaken,
    /// The coordinator above does not want it any more: revoke it.
    Withdrawn,
    /// An equal result of another worker counts.
    Confirmed,
    /// Others computed something else.
    Outvoted,
    /// The step begins anew, or the run goes back to an earlier one: revoke it.
    StartedOver,
    /// The run ends: revoke it.
    RunEnds,
    /// The worker declined the lease.
    Declined,
    /// The worker left before it was done.
    WorkerLeft,
    /// The worker was silent for too long.
    WorkerSilent,
    /// The worker was released before it was done.
    WorkerReleased,
}

impl DiscardReason {
    /// Whether the worker may still compute it, and is to be told.
    pub fn is_to_be_revoked(self) -> bool {
        matches!(self, Self::Overtaken | Self::Withdrawn | Self::StartedOver | Self::RunEnds)
    }
}

/// Why a membership ends for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReleaseReason {
    /// The run is over.
    RunOver(Outcome),
    /// It computed a block otherwise than two others did. Whoever comes under its name is refused from now on.
    Quarantined {
        /// The step.
        step: u64,
        /// The slots.
        slots: Range<u32>,
    },
    /// It declined too many leases in a row.
    Declined {
        /// How many.
        leases: u32,
        /// Its last reason.
        reason: String,
    },
}

/// Why a control stream is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DisconnectReason {
    /// Nothing was heard from it for too long.
    Silent {
        /// How long.
        silence: Duration,
    },
    /// It was admitted, and did not open its control stream in time.
    NeverOpened {
        /// How long it had.
        silence: Duration,
    },
    /// It is no member: it was given up, or belongs to an earlier start of the coordinator.
    NotAMember,
}

/// How a run ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every step is done.
    Completed,
    /// Ended cleanly before its last step; `--resume` continues it.
    Stopped {
        /// Why.
        reason: StopReason,
    },
    /// Cannot go on.
    Failed {
        /// Why, and what to do.
        reason: Failure,
    },
}

/// Why a run stops before its last step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// `checkpoint.stop_after` says so.
    StopAfter {
        /// The step it names.
        step: u64,
    },
    /// Somebody asked.
    Requested {
        /// Who or what, in words.
        reason: String,
    },
}

/// Why a run cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A checkpoint could not be written.
    Checkpoint {
        /// The boundary it was to hold.
        step: u64,
        /// The error in words.
        reason: String,
    },
    /// Too many steps in a row whose gradient is no use.
    BadSteps {
        /// The last of them.
        step: u64,
        /// How many.
        in_a_row: u32,
    },
    /// Two workers computed different results, nobody else is there to decide, and the recipe does not want to wait.
    Disputed {
        /// The step.
        step: u64,
        /// The slots.
        slots: Range<u32>,
        /// The names of the workers.
        names: Vec<String>,
    },
    /// The only worker computes something else each time.
    Unreliable {
        /// Its name.
        name: String,
        /// The step.
        step: u64,
        /// The slots.
        slots: Range<u32>,
    },
    /// The last worker declined too many leases in a row.
    NobodyComputes {
        /// The last worker's name.
        name: String,
        /// Its last reason.
        reason: String,
    },
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admit { worker, class, .. } => write!(f, "admit worker {worker} of class {class}"),
            Self::Refuse { reason, .. } => write!(f, "refuse: {reason}"),
            Self::Lease { worker, lease } => write!(f, "worker {worker}: {lease}"),
            Self::Accept { worker, lease, step, block } => {
                write!(f, "accept lease {lease} of worker {worker}: block {block} of step {step}")
            }
            Self::Discard { worker, lease, reason } => write!(f, "discard lease {lease} of worker {worker}: {reason}"),
            Self::ApplyStep { step, sums } => write!(f, "apply step {step}, loss {} over {}", sums.loss, sums.weight),
            Self::Quarantine { name } => write!(f, "quarantine {name}"),
            Self::RestartStep { step } => write!(f, "restart step {step}"),
            Self::RollBack { at_most } => write!(f, "roll back to step {at_most} or earlier"),
            Self::GiveBack { block, reason } => write!(f, "give block {block} back: {reason}"),
            Self::Report(finding) => write!(f, "report: {finding}"),
            Self::RecordValidation { step, sums } => {
                write!(f, "validation at step {step}, loss {} over {}", sums.loss, sums.weight)
            }
            Self::RecordReferences => f.write_str("every reference is here"),
            Self::Sample { step } => write!(f, "sample at step {step}"),
            Self::Checkpoint { step } => write!(f, "checkpoint step {step}"),
            Self::Release { worker, reason } => write!(f, "release worker {worker}: {reason}"),
            Self::Disconnect { worker, reason } => write!(f, "disconnect worker {worker}: {reason}"),
            Self::Finish { step, outcome } => write!(f, "finish at step {step}: {outcome}"),
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gradient => "gradient",
            Self::Evaluate => "evaluation",
            Self::Reference => "reference",
        })
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, step, version, task, block } = self;
        write!(f, "lease {id}: {task} of block {block} of step {step} with version {version}")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherClass { run, worker } => write!(
                f,
                "this worker's device class is {worker} and the run's is {run}: they compute different bits. Join with \
                 a device and build like those of the run's workers, or start the run with cluster.exact = false"
            ),
            Self::OtherClassThanRelay { relay, worker } => write!(
                f,
                "this worker's device class is {worker} and that of the relay's other workers is {relay}: they compute different \
                 bits, and a relay stands for one class. Join the coordinator itself, or by a relay of its own"
            ),
            Self::Above { reason } => f.write_str(reason),
            Self::Quarantined => f.write_str(
                "a worker of this name computed other results than two others did; mend or replace the machine, and join \
                 under another name",
            ),
            Self::Ending { outcome } => write!(f, "the run takes nobody in any more: {outcome}"),
            Self::Released { reason } => f.write_str(reason),
        }
    }
}

impl fmt::Display for DiscardReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAMember => "the worker is not, or no longer, a member",
            Self::Stale => "it is for another step, version or task than the one under way",
            Self::AlreadyCounted => "its slots are counted already",
            Self::LeaseNotHeld => "the worker does not hold this lease",
            Self::Malformed => "it does not fit its lease",
            Self::Overtaken => "another worker was faster",
            Self::Withdrawn => "the coordinator above does not want it any more",
            Self::Confirmed => "it confirms another worker's result",
            Self::Outvoted => "others computed something else",
            Self::StartedOver => "the step starts over",
            Self::RunEnds => "the run ends",
            Self::Declined => "the worker declined it",
            Self::WorkerLeft => "the worker left",
            Self::WorkerSilent => "the worker fell silent",
            Self::WorkerReleased => "the worker was released",
        })
    }
}

impl fmt::Display for ReleaseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RunOver(outcome) => outcome.fmt(f),
            Self::Quarantined { step, slots } => write!(
                f,
                "quarantined: its result for {} of step {step} is not what others computed; mend or replace the machine",
                in_words(slots)
            ),
            Self::Declined { leases, reason } => {
                write!(f, "declined {leases} leases in a row, the last because: {reason}")
            }
        }
    }
}

impl fmt::Display for DisconnectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent { silence } => write!(f, "nothing was heard from it for {:.1} s", silence.as_secs_f64()),
            Self::NeverOpened { silence } => {
                write!(f, "it did not open its control stream within {:.1} s", silence.as_secs_f64())
            }
            Self::NotAMember => f.write_str("it is not, or no longer, a member; it may join again"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("the run is complete"),
            Self::Stopped { reason } => write!(f, "the run stops: {reason}"),
            Self::Failed { reason } => write!(f, "the run failed: {reason}"),
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StopAfter { step } => write!(f, "checkpoint.stop_after = {step}"),
            Self::Requested { reason } => f.write_str(reason),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checkpoint { step, reason } => write!(
                f,
                "the checkpoint of step {step} could not be written ({reason}). Free space or make the run directory \
                 writable, then continue with --resume"
            ),
            Self::BadSteps { step, in_a_row } => write!(
                f,
                "{in_a_row} steps in a row, the last of them step {step}, have a gradient that is no use (not finite, or \
                 beyond optimizer.skip_above_median), and every worker asked computes the same: it is the data or the \
                 model. The parameters are those before these steps; the run directory's reports name slots and text. \
                 Lower optimizer.lr or mend the data, and start a new run from an earlier checkpoint or from the beginning"
            ),
            Self::Disputed { step, slots, names } => write!(
                f,
                "{} computed different results for {} of step {step}, and there is no third worker to decide \
                 (cluster.on_dispute = \"halt\"). Continue with --resume and at least three workers",
                names.join(" and "),
                in_words(slots)
            ),
            Self::Unreliable { name, step, slots } => write!(
                f,
                "the only worker, {name}, computed {} of step {step} three times with three different results: its \
                 hardware cannot be trusted. Continue with --resume on another machine",
                in_words(slots)
            ),
            Self::NobodyComputes { name, reason } => {
                write!(f, "the last worker, {name}, declined every lease, the last because: {reason}")
            }
        }
    }
}
