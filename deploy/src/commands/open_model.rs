//! A run's model, ready to answer.

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
