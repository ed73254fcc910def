//! The files of a Hugging Face folder that are about text: read into a tokenizer, and written from one.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Value, json};

use super::InterchangeError;
use super::hf_config::{HfConfig, token_numbers};
use crate::bpe::{END_OF_TEXT, character_of_byte};
use crate::hf_tokenizer::{HfFiles, HfTokenizer, SpecialTokens};
use crate::tokenizer::Tokenizer;

pub(super) const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Reads the tokenizer of a model of `vocab_size` tokens.
pub(super) fn read(folder: &Path, config: &HfConfig, vocab_size: usize) -> Result<Tokenizer, InterchangeError> {
    let path = folder.join(TOKENIZER);
    let Some(tokenizer_json) = read_text(&path)? else {
        let problem = "is not there; save it with AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers";
        return Err(InterchangeError::refused(&path, problem));
    };
    let tokenizer_config = read_text(&folder.join(TOKENIZER_CONFIG))?.unwrap_or_else(|| "{}".into());
    let settings = parse(&folder.join(TOKENIZER_CONFIG), &tokenizer_config)?;
    let generation_config = read_text(&folder.join(GENERATION_CONFIG))?;
    let generation =
        generation_config.as_deref().map_or(Ok(Value::Null), |text| parse(&folder.join(GENERATION_CONFIG), text))?;
    let chat_template = match read_text(&folder.join(CHAT_TEMPLATE))? {
        Some(template) => Some(template),
        None => template_of(&settings["chat_template"]),
    };

    let json = parse(&path, &tokenizer_json)?;
    let numbers = numbers(&json);
    let named = |key: &str| token_name(&settings[key]).and_then(|name| numbers.get(name).copied());
    let mut end: Vec<u32> = Vec::new();
    let ends = named("eos_token").into_iter().chain(token_numbers(generation.get("eos_token_id")));
    for token in ends.chain(config.tokens("eos_token_id")) {
        if !end.contains(&token) {
            end.push(token);
        }
    }
    let special = SpecialTokens {
        begin: named("bos_token").or_else(|| config.tokens("bos_token_id").first().copied()),
        end,
        padding: named("pad_token").or_else(|| config.tokens("pad_token_id").first().copied()),
        unknown: named("unk_token"),
    };
    let files = HfFiles { tokenizer_json, tokenizer_config, generation_config, chat_template, special, vocab_size };
    let tokenizer =
        HfTokenizer::new(files).map_err(|error| InterchangeError::refused(&path, format!("the file {error}")))?;
    Ok(Tokenizer::Hf(tokenizer))
}

/// Writes the files of `tokenizer` for a model of `context` tokens.
pub(super) fn write(folder: &Path, tokenizer: &Tokenizer, context: usize) -> Result<(), InterchangeError> {
    let mut files = files(tokenizer, context);
    if let Some(template) = &files.chat_template {
        let path = folder.join(TOKENIZER_CONFIG);
        let mut settings = parse(&path, &files.tokenizer_config)?;
        settings["chat_template"] = template.as_str().into();
        files.tokenizer_config = format!("{settings:#}\n");
    }
    let texts = [
        (TOKENIZER, Some(files.tokenizer_json)),
        (TOKENIZER_CONFIG, Some(files.tokenizer_config)),
        (GENERATION_CONFIG, files.generation_config),
        (CHAT_TEMPLATE, files.chat_template),
    ];
    for (name, text) in texts {
        if let Some(text) = text {
            let path = folder.join(name);
            fs::write(&path, text).map_err(InterchangeError::io(&path, "write"))?;
        }
    }
    Ok(())
}

/// Numbers of a tokenizer's special tokens.
pub(super) fn special_tokens(tokenizer: &Tokenizer) -> SpecialTokens {
    match tokenizer {
        Tokenizer::Hf(hf) => hf.files().special.clone(),
        other => SpecialTokens { end: other.stop_tokens(), ..SpecialTokens::default() },
    }
}

