//! Text to tokens and back.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bpe::{Bpe, BpeEncoder, BpeError};
use crate::digest::{bytes_sha256, hex};
use crate::hf_tokenizer::{HfDecoder, HfEncoder, HfTokenizer};

/// A tokenizer that follows from its text without learning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerKind {
    /// One token a byte of UTF-8: 256 tokens, any text.
    Bytes,
    /// One token a character that occurs in the corpus.
    Chars,
}

/// A tokenizer, as stored with every checkpoint.
///
/// Its file, `tokenizer.json`, is for BPE that of the `tokenizers` library, else this type as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Tokenizer {
    /// One token a byte.
    Bytes,
    /// One token for each of these characters, numbered in the order of their code points.
    Chars {
        /// The vocabulary as one string, sorted.
        vocabulary: String,
    },
    /// Learned pieces of words, with a token for the end of a document.
    Bpe(Bpe),
    /// That of a model which was imported.
    Hf(HfTokenizer),
}

/// Why a tokenizer's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The system refused.
    #[error("{path}: the tokenizer cannot be read: {error}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// It holds something else.
    #[error("{path}: the file {problem}", path = path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: BpeError,
    },
}

/// A character that the vocabulary lacks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "character {character:?} at byte {offset} is not in the model's vocabulary of {vocabulary_size} characters; leave it \
     out, or train with tokenizer.kind = \"bytes\""
)]
pub struct UnknownCharacter {
    /// The character.
    pub character: char,
    /// Its place in the text, bytes.
    pub offset: usize,
    /// How many characters the vocabulary has.
    pub vocabulary_size: usize,
}

impl Tokenizer {
    /// The tokenizer of `kind` for `text`.
    pub fn for_text(kind: TokenizerKind, text: &str) -> Self {
        match kind {
            TokenizerKind::Bytes => Self::Bytes,
            TokenizerKind::Chars => Self::Chars { vocabulary: text.chars().collect::<BTreeSet<_>>().iter().collect() },
        }
    }

    /// How many distinct tokens there are.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Chars { vocabulary } => vocabulary.chars().count(),
            Self::Bpe(bpe) => bpe.vocab_size(),
            Self::Hf(hf) => hf.files().vocab_size,
        }
    }

    /// What it is called in a recipe.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Chars { .. } => "chars",
            Self::Bpe(_) => "bpe",
            Self::Hf(_) => "hf",
        }
    }

    /// The text of its file.
    pub fn to_json(&self) -> String {
        match self {
            Self::Bpe(bpe) => bpe.to_json().into(),
            other => serde_json::to_string(other).expect("a name and a text can be written"),
        }
    }

    /// SHA-256 of its file, hexadecimal.
    pub fn sha256(&self) -> String {
        hex(&bytes_sha256(self.to_json().as_bytes()))
    }

    /// Reads a tokenizer's file.
    ///
    /// # Errors
    /// If it cannot be read, or holds something else.
    pub fn read(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = fs::read(path).map_err(|error| TokenizerError::Unreadable { path: path.into(), error })?;
        let refused = |problem| TokenizerError::Refused { path: path.into(), problem };
        let text = std::str::from_utf8(&bytes)
            .map_err(|error| refused(BpeError::Malformed(format!("invalid UTF-8 at byte {}", error.valid_up_to()))))?;
        // Ours are the ones with a kind.
        match serde_json::from_str(text) {
            Ok(Self::Chars { vocabulary }) if !vocabulary.chars().is_sorted_by(|a, b| a < b) => {
                Err(refused(BpeError::Malformed("its characters are not sorted, each once".into())))
            }
            Ok(own) => Ok(own),
            Err(_) => Bpe::from_json(text).map(Self::Bpe).map_err(refused),
        }
    }

    /// The token that stands after each document, and ends a text that is generated. Bytes and characters have none.
    pub fn end_of_text(&self) -> Option<u32> {
        match self {
            Self::Bytes | Self::Chars { .. } => None,
            Self::Bpe(bpe) => Some(bpe.end_of_text()),
            Self::Hf(hf) => hf.files().special.end.first().copied(),
        }
    }

    /// The tokens that end a text which is generated: the end of text, and those of an imported model's turns.
    pub fn stop_tokens(&self) -> Vec<u32> {
        match self {
            Self::Hf(hf) => hf.files().special.end.clone(),
            other => other.end_of_text().into_iter().collect(),
        }
    }

    /// How many bytes of text each token stands for; end-of-text for none.
    pub fn byte_lengths(&self) -> Vec<u32> {
        match self {
            Self::Bytes => vec![1; 256],
            Self::Chars { vocabulary } => vocabulary.chars().map(|character| character.len_utf8() as u32).collect(),
            Self::Bpe(bpe) => {
                let length = |token| if token == bpe.end_of_text() { 0 } else { bpe.bytes_of(token).len() as u32 };
                (0..bpe.vocab_size() as u32).map(length).collect()
            }
            Self::Hf(hf) => hf.byte_lengths(),
        }
    }

    /// An encoder, for many texts.
    pub fn encoder(&self) -> Encoder {
        match self {
            Self::Bytes => Encoder::Bytes,
            Self::Chars { vocabulary } => Encoder::Chars { vocabulary: vocabulary.chars().collect() },
            Self::Bpe(bpe) => Encoder::Bpe(Box::new(bpe.encoder())),
            Self::Hf(hf) => Encoder::Hf(Box::new(hf.encoder())),
        }
    }

    /// The tokens of `text`, as a model reads a text by itself: an imported model's may begin with a token of its own. Names
    /// of special tokens in it are text like any other.
    ///
    /// # Errors
    /// If a character is not in the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, UnknownCharacter> {
        if let Self::Hf(hf) = self {
            return Ok(hf.encode(text));
        }
        let mut tokens = Vec::new();
        self.encoder().encode(text, &mut tokens).map(|()| tokens)
    }

    /// The tokens of a text that a chat template made: names of an imported model's special tokens in it are these tokens.
    ///
    /// # Errors
    /// If a character is not in the vocabulary.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, UnknownCharacter> {
        match self {
            Self::Hf(hf) => Ok(hf.encode_with_special_tokens(text)),
            other => other.encode(text),
        }
    }

    /// A decoder, which takes the tokens of a text's continuation one by one.
    pub fn decoder(&self) -> Decoder {
        match self {
            Self::Bytes => Decoder::Bytes { pending: Vec::new() },
            Self::Chars { vocabulary } => Decoder::Chars { vocabulary: vocabulary.chars().collect() },
            Self::Bpe(bpe) => Decoder::Bpe { bpe: bpe.clone(), pending: Vec::new() },
            Self::Hf(hf) => Decoder::Hf(Box::new(hf.decoder())),
        }
    }

    /// The text of `tokens`; what is no valid text becomes U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        if let Self::Hf(hf) = self {
            return hf.decode(tokens);
        }
        let mut decoder = self.decoder();
        let mut text: String = tokens.iter().map(|&token| decoder.push(token)).collect();
        text.push_str(&decoder.finish());
        text
    }
}

