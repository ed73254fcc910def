//! Every decision of a run: who takes part, who computes what, which results count, and what follows. The engine
//! knows no clock, no randomness and no socket: [`Engine::handle`] takes an event and the time, and returns commands
//! that a runtime carries out. The same events at the same times give the same commands.
//!
//! ```text
//! boundary s:  evaluate if due → sample if due → checkpoint if due → over? write a checkpoint, release all, finish
//!                  ↑                                                  │ else
//! version s+1 ←── apply step s+1 ←── all slots accepted ←── leases of step s+1
//! ```
//!
//! `step.rs` tells this life of a step from top to bottom; `membership.rs` how workers come and go; `leasing.rs` who gets
//! which block; `verdict.rs` what becomes of a result, and what follows if a worker computed wrong. In a relay there are no
//! boundaries: what is computed is lent from above (`relay.rs`).

mod blocks;
pub mod command;
pub mod config;
pub mod event;
mod finding;
pub mod id;
mod idle;
mod leases;
mod leasing;
mod members;
mod membership;
mod relay;
mod review;
mod shares;
mod status;
mod step;
#[cfg(test)]
mod tests;
pub mod time;
mod verdict;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

pub use self::command::Command;
pub use self::config::{EngineConfig, OnDispute, Start};
pub use self::event::{Event, Lent};
pub use self::id::{DeviceClass, LeaseId, Ticket, WorkerId};
pub use self::status::{EngineStatus, MemberStatus};
pub use self::time::Time;

use self::command::{DiscardReason, Outcome, StopReason};
use self::members::Members;
use self::review::Gate;
use self::work::{Norm, Work};

/// The state of a run.
#[derive(Clone, Debug)]
pub struct Engine {
    config: EngineConfig,
    /// The newest time seen.
    now: Time,
    /// Optimizer steps applied: the boundary that the run is at, or has left last.
    version: u64,
    phase: Phase,
    members: Members,
    /// Device classes admitted, by earlier coordinators too.
    classes: BTreeSet<DeviceClass>,
    leases_granted: u64,
    /// The newest boundary on disk.
    saved: Option<u64>,
    /// The boundary being written to disk.
    saving: Option<u64>,
    /// When the newest checkpoint was asked for, or the run began.
    saved_at: Time,
    /// The boundary at which this coordinator began, or to which the run went back last, if that is not the beginning.
    returned: Option<Returned>,
    /// Whether the model that the run begins with has said what is asked of it.
    referenced: bool,
    /// Set once somebody asks for a clean stop.
    stop: Option<StopReason>,
    /// Whether too few workers are here, and that was said.
    paused: bool,
    gate: Gate,
    /// Slots of the step under way whose gradients looked wrong and were confirmed.
    confirmed_suspicions: Vec<Range<u32>>,
    /// Steps without an update since the last one with it.
    skipped_in_a_row: u32,
    /// By a worker's name, since it may join again: the first step in which a block of its counts that nobody checked.
    unchecked_since: BTreeMap<String, u64>,
    /// Names that are not admitted any more.
    quarantined: BTreeSet<String>,
    counts: Counts,
    discards: BTreeMap<DiscardReason, u64>,
    /// What the present event has led to so far.
    commands: Vec<Command>,
}

/// How often something happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks leased again because an earlier lease of their slots ended without a result.
    pub blocks_leased_again: u64,
    /// Blocks leased to a second worker while a first one computes them.
    pub twins: u64,
    /// Times the run went back to an earlier version.
    pub roll_backs: u64,
    /// Checkpoints written.
    pub saved: u32,
}

/// A boundary at which the run goes on after having been there before.
#[derive(Clone, Copy, Debug)]
struct Returned {
    step: u64,
    /// Whether the validation due there is recorded already.
    validated: bool,
}

/// What is remembered of a step's gradients while the optimizer applies them.
#[derive(Clone, Debug)]
struct Gradients {
    norms: Vec<Norm>,
    confirmed_suspicions: Vec<Range<u32>>,
}

/// What the run is doing.
#[derive(Clone, Debug)]
enum Phase {
    /// Nothing yet: the first event begins it.
    Begin,
    /// A relay to which nothing was lent yet.
    Idle,
    /// Workers compute a step, or an evaluation.
    Work(Box<Work>),
    /// The data plane turns the accepted vectors into version `version + 1`.
    Apply(Gradients),
    /// An earlier version is being restored.
    RollBack,
    /// The run ends as soon as version `version` is on disk.
    End(Outcome),
    /// The run is over.
    Finished(Outcome),
}

