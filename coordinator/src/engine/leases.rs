//! Leases under way: who computes what, who has nothing to do, which blocks will be ready last, and which leases are late.
//!
//! All of it is kept in order as leases come and go, so that a decision takes no longer where there are many of them. How
//! long a worker should take for a lease does not change while it holds it, if anything is known of the worker. Of all
//! others the same is expected, what the known ones take on average, and that changes with each result: among *strangers*
//! with as many slots, the order is that in which they got their leases, whatever the average.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_model::tree::Block;

use super::id::{LeaseId, WorkerId};
use super::time::Time;

/// A lease is late after so many times what it should take, and a grace beyond.
const LATE_FACTOR: u32 = 3;
const LATE_GRACE: Duration = Duration::from_secs(1);
/// No lease takes longer without being late; so long it may take while nobody has finished one, as kernels may have to be
/// compiled.
const LONGEST: Duration = Duration::from_secs(300);

/// A lease under way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Holding {
    /// What is computed.
    pub(super) block: Block,
    /// How many slots that is.
    pub(super) slots: usize,
    /// Since when.
    pub(super) since: Time,
    /// How long each slot should take, in seconds, by what this worker took before; `None` of a stranger.
    pub(super) secs_per_slot: Option<f64>,
}

impl Holding {
    fn expected(&self, mean_secs_per_slot: Option<f64>) -> Option<Duration> {
        Some(duration(self.secs_per_slot.or(mean_secs_per_slot)?, self.slots))
    }

    /// When it should be done.
    fn ready(&self, mean_secs_per_slot: Option<f64>) -> Time {
        self.since + self.expected(mean_secs_per_slot).unwrap_or(LONGEST)
    }

    /// When it is late.
    fn due(&self, mean_secs_per_slot: Option<f64>) -> Time {
        let wait = self.expected(mean_secs_per_slot).map(|expected| expected * LATE_FACTOR + LATE_GRACE);
        self.since + wait.map_or(LONGEST, |wait| wait.min(LONGEST))
    }
}

/// What so many slots take.
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
#[derive(Clone, Debug, Default)]
pub(super) struct Leases {
    /// The newest time seen.
    now: Time,
    by_worker: BTreeMap<(WorkerId, LeaseId), Block>,
    by_block: ByBlock,
    /// Workers without a lease that could have one.
    idle: BTreeSet<WorkerId>,
    /// Those who have become idle since it was last asked who of them is fastest.
    newly_idle: Vec<WorkerId>,
    /// None of the others who are idle takes fewer seconds for a slot.
    fastest_idle: f64,
    /// When leases of workers that are known are late, as far as they are not.
    due: BTreeSet<(Time, Block)>,
    /// Blocks whose holders are all known, not all of whose leases are late.
    timely: ByReady,
    /// Blocks whose holders are all known, and late.
    late: ByReady,
    /// Blocks with one holder, a stranger, by the number of their slots, and since when they are computed.
    strangers: BTreeMap<usize, ByReady>,
    /// Blocks with several holders, of whom one is a stranger at least.
    mixed: BTreeSet<Block>,
}

impl Leases {
    /// Time passes: leases become late.
    pub(super) fn advance(&mut self, now: Time) {
        self.now = now;
        while let Some((_, block)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.due.pop_first();
            if self.holdings(block).all(|holding| holding.due(None) <= now) {
                let ready = self.first_ready(block, None);
                self.timely.remove(&(Reverse(ready), block));
                self.late.insert((Reverse(ready), block));
            }
        }
    }

    /// Lends a block.
    pub(super) fn add(&mut self, worker: WorkerId, lease: LeaseId, holding: Holding) {
        let block = holding.block;
        self.take_out(block);
        self.by_worker.insert((worker, lease), block);
        self.by_block.insert((block, lease), (worker, holding));
        self.put_in(block);
        self.idle.remove(&worker);
    }

    /// Ends a lease.
    pub(super) fn end(&mut self, worker: WorkerId, lease: LeaseId) -> Option<Holding> {
        let block = self.by_worker.remove(&(worker, lease))?;
        self.take_out(block);
        let (_, holding) = self.by_block.remove(&(block, lease))?;
        self.put_in(block);
        self.idle.insert(worker);
        self.newly_idle.push(worker);
        Some(holding)
    }

    /// A worker can be leased work, if it holds no lease.
    pub(super) fn arrive(&mut self, worker: WorkerId) {
        if self.of(worker).next().is_none() {
            self.idle.insert(worker);
            self.newly_idle.push(worker);
        }
    }

    /// A worker is gone.
    pub(super) fn depart(&mut self, worker: WorkerId) {
        self.idle.remove(&worker);
    }

    /// The first worker without a lease that comes after `after`, or of all.
    pub(super) fn next_idle(&self, after: Option<WorkerId>) -> Option<WorkerId> {
        match after {
            None => self.idle.first().copied(),
            Some(WorkerId(after)) => self.idle.range(WorkerId(after + 1)..).next().copied(),
        }
    }

    /// Seconds for a slot that nobody who is idle falls below; `secs_per_slot` says what each takes, if that is known.
    pub(super) fn fastest_idle(&mut self, secs_per_slot: impl Fn(WorkerId) -> Option<f64>) -> f64 {
        let newly_idle = self.newly_idle.drain(..).filter_map(secs_per_slot);
        self.fastest_idle = newly_idle.fold(self.fastest_idle, f64::min);
        self.fastest_idle
    }

    /// The same, once all who are idle were asked.
    pub(super) fn set_fastest_idle(&mut self, secs_per_slot: f64) {
        self.fastest_idle = secs_per_slot;
    }

