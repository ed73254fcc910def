//! Which tokens of a conversation a model learns: those that it would have to say itself, the end of an answer among them.
//!
//! By the prefix property of chat templates: the messages before an answer, rendered with what begins one, are what the
//! model reads; what the answer adds to that text is what it says. Texts become tokens piece by piece in this order, so
//! that what is read stands there as in a prompt.

use std::ops::Range;

use lockstep_model::bpe::END_OF_TEXT;
use lockstep_model::chat_template::{ChatTemplateError, Day, Message};
use lockstep_model::packing::Example;
use lockstep_model::tokenizer::{Tokenizer, UnknownCharacter};

use super::template::{Form, Template};

/// What a template that asks for the day is told while a model learns: a run does not depend on when it starts.
pub(crate) const DAY: Day = Day { year: 2024, month: 7, day: 26 };
/// What follows an answer in a written dialogue. Where no token ends a text, this does.
const NEXT_TURN: &str = "\n\nUser:";

/// Why a conversation cannot be learned.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LearnError {
    /// The template refuses it.
    #[error(transparent)]
    Template(#[from] ChatTemplateError),
    /// A character that the model does not know.
    #[error(transparent)]
    Character(#[from] UnknownCharacter),
    /// The template writes a turn otherwise once others follow.
    #[error(
        "the chat template writes the messages up to turn {turn} otherwise than it writes them within the whole conversation, \
         so what the model would have to say is not certain; shorten the conversation to that turn, or give the model another \
         template"
    )]
    NoPrefix {
        /// The turn, from 1.
        turn: usize,
    },
    /// The template changes an answer that was cut off.
    #[error(
        "the chat template does not write the last answer as it is, so where it was cut off is not certain; leave the line out, \
         or give the model another template"
    )]
    NoCut,
}

/// The conversation as a model learns it by `template`; empty where it has no answer to learn.
///
/// # Errors
/// If it cannot be written down for the model.
pub(crate) fn example(template: &Template, messages: &[Message]) -> Result<Example, LearnError> {
    let mut script = Script::of(template);
    script.read_and_say(messages, 0..messages.len())?;
    Ok(script.example())
}

/// The messages of `answer` as a model learns them after `prompt`, of which no answer is learned; without its end, if the last
/// of them was cut off.
///
/// # Errors
/// If they cannot be written down for the model.
pub(crate) fn answer(
    template: &Template,
    prompt: &[Message],
    answer: &[Message],
    is_cut: bool,
) -> Result<Example, LearnError> {
    let messages = [prompt, answer].concat();
    let (mut script, whole) = (Script::of(template), messages.len() - usize::from(is_cut));
    script.read_and_say(&messages, prompt.len()..whole)?;
    if is_cut {
        script.say_beginning(&messages)?;
    }
    Ok(script.example())
}

/// A conversation as it is written down.
struct Script<'a> {
    template: &'a Template,
    text: String,
    tokens: Vec<u32>,
    /// Of each token, whether the model would have to say it.
    learned: Vec<bool>,
    /// Places of tokens after which a text ends that goes on otherwise, and the token that ends it.
    ends: Vec<(usize, u32)>,
}

impl<'a> Script<'a> {
    fn of(template: &'a Template) -> Self {
        Self { template, text: String::new(), tokens: Vec::new(), learned: Vec::new(), ends: Vec::new() }
    }

    /// The model reads `messages` up to each answer among `turns`, and says it.
    fn read_and_say(&mut self, messages: &[Message], turns: Range<usize>) -> Result<(), LearnError> {
        for turn in turns.filter(|&turn| messages[turn].role == "assistant") {
            let answer = self.read_up_to(messages, turn)?;
            self.say(&answer)?;
            self.say_text_end(messages.get(turn + 1).map(|next| next.role.as_str()))?;
        }
        Ok(())
    }

