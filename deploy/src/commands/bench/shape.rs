//! What `lockstep bench` computes with.

use std::path::Path;

use lockstep_model::batch::{Batch, Column, Values};
use lockstep_model::checkpoint;
use lockstep_model::config::{Gelu, GptConfig, LlamaConfig, ModelConfig};
use lockstep_model::random::{Draws, Stream};

use crate::commands::{Usage, assemble, inspect};
use crate::recipe::Recipe;

/// A model, and the size of the slots that it is trained on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) model: ModelConfig,
    /// Sequences of a slot.
    pub(crate) rows: usize,
    /// Tokens of a sequence.
    pub(crate) length: usize,
    vocab_size: usize,
}

impl Shape {
    /// The shape of this name, or that of a run's model or of a recipe.
    ///
    /// # Errors
    /// If there is none, the recipe is refused or the run damaged, or the model is no Transformer.
    pub(crate) fn load(name: &str) -> anyhow::Result<Self> {
        let gpt = |[layers, heads, width, context, vocab_size]: [usize; 5]| {
            let (bias, tied_head, gelu, norm_epsilon, dropout) = (true, false, Gelu::Exact, 1e-5, 0.0);
            ModelConfig::Gpt(GptConfig {
                vocab_size,
                context,
                layers,
                heads,
                width,
                bias,
                tied_head,
                score_head: false,
                gelu,
                norm_epsilon,
                dropout,
            })
        };
        let llama = |[layers, heads, kv_heads, width, ffn_width, context, vocab_size]: [usize; 7], qk_norm: bool| {
            ModelConfig::Llama(LlamaConfig {
                vocab_size,
                context,
                layers,
                heads,
                kv_heads,
                width,
                head_width: None,
                ffn_width,
                qk_norm,
                tied_head: true,
                score_head: false,
                rope_theta: 10_000.0,
                rope_scaling: None,
                norm_epsilon: 1e-5,
                dropout: 0.0,
            })
        };
        Ok(match name {
            "tiny" => Self::of(gpt([4, 4, 128, 64, 65]), 12),
            "small" => Self::of(gpt([6, 6, 384, 256, 65]), 4),
            "gpt2s" => Self::of(gpt([6, 8, 512, 256, 8192]), 4),
            "llama" => Self::of(llama([6, 6, 2, 384, 1024, 256, 65], true), 4),
            "stories" => Self::of(llama([2, 8, 4, 128, 384, 512, 2048], false), 4),
            run if Path::new(run).is_dir() => {
                let model = checkpoint::read_manifest(&inspect::locate(Path::new(run))?)?.model;
                if let ModelConfig::Line(_) = model {
                    return Err(Usage(format!("{run}: its model is no Transformer")).into());
                }
                Self::of(model, 4)
            }
            recipe => {
                let recipe = Recipe::load(recipe, &[])?;
                let data = assemble::data(&recipe)?;
                let model = recipe.model.with_vocabulary(data.vocab_size());
                if let ModelConfig::Line(_) = model {
                    return Err(Usage(format!("{}: its model is no Transformer", recipe.name)).into());
                }
                Self::of(model, recipe.batch.sequences_per_slot as usize)
            }
        })
    }

    /// Sequences as long as the model reads.
    pub(crate) fn of(model: ModelConfig, rows: usize) -> Self {
        let (length, vocab_size) = match &model {
            ModelConfig::Gpt(gpt) => (gpt.context, gpt.vocab_size),
            ModelConfig::Llama(llama) => (llama.context, llama.vocab_size),
            ModelConfig::Line(_) => (1, 0),
        };
        Self { model, rows, length, vocab_size }
    }

    /// Tokens of a slot.
    pub(crate) fn tokens(&self) -> usize {
        self.rows * self.length
    }

    /// So many tokens drawn at random, each as likely as any.
    pub(crate) fn draw(&self, high: u64, low: u64, tokens: usize) -> Vec<u32> {
        let draws = Draws::new(0, Stream::TrainingWindows).derive(high, low);
        (0..tokens).map(|index| (draws.words(0, index as u64)[0] as usize % self.vocab_size) as u32).collect()
    }

    /// A slot of such tokens.
    pub(crate) fn batch(&self, slot: u32) -> Batch {
        let tokens = |column: u64| Values::U32(self.draw(u64::from(slot), column, self.tokens()));
        let column = |(index, name): (usize, &str)| Column {
            name: name.into(),
            shape: [self.rows, self.length],
            values: tokens(index as u64),
        };
        Batch { columns: ["tokens", "targets"].into_iter().enumerate().map(column).collect() }
    }
}
