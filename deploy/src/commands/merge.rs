//! `lockstep merge`: a run that trained adapters becomes a plain run, whose model has them in its own parameters.
//!
//! Everything that reads a run merges as it reads; this is for whoever wants the one model by itself. The run that is made has
//! one checkpoint, of step 0, and the recipe of the first one without adapters, which begins where it left off.

use std::path::Path;

use lockstep_model::checkpoint::{self, Manifest};
use lockstep_model::digest::{hex, vector_sha256};
use lockstep_model::interchange::StagedDir;

use super::new_run::{self, NewRun};
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
    let elements = parameters.len();
    let Manifest { run_id, step, tokenizer, model, .. } = manifest;
    NewRun { identity: format!("{run_id}{sha256}"), recipe, model, tokenizer, parameters }.publish(staged)?;

    println!("merged      {} (step {step}) to {}", args.run.display(), args.out.display());
    println!("parameters  {elements}");
    println!("sha256      {sha256}");
    Ok(())
}

/// The recipe that `manifest` has, to train the model in `run` further, all of it.
fn recipe(run: &Path, manifest: &Manifest) -> anyhow::Result<Recipe> {
    let text = |text: String| toml::Value::from(text).to_string();
    let changes = [
        format!("init={}", text(new_run::in_recipe(run)?)),
        format!("name={}", text(new_run::name(run))),
        "adapters.rank=0".into(),
    ];
    Ok(Recipe::from_toml(&manifest.recipe_name, &manifest.recipe, &changes)?)
}