impl Engine {
    /// An engine at its start. Send it [`Event::Tick`] to begin; [`Self::next_deadline`] asks for one.
    pub fn new(config: EngineConfig, now: Time) -> Self {
        let (returned, classes, skipped_in_a_row, unchecked_since) = match config.start.clone() {
            Start::Fresh | Start::Relay => (None, BTreeSet::new(), 0, BTreeMap::new()),
            Start::Resumed { step, validated, classes, skipped_in_a_row, unchecked_since } => {
                (Some(Returned { step, validated }), classes, skipped_in_a_row, unchecked_since)
            }
        };
        Self {
            now,
            version: config.start_step(),
            phase: Phase::Begin,
            members: Members::default(),
            classes,
            leases_granted: 0,
            saved: returned.map(|returned| returned.step),
            saving: None,
            saved_at: now,
            returned,
            referenced: config.reference_slots == 0,
            stop: None,
            paused: false,
            gate: Gate::default(),
            confirmed_suspicions: Vec::new(),
            skipped_in_a_row,
            unchecked_since,
            quarantined: config.quarantined.clone(),
            counts: Counts::default(),
            discards: BTreeMap::new(),
            commands: Vec::new(),
            config,
        }
    }

    /// Decides what follows from an event.
    pub fn handle(&mut self, event: Event, now: Time) -> Vec<Command> {
        self.now = self.now.max(now);
        // Of itself a heartbeat changes nothing; but time has passed, too.
        let is_late = || self.next_late().is_some_and(|due| due <= self.now);
        let changes_work = !matches!(event, Event::Heartbeat { .. }) || is_late();
        if let Phase::Work(work) = &mut self.phase {
            work.leases_mut().advance(self.now);
        }
        if matches!(self.phase, Phase::Begin) {
            self.enter_boundary();
        }
        match event {
            Event::JoinRequested { ticket, name, device, class, workers } => {
                self.join(ticket, name, device, class, workers);
            }
            Event::Workers { worker, workers } => self.set_workers(worker, workers),
            Event::Lent(lent) => self.take_in(lent),
            Event::Withdrawn { block } => self.withdraw(block),
            Event::ControlOpened { worker } => self.connect(worker),
            Event::ControlClosed { worker } => self.leave(worker),
            Event::Heartbeat { worker } => self.hear(worker),
            Event::Kept { worker, blocks } => self.offer(worker, blocks),
            Event::PushBegun { worker, lease } => self.push_begun(worker, lease),
            Event::BlockDone(done) => self.take_result(done),
            Event::Declined { worker, lease, reason } => self.decline(worker, lease, DiscardReason::Declined, reason),
            Event::StepApplied { step, skipped } => self.step_applied(step, skipped),
            Event::RolledBack { step, validated, saved, skipped_in_a_row } => {
                self.rolled_back(Returned { step, validated }, saved, skipped_in_a_row);
            }
            Event::CheckpointWritten { step } => self.checkpoint_written(step),
            Event::CheckpointFailed { step, reason } => self.checkpoint_failed(step, reason),
            Event::StopRequested { reason } => {
                self.stop.get_or_insert(StopReason::Requested { reason });
            }
            Event::Tick => self.give_up_silent(),
        }
        if changes_work {
            self.halt_if_disputed();
            self.lease_out();
            self.abandon_work_nobody_does();
        }
        std::mem::take(&mut self.commands)
    }

    /// When to send [`Event::Tick`], if no other event comes earlier.
    pub fn next_deadline(&self) -> Option<Time> {
        match self.phase {
            Phase::Begin => Some(self.now),
            _ => self.members.next_silence(self.config.liveness_timeout).into_iter().chain(self.next_late()).min(),
        }
    }

    /// Whether a worker holds a lease.
    pub fn holds(&self, worker: WorkerId, lease: LeaseId) -> bool {
        matches!(&self.phase, Phase::Work(work) if work.leases().get(worker, lease).is_some())
    }

    /// By a worker's name, the first step in which a block of its counts that nobody checked.
    pub fn unchecked_since(&self) -> &BTreeMap<String, u64> {
        &self.unchecked_since
    }

    /// How the run is to end, once that is known.
    fn ending(&self) -> Option<Outcome> {
        match (&self.phase, &self.stop) {
            (Phase::End(outcome) | Phase::Finished(outcome), _) => Some(outcome.clone()),
            (_, Some(reason)) => Some(Outcome::Stopped { reason: reason.clone() }),
            _ => None,
        }
    }

    /// How many workers its members stand for, connected or not.
    pub fn workers(&self) -> u32 {
        self.members.iter().map(|(_, member)| member.workers).sum()
    }

    /// How many connected workers it takes to lease work out. Somebody who waits for a clean stop does not wait for
    /// more workers.
    fn workers_needed(&self) -> u32 {
        if self.stop.is_some() { 1 } else { self.config.min_workers.max(1) }
    }

    fn command(&mut self, command: Command) {
        self.commands.push(command);
    }

    fn discard(&mut self, worker: WorkerId, lease: LeaseId, reason: DiscardReason) {
        *self.discards.entry(reason).or_default() += 1;
        self.command(Command::Discard { worker, lease, reason });
    }
}
