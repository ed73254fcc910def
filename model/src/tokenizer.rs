//! Text to tokens and back.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Which tokenizer a recipe asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerKind {
    /// One token a byte of UTF-8: 256 tokens, any text.
    Bytes,
    /// One token a character that occurs in the corpus.
    Chars,
}

/// A tokenizer, as stored with every checkpoint.
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
        }
    }

    /// The tokens of `text`.
    ///
    /// # Errors
    /// If a character is not in the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, UnknownCharacter> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Chars { vocabulary } => {
                let vocabulary: Vec<char> = vocabulary.chars().collect();
                let token = |(offset, character): (usize, char)| {
                    let found = vocabulary.binary_search(&character);
                    let unknown = UnknownCharacter { character, offset, vocabulary_size: vocabulary.len() };
                    found.map(|index| index as u32).map_err(|_| unknown)
                };
                text.char_indices().map(token).collect()
            }
        }
    }

    /// A decoder, which takes tokens one by one.
    pub fn decoder(&self) -> Decoder {
        match self {
            Self::Bytes => Decoder::Bytes { pending: Vec::new() },
            Self::Chars { vocabulary } => Decoder::Chars { vocabulary: vocabulary.chars().collect() },
        }
    }

    /// The text of `tokens`; what is no valid text becomes U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut decoder = self.decoder();
        let mut text: String = tokens.iter().map(|&token| decoder.push(token)).collect();
        text.push_str(&decoder.finish());
        text
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
                let incomplete = std::str::from_utf8(pending).err().is_some_and(|error| error.error_len().is_none());
                if incomplete { String::new() } else { String::from_utf8_lossy(&std::mem::take(pending)).into_owned() }
            }
        }
    }

    /// What an incomplete end leaves: U+FFFD, or nothing.
    pub fn finish(self) -> String {
        match self {
            Self::Bytes { pending } => String::from_utf8_lossy(&pending).into_owned(),
            Self::Chars { .. } => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
    fn bytes_of_a_character_wait_for_its_last() {
        let mut decoder = Tokenizer::Bytes.decoder();
        let out: Vec<String> = "é!".bytes().map(|byte| decoder.push(u32::from(byte))).collect();
        assert_eq!(out, ["", "é", "!"]);
        assert_eq!(Tokenizer::Bytes.decode(&[0xE2, 0x98]), "\u{FFFD}");
    }
}
