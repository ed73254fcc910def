//! A worker process around real sessions: it joins, shows the probe, is a member, and joins again.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use lockstep_coordinator::engine::WorkerId;
use lockstep_coordinator::engine::command::Task;
use lockstep_coordinator::engine::event::KeptBlock;
use lockstep_worker::lease::{self, GradientName, Lease, Parameters};
use lockstep_worker::session::{Command, Departure, Event, Session, TransferFailure};

use super::chance::mix;
use super::network::{ConnectionId, Down, Refused, ResultMessage, Up};
use super::numbers::{Outcome, Params, digest};
use super::scenario::{Nature, Traits};
use super::trace::Entry;
use super::world::{Happening, Rank, World};

/// Waits between attempts to connect: from the shortest to the longest, doubling, each cut by up to half.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A small call is given up after so long.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Most gradients kept from earlier memberships.
const MAX_KEPT: usize = 64;

/// A worker process, or the lack of one.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) traits: Traits,
    pub(crate) state: State,
    /// Counts processes: what was meant for an earlier one is of no concern to the next.
    pub(crate) life: u64,
    /// Counts calls and memberships, likewise.
    token: u64,
    failures: u32,
    /// Of the coordinator that invited last.
    incarnation: u64,
    /// The id it gave.
    id: WorkerId,
    kept: VecDeque<(GradientName, Outcome)>,
    device: Device,
    /// How many blocks it computed, in all its lives.
    computed: u32,
    tick_at: Option<Duration>,
    /// What was done to it.
    pub(crate) stalled_until: Duration,
    pub(crate) slow_until: Duration,
    pub(crate) fails_next: bool,
    pub(crate) damages_next: bool,
    pub(crate) muddles_next: bool,
    pub(crate) repeats_next: bool,
}

/// What a process is doing.
#[derive(Debug)]
pub(crate) enum State {
    /// There is none.
    Down,
    /// Waits before the next attempt.
    Waiting,
    /// Waits for an answer.
    Calling(ConnectionId),
    /// Computes the probe.
    Probing(ConnectionId),
    Member(Box<Membership>),
}

/// The device and what is in it.
#[derive(Debug, Default)]
struct Device {
    params: Option<Params>,
    job: Option<Job>,
    jobs: u64,
}

/// What the device computes.
#[derive(Debug)]
struct Job {
    number: u64,
    /// In which membership.
    token: u64,
    lease: Lease,
    outcome: Outcome,
    takes: Duration,
    ends: Duration,
}

/// One membership.
#[derive(Debug)]
pub(crate) struct Membership {
    pub(crate) connection: ConnectionId,
    session: Session,
    leases: BTreeMap<u64, Held>,
    kept: BTreeMap<GradientName, Outcome>,
    pulling: Option<Parameters>,
}

/// A lease and what has become of it.
#[derive(Debug)]
struct Held {
    lease: Lease,
    outcome: Option<Outcome>,
    compute: Duration,
}

/// What a process waits for by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Timer {
    Connect,
    CallTimeout,
    Probed,
    Tick,
}

impl Worker {
    pub(crate) fn new(number: usize, traits: Traits) -> Self {
        let zero = Duration::ZERO;
        Self {
            name: format!("host-{number}"),
            traits,
            state: State::Down,
            life: 0,
            token: 0,
            failures: 0,
            incarnation: 0,
            id: WorkerId(0),
            kept: VecDeque::new(),
            device: Device::default(),
            computed: 0,
            tick_at: None,
            stalled_until: zero,
            slow_until: zero,
            fails_next: false,
            damages_next: false,
            muddles_next: false,
            repeats_next: false,
        }
    }

    /// The connection it uses.
    pub(crate) fn connection(&self) -> Option<ConnectionId> {
        match &self.state {
            State::Down | State::Waiting => None,
            State::Calling(connection) | State::Probing(connection) => Some(*connection),
            State::Member(membership) => Some(membership.connection),
        }
    }
}

