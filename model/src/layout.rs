//! The flat vector of a model's parameters, and how they start.
//!
//! One `f32` vector with named tensors is the unit of the wire, the sum, the optimizer and the checkpoint.

use serde::{Deserialize, Serialize};

use crate::config::{GptConfig, LlamaConfig, ModelConfig};
use crate::random::{Stream, normal};

/// Standard deviation of the initial weights of matrices and embeddings (GPT-2).
const INIT_STD: f64 = 0.02;

/// The head of a model that scores texts, `[1, C]`.
pub const SCORE_HEAD: &str = "score.weight";

/// Names, shapes and places of all tensors in the flat vector, in order and without gaps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The tensors.
    pub tensors: Vec<TensorSpec>,
}

/// One tensor of the layout, row-major.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// e.g. `h.0.attn.c_attn.weight`.
    pub name: String,
    /// One or two sizes.
    pub shape: Vec<usize>,
    /// Index of its first element in the flat vector.
    pub offset: usize,
    /// Whether weight decay applies: to matrices, embeddings included, and not to vectors.
    pub decay: bool,
    /// Whether the optimizer changes it.
    pub trainable: bool,
}

impl TensorSpec {
    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its elements' places in the flat vector.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.elements()
    }

    /// Whether it is a matrix that turns activations into activations: no vector, no embedding and no head.
    pub fn is_hidden_matrix(&self) -> bool {
        const EMBEDDINGS_AND_HEADS: [&str; 5] =
            ["wte.weight", "wpe.weight", "embed_tokens.weight", "lm_head.weight", SCORE_HEAD];
        self.shape.len() == 2 && !EMBEDDINGS_AND_HEADS.contains(&self.name.as_str())
    }
}

impl Layout {
    /// The layout of a model. `proto/lockstep.proto` lists the names.
    pub fn of(model: &ModelConfig) -> Self {
        let mut layout = Self { tensors: Vec::new() };
        match model {
            ModelConfig::Gpt(gpt) => layout.push_gpt(gpt),
            ModelConfig::Llama(llama) => layout.push_llama(llama),
            ModelConfig::Line(_) => {
                layout.push("weight".into(), &[1, 1]);
                layout.push("bias".into(), &[1]);
            }
        }
        layout
    }

