//! The slots of one step, or of one evaluation: who computes which, and what has come back.
//!
//! A block is taken from the first lease of it until its result counts, or until nobody has it any more. Blocks that are
//! taken do not overlap; several workers may compute the same one, as twins or to confirm one another.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Add, Range};

use lockstep_model::batch::Sums;
use lockstep_model::tree::{Block, TreeSum};

use super::blocks::Free;
use super::command::{DiscardReason, Lease, Task};
use super::event::{BlockDone, Lent};
use super::id::{LeaseId, WorkerId};
use super::leases::{Holding, Leases, Pace};
use super::members::Members;
use super::review::{Opinion, Review};
use super::time::Time;

/// One task over a number of slots, each of which is to be counted once.
#[derive(Clone, Debug)]
pub(super) struct Work {
    /// The step; of an evaluation, the boundary.
    pub(super) step: u64,
    /// The parameter version to compute with.
    version: u64,
    slots: Vec<Slot>,
    /// A relay's: the blocks that were lent to it, within which it lends on. Empty where all slots are its own.
    bounds: Vec<Block>,
    /// Slots that are free: those of `slots` for which [`Slot::is_free`] holds.
    free_count: u32,
    free: Free,
    /// Slots whose results are accepted.
    counted: u32,
    leases: Leases,
    /// Blocks that have results and need more of them before they count.
    reviews: BTreeMap<Block, Review>,
    /// Those of them that nobody computes.
    unconfirmed: BTreeSet<Block>,
    /// Who declined what.
    declined: Vec<(WorkerId, Block)>,
    task: Task,
    tally: Tally,
    /// Norms of the gradients that count.
    norms: Vec<Norm>,
}

/// The L2 norm of a block's gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Norm {
    /// How many slots the block has.
    pub(super) slots: usize,
    /// The norm.
    pub(super) norm: f64,
}

/// What is known of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// A relay's: it was not lent.
    Elsewhere,
    /// Nobody has had it.
    Free,
    /// Whoever had it ended without a result.
    Returned,
    /// Somebody computes it, or its result is not certain yet.
    Taken,
    /// Its result is accepted.
    Counted,
}

/// How results are added up: the total must not depend on how slots were spread over leases.
#[derive(Clone, Debug)]
enum Tally {
    /// Of blocks, in tree order.
    Gradient(TreeSum<Sums>),
    /// Of single slots, in slot order.
    Slots(Vec<Sums>),
    /// They are not: a relay's are added up beside its vectors.
    Aside,
}

impl Work {
    /// The gradient of step `step` over `slots` slots.
    pub(super) fn gradient(step: u64, slots: u32) -> Self {
        Self::new(step, step - 1, slots, Task::Gradient, Tally::Gradient(TreeSum::new(slots)))
    }

    /// The evaluation at boundary `step` over `slots` slots.
    pub(super) fn evaluation(step: u64, slots: u32) -> Self {
        Self::new(step, step, slots, Task::Evaluate, Tally::Slots(vec![Sums::default(); slots as usize]))
    }

    /// What the model that the run begins with says of `slots` slots.
    pub(super) fn reference(slots: u32) -> Self {
        Self::new(0, 0, slots, Task::Reference, Tally::Slots(vec![Sums::default(); slots as usize]))
    }

    /// A relay's part of what is to be computed: nothing of it so far.
    pub(super) fn lent(&Lent { step, version, task, step_slots, .. }: &Lent) -> Self {
        let mut work = Self::new(step, version, step_slots, task, Tally::Aside);
        work.set(Block::root(step_slots), Slot::Elsewhere);
        work
    }

    fn new(step: u64, version: u64, slots: u32, task: Task, tally: Tally) -> Self {
        Self {
            step,
            version,
            bounds: Vec::new(),
            slots: vec![Slot::Free; slots as usize],
            free_count: slots,
            free: Free::new(slots),
            counted: 0,
            leases: Leases::new(slots),
            reviews: BTreeMap::new(),
            unconfirmed: BTreeSet::new(),
            declined: Vec::new(),
            task,
            tally,
            norms: Vec::new(),
        }
    }