impl World {
    /// A new process.
    pub(crate) fn start_worker(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        if matches!(worker.state, State::Down) {
            worker.life += 1;
            worker.failures = 0;
            worker.kept.clear();
            worker.device = Device::default();
            worker.stalled_until = Duration::ZERO;
            worker.state = State::Waiting;
            self.start_timer(number, Duration::ZERO, Timer::Connect);
        }
    }

    /// The process ends at once. What the other side learns of it is another matter.
    pub(crate) fn end_worker(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        worker.life += 1;
        worker.token += 1;
        worker.state = State::Down;
        worker.tick_at = None;
    }

    /// Starts a timer; those before are void.
    fn start_timer(&mut self, number: usize, wait: Duration, timer: Timer) {
        self.workers[number].token += 1;
        let token = self.workers[number].token;
        self.after(wait, Rank::Task, Happening::WorkerTimer { worker: number, token, timer });
    }

    /// A timer of a worker ends.
    pub(crate) fn worker_timer(&mut self, number: usize, token: u64, timer: Timer) {
        let worker = &mut self.workers[number];
        if worker.token != token {
            return;
        }
        match (timer, &worker.state) {
            (Timer::Connect, State::Waiting) => {
                let connection = self.network.connect(number);
                self.call(number, connection, Up::Join);
            }
            (Timer::CallTimeout, State::Calling(_)) => self.set_back(number, "a call was not answered"),
            (Timer::Probed, State::Probing(connection)) => {
                let connection = *connection;
                let (incarnation, name) = (worker.incarnation, worker.name.clone());
                self.call(number, connection, Up::Admit { incarnation, name });
            }
            (Timer::Tick, State::Member(membership)) => {
                worker.tick_at = None;
                match membership.session.next_deadline() <= self.now {
                    true => self.feed(number, Event::Tick),
                    false => self.expect_tick(number),
                }
            }
            _ => {}
        }
    }

    fn call(&mut self, number: usize, connection: ConnectionId, message: Up) {
        self.workers[number].state = State::Calling(connection);
        self.start_timer(number, CALL_TIMEOUT, Timer::CallTimeout);
        self.send_up(connection, message);
    }

    /// Joins again, after a while.
    fn set_back(&mut self, number: usize, why: &str) {
        let worker = &mut self.workers[number];
        worker.state = State::Waiting;
        worker.tick_at = None;
        let wait = SHORTEST_WAIT.saturating_mul(2u32.saturating_pow(worker.failures)).min(LONGEST_WAIT);
        worker.failures += 1;
        self.note(|| format!("worker {number} is set back: {why}"));
        let wait = wait.mul_f64(0.5 + 0.5 * self.chance.unit());
        self.start_timer(number, wait, Timer::Connect);
    }

    /// The process ends by itself; somebody starts it again some time.
    fn exit(&mut self, number: usize, why: &str) {
        self.note(|| format!("worker {number} ends: {why}"));
        self.end_worker(number);
        let wait = self.chance.secs(1.0, 20.0);
        self.after(wait, Rank::Message, Happening::StartWorker(number));
    }

    /// A worker finds its connection broken.
    pub(crate) fn worker_loses(&mut self, number: usize, connection: ConnectionId) {
        let worker = &self.workers[number];
        // One that computes the probe does not look.
        if worker.connection() == Some(connection) && !matches!(worker.state, State::Probing(_)) {
            self.set_back(number, "its connection broke");
        }
    }

