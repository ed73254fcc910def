//! Leases under way: who computes what, who has nothing to do, which blocks will be ready last, and which leases are late.
//!
//! All of it is kept in order as leases come and go, so that a decision takes no longer where there are many of them. How
//! long a worker should take for a lease does not change while it holds it, if anything is known of the worker. Of all
//! others the same is expected, what the known ones take on average, and that changes with each result: among *strangers*
//! with as much to do, the order is that in which they got their leases, whatever the average.
//!
//! A relay has several workers. Slots take it as long as the busiest of them, which has its part of them, rounded up
//! ([`Pace::rounds`]); and it has nothing to do as long as it was lent fewer slots than it has workers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_model::tree::Block;

use super::id::{LeaseId, WorkerId};
use super::idle::Idle;
use super::time::Time;

/// A lease is late after so many times what it should take, and a grace beyond.
const LATE_FACTOR: u32 = 3;
const LATE_GRACE: Duration = Duration::from_secs(1);
/// No lease takes longer without being late; so long it may take while nobody has finished one, as kernels may have to be
/// compiled.
const LONGEST: Duration = Duration::from_secs(300);

/// How fast a member answers a lease.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pace {
    /// How many workers it stands for.
    pub(super) workers: u32,
    /// Seconds from a lease to its result, for each slot that one of them has; `None` if it is not known.
    pub(super) secs_per_slot: Option<f64>,
}

impl Pace {
    /// How many of so many slots the busiest of its workers has.
    pub(super) fn rounds(self, slots: usize) -> usize {
        slots.div_ceil(self.workers as usize)
    }

    /// What so many slots take, if it is known.
    pub(super) fn takes(self, slots: usize) -> Option<Duration> {
        self.secs_per_slot.map(|secs| duration(secs, self.rounds(slots)))
    }

    /// Seconds for each slot, where all its workers have something to do.
    pub(super) fn least_secs_per_slot(self) -> Option<f64> {
        self.secs_per_slot.map(|secs| secs / f64::from(self.workers))
    }
}

/// A lease under way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Holding {
    /// What is computed.
    pub(super) block: Block,
    /// How many slots that is.
    pub(super) slots: usize,
    /// How many of them the busiest of its workers has.
    rounds: usize,
    /// Since when.
    pub(super) since: Time,
    /// By what its worker took before; `None` of a stranger.
    known: Option<Expected>,
}

/// What is expected of a lease.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Expected {
    /// When it should be done.
    ready: Time,
    /// When it is late.
    due: Time,
}

impl Holding {
    /// A lease of a block of so many slots, to a worker of this pace.
    pub(super) fn new(block: Block, slots: usize, since: Time, pace: Pace) -> Self {
        let rounds = pace.rounds(slots);
        let known = pace.secs_per_slot.map(|secs| Expected::of(rounds, since, Some(secs)));
        Self { block, slots, rounds, since, known }
    }

    /// What is expected, where strangers are as slow as the others on average.
    fn expected(&self, mean_secs_per_slot: Option<f64>) -> Expected {
        self.known.unwrap_or_else(|| Expected::of(self.rounds, self.since, mean_secs_per_slot))
    }
}

impl Expected {
    fn of(rounds: usize, since: Time, secs_per_slot: Option<f64>) -> Self {
        let Some(takes) = secs_per_slot.map(|secs| duration(secs, rounds)) else {
            return Self { ready: since + LONGEST, due: since + LONGEST };
        };
        Self { ready: since + takes, due: since + (takes * LATE_FACTOR + LATE_GRACE).min(LONGEST) }
    }
}

/// What so many slots take, one after the other.
pub(super) fn duration(secs_per_slot: f64, slots: usize) -> Duration {
    Duration::from_secs_f64(secs_per_slot * slots as f64)
}

/// A block that somebody computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    /// The block.
    pub(super) block: Block,
    /// How many slots it has.
    pub(super) slots: usize,
    /// When the first of its results should be there.
    pub(super) ready: Time,
    /// Whether all its leases are late.
    pub(super) late: bool,
}

