//! The parameters that a run begins with, taken from another model.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lockstep_coordinator::config::Initial;
use lockstep_model::checkpoint;
use lockstep_model::config::{Gelu, GptConfig, LlamaConfig, ModelConfig};
use lockstep_model::digest::{hex, vector_sha256};
use lockstep_model::interchange::{self, Imported};
use lockstep_model::layout::Layout;
use lockstep_model::tokenizer::Tokenizer;
use toml::Value;

use super::inspect;

/// Reads the parameters of the run, checkpoint or Hugging Face folder at `path`, for `model`, whose text becomes tokens by
/// `tokenizer`.
///
/// # Errors
/// If there are none, or they belong to another model or tokenizer.
pub(super) fn read(path: &Path, model: &ModelConfig, tokenizer: &Tokenizer) -> anyhow::Result<Initial> {
    let (found, parameters, its_tokenizer, known_sha256) = if interchange::is_folder(path) {
        let Imported { model, parameters, tokenizer } = interchange::read_folder(path)?;
        (model, parameters, Some(tokenizer), None)
    } else {
        let (manifest, parameters) = checkpoint::read_parameters(&inspect::locate(path)?)?;
        // With adapters, the checkpoint's own digest is that of the adapters.
        let sha256 = Some(manifest.params_sha256).filter(|_| manifest.adapters.is_none());
        (manifest.model, parameters, manifest.tokenizer, sha256)
    };
    let shown = path.display();
    if let Some((key, theirs, ours)) = first_difference(&found, model)? {
        bail!(
            "init = \"{shown}\": its model has {key} = {theirs}, and the one that the recipe describes has {ours}; change [model] \
             and the tokenizer to what it has, or leave init out"
        );
    }
    if its_tokenizer.is_none_or(|its| !same_tokens(&its, tokenizer)) {
        bail!(
            "init = \"{shown}\": its model reads other tokens than the recipe's; set tokenizer.file to its tokenizer.json, and \
             prepare corpora with that"
        );
    }
    let (parameters, known_sha256) = match found.has_score_head() == model.has_score_head() {
        true => (parameters, known_sha256),
        false => (with_score_head(&Layout::of(&found), &parameters, model), None),
    };
    let sha256 = known_sha256.unwrap_or_else(|| hex(&vector_sha256(&parameters)));
    Ok(Initial { parameters: Arc::new(parameters), sha256 })
}

/// The parameters of a model that scores texts, out of those of one that predicts tokens: as these, where they have the same
/// names. The new head knows nothing: it is 0.
fn with_score_head(found: &Layout, parameters: &[f32], model: &ModelConfig) -> Vec<f32> {
    let layout = Layout::of(model);
    let mut scoring = vec![0.0; layout.len()];
    for tensor in &layout.tensors {
        if let Some(same) = found.tensors.iter().find(|found| found.name == tensor.name) {
            scoring[tensor.range()].copy_from_slice(&parameters[same.range()]);
        }
    }
    scoring
}

/// Model and tokenizer of the run, checkpoint or Hugging Face folder at `path`, without its parameters.
fn described(path: &Path) -> anyhow::Result<(ModelConfig, Option<Tokenizer>)> {
    if interchange::is_folder(path) {
        let (model, tokenizer) = interchange::describe_folder(path)?;
        return Ok((model, Some(tokenizer)));
    }
    let manifest = checkpoint::read_manifest(&inspect::locate(path)?)?;
    Ok((manifest.model, manifest.tokenizer))
}

/// The tokenizer of the run, checkpoint or Hugging Face folder at `path`.
///
/// # Errors
/// If there is none.
pub(super) fn tokenizer(path: &Path) -> anyhow::Result<Tokenizer> {
    let (_, tokenizer) = described(path)?;
    tokenizer.with_context(|| format!("init = \"{}\": the run's model reads no text", path.display()))
}

/// The keys of `[model]`, as overrides of a recipe, for the model of the run, checkpoint or Hugging Face folder at `path`.
///
/// # Errors
/// If there is none.
pub(super) fn model_overrides(path: &Path) -> anyhow::Result<Vec<String>> {
    let (model, _) = described(path)?;
    Ok(model_keys(&model)?.into_iter().map(|(key, value)| format!("model.{key}={value}")).collect())
}

