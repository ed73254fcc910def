//! The life of a step, from boundary to boundary, in the order in which it happens.

use super::command::{Command, DiscardReason, Failure, Outcome, ReleaseReason, StopReason, Task};
use super::event::BlockDone;
use super::id::{LeaseId, WorkerId};
use super::work::Work;
use super::{Engine, Phase, blocks};

/// Leases a worker holds at a time.
const LEASES_PER_WORKER: usize = 1;

impl Engine {
    /// Version `version` is there: evaluates it if that is due.
    pub(super) fn enter_boundary(&mut self) {
        if self.config.evaluation_due(self.version) {
            self.phase = Phase::Work(Work::evaluation(self.version, self.config.eval_slots));
        } else {
            self.leave_boundary();
        }
    }

    /// Does whatever else is due at the boundary, and ends the run or begins the next step.
    fn leave_boundary(&mut self) {
        let step = self.version;
        if self.config.sampling_due(step) {
            self.command(Command::Sample { step });
        }
        if let Some(outcome) = self.outcome_here() {
            return self.end(outcome);
        }
        if self.config.checkpoint_due(step) && self.saving.is_none() {
            self.save();
        }
        self.phase = Phase::Work(Work::gradient(step + 1, self.config.slots));
    }

    /// How the run ends at this boundary, if it does.
    fn outcome_here(&self) -> Option<Outcome> {
        let step = self.version;
        if step >= self.config.total_steps {
            Some(Outcome::Completed)
        } else if let Some(reason) = self.stop.clone() {
            Some(Outcome::Stopped { reason })
        } else if self.config.stop_after == Some(step) {
            Some(Outcome::Stopped { reason: StopReason::StopAfter { step } })
        } else {
            None
        }
    }

    /// Gives every idle worker the largest free block within its share of the slots.
    pub(super) fn lease_out(&mut self) {
        let needed = self.workers_needed() as usize;
        let Phase::Work(work) = &mut self.phase else { return };
        let connected: Vec<WorkerId> = self.members.connected().map(|(worker, _)| worker).collect();
        if connected.len() < needed || !work.has_free() {
            return;
        }
        for (worker, share) in self.members.shares(work.slot_count()) {
            let max_slots = share.min(self.config.max_slots_per_lease);
            while work.held_by(worker).count() < LEASES_PER_WORKER {
                let Some(block) = blocks::choose(&work.free_for(worker, &connected), max_slots) else { break };
                self.leases_granted += 1;
                let (lease, again) = work.lease(worker, LeaseId(self.leases_granted), block);
                self.blocks_leased_again += u64::from(again);
                self.commands.push(Command::Lease { worker, lease });
            }
        }
    }

    /// Counts a result, or says why not. A result that does not answer the lease it came under is as good as none: the
    /// lease counts as declined.
    pub(super) fn take_result(&mut self, done: &BlockDone) {
        self.hear(done.worker);
        let (worker, lease) = (done.worker, done.lease);
        let (Some(member), Phase::Work(work)) = (self.members.get_mut(worker), &mut self.phase) else {
            let known = self.members.get(worker).is_some();
            let reason = if known { DiscardReason::Stale } else { DiscardReason::NotAMember };
            return self.discard(worker, lease, reason);
        };
        match work.judge(done) {
            Ok(()) => {
                work.accept(done);
                member.blocks_accepted += 1;
                member.declined_in_a_row = 0;
                if done.task == Task::Gradient {
                    member.measure(done.block.slots(work.slot_count()).len(), done.compute);
                }
                self.command(Command::Accept { worker, lease, step: done.step, block: done.block });
                self.complete_work();
            }
            Err(reason) if work.is_held(worker, lease) => {
                self.decline(worker, lease, reason, format!("its result for lease {lease} is no use: {reason}"));
            }
            Err(reason) => self.discard(worker, lease, reason),
        }
    }

    /// Goes on once every slot is accepted.
    fn complete_work(&mut self) {
        let Phase::Work(work) = &self.phase else { return };
        let Some(sums) = work.total() else { return };
        let step = work.step;
        match work.task() {
            Task::Gradient => {
                self.phase = Phase::Apply;
                self.command(Command::ApplyStep { step, sums });
            }
            Task::Evaluate => {
                self.command(Command::RecordValidation { step, sums });
                self.leave_boundary();
            }
        }
    }

    /// The next version is published.
    pub(super) fn step_applied(&mut self, step: u64) {
        if matches!(self.phase, Phase::Apply) && step == self.version + 1 {
            self.version = step;
            self.enter_boundary();
        }
    }

    /// Where a stop is requested and nobody is connected, gives up the step, or the evaluation, and ends at the last
    /// boundary.
    pub(super) fn abandon_work_nobody_does(&mut self) {
        if let (Phase::Work(_), Some(reason)) = (&self.phase, &self.stop)
            && self.members.connected().next().is_none()
        {
            self.end(Outcome::Stopped { reason: reason.clone() });
        }
    }

    /// Ends the run at the present version, which is written to disk first.
    pub(super) fn end(&mut self, outcome: Outcome) {
        self.phase = Phase::End(outcome);
        self.finish_once_saved();
    }

    fn finish_once_saved(&mut self) {
        let Phase::End(outcome) = &self.phase else { return };
        if self.saved == Some(self.version) {
            self.finish(outcome.clone());
        } else if self.saving.is_none() {
            self.save();
        }
    }

    fn save(&mut self) {
        self.saving = Some(self.version);
        self.command(Command::Checkpoint { step: self.version });
    }

    /// A checkpoint is on disk; a last one may have waited for it.
    pub(super) fn checkpoint_written(&mut self, step: u64) {
        if self.saving == Some(step) {
            self.saving = None;
            self.saved = Some(step);
            self.finish_once_saved();
        }
    }

    /// A run that cannot save must not go on.
    pub(super) fn checkpoint_failed(&mut self, step: u64, reason: String) {
        if self.saving == Some(step) {
            self.saving = None;
            self.finish(Outcome::Failed { reason: Failure::Checkpoint { step, reason } });
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        let workers: Vec<WorkerId> = self.members.iter().map(|(worker, _)| worker).collect();
        for worker in workers {
            self.release(worker, ReleaseReason::RunOver(outcome.clone()));
        }
        self.command(Command::Finish { step: self.version, outcome: outcome.clone() });
        self.phase = Phase::Finished(outcome);
    }
}