    /// What is computed.
    pub(super) fn task(&self) -> Task {
        self.task
    }

    /// The parameter version to compute with.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Whether this is what a block was lent for.
    pub(super) fn is_for(&self, lent: &Lent) -> bool {
        let of_lent = (lent.step, lent.version, lent.task, lent.step_slots);
        of_lent == (self.step, self.version, self.task, self.slot_count())
    }

    /// A block was lent: its slots are free.
    pub(super) fn take_in(&mut self, block: Block) {
        if !self.bounds.contains(&block) {
            self.bounds.push(block);
        }
        self.set(block, Slot::Free);
    }

    /// It is not wanted any more, or was given back. Returns the leases under which it is computed: they end.
    pub(super) fn withdraw(&mut self, block: Block) -> Vec<(WorkerId, LeaseId)> {
        let within = self.leases.iter().filter(|(_, _, held)| block.contains(*held));
        let within: Vec<(WorkerId, LeaseId)> = within.map(|(worker, lease, _)| (worker, lease)).collect();
        for (worker, lease) in &within {
            self.leases.end(*worker, *lease);
        }
        self.bounds.retain(|lent| *lent != block);
        self.declined.retain(|(_, declined)| !block.contains(*declined));
        self.set(block, Slot::Elsewhere);
        within
    }

    /// Whether a block is one of those that can be lent: in a relay, one within a block that was lent to it.
    fn is_bounded(&self, block: Block) -> bool {
        self.bounds.is_empty() || self.bounds.iter().any(|lent| lent.contains(block))
    }

    /// The block, or the part of it with the first slots that can be lent. Free blocks of a relay that lie side by side may be of
    /// several that were lent to it.
    fn bounded(&self, mut block: Block) -> Block {
        while let (false, Some([first, _])) = (self.is_bounded(block), block.children()) {
            block = first;
        }
        block
    }

    /// How many slots there are.
    pub(super) fn slot_count(&self) -> u32 {
        self.slots.len() as u32
    }

    /// How many slots nobody computes, and none has computed.
    pub(super) fn free_count(&self) -> u32 {
        self.free_count
    }

    /// The leases under way.
    pub(super) fn leases(&self) -> &Leases {
        &self.leases
    }

    /// The same, to tell who comes and goes, and that time passes.
    pub(super) fn leases_mut(&mut self) -> &mut Leases {
        &mut self.leases
    }

    /// The slots of a block.
    pub(super) fn range(&self, block: Block) -> Range<u32> {
        block.slots(self.slot_count())
    }

    /// The block that `worker` should compute next: the largest that is free, of at most `max_slots` slots, but none that it
    /// has declined while one of the others has not.
    pub(super) fn choose(&self, worker: WorkerId, max_slots: u32, members: &Members) -> Option<Block> {
        let mut declined = self.declined.iter().filter(|(who, _)| *who == worker).map(|(_, block)| *block).peekable();
        if declined.peek().is_none() {
            return self.free.choose(max_slots).map(|block| self.bounded(block));
        }
        let mut free = self.free.clone();
        for leaf in declined.flat_map(|block| self.range(block)).map(Block::leaf) {
            if self.left_to_others(worker, leaf, members) {
                free.set(leaf, false);
            }
        }
        free.choose(max_slots).map(|block| self.bounded(block))
    }

    /// Whether `worker` has declined a block, or one that holds it.
    pub(super) fn has_declined(&self, worker: WorkerId, block: Block) -> bool {
        self.declined.iter().any(|(who, declined)| *who == worker && declined.contains(block))
    }

    /// The same, and one of the others who are here has not.
    pub(super) fn left_to_others(&self, worker: WorkerId, block: Block, members: &Members) -> bool {
        let mut others = members.connected().map(|(other, _)| other).filter(|other| *other != worker);
        self.has_declined(worker, block) && others.any(|other| !self.has_declined(other, block))
    }

