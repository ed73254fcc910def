//! Byte-level byte-pair encoding (Sennrich et al., arXiv:1508.07909; Radford et al., 2019) in the form that Hugging Face's
//! `tokenizers` reads and writes, `tokenizer.json`.
//!
//! Text is cut into [`words`](crate::words); the bytes of a word are its first tokens, each written as one printable
//! character; learned pairs are merged, best first. The `tokenizers` crate learns, reads, writes and merges; cutting is
//! ours, and each thread remembers the words it met, which is what makes encoding fast.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokenizers::models::bpe::BPE;
use tokenizers::{DecoderWrapper, Model as _, ModelWrapper, PreTokenizerWrapper};

use crate::words::Words;

/// The token after each document, special in `tokenizer.json`: no text is encoded to it.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// The least vocabulary: all bytes, and end-of-text.
pub const MIN_VOCAB_SIZE: usize = 257;

/// Slots of an encoder's memory of words, a power of two: at most some 6 MB a thread.
const REMEMBERED_WORDS: usize = 1 << 15;
/// Longest word that is remembered, in bytes.
const REMEMBERED_BYTES: usize = 64;

/// Why there is no such tokenizer.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BpeError {
    /// No `tokenizer.json`, or a broken one.
    #[error("is no tokenizer.json of the tokenizers library: {0}")]
    Malformed(String),
    /// A tokenizer of another make.
    #[error(
        "{0}; only byte-level BPE with GPT-2's pre-tokenizer is read. Learn one with --tokenizer bpe, or, if it \
             belongs to a model, import that with `lockstep import` and take the run's tokenizer.json"
    )]
    Unsupported(String),
    /// A tokenizer that a model brought, of a make that is not read.
    #[error("{0}; use a model whose tokenizer.json is whole, with a BPE model")]
    Foreign(String),
    /// Nothing can be learned.
    #[error("the vocabulary cannot be learned: {0}")]
    Learning(String),
}

/// A byte-level BPE tokenizer. Cloning shares it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Bpe(Arc<Loaded>);

/// How it stands in a checkpoint's manifest.
#[derive(Serialize, Deserialize)]
struct Stored {
    /// The text of `tokenizer.json`.
    tokenizer_json: String,
}

struct Loaded {
    json: String,
    merges: BPE,
    /// What each token stands for; for special tokens, their name.
    bytes_of: Vec<Box<[u8]>>,
    end_of_text: u32,
}

impl Bpe {
    /// Reads the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// If it is none, or of another make than byte-level BPE with GPT-2's pre-tokenizer and `<|endoftext|>`.
    pub fn from_json(json: &str) -> Result<Self, BpeError> {
        let read = tokenizers::Tokenizer::from_bytes(json).map_err(|error| BpeError::Malformed(error.to_string()))?;
        let refuse = |what: &str| Err(BpeError::Unsupported(what.into()));
        if read.get_normalizer().is_some() {
            return refuse("it normalizes text before encoding it");
        }
        match read.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(level)) if level.use_regex && !level.add_prefix_space => {}
            _ => return refuse("its pre_tokenizer is not ByteLevel with use_regex and without add_prefix_space"),
        }
        if !matches!(read.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return refuse("its decoder is not ByteLevel");
        }
        let ModelWrapper::BPE(merges) = read.get_model() else { return refuse("its model is not BPE") };
        let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if merges.dropout.is_some_and(|p| p > 0.0)
            || set(&merges.continuing_subword_prefix)
            || set(&merges.end_of_word_suffix)
            || merges.byte_fallback
            || merges.ignore_merges
        {
            return refuse("its model has dropout, a prefix, a suffix, byte_fallback or ignore_merges");
        }
        let added = read.get_added_tokens_decoder();
        if let Some(plain) = added.values().find(|token| !token.special) {
            return refuse(&format!("its added token {:?} is not special", plain.content));
        }

        let vocabulary = read.get_vocab(true);
        let mut bytes_of: Vec<Option<Box<[u8]>>> = vec![None; vocabulary.len()];
        for (name, id) in vocabulary {
            let bytes = match added.contains_key(&id) {
                true => Some(name.clone().into_bytes()),
                false => name.chars().map(byte_of_character).collect(),
            };
            let Some(bytes) = bytes else { return refuse(&format!("its token {name:?} is not written in bytes")) };
            let Some(place) = bytes_of.get_mut(id as usize) else {
                return refuse(&format!("its tokens are not numbered without gaps: {name:?} is {id}"));
            };
            *place = Some(bytes.into());
        }
        let Some(bytes_of) = bytes_of.into_iter().collect::<Option<Vec<_>>>() else {
            return refuse("two of its tokens have the same number");
        };
        if let Some(byte) = (0..=255).find(|&byte| merges.token_to_id(&character_of_byte(byte).to_string()).is_none()) {
            return refuse(&format!("it has no token for byte {byte}"));
        }
        let end_of_text = read.token_to_id(END_OF_TEXT).filter(|id| added.contains_key(id));
        let Some(end_of_text) = end_of_text else {
            return refuse(&format!("it has no special token {END_OF_TEXT}"));
        };
        Ok(Self(Arc::new(Loaded { json: json.into(), merges: merges.clone(), bytes_of, end_of_text })))
    }

    /// The text of its `tokenizer.json`.
    pub fn to_json(&self) -> &str {
        &self.0.json
    }

    /// How many distinct tokens there are, end-of-text included.
    pub fn vocab_size(&self) -> usize {
        self.0.bytes_of.len()
    }

    /// The number of `<|endoftext|>`.
    pub fn end_of_text(&self) -> u32 {
        self.0.end_of_text
    }

    /// The bytes that `token` stands for; nothing for a number beyond the vocabulary.
    pub fn bytes_of(&self, token: u32) -> &[u8] {
        self.0.bytes_of.get(token as usize).map_or(&[], |bytes| bytes)
    }

    /// An encoder, which remembers the words it met.
    pub fn encoder(&self) -> BpeEncoder {
        BpeEncoder { bpe: self.clone(), words: Words::new(), known: vec![None; REMEMBERED_WORDS] }
    }
}

