//! Who gets which block: confirmations first, then what a worker has kept, free blocks, and twins of what is late.

use lockstep_model::tree::Block;

use super::command::{Command, Finding, Task};
use super::id::{LeaseId, WorkerId};
use super::idle::Idle;
use super::leases::{Candidate, Pace};
use super::members::{Member, Members};
use super::review::Review;
use super::time::Time;
use super::work::Work;
use super::{Engine, Phase};

/// No more free blocks are leased while so many for each worker wait for confirmation.
const REVIEWS_PER_WORKER: usize = 2;
/// Blocks that an idle worker looks at for a twin: those that will be ready last.
const TWINS_CONSIDERED: usize = 4;
/// Before the first worker.
const NOBODY: WorkerId = WorkerId(0);

impl Engine {
    /// Gives everybody who computes nothing something to compute, if there is anything for it; to a relay, until there is for all
    /// that it stands for.
    pub(super) fn lease_out(&mut self) {
        let needed = self.workers_needed() as usize;
        let here = self.members.connected_workers();
        let Phase::Work(work) = &mut self.phase else { return };
        if here < needed {
            return self.pause(needed - here);
        }
        if std::mem::take(&mut self.paused) && self.stop.is_none() {
            self.commands.push(Command::Report(Finding::Resumed));
        }
        let mut lease = |work: &mut Work, worker: WorkerId, block, pace: Pace| {
            self.leases_granted += 1;
            let id = LeaseId(self.leases_granted);
            let (lease, again) = work.lease(worker, id, block, self.now, pace);
            self.counts.blocks_leased_again += u64::from(again);
            self.commands.push(Command::Lease { worker, lease });
        };
        let shares = self.members.shares(work.free_count().max(1));
        // Those who have nothing to do come before those who send.
        for sending in [false, true] {
            let mut last = NOBODY;
            while work.free_count() > 0 || !work.unconfirmed().is_empty() {
                let leases = work.leases();
                let next = if sending { leases.next_sending(last) } else { leases.idle().after(last).next() };
                let Some(worker) = next else { break };
                let member = self.members.get(worker);
                let block = member.and_then(|member| {
                    let max_slots = || shares.of(member).min(self.config.max_slots_per_lease);
                    Market { work, members: &self.members }.block_for(worker, max_slots)
                });
                match (member, block) {
                    (Some(member), Some(block)) => lease(work, worker, block, member.pace(work.task())),
                    _ => last = worker,
                }
            }
        }
        // Who still has nothing to do looks at what others have, as of now.
        let mut twins = Twins::of(work, &self.members, self.now);
        let task = work.task();
        let pace = |worker| self.members.get(worker).map(|member| member.pace(task));
        work.leases_mut().idle_mut().measure(|worker| pace(worker)?.least_secs_per_slot());
        let mut last = NOBODY;
        while let Some(worker) = twins.next_helper(work.leases().idle(), last) {
            last = worker;
            let Some(pace) = pace(worker) else { continue };
            let market = Market { work, members: &self.members };
            if let Some(block) = twins.block_for(worker, pace, &market) {
                twins.remove(block);
                self.counts.twins += 1;
                lease(work, worker, block, pace);
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
        work.leases().next_late(|| self.members.mean_secs_per_slot(work.task())).is_none()
    }

    /// When the next lease is late, if somebody is idle who could help, or a stop waits for it.
    pub(super) fn next_late(&self) -> Option<Time> {
        let Phase::Work(work) = &self.phase else { return None };
        if work.leases().idle().after(NOBODY).next().is_none() && self.stop.is_none() {
            return None;
        }
        work.leases().next_late(|| self.members.mean_secs_per_slot(work.task()))
    }
}

/// What there is to compute that nobody computes, and who is there to compute it.
struct Market<'a> {
    work: &'a Work,
    members: &'a Members,
}

impl Market<'_> {
    /// What a worker gets that computes nothing, and that nobody else computes.
    fn block_for(&self, worker: WorkerId, max_slots: impl FnOnce() -> u32) -> Option<Block> {
        // Gradients that wait for confirmation take memory: their number is limited.
        let crowded = self.work.reviews().len() >= REVIEWS_PER_WORKER * self.members.connected_count();
        let free = || match self.work.free_count() {
            0 => None,
            _ if crowded => None,
            _ => self.work.choose(worker, max_slots(), self.members),
        };
        self.review_for(worker).or_else(|| self.kept_by(worker)).or_else(free)
    }

