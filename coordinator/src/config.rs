//! Everything a coordinator must know before it starts, validated.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lockstep_model::adapters::AdapterConfig;
use lockstep_model::compression::Compression;
use lockstep_model::config::{
    BatchConfig, LocalOptimizer, ModelConfig, Objective, OptimizerConfig, Precision, ScheduleConfig,
};
use lockstep_model::sampler::Source;
use lockstep_model::schedule::local_learning_rates;
use lockstep_model::step_filter::SkipConfig;
use lockstep_model::tokenizer::Tokenizer;

use crate::engine::OnDispute;

/// One run: what is trained, on what, and how it is watched.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// The recipe's name, for people.
    pub recipe_name: String,
    /// The recipe in full, overrides applied, as TOML: stored with every checkpoint.
    pub recipe_toml: String,
    /// Seed of everything drawn at random.
    pub seed: u64,
    /// The model.
    pub model: ModelConfig,
    /// What it is trained for.
    pub objective: Objective,
    /// In what workers compute its products.
    pub precision: Precision,
    /// Where it begins; `None`: drawn from the seed.
    pub initial: Option<Initial>,
    /// The adapters that are trained alone, beside `initial`, which stays as it is; `None`: all of the model is trained. Their
    /// names are the model's.
    pub adapters: Option<AdapterConfig>,
    /// How text becomes tokens; `None` where the model reads no text.
    pub tokenizer: Option<Tokenizer>,
    /// Where batches come from.
    pub source: Arc<Source>,
    /// Bytes of text for each validation token, on average; `None` where there is no text.
    pub bytes_per_token: Option<f64>,
    /// The update rule: of versions, or of each replica's local steps where there is an `outer` one.
    pub optimizer: OptimizerConfig,
    /// How versions follow what replicas learned in their local steps; `None`: slots are no replicas, and have gradients.
    pub outer: Option<OptimizerConfig>,
    /// Whether a replica's moments stay with it from step to step.
    pub keep_moments: bool,
    /// What becomes of steps whose gradient is of no use.
    pub skip: SkipConfig,
    /// The learning rate over time.
    pub schedule: ScheduleConfig,
    /// How a step is cut into slots.
    pub batch: BatchConfig,
    /// In which form vectors travel.
    pub compression: Compression,
    /// Validation.
    pub evaluation: EvaluationConfig,
    /// Text sampled while training.
    pub sampling: SamplingConfig,
    /// How its prompts are put to a model that learns to answer; `None`: it goes on with them as with any text.
    pub turns: Option<Turns>,
    /// What is kept on disk.
    pub checkpoint: CheckpointConfig,
    /// Who may take part.
    pub cluster: ClusterConfig,
    /// Directory of the run.
    pub run_dir: PathBuf,
    /// Continue from the newest valid checkpoint in `run_dir`.
    pub resume: bool,
}

impl RunConfig {
    /// How one version of the parameters follows from the one before.
    pub(crate) fn optimizer_of_versions(&self) -> &OptimizerConfig {
        self.outer.as_ref().unwrap_or(&self.optimizer)
    }

    /// How replicas take their local steps; `None` where slots are no replicas.
    pub(crate) fn local_optimizer(&self) -> Option<LocalOptimizer> {
        let OptimizerConfig { rule, grad_clip, .. } = &self.optimizer;
        let (grad_clip, keep_moments) = (*grad_clip, self.keep_moments);
        self.outer.as_ref().map(|_| LocalOptimizer { rule: rule.clone(), grad_clip, keep_moments })
    }

    /// Vectors of moments that are pushed behind each gradient.
    pub(crate) fn kept_moments(&self) -> usize {
        self.local_optimizer().map_or(0, |optimizer| optimizer.kept_moments())
    }

    /// The learning rates of a replica's local steps in step `step`; none where slots are no replicas.
    pub(crate) fn local_learning_rates(&self, step: u64) -> Vec<f64> {
        match self.outer {
            Some(_) => local_learning_rates(&self.schedule, self.optimizer.lr, self.batch.local_steps, step),
            None => Vec::new(),
        }
    }
}

