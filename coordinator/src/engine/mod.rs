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
//! `step.rs` tells this life of a step from top to bottom; `membership.rs` how workers come and go.

mod blocks;
pub mod command;
pub mod config;
pub mod event;
pub mod id;
mod members;
mod membership;
mod status;
mod step;
#[cfg(test)]
mod tests;
pub mod time;
mod work;

use std::collections::{BTreeMap, BTreeSet};

pub use self::command::Command;
pub use self::config::{EngineConfig, Start};
pub use self::event::Event;
pub use self::id::{DeviceClass, LeaseId, Ticket, WorkerId};
pub use self::status::{EngineStatus, MemberStatus};
pub use self::time::Time;

use self::command::{DiscardReason, Outcome, StopReason};
use self::members::Members;
use self::work::Work;

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
    /// Set once somebody asks for a clean stop.
    stop: Option<StopReason>,
    blocks_leased_again: u64,
    discards: BTreeMap<DiscardReason, u64>,
    /// What the present event has led to so far.
    commands: Vec<Command>,
}

/// What the run is doing.
#[derive(Clone, Debug)]
enum Phase {
    /// Nothing yet: the first event begins it.
    Begin,
    /// Workers compute a step, or an evaluation.
    Work(Work),
    /// The data plane turns the accepted vectors into version `version + 1`.
    Apply,
    /// The run ends as soon as version `version` is on disk.
    End(Outcome),
    /// The run is over.
    Finished(Outcome),
}

impl Engine {
    /// An engine at its start. Send it [`Event::Tick`] to begin; [`Self::next_deadline`] asks for one.
    pub fn new(config: EngineConfig, now: Time) -> Self {
        let (saved, classes) = match &config.start {
            Start::Fresh => (None, BTreeSet::new()),
            Start::Resumed { step, classes, .. } => (Some(*step), classes.clone()),
        };
        Self {
            now,
            version: config.start_step(),
            phase: Phase::Begin,
            members: Members::default(),
            classes,
            leases_granted: 0,
            saved,
            saving: None,
            stop: None,
            blocks_leased_again: 0,
            discards: BTreeMap::new(),
            commands: Vec::new(),
            config,
        }
    }

    /// Decides what follows from an event.
    pub fn handle(&mut self, event: Event, now: Time) -> Vec<Command> {
        self.now = self.now.max(now);
        if matches!(self.phase, Phase::Begin) {
            self.enter_boundary();
        }
        match event {
            Event::JoinRequested { ticket, name, device, class } => self.join(ticket, name, device, class),
            Event::ControlOpened { worker } => self.connect(worker),
            Event::ControlClosed { worker } => self.leave(worker),
            Event::Heartbeat { worker } => self.hear(worker),
            Event::BlockDone(done) => self.take_result(&done),
            Event::Declined { worker, lease, reason } => self.decline(worker, lease, DiscardReason::Declined, reason),
            Event::StepApplied { step } => self.step_applied(step),
            Event::CheckpointWritten { step } => self.checkpoint_written(step),
            Event::CheckpointFailed { step, reason } => self.checkpoint_failed(step, reason),
            Event::StopRequested { reason } => {
                self.stop.get_or_insert(StopReason::Requested { reason });
            }
            Event::Tick => self.give_up_silent(),
        }
        self.abandon_work_nobody_does();
        self.lease_out();
        std::mem::take(&mut self.commands)
    }

    /// When to send [`Event::Tick`], if no other event comes earlier.
    pub fn next_deadline(&self) -> Option<Time> {
        match self.phase {
            Phase::Begin => Some(self.now),
            _ => self.members.next_silence(self.config.liveness_timeout),
        }
    }

    /// How the run is to end, once that is known.
    fn ending(&self) -> Option<Outcome> {
        match (&self.phase, &self.stop) {
            (Phase::End(outcome) | Phase::Finished(outcome), _) => Some(outcome.clone()),
            (_, Some(reason)) => Some(Outcome::Stopped { reason: reason.clone() }),
            _ => None,
        }
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