    /// A worker hears something.
    pub(crate) fn worker_hears(&mut self, number: usize, connection: ConnectionId, message: Down) {
        let worker = &mut self.workers[number];
        if worker.connection() != Some(connection) {
            return;
        }
        match (&mut worker.state, message) {
            (State::Calling(_), Down::Invitation { incarnation }) => {
                worker.incarnation = incarnation;
                worker.state = State::Probing(connection);
                let busy = worker.device.job.as_ref().map_or(Duration::ZERO, |job| job.ends.saturating_sub(self.now));
                let wait = busy + Duration::from_secs_f64(worker.traits.secs_per_slot);
                self.start_timer(number, wait, Timer::Probed);
            }
            (State::Calling(_), Down::Admitted(Ok(id))) => {
                worker.id = id;
                let incarnation = worker.incarnation;
                self.call(number, connection, Up::Open { incarnation, worker: id });
            }
            (State::Calling(_), Down::Admitted(Err(Refused::Final(reason)))) => self.exit(number, &reason),
            (State::Calling(_), Down::Admitted(Err(Refused::Lost(reason)))) => self.set_back(number, &reason),
            (State::Calling(_), Down::Opened) => {
                let kept: BTreeMap<GradientName, Outcome> = worker.kept.iter().cloned().collect();
                let names = worker.kept.iter().map(|(name, _)| *name).collect();
                let session = Session::new(self.scenario.timing, names, self.now);
                let leases = BTreeMap::new();
                worker.token += 1;
                worker.state = State::Member(Box::new(Membership { connection, session, leases, kept, pulling: None }));
                self.expect_tick(number);
            }
            (State::Calling(_), Down::Close) => self.set_back(number, "the control stream is closed"),
            (State::Member(_), message) => self.member_hears(number, message),
            _ => {}
        }
    }

    fn member_hears(&mut self, number: usize, message: Down) {
        let worker = &mut self.workers[number];
        let State::Member(membership) = &mut worker.state else { return };
        let event = match message {
            Down::Lease(lease) => {
                let new = Held { lease, outcome: None, compute: Duration::ZERO };
                membership.leases.entry(lease.id).or_insert(new);
                worker.failures = 0;
                Event::Leased(lease)
            }
            Down::Revoke { lease } => Event::Revoked { lease },
            Down::HeartbeatAck => {
                worker.failures = 0;
                Event::HeartbeatAcked
            }
            Down::Release { reason, run_goes_on } => Event::Released { reason, run_goes_on },
            Down::Close => return self.set_back(number, "the control stream is closed"),
            Down::Pushed { lease, result: Ok(()) } if std::mem::take(&mut worker.damages_next) => {
                Event::PushFailed { lease, failure: TransferFailure::Damaged("bytes changed on the way".into()) }
            }
            Down::Pushed { lease, result: Ok(()) } => Event::Pushed { lease },
            Down::Pushed { lease, result: Err(refused) } => {
                Event::PushFailed { lease, failure: transfer_failure(refused) }
            }
            Down::Pulled { asked, result } => {
                let Some(parameters) = membership.pulling.filter(|parameters| parameters.version == asked) else {
                    return;
                };
                membership.pulling = None;
                match result {
                    Ok(_) if std::mem::take(&mut worker.damages_next) => {
                        let failure = TransferFailure::Damaged("bytes changed on the way".into());
                        Event::PullFailed { parameters, failure }
                    }
                    Ok(params) if parameters.digest.is_none_or(|named| named == digest(params)) => {
                        worker.device.params = Some(params);
                        Event::ParametersArrived { parameters }
                    }
                    Ok(_) => {
                        let failure = TransferFailure::Damaged("of another digest".into());
                        Event::PullFailed { parameters, failure }
                    }
                    Err(refused) => Event::PullFailed { parameters, failure: transfer_failure(refused) },
                }
            }
            Down::Invitation { .. } | Down::Admitted(_) | Down::Opened => return,
        };
        self.feed(number, event);
    }

    /// Has the session decide, and carries out what it says.
    fn feed(&mut self, number: usize, event: Event) {
        let State::Member(membership) = &mut self.workers[number].state else { return };
        for command in membership.session.handle(event, self.now) {
            if let Some(departure) = self.act(number, command) {
                return match departure {
                    Departure::Released(reason) | Departure::Dismissed(reason) => self.exit(number, &reason),
                    Departure::Lost(reason) => self.set_back(number, &reason),
                    Departure::Deserted => unreachable!("there are no relays"),
                };
            }
        }
        self.expect_tick(number);
    }

