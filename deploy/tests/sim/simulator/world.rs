//! Virtual time: what happens next, and to whom.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use lockstep_coordinator::engine::command::Outcome;

use super::chance::Chance;
use super::coordinator::{Coordinator, Report};
use super::disk::{Checkpoint, Disk};
use super::history::History;
use super::invariants::Violation;
use super::mutation::{Mutation, MutationState};
use super::network::{ConnectionId, Down, Network, Up};
use super::numbers::Quiet;
use super::scenario::Scenario;
use super::trace::Trace;
use super::worker::{Timer, Worker};

/// What comes first of what is due at one moment: a process hears what was said before it looks at its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    Message,
    Task,
    Tick,
}

/// Something that is going to happen.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    Up {
        connection: ConnectionId,
        sent_at: Duration,
        message: Up,
    },
    Down {
        connection: ConnectionId,
        sent_at: Duration,
        message: Down,
    },
    /// One side learns that a connection broke.
    CoordinatorLoses(ConnectionId),
    WorkerLoses(ConnectionId),
    WorkerTimer {
        worker: usize,
        token: u64,
        timer: Timer,
    },
    Computed {
        worker: usize,
        life: u64,
        job: u64,
    },
    Coordinator {
        incarnation: u64,
        report: Report,
    },
    CoordinatorDies,
    StartCoordinator,
    StartWorker(usize),
    Fault,
    FaultsEnd,
}

/// Whose doing something is: one who stands still does it later.
enum Whose {
    Coordinator,
    Worker(usize),
    Nobodys,
}

/// A cluster in virtual time.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) scenario: Scenario,
    pub(crate) now: Duration,
    queue: BTreeMap<(Duration, Rank, u64), Happening>,
    happenings: u64,
    pub(crate) network: Network,
    pub(crate) disk: Disk,
    pub(crate) disk_full: bool,
    /// The step of the newest checkpoint that is said to be on the disk; 0: there is none.
    pub(crate) promised: u64,
    /// The checkpoint that is being written.
    pub(crate) writing: Option<Checkpoint>,
    pub(crate) coordinator: Option<Coordinator>,
    pub(crate) coordinator_stalled_until: Duration,
    pub(crate) workers: Vec<Worker>,
    pub(crate) history: History,
    pub(crate) quiet: Rc<Quiet>,
    pub(crate) wrong: Rc<BTreeSet<String>>,
    pub(crate) trace: Trace,
    pub(crate) chance: Chance,
    /// Of how late timers fire.
    pub(crate) timers: Chance,
    pub(crate) mutation: Mutation,
    pub(crate) mutation_state: MutationState,
    /// How the run ended, once it is over for good.
    pub(crate) over: Option<Outcome>,
    /// What went wrong, and how often.
    pub(crate) faults: BTreeMap<String, u64>,
}

impl World {
    pub(crate) fn new(scenario: Scenario, mutation: Mutation, verbose: bool) -> Self {
        let workers: Vec<Worker> =
            scenario.workers.iter().enumerate().map(|(number, traits)| Worker::new(number, *traits)).collect();
        let engine = &scenario.engine;
        let quiet = Rc::new(Quiet::run(&scenario.numbers, engine.total_steps, engine.max_bad_steps));
        let wrong = workers.iter().filter(|worker| !worker.traits.nature.is_right());
        let wrong: Rc<BTreeSet<String>> = Rc::new(wrong.map(|worker| worker.name.clone()).collect());
        let outside = mutation.draw_from_outside();
        Self {
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            happenings: 0,
            network: Network::new(scenario.seed, workers.len(), scenario.latency_secs),
            disk: Disk::default(),
            disk_full: false,
            promised: 0,
            writing: None,
            coordinator: None,
            coordinator_stalled_until: Duration::ZERO,
            workers,
            history: History::new(engine.clone(), scenario.numbers, quiet.clone(), wrong.clone(), 0),
            quiet,
            wrong,
            trace: Trace::new(verbose),
            chance: Chance::new(scenario.seed ^ outside, 3),
            timers: Chance::new(scenario.seed ^ outside, 7),
            mutation,
            mutation_state: MutationState::default(),
            over: None,
            faults: BTreeMap::new(),
            scenario,
        }
    }

    /// Lets time pass until the run is over for good.
    ///
    /// # Errors
    /// An invariant that does not hold.
    pub(crate) fn run(&mut self) -> Result<(), Violation> {
        self.after(Duration::ZERO, Rank::Message, Happening::StartCoordinator);
        for worker in 0..self.workers.len() {
            let wait = self.chance.secs(0.001, 3.0);
            self.after(wait, Rank::Message, Happening::StartWorker(worker));
        }
        self.at(self.scenario.faults_end, Rank::Message, Happening::FaultsEnd);
        self.expect_fault();
        while self.over.is_none() {
            let next = self.queue.pop_first().filter(|((at, ..), _)| *at <= self.scenario.must_end);
            let Some(((at, rank, _), happening)) = next else {
                let waiting = self.coordinator.as_ref().map(|coordinator| coordinator.engine.status().waiting_for);
                let what = format!("{:.0} s after faults ended it waits for {waiting:?}", self.secs_after_faults());
                return Err(Violation { invariant: "the_run_finishes", what });
            };
            self.now = at;
            match self.held_until(&happening) {
                Some(until) => self.at(until, rank, happening),
                None => self.happen(happening)?,
            }
        }
        Ok(())
    }

