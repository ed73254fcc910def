//! What lies in a run's directory: each file by itself, and whether they agree.

use std::path::Path;

use lockstep_coordinator::journal::{self, Entry};
use lockstep_coordinator::{ledger, metrics, run_dir};
use lockstep_model::adapters::AdaptedLayout;
use lockstep_model::checkpoint::{self, BaseFile, Manifest};
use serde::de::DeserializeOwned;

use super::report::{Count, Report};

/// The manifests of the whole checkpoints of a run, oldest first.
pub(super) fn checkpoints(run: &Path, run_id: &str, report: &mut Report) -> anyhow::Result<Vec<Manifest>> {
    let mut manifests: Vec<Manifest> = Vec::new();
    for path in checkpoint::list(&run_dir::checkpoints(run))? {
        let problem = match checkpoint::read(&path) {
            // One of a live run, which has removed it by now.
            Err(_) if !path.exists() => continue,
            Err(error) => Some(error.to_string()),
            Ok(checkpoint) => {
                let manifest = checkpoint.manifest;
                let first = manifests.first().unwrap_or(&manifest);
                let problem = if !path.ends_with(checkpoint::directory_name(manifest.step)) {
                    Some(format!("it holds step {}", manifest.step))
                } else if manifest.run_id != run_id {
                    Some(format!("it belongs to run {}, and this is run {run_id}", manifest.run_id))
                } else if manifest.corpus_sha256 != first.corpus_sha256 {
                    Some(format!("it is of another corpus than the checkpoint of step {}", first.step))
                } else {
                    None
                };
                if problem.is_none() {
                    manifests.push(manifest);
                }
                problem
            }
        };
        report.checkpoints.whole += u64::from(problem.is_none());
        report.checkpoints.damaged += u64::from(problem.is_some());
        if let Some(problem) = problem {
            report.damaged(path.display(), problem);
        }
    }
    Ok(manifests)
}

/// Looks at what adapters stand on, if the run trains such.
pub(super) fn base(run: &Path, newest: Option<&Manifest>, report: &mut Report) {
    let Some((manifest, adapters)) = newest.and_then(|manifest| Some((manifest, manifest.adapters.as_ref()?))) else {
        return;
    };
    let layout = AdaptedLayout::of(&manifest.model, adapters).base;
    let checkpoint = run_dir::checkpoints(run).join(checkpoint::directory_name(manifest.step));
    if let Err(error) = BaseFile::of_checkpoint(&checkpoint, manifest, &layout) {
        report.damaged(run_dir::base(run).display(), error);
    }
}

/// The ledger's lines that can be read, in order, checked together with the metrics.
pub(super) fn lines(run: &Path, manifests: &[Manifest], report: &mut Report) -> anyhow::Result<Vec<ledger::Line>> {
    let (ledger_path, metrics_path) = (run_dir::ledger(run), run_dir::metrics(run));
    // The coordinator of a live run writes a step to the ledger, then to the metrics.
    let logged_before = last_step(&journal::read(&metrics_path)?);
    let ledger = journal::read::<ledger::Line>(&ledger_path)?;
    let metrics = journal::read::<metrics::Line>(&metrics_path)?;

    report.ledger_lines = check_lines(&ledger_path, &ledger, report);
    report.metrics_lines = check_lines(&metrics_path, &metrics, report);
    for manifest in manifests {
        let step = manifest.step;
        let found = [
            (&ledger_path, seal_where(&ledger, ledger::up_to(step)), &manifest.ledger_seal),
            (
                &metrics_path,
                seal_where(&metrics, metrics::up_to(step, manifest.is_validated())),
                &manifest.metrics_seal,
            ),
        ];
        for (path, found, sealed) in found {
            if found != sealed {
                let problem = format!(
                    "its lines up to step {step} are not those that the checkpoint of this step has sealed ({found:?} and \
                     {sealed:?})"
                );
                report.damaged(path.display(), problem);
            }
        }
    }

    let saved = manifests.last().map_or(0, |manifest| manifest.step);
    let ledger = (1..).zip(ledger).filter_map(|(number, entry)| Some((number, entry.line.ok()?)));
    let ledger: Vec<(u64, ledger::Line)> = ledger.collect();
    let committed = committed(saved, ledger.iter().map(|(_, line)| line.step));
    report.steps = committed;
    for (number, line) in ledger.iter().filter(|(_, line)| line.step == 0 || line.step > committed) {
        let problem = format!("step {} is not the next after step {committed}", line.step);
        report.damaged(format!("{}: line {number}", ledger_path.display()), problem);
    }
    let steps: Vec<u64> = metrics.iter().filter_map(logged_step).collect();
    let mut expected = 1;
    for &step in &steps {
        if step != expected {
            let problem = if step < expected { "stands there again" } else { "is the next" };
            report.damaged(metrics_path.display(), format!("step {step} {problem}, after step {}", expected - 1));
        }
        expected = expected.max(step + 1);
    }
    // A coordinator that died between the two files leaves them one step apart.
    let dying = u64::from(committed > saved);
    if expected - 1 + dying < committed || logged_before > committed {
        let problem = format!("it ends at step {}, and the ledger at step {committed}", expected - 1);
        report.damaged(metrics_path.display(), problem);
    }
    Ok(ledger.into_iter().map(|(_, line)| line).collect())
}

/// The last step of a run whose newest checkpoint is of step `saved`, and whose ledger has lines of these `steps`: each must
/// be the next one.
fn committed(saved: u64, steps: impl Iterator<Item = u64>) -> u64 {
    steps.fold(saved, |committed, step| if step == committed + 1 { step } else { committed })
}

fn logged_step(entry: &Entry<metrics::Line>) -> Option<u64> {
    match &entry.line {
        Ok(metrics::Line::Step(line)) => Some(line.step),
        _ => None,
    }
}

fn last_step(entries: &[Entry<metrics::Line>]) -> u64 {
    entries.iter().filter_map(logged_step).max().unwrap_or(0)
}

/// Names the lines that cannot be read, or do not follow from the one before.
fn check_lines<L>(path: &Path, entries: &[Entry<L>], report: &mut Report) -> Count {
    let mut count = Count::default();
    for (number, entry) in (1..).zip(entries) {
        let problem = match &entry.line {
            Err(problem) => Some(problem.as_str()),
            Ok(_) if !entry.follows => {
                Some("its seal does not follow from the line before: one of the two was changed, removed or inserted")
            }
            Ok(_) => None,
        };
        count.whole += u64::from(problem.is_none());
        count.damaged += u64::from(problem.is_some());
        if let Some(problem) = problem {
            report.damaged(format!("{}: line {number}", path.display()), problem);
        }
    }
    count
}

/// The seal of the last of the first lines that are `wanted`; empty where there is none.
fn seal_where<L: DeserializeOwned>(entries: &[Entry<L>], wanted: impl Fn(&L) -> bool) -> &str {
    let first = entries.iter().take_while(|entry| entry.line.as_ref().is_ok_and(&wanted));
    first.last().map_or("", |entry| &entry.seal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_commits_the_next_step_and_no_other() {
        let absurd = u64::MAX;
        assert_eq!(committed(0, [1, 2, 3].into_iter()), 3);
        assert_eq!(committed(0, [1, 2, absurd, 3, 5].into_iter()), 3);
        assert_eq!(committed(4, [1, 3, absurd, 4, 5, 6].into_iter()), 6);
        assert_eq!(committed(9, [1, 2].into_iter()), 9);
    }
}
