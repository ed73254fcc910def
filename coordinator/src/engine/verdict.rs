//! What becomes of a result: it counts, or waits for others; and what follows for those who computed something else.

use lockstep_model::tree::Block;

use super::command::{Command, DiscardReason, Failure, Finding, Outcome, ReleaseReason, Task};
use super::config::OnDispute;
use super::event::BlockDone;
use super::id::WorkerId;
use super::review::{Opinion, Review, Suspicion, Verdict, is_audited};
use super::work::{Norm, Work};
use super::{Engine, Phase, Returned};

impl Engine {
    /// Counts a result that answers its lease, or has it confirmed first.
    pub(super) fn examine(&mut self, done: BlockDone) {
        let Phase::Work(work) = &mut self.phase else { return };
        let Some(member) = self.members.get(done.worker) else { return };
        if self.config.is_relay() {
            return self.count(&done, false);
        }
        let (block, step, slots) = (done.block, done.step, work.range(done.block));
        let audited = is_audited(self.config.audit, self.config.audit_seed, step, done.task, block);
        let norm = done.norm.map(|norm| Norm { slots: slots.len(), norm });
        let suspicion = norm.and_then(|norm| self.gate.suspect(norm));
        let earlier = work.reviews().get(&block);
        if earlier.is_none() && suspicion.is_none() && !audited {
            return self.count(&done, false);
        }
        let (first, disputed) = (earlier.is_none(), earlier.is_some_and(Review::is_disputed));
        let (name, class) = (member.name.clone(), member.class);
        let opinion = Opinion { name: name.clone(), done, present: true };
        let review = work.review(|| Review::new(audited, suspicion.is_some(), class), opinion);
        if let (true, Some(Suspicion { norm, median })) = (first, suspicion) {
            self.commands.push(Command::Report(Finding::Suspicious { step, slots, name, norm, median }));
        } else if !disputed && review.is_disputed() && review.verdict() == Verdict::Open {
            let names = review.names();
            self.commands.push(Command::Report(Finding::Disputed { step, slots, names }));
        }
        self.resolve(block);
    }

    /// Decides about a block under review, as far as its results allow.
    fn resolve(&mut self, block: Block) {
        let Phase::Work(work) = &mut self.phase else { return };
        let Some(review) = work.reviews().get(&block) else { return };
        let (step, slots, verdict) = (work.step, work.range(block), review.verdict());
        let name = |result: usize| review.results()[result].name.clone();
        let counted = match verdict {
            Verdict::Open => return,
            Verdict::Unreliable => {
                let reason = Failure::Unreliable { name: name(0), step, slots };
                return self.end(Outcome::Failed { reason });
            }
            Verdict::Unchecked(first) => {
                let finding = Finding::Unchecked { step, slots: slots.clone(), name: name(first) };
                self.commands.push(Command::Report(finding));
                first
            }
            Verdict::Confirmed(first, second) => {
                if review.suspicious {
                    let names = [name(first), name(second)];
                    self.commands.push(Command::Report(Finding::Confirmed { step, slots: slots.clone(), names }));
                }
                first
            }
        };
        if review.suspicious {
            self.confirmed_suspicions.push(slots.clone());
        }
        let Some(review) = work.conclude(block) else { return };
        let (counted, others) = review.into_others(counted);
        let mut outvoted: Vec<Opinion> = Vec::new();
        for (other, equal) in others {
            // The lease of one who is gone ended with its membership.
            if other.present {
                let reason = if equal { DiscardReason::Confirmed } else { DiscardReason::Outvoted };
                self.discard(other.done.worker, other.done.lease, reason);
            }
            if !equal && !outvoted.iter().any(|known| known.name == other.name) {
                outvoted.push(other);
            }
        }
        let checked = matches!(verdict, Verdict::Confirmed(..));
        self.count(&counted.done, checked);
        // One who contradicts itself where nobody else is there may go on: it is all there is.
        let outvoted = outvoted.into_iter().filter(|_| checked);
        let since = outvoted.filter_map(|opinion| self.quarantine(opinion, step, slots.clone())).min();
        if let Some(since) = since.filter(|_| self.config.audit > 0.0) {
            self.redo_from(since);
        }
    }