/// Blocks by when the first of their results should be there, the last one first.
type ByReady = BTreeSet<(Reverse<Time>, Block)>;

/// All leases under way.
#[derive(Clone, Debug)]
pub(super) struct Leases {
    /// The newest time seen.
    now: Time,
    by_worker: BTreeMap<(WorkerId, LeaseId), Block>,
    /// By node of the tree, the oldest lease first.
    by_block: Vec<Vec<Held>>,
    /// The level of the tree's root.
    height: u32,
    /// Who can be leased work.
    here: BTreeMap<WorkerId, Room>,
    idle: Idle,
    /// Workers who compute less than they could, and send.
    sending: BTreeSet<WorkerId>,
    /// When leases of workers that are known are late, as far as they are not.
    due: BTreeSet<(Time, Block)>,
    /// Blocks whose holders are all known, not all of whose leases are late.
    timely: ByReady,
    /// Blocks whose holders are all known, and late.
    late: ByReady,
    /// Blocks with one holder, a stranger, by its rounds, and since when they are computed.
    strangers: BTreeMap<usize, ByReady>,
    /// Blocks with several holders, of whom one is a stranger at least.
    mixed: BTreeSet<Block>,
}

/// What somebody can be leased, and is.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    /// How many workers it stands for.
    workers: u32,
    slots_lent: usize,
    /// Of these, those whose gradients are on their way here.
    slots_travelling: usize,
    gradients_travelling: usize,
}

impl Room {
    fn has_nothing_to_do(self) -> bool {
        self.slots_lent < self.workers as usize
    }

    /// It computes less than it could, while it sends. What it computes next is to find the one place beside that, so that no more
    /// than two of its gradients are in memory.
    fn sends(self) -> bool {
        let computes = self.slots_lent - self.slots_travelling;
        !self.has_nothing_to_do() && computes < self.workers as usize && self.gradients_travelling == 1
    }
}

/// A lease, and whose it is.
#[derive(Clone, Copy, Debug)]
struct Held {
    worker: WorkerId,
    lease: LeaseId,
    holding: Holding,
    /// Whether its gradient is on its way here.
    travels: bool,
}

/// Where a block is kept in order.
enum Place {
    Known { ready: Time, late: bool },
    Stranger { rounds: usize, since: Time },
    Mixed,
}

/// Before all other blocks.
const FIRST: Block = Block { level: 0, index: 0 };

impl Leases {
    /// No leases, of a tree of so many slots, and nobody who could have one.
    pub(super) fn new(slots: u32) -> Self {
        let height = Block::root(slots).level;
        Self {
            now: Time::default(),
            by_worker: BTreeMap::new(),
            by_block: vec![Vec::new(); 2 << height],
            height,
            here: BTreeMap::new(),
            idle: Idle::default(),
            sending: BTreeSet::new(),
            due: BTreeSet::new(),
            timely: BTreeSet::new(),
            late: BTreeSet::new(),
            strangers: BTreeMap::new(),
            mixed: BTreeSet::new(),
        }
    }

    /// Time passes: leases become late.
    pub(super) fn advance(&mut self, now: Time) {
        self.now = now;
        while let Some((_, block)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.due.pop_first();
            if let Some(Place::Known { ready, late: true }) = self.place(block)
                && self.timely.remove(&(Reverse(ready), block))
            {
                self.late.insert((Reverse(ready), block));
            }
        }
    }

    /// Lends a block.
    pub(super) fn add(&mut self, worker: WorkerId, lease: LeaseId, holding: Holding) {
        let block = holding.block;
        self.take_out(block);
        self.by_worker.insert((worker, lease), block);
        let node = self.node(block);
        self.by_block[node].push(Held { worker, lease, holding, travels: false });
        self.put_in(block);
        self.change_room(worker, |room| room.slots_lent += holding.slots);
    }

