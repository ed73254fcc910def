//! Which tensor of ours is which of theirs.
//!
//! Ours are named as in `transformers`, without the prefix. GPT-2's matrices lie there as here, [in, out]; Llama's the other
//! way round. GGUF has names of its own, and everything [out, in].

use crate::config::{LlamaConfig, ModelConfig};
use crate::layout::{SCORE_HEAD, TensorSpec};

/// A tensor of the layout as another form has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    /// Its name there.
    pub(super) name: String,
    /// Its sizes there, outermost first.
    pub(super) shape: Vec<usize>,
    /// Whether rows and columns change places.
    pub(super) transposed: bool,
    /// Heads within which rows change from halves to pairs.
    pub(super) paired_heads: Option<usize>,
}

/// What stands before the names of all tensors but a head's.
pub(super) fn prefix(model: &ModelConfig) -> &'static str {
    match model {
        ModelConfig::Llama(_) => "model.",
        _ => "transformer.",
    }
}

/// Whether a tensor of a file, its name without the prefix, is none of the model's parameters: masks and tables that older
/// releases saved.
pub(super) fn is_buffer(name: &str) -> bool {
    let in_layer = name.starts_with("h.") || name.starts_with("layers.");
    in_layer
        && [".attn.bias", ".attn.masked_bias", ".self_attn.rotary_emb.inv_freq"].iter().any(|end| name.ends_with(end))
}

/// A tensor as `transformers` has it.
pub(super) fn hf(model: &ModelConfig, tensor: &TensorSpec) -> Foreign {
    let head = tensor.name == "lm_head.weight" || tensor.name == SCORE_HEAD;
    let name = if head { tensor.name.clone() } else { format!("{}{}", prefix(model), tensor.name) };
    let transposed = matches!(model, ModelConfig::Llama(_)) && tensor.is_hidden_matrix();
    Foreign { name, shape: shape(tensor, transposed), transposed, paired_heads: None }
}

/// A tensor as GGUF has it; `None` where that has none like it.
pub(super) fn gguf(model: &ModelConfig, tensor: &TensorSpec) -> Option<Foreign> {
    let transposed = tensor.is_hidden_matrix();
    let paired_heads = match model {
        ModelConfig::Llama(LlamaConfig { heads, kv_heads, .. }) => match tensor.name.rsplit('.').nth(1) {
            Some("q_proj") => Some(*heads),
            Some("k_proj") => Some(*kv_heads),
            _ => None,
        },
        _ => None,
    };
    let name = gguf_name(&tensor.name)?;
    Some(Foreign { name, shape: shape(tensor, transposed), transposed, paired_heads })
}

fn gguf_name(name: &str) -> Option<String> {
    let (module, part) = name.rsplit_once('.')?;
    let known = |table: &[(&str, &'static str)], name: &str| {
        table.iter().find(|(ours, _)| *ours == name).map(|(_, theirs)| *theirs)
    };
    let outer = [
        ("wte", "token_embd"),
        ("wpe", "position_embd"),
        ("ln_f", "output_norm"),
        ("embed_tokens", "token_embd"),
        ("norm", "output_norm"),
        ("lm_head", "output"),
    ];
    let inner = [
        ("ln_1", "attn_norm"),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("ln_2", "ffn_norm"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    match module.strip_prefix("h.").or_else(|| module.strip_prefix("layers.")) {
        None => Some(format!("{}.{part}", known(&outer, module)?)),
        Some(rest) => {
            let (layer, module) = rest.split_once('.')?;
            Some(format!("blk.{layer}.{}.{part}", known(&inner, module)?))
        }
    }
}

fn shape(tensor: &TensorSpec, transposed: bool) -> Vec<usize> {
    let mut shape = tensor.shape.clone();
    if transposed {
        shape.reverse();
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Gelu, GptConfig};
    use crate::layout::Layout;

    fn models() -> [ModelConfig; 2] {
        let gpt = GptConfig {
            vocab_size: 9,
            context: 4,
            layers: 2,
            heads: 2,
            width: 8,
            bias: true,
            tied_head: false,
            score_head: false,
            gelu: Gelu::Tanh,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        let llama = LlamaConfig {
            vocab_size: 9,
            context: 4,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            width: 8,
            head_width: Some(6),
            ffn_width: 12,
            qk_norm: false,
            tied_head: false,
            score_head: false,
            rope_theta: 1e4,
            rope_scaling: None,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        [ModelConfig::Gpt(gpt), ModelConfig::Llama(llama)]
    }

    #[test]
    fn every_tensor_has_a_name_of_its_own_elsewhere() {
        for model in models() {
            let layout = Layout::of(&model);
            for foreign in [
                layout.tensors.iter().map(|tensor| hf(&model, tensor)).collect::<Vec<_>>(),
                layout.tensors.iter().map(|tensor| gguf(&model, tensor).unwrap()).collect(),
            ] {
                let names: std::collections::BTreeSet<_> = foreign.iter().map(|tensor| &tensor.name).collect();
                assert_eq!(names.len(), layout.tensors.len());
            }
        }
    }

    #[test]
    fn llamas_queries_are_turned_in_pairs_in_gguf() {
        let [_, llama] = models();
        let layout = Layout::of(&llama);
        let find = |name: &str| layout.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let q = gguf(&llama, find("layers.1.self_attn.q_proj.weight")).unwrap();
        let expected = ("blk.1.attn_q.weight", vec![24, 8], true, Some(4));
        assert_eq!((q.name.as_str(), q.shape, q.transposed, q.paired_heads), expected);
        let k = hf(&llama, find("layers.0.self_attn.k_proj.weight"));
        assert_eq!((k.name.as_str(), k.shape), ("model.layers.0.self_attn.k_proj.weight", vec![12, 8]));
    }

    #[test]
    fn masks_are_told_from_biases() {
        for buffer in ["h.0.attn.bias", "h.11.attn.masked_bias", "layers.3.self_attn.rotary_emb.inv_freq"] {
            assert!(is_buffer(buffer));
        }
        for parameter in ["h.0.attn.c_attn.bias", "ln_f.bias", "h.0.ln_1.bias", "attn.bias"] {
            assert!(!is_buffer(parameter));
        }
    }
}
