//! `config.json` of Hugging Face's `transformers`: a model's shape in its words.

use serde_json::{Map, Value, json};

use super::ElementType;
use crate::config::{Gelu, GptConfig, LlamaConfig, ModelConfig, RopeScaling};
use crate::hf_tokenizer::SpecialTokens;

/// The keys of a `config.json`.
#[derive(Debug)]
pub(super) struct HfConfig(Map<String, Value>);

impl HfConfig {
    /// Reads the text of the file.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        serde_json::from_str(text).map(Self).map_err(|error| format!("is no JSON object: {error}"))
    }

    /// The model; an error names the key that makes it another than those here.
    pub(super) fn model(&self) -> Result<ModelConfig, String> {
        if let Some(quantization) = self.get("quantization_config") {
            return Err(format!(
                "quantization_config = {quantization}: only plain f32, bf16 and f16 parameters are read; import the model \
                 that this one was quantized from"
            ));
        }
        let architecture =
            self.get("architectures").and_then(|names| names[0].as_str()).or_else(|| self.text("model_type"));
        match architecture {
            Some("LlamaForCausalLM" | "llama") => self.llama().map(ModelConfig::Llama),
            Some("GPT2LMHeadModel" | "gpt2") => self.gpt().map(ModelConfig::Gpt),
            Some("LlamaForSequenceClassification") => {
                self.one_label()?;
                self.llama().map(|llama| ModelConfig::Llama(LlamaConfig { score_head: true, ..llama }))
            }
            Some("GPT2ForSequenceClassification") => {
                self.one_label()?;
                self.gpt().map(|gpt| ModelConfig::Gpt(GptConfig { score_head: true, ..gpt }))
            }
            other => Err(format!(
                "architectures = {}: only LlamaForCausalLM, GPT2LMHeadModel and, of one label, LlamaForSequenceClassification and \
                 GPT2ForSequenceClassification can be imported",
                other.map_or("nothing".into(), |name| format!("{name:?}"))
            )),
        }
    }

    /// Refuses a classifier that is no reward model: it has more labels than one.
    fn one_label(&self) -> Result<(), String> {
        // Where nothing is said, there are two.
        let labels = self.get("id2label").and_then(Value::as_object).map_or(2, Map::len);
        match labels {
            1 => Ok(()),
            labels => {
                Err(format!("id2label: has {labels} labels (2 where it is left out), and a reward model has one"))
            }
        }
    }

    /// Numbers of special tokens by key, such as `eos_token_id`, which may be a list.
    pub(super) fn tokens(&self, key: &str) -> Vec<u32> {
        token_numbers(self.0.get(key))
    }

    fn llama(&self) -> Result<LlamaConfig, String> {
        self.only("hidden_act", &json!("silu"))?;
        self.only("attention_bias", &json!(false))?;
        self.only("mlp_bias", &json!(false))?;
        self.only("partial_rotary_factor", &json!(1.0))?;
        let (width, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        let kv_heads = self.size_or("num_key_value_heads", heads)?;
        let head_width = match self.get("head_dim") {
            None if !width.is_multiple_of(heads) => {
                return Err(format!("num_attention_heads = {heads}: does not divide hidden_size = {width}"));
            }
            None => width / heads,
            Some(_) => self.size("head_dim")?,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("num_key_value_heads = {kv_heads}: does not divide num_attention_heads = {heads}"));
        }
        if !head_width.is_multiple_of(2) {
            return Err(format!("head_dim = {head_width}: rotary positions turn pairs of numbers, so it must be even"));
        }
        let (rope_theta, rope_scaling) = self.rope()?;
        Ok(LlamaConfig {
            vocab_size: self.size("vocab_size")?,
            context: self.size_or("max_position_embeddings", 2048)?,
            layers: self.size("num_hidden_layers")?,
            heads,
            kv_heads,
            width,
            head_width: (head_width * heads != width).then_some(head_width),
            ffn_width: self.size("intermediate_size")?,
            qk_norm: false,
            tied_head: self.yes_or_no("tie_word_embeddings", false)?,
            score_head: false,
            rope_theta,
            rope_scaling,
            norm_epsilon: self.number("rms_norm_eps", 1e-6)?,
            dropout: 0.0,
        })
    }

    /// Base and scaling of the rotation: newer releases write all of it as `rope_parameters`.
    fn rope(&self) -> Result<(f64, Option<RopeScaling>), String> {
        let (key, rope) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(rope), _) => ("rope_parameters", rope),
            (None, Some(rope)) => ("rope_scaling", rope),
            (None, None) => return Ok((self.number("rope_theta", 10_000.0)?, None)),
        };
        let number = |name: &str| {
            let number = rope[name].as_f64().filter(|number| *number > 0.0);
            number.ok_or_else(|| format!("{key}.{name} = {}: must be a number above 0", rope[name]))
        };
        let theta = match rope.get("rope_theta") {
            Some(_) => number("rope_theta")?,
            None => self.number("rope_theta", 10_000.0)?,
        };
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        match kind {
            "default" => Ok((theta, None)),
            "llama3" => {
                let scaling = RopeScaling {
                    factor: number("factor")?,
                    low_freq_factor: number("low_freq_factor")?,
                    high_freq_factor: number("high_freq_factor")?,
                    original_context: number("original_max_position_embeddings")?,
                };
                match scaling.factor >= 1.0 && scaling.high_freq_factor > scaling.low_freq_factor {
                    true => Ok((theta, Some(scaling))),
                    false => Err(format!(
                        "{key} = {rope}: factor must be at least 1, and high_freq_factor above low_freq_factor"
                    )),
                }
            }
            other => Err(format!("{key}.rope_type = {other:?}: only \"default\" and \"llama3\" can be imported")),
        }
    }

    fn gpt(&self) -> Result<GptConfig, String> {
        self.only("scale_attn_weights", &json!(true))?;
        self.only("scale_attn_by_inverse_layer_idx", &json!(false))?;
        self.only("add_cross_attention", &json!(false))?;
        let (width, heads) = (self.size("n_embd")?, self.size("n_head")?);
        if !width.is_multiple_of(heads) {
            return Err(format!("n_head = {heads}: does not divide n_embd = {width}"));
        }
        self.only("n_inner", &json!(4 * width))?;
        let gelu = match self.text("activation_function").unwrap_or("gelu_new") {
            "gelu_new" | "gelu_pytorch_tanh" => Gelu::Tanh,
            "gelu" => Gelu::Exact,
            other => {
                return Err(format!("activation_function = {other:?}: only \"gelu_new\" and \"gelu\" can be imported"));
            }
        };
        Ok(GptConfig {
            vocab_size: self.size("vocab_size")?,
            context: self.size_or("n_positions", 1024)?,
            layers: self.size("n_layer")?,
            heads,
            width,
            bias: true,
            tied_head: self.yes_or_no("tie_word_embeddings", true)?,
            score_head: false,
            gelu,
            norm_epsilon: self.number("layer_norm_epsilon", 1e-5)?,
            dropout: 0.0,
        })
    }

    /// The value of a key that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// Refuses any value but one, which the key has where it is left out.
    fn only(&self, key: &str, wanted: &Value) -> Result<(), String> {
        match self.get(key) {
            Some(value) if value != wanted && value.as_f64().is_none_or(|value| Some(value) != wanted.as_f64()) => {
                Err(format!("{key} = {value}: only {wanted} can be imported"))
            }
            _ => Ok(()),
        }
    }

    fn size(&self, key: &str) -> Result<usize, String> {
        const MOST: u64 = 1 << 31;
        let value = self.0.get(key);
        let size = value.and_then(Value::as_u64).filter(|size| (1..MOST).contains(size));
        let found = || value.map_or("nothing".into(), Value::to_string);
        size.map(|size| size as usize)
            .ok_or_else(|| format!("{key} = {}: must be a whole number of at least 1", found()))
    }

    fn size_or(&self, key: &str, fallback: usize) -> Result<usize, String> {
        self.get(key).map_or(Ok(fallback), |_| self.size(key))
    }

    fn number(&self, key: &str, fallback: f64) -> Result<f64, String> {
        let Some(value) = self.get(key) else { return Ok(fallback) };
        value
            .as_f64()
            .filter(|number| *number > 0.0)
            .ok_or_else(|| format!("{key} = {value}: must be a number above 0"))
    }

    fn yes_or_no(&self, key: &str, fallback: bool) -> Result<bool, String> {
        let Some(value) = self.get(key) else { return Ok(fallback) };
        value.as_bool().ok_or_else(|| format!("{key} = {value}: must be true or false"))
    }
}

