//! A coordinator process: the real engine, with a service, a data plane and an archive around it that do in virtual time
//! what those of the `coordinator` crate do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_coordinator::engine::command::{DiscardReason, Failure, Outcome, ReleaseReason, Task};
use lockstep_coordinator::engine::event::BlockDone;
use lockstep_coordinator::engine::{Command, DeviceClass, Engine, Event, LeaseId, Start, Ticket, Time, WorkerId};
use lockstep_model::batch::Sums;
use lockstep_model::tree::{Block, TreeSum};
use lockstep_worker::lease::{self, Lease, Parameters};

use super::disk::Checkpoint;
use super::history::{History, Seen};
use super::invariants::Violation;
use super::mutation::Mutation;
use super::network::{ConnectionId, Down, Refused, ResultMessage, Up};
use super::numbers::{Params, Vector, digest};
use super::scenario::Fault;
use super::trace::Entry;
use super::world::{Happening, Rank, World};

/// All workers compute the same bits.
const CLASS: DeviceClass = DeviceClass([1; 32]);
/// How late a timer fires, at least and at most.
const TIMER_DELAY_SECS: [f64; 2] = [0.0001, 0.05];
/// More ticks than this at one moment lead nowhere.
const MOST_TICKS_AT_ONCE: u32 = 20;

/// A coordinator process.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) incarnation: u64,
    pub(crate) engine: Engine,
    /// Who may leave vectors, and for which leases.
    staging_members: BTreeSet<WorkerId>,
    open_leases: BTreeSet<(WorkerId, LeaseId)>,
    staged: BTreeMap<(WorkerId, LeaseId), Vector>,
    /// Members, each with its control stream while that is open.
    links: BTreeMap<WorkerId, Option<ConnectionId>>,
    joining: BTreeMap<Ticket, ConnectionId>,
    tickets: u64,
    plane: Plane,
    /// When the archive is done with what it was asked for.
    archive_busy_until: Duration,
    tick_at: Option<Duration>,
    /// The last tick, and how many came at that moment.
    ticks: (Duration, u32),
}

/// Parameters, and the sum under way.
#[derive(Debug)]
struct Plane {
    version: u64,
    params: Params,
    sum: TreeSum<Vector>,
    /// The sum in the order in which blocks came: what it must not be.
    sum_as_it_comes: f64,
    skipped_in_a_row: u32,
    validated_at: Option<u64>,
}

/// What the coordinator's threads report.
#[derive(Clone, Debug)]
pub(crate) enum Report {
    Applied {
        step: u64,
        sums: Sums,
    },
    Written(Checkpoint),
    RolledBack {
        at_most: u64,
    },
    Tick,
    /// Everybody was released, and had time to go.
    Exit,
}

fn add(left: Vector, right: Vector) -> Vector {
    Vector { value: left.value + right.value, ..left }
}

