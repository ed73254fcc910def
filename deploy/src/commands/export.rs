//! `lockstep export`: a run's model, as others read it.

use anyhow::bail;
use lockstep_model::checkpoint;
use lockstep_model::config::{Gelu, GptConfig, ModelConfig};
use lockstep_model::interchange::{ElementType, Exported, StagedDir, write_folder, write_gguf};

use super::inspect;
use crate::cli::{Dtype, Export, ExportFormat};
use crate::telemetry;

/// The file of a GGUF export.
const GGUF: &str = "model.gguf";

/// Exports a model.
pub(crate) fn run(args: &Export) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let staged = StagedDir::create(&args.out)?;
    let path = inspect::locate(&args.run)?;
    let (manifest, parameters) = checkpoint::read_parameters(&path)?;
    let Some(tokenizer) = &manifest.tokenizer else {
        bail!("{}: the run's model reads no text, and nobody else reads it", path.display());
    };
    let element = match args.dtype {
        Dtype::F32 => ElementType::F32,
        Dtype::Bf16 => ElementType::Bf16,
        Dtype::F16 => ElementType::F16,
    };
    let (name, model) = (&*manifest.recipe_name, &manifest.model);
    let exported = Exported { name, model, parameters: &parameters, tokenizer, element };
    match args.format {
        ExportFormat::Hf => write_folder(staged.path(), &exported, args.max_shard_mb * 1_000_000)?,
        ExportFormat::Gguf => {
            if let ModelConfig::Gpt(GptConfig { gelu: Gelu::Exact, .. }) = model {
                tracing::warn!(
                    "llama.cpp computes GELU in its tanh form, and this model has the exact one: logits differ a little"
                );
            }
            write_gguf(&staged.path().join(GGUF), &exported)?;
        }
    }
    staged.publish()?;
    println!("exported    {} to {}", path.display(), args.out.display());
    Ok(())
}