    /// Elements of the whole vector.
    pub fn len(&self) -> usize {
        self.tensors.last().map_or(0, |last| last.range().end)
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    fn push_gpt(&mut self, gpt: &GptConfig) {
        let (v, t, c) = (gpt.vocab_size, gpt.context, gpt.width);
        self.push("wte.weight".into(), &[v, c]);
        self.push("wpe.weight".into(), &[t, c]);
        for i in 0..gpt.layers {
            self.push_affine(&format!("h.{i}.ln_1"), &[c], gpt.bias);
            self.push_affine(&format!("h.{i}.attn.c_attn"), &[c, 3 * c], gpt.bias);
            self.push_affine(&format!("h.{i}.attn.c_proj"), &[c, c], gpt.bias);
            self.push_affine(&format!("h.{i}.ln_2"), &[c], gpt.bias);
            self.push_affine(&format!("h.{i}.mlp.c_fc"), &[c, 4 * c], gpt.bias);
            self.push_affine(&format!("h.{i}.mlp.c_proj"), &[4 * c, c], gpt.bias);
        }
        self.push_affine("ln_f", &[c], gpt.bias);
        self.push_head(gpt.score_head, gpt.tied_head, v, c);
    }

    fn push_llama(&mut self, llama: &LlamaConfig) {
        let LlamaConfig { vocab_size, width, ffn_width, kv_heads, .. } = *llama;
        let head_width = llama.head_width();
        let (q_width, kv_width) = (llama.heads * head_width, kv_heads * head_width);
        self.push("embed_tokens.weight".into(), &[vocab_size, width]);
        for i in 0..llama.layers {
            self.push(format!("layers.{i}.input_layernorm.weight"), &[width]);
            self.push(format!("layers.{i}.self_attn.q_proj.weight"), &[width, q_width]);
            self.push(format!("layers.{i}.self_attn.k_proj.weight"), &[width, kv_width]);
            self.push(format!("layers.{i}.self_attn.v_proj.weight"), &[width, kv_width]);
            if llama.qk_norm {
                self.push(format!("layers.{i}.self_attn.q_norm.weight"), &[head_width]);
                self.push(format!("layers.{i}.self_attn.k_norm.weight"), &[head_width]);
            }
            self.push(format!("layers.{i}.self_attn.o_proj.weight"), &[q_width, width]);
            self.push(format!("layers.{i}.post_attention_layernorm.weight"), &[width]);
            self.push(format!("layers.{i}.mlp.gate_proj.weight"), &[width, ffn_width]);
            self.push(format!("layers.{i}.mlp.up_proj.weight"), &[width, ffn_width]);
            self.push(format!("layers.{i}.mlp.down_proj.weight"), &[ffn_width, width]);
        }
        self.push("norm.weight".into(), &[width]);
        self.push_head(llama.score_head, llama.tied_head, vocab_size, width);
    }

    /// A head of its own, if the model has one.
    fn push_head(&mut self, scores: bool, tied: bool, vocab_size: usize, width: usize) {
        if scores {
            self.push(SCORE_HEAD.into(), &[1, width]);
        } else if !tied {
            self.push("lm_head.weight".into(), &[vocab_size, width]);
        }
    }

    /// A weight and, if wanted, a bias as long as the weight's last axis.
    fn push_affine(&mut self, name: &str, shape: &[usize], bias: bool) {
        self.push(format!("{name}.weight"), shape);
        if bias {
            self.push(format!("{name}.bias"), &shape[shape.len() - 1..]);
        }
    }

    /// Adds a tensor after the last.
    pub(crate) fn push(&mut self, name: String, shape: &[usize]) {
        let decay = shape.len() >= 2;
        self.tensors.push(TensorSpec { name, shape: shape.to_vec(), offset: self.len(), decay, trainable: true });
    }
}

/// The parameters a run starts from: a pure function of model and seed.
///
/// Transformers: matrices and embeddings from N(0, 0.02²), those that write to the residual stream (`c_proj`, `o_proj`,
/// `down_proj`) from N(0, (0.02 / √(2·layers))²) (Radford et al. 2019); norms at 1, biases and a score's head at 0. Line: as
/// configured.
pub fn initial_parameters(model: &ModelConfig, seed: u64) -> Vec<f32> {
    let layout = Layout::of(model);
    let layers = match model {
        ModelConfig::Line(line) => return vec![line.weight, line.bias],
        ModelConfig::Gpt(gpt) => gpt.layers,
        ModelConfig::Llama(llama) => llama.layers,
    };
    let residual_std = INIT_STD / (2.0 * layers as f64).sqrt();
    let mut parameters = vec![0.0; layout.len()];
    for (tensor_index, tensor) in layout.tensors.iter().enumerate() {
        let values = &mut parameters[tensor.range()];
        let writes_residual = ["c_proj.weight", "o_proj.weight", "down_proj.weight"];
        match tensor.shape.len() {
            1 if tensor.name.ends_with(".bias") => {}
            1 => values.fill(1.0),
            _ if tensor.name == SCORE_HEAD => {}
            _ => {
                let residual = writes_residual.iter().any(|name| tensor.name.ends_with(name));
                let std = if residual { residual_std } else { INIT_STD };
                normal(seed, Stream::Initialisation, tensor_index as u64, std, values);
            }
        }
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Gelu, LineConfig};

    fn gpt() -> GptConfig {
        GptConfig {
            vocab_size: 65,
            context: 64,
            layers: 4,
            heads: 4,
            width: 128,
            bias: false,
            tied_head: true,
            score_head: false,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        }
    }

    fn llama() -> LlamaConfig {
        LlamaConfig {
            vocab_size: 65,
            context: 64,
            layers: 4,
            heads: 4,
            kv_heads: 2,
            width: 128,
            head_width: None,
            ffn_width: 320,
            qk_norm: true,
            tied_head: true,
            score_head: false,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        }
    }

    #[test]
    fn tensors_follow_one_another_without_gaps() {
        let gpt = ModelConfig::Gpt(GptConfig { bias: true, tied_head: false, ..gpt() });
        let llama = ModelConfig::Llama(LlamaConfig { tied_head: false, ..llama() });
        for (model, tensors) in [(gpt, 2 + 4 * 12 + 2 + 1), (llama, 1 + 4 * 11 + 1 + 1)] {
            let layout = Layout::of(&model);
            let mut end = 0;
            for tensor in &layout.tensors {
                assert_eq!(tensor.offset, end, "{}", tensor.name);
                end = tensor.range().end;
            }
            assert_eq!((layout.len(), layout.tensors.len()), (end, tensors));
        }
    }

    /// nanoGPT counts 0.80 M for this shape; PyTorch reports 804,096 with 65 characters.
    #[test]
    fn parameter_count_is_the_reference_models() {
        assert_eq!(Layout::of(&ModelConfig::Gpt(gpt())).len(), 804_096);
    }

    #[test]
    fn initial_parameters_have_their_distributions() {
        for model in [ModelConfig::Gpt(gpt()), ModelConfig::Llama(llama())] {
            let (layout, parameters) = (Layout::of(&model), initial_parameters(&model, 1));
            for tensor in &layout.tensors {
                let values = &parameters[tensor.range()];
                let std = (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
                let expected = match tensor.name.as_str() {
                    name if name.contains("ln_") || name.contains("norm") => 1.0,
                    name if ["c_proj", "o_proj", "down_proj"].iter().any(|part| name.contains(part)) => {
                        0.02 / 8f64.sqrt()
                    }
                    _ => 0.02,
                };
                assert!((std / expected - 1.0).abs() < 0.03, "{}: {std} is not {expected}", tensor.name);
            }
            assert_ne!(parameters, initial_parameters(&model, 2));
            assert_eq!(parameters, initial_parameters(&model, 1));
        }
    }

    #[test]
    fn the_line_starts_where_it_is_told() {
        let model = ModelConfig::Line(LineConfig { weight: 0.35, bias: 0.01 });
        assert_eq!(initial_parameters(&model, 7), [0.35, 0.01]);
    }
}
