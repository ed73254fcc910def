//! A tokenizer as GGUF: byte-level BPE by its merges, others by scores, as llama.cpp's own converter writes both.

use serde_json::Value as Json;

use super::gguf::{Metadata, Value};
use super::hf_tokenizer_files;
use crate::bpe::character_of_byte;
use crate::hf_tokenizer::{HfFiles, byte_piece, writes_bytes};
use crate::tokenizer::Tokenizer;

/// The expression of Llama 3's pre-tokenizer.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Kinds of token.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The keys of `tokenizer.ggml`, for a model of `context` tokens; an error says what llama.cpp has no word for.
pub(super) fn metadata(tokenizer: &Tokenizer, context: usize) -> Result<Metadata, String> {
    let files = hf_tokenizer_files::files(tokenizer, context);
    let json: Json =
        serde_json::from_str(&files.tokenizer_json).map_err(|error| format!("its tokenizer is no JSON: {error}"))?;
    let in_bytes = writes_bytes(&files.tokenizer_json) || matches!(tokenizer, Tokenizer::Chars { .. });
    let (mut tokens, types) = tokens(&files, &json, in_bytes);
    if let Tokenizer::Chars { vocabulary } = tokenizer {
        if let Some(character) = vocabulary.chars().find(|character| !character.is_ascii()) {
            return Err(format!(
                "its tokenizer has a token for the character {character:?}, and llama.cpp knows bytes and merges of them; train \
                 with tokenizer.kind = \"bpe\", or export --format hf"
            ));
        }
        tokens = vocabulary.bytes().map(|byte| character_of_byte(byte).to_string()).collect();
    }
    let merges = merges(&json);
    let mut metadata = Metadata::new();
    let mut put = |key: &str, value| metadata.push((format!("tokenizer.ggml.{key}"), value));
    if in_bytes {
        put("model", Value::Text("gpt2".into()));
        put("pre", Value::Text(pre_tokenizer(&json, merges.is_empty())?.into()));
        put("merges", Value::Texts(merges.iter().map(|[left, right]| format!("{left} {right}")).collect()));
    } else {
        let space_prefix = space_prefix(&json)?;
        put("model", Value::Text("llama".into()));
        put("pre", Value::Text("default".into()));
        put("scores", Value::F32s(scores(&tokens, &merges)));
        put("add_space_prefix", Value::Bool(space_prefix));
    }
    put("tokens", Value::Texts(tokens));
    put("token_type", Value::I32s(types));
    let special = &files.special;
    let numbers = [
        ("bos_token_id", special.begin),
        ("eos_token_id", special.end.first().copied()),
        ("unknown_token_id", special.unknown),
        ("padding_token_id", special.padding),
    ];
    for (key, number) in numbers {
        if let Some(number) = number {
            put(key, Value::U32(number));
        }
    }
    let alone = tokenizer.encode("").unwrap_or_default();
    put("add_bos_token", Value::Bool(special.begin.is_some() && alone.first() == special.begin.as_ref()));
    if let Some(template) = files.chat_template {
        metadata.push(("tokenizer.chat_template".into(), Value::Text(template)));
    }
    Ok(metadata)
}

/// Names and kinds of all tokens, by number; rows of the embedding that no token has get a name of their own.
fn tokens(files: &HfFiles, json: &Json, in_bytes: bool) -> (Vec<String>, Vec<i32>) {
    let mut tokens: Vec<String> = (0..files.vocab_size).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![UNUSED; files.vocab_size];
    let mut put = |id: &Json, name: &str, kind: i32| {
        if let Some(id) = id.as_u64().map(|id| id as usize).filter(|id| *id < files.vocab_size) {
            (tokens[id], types[id]) = (name.into(), kind);
        }
    };
    for (name, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        let kind = if !in_bytes && byte_piece(name).is_some() { BYTE } else { NORMAL };
        put(id, name, kind);
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        put(&token["id"], token["content"].as_str().unwrap_or_default(), kind);
    }
    if let Some(unknown) = files.special.unknown.filter(|_| !in_bytes) {
        types[unknown as usize] = UNKNOWN;
    }
    (tokens, types)
}

/// Pairs of pieces, the first to be merged first; older files write a pair as one text.
fn merges(json: &Json) -> Vec<[String; 2]> {
    let pair = |merge: &Json| {
        let (left, right) = match merge.as_str() {
            Some(text) => text.split_once(' ')?,
            None => (merge[0].as_str()?, merge[1].as_str()?),
        };
        Some([left.to_string(), right.to_string()])
    };
    json["model"]["merges"].as_array().into_iter().flatten().filter_map(pair).collect()
}

/// llama.cpp merges what scores highest: the sooner a pair is merged, the higher what comes of it.
fn scores(tokens: &[String], merges: &[[String; 2]]) -> Vec<f32> {
    let mut ranks = std::collections::BTreeMap::new();
    for (rank, [left, right]) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    tokens.iter().map(|token| ranks.get(token).map_or(0.0, |rank| -(*rank as f32) - 1.0)).collect()
}