    fn secs_after_faults(&self) -> f64 {
        self.scenario.must_end.saturating_sub(self.scenario.faults_end).as_secs_f64()
    }

    /// When something that is due happens, if not now: one who stands still does nothing, and nothing passes a
    /// partition.
    fn held_until(&self, happening: &Happening) -> Option<Duration> {
        let worker_of = |connection: &ConnectionId| self.network.get(*connection).map(|connection| connection.worker);
        let (whose, between) = match happening {
            Happening::Up { connection, .. } => (Whose::Coordinator, worker_of(connection)),
            Happening::CoordinatorLoses(connection) => (Whose::Coordinator, worker_of(connection)),
            Happening::Down { connection, .. } | Happening::WorkerLoses(connection) => {
                let worker = worker_of(connection);
                (worker.map_or(Whose::Nobodys, Whose::Worker), worker)
            }
            Happening::WorkerTimer { worker, .. } | Happening::Computed { worker, .. } => {
                (Whose::Worker(*worker), None)
            }
            Happening::Coordinator { .. } => (Whose::Coordinator, None),
            Happening::CoordinatorDies
            | Happening::StartCoordinator
            | Happening::StartWorker(_)
            | Happening::Fault
            | Happening::FaultsEnd => (Whose::Nobodys, None),
        };
        let stalled = match whose {
            Whose::Coordinator => self.coordinator_stalled_until,
            Whose::Worker(worker) => self.workers[worker].stalled_until,
            Whose::Nobodys => Duration::ZERO,
        };
        let until = between.map_or(stalled, |worker| self.network.passes(worker, stalled));
        (until > self.now).then_some(until)
    }

    fn happen(&mut self, happening: Happening) -> Result<(), Violation> {
        match happening {
            Happening::Up { connection, sent_at, message } => {
                let Some(known) = self.network.get(connection) else { return Ok(()) };
                // A call that follows on a break dials anew; what was under way is lost.
                let call = matches!(
                    message,
                    Up::Join
                        | Up::Admit { .. }
                        | Up::Open { .. }
                        | Up::PushBegun { .. }
                        | Up::Push { .. }
                        | Up::Pull { .. }
                );
                let lost = known.broken_at.is_some_and(|broken_at| !call || sent_at <= broken_at);
                match (lost, self.coordinator.is_some()) {
                    (true, _) => Ok(()),
                    (false, true) => self.coordinator_hears(connection, message),
                    (false, false) => {
                        self.break_connection(connection, true, false);
                        Ok(())
                    }
                }
            }
            Happening::Down { connection, sent_at, message } => {
                let Some(known) = self.network.get(connection) else { return Ok(()) };
                if known.broken_at.is_none_or(|broken_at| sent_at > broken_at) {
                    self.worker_hears(known.worker, connection, message);
                }
                Ok(())
            }
            Happening::CoordinatorLoses(connection) => self.close(connection),
            Happening::WorkerLoses(connection) => {
                let Some(known) = self.network.get(connection) else { return Ok(()) };
                if known.broken_at.is_some() {
                    self.worker_loses(known.worker, connection);
                }
                Ok(())
            }
            Happening::WorkerTimer { worker, token, timer } => {
                self.worker_timer(worker, token, timer);
                Ok(())
            }
            Happening::Computed { worker, life, job } => {
                self.computed(worker, life, job);
                Ok(())
            }
            Happening::Coordinator { incarnation, report } => self.coordinator_learns(incarnation, report),
            Happening::CoordinatorDies => {
                self.crash_coordinator();
                Ok(())
            }
            Happening::StartCoordinator => self.start_coordinator(),
            Happening::StartWorker(worker) => {
                self.start_worker(worker);
                Ok(())
            }
            Happening::Fault => self.strike(),
            Happening::FaultsEnd => self.end_faults(),
        }
    }

    /// Something is to happen after a wait.
    pub(crate) fn after(&mut self, wait: Duration, rank: Rank, happening: Happening) {
        self.at(self.now + wait, rank, happening);
    }

    /// Something is to happen at a time.
    pub(crate) fn at(&mut self, time: Duration, rank: Rank, happening: Happening) {
        self.happenings += 1;
        self.queue.insert((time, rank, self.happenings), happening);
    }

    /// Sends a message to the coordinator.
    pub(crate) fn send_up(&mut self, connection: ConnectionId, message: Up) {
        let sent_at = self.now;
        if let Some(arrives) = self.network.send_up(connection, &message, sent_at) {
            self.at(arrives, Rank::Message, Happening::Up { connection, sent_at, message });
        }
    }

    /// Sends a message to a worker.
    pub(crate) fn send_down(&mut self, connection: ConnectionId, message: Down) {
        let sent_at = self.now;
        if let Some(arrives) = self.network.send_down(connection, &message, sent_at) {
            self.at(arrives, Rank::Message, Happening::Down { connection, sent_at, message });
        }
    }
}
