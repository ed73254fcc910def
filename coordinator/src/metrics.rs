//! `metrics.jsonl`: one line for each committed step and each validation, each step once even after a resume.

use std::path::Path;

use lockstep_model::checkpoint::Validation;
use lockstep_model::number::or_nan;
use serde::{Deserialize, Serialize};

use crate::journal::{self, Entry, Journal};
use crate::pair_means::PairMeans;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A committed optimizer step.
    Step(StepLine),
    /// A validation.
    Validation(ValidationLine),
}

/// A committed optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss over the step's batch, before the update (of replicas, before each local one); `null` in the file where it is
    /// NaN.
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// Where pairs are learned from, what they are given.
    #[serde(flatten)]
    pub pairs: Option<PairMeans>,
    /// Tokens (or rows) trained on so far.
    pub tokens: u64,
    /// Learning rate; of replicas, that of their last local step.
    pub lr: f64,
    /// Global L2 norm of the mean gradient, before clipping, or of replicas' mean pseudo-gradient; `null` in the file where it
    /// is NaN.
    #[serde(deserialize_with = "or_nan")]
    pub grad_norm: f64,
    /// Whether the gradient was of no use, and the parameters stayed as they were; left out where they did not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Wall time from the step's first lease to its commit.
    pub step_secs: f64,
    /// Tokens (or rows) of the step per second of wall time.
    pub tokens_per_sec: f64,
    /// Time in forward and backward, summed over workers.
    pub compute_secs: f64,
    /// Time in which gradients travelled, summed over workers.
    pub upload_secs: f64,
    /// Time in which the coordinator added gradients up.
    pub reduce_secs: f64,
    /// Time in the optimizer.
    pub optimizer_secs: f64,
    /// Time in which the new parameters were prepared for the wire.
    pub publish_secs: f64,
}

/// A validation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationLine {
    /// Optimizer steps applied to the parameters it measured.
    pub step: u64,
    /// Mean loss over all validation windows; `null` in the file where it is NaN.
    #[serde(deserialize_with = "or_nan")]
    pub val_loss: f64,
    /// The same in bits for each byte of text; left out where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_bits_per_byte: Option<f64>,
    /// Where pairs are learned from, what they are given.
    #[serde(flatten)]
    pub pairs: Option<PairMeans>,
}

impl ValidationLine {
    /// The validation that it tells of.
    pub fn validation(&self) -> Validation {
        Validation { step: self.step, loss: self.val_loss, bits_per_byte: self.val_bits_per_byte }
    }
}

impl Line {
    /// The step it is about.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(line) => line.step,
            Self::Validation(line) => line.step,
        }
    }
}

/// The open file and what it holds.
#[derive(Debug)]
pub(crate) struct Metrics {
    journal: Journal<Line>,
    lines: Vec<Line>,
}

impl Metrics {
    /// Opens `path`, keeping the lines up to step `step` (of an earlier start of the same run) and dropping later ones,
    /// which the run will write again. `validated` says whether the validation of `step` itself is to be kept, and `sealed`
    /// is the seal of the last line to keep.
    ///
    /// # Errors
    /// If the file cannot be read or cut, or holds something else.
    pub(crate) fn open(path: &Path, step: u64, validated: bool, sealed: &str) -> anyhow::Result<Self> {
        let mut lines = Vec::new();
        let journal = Journal::open(path, up_to(step, validated), Some(sealed), |line| lines.push(line))?;
        Ok(Self { journal, lines })
    }

    /// Goes back to step `step`, with or without its validation.
    ///
    /// # Errors
    /// If the file cannot be read or cut.
    pub(crate) fn truncate_after(&mut self, step: u64, validated: bool) -> anyhow::Result<()> {
        self.lines.clear();
        self.journal.truncate(up_to(step, validated), |line| self.lines.push(line))
    }

    /// Appends a line.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn append(&mut self, line: Line) -> anyhow::Result<()> {
        debug_assert!(self.lines.last().is_none_or(|last| last.step() <= line.step()), "steps are committed in order");
        self.journal.append(&line)?;
        self.lines.push(line);
        Ok(())
    }

    /// All lines, in order.
    pub(crate) fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// The file that holds them.
    pub(crate) fn journal(&self) -> &Journal<Line> {
        &self.journal
    }
}

/// Whether a line belongs to the part of a run up to step `step`, with the validation of that step if it is `validated`.
pub fn up_to(step: u64, validated: bool) -> impl Fn(&Line) -> bool {
    move |line| match line {
        Line::Step(line) => line.step <= step,
        Line::Validation(line) => line.step < step || (line.step == step && validated),
    }
}

/// The lines of a metrics file; none where there is no file. A last line that was cut by a crash is left out.
///
/// # Errors
/// If the file cannot be read or another line is malformed.
pub fn read(path: &Path) -> anyhow::Result<Vec<Line>> {
    let lines = (1..).zip(journal::read(path)?).map(|(number, Entry { line, .. })| {
        line.map_err(|problem| anyhow::anyhow!("{}: line {number}: {problem}", path.display()))
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;

    use super::*;

    fn step(step: u64) -> Line {
        Line::Step(StepLine {
            step,
            loss: 1.0,
            pairs: None,
            tokens: step * 10,
            lr: 0.1,
            grad_norm: 1.0,
            skipped: false,
            step_secs: 0.5,
            tokens_per_sec: 20.0,
            compute_secs: 0.4,
            upload_secs: 0.01,
            reduce_secs: 0.01,
            optimizer_secs: 0.01,
            publish_secs: 0.01,
        })
    }

    fn validation(step: u64) -> Line {
        Line::Validation(ValidationLine { step, val_loss: 2.0, val_bits_per_byte: Some(1.5), pairs: None })
    }

    fn validation_of(val_loss: f64) -> Line {
        Line::Validation(ValidationLine { step: 1, val_loss, val_bits_per_byte: None, pairs: None })
    }

    #[test]
    fn after_a_resume_each_step_stands_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0, false, "").unwrap();
        for line in [validation(0), step(1), step(2), validation(2)] {
            metrics.append(line).unwrap();
        }
        let saved = metrics.journal().seal().to_string();
        metrics.append(step(3)).unwrap();
        // The coordinator died while writing.
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":4,\"lo").unwrap();

        let mut metrics = Metrics::open(&path, 2, true, &saved).unwrap();
        metrics.append(step(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [validation(0), step(1), step(2), validation(2), step(3)]);
        metrics.truncate_after(2, false).unwrap();
        assert_eq!(metrics.lines(), [validation(0), step(1), step(2)]);
        assert_eq!(read(&path).unwrap(), metrics.lines());
    }

    #[test]
    fn a_diverged_run_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        Metrics::open(&path, 0, false, "").unwrap().append(validation_of(f64::NAN)).unwrap();
        let [Line::Validation(line)] = read(&path).unwrap()[..] else { panic!("one validation") };
        assert!(line.val_loss.is_nan());
    }

    #[test]
    fn a_malformed_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "nonsense\n{\"step\":1,\"val_loss\":2.0}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 1"));
    }
}
