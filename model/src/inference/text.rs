//! Tokens to text that is certain.

use crate::tokenizer::{Decoder, Tokenizer};

/// Makes text of tokens as they come, up to a stop string. What may still become part of one is held back, and so are
/// incomplete characters.
#[derive(Debug)]
pub struct TextStream {
    decoder: Decoder,
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl TextStream {
    /// Of a continuation in `tokenizer`'s tokens, which ends before the first of `stops`. Empty ones are left out.
    pub fn new(tokenizer: &Tokenizer, mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { decoder: tokenizer.decoder(), stops, held: String::new(), stopped: false }
    }

    /// The text that `token` makes certain, which may be empty; after a stop string there is none.
    pub fn push(&mut self, token: u32) -> String {
        let text = self.decoder.push(token);
        self.add(&text)
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back, at the end.
    pub fn finish(mut self) -> String {
        let rest = std::mem::replace(&mut self.decoder, Decoder::Bytes { pending: Vec::new() }).finish();
        let mut text = self.add(&rest);
        text.push_str(&self.held);
        text
    }

    fn add(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            let mut certain = std::mem::take(&mut self.held);
            certain.truncate(end);
            return certain;
        }
        let begins_a_stop = |&start: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[start..]));
        let certain = self.held.char_indices().map(|(start, _)| start).find(begins_a_stop).unwrap_or(self.held.len());
        let held = self.held.split_off(certain);
        std::mem::replace(&mut self.held, held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(text: &str, stops: &[&str]) -> (Vec<String>, bool, String) {
        let mut stream = TextStream::new(&Tokenizer::Bytes, stops.iter().map(|stop| stop.to_string()).collect());
        let parts = text.bytes().map(|byte| stream.push(u32::from(byte))).collect();
        (parts, stream.stopped(), stream.finish())
    }

    #[test]
    fn text_comes_as_it_is_without_stops() {
        assert_eq!(stream("aé", &[]), (vec!["a".into(), String::new(), "é".into()], false, String::new()));
        assert!(!stream("a", &[""]).1, "an empty text stops nothing");
    }

    #[test]
    fn what_may_become_a_stop_is_held_back() {
        let (parts, stopped, rest) = stream("x--y---", &["--z"]);
        assert_eq!(parts, ["x", "", "", "--y", "", "", "-"]);
        assert_eq!((stopped, rest.as_str()), (false, "--"));
    }

    #[test]
    fn nothing_comes_after_the_first_stop() {
        let (parts, stopped, rest) = stream("ab<end>cd", &["</", "<end>", "nd>"]);
        assert_eq!(parts.concat(), "ab", "of two that are complete at once, the one that begins first");
        assert_eq!((stopped, rest.as_str()), (true, ""));
    }

    #[test]
    fn an_incomplete_character_shows_at_the_end() {
        let mut stream = TextStream::new(&Tokenizer::Bytes, Vec::new());
        assert_eq!(stream.push(0xE2), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
    }
}
