//! `lockstep inspect`: what a run or a checkpoint holds.

use std::path::{Path, PathBuf};

use lockstep_coordinator::run_dir;
use lockstep_model::adapters::AdapterConfig;
use lockstep_model::checkpoint::{self, CheckpointError};
use lockstep_model::layout::Layout;
use serde_json::json;

use crate::cli::Inspect;
use crate::telemetry;

/// Prints a checkpoint's contents.
pub(crate) fn run(args: &Inspect) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let path = locate(&args.dir)?;
    // Reads all of it, so that what is shown is also whole.
    let manifest = checkpoint::read(&path)?.manifest;
    let val_loss = manifest.validation.map(|validation| validation.loss);
    let val_bits_per_byte = manifest.validation.and_then(|validation| validation.bits_per_byte);
    if args.json {
        let shown = json!({
            "checkpoint": path,
            "run_id": manifest.run_id,
            "step": manifest.step,
            "tokens": manifest.tokens,
            "train_loss": manifest.train_loss,
            "val_loss": val_loss,
            "val_bits_per_byte": val_bits_per_byte,
            "val_step": manifest.validation.map(|validation| validation.step),
            "parameters": Layout::of(&manifest.model).len(),
            "adapters": manifest.adapters,
            "trained": manifest.layout().len(),
            "initial_sha256": manifest.initial_sha256,
            "params_sha256": manifest.params_sha256,
            "optimizer_sha256": manifest.optimizer_sha256,
            "corpus_sha256": manifest.corpus_sha256,
            "initial_sha256": manifest.initial_sha256,
            "references_sha256": manifest.references_sha256,
            "device_classes": manifest.device_classes,
            "recipe_name": manifest.recipe_name,
            "recipe": manifest.recipe,
        });
        println!("{}", serde_json::to_string_pretty(&shown)?);
        return Ok(());
    }
    let number = |value: Option<f64>| value.map_or_else(|| "none yet".into(), |value| format!("{value:.4}"));
    println!("checkpoint       {}", path.display());
    println!("run              {} ({})", manifest.run_id, manifest.recipe_name);
    println!("step             {} ({} tokens)", manifest.step, manifest.tokens);
    println!("training loss    {}", number(manifest.train_loss));
    println!("validation loss  {}", number(val_loss));
    if let Some(bits) = val_bits_per_byte {
        println!("bits per byte    {bits:.4}");
    }
    println!("parameters       {}", Layout::of(&manifest.model).len());
    if let Some(AdapterConfig { rank, alpha, targets, .. }) = &manifest.adapters {
        let trained = manifest.layout().len();
        println!("adapters         {trained} of rank {rank}, alpha {alpha}, beside {}", targets.join(", "));
        println!("base_sha256      {}", manifest.initial_sha256.as_deref().unwrap_or("none"));
    }
    println!("params_sha256    {}", manifest.params_sha256);
    println!("optimizer_sha256 {}", manifest.optimizer_sha256);
    for (name, digest) in [("began with", &manifest.initial_sha256), ("references", &manifest.references_sha256)] {
        if let Some(digest) = digest {
            println!("{name:<16} {digest}");
        }
    }
    println!("device classes   {}", manifest.device_classes.join(", "));
    println!("\n{}", manifest.recipe.trim_end());
    Ok(())
}

/// The checkpoint that `dir` means: itself, or the newest whole one of the run in it.
pub(crate) fn locate(dir: &Path) -> anyhow::Result<PathBuf> {
    if dir.join("manifest.json").exists() {
        return Ok(dir.into());
    }
    let (newest, damaged) = checkpoint::newest(&run_dir::checkpoints(dir))?;
    for error in &damaged {
        tracing::warn!("{error}; an older checkpoint is taken");
    }
    match (newest, damaged.into_iter().next()) {
        (Some((path, _)), _) => Ok(path),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err(CheckpointError::NotFound { path: dir.into() }.into()),
    }
}
