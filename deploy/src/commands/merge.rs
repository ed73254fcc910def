//! `lockstep merge`: a run that trained adapters becomes a plain run, whose model has them in its own parameters.
//!
//! Everything that reads a run merges as it reads; this is for whoever wants the one model by itself. The run that is made has
//! one checkpoint, of step 0, and the recipe of the first one without adapters, which begins where it left off.

use std::path::{Path, absolute};

use anyhow::Context as _;
use lockstep_coordinator::run_dir;
use lockstep_model::checkpoint::{self, Manifest};
use lockstep_model::digest::{bytes_sha256, hex, vector_sha256};
use lockstep_model::interchange::StagedDir;
use lockstep_model::optimizer::OptimizerState;

use super::{Usage, inspect};
use crate::cli::Merge;
use crate::recipe::Recipe;
use crate::telemetry;

/// Merges a run's adapters.
pub(crate) fn run(args: &Merge) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let path = inspect::locate(&args.run)?;
    if checkpoint::read_manifest(&path)?.adapters.is_none() {
        let text = format!("{}: trained all of its model, and no adapters: it is a plain run already", path.display());
        return Err(Usage(text).into());
    }
    let staged = StagedDir::create(&args.out)?;
    let (manifest, parameters) = checkpoint::read_parameters(&path)?;
    let recipe = recipe(&args.out, &manifest)?;
    let sha256 = hex(&vector_sha256(&parameters));
    let run_id = hex(&bytes_sha256(format!("{}{sha256}", manifest.run_id).as_bytes())[..16]);
    let (recipe_name, recipe) = (recipe.name.clone(), recipe.to_toml());
    run_dir::write_new(staged.path(), &run_id, &recipe)?;
    let (step, elements) = (manifest.step, parameters.len());
    let Manifest { tokenizer, model, .. } = manifest;
    let manifest = Manifest { tokenizer, recipe_name, recipe, ..Manifest::new(run_id, model) };
    let checkpoints = run_dir::checkpoints(staged.path());
    checkpoint::write(&checkpoints, manifest, &parameters, &OptimizerState::default())?.publish()?;
    staged.publish()?;

    println!("merged      {} (step {step}) to {}", args.run.display(), args.out.display());
    println!("parameters  {elements}");
    println!("sha256      {sha256}");
    Ok(())
}

/// The recipe that `manifest` has, to train the model in `run` further, all of it.
fn recipe(run: &Path, manifest: &Manifest) -> anyhow::Result<Recipe> {
    // Named in full, so that it holds from wherever the recipe is used.
    let run = absolute(run).with_context(|| format!("{}: is no path", run.display()))?;
    let shown = run.to_str().with_context(|| format!("{}: a recipe names paths in UTF-8 alone", run.display()))?;
    let stem = run.file_name().map_or("model".into(), |name| name.to_string_lossy());
    let text = |text: &str| toml::Value::from(text).to_string();
    let changes = [
        format!("init={}", text(shown)),
        format!("name={}", text(stem.trim_start_matches('.'))),
        "adapters.rank=0".into(),
    ];
    Ok(Recipe::from_toml(&manifest.recipe_name, &manifest.recipe, &changes)?)
}
