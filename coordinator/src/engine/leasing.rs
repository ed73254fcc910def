//! Who gets which block: confirmations first, then what a worker has kept, free blocks, and twins of what is late.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_model::tree::Block;

use super::command::{Command, Finding, Task};
use super::id::{LeaseId, WorkerId};
use super::members::{Member, Members};
use super::review::Review;
use super::time::Time;
use super::work::{Holding, Work};
use super::{Engine, Phase, blocks};

/// A lease is late after so many times what it should take, and a grace beyond.
const LATE_FACTOR: u32 = 3;
const LATE_GRACE: Duration = Duration::from_secs(1);
/// No lease takes longer without being late; so long it may take while nobody has finished one, as kernels may have to be
/// compiled.
const LONGEST: Duration = Duration::from_secs(300);
/// No more free blocks are leased while so many for each worker wait for confirmation.
const REVIEWS_PER_WORKER: usize = 2;
/// Blocks that an idle worker looks at for a twin: those that will be ready last.
const TWINS_CONSIDERED: usize = 4;

impl Engine {
    /// Gives every idle worker something to compute, if there is anything for it.
    pub(super) fn lease_out(&mut self) {
        let needed = self.workers_needed() as usize;
        let here = self.members.connected_count();
        let Phase::Work(work) = &mut self.phase else { return };
        if here < needed {
            return self.pause(needed - here);
        }
        if std::mem::take(&mut self.paused) && self.stop.is_none() {
            self.commands.push(Command::Report(Finding::Resumed));
        }
        // Nobody holds more than one.
        if work.lease_count() == here {
            return;
        }
        let here: BTreeSet<WorkerId> = self.members.connected().map(|(worker, _)| worker).collect();
        let idle = |work: &Work, worker: WorkerId| work.held_by(worker).next().is_none();
        let mut unconfirmed: BTreeSet<Block> = work.unconfirmed().collect();
        let mut lease = |work: &mut Work, worker, block| {
            self.leases_granted += 1;
            let (lease, again) = work.lease(worker, LeaseId(self.leases_granted), block, self.now);
            self.counts.blocks_leased_again += u64::from(again);
            self.commands.push(Command::Lease { worker, lease });
        };
        for (worker, share) in self.members.shares(work.free_count().max(1)) {
            let max_slots = share.min(self.config.max_slots_per_lease);
            let market = Market { work, members: &self.members, here: &here, unconfirmed: &unconfirmed };
            if idle(work, worker)
                && let Some(block) = market.block_for(worker, max_slots)
            {
                unconfirmed.remove(&block);
                lease(work, worker, block);
            }
        }
        // Who still has nothing to do looks at what others have, as of now.
        let mut twins = Twins::of(work, &self.members, self.now);
        for worker in here.iter().copied() {
            let market = Market { work, members: &self.members, here: &here, unconfirmed: &unconfirmed };
            if idle(work, worker)
                && let Some(block) = twins.block_for(worker, &market)
            {
                twins.remove(block);
                self.counts.twins += 1;
                lease(work, worker, block);
            }
        }
    }

    fn pause(&mut self, missing: usize) {
        if !self.paused && self.leases_granted > 0 && self.stop.is_none() {
            self.paused = true;
            self.command(Command::Report(Finding::Paused { missing: missing as u32 }));
        }
    }

    /// Whether every lease under way is late; so it is where there is none.
    pub(super) fn all_are_late(&self) -> bool {
        let Phase::Work(work) = &self.phase else { return true };
        let pace = Pace::of(work, &self.members);
        work.leases().all(|(worker, _, holding)| pace.due(worker, holding) <= self.now)
    }

    /// When the next lease is late, if somebody is idle who could help, or a stop waits for it.
    pub(super) fn next_late(&self) -> Option<Time> {
        let Phase::Work(work) = &self.phase else { return None };
        if work.lease_count() == self.members.connected_count() && self.stop.is_none() {
            return None;
        }
        let pace = Pace::of(work, &self.members);
        let due = work.leases().map(|(worker, _, holding)| pace.due(worker, holding));
        due.filter(|due| *due > self.now).min()
    }
}

/// How long work should take.
struct Pace<'a> {
    work: &'a Work,
    members: &'a Members,
    /// Of those of whom something is known, on average.
    mean_secs_per_slot: Option<f64>,
}

impl<'a> Pace<'a> {
    fn of(work: &'a Work, members: &'a Members) -> Self {
        Self { work, members, mean_secs_per_slot: members.mean_secs_per_slot(work.task()) }
    }

    /// How long a worker should take for a block, by what it took so far, or else by what the others took on average;
    /// `None` while nobody has done any.
    fn expected(&self, worker: WorkerId, block: Block) -> Option<Duration> {
        let own = self.members.get(worker).and_then(|member| member.secs_per_slot(self.work.task()));
        let slots = self.work.range(block).len();
        Some(Duration::from_secs_f64(own.or(self.mean_secs_per_slot)? * slots as f64))
    }

    /// When a lease should be done.
    fn ready(&self, worker: WorkerId, holding: Holding) -> Time {
        holding.since + self.expected(worker, holding.block).unwrap_or(LONGEST)
    }

    /// When a lease is late.
    fn due(&self, worker: WorkerId, holding: Holding) -> Time {
        let wait = self.expected(worker, holding.block).map(|expected| expected * LATE_FACTOR + LATE_GRACE);
        holding.since + wait.map_or(LONGEST, |wait| wait.min(LONGEST))
    }
}

