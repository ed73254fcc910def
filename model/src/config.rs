//! What is to be trained and how, as validated values: the recipe of a run once its corpus is known.
//!
//! These types say nothing about files or the command line; `deploy` builds them from a TOML recipe.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The model to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ModelConfig {
    /// A decoder-only Transformer of GPT-2 shape.
    Gpt(GptConfig),
    /// A decoder-only Transformer of Llama shape.
    Llama(LlamaConfig),
    /// `y = weight * x + bias` on scalars with squared error: the smallest job a cluster can do.
    Line(LineConfig),
}

/// Sizes of a GPT-2 shaped Transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GptConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Whether linear layers and layer norms have biases.
    pub bias: bool,
    /// Whether the output head shares the token embedding's weights.
    pub tied_head: bool,
    /// Whether a score takes the place of logits: the head is one row of its own, whatever `tied_head` says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub score_head: bool,
    /// Which GELU.
    pub gelu: Gelu,
    /// Added to the variance in layer norms.
    pub norm_epsilon: f64,
    /// Probability of zeroing an activation during training, in `[0, 1)`.
    pub dropout: f64,
}

/// Sizes of a Llama shaped Transformer. It has no biases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Distinct tokens.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads; divides `width`, to an even quotient, unless `head_width` is given.
    pub heads: usize,
    /// Heads of keys and values, each shared by `heads / kv_heads` query heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Width of one head, even; `None`: `width / heads`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_width: Option<usize>,
    /// Width of the feed-forward layers.
    pub ffn_width: usize,
    /// Whether queries and keys are normalised before they are rotated.
    pub qk_norm: bool,
    /// Whether the output head shares the token embedding's weights.
    pub tied_head: bool,
    /// Whether a score takes the place of logits: the head is one row of its own, whatever `tied_head` says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub score_head: bool,
    /// Base of the rotation's wave lengths.
    pub rope_theta: f64,
    /// How the rotation is slowed down for longer contexts; `None`: not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Added to the mean square in norms.
    pub norm_epsilon: f64,
    /// Probability of zeroing an activation during training, in `[0, 1)`.
    pub dropout: f64,
}

impl LlamaConfig {
    /// Width of one head.
    pub fn head_width(&self) -> usize {
        self.head_width.unwrap_or(self.width / self.heads)
    }
}

/// Llama 3's stretching of rotary wave lengths (`rope_type` "llama3" of Hugging Face's `transformers`): long ones by
/// `factor`, short ones not at all, those between by something between.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    /// Of the longest wave lengths; at least 1.
    pub factor: f64,
    /// Wave lengths above `original_context / low_freq_factor` are stretched by `factor`.
    pub low_freq_factor: f64,
    /// Wave lengths below `original_context / high_freq_factor` stay; above `low_freq_factor`.
    pub high_freq_factor: f64,
    /// Tokens of the context that the model was trained with at first.
    pub original_context: f64,
}

impl RopeScaling {
    /// By what the wave length of `frequency` (radians a position) is to be multiplied.
    pub fn stretch(&self, frequency: f64) -> f64 {
        let Self { factor, low_freq_factor, high_freq_factor, original_context } = *self;
        let turns = original_context * frequency / std::f64::consts::TAU;
        if turns > high_freq_factor {
            return 1.0;
        }
        if turns < low_freq_factor {
            return factor;
        }
        let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

impl ModelConfig {
    /// The longest sequence, in tokens; `None` of a model that reads none.
    pub fn context(&self) -> Option<usize> {
        match self {
            Self::Gpt(gpt) => Some(gpt.context),
            Self::Llama(llama) => Some(llama.context),
            Self::Line(_) => None,
        }
    }

    /// Whether it scores texts, and gives no logits.
    pub fn has_score_head(&self) -> bool {
        match self {
            Self::Gpt(gpt) => gpt.score_head,
            Self::Llama(llama) => llama.score_head,
            Self::Line(_) => false,
        }
    }

    /// Distinct tokens; 0 of a model that reads none.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Gpt(gpt) => gpt.vocab_size,
            Self::Llama(llama) => llama.vocab_size,
            Self::Line(_) => 0,
        }
    }
}

/// What a model is trained for: which loss is made of what its network gives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Objective {
    /// Each next token: the weighted sum of cross-entropies (or, of the straight line, of squared errors).
    #[default]
    NextToken,
    /// That a score tells the better of two answers ([`reward_loss`](crate::preference::reward_loss)).
    Reward,
    /// That the better of two answers becomes likelier than the other
    /// ([`dpo_loss`](crate::preference::dpo_loss)).
    Dpo(DpoConfig),
}

/// Settings of direct preference optimisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DpoConfig {
    /// How dear it is to move away from the reference; positive.
    pub beta: f64,
    /// The probability that a preference is the wrong way round, in `[0, 0.5)`.
    pub label_smoothing: f64,
}

/// The activation of GPT-2's feed-forward layers (Hendrycks and Gimpel, arXiv:1606.08415).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gelu {
    /// By the error function.
    Exact,
    /// The tanh approximation, which GPT-2 was trained with.
    Tanh,
}

/// Where the straight line starts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LineConfig {
    /// Initial slope.
    pub weight: f32,
    /// Initial intercept.
    pub bias: f32,
}