/// Turns texts into tokens.
#[derive(Clone, Debug)]
pub enum Encoder {
    /// Bytes.
    Bytes,
    /// Characters.
    Chars {
        /// The vocabulary, sorted.
        vocabulary: Vec<char>,
    },
    /// Pieces of words.
    Bpe(Box<BpeEncoder>),
    /// An imported model's pieces.
    Hf(Box<HfEncoder>),
}

impl Encoder {
    /// Appends the tokens of `text` to `tokens`.
    ///
    /// # Errors
    /// If a character is not in the vocabulary.
    pub fn encode(&mut self, text: &str, tokens: &mut Vec<u32>) -> Result<(), UnknownCharacter> {
        match self {
            Self::Bytes => tokens.extend(text.bytes().map(u32::from)),
            Self::Chars { vocabulary } => {
                for (offset, character) in text.char_indices() {
                    let found = vocabulary.binary_search(&character);
                    let vocabulary_size = vocabulary.len();
                    tokens.push(found.map_err(|_| UnknownCharacter { character, offset, vocabulary_size })? as u32);
                }
            }
            Self::Bpe(encoder) => encoder.encode(text, tokens),
            Self::Hf(encoder) => encoder.encode(text, tokens),
        }
        Ok(())
    }
}

/// Turns tokens into text as they come; a character is given out once it is complete.
#[derive(Clone, Debug)]
pub enum Decoder {
    /// Bytes, of which an incomplete character may be pending.
    Bytes {
        /// Bytes of an incomplete character.
        pending: Vec<u8>,
    },
    /// Characters.
    Chars {
        /// The vocabulary.
        vocabulary: Vec<char>,
    },
    /// Pieces of words, which may end within a character.
    Bpe {
        /// The vocabulary.
        bpe: Bpe,
        /// Bytes of an incomplete character.
        pending: Vec<u8>,
    },
    /// An imported model's pieces.
    Hf(Box<HfDecoder>),
}

