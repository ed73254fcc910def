//! How a run gets on: a step is committed, or the run goes back.

use anyhow::Context as _;
use lockstep_model::checkpoint::{Checkpoint, Manifest};

use super::Runtime;
use crate::dataplane::Applied;
use crate::engine::Event;
use crate::engine::command::Finding;
use crate::metrics::{Line, StepLine};
use crate::observe::RunEvent;
use crate::pair_means::PairMeans;
use crate::step_times::StepTimes;
use crate::{report, start};

impl Runtime {
    /// A step was applied and published: it is committed.
    pub(super) fn commit(&mut self, applied: Applied) -> anyhow::Result<()> {
        let step = applied.step;
        self.run_dir.fence().check()?;
        self.ledger.commit(step)?;
        let (sums, lr) = self.applying.take().context("the data plane applied a step that nobody asked for")?;
        let (loss, step_secs) = (sums.mean(), self.step.since.elapsed().as_secs_f64());
        let tokens = self.config.source.positions(step);
        let tokens_per_sec = tokens as f64 / step_secs;
        let pairs = PairMeans::of(self.config.objective, sums);
        self.manifest.step = step;
        self.manifest.train_loss = Some(loss);
        self.manifest.tokens += tokens;
        self.metrics.append(Line::Step(StepLine {
            step,
            loss,
            pairs,
            tokens: self.manifest.tokens,
            lr,
            grad_norm: applied.grad_norm,
            skipped: applied.skipped,
            step_secs,
            tokens_per_sec,
            compute_secs: self.step.compute.as_secs_f64(),
            upload_secs: self.step.upload.as_secs_f64(),
            reduce_secs: applied.reduce.as_secs_f64(),
            optimizer_secs: applied.optimize.as_secs_f64(),
            publish_secs: applied.publish.as_secs_f64(),
        }))?;
        self.tell(&RunEvent::Step { step, loss, pairs, tokens_per_sec });
        self.step = StepTimes::none();
        self.decide(Event::StepApplied { step, skipped: applied.skipped })
    }

    /// The run goes back to `checkpoint`, or to its beginning.
    pub(super) fn roll_back(&mut self, checkpoint: Option<Box<Checkpoint>>) -> anyhow::Result<()> {
        let saved = checkpoint.is_some();
        let (manifest, state) = match checkpoint {
            Some(checkpoint) => start::go_on(&self.config, *checkpoint),
            None => {
                let mut beginning = start::new_manifest(&self.config, &self.manifest.run_id);
                // The beginning is validated once, and that stands.
                beginning.validation = self.metrics.lines().iter().find_map(|line| match line {
                    Line::Validation(line) if line.step == 0 => Some(line.validation()),
                    _ => None,
                });
                (beginning, start::initial_state(&self.config))
            }
        };
        let (step, validated) = (manifest.step, manifest.is_validated());
        let skipped_in_a_row = manifest.filter.skipped_in_a_row;
        let device_classes = std::mem::take(&mut self.manifest.device_classes);
        let references_sha256 = self.manifest.references_sha256.take();
        self.manifest = Manifest { device_classes, references_sha256, ..manifest };
        self.metrics.truncate_after(step, validated)?;
        self.ledger.truncate(self.manifest.ledger)?;
        report::remove_after(&self.run_dir.reports(), step)?;
        self.step = StepTimes::none();
        self.applying = None;
        self.run_dir.trust_up_to(None)?;
        self.plane.restore(step, state);
        self.tell(&RunEvent::RolledBack { step });
        self.decide(Event::RolledBack { step, validated, saved, skipped_in_a_row })
    }

    /// Tells a person what the engine found; a skipped step gets a report of its own.
    pub(super) fn report(&mut self, finding: &Finding) -> anyhow::Result<()> {
        let mut words = finding.to_string();
        if let Finding::Skipped { step, slots, .. } = finding {
            let path = report::write(&self.run_dir.reports(), &self.config, &words, *step, slots)?;
            words.push_str(&format!("; see {}", path.display()));
        }
        self.tell(&RunEvent::Finding(words));
        Ok(())
    }
}