    /// Blocks that wait for another result, and that nobody computes.
    pub(super) fn unconfirmed(&self) -> &BTreeSet<Block> {
        &self.unconfirmed
    }

    /// Whether all of a block is free.
    pub(super) fn is_free(&self, block: Block) -> bool {
        block.exists(self.slot_count()) && self.free.contains(block) && self.is_bounded(block)
    }

    /// Lends a block that is free, or taken as it is, to a worker of this pace.
    /// Also says whether a part of it was lent before, in vain.
    pub(super) fn lease(
        &mut self,
        worker: WorkerId,
        id: LeaseId,
        block: Block,
        since: Time,
        pace: Pace,
    ) -> (Lease, bool) {
        let again = self.cover(block).contains(&Slot::Returned);
        self.set(block, Slot::Taken);
        self.leases.add(worker, id, Holding::new(block, self.range(block).len(), since, pace));
        self.unconfirmed.remove(&block);
        (Lease { id, step: self.step, version: self.version(), task: self.task(), block }, again)
    }

    /// Whether somebody computes a block.
    pub(super) fn is_held(&self, block: Block) -> bool {
        self.leases.holders(block).next().is_some()
    }

    /// Blocks whose results need confirmation.
    pub(super) fn reviews(&self) -> &BTreeMap<Block, Review> {
        &self.reviews
    }

    /// The lease that a result answers, and if it answers none, why not.
    pub(super) fn judge(&self, done: &BlockDone) -> Result<Holding, DiscardReason> {
        if (done.step, done.version, done.task) != (self.step, self.version(), self.task()) {
            return Err(DiscardReason::Stale);
        }
        let slots = self.slot_count();
        let Some(holding) = self.leases.get(done.worker, done.lease) else {
            let counted = |slot| self.slots[slot as usize] == Slot::Counted;
            let all_counted = done.block.exists(slots) && self.range(done.block).all(counted);
            return Err(if all_counted { DiscardReason::AlreadyCounted } else { DiscardReason::LeaseNotHeld });
        };
        let of_each_slot = done.slot_sums.len() == holding.slots;
        let fits = match self.task {
            Task::Gradient => done.digest.is_some() && done.norm.is_some() && done.slot_sums.is_empty(),
            Task::Evaluate => done.digest.is_none() && of_each_slot,
            Task::Reference => done.digest.is_some() && of_each_slot,
        };
        if done.block == holding.block && fits { Ok(holding) } else { Err(DiscardReason::Malformed) }
    }

    /// Ends the lease of a result that [`Self::judge`] let pass, and keeps it until others confirm it.
    pub(super) fn review(&mut self, review: impl FnOnce() -> Review, opinion: Opinion) -> &Review {
        let block = opinion.done.block;
        self.leases.end(opinion.done.worker, opinion.done.lease);
        if !self.is_held(block) {
            self.unconfirmed.insert(block);
        }
        let review_of = self.reviews.entry(block).or_insert_with(review);
        review_of.add(opinion);
        review_of
    }

    /// Whether the result of a lease is here and waits for others.
    pub(super) fn waits_for_confirmation(&self, worker: WorkerId, lease: LeaseId) -> bool {
        let mut results = self.reviews.values().flat_map(|review| review.present());
        results.any(|opinion| (opinion.done.worker, opinion.done.lease) == (worker, lease))
    }

    /// Takes a block out of review, to decide on its results.
    pub(super) fn conclude(&mut self, block: Block) -> Option<Review> {
        self.unconfirmed.remove(&block);
        self.reviews.remove(&block)
    }

