//! Hugging Face folders: a model, its tokenizer, and what else belongs to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::SafeTensors;
use serde_json::{Value, json};

use super::element::ElementType;
use super::hf_config::{self, HfConfig};
use super::weights::{self, Written};
use super::{Exported, InterchangeError, hf_tokenizer_files, names};
use crate::config::ModelConfig;
use crate::layout::Layout;
use crate::mapping::Mapping;
use crate::tokenizer::Tokenizer;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The head's name, and those under which the embedding may stand for it.
const HEAD: &str = "lm_head.weight";
const EMBEDDINGS: [&str; 2] = ["embed_tokens.weight", "wte.weight"];

/// A model that others trained.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Its shape.
    pub model: ModelConfig,
    /// Its parameters, flat in layout order.
    pub parameters: Vec<f32>,
    /// How text becomes tokens.
    pub tokenizer: Tokenizer,
}

/// Whether this is a folder of a model, and no run of ours.
pub fn is_folder(path: &Path) -> bool {
    path.join(CONFIG).is_file()
}

/// Reads a folder as `save_pretrained` of `transformers` leaves it.
///
/// # Errors
/// Names the file, and the key or tensor, that is missing, or that no model here has.
pub fn read_folder(folder: &Path) -> Result<Imported, InterchangeError> {
    let (model, tokenizer) = describe_folder(folder)?;
    let parameters = read_parameters(folder, &model)?;
    Ok(Imported { model, parameters, tokenizer })
}

/// Reads what model such a folder holds, and its tokenizer, without the parameters.
///
/// # Errors
/// As [`read_folder`]'s, but for tensors.
pub fn describe_folder(folder: &Path) -> Result<(ModelConfig, Tokenizer), InterchangeError> {
    let path = folder.join(CONFIG);
    let Some(text) = hf_tokenizer_files::read_text(&path)? else {
        let problem = "is not there; give the folder of a model as transformers saves it";
        return Err(InterchangeError::refused(&path, problem));
    };
    let refused = |problem| InterchangeError::refused(&path, problem);
    let config = HfConfig::parse(&text).map_err(refused)?;
    let model = config.model().map_err(refused)?;
    let tokenizer = hf_tokenizer_files::read(folder, &config, model.vocab_size())?;
    Ok((model, tokenizer))
}

/// A file of tensors in memory, as it is looked at.
struct Shard {
    path: PathBuf,
    mapping: Mapping,
}

fn read_parameters(folder: &Path, model: &ModelConfig) -> Result<Vec<f32>, InterchangeError> {
    let shards = open_shards(folder)?;
    let prefix = names::prefix(model);
    // By name without the prefix: the name in the file, which file it is, and the tensor.
    let mut found = BTreeMap::new();
    for Shard { path, mapping } in &shards {
        let refused = |problem: String| InterchangeError::refused(path, problem);
        let file = SafeTensors::deserialize(mapping.bytes())
            .map_err(|error| refused(format!("is no safetensors file, or a damaged one: {error}")))?;
        for (name, view) in file.tensors() {
            let short = name.strip_prefix(prefix).unwrap_or(&name).to_string();
            if names::is_buffer(&short) {
                continue;
            }
            if found.insert(short, (name.clone(), path, view)).is_some() {
                return Err(refused(format!(
                    "tensor {name} is there twice, with and without {prefix:?}, or in two files"
                )));
            }
        }
    }

    let layout = Layout::of(model);
    let place = shards.first().map_or(folder, |shard| &shard.path);
    let mut parameters = vec![0.0; layout.len()];
    for tensor in &layout.tensors {
        let foreign = names::hf(model, tensor);
        let is_embedding = EMBEDDINGS.contains(&tensor.name.as_str());
        let tied = is_embedding && !layout.tensors.iter().any(|tensor| tensor.name == HEAD);
        let head = if tied { found.remove(HEAD) } else { None };
        let (name, path, view) = match (found.remove(&tensor.name), head) {
            (Some(embedding), Some(head)) if embedding.2.data() != head.2.data() => {
                let problem = format!(
                    "{} and {HEAD} differ, and {CONFIG} says tie_word_embeddings = true; correct whichever is wrong",
                    embedding.0
                );
                return Err(InterchangeError::refused(head.1, problem));
            }
            (Some(found), _) | (None, Some(found)) => found,
            (None, None) => {
                let other = if tied { format!(" (nor {HEAD}, which would do)") } else { String::new() };
                let problem =
                    format!("tensor {} is missing{other}; {CONFIG} describes another model than is here", foreign.name);
                return Err(InterchangeError::refused(place, problem));
            }
        };
        let refused = |problem: String| InterchangeError::refused(path, problem);
        if view.shape() != foreign.shape {
            let (shape, wanted) = (view.shape(), &foreign.shape);
            let problem =
                format!("tensor {name} has shape {shape:?}, and {wanted:?} in a model as {CONFIG} describes it");
            return Err(refused(problem));
        }
        let Some(element) = ElementType::of(view.dtype()) else {
            return Err(refused(format!("tensor {name} is of type {:?}; F32, BF16 and F16 are read", view.dtype())));
        };
        weights::read(&view, element, foreign.transposed, &mut parameters[tensor.range()]);
    }
    if let Some((name, path, _)) = found.into_values().next() {
        let problem =
            format!("tensor {name} belongs to no model that {CONFIG} describes; a part of the model would be lost");
        return Err(InterchangeError::refused(path, problem));
    }
    Ok(parameters)
}

