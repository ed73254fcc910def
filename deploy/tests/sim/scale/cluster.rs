//! A cluster of any size in virtual time: the real engine and real sessions, nothing fails, and vectors take as long as
//! links let them. Every worker is the coordinator's own: a star.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use lockstep_coordinator::engine::command::{DiscardReason, Lease as Granted, Task};
use lockstep_coordinator::engine::event::BlockDone;
use lockstep_coordinator::engine::{
    Command, DeviceClass, Engine, EngineConfig, Event, LeaseId, Ticket, Time, WorkerId,
};
use lockstep_model::tree::TreeSum;
use lockstep_worker::lease::{self, Lease, Parameters};
use lockstep_worker::session::{Command as Act, Event as Hear, Session, Timing};

use super::link::Link;
use crate::simulator::chance::Chance;
use crate::simulator::numbers::{Numbers, Params, digest};

const CLASS: DeviceClass = DeviceClass([1; 32]);
/// A worker is given up after so many heartbeats that did not come, as in a recipe by default.
const MISSED_HEARTBEATS: u32 = 10;
/// Most slots in one lease of a worker.
const MAX_SLOTS_PER_LEASE: u32 = 64;

/// A cluster, its links and its run.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Workers that compute.
    pub(crate) workers: u32,
    pub(crate) slots_per_worker: u32,
    pub(crate) steps: u64,
    /// Elements of the vector that travels, and bytes that each takes on the way to the coordinator, and from it.
    pub(crate) parameters: f64,
    pub(crate) up_bytes: f64,
    pub(crate) down_bytes: f64,
    /// Of the coordinator's link, and of a worker's, each way.
    pub(crate) bits_per_sec: f64,
    pub(crate) worker_bits_per_sec: f64,
    /// One way.
    pub(crate) latency: Duration,
    /// Of one slot on average; workers differ from it by up to `spread`, as a share of it.
    pub(crate) secs_per_slot: f64,
    pub(crate) spread: f64,
    /// Bytes of gradients, as f32, that the coordinator adds in a second.
    pub(crate) added_bytes_per_sec: f64,
    /// Optimizer and publishing.
    pub(crate) apply_secs: f64,
    /// Between two heartbeats of a worker.
    pub(crate) heartbeat_interval: Duration,
    pub(crate) seed: u64,
}

impl Shape {
    fn timing(&self) -> Timing {
        let heartbeat_interval = self.heartbeat_interval;
        Timing { heartbeat_interval, liveness_timeout: heartbeat_interval * MISSED_HEARTBEATS }
    }
}

/// What a step took.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(crate) struct Step {
    pub(crate) secs: f64,
    /// Summed over all workers that compute.
    pub(crate) compute_secs: f64,
    pub(crate) down_bytes: f64,
    pub(crate) up_bytes: f64,
    /// Share of the time that the link is used, by what it could carry.
    pub(crate) down_use: f64,
    pub(crate) up_use: f64,
    /// Blocks that counted, and bytes of f32 added to others.
    pub(crate) blocks: u64,
    pub(crate) added_bytes: f64,
    pub(crate) engine_events: u64,
    /// By the clock of the machine that simulates.
    pub(crate) engine_secs: f64,
}

/// What is to happen.
#[derive(Debug)]
enum Happening {
    ToEngine(Event),
    ToWorker(usize, Hear),
    Pull(usize),
    /// A gradient is there whole: the coordinator acknowledges it.
    Staged(usize, u64),
    /// A transfer may be done, unless one began or ended since.
    Link(Way, u64),
    Computed(usize, u64),
    WorkerTick(usize),
    EngineTick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Down,
    Up,
}

/// A worker.
#[derive(Debug)]
struct Member {
    session: Session,
    secs_per_slot: f64,
    /// The parameters on their way to it.
    pulling: Option<Parameters>,
    params: Option<Params>,
    leases: BTreeMap<u64, Held>,
    /// The lease that is computed, and those that travel, one after the other.
    computing: Option<u64>,
    pushing: VecDeque<u64>,
    tick_at: Option<Duration>,
}

#[derive(Debug)]
struct Held {
    lease: Lease,
    takes: Duration,
}

/// A cluster in virtual time.
pub(crate) struct Cluster {
    shape: Shape,
    numbers: Numbers,
    now: Duration,
    queue: BTreeMap<(Duration, u64), Happening>,
    happenings: u64,
    engine: Engine,
    engine_tick: Option<Duration>,
    members: Vec<Member>,
    down: Link,
    up: Link,
    link_tokens: [u64; 2],
    params: Params,
    sum: TreeSum<f64>,
    /// Gradients that are here, and not decided about.
    staged: BTreeMap<(WorkerId, LeaseId), f64>,
    /// Until when what has been accepted is added.
    adding_until: Duration,
    step_began: Duration,
    under_way: Step,
    steps: Vec<Step>,
    over: bool,
}