    /// Ends a lease.
    pub(super) fn end(&mut self, worker: WorkerId, lease: LeaseId) -> Option<Holding> {
        let block = self.by_worker.remove(&(worker, lease))?;
        self.take_out(block);
        let node = self.node(block);
        let leases = &mut self.by_block[node];
        let place = leases.iter().position(|held| held.lease == lease)?;
        let Held { holding, travels, .. } = leases.remove(place);
        self.put_in(block);
        self.change_room(worker, |room| {
            room.slots_lent -= holding.slots;
            if travels {
                room.slots_travelling -= holding.slots;
                room.gradients_travelling -= 1;
            }
        });
        Some(holding)
    }

    /// The gradient of a lease sets out, if the worker holds that.
    pub(super) fn travels(&mut self, worker: WorkerId, lease: LeaseId) {
        let Some(block) = self.by_worker.get(&(worker, lease)) else { return };
        let node = self.node(*block);
        let Some(held) = self.by_block[node].iter_mut().find(|held| held.lease == lease) else { return };
        let slots = held.holding.slots;
        if !std::mem::replace(&mut held.travels, true) {
            self.change_room(worker, |room| {
                room.slots_travelling += slots;
                room.gradients_travelling += 1;
            });
        }
    }

    /// A worker can be leased work, or stands for another number of workers.
    pub(super) fn arrive(&mut self, worker: WorkerId, workers: u32) {
        self.here.entry(worker).or_insert(Room { workers, ..Room::default() });
        self.change_room(worker, |room| room.workers = workers);
    }

    /// A worker is gone.
    pub(super) fn depart(&mut self, worker: WorkerId) {
        self.here.remove(&worker);
        self.idle.remove(worker);
        self.sending.remove(&worker);
    }

    /// What somebody has changes: so may whether it has nothing to do, or does no more than send.
    fn change_room(&mut self, worker: WorkerId, change: impl FnOnce(&mut Room)) {
        let Some(room) = self.here.get_mut(&worker) else { return };
        change(room);
        let room = *room;
        self.idle.remove(worker);
        self.sending.remove(&worker);
        if room.has_nothing_to_do() {
            self.idle.insert(worker);
        } else if room.sends() {
            self.sending.insert(worker);
        }
    }

    /// Workers who have nothing to do, or not enough for all that they stand for.
    pub(super) fn idle(&self) -> &Idle {
        &self.idle
    }

    /// The same, to say how fast they are.
    pub(super) fn idle_mut(&mut self) -> &mut Idle {
        &mut self.idle
    }

    /// The first worker after `last` that could have a lease beside the one whose gradient it sends.
    pub(super) fn next_sending(&self, WorkerId(last): WorkerId) -> Option<WorkerId> {
        self.sending.range(WorkerId(last + 1)..).next().copied()
    }

    /// A lease, if this worker holds it.
    pub(super) fn get(&self, worker: WorkerId, lease: LeaseId) -> Option<Holding> {
        let block = self.by_worker.get(&(worker, lease))?;
        self.on(*block).iter().find(|held| held.lease == lease).map(|held| held.holding)
    }

    /// The leases that a worker holds.
    pub(super) fn of(&self, worker: WorkerId) -> impl Iterator<Item = LeaseId> {
        let all = (worker, LeaseId(0))..=(worker, LeaseId(u64::MAX));
        self.by_worker.range(all).map(|((_, lease), _)| *lease)
    }

    /// All leases, by worker.
    pub(super) fn iter(&self) -> impl Iterator<Item = (WorkerId, LeaseId, Block)> {
        self.by_worker.iter().map(|((worker, lease), block)| (*worker, *lease, *block))
    }

    /// Those under which a block is computed, the oldest first.
    pub(super) fn holders(&self, block: Block) -> impl Iterator<Item = (WorkerId, LeaseId)> {
        self.on(block).iter().map(|held| (held.worker, held.lease))
    }

    /// Whether a worker computes a block.
    pub(super) fn holds(&self, worker: WorkerId, block: Block) -> bool {
        self.on(block).iter().any(|held| held.worker == worker)
    }

