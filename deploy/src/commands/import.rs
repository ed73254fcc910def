//! `lockstep import`: a model that others trained becomes a run.
//!
//! The run has one checkpoint, of step 0, and a recipe to train it further with. Its id follows from the model, so that
//! the same folder gives the same run.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use lockstep_coordinator::run_dir;
use lockstep_model::config::ModelConfig;
use lockstep_model::digest::{hex, vector_sha256};
use lockstep_model::interchange::{Imported, StagedDir, read_folder};
use toml::{Table, Value};

use super::initial;
use super::new_run::{self, NewRun};
use crate::cli::Import;
use crate::recipe::Recipe;
use crate::telemetry;

/// The tokenizer's file in the run.
const TOKENIZER: &str = "tokenizer.json";

/// Imports a model.
pub(crate) fn run(args: &Import) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let staged = StagedDir::create(&args.out)?;
    let imported = read_folder(&args.folder)?;
    let recipe = recipe(&args.out, &imported.model)?;
    let Imported { model, parameters, tokenizer } = imported;
    let scores = model.has_score_head();

    let tokenizer_path = staged.path().join(TOKENIZER);
    fs::write(&tokenizer_path, tokenizer.to_json())
        .with_context(|| format!("{}: cannot write", tokenizer_path.display()))?;
    let identity = format!("{}{}", hex(&vector_sha256(&parameters)), tokenizer.sha256());
    let elements = parameters.len();
    NewRun { identity, recipe, model, tokenizer: Some(tokenizer), parameters }.publish(staged)?;

    let out = args.out.display();
    println!("imported    {} to {out}", args.folder.display());
    println!("parameters  {elements}");
    if scores {
        println!("\nTry it with:\n  lockstep eval {out} --preferences FILE");
        return Ok(());
    }
    println!("\nTry it, and train it further, with:\n  lockstep generate --run {out} --prompt \"…\"");
    println!("  lockstep train {} --set data.input=TEXT --run NEW", run_dir::recipe(&args.out).display());
    Ok(())
}

/// A recipe that trains the model in `run` further: its shape as it is, all else to be chosen.
fn recipe(run: &Path, model: &ModelConfig) -> anyhow::Result<Recipe> {
    let text = |path: &Path| anyhow::Ok(Value::from(new_run::in_recipe(path)?));
    let sections: [(&str, Vec<(&str, Value)>); 6] = [
        ("model", initial::model_keys(model)?),
        ("data", vec![("input", crate::builtin::KJV.into())]),
        ("tokenizer", vec![("file", text(&run.join(TOKENIZER))?)]),
        ("optimizer", vec![("lr", 2e-5.into()), ("beta2", 0.95.into()), ("grad_clip", 1.0.into())]),
        ("schedule", vec![("steps", initial::size(1000)), ("warmup_steps", initial::size(50))]),
        ("batch", vec![("slots", initial::size(4)), ("sequences_per_slot", initial::size(1))]),
    ];
    let mut table: Table = sections
        .into_iter()
        .map(|(section, keys)| {
            let keys: Table = keys.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
            (section.to_string(), keys.into())
        })
        .collect();
    table.insert("init".into(), text(run)?);
    Ok(Recipe::from_toml(&new_run::name(run), &table.to_string(), &[])?)
}