/// The files of tensors: one, or those that an index names.
fn open_shards(folder: &Path) -> Result<Vec<Shard>, InterchangeError> {
    let index = folder.join(INDEX);
    let files: BTreeSet<String> = match hf_tokenizer_files::read_text(&index)? {
        None => [SINGLE.to_string()].into(),
        Some(text) => {
            let json: Value = serde_json::from_str(&text)
                .map_err(|error| InterchangeError::refused(&index, format!("is no JSON: {error}")))?;
            let map = json["weight_map"].as_object().into_iter().flatten();
            let names: BTreeSet<String> = map.filter_map(|(_, file)| file.as_str().map(str::to_owned)).collect();
            let unfit = |name: &&String| name.is_empty() || name.contains(['/', '\\']);
            if let Some(name) = names.iter().find(unfit) {
                return Err(InterchangeError::refused(&index, format!("names a file elsewhere, {name:?}")));
            }
            if names.is_empty() {
                return Err(InterchangeError::refused(&index, "has no weight_map, so it names no file of tensors"));
            }
            names
        }
    };
    let open = |name: String| {
        let path = folder.join(name);
        let mapping = Mapping::open(&path).map_err(InterchangeError::io(&path, "read"))?;
        Ok(Shard { path, mapping })
    };
    files.into_iter().map(open).collect()
}

/// Writes a model into `folder`, which is there, as `save_pretrained` of `transformers` does: in files of at most
/// `max_shard_bytes` of tensors each, as far as no single one is larger.
///
/// # Errors
/// If `transformers` has no such model, a number is too large for its form, or the system refuses.
pub fn write_folder(folder: &Path, exported: &Exported<'_>, max_shard_bytes: u64) -> Result<(), InterchangeError> {
    let Exported { model, tokenizer, element, .. } = *exported;
    let special = hf_tokenizer_files::special_tokens(tokenizer);
    let path = folder.join(CONFIG);
    let config =
        hf_config::write(model, &special, element).map_err(|problem| InterchangeError::refused(&path, problem))?;
    fs::write(&path, config).map_err(InterchangeError::io(&path, "write"))?;
    hf_tokenizer_files::write(folder, tokenizer, model.context().unwrap_or_default())?;

    let tensors = exported.tensors(folder)?.into_iter();
    let tensors: Vec<_> =
        tensors.map(|(spec, values)| Written { foreign: names::hf(model, &spec), element, values }).collect();
    let sizes: Vec<u64> = tensors.iter().map(|tensor| (tensor.elements() * element.bytes()) as u64).collect();
    let shards = cut(&sizes, max_shard_bytes);
    let count = shards.iter().max().map_or(1, |last| last + 1);
    let name = |shard: usize| match count {
        1 => SINGLE.to_string(),
        count => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
    };
    let map: serde_json::Map<String, Value> =
        tensors.iter().zip(&shards).map(|(tensor, shard)| (tensor.foreign.name.clone(), name(*shard).into())).collect();
    let mut rest = tensors.into_iter().zip(shards).peekable();
    for shard in 0..count {
        let path = folder.join(name(shard));
        let mut views = Vec::new();
        while let Some((tensor, _)) = rest.next_if(|(_, in_shard)| *in_shard == shard) {
            views.push((tensor.foreign.name.clone(), tensor));
        }
        // transformers refuses any other value.
        let metadata = Some([("format".to_string(), "pt".to_string())].into());
        safetensors::serialize_to_file(views, metadata, &path)
            .map_err(|error| InterchangeError::io(&path, "write")(std::io::Error::other(error)))?;
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": sizes.iter().sum::<u64>() }, "weight_map": map });
        let path = folder.join(INDEX);
        fs::write(&path, format!("{index:#}\n")).map_err(InterchangeError::io(&path, "write"))?;
    }
    Ok(())
}