/// Parameters of another model that a run begins with, kept while it lasts: it may go back to its beginning.
#[derive(Clone, Debug)]
pub struct Initial {
    /// Flat in layout order. Where adapters are trained, what is not trained whole is let go of once it is in the run's
    /// directory.
    pub parameters: Arc<Vec<f32>>,
    /// Their SHA-256, hexadecimal: part of the run's identity.
    pub sha256: String,
}

/// When and on how much validation loss is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvaluationConfig {
    /// Every so many steps, besides step 0 and the last; 0: never.
    pub every_steps: u64,
    /// Evaluation slots, each of `batch.sequences_per_slot` windows.
    pub slots: u32,
}

/// Text sampled from fixed prompts while training.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Every so many steps, besides step 0 and the last; 0: never.
    pub every_steps: u64,
    /// What to continue.
    pub prompts: Vec<String>,
    /// Tokens to generate after each prompt.
    pub tokens: usize,
    /// Softmax temperature; 0: the likeliest token.
    pub temperature: f64,
    /// Draw among the so many likeliest tokens; 0: all.
    pub top_k: usize,
}

/// The prompts of samples as turns of a user's, for a model that answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    /// The tokens of each, up to where the answer begins.
    pub prompts: Vec<Vec<u32>>,
    /// Tokens that end an answer.
    pub ends: Vec<u32>,
    /// Texts that end an answer.
    pub stops: Vec<String>,
}

/// What is kept on disk, and when the run stops early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointConfig {
    /// Every so many steps, besides the last; 0: the last alone.
    pub every_steps: u64,
    /// Besides, at the first boundary so long after the one before; `None`: at no time.
    pub interval: Option<Duration>,
    /// Newest checkpoints kept, at least 1. The one with the best validation loss is kept besides.
    pub keep_last: usize,
    /// Stop cleanly, with a checkpoint, after this step.
    pub stop_after: Option<u64>,
}

/// Who may take part.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterConfig {
    /// Steps are leased out only while so many workers are here, at least 1.
    pub min_workers: u32,
    /// Admit only workers of one device class.
    pub exact: bool,
    /// Share of the blocks that another worker computes, too, before they count: 0 to 1.
    pub audit: f64,
    /// What happens when two workers disagree and there is no third.
    pub on_dispute: OnDispute,
    /// How often a worker is to say that it lives.
    pub heartbeat_interval: Duration,
    /// Silence after which a worker is given up.
    pub liveness_timeout: Duration,
}

#[cfg(test)]
impl RunConfig {
    /// A new run of a straight line in `run_dir`.
    pub(crate) fn line(run_dir: &std::path::Path) -> Self {
        use lockstep_model::config::{Decay, LineConfig, UpdateRule};
        use lockstep_model::sampler::LineSource;

        let batch = BatchConfig { slots: 2, sequences_per_slot: 2, local_steps: 1 };
        Self {
            recipe_name: "line".into(),
            recipe_toml: String::new(),
            seed: 1,
            model: ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 }),
            objective: Objective::NextToken,
            precision: Precision::F32,
            initial: None,
            adapters: None,
            tokenizer: None,
            source: Arc::new(Source::Line(LineSource { batch })),
            bytes_per_token: None,
            optimizer: OptimizerConfig { rule: UpdateRule::Sgd, lr: 0.1, grad_clip: None },
            outer: None,
            keep_moments: false,
            skip: SkipConfig { max_in_a_row: 0, above_median: None },
            schedule: ScheduleConfig { steps: 10, warmup_steps: 0, decay: Decay::Constant, min_lr: 0.0 },
            batch,
            compression: Compression::default(),
            evaluation: EvaluationConfig { every_steps: 0, slots: 0 },
            sampling: SamplingConfig { every_steps: 0, prompts: Vec::new(), tokens: 0, temperature: 0.0, top_k: 0 },
            turns: None,
            checkpoint: CheckpointConfig { every_steps: 0, interval: None, keep_last: 1, stop_after: None },
            cluster: ClusterConfig {
                min_workers: 1,
                exact: true,
                audit: 0.0,
                on_dispute: OnDispute::Wait,
                heartbeat_interval: Duration::from_secs(1),
                liveness_timeout: Duration::from_secs(10),
            },
            run_dir: run_dir.into(),
            resume: false,
        }
    }
}