/// The keys of `[model]` that describe a Transformer.
///
/// # Errors
/// If it is a straight line.
pub(super) fn model_keys(model: &ModelConfig) -> anyhow::Result<Vec<(&'static str, Value)>> {
    Ok(match model {
        ModelConfig::Gpt(gpt) => vec![
            ("kind", "gpt".into()),
            ("layers", size(gpt.layers)),
            ("heads", size(gpt.heads)),
            ("width", size(gpt.width)),
            ("context", size(gpt.context)),
            ("bias", gpt.bias.into()),
            ("tied_head", gpt.tied_head.into()),
            ("gelu", if gpt.gelu == Gelu::Tanh { "tanh" } else { "exact" }.into()),
            ("norm_epsilon", gpt.norm_epsilon.into()),
        ],
        ModelConfig::Llama(llama) => vec![
            ("kind", "llama".into()),
            ("layers", size(llama.layers)),
            ("heads", size(llama.heads)),
            ("kv_heads", size(llama.kv_heads)),
            ("width", size(llama.width)),
            ("head_width", size(llama.head_width.unwrap_or(0))),
            ("ffn_width", size(llama.ffn_width)),
            ("context", size(llama.context)),
            ("qk_norm", llama.qk_norm.into()),
            ("tied_head", llama.tied_head.into()),
            ("rope_theta", llama.rope_theta.into()),
            (
                "rope_scaling",
                llama
                    .rope_scaling
                    .map_or_else(Vec::new, |scaling| {
                        let of = [
                            scaling.factor,
                            scaling.low_freq_factor,
                            scaling.high_freq_factor,
                            scaling.original_context,
                        ];
                        of.map(Value::from).to_vec()
                    })
                    .into(),
            ),
            ("norm_epsilon", llama.norm_epsilon.into()),
        ],
        ModelConfig::Line(_) => anyhow::bail!("a straight line reads no text"),
    })
}

/// A size as a recipe has it.
pub(super) fn size(size: usize) -> Value {
    i64::try_from(size).unwrap_or(i64::MAX).into()
}

/// The first setting in which two models differ, dropout and the length of what a Llama reads excepted, on which no
/// parameter depends; and the head, where a score takes its place.
fn first_difference(found: &ModelConfig, asked: &ModelConfig) -> anyhow::Result<Option<(String, String, String)>> {
    let scores = asked.has_score_head();
    let settings = |model: &ModelConfig| {
        let model = match model.clone() {
            ModelConfig::Gpt(gpt) => ModelConfig::Gpt(GptConfig {
                dropout: 0.0,
                tied_head: gpt.tied_head || scores,
                score_head: gpt.score_head || scores,
                ..gpt
            }),
            ModelConfig::Llama(llama) => ModelConfig::Llama(LlamaConfig {
                dropout: 0.0,
                context: 0,
                head_width: Some(llama.head_width()),
                tied_head: llama.tied_head || scores,
                score_head: llama.score_head || scores,
                ..llama
            }),
            line => line,
        };
        Ok::<_, serde_json::Error>(serde_json::to_value(model)?.as_object().cloned().unwrap_or_default())
    };
    let (found, asked) = (settings(found)?, settings(asked)?);
    let word = |value: Option<&serde_json::Value>| value.map_or("nothing".into(), serde_json::Value::to_string);
    let keys = ["kind"].into_iter().chain(asked.keys().chain(found.keys()).map(String::as_str));
    let differs = |key: &&str| found.get(*key) != asked.get(*key);
    let mut different = keys.filter(differs);
    Ok(different.next().map(|key| (key.to_string(), word(found.get(key)), word(asked.get(key)))))
}

/// Whether the same number means the same text: an imported tokenizer may be read from its file alone.
pub(super) fn same_tokens(a: &Tokenizer, b: &Tokenizer) -> bool {
    let library = |tokenizer: &Tokenizer| match tokenizer {
        Tokenizer::Hf(hf) => Some(hf.files().tokenizer_json.clone()),
        Tokenizer::Bpe(bpe) => Some(bpe.to_json().to_string()),
        Tokenizer::Bytes | Tokenizer::Chars { .. } => None,
    };
    a == b || library(a).is_some_and(|json| library(b) == Some(json))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama(change: impl FnOnce(&mut LlamaConfig)) -> ModelConfig {
        let mut llama = LlamaConfig {
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
            rope_theta: 1e4,
            rope_scaling: None,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        change(&mut llama);
        ModelConfig::Llama(llama)
    }

    #[test]
    fn what_parameters_depend_on_must_be_the_same() {
        let difference = |change: fn(&mut LlamaConfig)| first_difference(&llama(|_| ()), &llama(change)).unwrap();
        assert_eq!(difference(|llama| (llama.dropout, llama.context, llama.head_width) = (0.1, 8, Some(32))), None);
        let (key, found, asked) = difference(|llama| llama.rope_theta = 5e5).unwrap();
        assert_eq!((&*key, &*found, &*asked), ("rope_theta", "10000.0", "500000.0"));
        assert_eq!(difference(|llama| llama.head_width = Some(34)).unwrap().0, "head_width");
    }
}