/// How parameters follow gradients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// The update rule.
    pub rule: UpdateRule,
    /// Peak learning rate; the schedule scales it.
    pub lr: f64,
    /// Gradients of a larger global L2 norm are scaled down to it; `None`: never.
    pub grad_clip: Option<f64>,
}

/// An optimizer's update rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum UpdateRule {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101).
    Adamw(AdamwConfig),
    /// Momentum made orthogonal (Jordan et al. 2024) for hidden matrices, AdamW for all else.
    Muon(MuonConfig),
    /// Stochastic gradient descent with Nesterov's momentum.
    Nesterov(NesterovConfig),
    /// Plain stochastic gradient descent.
    Sgd,
}

impl UpdateRule {
    /// How many numbers it remembers of each parameter.
    pub fn moments(&self) -> usize {
        match self {
            Self::Adamw(_) | Self::Muon(_) => 2,
            Self::Nesterov(_) => 1,
            Self::Sgd => 0,
        }
    }
}

/// Settings of AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamwConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled decay, on the layout's decay tensors only.
    pub weight_decay: f64,
}

/// Settings of Muon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MuonConfig {
    /// Decay of the momentum.
    pub momentum: f64,
    /// What tensors follow that are no hidden matrices; its weight decay holds for all.
    #[serde(flatten)]
    pub adamw: AdamwConfig,
}

/// Settings of Nesterov's momentum.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NesterovConfig {
    /// Decay of the momentum.
    pub momentum: f64,
}

/// How a replica follows its own gradients in its local steps, at learning rates that come with them.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalOptimizer {
    /// The update rule.
    pub rule: UpdateRule,
    /// As [`OptimizerConfig::grad_clip`].
    pub grad_clip: Option<f64>,
    /// Whether moments stay with a replica from step to step, and travel beside its parameters; else they begin at 0.
    pub keep_moments: bool,
}

impl LocalOptimizer {
    /// Moments that travel with each parameter.
    pub fn kept_moments(&self) -> usize {
        if self.keep_moments { self.rule.moments() } else { 0 }
    }
}

/// The learning rate over the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Steps over which the rate rises linearly from 0.
    pub warmup_steps: u64,
    /// What follows the warm-up.
    pub decay: Decay,
    /// The rate at the end, where `decay` falls.
    pub min_lr: f64,
}

/// The shape of a schedule after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Decay {
    /// Stays at the peak.
    Constant,
    /// Half a cosine down to the minimum, reached at step `steps`.
    Cosine {
        /// Step at which the minimum is reached.
        steps: u64,
    },
    /// A straight line down to the minimum, reached at step `steps`.
    Linear {
        /// Step at which the minimum is reached.
        steps: u64,
    },
    /// Stays at the peak, then a straight line over the last `steps` steps of the run (warm-up, stable, decay).
    Wsd {
        /// Length of the final decay.
        steps: u64,
    },
}

/// In what the products of training are computed: those of linear layers and of the head, forward and backward. All else, and
/// the parameters themselves, are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32.
    #[default]
    F32,
    /// Operands are rounded to bf16, the upper half of an f32; sums are f32.
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// How a step's global batch is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchConfig {
    /// Slots (micro-batches) a step, at least 1.
    pub slots: u32,
    /// Sequences (rows) that a slot computes at once.
    pub sequences_per_slot: u32,
    /// How often a training slot does so in a step, one after another, at least 1: more than once where it is a replica that
    /// takes local steps.
    pub local_steps: u32,
}

impl BatchConfig {
    /// Sequences that a training slot draws in a step.
    pub fn sequences_drawn_per_slot(&self) -> u32 {
        self.sequences_per_slot * self.local_steps
    }

    /// Sequences of a step.
    pub fn sequences_per_step(&self) -> u64 {
        u64::from(self.slots) * u64::from(self.sequences_drawn_per_slot())
    }
}

/// In which order windows of the corpus are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowOrder {
    /// Independent uniform positions, with repetition.
    Random,
    /// Each non-overlapping window once an epoch, in an order permuted anew every epoch.
    Epoch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_stretches_long_waves_and_leaves_short_ones() {
        let scaling =
            RopeScaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        let of_wave_length = |length: f64| scaling.stretch(std::f64::consts::TAU / length);
        assert_eq!([of_wave_length(2000.0), of_wave_length(9000.0)], [1.0, 8.0]);
        // 8192 / 4096 = 2 turns, a third of the way from 1 to 4.
        assert!((of_wave_length(4096.0) - 1.0 / (2.0 / 3.0 / 8.0 + 1.0 / 3.0)).abs() < 1e-12);
    }

    #[test]
    fn what_older_manifests_lack_is_not_there() {
        let old = r#"{"kind":"llama","vocab_size":65,"context":64,"layers":1,"heads":4,"kv_heads":2,"width":128,
            "ffn_width":320,"qk_norm":true,"tied_head":true,"rope_theta":10000.0,"norm_epsilon":1e-5,"dropout":0.0}"#;
        let model: ModelConfig = serde_json::from_str(old).unwrap();
        let ModelConfig::Llama(llama) = &model else { panic!("{model:?}") };
        assert_eq!((llama.head_width(), llama.rope_scaling), (32, None));
        let back: serde_json::Value = serde_json::to_value(&model).unwrap();
        assert_eq!(back, serde_json::from_str::<serde_json::Value>(old).unwrap());
    }
}
