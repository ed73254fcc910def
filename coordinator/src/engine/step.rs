//! The life of a step, from boundary to boundary, in the order in which it happens.

use std::time::Duration;

use super::command::{Command, DiscardReason, Failure, Finding, Outcome, ReleaseReason, StopReason, Task};
use super::event::BlockDone;
use super::id::{LeaseId, WorkerId};
use super::work::Work;
use super::{Engine, Gradients, Phase};

/// Checkpoints after a start that come sooner than the interval.
const FIRST_INTERVALS: u32 = 3;

impl Engine {
    /// Version `version` is there: evaluates it if that is due. The first one is asked first what later ones are compared with.
    pub(super) fn enter_boundary(&mut self) {
        if self.config.is_relay() {
            self.phase = Phase::Idle;
        } else if self.version == 0 && !self.referenced {
            self.begin(Work::reference(self.config.reference_slots));
        } else if self.config.evaluation_due(self.version) && !self.is_validated_here() {
            self.begin(Work::evaluation(self.version, self.config.eval_slots));
        } else {
            self.leave_boundary();
        }
    }

    /// Whether `step` is the boundary at which this coordinator began, or to which the run went back: only what is missing
    /// is done again there.
    fn is_back_at(&self, step: u64) -> bool {
        self.returned.is_some_and(|returned| returned.step == step)
    }

    fn is_validated_here(&self) -> bool {
        self.returned.is_some_and(|returned| returned.step == self.version && returned.validated)
    }

    /// Does whatever else is due at the boundary, and ends the run or begins the next step.
    fn leave_boundary(&mut self) {
        let step = self.version;
        if self.config.sampling_due(step) && !self.is_back_at(step) {
            self.command(Command::Sample { step });
        }
        if let Some(outcome) = self.outcome_here() {
            return self.end(outcome);
        }
        if self.checkpoint_due(step) && self.saving.is_none() {
            self.save();
        }
        self.begin(Work::gradient(step + 1, self.config.slots));
    }

    /// Begins to lease work out, of which nobody holds any.
    pub(super) fn begin(&mut self, mut work: Work) {
        let members = self.members.connected();
        members.for_each(|(worker, member)| work.leases_mut().arrive(worker, member.workers));
        self.phase = Phase::Work(Box::new(work));
    }

    /// Whether a checkpoint is to be written at boundary `step` and the run to go on meanwhile.
    fn checkpoint_due(&self, step: u64) -> bool {
        // Sooner after a start, so that one who dies again and again gets on: after an eighth, a quarter, a half.
        let passed = |interval: Duration| {
            self.now.since(self.saved_at) >= interval / (1 << FIRST_INTERVALS.saturating_sub(self.counts.saved))
        };
        let on_disk = step == 0 || self.saved == Some(step);
        !on_disk && (self.config.checkpoint_due(step) || self.config.checkpoint_interval.is_some_and(passed))
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

    /// Takes note that a worker computes nothing while the gradient of a lease, if that is open, travels.
    pub(super) fn push_begun(&mut self, worker: WorkerId, lease: LeaseId) {
        if let Phase::Work(work) = &mut self.phase {
            work.leases_mut().travels(worker, lease);
        }
    }

    /// Counts a result, keeps it until another worker confirms it, or says why it is no use. A result that does not answer
    /// the lease it came under is as good as none: the lease counts as declined.
    pub(super) fn take_result(&mut self, done: BlockDone) {
        self.hear(done.worker);
        let (worker, lease) = (done.worker, done.lease);
        let (Some(member), Phase::Work(work)) = (self.members.get_mut(worker), &mut self.phase) else {
            let known = self.members.get(worker).is_some();
            let reason = if known { DiscardReason::Stale } else { DiscardReason::NotAMember };
            return self.discard(worker, lease, reason);
        };
        match work.judge(&done) {
            Ok(holding) => {
                member.declined_in_a_row = 0;
                let turnaround = self.now.since(holding.since);
                self.members.measure(worker, done.task, holding.slots, done.compute, turnaround);
                self.examine(done);
                self.complete_work();
            }
            Err(reason) if work.leases().get(worker, lease).is_some() => {
                self.decline(worker, lease, reason, format!("its result for lease {lease} is no use: {reason}"));
            }
            // It came before, and its lease is open until others have confirmed it.
            Err(reason) if work.waits_for_confirmation(worker, lease) => {
                *self.discards.entry(reason).or_default() += 1;
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
                let norms = work.norms().to_vec();
                let confirmed_suspicions = std::mem::take(&mut self.confirmed_suspicions);
                self.phase = Phase::Apply(Gradients { norms, confirmed_suspicions });
                self.command(Command::ApplyStep { step, sums });
            }
            Task::Evaluate => {
                self.command(Command::RecordValidation { step, sums });
                self.leave_boundary();
            }
            Task::Reference => {
                self.referenced = true;
                self.command(Command::RecordReferences);
                self.enter_boundary();
            }
        }
    }

    /// The next version is published, or left as it was.
    pub(super) fn step_applied(&mut self, step: u64, skipped: bool) {
        let Phase::Apply(gradients) = &self.phase else { return };
        if step != self.version + 1 {
            return;
        }
        self.gate.commit(step, &gradients.norms);
        let slots = gradients.confirmed_suspicions.clone();
        self.version = step;
        self.skipped_in_a_row = if skipped { self.skipped_in_a_row + 1 } else { 0 };
        let in_a_row = self.skipped_in_a_row;
        if skipped {
            self.command(Command::Report(Finding::Skipped { step, in_a_row, slots }));
            if self.config.max_bad_steps > 0 && in_a_row >= self.config.max_bad_steps {
                return self.end(Outcome::Failed { reason: Failure::BadSteps { step, in_a_row } });
            }
        }
        self.enter_boundary();
    }

    /// Where a stop is requested and nobody who is here can go on with the step, or the evaluation, or is in time with it,
    /// gives it up and ends at the last boundary.
    pub(super) fn abandon_work_nobody_does(&mut self) {
        if let (Phase::Work(_), Some(reason)) = (&self.phase, self.stop.clone())
            && self.all_are_late()
        {
            self.end(Outcome::Stopped { reason });
        }
    }

    /// Ends the run at the present version, which is written to disk first.
    pub(super) fn end(&mut self, outcome: Outcome) {
        self.drop_work(DiscardReason::RunEnds);
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
        self.saved_at = self.now;
        self.saving = Some(self.version);
        self.command(Command::Checkpoint { step: self.version });
    }

    /// A checkpoint is on disk; a last one may have waited for it.
    pub(super) fn checkpoint_written(&mut self, step: u64) {
        if self.saving == Some(step) {
            self.saving = None;
            self.saved = Some(step);
            self.counts.saved += 1;
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