/// In which file each of some tensors comes, in their order.
fn cut(sizes: &[u64], max_bytes: u64) -> Vec<usize> {
    let (mut shard, mut bytes) = (0, 0);
    let place = |size: &u64| {
        if bytes > 0 && bytes + size > max_bytes {
            (shard, bytes) = (shard + 1, 0);
        }
        bytes += size;
        shard
    };
    sizes.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{Gelu, GptConfig, LlamaConfig};
    use crate::layout::initial_parameters;
    use crate::tokenizer::TokenizerKind;

    fn llama(tied_head: bool) -> ModelConfig {
        ModelConfig::Llama(LlamaConfig {
            vocab_size: 256,
            context: 16,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            width: 16,
            head_width: Some(6),
            ffn_width: 20,
            qk_norm: false,
            tied_head,
            score_head: false,
            rope_theta: 1e4,
            rope_scaling: None,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        })
    }

    fn gpt(bias: bool) -> ModelConfig {
        ModelConfig::Gpt(GptConfig {
            vocab_size: 256,
            context: 16,
            layers: 2,
            heads: 2,
            width: 12,
            bias,
            tied_head: true,
            score_head: false,
            gelu: Gelu::Tanh,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        })
    }

    fn write(folder: &Path, model: &ModelConfig, parameters: &[f32], element: ElementType, max_shard_bytes: u64) {
        let tokenizer = &Tokenizer::for_text(TokenizerKind::Bytes, "");
        fs::create_dir_all(folder).unwrap();
        write_folder(folder, &Exported { name: "m", model, parameters, tokenizer, element }, max_shard_bytes).unwrap();
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn what_is_written_is_read_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        for (index, model) in [llama(true), llama(false), gpt(true)].into_iter().enumerate() {
            let parameters = initial_parameters(&model, 3);
            for max_shard_bytes in [1 << 30, 3000, 1] {
                let folder = dir.path().join(format!("{index}-{max_shard_bytes}"));
                write(&folder, &model, &parameters, ElementType::F32, max_shard_bytes);
                assert_eq!(folder.join(INDEX).exists(), max_shard_bytes < 1 << 30);
                let back = read_folder(&folder).unwrap();
                assert_eq!(back.model, model);
                assert_eq!(bits(&back.parameters), bits(&parameters));
            }
            let folder = dir.path().join(format!("{index}-bf16"));
            write(&folder, &model, &parameters, ElementType::Bf16, 1 << 30);
            let rounded: Vec<f32> = parameters.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
            assert_eq!(bits(&read_folder(&folder).unwrap().parameters), bits(&rounded));
        }
    }

    #[test]
    fn a_gpt_without_biases_gets_zeros() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &gpt(false), &initial_parameters(&gpt(false), 3), ElementType::F32, 1 << 30);
        let back = read_folder(dir.path()).unwrap();
        assert_eq!(back.model, gpt(true));
        let layout = Layout::of(&back.model);
        let (biases, rest): (Vec<_>, Vec<_>) = layout.tensors.iter().partition(|tensor| tensor.name.ends_with(".bias"));
        assert!(biases.iter().all(|tensor| back.parameters[tensor.range()].iter().all(|value| *value == 0.0)));
        let kept: Vec<f32> = rest.iter().flat_map(|tensor| back.parameters[tensor.range()].to_vec()).collect();
        assert_eq!(kept, initial_parameters(&gpt(false), 3));
    }

    /// Writes a file of tensors again, changed.
    fn rewrite(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, (Vec<usize>, Vec<u8>)>)) {
        let path = folder.join(SINGLE);
        let bytes = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors =
            file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())));
        let mut tensors: BTreeMap<_, _> = tensors.collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, (shape, data))| {
            (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
        });
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }

    #[test]
    fn other_names_of_the_same_tensors_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let parameters = initial_parameters(&llama(true), 3);
        write(dir.path(), &llama(true), &parameters, ElementType::F32, 1 << 30);
        // The shared matrix as the head alone; then as both, without prefixes; with tables of old releases.
        rewrite(dir.path(), |tensors| {
            let shared = tensors.remove("model.embed_tokens.weight").unwrap();
            tensors.insert(HEAD.into(), shared);
            tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (vec![1], vec![0; 4]));
        });
        assert_eq!(bits(&read_folder(dir.path()).unwrap().parameters), bits(&parameters));
        rewrite(dir.path(), |tensors| {
            tensors.insert("model.embed_tokens.weight".into(), tensors[HEAD].clone());
            let short = |name: String| name.strip_prefix("model.").map_or(name.clone(), str::to_owned);
            *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (short(name), tensor)).collect();
        });
        assert_eq!(bits(&read_folder(dir.path()).unwrap().parameters), bits(&parameters));

        let gpt_dir = dir.path().join("gpt");
        let parameters = initial_parameters(&gpt(true), 3);
        write(&gpt_dir, &gpt(true), &parameters, ElementType::F32, 1 << 30);
        rewrite(&gpt_dir, |tensors| {
            let short = |name: String| name.strip_prefix("transformer.").map_or(name.clone(), str::to_owned);
            *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (short(name), tensor)).collect();
            tensors.insert("h.0.attn.bias".into(), (vec![1, 1, 2, 2], vec![0; 16]));
        });
        assert_eq!(bits(&read_folder(&gpt_dir).unwrap().parameters), bits(&parameters));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        type Change<'a> = &'a dyn Fn(&mut BTreeMap<String, (Vec<usize>, Vec<u8>)>);
        let cases: [(Change<'_>, &str); 5] = [
            (&|tensors| drop(tensors.remove("model.norm.weight")), "tensor model.norm.weight is missing"),
            (
                &|tensors| drop(tensors.remove("model.embed_tokens.weight")),
                "embed_tokens.weight is missing (nor lm_head",
            ),
            (
                &|tensors| tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().0.reverse(),
                "tensor model.layers.1.mlp.up_proj.weight has shape [16, 20], and [20, 16]",
            ),
            (
                &|tensors| drop(tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), (vec![1], vec![0; 4]))),
                "tensor model.layers.0.self_attn.q_proj.bias belongs to no model",
            ),
            (
                &|tensors| {
                    let mut head = tensors["model.embed_tokens.weight"].clone();
                    head.1[0] ^= 1;
                    tensors.insert(HEAD.into(), head);
                },
                "model.embed_tokens.weight and lm_head.weight differ",
            ),
        ];
        for (change, words) in cases {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &llama(true), &initial_parameters(&llama(true), 3), ElementType::F32, 1 << 30);
            rewrite(dir.path(), change);
            let said = read_folder(dir.path()).unwrap_err().to_string();
            assert!(said.contains(words) && said.contains(SINGLE), "{said}");
        }
    }

    #[test]
    fn files_that_are_missing_or_broken_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let said = || read_folder(dir.path()).unwrap_err().to_string();
        assert!(said().contains("config.json: is not there"));
        write(dir.path(), &gpt(true), &initial_parameters(&gpt(true), 3), ElementType::F32, 1);
        fs::remove_file(dir.path().join("model-00003-of-00028.safetensors")).unwrap();
        assert!(said().contains("model-00003-of-00028.safetensors: cannot read"), "{}", said());
        fs::write(dir.path().join("model-00003-of-00028.safetensors"), "{}").unwrap();
        assert!(said().contains("is no safetensors file, or a damaged one"), "{}", said());
        fs::write(dir.path().join(INDEX), r#"{"weight_map":{"a":"../b"}}"#).unwrap();
        assert!(said().contains("names a file elsewhere"), "{}", said());
        fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        assert!(said().contains("tokenizer.json: is not there; save it with"), "{}", said());
    }

    proptest! {
        #[test]
        fn files_are_no_larger_than_asked_for(sizes in proptest::collection::vec(1u64..100, 1..50), most in 1u64..300) {
            let shards = cut(&sizes, most);
            prop_assert_eq!(shards[0], 0);
            prop_assert!(shards.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] + 1));
            for shard in 0..=*shards.last().unwrap() {
                let inside: Vec<u64> = sizes.iter().zip(&shards).filter(|(_, s)| **s == shard).map(|(size, _)| *size).collect();
                prop_assert!(inside.len() == 1 || inside.iter().sum::<u64>() <= most);
            }
        }
    }
}
