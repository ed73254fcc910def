//! What a relay computes: blocks that the coordinator above lends, at any time, of one step after another.
//!
//! Slots and blocks have the numbers that they have there, so that whatever depends on them is the same everywhere. The tree
//! is that of the whole step, of which the slots that were lent can be lent on, in blocks within those that came. Results
//! count as they come: whether a block looks wrong is judged above, by its sum.

use lockstep_model::tree::Block;

use super::command::{Command, DiscardReason};
use super::event::Lent;
use super::id::WorkerId;
use super::work::Work;
use super::{Engine, Phase};

impl Engine {
    /// The coordinator above lends a block. What it lent of another step before is over.
    pub(super) fn take_in(&mut self, lent: Lent) {
        if !self.config.is_relay() {
            return;
        }
        if !matches!(&self.phase, Phase::Work(work) if work.is_for(&lent)) {
            self.drop_work(DiscardReason::Withdrawn);
            self.version = lent.version;
            self.begin(Work::lent(&lent));
        }
        if let Phase::Work(work) = &mut self.phase {
            work.take_in(lent.block);
        }
    }

    /// What was lent is not wanted any more: nobody need compute it.
    pub(super) fn withdraw(&mut self, block: Block) {
        let Phase::Work(work) = &mut self.phase else { return };
        for (worker, lease) in work.withdraw(block) {
            self.discard(worker, lease, DiscardReason::Withdrawn);
        }
    }

    /// A worker has declined a block that was lent: if all who are here have, it goes back.
    pub(super) fn give_back_if_nobody_computes(&mut self, block: Block, reason: String) {
        let Phase::Work(work) = &self.phase else { return };
        if self.members.connected().all(|(worker, _)| work.has_declined(worker, block)) {
            self.command(Command::GiveBack { block, reason });
        }
    }

    /// Takes note of how many workers a member stands for from now on.
    pub(super) fn set_workers(&mut self, worker: WorkerId, workers: u32) {
        self.hear(worker);
        let workers = workers.max(1);
        self.members.set_workers(worker, workers);
        let connected = self.members.get(worker).is_some_and(|member| member.connected);
        if let (true, Phase::Work(work)) = (connected, &mut self.phase) {
            work.leases_mut().arrive(worker, workers);
        }
    }
}
