//! What faults were done to a run, and what they cost.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use lockstep_coordinator::metrics::{self, Line};
use lockstep_coordinator::run_dir;
use lockstep_model::checkpoint;
use lockstep_proto::v1::StatusReply;

use super::Fault;

/// Faults counted, and what was seen of the run.
#[derive(Debug)]
pub(crate) struct Tally {
    seed: u64,
    faults: BTreeMap<Fault, u32>,
    in_mid_step: u32,
    steps_done_twice: u64,
    /// Blocks leased again, by incarnation, as it was last seen.
    leased_again: BTreeMap<u64, u64>,
    /// The first step whose end was seen, and the last one.
    pace: Option<[(Instant, u64); 2]>,
}

impl Tally {
    pub(super) fn new(seed: u64) -> Self {
        let (faults, leased_again) = (BTreeMap::new(), BTreeMap::new());
        Self { seed, faults, in_mid_step: 0, steps_done_twice: 0, leased_again, pace: None }
    }

    /// The run, seen in between.
    pub(super) fn look(&mut self, status: &StatusReply) {
        self.leased_again.insert(status.incarnation, status.blocks_leased_again);
        let seen = (Instant::now(), status.step);
        match &mut self.pace {
            None if status.step > 0 => self.pace = Some([seen, seen]),
            Some([_, last]) if last.1 < status.step => *last = seen,
            _ => {}
        }
    }

    /// A fault was done.
    pub(super) fn struck(&mut self, fault: Fault, in_mid_step: bool) {
        *self.faults.entry(fault).or_default() += 1;
        self.in_mid_step += u32::from(in_mid_step);
    }

    /// The coordinator died after `step` and its run went on after `resumed`.
    pub(super) fn restarted(&mut self, step: u64, resumed: Option<u64>) {
        self.steps_done_twice += step.saturating_sub(resumed.unwrap_or(step));
    }

    /// The account, once the run is over.
    ///
    /// # Errors
    /// If the run's metrics or its checkpoint cannot be read.
    pub(crate) fn report(&self, run: &Path) -> anyhow::Result<String> {
        let of = |fault| self.faults.get(&fault).copied().unwrap_or(0);
        let (killed, stopped, restarted) = (of(Fault::KillWorker), of(Fault::StopWorker), of(Fault::KillCoordinator));
        let (newest, _) = checkpoint::newest(&run_dir::checkpoints(run))?;
        let (_, newest) = newest.with_context(|| format!("{}: holds no checkpoint", run.display()))?;
        let mut text = String::new();
        let faults = killed + stopped + restarted;
        writeln!(text, "chaos            seed {}", self.seed)?;
        writeln!(
            text,
            "faults           {faults}: {killed} × kill -9 of a worker, {stopped} × SIGSTOP of a worker, {restarted} × \
             kill -9 of the coordinator"
        )?;
        writeln!(text, "in mid-step      {}", self.in_mid_step)?;
        writeln!(text, "leased again     {} blocks", self.leased_again.values().sum::<u64>())?;
        writeln!(text, "done twice       {} steps", self.steps_done_twice)?;
        if let Some((kept, median)) = self.throughput(run)? {
            let share = kept / median * 100.0;
            writeln!(text, "throughput kept  {share:.0} % ({kept:.0} of {median:.0} tokens/s, the median step's)")?;
        }
        write!(text, "params_sha256    {}", newest.manifest.params_sha256)?;
        Ok(text)
    }

    /// Tokens a second of wall time from the first step seen to the last one, and those of the median step.
    fn throughput(&self, run: &Path) -> anyhow::Result<Option<(f64, f64)>> {
        let lines = metrics::read(&run.join("metrics.jsonl"))?;
        let steps = lines.iter().filter_map(|line| match line {
            Line::Step(line) => Some(line),
            Line::Validation(_) => None,
        });
        let steps: Vec<_> = steps.collect();
        let (Some([first, last]), Some(line)) = (self.pace, steps.last()) else { return Ok(None) };
        let secs = last.0.duration_since(first.0).as_secs_f64();
        if secs == 0.0 {
            return Ok(None);
        }
        let tokens_per_step = line.tokens as f64 / line.step as f64;
        let mut speeds: Vec<f64> = steps.iter().map(|line| line.tokens_per_sec).collect();
        speeds.sort_by(f64::total_cmp);
        Ok(Some(((last.1 - first.1) as f64 * tokens_per_step / secs, speeds[speeds.len() / 2])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_each_start_are_added_and_steps_twice_counted() {
        let mut tally = Tally::new(7);
        let seen = |incarnation, step, blocks_leased_again| StatusReply {
            incarnation,
            step,
            blocks_leased_again,
            ..StatusReply::default()
        };
        for status in [seen(1, 0, 0), seen(1, 3, 1), seen(1, 9, 2), seen(2, 6, 0), seen(2, 12, 1)] {
            tally.look(&status);
        }
        tally.restarted(9, Some(6));
        assert_eq!(tally.leased_again.values().sum::<u64>(), 3);
        assert_eq!(tally.steps_done_twice, 3);
        assert_eq!(tally.pace.map(|[first, last]| (first.1, last.1)), Some((3, 12)));
    }
}