impl Decoder {
    /// The text that `token` completes, which may be empty.
    pub fn push(&mut self, token: u32) -> String {
        match self {
            Self::Chars { vocabulary } => {
                vocabulary.get(token as usize).copied().unwrap_or(char::REPLACEMENT_CHARACTER).to_string()
            }
            Self::Bytes { pending } => {
                pending.push(token as u8);
                complete_text(pending)
            }
            Self::Bpe { bpe, pending } => {
                pending.extend_from_slice(bpe.bytes_of(token));
                complete_text(pending)
            }
            Self::Hf(decoder) => decoder.push(token),
        }
    }

    /// What an incomplete end leaves: U+FFFD, or nothing.
    pub fn finish(self) -> String {
        match self {
            Self::Bytes { pending } | Self::Bpe { pending, .. } => String::from_utf8_lossy(&pending).into_owned(),
            Self::Chars { .. } => String::new(),
            Self::Hf(decoder) => decoder.finish(),
        }
    }
}

/// Takes out of `pending` all but an incomplete character at its end, as text; what is no text becomes U+FFFD.
fn complete_text(pending: &mut Vec<u8>) -> String {
    let incomplete = pending.utf8_chunks().last().map_or(0, |chunk| match std::str::from_utf8(chunk.invalid()) {
        Err(error) if error.error_len().is_none() => chunk.invalid().len(),
        _ => 0,
    });
    let rest = pending.split_off(pending.len() - incomplete);
    let complete = std::mem::replace(pending, rest);
    String::from_utf8_lossy(&complete).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bpe_training::WordCounts;

    proptest! {
        #[test]
        fn text_survives_both_tokenizers(text in "\\PC{0,60}") {
            for kind in [TokenizerKind::Bytes, TokenizerKind::Chars] {
                let tokenizer = Tokenizer::for_text(kind, &text);
                let tokens = tokenizer.encode(&text).unwrap();
                prop_assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocab_size()));
                prop_assert_eq!(tokenizer.decode(&tokens), text.clone());
            }
        }
    }

    #[test]
    fn characters_are_numbered_by_code_point() {
        let tokenizer = Tokenizer::for_text(TokenizerKind::Chars, "hello\n");
        assert_eq!(tokenizer, Tokenizer::Chars { vocabulary: "\nehlo".into() });
        assert_eq!(tokenizer.encode("hole").unwrap(), [2, 4, 3, 1]);
    }

    #[test]
    fn an_unknown_character_is_named_with_its_place() {
        let error = Tokenizer::for_text(TokenizerKind::Chars, "abc").encode("ab☃").unwrap_err();
        assert_eq!(error, UnknownCharacter { character: '☃', offset: 2, vocabulary_size: 3 });
    }

    #[test]
    fn a_file_brings_the_same_tokenizer_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let mut counts = WordCounts::of(["a tale of a tail, 学而时习之 学而"]);
        counts.add(WordCounts::of(["a tail"]));
        let bpe = Tokenizer::Bpe(counts.learn(270).unwrap());
        for tokenizer in [Tokenizer::Bytes, Tokenizer::for_text(TokenizerKind::Chars, "学而a"), bpe] {
            fs::write(&path, tokenizer.to_json()).unwrap();
            assert_eq!(Tokenizer::read(&path).unwrap(), tokenizer);
            assert_eq!(tokenizer.byte_lengths().len(), tokenizer.vocab_size());
        }
        fs::write(&path, r#"{"kind":"chars","vocabulary":"ba"}"#).unwrap();
        assert!(Tokenizer::read(&path).unwrap_err().to_string().contains("sorted"));
        fs::write(&path, "{}").unwrap();
        assert!(matches!(Tokenizer::read(&path), Err(TokenizerError::Refused { .. })));
        assert!(matches!(Tokenizer::read(dir.path()), Err(TokenizerError::Unreadable { .. })));
    }

    #[test]
    fn pieces_that_end_within_a_character_are_put_together() {
        let text = "学而时习之，不亦说乎？";
        let bpe = Tokenizer::Bpe(WordCounts::of([text]).learn(300).unwrap());
        let tokens = bpe.encode(text).unwrap();
        assert!(tokens.len() > text.chars().count(), "a character is several tokens here");
        assert_eq!(bpe.decode(&tokens), text);
        let mut decoder = bpe.decoder();
        let parts: Vec<String> = tokens.iter().map(|&token| decoder.push(token)).collect();
        assert!(parts.iter().all(|part| !part.contains(char::REPLACEMENT_CHARACTER)));
    }

    #[test]
    fn bytes_of_a_character_wait_for_its_last() {
        let mut decoder = Tokenizer::Bytes.decoder();
        let out: Vec<String> = "é!".bytes().map(|byte| decoder.push(u32::from(byte))).collect();
        assert_eq!(out, ["", "é", "!"]);
        assert_eq!(Tokenizer::Bytes.decode(&[0xE2, 0x98]), "\u{FFFD}");
    }
}