/// What a folder says of any tokenizer.
pub(super) fn files(tokenizer: &Tokenizer, context: usize) -> HfFiles {
    let tokenizer_json = match tokenizer {
        Tokenizer::Hf(hf) => return hf.files().clone(),
        Tokenizer::Bpe(bpe) => bpe.to_json().to_string(),
        // Every byte is a token, written as GPT-2 writes it, and nothing is merged.
        Tokenizer::Bytes => {
            let tokens = (0..=255u8).map(|byte| (character_of_byte(byte).to_string(), u32::from(byte)));
            let level =
                json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
            without_merges(tokens.collect(), &level, &level)
        }
        // Every character is one, and a text is their row.
        Tokenizer::Chars { vocabulary } => {
            let tokens = vocabulary.chars().map(String::from).zip(0..).collect();
            without_merges(tokens, &Value::Null, &json!({ "type": "Fuse" }))
        }
    };
    let special = special_tokens(tokenizer);
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": false,
    });
    if !special.end.is_empty() {
        settings["eos_token"] = END_OF_TEXT.into();
    }
    let generation_config =
        (!special.end.is_empty()).then(|| format!("{:#}\n", json!({ "eos_token_id": special.end })));
    HfFiles {
        tokenizer_json,
        tokenizer_config: format!("{settings:#}\n"),
        generation_config,
        chat_template: None,
        special,
        vocab_size: tokenizer.vocab_size(),
    }
}

/// The `tokenizer.json` of a BPE whose pieces are never merged.
fn without_merges(vocabulary: BTreeMap<String, u32>, pre_tokenizer: &Value, decoder: &Value) -> String {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
    .to_string()
}

/// Numbers of all tokens by name.
fn numbers(tokenizer: &Value) -> BTreeMap<&str, u32> {
    let vocabulary = tokenizer["model"]["vocab"].as_object().into_iter().flatten();
    let learned = vocabulary.filter_map(|(name, id)| Some((name.as_str(), id.as_u64()? as u32)));
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter_map(|token| Some((token["content"].as_str()?, token["id"].as_u64()? as u32)));
    learned.chain(added).collect()
}

/// A token's name, written by itself or with its properties.
fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// A template, alone or the default among named ones.
fn template_of(value: &Value) -> Option<String> {
    let named = value.as_array().into_iter().flatten().find(|template| template["name"] == "default");
    let text = value.as_str().or_else(|| named.and_then(|template| template["template"].as_str()));
    text.map(str::to_owned)
}

/// The text of a file; `None` where there is none.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, InterchangeError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(InterchangeError::io(path, "read")(error)),
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, InterchangeError> {
    serde_json::from_str(text).map_err(|error| InterchangeError::refused(path, format!("is no JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::TokenizerKind;

    #[test]
    fn our_own_tokenizers_mean_the_same_as_files() {
        let text = "größe, 学而时习之\n";
        for kind in [TokenizerKind::Bytes, TokenizerKind::Chars] {
            let own = Tokenizer::for_text(kind, text);
            let theirs = Tokenizer::Hf(HfTokenizer::new(files(&own, 8)).unwrap());
            let tokens = own.encode(text).unwrap();
            assert_eq!(theirs.encode(text).unwrap(), tokens);
            assert_eq!(theirs.decode(&tokens), text);
            assert_eq!(theirs.byte_lengths(), own.byte_lengths());
        }
    }

    #[test]
    fn a_template_is_found_in_each_of_its_places() {
        assert_eq!(template_of(&json!("a")), Some("a".into()));
        let named = json!([{ "name": "rag", "template": "b" }, { "name": "default", "template": "c" }]);
        assert_eq!((template_of(&named), template_of(&Value::Null)), (Some("c".into()), None));
        assert_eq!(token_name(&json!({ "content": "<s>" })), Some("<s>"));
    }
}
