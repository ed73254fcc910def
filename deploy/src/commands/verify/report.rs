//! Whether a run is what it says: nothing is trained, everything is checked.
//!
//! Checkpoints, metrics and ledger are read and compared with one another ([`files`]); then the sampler is replayed over all
//! committed steps, and what it draws is compared with the ledger ([`draws`]). Damage is collected, with its place, and
//! ends nothing: what can still be checked is.

use std::fmt::Display;
use std::path::Path;

use lockstep_coordinator::references::ReferenceFile;
use lockstep_coordinator::run_dir::{self, Identity};
use lockstep_model::checkpoint::Manifest;
use lockstep_model::digest::hex;
use lockstep_model::sampler::Source;
use serde::Serialize;

use super::{draws, files};
use crate::commands::assemble;
use crate::data::progress::Progress;
use crate::recipe::{self, Recipe};

/// What was found.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    /// Optimizer steps committed.
    pub(super) steps: u64,
    /// Sequences drawn in them.
    pub(super) draws: Draws,
    /// Windows over the epochs; none where they are drawn at random.
    pub(super) windows: Option<Windows>,
    /// Checkpoints.
    pub(super) checkpoints: Count,
    /// Lines of the ledger.
    pub(super) ledger_lines: Count,
    /// Lines of the metrics.
    pub(super) metrics_lines: Count,
    /// All that is wrong.
    pub(super) damage: Vec<Damage>,
}

/// Sequences, by whether the ledger has them as the sampler draws them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Draws {
    /// In all committed steps.
    pub(super) committed: u64,
    /// Of these, in steps that the ledger lacks.
    pub(super) lost: u64,
    /// Besides these, in steps that the ledger has again.
    pub(super) repeated: u64,
    /// Of these, in slots that hold other rows than the sampler draws.
    pub(super) different: u64,
}

/// Windows of the corpus, in epoch order.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Windows {
    /// Epochs that are through.
    pub(super) complete_epochs: u64,
    /// Drawn once more within an epoch.
    pub(super) repeated: u64,
    /// Not drawn in an epoch that is through.
    pub(super) left_out: u64,
}

/// How many there are of something.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Count {
    /// As they were written.
    pub(super) whole: u64,
    /// Others.
    pub(super) damaged: u64,
}

/// Something that is wrong.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Damage {
    /// Where.
    pub(super) place: String,
    /// What.
    pub(super) problem: String,
}

impl Report {
    /// Something is wrong.
    pub(super) fn damaged(&mut self, place: impl Display, problem: impl Display) {
        self.damage.push(Damage { place: place.to_string(), problem: problem.to_string() });
    }
}

/// Checks the run in `run`. `overrides` of its recipe may say where the corpus lies now.
///
/// # Errors
/// If there is no run, or an override would change it. What is wrong with the run is in the report.
pub(super) fn verify(run: &Path, overrides: &[String], progress: &mut Progress) -> anyhow::Result<Report> {
    let Identity { run_id, .. } = run_dir::identity(run)?;
    let mut report = Report::default();
    let manifests = files::checkpoints(run, &run_id, &mut report)?;
    let recipe = recipe(run, manifests.last(), overrides)?;
    let lines = files::lines(run, &manifests, &mut report)?;
    if manifests.last().is_some_and(|newest| newest.corpus_sha256.is_empty()) {
        // Imported: nothing was drawn.
        return Ok(report);
    }
    files::base(run, manifests.last(), &mut report);
    match assemble::data(&assemble::on_own_base(&recipe, run)) {
        Ok(data) => {
            let found = hex(&data.source.sha256());
            if let Some(saved) = manifests.last().filter(|manifest| manifest.corpus_sha256 != found) {
                let saved = &saved.corpus_sha256;
                report.damaged(
                    "data.input",
                    format!("it holds other text than the run was trained on (SHA-256 {found} and {saved})"),
                );
            }
            let source = with_references(run, data.source, manifests.last(), &mut report);
            draws::replay(&source, recipe.batch, &lines, &manifests, &mut report, progress);
        }
        Err(error) => report.damaged("data.input", format!("{error:#}; so no draw could be replayed")),
    }
    Ok(report)
}

/// What is drawn from, with what the run's first version says of its rows where that is part of them.
fn with_references(run: &Path, source: Source, newest: Option<&Manifest>, report: &mut Report) -> Source {
    let Some(newest) = newest.filter(|_| source.reference_slots() > 0) else { return source };
    let path = run_dir::references(run);
    match ReferenceFile::of(&path, newest).read(&source) {
        Ok(Some((references, sha256))) => {
            if newest.references_sha256.as_ref() != Some(&sha256) {
                report.damaged(path.display(), "it holds other numbers than the run was trained with");
            }
            source.with_references(references)
        }
        Ok(None) => {
            report.damaged(path.display(), "it is not there, so that rows have other digests than those trained on");
            source
        }
        Err(error) => {
            report.damaged("references", format!("{error:#}"));
            source
        }
    }
}

/// The recipe of the newest checkpoint, or that of a run that has none yet.
fn recipe(run: &Path, newest: Option<&Manifest>, overrides: &[String]) -> anyhow::Result<Recipe> {
    let load = |overrides: &[String]| match newest {
        Some(manifest) => Recipe::from_toml(&manifest.recipe_name, &manifest.recipe, overrides),
        None => Recipe::load(&run_dir::recipe(run).display().to_string(), overrides),
    };
    let (saved, asked) = (load(&[])?, load(overrides)?);
    recipe::resume::check(&saved, &asked)?;
    Ok(asked)
}