/// How a run went.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    pub(crate) steps: Vec<Step>,
    /// Of the last version.
    pub(crate) params: Params,
}

/// Runs a cluster.
pub(crate) fn run(shape: &Shape) -> Course {
    Cluster::new(shape.clone()).run()
}

/// What a run of a shape computes, whoever does.
pub(crate) fn numbers(shape: &Shape) -> Numbers {
    let slots = shape.workers * shape.slots_per_worker;
    Numbers { seed: shape.seed, slots, eval_slots: 0, reference_slots: 0, outliers: 0.0, not_finite: 0.0 }
}

impl Cluster {
    fn new(shape: Shape) -> Self {
        let mut chance = Chance::new(shape.seed, 6);
        let member = |_| {
            let factor = 1.0 + shape.spread * (2.0 * chance.unit() - 1.0);
            Member {
                session: Session::new(shape.timing(), Vec::new(), Duration::ZERO),
                secs_per_slot: shape.secs_per_slot * factor,
                pulling: None,
                params: None,
                leases: BTreeMap::new(),
                computing: None,
                pushing: VecDeque::new(),
                tick_at: None,
            }
        };
        let members = (0..shape.workers).map(member).collect();
        let numbers = numbers(&shape);
        let config = EngineConfig {
            min_workers: shape.workers,
            liveness_timeout: shape.timing().liveness_timeout,
            max_slots_per_lease: MAX_SLOTS_PER_LEASE,
            ..EngineConfig::plain(shape.steps, numbers.slots)
        };
        let link = Link::new(shape.bits_per_sec, shape.worker_bits_per_sec);
        Self {
            numbers,
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            happenings: 0,
            engine: Engine::new(config, Time::default()),
            engine_tick: None,
            members,
            down: link.clone(),
            up: link,
            link_tokens: [0; 2],
            params: numbers.initial(),
            sum: TreeSum::new(numbers.slots),
            staged: BTreeMap::new(),
            adding_until: Duration::ZERO,
            step_began: Duration::ZERO,
            under_way: Step::default(),
            steps: Vec::new(),
            over: false,
            shape,
        }
    }