/// One number or a list.
pub(super) fn token_numbers(value: Option<&Value>) -> Vec<u32> {
    let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
    match value {
        Some(Value::Array(values)) => values.iter().filter_map(number).collect(),
        Some(value) => number(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The text of the file for a model; an error says why `transformers` has none like it.
pub(super) fn write(model: &ModelConfig, special: &SpecialTokens, element: ElementType) -> Result<String, String> {
    let mut config = match model {
        ModelConfig::Llama(llama) => self::llama(llama)?,
        ModelConfig::Gpt(gpt) => self::gpt(gpt),
        ModelConfig::Line(_) => return Err("a straight line is no model that others read".into()),
    };
    let end = match &special.end[..] {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    config["bos_token_id"] = json!(special.begin);
    config["eos_token_id"] = end;
    config["pad_token_id"] = json!(special.padding);
    config["torch_dtype"] = json!(element.torch_name());
    config["use_cache"] = json!(true);
    if model.has_score_head() {
        let name = if matches!(model, ModelConfig::Llama(_)) { "Llama" } else { "GPT2" };
        config["architectures"] = json!([format!("{name}ForSequenceClassification")]);
        config["id2label"] = json!({ "0": "SCORE" });
        config["label2id"] = json!({ "SCORE": 0 });
    }
    Ok(format!("{config:#}\n"))
}

fn llama(llama: &LlamaConfig) -> Result<Value, String> {
    if llama.qk_norm {
        return Err("model.qk_norm = true: a Llama has no norms of queries and keys, so no one could read it".into());
    }
    let rope = match llama.rope_scaling {
        None => json!({ "rope_type": "default", "rope_theta": llama.rope_theta }),
        Some(scaling) => json!({
            "rope_type": "llama3",
            "rope_theta": llama.rope_theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context as u64,
        }),
    };
    let older = |rope: &Value| {
        let mut rope = rope.as_object().cloned().unwrap_or_default();
        rope.remove("rope_theta");
        Value::from(rope)
    };
    Ok(json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama.vocab_size,
        "hidden_size": llama.width,
        "intermediate_size": llama.ffn_width,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "head_dim": llama.head_width(),
        "hidden_act": "silu",
        "max_position_embeddings": llama.context,
        "rms_norm_eps": llama.norm_epsilon,
        "tie_word_embeddings": llama.tied_head,
        "attention_bias": false,
        "mlp_bias": false,
        "attention_dropout": llama.dropout,
        "initializer_range": 0.02,
        "rope_theta": llama.rope_theta,
        "rope_scaling": llama.rope_scaling.map(|_| older(&rope)),
        "rope_parameters": rope,
    }))
}

fn gpt(gpt: &GptConfig) -> Value {
    json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": gpt.vocab_size,
        "n_positions": gpt.context,
        "n_embd": gpt.width,
        "n_layer": gpt.layers,
        "n_head": gpt.heads,
        "n_inner": null,
        "activation_function": match gpt.gelu {
            Gelu::Exact => "gelu",
            Gelu::Tanh => "gelu_new",
        },
        "layer_norm_epsilon": gpt.norm_epsilon,
        "tie_word_embeddings": gpt.tied_head,
        "attn_pdrop": gpt.dropout,
        "embd_pdrop": gpt.dropout,
        "resid_pdrop": gpt.dropout,
        "initializer_range": 0.02,
        "scale_attn_weights": true,
    })
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn small() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": null, "hidden_act": "silu"
        })
    }

    fn with(mut config: Value, key: &str, value: Value) -> Value {
        config[key] = value;
        config
    }

    fn read(config: &Value) -> Result<ModelConfig, String> {
        HfConfig::parse(&config.to_string()).unwrap().model()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192 });
        let gpt = json!({ "model_type": "gpt2", "vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3 });
        for config in [small(), with(small(), "rope_scaling", llama3), with(small(), "head_dim", json!(32)), gpt] {
            let model = read(&config).unwrap();
            let special = SpecialTokens { end: vec![1, 2], ..SpecialTokens::default() };
            let written = HfConfig::parse(&write(&model, &special, ElementType::F32).unwrap()).unwrap();
            assert_eq!(written.model().unwrap(), model);
            assert_eq!(written.tokens("eos_token_id"), [1, 2]);
        }
    }

    #[test]
    fn both_ways_to_write_the_rotation_are_read() {
        let newer = json!({ "rope_type": "default", "rope_theta": 77.0 });
        let ModelConfig::Llama(llama) = read(&with(small(), "rope_parameters", newer)).unwrap() else { panic!() };
        assert_eq!((llama.rope_theta, llama.rope_scaling), (77.0, None));
        let ModelConfig::Llama(llama) = read(&small()).unwrap() else { panic!() };
        assert_eq!((llama.rope_theta, llama.head_width(), llama.tied_head), (500_000.0, 16, false));
    }

    #[test]
    fn what_would_be_another_model_is_refused_by_name() {
        let refused = [
            with(small(), "architectures", json!(["MistralForCausalLM"])),
            with(small(), "attention_bias", json!(true)),
            with(small(), "hidden_act", json!("gelu")),
            with(small(), "rope_scaling", json!({ "type": "yarn", "factor": 2.0 })),
            with(small(), "rope_scaling", json!({ "rope_type": "llama3", "factor": 2.0 })),
            with(small(), "num_key_value_heads", json!(3)),
            with(small(), "hidden_size", json!(-1)),
            with(small(), "quantization_config", json!({ "bits": 4 })),
            json!({ "model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_inner": 30 }),
        ];
        let said: Vec<String> = refused.iter().map(|config| read(config).unwrap_err()).collect();
        expect![[r#"
            architectures = "MistralForCausalLM": only LlamaForCausalLM, GPT2LMHeadModel and, of one label, LlamaForSequenceClassification and GPT2ForSequenceClassification can be imported
            attention_bias = true: only false can be imported
            hidden_act = "gelu": only "silu" can be imported
            rope_scaling.rope_type = "yarn": only "default" and "llama3" can be imported
            rope_scaling.low_freq_factor = null: must be a number above 0
            num_key_value_heads = 3: does not divide num_attention_heads = 4
            hidden_size = -1: must be a whole number of at least 1
            quantization_config = {"bits":4}: only plain f32, bf16 and f16 parameters are read; import the model that this one was quantized from
            n_inner = 30: only 32 can be imported"#]]
        .assert_eq(&said.join("\n"));
    }
}
