//! Runs of models that were not trained in them: one checkpoint, of step 0, and a recipe to train the model further with.

use std::path::{Path, absolute};

use anyhow::Context as _;
use lockstep_coordinator::run_dir;
use lockstep_model::checkpoint::{self, Manifest};
use lockstep_model::config::ModelConfig;
use lockstep_model::digest::{bytes_sha256, hex};
use lockstep_model::interchange::StagedDir;
use lockstep_model::optimizer::OptimizerState;
use lockstep_model::tokenizer::Tokenizer;

use crate::recipe::Recipe;

/// Such a run.
pub(super) struct NewRun {
    /// What its id follows from, so that the same model gives the same run.
    pub(super) identity: String,
    pub(super) recipe: Recipe,
    pub(super) model: ModelConfig,
    pub(super) tokenizer: Option<Tokenizer>,
    /// Flat in the model's layout.
    pub(super) parameters: Vec<f32>,
}

impl NewRun {
    /// Writes it into `staged`, which appears as a whole.
    ///
    /// # Errors
    /// If the system refuses.
    pub(super) fn publish(self, staged: StagedDir) -> anyhow::Result<()> {
        let Self { identity, recipe, model, tokenizer, parameters } = self;
        let run_id = hex(&bytes_sha256(identity.as_bytes())[..16]);
        let (recipe_name, recipe) = (recipe.name.clone(), recipe.to_toml());
        run_dir::write_new(staged.path(), &run_id, &recipe)?;
        let manifest = Manifest { tokenizer, recipe_name, recipe, ..Manifest::new(run_id, model) };
        let checkpoints = run_dir::checkpoints(staged.path());
        checkpoint::write(&checkpoints, manifest, &parameters, &OptimizerState::default())?.publish()?;
        Ok(staged.publish()?)
    }
}

/// A path in full, as a recipe has it, so that it holds from wherever the recipe is used.
///
/// # Errors
/// If it is none, or no UTF-8.
pub(super) fn in_recipe(path: &Path) -> anyhow::Result<String> {
    let path = absolute(path).with_context(|| format!("{}: is no path", path.display()))?;
    let text = path.to_str().with_context(|| format!("{}: a recipe names paths in UTF-8 alone", path.display()))?;
    Ok(text.into())
}

/// What the recipe of the run in `run` is called: as its directory.
pub(super) fn name(run: &Path) -> String {
    let run = absolute(run).unwrap_or_else(|_| run.into());
    let stem = run.file_name().map_or("model".into(), |name| name.to_string_lossy());
    stem.trim_start_matches('.').into()
}