/// What there is to compute that nobody computes, and who is there to compute it.
struct Market<'a> {
    work: &'a Work,
    members: &'a Members,
    here: &'a BTreeSet<WorkerId>,
    /// Blocks that wait for another result, and that nobody computes.
    unconfirmed: &'a BTreeSet<Block>,
}

impl Market<'_> {
    /// What an idle worker gets that nobody else computes.
    fn block_for(&self, worker: WorkerId, max_slots: u32) -> Option<Block> {
        // Gradients that wait for confirmation take memory: their number is limited.
        let crowded = self.work.reviews().len() >= REVIEWS_PER_WORKER * self.here.len();
        let free = || match self.work.free_count() {
            0 => None,
            _ if crowded => None,
            _ => blocks::choose(&self.work.free_for(worker, self.here), max_slots),
        };
        self.review_for(worker).or_else(|| self.kept_by(worker)).or_else(free)
    }

    /// A block that waits for this worker's result.
    fn review_for(&self, worker: WorkerId) -> Option<Block> {
        let mut waiting = self.unconfirmed.iter().copied();
        waiting
            .find(|block| self.work.reviews().get(block).is_some_and(|review| self.may_confirm(worker, *block, review)))
    }

    /// Whether a result of this worker would help to decide about a block.
    fn may_confirm(&self, worker: WorkerId, block: Block, review: &Review) -> bool {
        let Some(member) = self.members.get(worker) else { return false };
        let fits = |member: &Member| member.class == review.class && !review.has_result_of(&member.name);
        let others = || self.here.iter().filter(|other| **other != worker);
        let fitting = || others().filter(|other| self.members.get(**other).is_some_and(fits));
        if fits(member) {
            return !self.work.has_declined(worker, block)
                || fitting().all(|other| self.work.has_declined(*other, block));
        }
        // One who is alone is asked again; an audit, and a dispute between two, wait for another.
        review.has_result_of(&member.name) && review.is_single() && !review.audited && fitting().next().is_none()
    }

    /// A free block of which this worker has the gradient.
    fn kept_by(&self, worker: WorkerId) -> Option<Block> {
        let kept = &self.members.get(worker)?.kept;
        let now = (Task::Gradient, self.work.step, self.work.version());
        let wanted = |block: &Block| self.work.is_free(*block) && !self.work.left_to_others(worker, *block, self.here);
        let mut blocks =
            kept.iter().filter(|kept| (self.work.task(), kept.step, kept.version) == now).map(|kept| kept.block);
        blocks.find(wanted)
    }
}

/// Blocks that somebody computes, and that others could compute, too: the first result counts.
struct Twins {
    now: Time,
    /// Those that will be ready last come first.
    candidates: Vec<Candidate>,
    /// What each idle worker would take.
    expected: BTreeMap<(WorkerId, Block), Duration>,
}

struct Candidate {
    block: Block,
    holders: Vec<WorkerId>,
    /// When the first of its results should be there.
    ready: Time,
    /// Whether all its leases are late.
    late: bool,
}

impl Twins {
    fn of(work: &Work, members: &Members, now: Time) -> Self {
        let pace = Pace::of(work, members);
        let mut candidates: BTreeMap<Block, Candidate> = BTreeMap::new();
        for (worker, _, holding) in work.leases() {
            let block = holding.block;
            let (ready, late) = (pace.ready(worker, holding), pace.due(worker, holding) <= now);
            let fresh = || Candidate { block, holders: Vec::new(), ready, late: true };
            let candidate = candidates.entry(block).or_insert_with(fresh);
            candidate.holders.push(worker);
            candidate.ready = candidate.ready.min(ready);
            candidate.late &= late;
        }
        let mut candidates: Vec<Candidate> = candidates.into_values().collect();
        candidates.sort_by_key(|candidate| (Reverse((candidate.late, candidate.ready)), candidate.block));
        candidates.truncate(TWINS_CONSIDERED);
        let idle = members.connected().filter(|(worker, _)| work.held_by(*worker).next().is_none());
        let measured = idle.filter(|(_, member)| member.secs_per_slot(work.task()).is_some());
        let pairs = measured.flat_map(|(worker, _)| candidates.iter().map(move |candidate| (worker, candidate.block)));
        let expected = pairs.filter_map(|(worker, block)| Some(((worker, block), pace.expected(worker, block)?)));
        let expected = expected.collect();
        Self { now, candidates, expected }
    }

    /// What is late, or what `worker` would have ready earlier than whoever has it.
    fn block_for(&self, worker: WorkerId, market: &Market<'_>) -> Option<Block> {
        let worth_it = |candidate: &&Candidate| {
            let wanted = match market.work.reviews().get(&candidate.block) {
                Some(review) => market.may_confirm(worker, candidate.block, review),
                None => candidate.late || !market.work.left_to_others(worker, candidate.block, market.here),
            };
            let expected = self.expected.get(&(worker, candidate.block));
            let faster = expected.is_some_and(|expected| self.now + *expected < candidate.ready);
            wanted && !candidate.holders.contains(&worker) && (candidate.late || faster)
        };
        self.candidates.iter().find(worth_it).map(|candidate| candidate.block)
    }

    /// Takes a block out that was leased just now.
    fn remove(&mut self, block: Block) {
        self.candidates.retain(|candidate| candidate.block != block);
    }
}
