//! How often a model prefers the answer that people prefer: by its scores, or by its log-probabilities.

use std::path::{Path, PathBuf};
use std::slice;

use anyhow::{Context as _, bail};
use lockstep_coordinator::PairMeans;
use lockstep_model::batch::{Batch, Sums};
use lockstep_model::config::{BatchConfig, DpoConfig, Objective, WindowOrder};
use lockstep_model::device::ComputeDevice;
use lockstep_model::pairs::{PairSource, Reading};
use lockstep_model::preference::{dpo_loss, reward_loss};
use lockstep_model::sampler::Source;
use serde::Serialize;

use super::Subject;
use crate::chat::template::Template;
use crate::cli::Eval;
use crate::commands::{Usage, inspect};
use crate::data::preferences::{Judgements, Read};
use crate::data::progress::Progress;

/// What a model makes of pairs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PairScore {
    pub(super) file: PathBuf,
    pub(super) pairs: u64,
    /// What is compared, in words.
    pub(super) by: &'static str,
    /// −log σ of the margin, on average.
    pub(super) loss: f64,
    /// Share of the pairs whose preferred answer has the higher reward; where both are equal, a pair counts half.
    pub(super) accuracy: f64,
    pub(super) accuracy_stderr: f64,
    #[serde(flatten)]
    pub(super) means: PairMeans,
}

/// Pairs to be compared, in the order of the command line.
pub(super) struct Pairs {
    /// Of each file the rows of each pair.
    files: Vec<(PathBuf, Vec<Batch>)>,
    /// With which log-probabilities are compared.
    reference: Option<Subject>,
    beta: f64,
}

impl Pairs {
    /// Reads the pairs of each file that is named, and the reference.
    ///
    /// # Errors
    /// If one cannot be read, or none of its pairs fits the model.
    pub(super) fn read(args: &Eval, subject: &Subject, device: &ComputeDevice) -> anyhow::Result<Self> {
        let reference = match &args.reference {
            Some(_) if subject.scores => {
                let text = "--reference: the model scores answers, so that nothing is compared; leave it out";
                return Err(Usage(text.into()).into());
            }
            Some(run) => Some(Subject::open(&inspect::locate(run)?, device)?.0),
            None => None,
        };
        let context = reference.as_ref().map_or(subject.context, |reference| subject.context.min(reference.context));
        let files = args.preferences.iter().map(|file| Ok((file.clone(), rows(file, subject, context)?)));
        Ok(Self { files: files.collect::<anyhow::Result<_>>()?, reference, beta: args.beta })
    }

    /// Compares them.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn score(&self, subject: &Subject, progress: &mut Progress) -> anyhow::Result<Vec<PairScore>> {
        let Self { files, reference, beta } = self;
        let scored =
            files.iter().map(|(file, pairs)| of_file(file, pairs, *beta, subject, reference.as_ref(), progress));
        scored.collect()
    }
}

/// The two rows of each pair of a file.
fn rows(file: &PathBuf, subject: &Subject, context: usize) -> anyhow::Result<Vec<Batch>> {
    let reading = if subject.scores { Reading::Score } else { Reading::LogProbability };
    let template = Template::of(&subject.tokenizer)?;
    let Read { pairs, counts } = Judgements::read(slice::from_ref(file))?.pairs(&template, context, reading)?;
    if pairs.is_empty() {
        bail!("{}: no pair fits the model's context of {context} tokens: {}", file.display(), counts.in_words());
    }
    let source = Source::Pairs(PairSource {
        training: pairs.into(),
        validation: [].into(),
        reading,
        context,
        order: WindowOrder::Epoch,
        seed: 0,
        batch: BatchConfig { slots: 1, sequences_per_slot: 1, local_steps: 1 },
        has_reference: true,
        references: None,
    });
    Ok((0..source.reference_slots()).map(|pair| source.reference_slot(pair)).collect())
}

fn of_file(
    file: &Path,
    pairs: &[Batch],
    beta: f64,
    subject: &Subject,
    reference: Option<&Subject>,
    progress: &mut Progress,
) -> anyhow::Result<PairScore> {
    let dpo = DpoConfig { beta, label_smoothing: 0.0 };
    progress.begin("comparing", pairs.iter().map(|rows| rows.bytes() as u64).sum());
    let mut sums = Sums::default();
    for rows in pairs {
        let values = subject.computer.row_values(rows)?;
        let of_pair = match (subject.scores, reference) {
            (true, _) => reward_loss(&values),
            (false, Some(reference)) => {
                let references = reference.computer.row_values(rows).context("--reference")?;
                dpo_loss(&values, &references, dpo)
            }
            (false, None) => dpo_loss(&values, &[0.0; 2], dpo),
        };
        sums = sums + of_pair.sums;
        progress.advance(rows.bytes() as u64);
    }
    let objective = if subject.scores { Objective::Reward } else { Objective::Dpo(dpo) };
    let means = PairMeans::of(objective, sums).context("pairs have means")?;
    let accuracy = means.accuracy;
    Ok(PairScore {
        file: file.into(),
        pairs: sums.weight as u64,
        by: match (subject.scores, reference) {
            (true, _) => "their scores",
            (false, Some(_)) => "what their log-probabilities have gained",
            (false, None) => "their log-probabilities",
        },
        loss: sums.mean(),
        accuracy,
        accuracy_stderr: (accuracy * (1.0 - accuracy) / sums.weight).sqrt(),
        means,
    })
}
