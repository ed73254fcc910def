//! Any course of events: every slot counts once, nobody who left is leased work, and the run ends once faults do.

use std::ops::Add;

use lockstep_model::tree::TreeSum;
use proptest::prelude::*;

use super::*;
use crate::engine::command::Outcome;

/// What the outside does next. A number picks among the candidates there are; with none, nothing happens.
#[derive(Clone, Debug)]
enum Act {
    Join,
    Open(usize),
    Leave(usize),
    Heartbeat(usize),
    Push(usize),
    Finish(usize),
    Decline(usize),
    /// Sends one of all results so far again.
    Repeat(usize),
    Optimise,
    Write,
    Stop,
    Wait(u64),
}

fn act() -> impl Strategy<Value = Act> {
    let which = || 0..100usize;
    prop_oneof![
        3 => Just(Act::Join),
        4 => which().prop_map(Act::Open),
        1 => which().prop_map(Act::Leave),
        2 => which().prop_map(Act::Heartbeat),
        4 => which().prop_map(Act::Push),
        12 => which().prop_map(Act::Finish),
        1 => which().prop_map(Act::Decline),
        2 => which().prop_map(Act::Repeat),
        4 => Just(Act::Optimise),
        2 => Just(Act::Write),
        2 => (1..5u64).prop_map(Act::Wait),
    ]
}

prop_compose! {
    fn any_config()(
        total_steps in 0..5u64,
        slots in 1..12u32,
        eval_slots in 0..4u32,
        reference_slots in 0..4u32,
        every in prop::array::uniform3(0..3u64),
        min_workers in 1..4u32,
        limit in 0..4u32,
    ) -> EngineConfig {
        EngineConfig {
            total_steps,
            slots,
            eval_slots,
            reference_slots,
            evaluate_every_steps: every[0],
            sample_every_steps: every[1],
            checkpoint_every_steps: every[2],
            min_workers,
            max_slots_per_lease: 1 << limit,
            ..config()
        }
    }
}

/// The world around an engine, and what must hold in it.
struct World {
    config: EngineConfig,
    engine: Engine,
    now: Time,
    /// All events so far with their times, and all commands they led to.
    past: Vec<(Event, Time)>,
    commands: Vec<Command>,
    members: BTreeSet<WorkerId>,
    connected: BTreeSet<WorkerId>,
    leases: BTreeMap<(WorkerId, LeaseId), Lease>,
    /// Leases whose gradients are on their way.
    travelling: BTreeSet<LeaseId>,
    results: Vec<BlockDone>,
    /// Blocks accepted for the work under way.
    accepted: Vec<Block>,
    applied: u64,
    applying: Option<u64>,
    writing: Option<u64>,
    outcome: Option<Outcome>,
}

/// Irregular, so that the order of additions shows.
fn slot_sums(step: u64, slot: u32) -> Sums {
    let loss = 1.0 / (step as f64 + f64::from(slot) * 0.7 + 0.3);
    Sums { loss, weight: 1.0, ..Sums::default() }
}

/// The sum of a block, by recursion over the tree's definition.
fn block_sums(step: u64, block: Block, slots: u32) -> Sums {
    match block.children() {
        None => slot_sums(step, block.index),
        Some([left, right]) if right.exists(slots) => block_sums(step, left, slots) + block_sums(step, right, slots),
        Some([left, _]) => block_sums(step, left, slots),
    }
}

impl World {
    fn new(config: EngineConfig) -> Self {
        Self {
            engine: Engine::new(config.clone(), Time::default()),
            config,
            now: Time::default(),
            past: Vec::new(),
            commands: Vec::new(),
            members: BTreeSet::new(),
            connected: BTreeSet::new(),
            leases: BTreeMap::new(),
            travelling: BTreeSet::new(),
            results: Vec::new(),
            accepted: Vec::new(),
            applied: 0,
            applying: None,
            writing: None,
            outcome: None,
        }
    }

    fn send(&mut self, event: Event) {
        self.past.push((event.clone(), self.now));
        let commands = self.engine.handle(event, self.now);
        commands.iter().for_each(|command| self.check(command));
        self.commands.extend(commands);
    }

