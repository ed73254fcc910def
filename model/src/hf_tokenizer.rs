//! Tokenizers of models that others trained: what a Hugging Face folder says of them, kept to the letter.
//!
//! The `tokenizers` crate encodes and decodes; text is encoded by our own [`Bpe`] where the tokenizer is one. Beside
//! `tokenizer.json` stand the names of special tokens, at which of them generation stops, and the chat template, so that
//! a model that is trained further, talked to or exported still has them.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::tokenizer::step_decode_stream;
use tokenizers::{Model as _, ModelWrapper};

use crate::bpe::{Bpe, BpeEncoder, BpeError, byte_of_character};

/// Stands for a space in pieces of tokenizers that do not write bytes.
const SPACE: char = '\u{2581}';
/// A text after which a continuation begins; any would do.
const BEFORE: &str = "a";

/// A tokenizer as a Hugging Face folder describes it. Cloning shares it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "HfFiles", into = "HfFiles")]
pub struct HfTokenizer(Arc<Loaded>);

/// What is kept of a folder's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HfFiles {
    /// The text of `tokenizer.json`.
    pub tokenizer_json: String,
    /// The text of `tokenizer_config.json`; an empty object where there is none.
    pub tokenizer_config: String,
    /// The text of `generation_config.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation_config: Option<String>,
    /// How messages become text, in Jinja.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Tokens by their part.
    pub special: SpecialTokens,
    /// Rows of the model's embedding, at least as many as there are tokens: the others are never encoded.
    pub vocab_size: usize,
}

/// Numbers of the tokens that play a part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Stands before each text.
    pub begin: Option<u32>,
    /// Ends a text; generation stops at each. The first stands after each document.
    pub end: Vec<u32>,
    /// Fills up rows.
    pub padding: Option<u32>,
    /// Stands for what has no token.
    pub unknown: Option<u32>,
}

struct Loaded {
    files: HfFiles,
    library: tokenizers::Tokenizer,
    /// The same with names of special tokens read as these tokens.
    reads_special: tokenizers::Tokenizer,
    /// Tokens that stand for no text. The library knows them by name, and misses those whose names its normalizer changes.
    textless: BTreeSet<u32>,
    bpe: Option<Bpe>,
}

impl HfTokenizer {
    /// Reads what a folder says.
    ///
    /// # Errors
    /// If `tokenizer.json` is none, its model is not BPE, or it has tokens beyond the vocabulary.
    pub fn new(files: HfFiles) -> Result<Self, BpeError> {
        let mut library = tokenizers::Tokenizer::from_bytes(&files.tokenizer_json)
            .map_err(|error| BpeError::Malformed(error.to_string()))?;
        library.with_truncation(None).map_err(|error| BpeError::Malformed(error.to_string()))?.with_padding(None);
        let ModelWrapper::BPE(model) = library.get_model() else {
            return Err(BpeError::Foreign("its model is not BPE".into()));
        };
        if let Some(unknown) = model.unk_token.as_ref().filter(|token| model.token_to_id(token).is_none()) {
            return Err(BpeError::Foreign(format!("its unk_token {unknown:?} is not in its vocabulary")));
        }
        let beyond = library.get_vocab(true).into_iter().filter(|(_, id)| *id as usize >= files.vocab_size);
        if let Some((name, id)) = beyond.min_by_key(|(_, id)| *id) {
            let size = files.vocab_size;
            return Err(BpeError::Foreign(format!(
                "its token {name:?} is number {id}, and the model knows {size} tokens"
            )));
        }
        let special = &files.special;
        let numbers = special.end.iter().chain(&special.begin).chain(&special.padding).chain(&special.unknown);
        if let Some(id) = numbers.copied().find(|&id| id as usize >= files.vocab_size) {
            let size = files.vocab_size;
            return Err(BpeError::Foreign(format!("special token {id} is beyond the model's {size} tokens")));
        }
        let bpe = Bpe::from_json(&files.tokenizer_json).ok();
        let added = library.get_added_tokens_decoder();
        let textless = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let reads_special = library.clone();
        library.set_encode_special_tokens(true);
        Ok(Self(Arc::new(Loaded { files, library, reads_special, textless, bpe })))
    }

    /// What was read.
    pub fn files(&self) -> &HfFiles {
        &self.0.files
    }

    /// The name of a token.
    pub fn name(&self, token: u32) -> Option<String> {
        self.0.library.id_to_token(token)
    }