    /// Counts a result that [`Self::judge`] let pass. Returns the leases under which the same block is still computed:
    /// they end, too.
    pub(super) fn accept(&mut self, done: &BlockDone) -> Vec<(WorkerId, LeaseId, Holding)> {
        self.leases.end(done.worker, done.lease);
        self.set(done.block, Slot::Counted);
        let slots = self.range(done.block);
        self.counted += slots.len() as u32;
        match &mut self.tally {
            Tally::Gradient(tree) => {
                tree.insert(done.block, done.sums, |left, right, _| left + right)
                    .expect("taken blocks do not overlap, and each counts once");
                self.norms.extend(done.norm.map(|norm| Norm { slots: slots.len(), norm }));
            }
            Tally::Slots(sums) => {
                sums[slots.start as usize..slots.end as usize].copy_from_slice(&done.slot_sums);
            }
            Tally::Aside => {}
        }
        let others: Vec<(WorkerId, LeaseId)> = self.leases.holders(done.block).collect();
        others
            .into_iter()
            .filter_map(|(worker, lease)| Some((worker, lease, self.leases.end(worker, lease)?)))
            .collect()
    }

    /// Ends a lease without a result: its slots are free again, unless others have them.
    pub(super) fn take_back(&mut self, worker: WorkerId, lease: LeaseId) -> Option<Block> {
        let Holding { block, .. } = self.leases.end(worker, lease)?;
        self.free_if_nobody_has(block);
        Some(block)
    }

    /// As [`Self::take_back`]; besides, the block goes to somebody else if there is anybody.
    pub(super) fn decline(&mut self, worker: WorkerId, lease: LeaseId) {
        let block = self.take_back(worker, lease);
        self.declined.extend(block.map(|block| (worker, block)));
    }

    /// A worker is gone whose results wait for confirmation; the leases that they came under. What it said of an audited
    /// block is remembered, so that nobody escapes a vote by leaving; another block without results of anybody who is here
    /// is free again.
    pub(super) fn bid_farewell(&mut self, worker: WorkerId) -> Vec<LeaseId> {
        let leases = self.reviews.values_mut().flat_map(|review| review.bid_farewell(worker)).collect();
        let abandoned = |review: &Review| !review.audited && review.present().next().is_none();
        let abandoned: Vec<Block> =
            self.reviews.iter().filter(|(_, review)| abandoned(review)).map(|(block, _)| *block).collect();
        for block in abandoned {
            self.conclude(block);
            self.free_if_nobody_has(block);
        }
        leases
    }

    /// Everything open: leases under way, and results that wait for confirmation.
    pub(super) fn open_leases(&self) -> Vec<(WorkerId, LeaseId)> {
        let leases = self.leases.iter().map(|(worker, lease, _)| (worker, lease));
        let waiting = self.reviews.values().flat_map(|review| review.present());
        leases.chain(waiting.map(|opinion| (opinion.done.worker, opinion.done.lease))).collect()
    }

    /// The sums over all slots, once every one is counted.
    pub(super) fn total(&self) -> Option<Sums> {
        if self.counted < self.slot_count() {
            return None;
        }
        match &self.tally {
            Tally::Gradient(tree) => tree.clone().into_root(),
            Tally::Slots(sums) => sums.iter().copied().reduce(Add::add),
            Tally::Aside => None,
        }
    }

    /// Norms of the gradients that count so far.
    pub(super) fn norms(&self) -> &[Norm] {
        &self.norms
    }

    /// A lease of a block ended without a result.
    fn free_if_nobody_has(&mut self, block: Block) {
        if self.is_held(block) {
            return;
        }
        match self.reviews.contains_key(&block) {
            true => drop(self.unconfirmed.insert(block)),
            false => self.set(block, Slot::Returned),
        }
    }

    fn set(&mut self, block: Block, slot: Slot) {
        let cover = self.cover(block);
        let before = cover.iter().filter(|slot| slot.is_free()).count() as u32;
        cover.fill(slot);
        let after = if slot.is_free() { cover.len() as u32 } else { 0 };
        self.free_count = self.free_count - before + after;
        self.free.set(block, slot.is_free());
    }

    fn cover(&mut self, block: Block) -> &mut [Slot] {
        let slots = self.range(block);
        &mut self.slots[slots.start as usize..slots.end as usize]
    }
}

impl Slot {
    fn is_free(self) -> bool {
        matches!(self, Self::Free | Self::Returned)
    }
}