    fn check(&mut self, command: &Command) {
        match command {
            Command::Admit { worker, .. } => assert!(self.members.insert(*worker)),
            Command::Refuse { .. } => assert!(self.outcome.is_some() || self.engine.ending().is_some()),
            Command::Lease { worker, lease } => {
                assert!(self.connected.contains(worker), "leased to one who is not there");
                assert_eq!(self.applying, None, "leased while the optimizer works");
                assert!(lease.block.exists(self.slots(lease.task)));
                assert!(lease.block.slots(self.slots(lease.task)).len() <= self.config.max_slots_per_lease as usize);
                let others = || self.leases.iter().filter(|((holder, _), _)| holder == worker).map(|(_, other)| other);
                assert!(others().count() <= 1, "a third lease");
                assert!(others().all(|other| self.travelling.contains(&other.id)), "a second lease to compute");
                assert!(others().all(|other| other.block != lease.block), "a twin of its own");
                assert!(self.leases.insert((*worker, lease.id), *lease).is_none());
            }
            Command::Accept { worker, lease, block, .. } => {
                let lease = self.leases.remove(&(*worker, *lease)).expect("only what is leased is accepted");
                assert_eq!(lease.block, *block);
                self.accepted.push(*block);
            }
            Command::Discard { worker, lease, .. } => drop(self.leases.remove(&(*worker, *lease))),
            Command::ApplyStep { step, sums } => {
                assert_eq!(*step, self.applied + 1);
                assert_eq!(*sums, block_sums(*step, Block::root(self.config.slots), self.config.slots));
                self.check_coverage(self.config.slots);
                self.applying = Some(*step);
            }
            Command::RecordValidation { step, sums } => {
                assert_eq!(*step, self.applied);
                let in_order = (0..self.config.eval_slots).map(|slot| slot_sums(*step, slot)).reduce(Add::add);
                assert_eq!(Some(*sums), in_order);
                self.check_coverage(self.config.eval_slots);
            }
            Command::RecordReferences => {
                assert_eq!(self.applied, 0);
                self.check_coverage(self.config.reference_slots);
            }
            Command::Quarantine { .. } | Command::RestartStep { .. } | Command::RollBack { .. } => {
                panic!("nobody lies here")
            }
            Command::Report(_) => {}
            Command::GiveBack { .. } => panic!("this is no relay"),
            Command::Sample { step } => assert_eq!(*step, self.applied),
            Command::Checkpoint { step } => {
                assert_eq!(*step, self.applied);
                assert_eq!(self.writing.replace(*step), None, "two checkpoints at a time");
            }
            Command::Release { worker, .. } | Command::Disconnect { worker, .. } => self.gone(*worker),
            Command::Finish { step, outcome } => {
                assert_eq!(*step, self.applied);
                assert!(self.members.is_empty() && self.leases.is_empty() && self.writing.is_none());
                assert!(self.outcome.replace(outcome.clone()).is_none(), "finished twice");
            }
        }
    }

    /// The blocks accepted are a partition of the tree: each slot is in one of them.
    fn check_coverage(&mut self, slots: u32) {
        let mut tree = TreeSum::new(slots);
        for block in self.accepted.drain(..) {
            tree.insert(block, (), |(), (), _| ()).expect("a slot counts once");
        }
        assert!(tree.is_complete(), "every slot counts");
        assert!(self.leases.is_empty());
    }

    fn slots(&self, task: Task) -> u32 {
        match task {
            Task::Gradient => self.config.slots,
            Task::Evaluate => self.config.eval_slots,
            Task::Reference => self.config.reference_slots,
        }
    }

    fn gone(&mut self, worker: WorkerId) {
        self.members.remove(&worker);
        self.connected.remove(&worker);
        assert!(!self.leases.keys().any(|(holder, _)| *holder == worker), "a lease outlives its holder");
    }

