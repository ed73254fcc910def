//! Learning byte pairs: count words, then let the `tokenizers` crate merge what occurs most.

use std::collections::BTreeMap;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::bpe::{Bpe, BpeError, END_OF_TEXT, MIN_VOCAB_SIZE, character_of_byte};
use crate::words::Words;

/// Distinct words beyond this size in bytes make the rarest ones be forgotten while counting.
const COUNTED_BYTES: usize = 32 << 20;
/// Distinct words learned from, in bytes: the most frequent ones. Learning takes about a hundred times as much memory.
const LEARNED_BYTES: usize = 4 << 20;
/// How often a pair must occur to become a token.
const MIN_FREQUENCY: u64 = 2;

/// How often each word occurs.
///
/// Memory is bounded: where there are more distinct words than fit (as in Chinese, which has no spaces), the rarest are
/// left out. What is left out depends on the texts and the order in which they are added, and on nothing else.
#[derive(Clone, Debug, Default)]
pub struct WordCounts {
    counts: BTreeMap<Box<str>, u64>,
    bytes: usize,
}

impl WordCounts {
    /// The words of texts.
    pub fn of<'t>(texts: impl IntoIterator<Item = &'t str>) -> Self {
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        let mut words = Words::new();
        texts.into_iter().for_each(|text| words.for_each(text, |word| *counts.entry(word).or_default() += 1));
        let bytes = counts.keys().map(|word| word.len()).sum();
        Self { counts: counts.into_iter().map(|(word, count)| (word.into(), count)).collect(), bytes }
    }

    /// Adds the words of other texts.
    pub fn add(&mut self, other: Self) {
        for (word, count) in other.counts {
            let length = word.len();
            let known = self.counts.entry(word).or_insert_with(|| {
                self.bytes += length;
                0
            });
            *known += count;
        }
        let mut least = 1;
        while self.bytes > COUNTED_BYTES {
            self.counts.retain(|_, count| *count > least);
            self.bytes = self.counts.keys().map(|word| word.len()).sum();
            least *= 2;
        }
    }

    /// Learns a vocabulary of at most `vocab_size` tokens (at least [`MIN_VOCAB_SIZE`]): end-of-text, the 256 bytes, and
    /// merged pairs; fewer where the text holds fewer pairs that occur twice.
    ///
    /// # Errors
    /// If the vocabulary is too small, or the library refuses.
    pub fn learn(self, vocab_size: usize) -> Result<Bpe, BpeError> {
        if vocab_size < MIN_VOCAB_SIZE {
            let least = format!("{vocab_size} tokens are fewer than the {MIN_VOCAB_SIZE} of all bytes and end-of-text");
            return Err(BpeError::Learning(least));
        }
        let failed = |error: tokenizers::Error| BpeError::Learning(error.to_string());
        let end_of_text = AddedToken::from(END_OF_TEXT, true);
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(MIN_FREQUENCY)
            .show_progress(false)
            .special_tokens(vec![end_of_text.clone()])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let written = |word: &str| word.bytes().map(character_of_byte).collect::<String>();
        let words = self.most_frequent().into_iter().map(|(word, count)| (written(&word).into(), count)).collect();
        let mut merges = BPE::default();
        trainer.do_train(&words, &mut merges).map_err(failed)?;

        let mut tokenizer = Tokenizer::new(merges);
        let level = ByteLevel::new(false, true, true);
        tokenizer.with_pre_tokenizer(Some(level));
        tokenizer.with_post_processor(Some(level.trim_offsets(false)));
        tokenizer.with_decoder(Some(level));
        tokenizer.add_special_tokens([end_of_text]).map_err(failed)?;
        Bpe::from_json(&tokenizer.to_string(true).map_err(failed)?)
    }

    /// The words to learn from, the most frequent ones; counts are halved until the library can add them up, in 31 bits.
    fn most_frequent(self) -> Vec<(Box<str>, u64)> {
        let mut words: Vec<(Box<str>, u64)> = self.counts.into_iter().collect();
        words.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let mut bytes = 0;
        words.retain(|(word, _)| {
            let fits = bytes + word.len() <= LEARNED_BYTES;
            bytes += if fits { word.len() } else { 0 };
            fits
        });
        let total: u64 = words.iter().map(|(word, count)| word.len() as u64 * count).sum();
        let halvings = (64 - total.leading_zeros()).saturating_sub(31);
        words.into_iter().map(|(word, count)| (word, count >> halvings)).filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_whatever_the_parts() {
        let text = "one two two three\nthree three";
        let mut parts = WordCounts::of(["one two"]);
        parts.add(WordCounts::of([" two three\nthree three"]));
        assert_eq!(parts.counts, WordCounts::of([text]).counts);
        assert_eq!((parts.counts[" three"], parts.bytes), (2, WordCounts::of([text]).bytes));
    }

    #[test]
    fn the_same_text_teaches_the_same_vocabulary() {
        let text = "she sells sea shells by the sea shore; the shells she sells are sea shells\n".repeat(20);
        let learn = || WordCounts::of([text.as_str()]).learn(290).unwrap();
        let first = learn();
        assert!((0..10).all(|_| learn() == first));
        let has = |piece: &[u8]| (0..290).any(|token| first.bytes_of(token) == piece);
        assert!(has(b" shells") && has(b" sea") && !has(b"the sea"), "pieces are words and never cross them");
    }

    #[test]
    fn little_text_makes_a_small_vocabulary_and_a_smaller_one_is_refused() {
        assert_eq!(WordCounts::of(["aa aa aa"]).learn(5000).unwrap().vocab_size(), MIN_VOCAB_SIZE + 2);
        assert!(WordCounts::of(["aa"]).learn(256).unwrap_err().to_string().contains("257"));
    }

    #[test]
    fn counts_beyond_31_bits_are_halved() {
        let counts = BTreeMap::from([("ab".into(), 1 << 40), ("cd".into(), 3)]);
        let words = WordCounts { counts, bytes: 4 }.most_frequent();
        assert_eq!(words.len(), 1);
        assert!(words[0].1 * 2 < 1 << 31 && words[0].1 * 4 >= 1 << 31, "{}", words[0].1);
    }
}
