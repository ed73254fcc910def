//! The sampler, replayed over all committed steps and compared with the ledger.

use std::collections::BTreeMap;

use lockstep_coordinator::ledger::{Line, shown};
use lockstep_model::checkpoint::Manifest;
use lockstep_model::config::BatchConfig;
use lockstep_model::digest::hex;
use lockstep_model::ledger::{Ledger, slot_sha256};
use lockstep_model::sampler::Source;
use rayon::prelude::*;

use super::report::{Report, Windows};
use crate::data::progress::Progress;

/// Steps replayed at a time on each core.
const STEPS_PER_CORE: usize = 16;

/// What the sampler draws for a step.
struct Step {
    /// Digests of its slots.
    slots: Vec<[u8; 32]>,
    /// Its windows, in epoch order.
    windows: Vec<u64>,
}

/// Compares what the sampler draws for the steps that are committed with the ledger's lines, and with the digests that
/// checkpoints hold.
pub(super) fn replay(
    source: &Source,
    batch: BatchConfig,
    lines: &[Line],
    manifests: &[Manifest],
    report: &mut Report,
    progress: &mut Progress,
) {
    let (rows_per_slot, rows_per_step) = (u64::from(batch.sequences_drawn_per_slot()), batch.sequences_per_step());
    let steps: Vec<u64> = (1..=report.steps).collect();
    report.draws.committed = report.steps * rows_per_step;
    let by_step = by_step(lines, rows_per_step, report);

    let bytes_per_slot = source.training_slot(1, 0).bytes() as u64;
    let bytes_per_step = bytes_per_slot * u64::from(batch.slots);
    progress.begin("replaying the draws", report.steps * bytes_per_step);
    let mut epochs = source.windows_per_epoch().map(Epochs::new);
    let mut ledger = Ledger::default();
    // Once a step differs so do all digests after it; it is the first that tells.
    let mut agrees = true;
    for part in steps.chunks(STEPS_PER_CORE * rayon::current_num_threads()) {
        let drawn: Vec<Step> = part.par_iter().map(|&step| draw(source, batch, step)).collect();
        for (&step, drawn) in part.iter().zip(&drawn) {
            ledger.commit(rows_per_step, &drawn.slots);
            if let Some(epochs) = &mut epochs {
                drawn.windows.iter().for_each(|&window| epochs.add(window));
            }
            match by_step.get(&step) {
                Some(line) => compare(line, &drawn.slots, rows_per_slot, &ledger, &mut agrees, report),
                None => {
                    report.draws.lost += rows_per_step;
                    report.damaged(format!("ledger, step {step}"), "the ledger has no line of it");
                }
            }
            for manifest in manifests.iter().filter(|manifest| manifest.step == step && manifest.ledger != ledger) {
                let problem = format!(
                    "its ledger is not what the sampler draws up to its step (SHA-256 {} and {})",
                    hex(&manifest.ledger.sha256),
                    hex(&ledger.sha256)
                );
                report.damaged(format!("checkpoint of step {}", manifest.step), problem);
            }
        }
        progress.advance(part.len() as u64 * bytes_per_step);
    }
    report.windows = epochs.map(|epochs| epochs.counted);
    if let Some(Windows { repeated, left_out, .. }) = report.windows
        && repeated + left_out > 0
    {
        report.damaged("data.order", format!("{repeated} windows repeated within an epoch, {left_out} left out"));
    }
}

fn draw(source: &Source, batch: BatchConfig, step: u64) -> Step {
    let slots = (0..batch.slots).map(|slot| slot_sha256(slot, &source.training_slot(step, slot)));
    let windows = (0..batch.slots).flat_map(|slot| source.training_windows(step, slot));
    Step { slots: slots.collect(), windows: windows.collect() }
}

/// The first line of each step; others repeat it.
fn by_step<'a>(lines: &'a [Line], rows_per_step: u64, report: &mut Report) -> BTreeMap<u64, &'a Line> {
    let mut by_step = BTreeMap::new();
    for line in lines {
        let first: &Line = by_step.entry(line.step).or_insert(line);
        if !std::ptr::eq(first, line) {
            report.draws.repeated += rows_per_step;
            report.damaged(format!("ledger, step {}", line.step), "the ledger has another line of it");
        }
    }
    by_step
}

/// Compares a line with the digests of the slots that the sampler draws, and of the run up to here.
fn compare(
    line: &Line,
    slots: &[[u8; 32]],
    rows_per_slot: u64,
    ledger: &Ledger,
    agrees: &mut bool,
    report: &mut Report,
) {
    let place = format!("ledger, step {}", line.step);
    let rows = rows_per_slot * slots.len() as u64;
    if (line.rows, line.slots.len(), line.by.len()) != (rows, slots.len(), slots.len()) {
        let problem = format!(
            "it has {} rows in {} slots by {} workers; a step has {rows} rows in {} slots",
            line.rows,
            line.slots.len(),
            line.by.len(),
            slots.len()
        );
        report.damaged(&place, problem);
    }
    let mut differs = false;
    for (slot, digest) in slots.iter().enumerate() {
        let (found, drawn) = (line.slots.get(slot).map_or("nothing", String::as_str), shown(digest));
        if found != drawn {
            differs = true;
            report.draws.different += rows_per_slot;
            let problem = format!("it was trained on other rows than the sampler draws ({found} and {drawn})");
            report.damaged(format!("{place}, slot {slot}"), problem);
        }
    }
    let same = line.sha256 == hex(&ledger.sha256);
    if *agrees && !same && !differs {
        report.damaged(
            &place,
            format!("its digest of all steps is {}, and the sampler's {}", line.sha256, hex(&ledger.sha256)),
        );
    }
    *agrees &= same;
}

/// Which windows of the epoch at hand were drawn.
struct Epochs {
    drawn: Vec<bool>,
    /// Draws of the epoch so far.
    draws: usize,
    counted: Windows,
}

impl Epochs {
    fn new(windows: u64) -> Self {
        Self { drawn: vec![false; windows as usize], draws: 0, counted: Windows::default() }
    }

    fn add(&mut self, window: u64) {
        let again = std::mem::replace(&mut self.drawn[window as usize], true);
        self.counted.repeated += u64::from(again);
        self.draws += 1;
        if self.draws == self.drawn.len() {
            self.counted.complete_epochs += 1;
            self.counted.left_out += self.drawn.iter().filter(|drawn| !**drawn).count() as u64;
            self.drawn.fill(false);
            self.draws = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_counted_by_the_epoch() {
        let mut epochs = Epochs::new(3);
        [2, 0, 1, 1, 0, 2, 0, 0, 1, 2, 2].into_iter().for_each(|window| epochs.add(window));
        let Windows { complete_epochs, repeated, left_out } = epochs.counted;
        assert_eq!(
            (complete_epochs, repeated, left_out),
            (3, 2, 1),
            "0 twice and 2 not in the third, 2 twice in the fourth"
        );
    }
}