    /// A lease, if this worker holds it.
    pub(super) fn get(&self, worker: WorkerId, lease: LeaseId) -> Option<Holding> {
        let block = self.by_worker.get(&(worker, lease))?;
        self.by_block.get(&(*block, lease)).map(|(_, holding)| *holding)
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

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.by_worker.len()
    }

    /// Those under which a block is computed, the oldest first.
    pub(super) fn holders(&self, block: Block) -> impl Iterator<Item = (WorkerId, LeaseId)> {
        on(&self.by_block, block).map(|((_, lease), (worker, _))| (*worker, *lease))
    }

    /// The blocks that will be ready last, at most `most` of them, those that are late before all others. `mean` is what a
    /// slot takes those workers of whom it is known, on average.
    pub(super) fn last_ready(&self, most: usize, mean: impl FnOnce() -> Option<f64>) -> Vec<Candidate> {
        let known = self.late.iter().take(most).chain(self.timely.iter().take(most));
        let mut blocks: Vec<Block> = known.map(|(_, block)| *block).collect();
        let mean = if self.strangers.is_empty() && self.mixed.is_empty() { None } else { mean() };
        for (slots, leases) in &self.strangers {
            let since_late = self.since_late(*slots, mean);
            let late = since_late.into_iter().flat_map(|since| leases.range((Reverse(since), FIRST)..).take(most));
            blocks.extend(late.chain(leases.iter().take(most)).map(|(_, block)| *block));
        }
        blocks.extend(&self.mixed);
        let candidate = |block| {
            let slots = self.holdings(block).next()?.slots;
            let late = self.holdings(block).all(|holding| holding.due(mean) <= self.now);
            Some(Candidate { block, slots, ready: self.first_ready(block, mean), late })
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
        let strangers = self.strangers.iter().filter_map(|(slots, leases)| {
            let first = match self.since_late(*slots, mean) {
                Some(since) => leases.range(..(Reverse(since), FIRST)).next_back(),
                None => leases.last(),
            };
            let (_, block) = first?;
            self.holdings(*block).next().map(|holding| holding.due(mean))
        });
        let mixed = self.mixed.iter().flat_map(|block| self.holdings(*block)).map(|holding| holding.due(mean));
        known.into_iter().chain(strangers).chain(mixed.filter(|due| *due > self.now)).min()
    }

    /// The latest moment since which a stranger's lease of so many slots is late, if there can be any.
    fn since_late(&self, slots: usize, mean: Option<f64>) -> Option<Time> {
        let begun = Holding { block: FIRST, slots, since: Time::default(), secs_per_slot: None };
        self.now.0.checked_sub(begun.due(mean).0).map(Time)
    }

    fn holdings(&self, block: Block) -> impl Iterator<Item = &Holding> {
        on(&self.by_block, block).map(|(_, (_, holding))| holding)
    }

    fn first_ready(&self, block: Block, mean: Option<f64>) -> Time {
        self.holdings(block).map(|holding| holding.ready(mean)).min().unwrap_or_default()
    }

    /// Where a block belongs by its holders, if it has any.
    fn place(&self, block: Block) -> Option<Place> {
        let mut holdings = self.holdings(block);
        let first = holdings.next()?;
        let alone = holdings.next().is_none();
        if self.holdings(block).all(|holding| holding.secs_per_slot.is_some()) {
            let late = self.holdings(block).all(|holding| holding.due(None) <= self.now);
            Some(Place::Known { ready: self.first_ready(block, None), late })
        } else if alone {
            Some(Place::Stranger { slots: first.slots, since: first.since })
        } else {
            Some(Place::Mixed)
        }
    }

    fn put_in(&mut self, block: Block) {
        match self.place(block) {
            Some(Place::Known { ready, late }) => {
                self.by_ready(late).insert((Reverse(ready), block));
                let dues = on(&self.by_block, block).map(|(_, (_, holding))| holding.due(None));
                self.due.extend(dues.filter(|due| *due > self.now).map(|due| (due, block)));
            }
            Some(Place::Stranger { slots, since }) => {
                self.strangers.entry(slots).or_default().insert((Reverse(since), block));
            }
            Some(Place::Mixed) => drop(self.mixed.insert(block)),
            None => {}
        }
    }

    /// Takes a block out of the place where [`Self::put_in`] put it.
    fn take_out(&mut self, block: Block) {
        match self.place(block) {
            Some(Place::Known { ready, late }) => {
                self.by_ready(late).remove(&(Reverse(ready), block));
                for (_, (_, holding)) in on(&self.by_block, block) {
                    self.due.remove(&(holding.due(None), block));
                }
            }
            Some(Place::Stranger { slots, since }) => {
                let Some(leases) = self.strangers.get_mut(&slots) else { return };
                leases.remove(&(Reverse(since), block));
                if leases.is_empty() {
                    self.strangers.remove(&slots);
                }
            }
            Some(Place::Mixed) => drop(self.mixed.remove(&block)),
            None => {}
        }
    }

    fn by_ready(&mut self, late: bool) -> &mut ByReady {
        if late { &mut self.late } else { &mut self.timely }
    }
}

/// Where a block is kept in order.
enum Place {
    Known { ready: Time, late: bool },
    Stranger { slots: usize, since: Time },
    Mixed,
}

type ByBlock = BTreeMap<(Block, LeaseId), (WorkerId, Holding)>;

/// The leases of a block, the oldest first.
fn on(leases: &ByBlock, block: Block) -> impl Iterator<Item = (&(Block, LeaseId), &(WorkerId, Holding))> {
    leases.range((block, LeaseId(0))..=(block, LeaseId(u64::MAX)))
}

/// Before all others.
const FIRST: Block = Block { level: 0, index: 0 };