    /// A block that waits for this worker's result.
    fn review_for(&self, worker: WorkerId) -> Option<Block> {
        let mut waiting = self.work.unconfirmed().iter().copied();
        waiting
            .find(|block| self.work.reviews().get(block).is_some_and(|review| self.may_confirm(worker, *block, review)))
    }

    /// Whether a result of this worker would help to decide about a block.
    fn may_confirm(&self, worker: WorkerId, block: Block, review: &Review) -> bool {
        let Some(member) = self.members.get(worker) else { return false };
        let fits = |member: &Member| member.class == review.class && !review.has_result_of(&member.name);
        let others = || self.members.connected().filter(|(other, _)| *other != worker);
        let fitting = || others().filter(|(_, other)| fits(other)).map(|(other, _)| other);
        if fits(member) {
            return !self.work.has_declined(worker, block)
                || fitting().all(|other| self.work.has_declined(other, block));
        }
        // One who is alone is asked again; an audit, and a dispute between two, wait for another.
        review.has_result_of(&member.name) && review.is_single() && !review.audited && fitting().next().is_none()
    }

    /// A free block of which this worker has the gradient.
    fn kept_by(&self, worker: WorkerId) -> Option<Block> {
        let kept = &self.members.get(worker)?.kept;
        let now = (Task::Gradient, self.work.step, self.work.version());
        let left_to_others = |block: &Block| self.work.left_to_others(worker, *block, self.members);
        let wanted = |block: &Block| self.work.is_free(*block) && !left_to_others(block);
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
}

impl Twins {
    fn of(work: &Work, members: &Members, now: Time) -> Self {
        let mean = || members.mean_secs_per_slot(work.task());
        let idle = work.leases().idle().after(NOBODY).next().is_some();
        let candidates = if idle { work.leases().last_ready(TWINS_CONSIDERED, mean) } else { Vec::new() };
        Self { now, candidates }
    }

    /// The next idle worker after `last` for whom there may be something: anybody for what is late, and who is fast enough
    /// for what is not, were the slots spread over all that it stands for.
    fn next_helper(&self, idle: &Idle, last: WorkerId) -> Option<WorkerId> {
        match self.candidates.iter().any(|candidate| candidate.late) {
            true => idle.after(last).next(),
            false => {
                let fast = |pace| self.candidates.iter().any(|candidate| self.is_faster(pace, candidate));
                idle.first_fast(last, |secs| fast(Pace { workers: 1, secs_per_slot: Some(secs) }))
            }
        }
    }

    /// What is late, or what `worker` would have ready earlier than whoever has it.
    fn block_for(&self, worker: WorkerId, pace: Pace, market: &Market<'_>) -> Option<Block> {
        let worth_it = |candidate: &&Candidate| {
            let wanted = match market.work.reviews().get(&candidate.block) {
                Some(review) => market.may_confirm(worker, candidate.block, review),
                None => candidate.late || !market.work.left_to_others(worker, candidate.block, market.members),
            };
            // One who stands for several may have it, and not enough for all of them.
            let has_it = market.work.leases().holds(worker, candidate.block);
            wanted && !has_it && (candidate.late || self.is_faster(pace, candidate))
        };
        self.candidates.iter().find(worth_it).map(|candidate| candidate.block)
    }

    fn is_faster(&self, pace: Pace, candidate: &Candidate) -> bool {
        pace.takes(candidate.slots).is_some_and(|takes| self.now + takes < candidate.ready)
    }

    /// Takes a block out that was leased just now.
    fn remove(&mut self, block: Block) {
        self.candidates.retain(|candidate| candidate.block != block);
    }
}