    /// The model reads `messages` up to the last of them, and says that without an end.
    fn say_beginning(&mut self, messages: &[Message]) -> Result<(), LearnError> {
        let turn = messages.len() - 1;
        let answer = self.read_up_to(messages, turn)?;
        let said = messages[turn].content.trim();
        let end = answer.find(said).ok_or(LearnError::NoCut)? + said.len();
        let from = self.tokens.len();
        self.write(&answer[..end])?;
        self.learned[from..].fill(true);
        Ok(())
    }

    /// The model reads what comes before the answer `turn`. The text of that answer.
    fn read_up_to(&mut self, messages: &[Message], turn: usize) -> Result<String, LearnError> {
        let no_prefix = LearnError::NoPrefix { turn: turn + 1 };
        let prompt = self.template.render(&messages[..turn], true, DAY)?;
        let whole = self.template.render(&messages[..=turn], false, DAY)?;
        let Some(answer) = whole.strip_prefix(&prompt) else { return Err(no_prefix) };
        if !self.read(&prompt)? {
            return Err(no_prefix);
        }
        Ok(answer.to_owned())
    }

    /// The model reads on until the text is `whole`; false if it does not begin with what was written so far.
    fn read(&mut self, whole: &str) -> Result<bool, UnknownCharacter> {
        let Some(piece) = whole.strip_prefix(&self.text) else { return Ok(false) };
        self.write(piece)?;
        Ok(true)
    }

    /// The model says `answer`, as its template writes it, up to the token that ends it.
    fn say(&mut self, answer: &str) -> Result<(), UnknownCharacter> {
        let written = matches!(self.template.form(), Form::Dialogue | Form::Lines);
        // What stands between turns of a written dialogue is not said.
        let answer = if written { answer.trim_end() } else { answer };
        let from = self.tokens.len();
        self.write(answer)?;
        let ends = self.template.ends();
        let by_text = self.template.stops().iter().any(|stop| answer.contains(stop.as_str()));
        let until = match self.tokens[from..].iter().rposition(|token| !written && ends.contains(token)) {
            Some(end) => from + end + 1,
            None => {
                let last = self.tokens.len().checked_sub(1).filter(|last| *last >= from && !by_text);
                self.ends.extend(last.zip(ends.first().copied()));
                self.tokens.len()
            }
        };
        self.learned[from..until].fill(true);
        Ok(())
    }

    /// The model goes on to the next turn, if nothing but that ends an answer, and the turn is the user's.
    fn say_text_end(&mut self, next: Option<&str>) -> Result<(), UnknownCharacter> {
        let by_text = self.template.form() == Form::Dialogue && self.template.ends().is_empty();
        if by_text && next.is_none_or(|role| role == "user") {
            let from = self.tokens.len();
            self.write(NEXT_TURN)?;
            self.learned[from..].fill(true);
        }
        Ok(())
    }

    /// Adds the tokens of a piece of text: as they are in the whole text, if they follow there on what stands here.
    fn write(&mut self, piece: &str) -> Result<(), UnknownCharacter> {
        self.text.push_str(piece);
        let whole = self.template.encode(&self.text)?;
        match whole.strip_prefix(&self.tokens[..]) {
            Some(rest) => self.tokens.extend(rest),
            None => self.tokens.extend(self.template.encode_piece(piece)?),
        }
        self.learned.resize(self.tokens.len(), false);
        Ok(())
    }

    /// Of each token what comes after it, up to the last that is learned.
    fn example(self) -> Example {
        let Self { tokens, learned, ends, .. } = self;
        let mut example = Example {
            targets: tokens.iter().skip(1).copied().chain([0]).take(tokens.len()).collect(),
            learned: learned.into_iter().skip(1).chain([false]).take(tokens.len()).collect(),
            tokens,
        };
        for (place, end) in ends {
            (example.targets[place], example.learned[place]) = (end, true);
        }
        let length = example.learned.iter().rposition(|learned| *learned).map_or(0, |last| last + 1);
        example.tokens.truncate(length);
        example.targets.truncate(length);
        example.learned.truncate(length);
        example
    }
}