    fn expect_tick(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        let State::Member(membership) = &worker.state else { return };
        let due = membership.session.next_deadline().max(self.now);
        if worker.tick_at.is_none_or(|at| due < at) {
            worker.tick_at = Some(due);
            let (token, timer) = (worker.token, Timer::Tick);
            self.at(due, Rank::Tick, Happening::WorkerTimer { worker: number, token, timer });
        }
    }

    /// Carries out one command of a session; says if the membership is over.
    fn act(&mut self, number: usize, command: Command) -> Option<Departure> {
        let worker = &mut self.workers[number];
        let (incarnation, id) = (worker.incarnation, worker.id);
        let State::Member(membership) = &mut worker.state else { return None };
        let connection = membership.connection;
        let message = match command {
            Command::SendKept(names) => {
                let block =
                    |name: &GradientName| KeptBlock { step: name.step, version: name.version, block: name.block };
                Up::Kept(names.iter().map(block).collect())
            }
            Command::Pull { parameters, .. } => {
                membership.pulling = Some(parameters);
                Up::Pull { incarnation, version: parameters.version }
            }
            Command::Compute { lease } => {
                let lease = membership.leases.get(&lease)?.lease;
                self.start_computing(number, lease);
                return None;
            }
            Command::Abandon { lease } => {
                if worker.device.job.as_ref().is_some_and(|job| job.token == worker.token && job.lease.id == lease) {
                    worker.device.job = None;
                }
                return None;
            }
            Command::Recall { lease } => {
                let held = membership.leases.get_mut(&lease)?;
                held.outcome = held.lease.gradient_name().and_then(|name| membership.kept.remove(&name));
                return None;
            }
            Command::Forget => {
                membership.kept.clear();
                return None;
            }
            Command::Push { lease } => {
                let outcome = membership.leases.get(&lease).and_then(|held| held.outcome.clone());
                let vector = outcome.and_then(|outcome| outcome.vector).expect("what is pushed was computed");
                self.send_up(connection, Up::PushBegun { incarnation, worker: id, lease });
                Up::Push { incarnation, worker: id, lease, vector }
            }
            Command::SendResult { lease } => {
                let Held { lease, outcome, compute } = membership.leases.remove(&lease)?;
                let Outcome { vector, sums, slot_sums } = outcome.expect("what is reported was computed");
                let task = match lease.task {
                    lease::Task::Gradient => Task::Gradient,
                    lease::Task::Evaluate => Task::Evaluate,
                    lease::Task::Reference => Task::Reference,
                };
                let digest = match task {
                    Task::Reference => Some(digest(sums.loss.to_bits())),
                    _ => vector.map(|vector| digest(vector.value.to_bits())),
                };
                let (step, version, block) = (lease.step, lease.parameters.version, lease.block);
                let block = if std::mem::take(&mut worker.muddles_next) { block.sibling() } else { block };
                let lease = lease.id;
                let result =
                    ResultMessage { incarnation, lease, step, version, task, block, digest, sums, slot_sums, compute };
                if std::mem::take(&mut worker.repeats_next) {
                    self.send_up(connection, Up::Result(result.clone()));
                }
                Up::Result(result)
            }
            Command::SendDeclined { lease, reason } => {
                membership.leases.remove(&lease);
                Up::Declined { lease, reason }
            }
            Command::Discard { lease } => {
                membership.leases.remove(&lease);
                return None;
            }
            Command::SendHeartbeat => Up::Heartbeat,
            Command::Leave(departure) => {
                self.send_up(connection, Up::Close);
                return Some(departure);
            }
        };
        self.send_up(connection, message);
        None
    }