    /// Counts a result; other leases of the same block end.
    fn count(&mut self, done: &BlockDone, checked: bool) {
        let Phase::Work(work) = &mut self.phase else { return };
        let BlockDone { worker, lease, step, task, block, .. } = *done;
        let overtaken = work.accept(done);
        let slots = work.range(block).len();
        if let Some(member) = self.members.get_mut(worker) {
            member.blocks_accepted += 1;
            if !checked && task == Task::Gradient && !std::mem::replace(&mut member.noted_unchecked, true) {
                self.unchecked_since.entry(member.name.clone()).or_insert(step);
            }
        }
        self.command(Command::Accept { worker, lease, step, block });
        for (worker, lease, holding) in overtaken {
            self.members.measure_at_least(worker, task, slots, self.now.since(holding.since));
            self.discard(worker, lease, DiscardReason::Overtaken);
        }
    }

    /// Where two workers disagree and there is no third, ends the run if the recipe says so.
    pub(super) fn halt_if_disputed(&mut self) {
        let Phase::Work(work) = &self.phase else { return };
        if self.config.on_dispute == OnDispute::Wait {
            return;
        }
        let a_third_is_here = |review: &Review| {
            let others = self.members.connected().map(|(_, member)| member);
            others.filter(|member| member.class == review.class).any(|member| !review.has_result_of(&member.name))
        };
        let disputed = work.reviews().iter().find(|(_, review)| review.is_disputed() && !a_third_is_here(review));
        if let Some((block, review)) = disputed {
            let reason = Failure::Disputed { step: work.step, slots: work.range(*block), names: review.names() };
            self.end(Outcome::Failed { reason });
        }
    }

    /// Ends the membership of a worker that computed something else than others, for good. Since which step its results
    /// count that nobody checked, if there are any.
    fn quarantine(&mut self, opinion: Opinion, step: u64, slots: std::ops::Range<u32>) -> Option<u64> {
        let Opinion { name, done, .. } = opinion;
        let unchecked_since = self.unchecked_since.get(&name).copied();
        let finding = Finding::Outvoted { step, slots: slots.clone(), name: name.clone(), unchecked_since };
        self.command(Command::Report(finding));
        let namesakes = self.members.iter().filter(|(worker, member)| *worker == done.worker || member.name == name);
        let namesakes: Vec<WorkerId> = namesakes.map(|(worker, _)| worker).collect();
        self.quarantined.insert(name.clone());
        self.command(Command::Quarantine { name });
        for worker in namesakes {
            self.release(worker, ReleaseReason::Quarantined { step, slots: slots.clone() });
        }
        unchecked_since
    }

    /// Does step `first` and all later ones again.
    fn redo_from(&mut self, first: u64) {
        self.drop_work(DiscardReason::StartedOver);
        self.forget_unchecked(|since| since < first);
        if first > self.version {
            self.begin(Work::gradient(first, self.config.slots));
            self.command(Command::RestartStep { step: first });
        } else {
            self.phase = Phase::RollBack;
            self.counts.roll_backs += 1;
            self.command(Command::RollBack { at_most: first - 1 });
        }
    }

    /// The run is back at an earlier version.
    pub(super) fn rolled_back(&mut self, returned: Returned, saved: bool, skipped_in_a_row: u32) {
        if !matches!(self.phase, Phase::RollBack) {
            return;
        }
        let step = returned.step;
        self.version = step;
        self.saved = saved.then_some(step);
        self.saved_at = self.now;
        self.returned = Some(returned);
        self.skipped_in_a_row = skipped_in_a_row;
        self.gate.forget_after(step);
        self.forget_unchecked(|since| since <= step);
        self.enter_boundary();
    }

    /// Forgets since when blocks of workers count that nobody checked, but for some.
    fn forget_unchecked(&mut self, but_for: impl Fn(u64) -> bool) {
        self.unchecked_since.retain(|_, since| but_for(*since));
        self.members.forget_unchecked();
    }

    /// Ends every lease of the work under way, which is given up.
    pub(super) fn drop_work(&mut self, reason: DiscardReason) {
        let Phase::Work(work) = &self.phase else { return };
        for (worker, lease) in work.open_leases() {
            self.discard(worker, lease, reason);
        }
        self.confirmed_suspicions.clear();
    }
}
