//! A model as GGUF: what llama.cpp's `llama` and `gpt2` read.

use std::path::Path;

use super::element::ElementType;
use super::gguf::{self, Metadata, Value};
use super::names::{self, Foreign};
use super::weights::Written;
use super::{Exported, InterchangeError, gguf_vocabulary};
use crate::config::{GptConfig, LlamaConfig, ModelConfig};
use crate::kernels::rotary_frequency;

/// Writes a model to `path`. Matrices are in the form asked for; vectors, which are few, and places in single precision.
///
/// # Errors
/// If llama.cpp has no such model or tokenizer, a number is too large for its form, or the system refuses.
pub fn write_gguf(path: &Path, exported: &Exported<'_>) -> Result<(), InterchangeError> {
    let Exported { model, tokenizer, element, .. } = *exported;
    let refused = |problem| InterchangeError::refused(path, problem);
    let mut metadata = architecture(exported).map_err(refused)?;
    let context = model.context().unwrap_or_default();
    metadata.extend(gguf_vocabulary::metadata(tokenizer, context).map_err(refused)?);

    let mut tensors = Vec::new();
    for (spec, values) in exported.tensors(path)? {
        let Some(foreign) = names::gguf(model, &spec) else {
            return Err(refused(format!("GGUF has no name for tensor {}", spec.name)));
        };
        let single = spec.shape.len() == 1 || spec.name == "wpe.weight";
        tensors.push(Written { foreign, element: if single { ElementType::F32 } else { element }, values });
    }
    let stretches = rotary_stretches(model);
    if !stretches.is_empty() {
        let name = "rope_freqs.weight".into();
        let foreign = Foreign { name, shape: vec![stretches.len()], transposed: false, paired_heads: None };
        tensors.push(Written { foreign, element: ElementType::F32, values: &stretches });
    }
    gguf::write(path, &metadata, &tensors).map_err(InterchangeError::io(path, "write"))
}

/// Sizes under the names of the architecture.
fn architecture(exported: &Exported<'_>) -> Result<Metadata, String> {
    let size = |size: usize| Value::U32(size as u32);
    let (architecture, sizes) = match exported.model {
        ModelConfig::Line(_) => return Err("a straight line is no model that others read".into()),
        ModelConfig::Llama(LlamaConfig { qk_norm: true, .. }) => {
            return Err(
                "model.qk_norm = true: GGUF's llama has no norms of queries and keys, so no one could read it".into()
            );
        }
        ModelConfig::Llama(llama) => (
            "llama",
            vec![
                ("vocab_size", size(llama.vocab_size)),
                ("context_length", size(llama.context)),
                ("embedding_length", size(llama.width)),
                ("block_count", size(llama.layers)),
                ("feed_forward_length", size(llama.ffn_width)),
                ("attention.head_count", size(llama.heads)),
                ("attention.head_count_kv", size(llama.kv_heads)),
                ("attention.key_length", size(llama.head_width())),
                ("attention.value_length", size(llama.head_width())),
                ("attention.layer_norm_rms_epsilon", Value::F32(llama.norm_epsilon as f32)),
                ("rope.dimension_count", size(llama.head_width())),
                ("rope.freq_base", Value::F32(llama.rope_theta as f32)),
            ],
        ),
        ModelConfig::Gpt(GptConfig { vocab_size, context, layers, heads, width, norm_epsilon, .. }) => (
            "gpt2",
            vec![
                ("vocab_size", size(*vocab_size)),
                ("context_length", size(*context)),
                ("embedding_length", size(*width)),
                ("block_count", size(*layers)),
                ("feed_forward_length", size(4 * width)),
                ("attention.head_count", size(*heads)),
                ("attention.layer_norm_epsilon", Value::F32(*norm_epsilon as f32)),
            ],
        ),
    };
    // llama.cpp's numbers: all in single precision, or mostly in a shorter form.
    let file_type = match exported.element {
        ElementType::F32 => 0,
        ElementType::F16 => 1,
        ElementType::Bf16 => 32,
    };
    let general = [
        ("general.architecture", Value::Text(architecture.into())),
        ("general.name", Value::Text(exported.name.into())),
        ("general.alignment", Value::U32(gguf::ALIGNMENT as u32)),
        ("general.file_type", Value::U32(file_type)),
    ];
    let general = general.map(|(key, value)| (key.to_string(), value));
    let sizes = sizes.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
    Ok(general.into_iter().chain(sizes).collect())
}

/// By what each pair's wave length is multiplied; empty where none is.
fn rotary_stretches(model: &ModelConfig) -> Vec<f32> {
    let ModelConfig::Llama(llama) = model else { return Vec::new() };
    let Some(scaling) = llama.rope_scaling else { return Vec::new() };
    let half = llama.head_width() / 2;
    (0..half).map(|pair| scaling.stretch(rotary_frequency(pair, half, llama.rope_theta)) as f32).collect()
}
