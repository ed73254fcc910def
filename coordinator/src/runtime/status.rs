//! What a run is doing, for whoever asks.

use lockstep_proto::v1;

use super::Runtime;
use crate::metrics::Line;
use crate::translate;

impl Runtime {
    /// The answer to [`v1::StatusRequest`].
    pub(super) fn status(&self) -> v1::StatusReply {
        let status = self.engine.status();
        let last = self.metrics.lines().iter().rev().find_map(|line| match line {
            Line::Step(line) => Some(line),
            Line::Validation(_) => None,
        });
        let tokens = self.config.source.positions(self.manifest.step + 1);
        let tokens_per_slot = tokens as f64 / f64::from(self.config.batch.slots);
        let workers = status.members.iter().map(|member| translate::worker_status(member, tokens_per_slot));
        v1::StatusReply {
            run_id: self.manifest.run_id.clone(),
            incarnation: self.run_dir.identity().incarnation,
            recipe: self.config.recipe_name.clone(),
            step: self.manifest.step,
            total_steps: self.config.schedule.steps,
            loss: self.manifest.train_loss,
            val_loss: self.manifest.validation.map(|validation| validation.loss),
            tokens_per_sec: last.map_or(0.0, |line| line.tokens_per_sec),
            workers: workers.collect(),
            waiting_for: status.waiting_for,
            blocks_leased_again: status.counts.blocks_leased_again,
            twins: status.counts.twins,
            roll_backs: status.counts.roll_backs,
            quarantined: status.quarantined,
            evaluating: status.evaluating,
            relay_of: String::new(),
        }
    }
}