impl PartialEq for Bpe {
    fn eq(&self, other: &Self) -> bool {
        self.0.json == other.0.json
    }
}

impl Eq for Bpe {}

impl fmt::Debug for Bpe {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Bpe").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl TryFrom<Stored> for Bpe {
    type Error = BpeError;

    fn try_from(stored: Stored) -> Result<Self, BpeError> {
        Self::from_json(&stored.tokenizer_json)
    }
}

impl From<Bpe> for Stored {
    fn from(bpe: Bpe) -> Self {
        Self { tokenizer_json: bpe.0.json.clone() }
    }
}

/// Text to tokens, with a memory of words: a cache in which each word has one place, by its hash, and the latest stays.
#[derive(Clone, Debug)]
pub struct BpeEncoder {
    bpe: Bpe,
    words: Words,
    known: Vec<Option<KnownWord>>,
}

#[derive(Clone, Debug)]
struct KnownWord {
    text: Box<str>,
    tokens: Box<[u32]>,
}

impl BpeEncoder {
    /// Appends the tokens of `text`, which is text throughout: `<|endoftext|>` in it is encoded letter by letter.
    pub fn encode(&mut self, text: &str, tokens: &mut Vec<u32>) {
        let Self { bpe, words, known } = self;
        words.for_each(text, |word| {
            if word.len() > REMEMBERED_BYTES {
                tokens.extend(merge(&bpe.0.merges, word));
                return;
            }
            let place = &mut known[hash(word) as usize % REMEMBERED_WORDS];
            match place {
                Some(found) if *found.text == *word => tokens.extend_from_slice(&found.tokens),
                _ => {
                    let merged: Box<[u32]> = merge(&bpe.0.merges, word).collect();
                    tokens.extend_from_slice(&merged);
                    *place = Some(KnownWord { text: word.into(), tokens: merged });
                }
            }
        });
    }
}

/// The tokens of one word.
fn merge(merges: &BPE, word: &str) -> impl Iterator<Item = u32> {
    let written: String = word.bytes().map(character_of_byte).collect();
    // Only a character without a token fails, and every byte has one.
    let tokens = merges.tokenize(&written).expect("every byte has a token");
    tokens.into_iter().map(|token| token.id)
}

/// FNV-1a, 64 bits, folded so that its low bits depend on all.
fn hash(word: &str) -> u64 {
    let hash = word
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    hash ^ hash >> 32
}