impl World {
    /// Starts a coordinator on what lies on the disk.
    pub(crate) fn start_coordinator(&mut self) -> Result<(), Violation> {
        if self.coordinator.is_some() || self.over.is_some() {
            return Ok(());
        }
        self.disk.incarnation += 1;
        if let Some(step) = self.disk.trusted_up_to.take().filter(|_| self.mutation != Mutation::ForgetTheWayBack) {
            self.disk.remove_after(step);
        }
        self.coordinator_stalled_until = Duration::ZERO;
        let incarnation = self.disk.incarnation;
        let checkpoint = self.disk.newest(u64::MAX, self.mutation == Mutation::ResumeFromTorn);
        let mut config = self.scenario.engine.clone();
        config.audit_seed ^= incarnation;
        config.quarantined = self.disk.quarantined.clone();
        if self.disk.referenced {
            config.reference_slots = 0;
        }
        config.start = checkpoint.as_ref().map_or(Start::Fresh, |checkpoint| checkpoint.start([CLASS]));
        let plane = self.restored(checkpoint.as_ref());
        self.disk.cut(plane.version, checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.validated));
        let (numbers, quiet, wrong) = (self.scenario.numbers, self.quiet.clone(), self.wrong.clone());
        self.history = History::new(config.clone(), numbers, quiet, wrong, incarnation);
        self.mutation_state = Default::default();
        self.note(|| format!("start {incarnation} of the coordinator, at step {}", plane.version));
        let saved = checkpoint.is_some();
        self.see(&Seen::Restored { step: plane.version, params: plane.params, saved, newest: self.promised })?;
        self.mutation.configure(&mut config);
        self.coordinator = Some(Coordinator {
            incarnation,
            engine: Engine::new(config, Time(self.now)),
            staging_members: BTreeSet::new(),
            open_leases: BTreeSet::new(),
            staged: BTreeMap::new(),
            links: BTreeMap::new(),
            joining: BTreeMap::new(),
            tickets: 0,
            plane,
            archive_busy_until: self.now,
            tick_at: None,
            ticks: (Duration::ZERO, 0),
        });
        self.decide(Event::Tick, None)
    }

    /// The data plane as a checkpoint has it, or as every run begins.
    fn restored(&self, checkpoint: Option<&Checkpoint>) -> Plane {
        let (version, params) = checkpoint.map_or((0, self.scenario.numbers.initial()), |c| (c.step, c.params));
        Plane {
            version,
            params,
            sum: TreeSum::new(self.scenario.numbers.slots),
            sum_as_it_comes: 0.0,
            skipped_in_a_row: checkpoint.map_or(0, |checkpoint| checkpoint.skipped_in_a_row),
            validated_at: checkpoint.filter(|checkpoint| checkpoint.validated).map(|checkpoint| checkpoint.step),
        }
    }

    /// The process dies, and with it every connection.
    pub(crate) fn end_coordinator(&mut self) {
        self.coordinator = None;
        for connection in self.network.working() {
            self.break_connection(connection, true, false);
        }
    }

    /// A message reaches the coordinator.
    pub(crate) fn coordinator_hears(&mut self, connection: ConnectionId, message: Up) -> Result<(), Violation> {
        let Some(coordinator) = &mut self.coordinator else { return Ok(()) };
        let ours = coordinator.incarnation;
        let fenced = |theirs: u64| theirs == ours || self.mutation == Mutation::IgnoreIncarnation;
        let member = self.network.get(connection).and_then(|connection| connection.member);
        match message {
            Up::Join => {
                self.send_down(connection, Down::Invitation { incarnation: ours });
                Ok(())
            }
            Up::Admit { incarnation, .. } if !fenced(incarnation) => {
                let refused = Refused::Lost("for another start".into());
                self.send_down(connection, Down::Admitted(Err(refused)));
                Ok(())
            }
            Up::Admit { incarnation, name } => {
                coordinator.tickets += 1;
                let ticket = Ticket(coordinator.tickets);
                coordinator.joining.insert(ticket, connection);
                let name = self.mutation.rename(name, ticket);
                let event = Event::JoinRequested { ticket, name, device: "cpu".into(), class: CLASS, workers: 1 };
                self.decide(event, Some(incarnation))
            }
            Up::Open { incarnation, .. } if !fenced(incarnation) => {
                self.send_down(connection, Down::Close);
                Ok(())
            }
            Up::Open { incarnation, worker } => {
                self.send_down(connection, Down::Opened);
                let Some(coordinator) = &mut self.coordinator else { return Ok(()) };
                match coordinator.links.get_mut(&worker) {
                    Some(link) => *link = Some(connection),
                    None => self.send_down(connection, Down::Close),
                }
                if let Some(connection) = self.network.get_mut(connection) {
                    connection.member = Some(worker);
                    connection.broken_at = None;
                }
                self.decide(Event::ControlOpened { worker }, Some(incarnation))
            }
            Up::PushBegun { incarnation, .. } if !fenced(incarnation) => Ok(()),
            Up::PushBegun { incarnation, worker, lease } => {
                self.decide(Event::PushBegun { worker, lease: LeaseId(lease) }, Some(incarnation))
            }
            Up::Push { incarnation, worker, lease, vector } => {
                let result = match fenced(incarnation) {
                    false => Err(Refused::Lost("for another start".into())),
                    true => coordinator.stage(worker, LeaseId(lease), vector),
                };
                self.send_down(connection, Down::Pushed { lease, result });
                Ok(())
            }
            Up::Pull { incarnation, version } => {
                let Plane { version: published, params, .. } = coordinator.plane;
                let result = match (fenced(incarnation), published == version) {
                    (false, _) => Err(Refused::Lost("for another start".into())),
                    (true, false) => Err(Refused::Final(format!("version {published} is published"))),
                    (true, true) => Ok(params),
                };
                self.send_down(connection, Down::Pulled { asked: version, result });
                Ok(())
            }
            Up::Heartbeat | Up::Kept(_) | Up::Result(_) | Up::Declined { .. } | Up::Close => match member {
                Some(worker) => self.member_says(connection, worker, message),
                None => Ok(()),
            },
        }
    }

    /// A message on a control stream.
    fn member_says(&mut self, connection: ConnectionId, worker: WorkerId, message: Up) -> Result<(), Violation> {
        let Some(coordinator) = &self.coordinator else { return Ok(()) };
        let ours = Some(coordinator.incarnation);
        match message {
            Up::Heartbeat => {
                if coordinator.links.get(&worker).is_some_and(|link| *link == Some(connection)) {
                    self.send_down(connection, Down::HeartbeatAck);
                }
                self.decide(Event::Heartbeat { worker }, ours)
            }
            Up::Kept(blocks) => self.decide(Event::Kept { worker, blocks }, ours),
            Up::Declined { lease, reason } => {
                self.decide(Event::Declined { worker, lease: LeaseId(lease), reason }, ours)
            }
            Up::Result(result) => self.judge(connection, worker, result),
            _ => self.close(connection),
        }
    }

    fn judge(&mut self, connection: ConnectionId, worker: WorkerId, result: ResultMessage) -> Result<(), Violation> {
        let Some(coordinator) = &self.coordinator else { return Ok(()) };
        let ResultMessage { incarnation, lease, step, version, task, block, digest, sums, slot_sums, compute } = result;
        if incarnation != coordinator.incarnation && self.mutation != Mutation::IgnoreIncarnation {
            return self.close(connection);
        }
        let lease = LeaseId(lease);
        let staged = coordinator.staged.get(&(worker, lease));
        let norm = staged.map(|vector| vector.value.abs());
        if task == Task::Gradient && norm.is_none() && coordinator.open_leases.contains(&(worker, lease)) {
            return self.close(connection); // a vector that was not pushed
        }
        let done = BlockDone { worker, lease, step, version, task, block, digest, norm, sums, slot_sums, compute };
        self.decide(Event::BlockDone(done), Some(incarnation))
    }

    /// A control stream ends.
    pub(crate) fn close(&mut self, connection: ConnectionId) -> Result<(), Violation> {
        self.send_down(connection, Down::Close);
        let worker = self.network.get_mut(connection).and_then(|connection| connection.member.take());
        let (Some(worker), Some(coordinator)) = (worker, &mut self.coordinator) else { return Ok(()) };
        coordinator.forget(worker);
        self.decide(Event::ControlClosed { worker }, None)
    }

    /// Lets the engine decide on an event, and carries out its commands.
    pub(crate) fn decide(&mut self, event: Event, meant_for: Option<u64>) -> Result<(), Violation> {
        let Some(coordinator) = &mut self.coordinator else { return Ok(()) };
        let now = Time(self.now);
        self.trace.add(now, Entry::Event(event.clone()));
        super::invariants::check(&self.history, &Seen::Heard { event: &event, meant_for })?;
        self.history.note(&Seen::Heard { event: &event, meant_for });
        let commands = match self.mutation.lets_pass(&mut self.mutation_state, &event) {
            true => coordinator.engine.handle(event, now),
            false => Vec::new(),
        };
        for command in commands {
            for command in self.mutation.distort(&mut self.mutation_state, &self.history, command) {
                self.trace.add(now, Entry::Command(command.clone()));
                let task = match &command {
                    Command::Accept { worker, lease, .. } => self.history.open.get(&(*worker, *lease)),
                    _ => None,
                };
                let task = task.map(|open| open.lease.task);
                self.see(&Seen::Decided(&command))?;
                self.carry_out(command, task)?;
            }
        }
        let staged = self.coordinator.as_ref().map_or(0, |coordinator| coordinator.staged.len());
        self.see(&Seen::Settled { staged })?;
        self.expect_coordinator_tick();
        Ok(())
    }

    /// Carries one command out; `task` is that of the lease that it accepts.
    fn carry_out(&mut self, command: Command, task: Option<Task>) -> Result<(), Violation> {
        let Some(coordinator) = &mut self.coordinator else { return Ok(()) };
        match command {
            Command::Admit { ticket, worker, .. } => {
                coordinator.staging_members.insert(worker);
                coordinator.links.insert(worker, None);
                if let Some(connection) = coordinator.joining.remove(&ticket) {
                    self.send_down(connection, Down::Admitted(Ok(worker)));
                }
            }
            Command::Refuse { ticket, reason } => {
                if let Some(connection) = coordinator.joining.remove(&ticket) {
                    self.send_down(connection, Down::Admitted(Err(Refused::Final(reason.to_string()))));
                }
            }
            Command::Lease { worker, lease } => {
                coordinator.open_leases.insert((worker, lease.id));
                let task = match lease.task {
                    Task::Gradient => lease::Task::Gradient,
                    Task::Evaluate => lease::Task::Evaluate,
                    Task::Reference => lease::Task::Reference,
                };
                let parameters = Parameters { version: lease.version, digest: Some(digest(coordinator.plane.params)) };
                let seed = self.scenario.numbers.seed;
                let lease = Lease { id: lease.id.0, step: lease.step, parameters, block: lease.block, seed, task };
                self.send_to(worker, Down::Lease(lease));
            }
            Command::Accept { worker, lease, block, .. } => {
                let vector = coordinator.take(worker, lease);
                if !matches!(task, Some(Task::Evaluate | Task::Reference)) {
                    self.add(block, vector)?;
                }
            }
            Command::Discard { worker, lease, reason } => {
                coordinator.take(worker, lease);
                use DiscardReason::{Overtaken, RunEnds, StartedOver};
                if matches!(reason, Overtaken | RunEnds | StartedOver) {
                    self.send_to(worker, Down::Revoke { lease: lease.0 });
                }
            }
            Command::ApplyStep { step, sums } => {
                let wait = self.chance.secs(self.scenario.apply_secs / 10.0, self.scenario.apply_secs);
                self.report_after(wait, Report::Applied { step, sums });
            }
            Command::RestartStep { .. } => {
                coordinator.plane.sum = TreeSum::new(self.scenario.numbers.slots);
                coordinator.plane.sum_as_it_comes = 0.0;
            }
            Command::RollBack { at_most } => {
                let busy = coordinator.archive_busy_until.saturating_sub(self.now);
                self.disk.trusted_up_to = Some(at_most);
                if self.scenario.faults.contains(&Fault::CoordinatorCrash) && self.now < self.scenario.faults_end {
                    // Seldom, and the worst moment: so it is not left to chance alone.
                    let wait = self.chance.secs(0.001, 1.0);
                    self.after(wait, Rank::Message, Happening::CoordinatorDies);
                }
                self.promised = self.disk.newest(at_most, false).map_or(0, |checkpoint| checkpoint.step);
                let wait = busy + self.chance.secs(self.scenario.checkpoint_secs / 10.0, self.scenario.checkpoint_secs);
                self.report_after(wait, Report::RolledBack { at_most });
            }
            Command::RecordReferences => self.disk.referenced = true,
            Command::RecordValidation { step, sums } => {
                coordinator.plane.validated_at = Some(step);
                let already = self.disk.is_validated(step);
                self.see(&Seen::Validated { step, sums, already })?;
                self.disk.validations.push((step, sums));
            }
            Command::Checkpoint { step } => {
                let Plane { params, skipped_in_a_row, validated_at, .. } = coordinator.plane;
                let validated = validated_at == Some(step);
                let wait = self.chance.secs(self.scenario.checkpoint_secs / 10.0, self.scenario.checkpoint_secs);
                coordinator.archive_busy_until = self.now + wait;
                let unchecked_since = coordinator.engine.unchecked_since().clone();
                let checkpoint = Checkpoint { step, params, validated, skipped_in_a_row, unchecked_since, whole: true };
                self.writing = Some(checkpoint.clone());
                self.report_after(wait, Report::Written(checkpoint));
            }
            Command::Release { worker, reason } => {
                let run_goes_on = !matches!(reason, ReleaseReason::RunOver(_));
                self.send_to(worker, Down::Release { reason: reason.to_string(), run_goes_on });
                if let ReleaseReason::Declined { .. } | ReleaseReason::Quarantined { .. } = reason {
                    self.hang_up(worker);
                }
            }
            Command::Disconnect { worker, .. } => {
                self.hang_up(worker);
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.forget(worker);
                }
            }
            Command::Quarantine { name } => drop(self.disk.quarantined.insert(name)),
            Command::Finish { outcome, .. } => self.finish(&outcome)?,
            Command::Sample { .. } | Command::Report(_) => {}
            Command::GiveBack { .. } => unreachable!("there are no relays"),
        }
        Ok(())
    }

    /// Adds an accepted gradient to the sum.
    fn add(&mut self, block: Block, vector: Option<Vector>) -> Result<(), Violation> {
        self.see(&Seen::Added { block, vector })?;
        let (Some(coordinator), Some(vector)) = (&mut self.coordinator, vector) else { return Ok(()) };
        coordinator.plane.sum_as_it_comes += vector.value;
        let added = coordinator.plane.sum.insert(block, vector, |left, right, _| add(left, right));
        added.map_err(|_| Violation { invariant: "every_slot_counts_once", what: format!("{block} is there already") })
    }

    /// Somebody who works for the coordinator is done.
    pub(crate) fn coordinator_learns(&mut self, incarnation: u64, report: Report) -> Result<(), Violation> {
        let Some(coordinator) = self.coordinator.as_mut().filter(|current| current.incarnation == incarnation) else {
            return Ok(());
        };
        match report {
            Report::Applied { step, sums } => {
                let numbers = self.scenario.numbers;
                let sum = std::mem::replace(&mut coordinator.plane.sum, TreeSum::new(numbers.slots));
                let incomplete = || Violation { invariant: "every_slot_counts_once", what: "a sum has holes".into() };
                let in_order = sum.into_root().ok_or_else(incomplete)?.value;
                let as_it_came = std::mem::take(&mut coordinator.plane.sum_as_it_comes);
                let gradient = if self.mutation == Mutation::SumAsItComes { as_it_came } else { in_order };
                let plane = &mut coordinator.plane;
                let (params, skipped) = numbers.apply(plane.params, step, gradient, sums);
                plane.version = step;
                plane.params = params;
                plane.skipped_in_a_row = if skipped { plane.skipped_in_a_row + 1 } else { 0 };
                self.see(&Seen::Applied { step, params, skipped })?;
                self.decide(Event::StepApplied { step, skipped }, None)
            }
            Report::Written(Checkpoint { step, .. }) if std::mem::take(&mut self.disk_full) => {
                self.writing = None;
                self.decide(Event::CheckpointFailed { step, reason: "no space left on device".into() }, None)
            }
            Report::Written(checkpoint) => {
                self.writing = None;
                let step = checkpoint.step;
                if self.disk.trusted_up_to.is_none_or(|trusted| step <= trusted) {
                    self.promised = step;
                }
                if self.mutation != Mutation::LoseCheckpoints {
                    self.disk.write(checkpoint, self.scenario.keep_last);
                }
                self.decide(Event::CheckpointWritten { step }, None)
            }
            Report::RolledBack { at_most } => {
                self.disk.trusted_up_to = None;
                let newest = self.disk.newest(at_most, false).map_or(0, |checkpoint| checkpoint.step);
                self.promised = newest;
                let at_most = if self.mutation == Mutation::RollBackTooLittle { u64::MAX } else { at_most };
                self.disk.remove_after(at_most);
                let checkpoint = self.disk.newest(at_most, false);
                let plane = self.restored(checkpoint.as_ref());
                let (step, skipped_in_a_row) = (plane.version, plane.skipped_in_a_row);
                let validated =
                    checkpoint.as_ref().map_or(self.disk.is_validated(0), |checkpoint| checkpoint.validated);
                self.disk.cut(step, validated);
                let saved = checkpoint.is_some();
                let seen = Seen::Restored { step, params: plane.params, saved, newest };
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.plane = plane;
                }
                self.see(&seen)?;
                self.decide(Event::RolledBack { step, validated, saved, skipped_in_a_row }, None)
            }
            Report::Tick => {
                coordinator.tick_at = None;
                if coordinator.engine.next_deadline().is_none_or(|deadline| deadline.0 > self.now) {
                    self.expect_coordinator_tick();
                    return Ok(());
                }
                coordinator.ticks = match coordinator.ticks {
                    (at, number) if at == self.now => (at, number + 1),
                    _ => (self.now, 1),
                };
                if coordinator.ticks.1 > MOST_TICKS_AT_ONCE {
                    let what = "the engine asks for a tick again and again".to_string();
                    return Err(Violation { invariant: "the_engine_rests", what });
                }
                self.decide(Event::Tick, None)
            }
            Report::Exit => {
                self.end_coordinator();
                let wait = self.chance.secs(0.2, 5.0);
                self.after(wait, Rank::Message, Happening::StartCoordinator);
                Ok(())
            }
        }
    }

    /// The run is over, or this start of the coordinator.
    fn finish(&mut self, outcome: &Outcome) -> Result<(), Violation> {
        let for_good = match outcome {
            Outcome::Completed => true,
            Outcome::Failed { reason } => matches!(reason, Failure::BadSteps { .. }),
            Outcome::Stopped { .. } => false,
        };
        if !for_good {
            self.report_after(Duration::from_secs(1), Report::Exit);
            return Ok(());
        }
        self.over = Some(outcome.clone());
        let validations = self.disk.validations.clone();
        self.see(&Seen::Over { outcome, validations: &validations })
    }

    /// Checks invariants against what happens next, and takes note of it.
    fn see(&mut self, seen: &Seen<'_>) -> Result<(), Violation> {
        super::invariants::check(&self.history, seen)?;
        self.history.note(seen);
        Ok(())
    }

    fn report_after(&mut self, wait: Duration, report: Report) {
        let Some(incarnation) = self.coordinator.as_ref().map(|coordinator| coordinator.incarnation) else { return };
        self.after(wait, Rank::Message, Happening::Coordinator { incarnation, report });
    }

    fn expect_coordinator_tick(&mut self) {
        let Some(coordinator) = &mut self.coordinator else { return };
        let Some(deadline) = coordinator.engine.next_deadline() else { return };
        let due = deadline.0.max(self.now);
        if coordinator.tick_at.is_none_or(|at| due < at) {
            coordinator.tick_at = Some(due);
            // A timer fires late, and other things happen before.
            let [least, most] = TIMER_DELAY_SECS;
            let due = if due > self.now { due + self.timers.secs(least, most) } else { due };
            let (incarnation, report) = (coordinator.incarnation, Report::Tick);
            self.at(due, Rank::Tick, Happening::Coordinator { incarnation, report });
        }
    }

    /// Sends something to a member, if its control stream is open.
    fn send_to(&mut self, worker: WorkerId, message: Down) {
        let Some(coordinator) = &self.coordinator else { return };
        if let Some(Some(connection)) = coordinator.links.get(&worker).copied() {
            self.send_down(connection, message);
        }
    }

    /// Ends a control stream, after what was sent on it.
    fn hang_up(&mut self, worker: WorkerId) {
        self.send_to(worker, Down::Close);
        if let Some(link) = self.coordinator.as_mut().and_then(|coordinator| coordinator.links.get_mut(&worker)) {
            *link = None;
        }
    }
}

impl Coordinator {
    /// Keeps a vector for a lease that is open.
    fn stage(&mut self, worker: WorkerId, lease: LeaseId, vector: Vector) -> Result<(), Refused> {
        if !self.staging_members.contains(&worker) {
            return Err(Refused::Lost("not a member".into()));
        }
        if !self.open_leases.contains(&(worker, lease)) {
            return Err(Refused::Final("the lease is over".into()));
        }
        self.staged.insert((worker, lease), vector);
        Ok(())
    }

    /// Takes the vector of a lease that ends.
    fn take(&mut self, worker: WorkerId, lease: LeaseId) -> Option<Vector> {
        self.open_leases.remove(&(worker, lease));
        self.staged.remove(&(worker, lease))
    }

    /// Ends a membership.
    fn forget(&mut self, worker: WorkerId) {
        self.links.remove(&worker);
        self.staging_members.remove(&worker);
        self.open_leases.retain(|(owner, _)| *owner != worker);
        self.staged.retain(|(owner, _), _| *owner != worker);
    }
}