    /// The blocks that will be ready last, at most `most` of them, those that are late before all others. `mean` is what a
    /// slot takes those workers of whom it is known, on average.
    pub(super) fn last_ready(&self, most: usize, mean: impl FnOnce() -> Option<f64>) -> Vec<Candidate> {
        let known = self.late.iter().take(most).chain(self.timely.iter().take(most));
        let mut blocks: Vec<Block> = known.map(|(_, block)| *block).collect();
        let mean = if self.strangers.is_empty() && self.mixed.is_empty() { None } else { mean() };
        for (rounds, leases) in &self.strangers {
            let since_late = self.since_late(*rounds, mean);
            let late = since_late.into_iter().flat_map(|since| leases.range((Reverse(since), FIRST)..).take(most));
            blocks.extend(late.chain(leases.iter().take(most)).map(|(_, block)| *block));
        }
        blocks.extend(&self.mixed);
        let candidate = |block| {
            let slots = self.on(block).first()?.holding.slots;
            let (ready, late) = self.first_ready(block, mean);
            Some(Candidate { block, slots, ready, late })
        };
        let mut candidates: Vec<Candidate> = blocks.into_iter().filter_map(candidate).collect();
        candidates.sort_by_key(|candidate| (Reverse((candidate.late, candidate.ready)), candidate.block));
        candidates.dedup();
        candidates.truncate(most);
        candidates
    }

    /// When the next lease is late.
    pub(super) fn next_late(&self, mean: impl FnOnce() -> Option<f64>) -> Option<Time> {
        let known = self.due.first().map(|(due, _)| *due);
        if self.strangers.is_empty() && self.mixed.is_empty() {
            return known;
        }
        let mean = mean();
        let due = |held: &Held| held.holding.expected(mean).due;
        let strangers = self.strangers.iter().filter_map(|(rounds, leases)| {
            let first = match self.since_late(*rounds, mean) {
                Some(since) => leases.range(..(Reverse(since), FIRST)).next_back(),
                None => leases.last(),
            };
            self.on(first?.1).first().map(due)
        });
        let mixed = self.mixed.iter().flat_map(|block| self.on(*block)).map(due).filter(|due| *due > self.now);
        known.into_iter().chain(strangers).chain(mixed).min()
    }

    /// The latest moment since which a stranger's lease of so many rounds is late, if there can be any.
    fn since_late(&self, rounds: usize, mean: Option<f64>) -> Option<Time> {
        let wait = Expected::of(rounds, Time::default(), mean).due;
        self.now.0.checked_sub(wait.0).map(Time)
    }

    /// The leases of a block, the oldest first.
    fn on(&self, block: Block) -> &[Held] {
        &self.by_block[self.node(block)]
    }

    /// Nodes are numbered from the root, 1, level by level.
    fn node(&self, block: Block) -> usize {
        (1 << (self.height - block.level)) + block.index as usize
    }

    /// When the first result of a block should be there, and whether all its leases are late.
    fn first_ready(&self, block: Block, mean: Option<f64>) -> (Time, bool) {
        let expected = self.on(block).iter().map(|held| held.holding.expected(mean));
        expected.fold((Time(Duration::MAX), true), |(ready, late), expected| {
            (ready.min(expected.ready), late && expected.due <= self.now)
        })
    }

    /// Where a block belongs by its leases, if it has any.
    fn place(&self, block: Block) -> Option<Place> {
        match self.on(block) {
            [] => None,
            held if held.iter().all(|held| held.holding.known.is_some()) => {
                let (ready, late) = self.first_ready(block, None);
                Some(Place::Known { ready, late })
            }
            [Held { holding: Holding { rounds, since, .. }, .. }] => {
                Some(Place::Stranger { rounds: *rounds, since: *since })
            }
            _ => Some(Place::Mixed),
        }
    }