/// Whether a byte's character is the one of its own code point: the printable ones of Latin-1.
const fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// How the bytes are written in a vocabulary (`bytes_to_unicode` of openai/gpt-2): printable ones as themselves, the others
/// as U+0100, U+0101, … in their order.
const CHARACTERS: [char; 256] = {
    let mut characters = ['\0'; 256];
    let (mut byte, mut others) = (0, 0);
    while byte < 256 {
        characters[byte] = if is_printable(byte as u8) {
            byte as u8 as char
        } else {
            others += 1;
            match char::from_u32(255 + others) {
                Some(character) => character,
                None => panic!("these code points are characters"),
            }
        };
        byte += 1;
    }
    characters
};

/// How a byte is written in a vocabulary.
pub(crate) fn character_of_byte(byte: u8) -> char {
    CHARACTERS[byte as usize]
}

/// The byte that is written as `character`, if one is.
pub(crate) fn byte_of_character(character: char) -> Option<u8> {
    match u8::try_from(u32::from(character)) {
        Ok(byte) => is_printable(byte).then_some(byte),
        Err(_) => {
            let others = (0..=255u8).filter(|&byte| !is_printable(byte));
            others.zip(256u32..).find(|(_, code)| *code == u32::from(character)).map(|(byte, _)| byte)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bpe_training::WordCounts;

    const TEXT: &str =
        "the cat and the dog sat on the mat, and the cat's hat.\n学而时习之，不亦说乎？\n\n学而不思则罔。 ";

    fn small() -> Bpe {
        let mut counts = WordCounts::default();
        counts.add(WordCounts::of([TEXT; 3]));
        counts.learn(300).unwrap()
    }

    fn encode(bpe: &Bpe, text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        bpe.encoder().encode(text, &mut tokens);
        tokens
    }

    fn reference(bpe: &Bpe, text: &str) -> Vec<u32> {
        let mut library = tokenizers::Tokenizer::from_bytes(bpe.to_json()).unwrap();
        library.set_encode_special_tokens(true);
        library.encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    #[test]
    fn bytes_and_characters_belong_together() {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        for byte in 0..=255 {
            assert_eq!(byte_of_character(character_of_byte(byte)), Some(byte));
            assert!(alphabet.contains(&character_of_byte(byte)));
        }
        assert_eq!((character_of_byte(b' '), byte_of_character('中')), ('Ġ', None));
    }

    #[test]
    fn it_is_what_it_was_after_a_checkpoint() {
        let bpe = small();
        let back: Bpe = serde_json::from_str(&serde_json::to_string(&bpe).unwrap()).unwrap();
        assert_eq!(back, bpe);
        assert_eq!((bpe.vocab_size(), bpe.bytes_of(bpe.end_of_text())), (300, END_OF_TEXT.as_bytes()));
        assert_eq!(encode(&back, TEXT), encode(&bpe, TEXT));
    }

    #[test]
    fn the_end_of_text_is_never_found_in_text() {
        let bpe = small();
        let tokens = encode(&bpe, "a<|endoftext|>b");
        assert!(!tokens.contains(&bpe.end_of_text()));
    }

    #[test]
    fn other_makes_are_refused_in_words() {
        let good = small().to_json().to_string();
        let refused = |from: &str, to: &str| {
            assert!(good.contains(from), "{from}");
            Bpe::from_json(&good.replace(from, to)).unwrap_err().to_string()
        };
        assert!(Bpe::from_json("{}").unwrap_err().to_string().contains("tokenizer.json"));
        assert!(refused("\"add_prefix_space\": false", "\"add_prefix_space\": true").contains("pre_tokenizer"));
        assert!(refused("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}").contains("normalizes"));
        assert!(refused("\"special\": true", "\"special\": false").contains("not special"));
        assert!(refused("<|endoftext|>", "<|end|>").contains("<|endoftext|>"));
    }

    proptest! {
        #[test]
        fn tokens_are_those_of_the_library(text in "[ theca'sdog\\n学而时习之，\u{e9}\u{1F600}]{0,60}") {
            let bpe = small();
            prop_assert_eq!(encode(&bpe, &text), reference(&bpe, &text));
        }

        #[test]
        fn any_text_survives(text in any::<String>()) {
            let bpe = small();
            let tokens = encode(&bpe, &text);
            let bytes: Vec<u8> = tokens.iter().flat_map(|&token| bpe.bytes_of(token)).copied().collect();
            prop_assert_eq!(String::from_utf8(bytes).unwrap(), text);
        }
    }
}
