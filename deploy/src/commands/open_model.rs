//! A run's model, ready to answer.

use std::path::{Path, PathBuf};

use anyhow::bail;
use lockstep_model::checkpoint::{self, Manifest};
use lockstep_model::device::ComputeDevice;
use lockstep_model::inference::{Engine, Limits};
use lockstep_model::tokenizer::Tokenizer;

use super::{Caller, inspect, use_threads};
use crate::chat::template::Template;
use crate::cli::ModelArgs;
use crate::recipe::{Recipe, Stage};

/// An engine, and what it speaks.
pub(crate) struct OpenModel {
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) manifest: Manifest,
    /// In words.
    pub(crate) device: String,
}

impl OpenModel {
    /// Reads the newest checkpoint of the run, or the checkpoint, that is named. `caller` has the engine's steps computed.
    ///
    /// # Errors
    /// If there is none, it is damaged, its model reads no text, or there is no such device.
    pub(super) fn load(args: &ModelArgs, limits: Limits, caller: Caller) -> anyhow::Result<Self> {
        use_threads(args.threads, caller)?;
        let path = inspect::locate(&args.run)?;
        let (manifest, parameters) = checkpoint::read_parameters(&path)?;
        let Some(tokenizer) = manifest.tokenizer.clone() else {
            bail!("{}: the run's model reads no text, so it writes none", path.display());
        };
        if manifest.model.has_score_head() {
            bail!(
                "{}: the run's model scores answers, and writes none; name the run that it began with, or compare answers with \
                 `lockstep eval RUN --preferences FILE`",
                path.display()
            );
        }
        let device = ComputeDevice::open(args.device)?;
        let engine = Engine::new(&manifest.model, &parameters, &device, limits)?;
        Ok(Self { engine, tokenizer, manifest, device: device.description })
    }

    /// How messages are written for it.
    ///
    /// # Errors
    /// If its own chat template cannot be read.
    pub(super) fn template(&self) -> anyhow::Result<Template> {
        let template = Template::of(&self.tokenizer)?;
        let recipe = Recipe::from_toml(&self.manifest.recipe_name, &self.manifest.recipe, &[]);
        let has_learned =
            recipe.is_ok_and(|recipe| recipe.data.is_some_and(|data| matches!(data.stage, Stage::Sft | Stage::Dpo)));
        Ok(if has_learned { template.learned() } else { template })
    }
}

/// The run's directory, also where a checkpoint in it is named.
pub(super) fn run_directory(named: &Path) -> PathBuf {
    let path = std::path::absolute(named).unwrap_or_else(|_| named.into());
    let is_checkpoint = path.parent().and_then(Path::file_name).is_some_and(|name| name == "checkpoints");
    match path.ancestors().nth(2) {
        Some(run) if is_checkpoint => run.into(),
        _ => named.into(),
    }
}

/// The name of the run's directory; else the recipe's.
pub(super) fn own_name(named: &Path, recipe: &str) -> String {
    let run = run_directory(named);
    let run = std::path::absolute(&run).unwrap_or(run);
    run.file_name().map_or_else(|| recipe.into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_belongs_to_its_run() {
        for (named, run, name) in [
            ("runs/a", "runs/a", "a"),
            ("/runs/a/checkpoints/step-000000012", "/runs/a", "a"),
            ("/kept/step-000000012", "/kept/step-000000012", "step-000000012"),
            ("/", "/", "quickstart"),
        ] {
            let named = Path::new(named);
            assert_eq!((run_directory(named), own_name(named, "quickstart")), (run.into(), name.into()));
        }
    }
}