/// llama.cpp's name of how text is cut into words.
fn pre_tokenizer(json: &Json, merges_nothing: bool) -> Result<&'static str, String> {
    let pre = &json["pre_tokenizer"];
    if !json["normalizer"].is_null() {
        return Err(
            "its tokenizer changes text before encoding it, which llama.cpp has no name for; export --format hf".into(),
        );
    }
    let by_bytes = |part: &Json, use_regex: bool| {
        part["type"] == "ByteLevel" && part["use_regex"] != !use_regex && part["add_prefix_space"] != true
    };
    match pre["pretokenizers"].as_array().map(Vec::as_slice) {
        _ if merges_nothing => Ok("gpt-2"),
        None if by_bytes(pre, true) => Ok("gpt-2"),
        Some([digits, level])
            if digits["type"] == "Digits" && digits["individual_digits"] == true && by_bytes(level, true) =>
        {
            Ok("smollm")
        }
        Some([split, level])
            if split["type"] == "Split" && split["pattern"]["Regex"] == LLAMA_3 && by_bytes(level, false) =>
        {
            Ok("llama-bpe")
        }
        _ => Err(format!(
            "its tokenizer cuts words in a way that llama.cpp has no name for here ({pre}); GPT-2's, Llama 3's and SmolLM's are \
             known; export --format hf"
        )),
    }
}

/// Whether a space goes before each text.
fn space_prefix(json: &Json) -> Result<bool, String> {
    let normalizers = json["normalizer"]["normalizers"].as_array().into_iter().flatten();
    let mut all = normalizers.chain([&json["normalizer"], &json["pre_tokenizer"]]);
    if json["model"]["byte_fallback"] != true {
        return Err(
            "its tokenizer knows neither bytes nor byte_fallback, as llama.cpp asks for; export --format hf".into()
        );
    }
    Ok(all.any(|part| {
        let metaspace =
            part["type"] == "Metaspace" && part["prepend_scheme"] != "never" && part["add_prefix_space"] != false;
        part["type"] == "Prepend" || metaspace
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bpe_training::WordCounts;
    use crate::tokenizer::TokenizerKind;

    fn find<'a>(metadata: &'a Metadata, key: &str) -> Option<&'a Value> {
        metadata.iter().find(|(found, _)| found == key).map(|(_, value)| value)
    }

    #[test]
    fn learned_pieces_go_by_their_merges() {
        let bpe = Tokenizer::Bpe(WordCounts::of(["the cat and the dog sat on the mat"; 3]).learn(270).unwrap());
        let metadata = metadata(&bpe, 8).unwrap();
        assert_eq!(find(&metadata, "tokenizer.ggml.pre"), Some(&Value::Text("gpt-2".into())));
        assert_eq!(find(&metadata, "tokenizer.ggml.eos_token_id"), Some(&Value::U32(bpe.end_of_text().unwrap())));
        let Some(Value::Texts(tokens)) = find(&metadata, "tokenizer.ggml.tokens") else { panic!() };
        let Some(Value::Texts(merges)) = find(&metadata, "tokenizer.ggml.merges") else { panic!() };
        let Some(Value::I32s(types)) = find(&metadata, "tokenizer.ggml.token_type") else { panic!() };
        assert_eq!((tokens.len(), types.len(), merges.len()), (270, 270, 13));
        assert_eq!(types[bpe.end_of_text().unwrap() as usize], CONTROL);
        assert!(merges.iter().all(|merge| tokens.contains(&merge.replace(' ', ""))));
    }

    #[test]
    fn characters_go_as_bytes_where_they_are() {
        let metadata = metadata(&Tokenizer::for_text(TokenizerKind::Chars, "a b\n"), 8).unwrap();
        let expected = ["\u{10a}", "\u{120}", "a", "b"].map(String::from).to_vec();
        assert_eq!(find(&metadata, "tokenizer.ggml.tokens"), Some(&Value::Texts(expected)));
        let said = super::metadata(&Tokenizer::for_text(TokenizerKind::Chars, "aé"), 8).unwrap_err();
        assert!(said.contains("'é'") && said.contains("--format hf"), "{said}");
    }

    #[test]
    fn a_way_to_cut_words_goes_by_its_name_or_not_at_all() {
        let level = |use_regex: bool| json!({ "type": "ByteLevel", "use_regex": use_regex, "add_prefix_space": false });
        let sequence = |first: Json, second: Json| json!({ "type": "Sequence", "pretokenizers": [first, second] });
        let digits = json!({ "type": "Digits", "individual_digits": true });
        let split =
            json!({ "type": "Split", "pattern": { "Regex": LLAMA_3 }, "behavior": "Isolated", "invert": false });
        let other = json!({ "type": "Split", "pattern": { "Regex": "\\s+" }, "behavior": "Isolated", "invert": false });
        let name = |pre: Json| pre_tokenizer(&json!({ "pre_tokenizer": pre }), false);
        assert_eq!(name(level(true)), Ok("gpt-2"));
        assert_eq!(name(sequence(digits, level(true))), Ok("smollm"));
        assert_eq!(name(sequence(split, level(false))), Ok("llama-bpe"));
        assert!(name(sequence(other, level(false))).unwrap_err().contains("\\\\s+"));
    }

    #[test]
    fn the_sooner_merged_the_higher() {
        let pair = |left: &str, right: &str| [left.to_string(), right.to_string()];
        let tokens = ["a", "ab", "abc"].map(String::from);
        assert_eq!(scores(&tokens, &[pair("a", "b"), pair("ab", "c"), pair("a", "bc")]), [0.0, -1.0, -2.0]);
    }
}
