//! GPT-2's pre-tokenizer: text cut into the words that byte pairs never cross.

use std::sync::LazyLock;

use regex_automata::meta::{Cache, Regex};
use regex_automata::{Anchored, Input};

/// GPT-2's expression (`encoder.py` of openai/gpt-2) without its one look-ahead, `\s+(?!\S)`, which [`Words::next_end`]
/// carries out. Every character begins a match.
const EXPRESSION: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

static REGEX: LazyLock<Regex> = LazyLock::new(|| Regex::new(EXPRESSION).expect("the expression is valid"));

/// Cuts texts into words; holds the automaton's scratch memory, so one a thread.
#[derive(Clone, Debug)]
pub struct Words {
    cache: Cache,
}

impl Words {
    /// Ready to cut.
    pub fn new() -> Self {
        Self { cache: REGEX.create_cache() }
    }

    /// Gives out the words of `text` in order; together they are the text.
    pub fn for_each<'t>(&mut self, text: &'t str, mut each: impl FnMut(&'t str)) {
        let mut start = 0;
        while start < text.len() {
            let end = self.next_end(text, start);
            each(&text[start..end]);
            start = end;
        }
    }

    /// Where the word ends that starts at byte `start` (below the length).
    fn next_end(&mut self, text: &str, start: usize) -> usize {
        let input = Input::new(text).span(start..text.len()).anchored(Anchored::Yes);
        let end = REGEX.search_half_with(&mut self.cache, &input).map_or(text.len(), |found| found.offset());
        // `\s+(?!\S)`: white space leaves its last character to the word that follows, unless it is its only one.
        match text[start..end].chars().next_back() {
            Some(last) if end < text.len() && last.is_whitespace() && start + last.len_utf8() < end => {
                end - last.len_utf8()
            }
            _ => end,
        }
    }
}

impl Default for Words {
    fn default() -> Self {
        Self::new()
    }
}

/// The last byte at which `text` may be cut so that the words of both parts are the words of the whole: before white
/// space that follows something else. `None` where there is no such place.
pub fn last_safe_cut(text: &str) -> Option<usize> {
    let mut follower: Option<(usize, char)> = None;
    for (index, character) in text.char_indices().rev() {
        match follower {
            Some((cut, space)) if space.is_whitespace() && !character.is_whitespace() => return Some(cut),
            _ => follower = Some((index, character)),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    fn words(text: &str) -> Vec<&str> {
        let mut found = Vec::new();
        Words::new().for_each(text, |word| found.push(word));
        found
    }

    /// The same by the `tokenizers` crate, which runs the expression with its look-ahead.
    fn reference(text: &str) -> Vec<&str> {
        let mut pretokenized = PreTokenizedString::from(text);
        ByteLevel::new(false, true, true).pre_tokenize(&mut pretokenized).unwrap();
        let splits = pretokenized.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (start, end), _)| &text[start..end]).filter(|word| !word.is_empty()).collect()
    }

    #[test]
    fn words_carry_the_space_before_them() {
        assert_eq!(words("It's  a dog,\n\n no?"), ["It", "'s", " ", " a", " dog", ",", "\n\n", " no", "?"]);
        assert_eq!(words("学而时习之，  1234\n"), ["学而时习之", "，", " ", " 1234", "\n"]);
        assert_eq!(words(""), Vec::<&str>::new());
    }

    proptest! {
        #[test]
        fn words_are_those_of_the_reference(text in "[a-c'strevmld 1²\\n\\t\u{a0}\u{3000}é中。\u{301}!_]{0,40}") {
            prop_assert_eq!(words(&text), reference(&text));
        }

        #[test]
        fn words_of_any_text_are_those_of_the_reference(text in any::<String>()) {
            prop_assert_eq!(words(&text), reference(&text));
        }

        #[test]
        fn a_safe_cut_changes_no_word(text in "[ab'st 1\\n\u{3000}中。]{0,30}") {
            if let Some(cut) = last_safe_cut(&text) {
                let parts = [words(&text[..cut]), words(&text[cut..])].concat();
                prop_assert_eq!(parts, words(&text));
            }
        }
    }
}