    fn start_computing(&mut self, number: usize, lease: Lease) {
        let task = match lease.task {
            lease::Task::Gradient => Task::Gradient,
            lease::Task::Evaluate => Task::Evaluate,
            lease::Task::Reference => Task::Reference,
        };
        let slots = lease.block.slots(self.scenario.numbers.slots_of(task)).len();
        let worker = &mut self.workers[number];
        let params = worker.device.params.expect("the session has parameters pulled first");
        let outcome = self.scenario.numbers.compute(params, lease.step, task, lease.block);
        let slowness = if self.now < worker.slow_until { 15.0 } else { 1.0 };
        let secs = slots as f64 * worker.traits.secs_per_slot * slowness * (0.8 + 0.5 * self.chance.unit());
        let takes = Duration::from_secs_f64(secs);
        worker.device.jobs += 1;
        let (number_of_job, token, ends) = (worker.device.jobs, worker.token, self.now + takes);
        worker.computed += 1;
        worker.device.job = Some(Job { number: number_of_job, token, lease, outcome, takes, ends });
        if !matches!(worker.traits.nature, Nature::Hangs { block } if worker.computed >= block) {
            let life = worker.life;
            self.at(ends, Rank::Task, Happening::Computed { worker: number, life, job: number_of_job });
        }
    }

    /// A device is done.
    pub(crate) fn computed(&mut self, number: usize, life: u64, job: u64) {
        let worker = &mut self.workers[number];
        if worker.life != life || worker.device.job.as_ref().is_none_or(|current| current.number != job) {
            return;
        }
        let Some(Job { token, lease, mut outcome, takes, .. }) = worker.device.job.take() else { return };
        let id = lease.id;
        if std::mem::take(&mut worker.fails_next) {
            worker.device.params = None;
            if worker.token == token {
                self.feed(number, Event::ComputeFailed { lease: id, reason: "the device is lost".into() });
            }
            return;
        }
        if errs(worker.traits.nature, worker.computed, mix(mix(number as u64) ^ worker.life << 32 ^ job), &mut outcome)
        {
            self.note(|| format!("worker {number} errs in lease {id}"));
        }
        let worker = &mut self.workers[number];
        if let Some(name) = lease.gradient_name() {
            worker.kept.retain(|(known, _)| *known != name);
            worker.kept.push_back((name, outcome.clone()));
            if worker.kept.len() > MAX_KEPT {
                worker.kept.pop_front();
            }
        }
        let State::Member(membership) = &mut worker.state else { return };
        if worker.token != token {
            return;
        }
        if let Some(held) = membership.leases.get_mut(&id) {
            held.outcome = Some(outcome);
            held.compute = takes;
        }
        self.feed(number, Event::Computed { lease: id });
    }
}

/// Changes a result as a worker of this nature would, in its `block`th; whether it did.
fn errs(nature: Nature, block: u32, random: u64, outcome: &mut Outcome) -> bool {
    let draw = super::chance::unit(mix(random));
    match nature {
        Nature::Flips { block: flipped } if block == flipped => {}
        Nature::Lies { share } | Nature::Breaks { share } if draw < share => {}
        _ => return false,
    }
    let noise = mix(random ^ 1) >> 12 | 1;
    match &mut outcome.vector {
        Some(vector) if matches!(nature, Nature::Breaks { .. }) => {
            vector.value = f64::from_bits(f64::NAN.to_bits() | mix(random ^ 2) >> 13 | 1);
        }
        Some(vector) => vector.value = f64::from_bits(vector.value.to_bits() ^ noise),
        None if matches!(nature, Nature::Lies { .. }) => {
            for sums in outcome.slot_sums.iter_mut().chain([&mut outcome.sums]) {
                sums.loss = f64::from_bits(sums.loss.to_bits() ^ noise);
            }
        }
        None => return false,
    }
    true
}

/// As the client reads a status.
fn transfer_failure(refused: Refused) -> TransferFailure {
    match refused {
        Refused::Final(reason) => TransferFailure::Refused(reason),
        Refused::Lost(reason) => TransferFailure::Disconnected(reason),
    }
}

impl World {
    /// Notes what happened beside the engine, for whoever reads a trace.
    pub(crate) fn note(&mut self, words: impl FnOnce() -> String) {
        let entry = Entry::Note(words());
        self.trace.add(lockstep_coordinator::engine::Time(self.now), entry);
    }
}