    fn run(mut self) -> Course {
        for member in 0..self.members.len() {
            let (ticket, name, device) = (Ticket(member as u64 + 1), format!("host-{member}"), "cpu".to_string());
            self.decide(Event::JoinRequested { ticket, name, device, class: CLASS, workers: 1 });
            self.expect_tick(member);
        }
        for member in 0..self.members.len() {
            self.decide(Event::ControlOpened { worker: id(member) });
        }
        while !self.over {
            let ((at, _), happening) = self.queue.pop_first().expect("the run ends before everybody rests");
            self.now = at;
            self.happen(happening);
        }
        Course { steps: self.steps, params: self.params }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::ToEngine(event) => self.decide(event),
            Happening::ToWorker(member, event) => {
                if let Hear::ParametersArrived { .. } = event {
                    let arrived = self.members[member].pulling.take().expect("it asked for them");
                    assert_eq!(arrived.digest, Some(digest(self.params)), "a version changes while somebody pulls it");
                    self.members[member].params = Some(self.params);
                }
                self.feed(member, event);
            }
            Happening::Pull(member) => {
                self.down.begin(member, self.shape.parameters * self.shape.down_bytes, self.now);
                self.expect_link(Way::Down);
            }
            Happening::Staged(member, lease) => {
                let Some(held) = self.members[member].leases.get(&lease) else { return };
                let params = self.members[member].params.expect("it was computed with parameters");
                let outcome = self.numbers.compute(params, held.lease.step, Task::Gradient, held.lease.block);
                let vector = outcome.vector.expect("a gradient has a vector").value;
                self.staged.insert((id(member), LeaseId(lease)), vector);
                self.after(self.shape.latency, Happening::ToWorker(member, Hear::Pushed { lease }));
            }
            Happening::Link(way, token) => {
                if self.link_tokens[way as usize] != token {
                    return;
                }
                match way {
                    Way::Down => {
                        for member in self.down.done(self.now) {
                            let parameters = self.members[member].pulling.expect("it asked for them");
                            let arrived = Hear::ParametersArrived { parameters };
                            self.after(self.shape.latency, Happening::ToWorker(member, arrived));
                        }
                    }
                    Way::Up => {
                        for member in self.up.done(self.now) {
                            let lease = self.members[member].pushing.pop_front().expect("it sends one");
                            self.after(self.shape.latency, Happening::Staged(member, lease));
                            self.push_next(member);
                        }
                    }
                }
                self.expect_link(way);
            }
            Happening::Computed(member, lease) => {
                if self.members[member].computing == Some(lease) {
                    self.members[member].computing = None;
                    let held = &self.members[member].leases[&lease];
                    self.under_way.compute_secs += held.takes.as_secs_f64();
                    self.feed(member, Hear::Computed { lease });
                }
            }
            Happening::WorkerTick(member) => {
                self.members[member].tick_at = None;
                match self.members[member].session.next_deadline() <= self.now {
                    true => self.feed(member, Hear::Tick),
                    false => self.expect_tick(member),
                }
            }
            Happening::EngineTick => {
                self.engine_tick = None;
                match self.engine.next_deadline().is_some_and(|deadline| deadline.0 <= self.now) {
                    true => self.decide(Event::Tick),
                    false => self.expect_engine_tick(),
                }
            }
        }
    }

    /// Lets the engine decide, and carries out what it says.
    fn decide(&mut self, event: Event) {
        if let Event::StepApplied { step, .. } = event {
            self.end_step(step);
        }
        let began = Instant::now();
        let commands = self.engine.handle(event, Time(self.now));
        let deadline = self.engine.next_deadline();
        self.under_way.engine_secs += began.elapsed().as_secs_f64();
        self.under_way.engine_events += 1;
        for command in commands {
            self.carry_out(command);
        }
        if deadline.is_some() {
            self.expect_engine_tick();
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Lease { worker, lease: Granted { id, step, version, block, .. } } => {
                let parameters = Parameters { version, digest: Some(digest(self.params)) };
                let (seed, task) = (self.shape.seed, lease::Task::Gradient);
                let lease = Lease { id: id.0, step, parameters, block, seed, task };
                self.after(self.shape.latency, Happening::ToWorker(number(worker), Hear::Leased(lease)));
            }
            Command::Accept { worker, lease, block, .. } => {
                let vector = self.staged.remove(&(worker, lease)).expect("it is here before it counts");
                let added = self.sum.insert(block, vector, |left, right, _| left + right);
                added.expect("a slot counts once");
                self.under_way.blocks += 1;
                // All but the first are added to another.
                if self.under_way.blocks > 1 {
                    let bytes = self.shape.parameters * 4.0;
                    self.under_way.added_bytes += bytes;
                    let takes = Duration::from_secs_f64(bytes / self.shape.added_bytes_per_sec);
                    self.adding_until = self.adding_until.max(self.now) + takes;
                }
            }
            Command::Discard { worker, lease, reason } => {
                self.staged.remove(&(worker, lease));
                if reason == DiscardReason::Overtaken {
                    let revoked = Hear::Revoked { lease: lease.0 };
                    self.after(self.shape.latency, Happening::ToWorker(number(worker), revoked));
                }
            }
            Command::ApplyStep { step, sums } => {
                let slots = self.numbers.slots;
                let sum = std::mem::replace(&mut self.sum, TreeSum::new(slots));
                let gradient = sum.into_root().expect("every slot counts");
                self.params = self.numbers.apply(self.params, step, gradient, sums).0;
                let wait = self.adding_until.saturating_sub(self.now);
                let wait = wait + Duration::from_secs_f64(self.shape.apply_secs);
                self.after(wait, Happening::ToEngine(Event::StepApplied { step, skipped: false }));
            }
            Command::Checkpoint { step } => {
                self.after(Duration::ZERO, Happening::ToEngine(Event::CheckpointWritten { step }));
            }
            Command::Finish { .. } => self.over = true,
            Command::Admit { .. } | Command::Release { .. } | Command::Sample { .. } | Command::Report(_) => {}
            command => panic!("nothing fails here: {command}"),
        }
    }

    /// Takes stock of a step that is applied.
    fn end_step(&mut self, step: u64) {
        let mut taken = std::mem::take(&mut self.under_way);
        let earlier = |of: fn(&Step) -> f64| self.steps.iter().map(of).sum::<f64>();
        taken.secs = (self.now - self.step_began).as_secs_f64();
        taken.down_bytes = self.down.carried() - earlier(|step| step.down_bytes);
        taken.up_bytes = self.up.carried() - earlier(|step| step.up_bytes);
        let most = self.shape.bits_per_sec / 8.0 * taken.secs;
        (taken.down_use, taken.up_use) = (taken.down_bytes / most, taken.up_bytes / most);
        self.steps.push(taken);
        self.step_began = self.now;
        assert_eq!(self.steps.len() as u64, step);
    }

    /// Lets a session decide, and does what it says.
    fn feed(&mut self, member: usize, event: Hear) {
        if let Hear::Leased(lease) = event {
            let slots = lease.block.slots(self.numbers.slots).len();
            let takes = Duration::from_secs_f64(self.members[member].secs_per_slot * slots as f64);
            self.members[member].leases.insert(lease.id, Held { lease, takes });
        }
        let commands = self.members[member].session.handle(event, self.now);
        for command in commands {
            self.act(member, command);
        }
        self.expect_tick(member);
    }

    fn act(&mut self, number: usize, command: Act) {
        let (worker, latency) = (id(number), self.shape.latency);
        let member = &mut self.members[number];
        match command {
            Act::Pull { parameters, .. } => {
                member.pulling = Some(parameters);
                self.after(latency, Happening::Pull(number));
            }
            Act::Compute { lease } => {
                member.computing = Some(lease);
                let takes = member.leases[&lease].takes;
                self.after(takes, Happening::Computed(number, lease));
            }
            Act::Push { lease } => {
                member.pushing.push_back(lease);
                let begun = Event::PushBegun { worker, lease: LeaseId(lease) };
                self.after(latency, Happening::ToEngine(begun));
                if self.members[number].pushing.len() == 1 {
                    self.push_next(number);
                }
            }
            Act::Abandon { lease } => {
                member.computing.take_if(|computing| *computing == lease);
                let first = member.pushing.front() == Some(&lease);
                member.pushing.retain(|pushing| *pushing != lease);
                if first {
                    self.up.cancel(number, self.now);
                    self.expect_link(Way::Up);
                    self.push_next(number);
                }
            }
            Act::SendResult { lease } => {
                let Held { lease, takes, .. } = member.leases.remove(&lease).expect("it was computed");
                let params = member.params.expect("with parameters");
                let outcome = self.numbers.compute(params, lease.step, Task::Gradient, lease.block);
                let value = outcome.vector.expect("a gradient has a vector").value;
                let done = BlockDone {
                    worker,
                    lease: LeaseId(lease.id),
                    step: lease.step,
                    version: lease.parameters.version,
                    task: Task::Gradient,
                    block: lease.block,
                    digest: Some(digest(value.to_bits())),
                    norm: Some(value.abs()),
                    sums: outcome.sums,
                    slot_sums: Vec::new(),
                    compute: takes,
                };
                self.after(latency, Happening::ToEngine(Event::BlockDone(done)));
            }
            Act::Discard { lease } => drop(member.leases.remove(&lease)),
            Act::SendHeartbeat => {
                self.after(latency, Happening::ToEngine(Event::Heartbeat { worker }));
                self.after(latency * 2, Happening::ToWorker(number, Hear::HeartbeatAcked));
            }
            Act::Forget => {}
            Act::SendKept(_) | Act::Recall { .. } | Act::SendDeclined { .. } | Act::Leave(_) => {
                panic!("nothing fails here: {command:?}")
            }
        }
    }

    /// Sends the first of the gradients that wait, if there is any.
    fn push_next(&mut self, number: usize) {
        if !self.members[number].pushing.is_empty() {
            self.up.begin(number, self.shape.parameters * self.shape.up_bytes, self.now);
            self.expect_link(Way::Up);
        }
    }

    fn after(&mut self, wait: Duration, happening: Happening) {
        self.happenings += 1;
        self.queue.insert((self.now + wait, self.happenings), happening);
    }

    fn expect_link(&mut self, way: Way) {
        self.link_tokens[way as usize] += 1;
        let token = self.link_tokens[way as usize];
        let next = if way == Way::Down { self.down.next_done() } else { self.up.next_done() };
        if let Some(at) = next {
            self.after(at - self.now, Happening::Link(way, token));
        }
    }

    fn expect_tick(&mut self, member: usize) {
        let due = self.members[member].session.next_deadline().max(self.now);
        if self.members[member].tick_at.is_none_or(|at| due < at) {
            self.members[member].tick_at = Some(due);
            self.after(due - self.now, Happening::WorkerTick(member));
        }
    }

    fn expect_engine_tick(&mut self) {
        let Some(deadline) = self.engine.next_deadline() else { return };
        let due = deadline.0.max(self.now);
        if self.engine_tick.is_none_or(|at| due < at) {
            self.engine_tick = Some(due);
            self.after(due - self.now, Happening::EngineTick);
        }
    }
}

fn id(member: usize) -> WorkerId {
    WorkerId(member as u64 + 1)
}

fn number(WorkerId(worker): WorkerId) -> usize {
    worker as usize - 1
}