    fn act(&mut self, act: &Act) {
        fn pick<T: Copy>(items: impl Iterator<Item = T>, which: usize) -> Option<T> {
            let items: Vec<T> = items.collect();
            (!items.is_empty()).then(|| items[which % items.len()])
        }
        match act {
            Act::Join => {
                let ticket = Ticket(self.past.len() as u64);
                let class = DeviceClass([1; 32]);
                self.send(Event::JoinRequested {
                    ticket,
                    name: "host".into(),
                    device: "cpu".into(),
                    class,
                    workers: 1,
                });
            }
            Act::Open(which) => {
                let closed = self.members.difference(&self.connected).copied();
                let Some(worker) = pick(closed, *which) else { return };
                self.connected.insert(worker);
                self.send(Event::ControlOpened { worker });
            }
            Act::Leave(which) => {
                let Some(worker) = pick(self.connected.iter().copied(), *which) else { return };
                self.members.remove(&worker);
                self.connected.remove(&worker);
                self.send(Event::ControlClosed { worker });
                self.gone(worker);
            }
            Act::Heartbeat(which) => {
                let Some(worker) = pick(self.connected.iter().copied(), *which) else { return };
                self.send(Event::Heartbeat { worker });
            }
            Act::Push(which) => {
                let gradients = self.leases.iter().filter(|(_, lease)| lease.task == Task::Gradient);
                let Some((worker, lease)) = pick(gradients.map(|(holder, _)| *holder), *which) else { return };
                self.travelling.insert(lease);
                self.send(Event::PushBegun { worker, lease });
            }
            Act::Finish(which) => {
                let Some((worker, lease)) = pick(self.leases.iter().map(|((w, _), l)| (*w, *l)), *which) else {
                    return;
                };
                let slots = lease.block.slots(self.slots(lease.task));
                let mut done = answer(&self.config, worker, &lease);
                match lease.task {
                    Task::Gradient => done.sums = block_sums(lease.step, lease.block, self.config.slots),
                    Task::Evaluate | Task::Reference => {
                        done.slot_sums = slots.map(|slot| slot_sums(lease.step, slot)).collect();
                    }
                }
                done.compute = Duration::from_millis(50 * (*which as u64 + 1));
                self.results.push(done.clone());
                self.send(Event::BlockDone(done));
            }
            Act::Decline(which) => {
                let Some((worker, lease)) = pick(self.leases.keys().copied(), *which) else { return };
                self.send(Event::Declined { worker, lease, reason: "out of memory".into() });
            }
            Act::Repeat(which) => {
                let Some(index) = pick(0..self.results.len(), *which) else { return };
                let done = self.results[index].clone();
                let before = self.accepted.len();
                self.send(Event::BlockDone(done));
                assert_eq!(self.accepted.len(), before, "a repeated result counts");
            }
            Act::Optimise => {
                let Some(step) = self.applying.take() else { return };
                self.applied = step;
                self.send(Event::StepApplied { step, skipped: false });
            }
            Act::Write => {
                let Some(step) = self.writing.take() else { return };
                self.send(Event::CheckpointWritten { step });
            }
            Act::Stop => self.send(Event::StopRequested { reason: "interrupted".into() }),
            Act::Wait(secs) => {
                self.now = self.now + Duration::from_secs(*secs);
                self.send(Event::Tick);
            }
        }
    }

    /// Enough workers join, and everybody does what is asked.
    fn end_faults(&mut self) {
        for _ in 0..self.config.min_workers {
            self.act(&Act::Join);
        }
        let work = u64::from(self.config.slots + self.config.eval_slots) + 3;
        for round in 0..(self.config.total_steps + 1) * work {
            if self.outcome.is_some() {
                return;
            }
            for which in 0..self.members.len().max(1) {
                self.act(&Act::Open(0));
                self.act(&Act::Finish(which + round as usize));
            }
            self.act(&Act::Optimise);
            self.act(&Act::Write);
        }
    }
}

proptest! {
    #[test]
    fn every_slot_counts_once_and_the_run_ends(
        config in any_config(),
        acts in prop::collection::vec(act(), 0..200),
        stop_at in prop::option::weighted(0.2, 0..200usize),
    ) {
        let mut world = World::new(config.clone());
        for (number, act) in acts.iter().enumerate() {
            if stop_at == Some(number) {
                world.act(&Act::Stop);
            }
            world.act(act);
        }
        world.end_faults();

        match world.outcome.as_ref().expect("the run ends within a bound") {
            Outcome::Completed => prop_assert_eq!(world.applied, config.total_steps),
            Outcome::Stopped { .. } => prop_assert!(stop_at.is_some()),
            Outcome::Failed { .. } => prop_assert!(acts.iter().any(|act| matches!(act, Act::Decline(_)))),
        }

        let mut again = Engine::new(config, Time::default());
        let replayed = world.past.into_iter().flat_map(|(event, now)| again.handle(event, now));
        prop_assert_eq!(replayed.collect::<Vec<_>>(), world.commands);
    }
}