    /// An encoder, for many texts.
    pub(crate) fn encoder(&self) -> HfEncoder {
        HfEncoder { tokenizer: self.clone(), bpe: self.0.bpe.as_ref().map(Bpe::encoder) }
    }

    /// The tokens of a text by itself: with those before and after it that `tokenizer.json` asks for.
    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        ids(&self.0.library, text, true)
    }

    /// The tokens of a text in which names of special tokens mean these tokens, and nothing is added.
    pub(crate) fn encode_with_special_tokens(&self, text: &str) -> Vec<u32> {
        ids(&self.0.reads_special, text, false)
    }

    /// The text of `tokens`, special ones left out.
    pub(crate) fn decode(&self, tokens: &[u32]) -> String {
        let text: Vec<u32> = tokens.iter().copied().filter(|token| !self.0.textless.contains(token)).collect();
        self.0.library.decode(&text, true).unwrap_or_default()
    }

    /// A decoder of what follows on another text.
    pub(crate) fn decoder(&self) -> HfDecoder {
        let before = ids(&self.0.library, BEFORE, false);
        let prefix = self.decode(&before);
        HfDecoder { tokenizer: self.clone(), prefix_tokens: before.len(), tokens: before, prefix }
    }

    /// How many bytes of text each token stands for; special ones for none.
    pub(crate) fn byte_lengths(&self) -> Vec<u32> {
        let Loaded { files, library, .. } = &*self.0;
        let added = library.get_added_tokens_decoder();
        let writes_bytes = writes_bytes(&files.tokenizer_json);
        let length = |token| match (added.get(&token), library.id_to_token(token)) {
            (Some(added), _) if added.special => 0,
            (Some(added), _) => added.content.len(),
            (None, None) => 0,
            (None, Some(name)) if writes_bytes => name.chars().filter(|c| byte_of_character(*c).is_some()).count(),
            (None, Some(name)) if byte_piece(&name).is_some() => 1,
            (None, Some(name)) => name.chars().map(|c| if c == SPACE { 1 } else { c.len_utf8() }).sum(),
        };
        (0..files.vocab_size as u32).map(|token| length(token) as u32).collect()
    }
}

/// The tokens of `text`. Everything that can fail was tried as the tokenizer was read.
fn ids(library: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Vec<u32> {
    library.encode_fast(text, add_special).map(|encoding| encoding.get_ids().to_vec()).unwrap_or_default()
}

/// Whether pieces of a `tokenizer.json` are written in bytes, as GPT-2 does.
pub(crate) fn writes_bytes(tokenizer_json: &str) -> bool {
    fn is_byte_level(decoder: &Value) -> bool {
        let parts = decoder["decoders"].as_array().into_iter().flatten();
        decoder["type"] == "ByteLevel" || parts.into_iter().any(is_byte_level)
    }
    serde_json::from_str(tokenizer_json).is_ok_and(|json: Value| is_byte_level(&json["decoder"]))
}

/// The byte of a piece `<0x0A>`.
pub(crate) fn byte_piece(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

impl PartialEq for HfTokenizer {
    fn eq(&self, other: &Self) -> bool {
        self.0.files == other.0.files
    }
}

impl Eq for HfTokenizer {}

impl fmt::Debug for HfTokenizer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HfTokenizer").field("vocab_size", &self.0.files.vocab_size).finish_non_exhaustive()
    }
}

impl TryFrom<HfFiles> for HfTokenizer {
    type Error = BpeError;

    fn try_from(files: HfFiles) -> Result<Self, BpeError> {
        Self::new(files)
    }
}

impl From<HfTokenizer> for HfFiles {
    fn from(tokenizer: HfTokenizer) -> Self {
        tokenizer.0.files.clone()
    }
}

/// Text to tokens, without any before or after it.
#[derive(Clone, Debug)]
pub struct HfEncoder {
    tokenizer: HfTokenizer,
    bpe: Option<BpeEncoder>,
}

impl HfEncoder {
    /// Appends the tokens of `text`, which is text throughout.
    pub(crate) fn encode(&mut self, text: &str, tokens: &mut Vec<u32>) {
        match &mut self.bpe {
            Some(bpe) => bpe.encode(text, tokens),
            None => tokens.extend(ids(&self.tokenizer.0.library, text, false)),
        }
    }
}

/// Tokens to text, as they come.
#[derive(Clone, Debug)]
pub struct HfDecoder {
    tokenizer: HfTokenizer,
    tokens: Vec<u32>,
    prefix: String,
    prefix_tokens: usize,
}