/// The text of an example in runs, and whether each is learned. Tokens without text are shown by their names.
pub(crate) fn runs(tokenizer: &Tokenizer, example: &Example) -> Vec<(bool, String)> {
    let mut runs: Vec<(bool, Vec<u32>)> = Vec::new();
    let mut add = |learned: bool, token: u32| match runs.last_mut() {
        Some((same, tokens)) if *same == learned => tokens.push(token),
        _ => runs.push((learned, vec![token])),
    };
    let Example { tokens, targets, learned } = example;
    for place in 0..tokens.len() {
        let is_next = |place: usize| learned[place] && tokens.get(place + 1) == Some(&targets[place]);
        add(place > 0 && is_next(place - 1), tokens[place]);
        if learned[place] && !is_next(place) {
            add(true, targets[place]);
        }
    }
    let lengths = tokenizer.byte_lengths();
    let text = |tokens: Vec<u32>| shown(tokenizer, &lengths, &tokens);
    runs.into_iter().map(|(learned, tokens)| (learned, text(tokens))).collect()
}

/// The text of tokens; those of length 0 by their names.
fn shown(tokenizer: &Tokenizer, lengths: &[u32], tokens: &[u32]) -> String {
    let is_text = |token: u32| lengths[token as usize] > 0;
    let name = |token: u32| match tokenizer {
        Tokenizer::Hf(hf) => hf.name(token).unwrap_or_default(),
        _ => END_OF_TEXT.into(),
    };
    let parts = tokens.chunk_by(|&a, &b| is_text(a) && is_text(b));
    parts.map(|part| if is_text(part[0]) { tokenizer.decode(part) } else { name(part[0]) }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::template::tests::{imported, messages};
    use super::*;

    const TALK: &[(&str, &str)] =
        &[("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")];

    /// An example as text, what is learned in brackets.
    fn marked(tokenizer: &Tokenizer, turns: &[(&str, &str)]) -> String {
        let example = example(&Template::of(tokenizer).unwrap(), &messages(turns)).unwrap();
        let runs = runs(tokenizer, &example).into_iter();
        runs.map(|(learned, text)| if learned { format!("[{text}]") } else { text }).collect()
    }

    /// Numbers of the bytes of a text.
    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn in_chatml_the_end_of_turn_is_learned_and_nothing_after_it() {
        let tokenizer = imported(&["</s>", "<|im_start|>", "<|im_end|>"], None);
        let turns = &[("user", "u"), ("assistant", "a")];
        let example = example(&Template::of(&tokenizer).unwrap(), &messages(turns)).unwrap();
        let tokens = [&[257][..], &bytes("user\nu"), &[258, 10, 257], &bytes("assistant\na"), &[258]].concat();
        assert_eq!(example.tokens, tokens[..tokens.len() - 1]);
        assert_eq!(example.targets, tokens[1..]);
        let learned = example.learned.iter().enumerate().filter_map(|(place, learned)| learned.then_some(place));
        assert_eq!(learned.collect::<Vec<_>>(), [tokens.len() - 3, tokens.len() - 2], "\"a\" and the end of its turn");
        assert_eq!(
            marked(&tokenizer, TALK),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n\
             <|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]"
        );
    }

    #[test]
    fn by_a_models_own_template_its_mark_or_its_end_of_text_is_learned() {
        let own = |end: &str| {
            let turn = format!(
                "{{{{ bos_token }}}}{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ m.content }}}}{end}{{% endfor %}}"
            );
            turn + "{% if add_generation_prompt %}[assistant]{% endif %}"
        };
        let special = &["</s>", "<s>", "<end>"];
        let turns = &[("user", "u"), ("assistant", "a")];
        assert_eq!(marked(&imported(special, Some(&own("<end>"))), turns), "<s>[user]u<end>[assistant][a<end>]");
        // No token is in the text: the model's end of text follows. A text that ends an answer is learned itself.
        assert_eq!(marked(&imported(special, Some(&own(""))), turns), "<s>[user]u[assistant][a</s>]");
        let marks = marked(&imported(&["</s>", "<s>"], Some(&own("|"))), turns);
        assert_eq!(marks, "<s>[user]u|[assistant][a|]");
    }

    #[test]
    fn in_a_dialogue_the_end_of_text_is_learned_and_never_read() {
        let tokenizer = imported(&["</s>"], None);
        let shown = marked(&tokenizer, TALK);
        assert_eq!(shown, "s\n\nUser: u\n\nAssistant:[ a</s>]\n\nUser: v\n\nAssistant:[ b</s>]");
        let template = Template::of(&tokenizer).unwrap();
        let example = example(&template, &messages(TALK)).unwrap();
        assert!(!example.tokens.contains(&256));
        // What the model reads is the prompt that a chat gives it.
        let prompt = template.prompt(&messages(&TALK[..4]), DAY).unwrap();
        assert_eq!(example.tokens[..prompt.len()], prompt);
    }

    #[test]
    fn where_no_token_ends_a_text_the_next_turn_does() {
        let shown = marked(&Tokenizer::Bytes, TALK);
        assert_eq!(shown, "s\n\nUser: u\n\nAssistant:[ a\n\nUser:] v\n\nAssistant:[ b\n\nUser:]");
        let twice = &[("user", "u"), ("assistant", "a"), ("assistant", "b")];
        assert_eq!(marked(&Tokenizer::Bytes, twice), "User: u\n\nAssistant:[ a]\n\nAssistant:[ b\n\nUser:]");
    }

    #[test]
    fn an_answer_that_was_cut_off_is_learned_without_an_end() {
        let chatml = imported(&["</s>", "<|im_start|>", "<|im_end|>"], None);
        for (tokenizer, expected) in [
            (chatml, "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n[a b]"),
            (imported(&["</s>"], None), "User: u\n\nAssistant:[ a b]"),
            (Tokenizer::Bytes, "User: u\n\nAssistant:[ a b]"),
        ] {
            let [prompt, said] = [("user", "u"), ("assistant", "a b ")].map(|turn| messages(&[turn]));
            let example = answer(&Template::of(&tokenizer).unwrap(), &prompt, &said, true).unwrap();
            let runs = runs(&tokenizer, &example).into_iter();
            let shown: String = runs.map(|(learned, text)| if learned { format!("[{text}]") } else { text }).collect();
            assert_eq!(shown, expected);
        }
        let loud = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";
        let template = Template::of(&imported(&["</s>"], Some(loud))).unwrap();
        let refused = answer(&template, &messages(&TALK[1..2]), &messages(&TALK[2..3]), true).unwrap_err();
        assert!(matches!(refused, LearnError::NoCut), "{refused}");
    }

    #[test]
    fn nothing_is_learned_without_an_answer() {
        let template = Template::of(&Tokenizer::Bytes).unwrap();
        assert_eq!(example(&template, &messages(&TALK[..2])).unwrap(), Example::default());
    }

    #[test]
    fn a_template_that_writes_a_turn_in_two_ways_is_refused() {
        let last_differs = "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %};{% endfor %}";
        let template = Template::of(&imported(&["</s>"], Some(last_differs))).unwrap();
        let said = example(&template, &messages(TALK)).unwrap_err().to_string();
        assert!(said.contains("up to turn 3 otherwise"), "{said}");
        let unknown = Tokenizer::for_text(lockstep_model::tokenizer::TokenizerKind::Chars, "User: Assistant\n");
        let said =
            example(&Template::of(&unknown).unwrap(), &messages(&[("user", "x"), ("assistant", "r")])).unwrap_err();
        assert!(said.to_string().contains("'x'"), "{said}");
    }
}
