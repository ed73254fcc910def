//! An answer as it comes: tokens to text, without the white space before it.

use lockstep_model::inference::TextStream;
use lockstep_model::tokenizer::Tokenizer;

/// Tokens of an answer where nothing else is asked for, if the context has room.
const ANSWER_TOKENS: usize = 512;

/// Tokens of an answer where nothing else is asked for, from a model that reads `context` with it.
pub(crate) fn default_tokens(context: usize) -> usize {
    ANSWER_TOKENS.min(context / 2)
}

/// The text of one answer, or of one continuation.
pub(crate) struct Answer {
    text: TextStream,
    /// Text was given out, so that white space belongs to it.
    begun: bool,
}

impl Answer {
    /// An answer, which ends before the first of `stops`. The white space before it belongs to the prompt's form.
    pub(crate) fn new(tokenizer: &Tokenizer, stops: Vec<String>) -> Self {
        Self { text: TextStream::new(tokenizer, stops), begun: false }
    }

    /// What continues a text, white space and all.
    pub(crate) fn continuation(tokenizer: &Tokenizer, stops: Vec<String>) -> Self {
        Self { text: TextStream::new(tokenizer, stops), begun: true }
    }

    /// The text that is certain with `token`, which may be empty.
    pub(crate) fn push(&mut self, token: u32) -> String {
        let text = self.text.push(token);
        self.begin(text)
    }

    /// Whether a stop string came: what was given out is all.
    pub(crate) fn stopped(&self) -> bool {
        self.text.stopped()
    }

    /// The text that waited for what would follow.
    pub(crate) fn finish(self) -> String {
        let rest = self.text.finish();
        if self.begun { rest } else { rest.trim_start().into() }
    }

    fn begin(&mut self, text: String) -> String {
        if self.begun {
            return text;
        }
        let text = text.trim_start();
        self.begun = !text.is_empty();
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_before_an_answer_is_left_out_and_before_a_continuation_is_not() {
        let push = |mut answer: Answer, text: &str| -> String {
            text.bytes().map(|byte| answer.push(u32::from(byte))).collect::<String>() + &answer.finish()
        };
        assert_eq!(push(Answer::new(&Tokenizer::Bytes, vec![]), " \n a b "), "a b ");
        assert_eq!(push(Answer::new(&Tokenizer::Bytes, vec!["\nUser:".into()]), " \nUse"), "Use");
        assert_eq!(push(Answer::continuation(&Tokenizer::Bytes, vec![]), " \n a b "), " \n a b ");
    }
}
