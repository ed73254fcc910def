//! The slots of one step, or of one evaluation: who computes which, and what has come back.

use std::collections::BTreeMap;
use std::ops::{Add, Range};

use lockstep_model::batch::Sums;
use lockstep_model::tree::{Block, TreeSum};

use super::command::{DiscardReason, Lease, Task};
use super::event::BlockDone;
use super::id::{LeaseId, WorkerId};

/// One task over a number of slots, each of which is to be counted once.
#[derive(Clone, Debug)]
pub(super) struct Work {
    /// The step; of an evaluation, the boundary.
    pub(super) step: u64,
    slots: Vec<Slot>,
    leases: BTreeMap<(WorkerId, LeaseId), Block>,
    /// Who declined what.
    declined: Vec<(WorkerId, Block)>,
    tally: Tally,
}

/// What is known of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Nobody has had it.
    Free,
    /// Its lease ended without a result.
    Returned,
    /// Somebody computes it.
    Leased,
    /// Its result is accepted.
    Counted,
}

/// How results are added up: the total must not depend on how slots were spread over leases.
#[derive(Clone, Debug)]
enum Tally {
    /// Of blocks, in tree order.
    Gradient(TreeSum<Sums>),
    /// Of single slots, in slot order.
    Evaluate(Vec<Sums>),
}

impl Work {
    /// The gradient of step `step` over `slots` slots.
    pub(super) fn gradient(step: u64, slots: u32) -> Self {
        Self::new(step, slots, Tally::Gradient(TreeSum::new(slots)))
    }

    /// The evaluation at boundary `step` over `slots` slots.
    pub(super) fn evaluation(step: u64, slots: u32) -> Self {
        Self::new(step, slots, Tally::Evaluate(vec![Sums::default(); slots as usize]))
    }

    fn new(step: u64, slots: u32, tally: Tally) -> Self {
        let slots = vec![Slot::Free; slots as usize];
        Self { step, slots, leases: BTreeMap::new(), declined: Vec::new(), tally }
    }

    /// What is computed.
    pub(super) fn task(&self) -> Task {
        match self.tally {
            Tally::Gradient(_) => Task::Gradient,
            Tally::Evaluate(_) => Task::Evaluate,
        }
    }

    /// The parameter version to compute with.
    pub(super) fn version(&self) -> u64 {
        match self.task() {
            Task::Gradient => self.step - 1,
            Task::Evaluate => self.step,
        }
    }

    /// How many slots there are.
    pub(super) fn slot_count(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Whether a slot waits for somebody to compute it.
    pub(super) fn has_free(&self) -> bool {
        self.slots.iter().any(|slot| slot.is_free())
    }

    /// Of each slot, whether `worker` may compute it: it is free, and the worker has not declined it while one of
    /// `others` has not.
    pub(super) fn free_for(&self, worker: WorkerId, others: &[WorkerId]) -> Vec<bool> {
        let declines = |worker: WorkerId, slot: u32| {
            self.declined.iter().any(|(who, block)| *who == worker && block.contains(Block::leaf(slot)))
        };
        let left_to_others =
            |slot| declines(worker, slot) && others.iter().any(|other| *other != worker && !declines(*other, slot));
        (0..).zip(&self.slots).map(|(number, slot)| slot.is_free() && !left_to_others(number)).collect()
    }

    /// Lends a free block to a worker. Also says whether a part of it was lent before, in vain.
    pub(super) fn lease(&mut self, worker: WorkerId, id: LeaseId, block: Block) -> (Lease, bool) {
        let again = self.cover(block).contains(&Slot::Returned);
        self.cover(block).fill(Slot::Leased);
        self.leases.insert((worker, id), block);
        (Lease { id, step: self.step, version: self.version(), task: self.task(), block }, again)
    }

    /// Whether this worker holds this lease.
    pub(super) fn is_held(&self, worker: WorkerId, lease: LeaseId) -> bool {
        self.leases.contains_key(&(worker, lease))
    }

    /// The leases that a worker holds.
    pub(super) fn held_by(&self, worker: WorkerId) -> impl Iterator<Item = LeaseId> {
        let all = (worker, LeaseId(0))..=(worker, LeaseId(u64::MAX));
        self.leases.range(all).map(|((_, lease), _)| *lease)
    }

    /// All leases under way: by whom, and for which slots.
    pub(super) fn leases(&self) -> impl Iterator<Item = (WorkerId, Range<u32>)> {
        self.leases.iter().map(|((worker, _), block)| (*worker, block.slots(self.slot_count())))
    }

    /// Whether a result counts, and if not, why not.
    pub(super) fn judge(&self, done: &BlockDone) -> Result<(), DiscardReason> {
        if (done.step, done.version, done.task) != (self.step, self.version(), self.task()) {
            return Err(DiscardReason::Stale);
        }
        let slots = self.slot_count();
        let Some(block) = self.leases.get(&(done.worker, done.lease)) else {
            let counted = |slot| self.slots[slot as usize] == Slot::Counted;
            let all_counted = done.block.exists(slots) && done.block.slots(slots).all(counted);
            return Err(if all_counted { DiscardReason::AlreadyCounted } else { DiscardReason::LeaseNotHeld });
        };
        let fits = match self.task() {
            Task::Gradient => done.digest.is_some() && done.slot_sums.is_empty(),
            Task::Evaluate => done.digest.is_none() && done.slot_sums.len() == block.slots(slots).len(),
        };
        if done.block == *block && fits { Ok(()) } else { Err(DiscardReason::Malformed) }
    }

    /// Counts a result that [`Self::judge`] let pass; its lease ends.
    pub(super) fn accept(&mut self, done: &BlockDone) {
        self.leases.remove(&(done.worker, done.lease));
        self.cover(done.block).fill(Slot::Counted);
        let slots = done.block.slots(self.slot_count());
        match &mut self.tally {
            Tally::Gradient(tree) => {
                tree.insert(done.block, done.sums, Add::add).expect("leases do not overlap, and each is accepted once");
            }
            Tally::Evaluate(sums) => {
                sums[slots.start as usize..slots.end as usize].copy_from_slice(&done.slot_sums);
            }
        }
    }

    /// Ends a lease without a result: its slots are free again.
    pub(super) fn take_back(&mut self, worker: WorkerId, lease: LeaseId) -> Option<Block> {
        let block = self.leases.remove(&(worker, lease))?;
        self.cover(block).fill(Slot::Returned);
        Some(block)
    }

    /// As [`Self::take_back`]; besides, the block goes to somebody else if there is anybody.
    pub(super) fn decline(&mut self, worker: WorkerId, lease: LeaseId) {
        let block = self.take_back(worker, lease);
        self.declined.extend(block.map(|block| (worker, block)));
    }

    /// The sums over all slots, once every one is counted.
    pub(super) fn total(&self) -> Option<Sums> {
        if self.slots.iter().any(|slot| *slot != Slot::Counted) {
            return None;
        }
        match &self.tally {
            Tally::Gradient(tree) => tree.clone().into_root(),
            Tally::Evaluate(sums) => sums.iter().copied().reduce(Add::add),
        }
    }

    fn cover(&mut self, block: Block) -> &mut [Slot] {
        let slots = block.slots(self.slot_count());
        &mut self.slots[slots.start as usize..slots.end as usize]
    }
}

impl Slot {
    fn is_free(self) -> bool {
        matches!(self, Self::Free | Self::Returned)
    }
}
