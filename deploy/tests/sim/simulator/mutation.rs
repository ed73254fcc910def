//! Rules broken on purpose, between the engine and its world: an invariant must notice each of them. What only the
//! engine's inside can break is broken by the patches in `deploy/tests/sim/mutations`.

use std::sync::atomic::{AtomicU64, Ordering};

use lockstep_coordinator::engine::command::{DiscardReason, Task};
use lockstep_coordinator::engine::event::BlockDone;
use lockstep_coordinator::engine::{Command, EngineConfig, Event, Start, Ticket, WorkerId};
use lockstep_model::batch::Sums;

use super::history::History;

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// None is.
    None,
    /// A lease that was overtaken does not end.
    KeepOvertaken,
    /// Results that came too late count.
    CountLate,
    /// A result counts a second time.
    CountTwice,
    /// One who left is leased work.
    LeaseToTheGone,
    /// A step is applied before all its slots count.
    ApplyEarly,
    /// A block that counts does not enter the sum.
    ForgetBlock,
    /// A sum is added up in another order.
    SumAsItComes,
    /// Nothing is audited.
    NoAudit,
    /// A quarantined worker comes in under another name.
    AdmitQuarantined,
    /// Work is leased out whoever is here.
    LeaseBelowMinimum,
    /// A half-written checkpoint is taken for whole.
    ResumeFromTorn,
    /// Checkpoints do not reach the disk.
    LoseCheckpoints,
    /// What was evaluated before a restart is evaluated again.
    ValidateAgain,
    /// What is meant for an earlier start of the coordinator is heard.
    IgnoreIncarnation,
    /// A step that is to begin anew goes on with what was added.
    IgnoreRestart,
    /// A run that is to go back goes to its newest checkpoint.
    RollBackTooLittle,
    /// A coordinator that starts while the run goes back does not know of it.
    ForgetTheWayBack,
    /// That a worker left is not heard.
    DeafToLeaving,
    /// That time passes is not heard.
    DeafToTime,
    /// Something is drawn from outside the seed.
    OutsideChance,
}

/// All that are to be noticed.
pub(crate) const MUTATIONS: [Mutation; 20] = [
    Mutation::KeepOvertaken,
    Mutation::CountLate,
    Mutation::CountTwice,
    Mutation::LeaseToTheGone,
    Mutation::ApplyEarly,
    Mutation::ForgetBlock,
    Mutation::SumAsItComes,
    Mutation::NoAudit,
    Mutation::AdmitQuarantined,
    Mutation::LeaseBelowMinimum,
    Mutation::ResumeFromTorn,
    Mutation::LoseCheckpoints,
    Mutation::ValidateAgain,
    Mutation::IgnoreIncarnation,
    Mutation::IgnoreRestart,
    Mutation::RollBackTooLittle,
    Mutation::ForgetTheWayBack,
    Mutation::DeafToLeaving,
    Mutation::DeafToTime,
    Mutation::OutsideChance,
];

/// What a mutation remembers under one start of the coordinator.
#[derive(Debug, Default)]
pub(crate) struct MutationState {
    left: Option<WorkerId>,
    result: Option<BlockDone>,
}

impl Mutation {
    /// A mutation by its name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        MUTATIONS.into_iter().find(|mutation| format!("{mutation:?}") == name)
    }

    /// A number that no seed decides; 0 where chance is left to the seed.
    pub(crate) fn draw_from_outside(self) -> u64 {
        static DRAWN: AtomicU64 = AtomicU64::new(0);
        if self == Self::OutsideChance { DRAWN.fetch_add(1, Ordering::Relaxed) } else { 0 }
    }

    /// The name under which a worker is admitted.
    pub(crate) fn rename(self, name: String, ticket: Ticket) -> String {
        if self == Self::AdmitQuarantined { format!("{name}/{}", ticket.0) } else { name }
    }

    /// How the engine is configured.
    pub(crate) fn configure(self, config: &mut EngineConfig) {
        match (self, &mut config.start) {
            (Self::NoAudit, _) => config.audit = 0.0,
            (Self::LeaseBelowMinimum, _) => config.min_workers = 1,
            (Self::ValidateAgain, Start::Resumed { validated, .. }) => *validated = false,
            _ => {}
        }
    }

    /// Whether the engine hears an event.
    pub(crate) fn lets_pass(self, state: &mut MutationState, event: &Event) -> bool {
        match event {
            Event::BlockDone(done) => state.result = Some(done.clone()),
            Event::ControlClosed { worker } => state.left = Some(*worker),
            _ => {}
        }
        let deaf = matches!(
            (self, event),
            (Self::DeafToLeaving, Event::ControlClosed { .. }) | (Self::DeafToTime, Event::Tick)
        );
        !deaf
    }

    /// What becomes of a command of the engine's.
    pub(crate) fn distort(self, state: &mut MutationState, history: &History, command: Command) -> Vec<Command> {
        match (self, command) {
            (Self::KeepOvertaken, Command::Discard { reason: DiscardReason::Overtaken, .. }) => Vec::new(),
            (
                Self::CountLate,
                Command::Discard { worker, lease, reason: DiscardReason::Stale | DiscardReason::LeaseNotHeld },
            )
            | (Self::CountTwice, Command::Discard { worker, lease, reason: DiscardReason::AlreadyCounted }) => {
                let result = state.result.as_ref().map(|result| (result.step, result.block));
                result.map(|(step, block)| Command::Accept { worker, lease, step, block }).into_iter().collect()
            }
            (Self::LeaseToTheGone, Command::Lease { worker, lease }) => {
                vec![Command::Lease { worker: state.left.take().unwrap_or(worker), lease }]
            }
            (Self::ForgetBlock, Command::Accept { .. }) if history.counted.len() == 1 => Vec::new(),
            (Self::ApplyEarly, Command::Accept { worker, lease, step, block }) => {
                let gradient = history.open.get(&(worker, lease)).is_some_and(|open| open.lease.task == Task::Gradient);
                let slots = history.config.slots;
                let counted =
                    history.counted.iter().chain([&block]).map(|block| block.slots(slots).len()).sum::<usize>();
                let accept = Command::Accept { worker, lease, step, block };
                match gradient && counted + 1 == slots as usize {
                    true => vec![accept, Command::ApplyStep { step, sums: Sums::default() }],
                    false => vec![accept],
                }
            }
            (Self::IgnoreRestart, Command::RestartStep { .. }) => Vec::new(),
            (_, command) => vec![command],
        }
    }
}