    fn put_in(&mut self, block: Block) {
        match self.place(block) {
            Some(Place::Known { ready, late }) => {
                let ranked = if late { &mut self.late } else { &mut self.timely };
                ranked.insert((Reverse(ready), block));
                let node = self.node(block);
                let dues = self.by_block[node].iter().filter_map(|held| Some(held.holding.known?.due));
                self.due.extend(dues.filter(|due| *due > self.now).map(|due| (due, block)));
            }
            Some(Place::Stranger { rounds, since }) => {
                self.strangers.entry(rounds).or_default().insert((Reverse(since), block));
            }
            Some(Place::Mixed) => drop(self.mixed.insert(block)),
            None => {}
        }
    }

    /// Takes a block out of the place where [`Self::put_in`] put it.
    fn take_out(&mut self, block: Block) {
        match self.place(block) {
            Some(Place::Known { ready, late }) => {
                let ranked = if late { &mut self.late } else { &mut self.timely };
                ranked.remove(&(Reverse(ready), block));
                let node = self.node(block);
                for due in self.by_block[node].iter().filter_map(|held| Some(held.holding.known?.due)) {
                    self.due.remove(&(due, block));
                }
            }
            Some(Place::Stranger { rounds, since }) => {
                let Some(leases) = self.strangers.get_mut(&rounds) else { return };
                leases.remove(&(Reverse(since), block));
                if leases.is_empty() {
                    self.strangers.remove(&rounds);
                }
            }
            Some(Place::Mixed) => drop(self.mixed.remove(&block)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SLOTS: u32 = 40;
    const MEAN: Option<f64> = Some(0.7);

    /// The same by looking at every lease.
    fn plain(leases: &[Held], now: Time, most: usize, mean: Option<f64>) -> (Vec<Candidate>, Option<Time>) {
        let mut blocks: BTreeMap<Block, Candidate> = BTreeMap::new();
        for Held { holding: Holding { block, slots, .. }, .. } in leases {
            let fresh = Candidate { block: *block, slots: *slots, ready: Time(Duration::MAX), late: true };
            blocks.insert(*block, fresh);
        }
        for held in leases {
            let expected = held.holding.expected(mean);
            let candidate = blocks.get_mut(&held.holding.block).unwrap();
            candidate.ready = candidate.ready.min(expected.ready);
            candidate.late &= expected.due <= now;
        }
        let mut candidates: Vec<Candidate> = blocks.into_values().collect();
        candidates.sort_by_key(|candidate| (Reverse((candidate.late, candidate.ready)), candidate.block));
        candidates.truncate(most);
        let due = leases.iter().map(|held| held.holding.expected(mean).due);
        (candidates, due.filter(|due| *due > now).min())
    }

    proptest! {
        #[test]
        fn leases_are_found_in_the_order_of_what_is_expected(
            acts in prop::collection::vec((any::<u32>(), 0..3u32, prop::option::of(0.01..3.0f64), 0..4000u64), 1..120),
            mean in prop::option::of(0.01..2.0f64),
        ) {
            let (mut leases, mut held, mut now) = (Leases::new(SLOTS), Vec::new(), Time::default());
            for (number, (which, level, secs_per_slot, millis)) in (1..).zip(acts) {
                now = now + Duration::from_millis(millis);
                leases.advance(now);
                if which % 3 == 0 && !held.is_empty() {
                    let Held { worker, lease, holding, .. } = held.remove(which as usize % held.len());
                    prop_assert_eq!(leases.end(worker, lease), Some(holding));
                } else {
                    let block = Block { level, index: which % SLOTS.div_ceil(1 << level) };
                    let pace = Pace { workers: 1 + which / 7 % 3, secs_per_slot };
                    let holding = Holding::new(block, block.slots(SLOTS).len(), now, pace);
                    let (worker, lease) = (WorkerId(number), LeaseId(number));
                    leases.add(worker, lease, holding);
                    held.push(Held { worker, lease, holding, travels: false });
                }
                for mean in [mean, MEAN] {
                    let (last_ready, next_late) = plain(&held, now, 4, mean);
                    prop_assert_eq!(leases.last_ready(4, || mean), last_ready);
                    prop_assert_eq!(leases.next_late(|| mean), next_late);
                }
                prop_assert_eq!(leases.iter().count(), held.len());
            }
        }
    }
}