impl HfDecoder {
    /// The text that `token` completes, which may be empty.
    pub(crate) fn push(&mut self, token: u32) -> String {
        let Self { tokenizer, tokens, prefix, prefix_tokens } = self;
        if tokenizer.0.textless.contains(&token) {
            return String::new();
        }
        let library = &tokenizer.0.library;
        step_decode_stream(library, vec![token], true, tokens, prefix, prefix_tokens).ok().flatten().unwrap_or_default()
    }

    /// What an incomplete end leaves.
    pub(crate) fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.tokens);
        text.strip_prefix(&self.prefix).unwrap_or_default().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    /// A tokenizer in the manner of Llama 2: spaces written as pieces, bytes for what has none, one text for all.
    fn files() -> HfFiles {
        let mut vocabulary = serde_json::Map::new();
        let mut add = |name: String| {
            let id = vocabulary.len();
            vocabulary.insert(name, id.into());
        };
        ["<unk>", "<s>", "</s>"].map(String::from).into_iter().for_each(&mut add);
        (0..=255).for_each(|byte| add(format!("<0x{byte:02X}>")));
        ["\u{2581}", "a", "b", "\u{2581}a", "ab", "\u{2581}ab"].map(String::from).into_iter().for_each(&mut add);
        let special = |id: u32, content: &str| {
            serde_json::json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": true, "special": true })
        };
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "\u{2581}" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
            ]},
            "pre_tokenizer": null,
            "post_processor": { "type": "TemplateProcessing",
                "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } },
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
                { "type": "ByteFallback" }, { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ]},
            "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocabulary, "merges": ["\u{2581} a", "a b", "\u{2581}a b"] },
        });
        let special = SpecialTokens { begin: Some(1), end: vec![2], padding: None, unknown: Some(0) };
        HfFiles {
            tokenizer_json: json.to_string(),
            tokenizer_config: "{}".into(),
            generation_config: None,
            chat_template: None,
            special,
            vocab_size: 270,
        }
    }

    #[test]
    fn a_text_gets_what_the_tokenizer_puts_before_it_and_a_part_of_one_does_not() {
        let tokenizer = Tokenizer::Hf(HfTokenizer::new(files()).unwrap());
        assert_eq!(tokenizer.encode("ab a").unwrap(), [1, 264, 262]);
        let mut tokens = Vec::new();
        tokenizer.encoder().encode("ab a", &mut tokens).unwrap();
        assert_eq!(tokens, [264, 262]);
        assert_eq!(tokenizer.decode(&[1, 264, 262, 2]), "ab a");
        assert_eq!((tokenizer.end_of_text(), tokenizer.vocab_size()), (Some(2), 270));
    }

    #[test]
    fn names_of_special_tokens_are_text_unless_they_are_asked_for() {
        let tokenizer = HfTokenizer::new(files()).unwrap();
        assert!(!tokenizer.encode("</s>").contains(&2));
        assert_eq!(tokenizer.encode_with_special_tokens("</s>"), [2]);
    }

    #[test]
    fn a_continuation_keeps_its_first_space_and_waits_for_whole_characters() {
        let tokenizer = HfTokenizer::new(files()).unwrap();
        let mut decoder = tokenizer.decoder();
        let parts = [264, 3 + 0xC3, 3 + 0xA9, 2, 260].map(|token| decoder.push(token));
        assert_eq!(parts, [" ab", "", "é", "", "a"]);
        decoder.push(3 + 0xE2);
        assert_eq!(decoder.finish(), "\u{FFFD}");
    }

    #[test]
    fn lengths_are_those_of_the_text() {
        let lengths = HfTokenizer::new(files()).unwrap().byte_lengths();
        assert_eq!(
            (lengths.len(), &lengths[..4], &lengths[259..]),
            (270, &[0, 0, 0, 1][..], &[1, 1, 1, 2, 2, 3, 0, 0, 0, 0, 0][..])
        );
    }

    #[test]
    fn the_manifest_brings_it_back() {
        let tokenizer = Tokenizer::Hf(HfTokenizer::new(files()).unwrap());
        let text = serde_json::to_string(&tokenizer).unwrap();
        assert_eq!(serde_json::from_str::<Tokenizer>(&text).unwrap(), tokenizer);
    }

    #[test]
    fn tokens_beyond_the_model_are_named() {
        let said = HfTokenizer::new(HfFiles { vocab_size: 264, ..files() }).unwrap_err().to_string();
        assert!(said.contains("\"\u{2581}ab\" is number 264") && said.contains("264 tokens"), "{said}");
    }
}
