//! How messages become a prompt: as the model's own chat template says, else in ChatML, else as a written dialogue.
//!
//! All three are Jinja. As with `transformers`, names of special tokens in a message mean these tokens where a template is
//! the model's own or ChatML; in a written dialogue they are text.

use std::collections::BTreeMap;
use std::time::SystemTime;

use chrono::{DateTime, Datelike as _, Utc};
use lockstep_model::chat_template::{ChatTemplate, ChatTemplateError, Day, Message};
use lockstep_model::hf_tokenizer::HfFiles;
use lockstep_model::tokenizer::{Tokenizer, UnknownCharacter};
use serde_json::Value;

/// OpenAI's format of conversations, which many models are trained with.
const CHATML: &str = "\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";
const CHATML_TOKENS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

/// A conversation as one finds it written in texts.
const DIALOGUE: &str = "\
{% for message in messages %}
{% if message.role == 'user' %}User: {% elif message.role == 'assistant' %}Assistant: {% endif %}
{{ message.content }}

{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}";
/// What the model writes when it goes on to the next speaker.
const NEXT_SPEAKER: &str = "\nUser:";

/// For characters that spell no dialogue: lines alone.
const LINES: &str = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}";

/// Where a template comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// It came with the model.
    Own,
    /// The model's vocabulary has the marks of ChatML.
    ChatMl,
    /// A dialogue between "User:" and "Assistant:".
    Dialogue,
    /// One line after another.
    Lines,
}

impl Form {
    /// In one word, for other programs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::ChatMl => "chatml",
            Self::Dialogue => "dialogue",
            Self::Lines => "lines",
        }
    }
}

/// Why messages are no prompt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PromptError {
    /// The template refuses them.
    #[error(transparent)]
    Template(#[from] ChatTemplateError),
    /// A character that the model does not know.
    #[error(transparent)]
    Character(#[from] UnknownCharacter),
}

/// Messages to tokens, and where an answer ends.
#[derive(Debug)]
pub(crate) struct Template {
    form: Form,
    renderer: ChatTemplate,
    /// Names of special tokens by their part, such as `bos_token`.
    special: BTreeMap<String, String>,
    tokenizer: Tokenizer,
    ends: Vec<u32>,
    stops: Vec<String>,
    /// Whether the model has learned to answer by it.
    learned: bool,
}

impl Template {
    /// The template of the model that `tokenizer` belongs to.
    ///
    /// # Errors
    /// If the model's own cannot be read.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Result<Self, ChatTemplateError> {
        let files = match tokenizer {
            Tokenizer::Hf(hf) => Some(hf.files()),
            _ => None,
        };
        let own = files.and_then(|files| files.chat_template.as_deref());
        let is_token = |name| single_token(tokenizer, name).is_some();
        let (form, source) = match own {
            Some(source) => (Form::Own, source),
            None if CHATML_TOKENS.into_iter().all(is_token) => (Form::ChatMl, CHATML),
            None if tokenizer.encode(&format!("Assistant: {NEXT_SPEAKER}")).is_ok() => (Form::Dialogue, DIALOGUE),
            None => (Form::Lines, LINES),
        };
        let mut template = Self {
            form,
            renderer: ChatTemplate::new(source)?,
            special: files.map(special_names).unwrap_or_default(),
            tokenizer: tokenizer.clone(),
            ends: tokenizer.stop_tokens(),
            stops: Vec::new(),
            learned: matches!(form, Form::Own | Form::ChatMl),
        };
        match form {
            Form::Own | Form::ChatMl => template.learn_end_of_turn(),
            Form::Dialogue => template.stops.push(NEXT_SPEAKER.into()),
            Form::Lines => {}
        }
        Ok(template)
    }

    /// What stands after an answer in a longer conversation ends the answer: a token if it is one, else a text.
    fn learn_end_of_turn(&mut self) {
        const ANSWER: &str = "Quite so.";
        let messages = [("user", "Is it?"), ("assistant", ANSWER)]
            .map(|(role, content)| Message { role: role.into(), content: content.into() });
        // A template that wants other messages tells nothing; the model's own end of text is left.
        let Ok(text) = self.renderer.render(&messages, &self.special, false, today()) else { return };
        let Some((_, after)) = text.rsplit_once(ANSWER) else { return };
        let after = after.trim();
        let Ok(tokens) = self.tokenizer.encode_rendered(after) else { return };
        match tokens.first() {
            Some(&token) if self.tokenizer.decode(&[token]).is_empty() => {
                self.ends.extend((!self.ends.contains(&token)).then_some(token));
            }
            Some(_) => self.stops.push(after.into()),
            None => {}
        }
    }

    /// The same, of a model that has learned to answer by it.
    pub(crate) fn learned(self) -> Self {
        Self { learned: true, ..self }
    }

    /// Whether the model was trained for conversations, as far as one can tell.
    pub(crate) fn is_learned(&self) -> bool {
        self.learned
    }

    /// In words, for the user.
    pub(crate) fn describe(&self) -> &'static str {
        match (self.form, self.learned) {
            (Form::Own, _) => "messages are written by the model's own chat template",
            (Form::ChatMl, _) => "messages are written in ChatML, whose marks the model's vocabulary has",
            (Form::Dialogue, true) => {
                "messages are written as the model learned them, as a dialogue between \"User:\" and \"Assistant:\""
            }
            (Form::Lines, true) => "messages are written as the model learned them, one line after another",
            (Form::Dialogue, false) => {
                "the model brings no chat template, so it was not trained for conversations: it goes on with a dialogue \
                 between \"User:\" and \"Assistant:\" as with any text"
            }
            (Form::Lines, false) => {
                "the model brings no chat template, so it was not trained for conversations: it goes on with what is said \
                 as with any text"
            }
        }
    }

    /// Where it comes from.
    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// The tokens that end an answer.
    pub(crate) fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The texts that end an answer.
    pub(crate) fn stops(&self) -> &[String] {
        &self.stops
    }

    /// The tokens that an answer to `messages` follows.
    ///
    /// # Errors
    /// If the template refuses them, or the model does not know one of their characters.
    pub(crate) fn prompt(&self, messages: &[Message], today: Day) -> Result<Vec<u32>, PromptError> {
        Ok(self.encode(&self.render(messages, true, today)?)?)
    }

    /// The messages as text, with what begins an answer where that is asked for.
    ///
    /// # Errors
    /// If the template refuses them.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        today: Day,
    ) -> Result<String, ChatTemplateError> {
        self.renderer.render(messages, &self.special, add_generation_prompt, today)
    }

    /// The tokens of a whole text that was rendered.
    ///
    /// # Errors
    /// If the model does not know one of its characters.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, UnknownCharacter> {
        match self.form {
            Form::Own | Form::ChatMl => self.tokenizer.encode_rendered(text),
            Form::Dialogue | Form::Lines => self.tokenizer.encode(text),
        }
    }

    /// The tokens of a piece of a rendered text, without those that stand before and after a whole one.
    ///
    /// # Errors
    /// If the model does not know one of its characters.
    pub(crate) fn encode_piece(&self, piece: &str) -> Result<Vec<u32>, UnknownCharacter> {
        match self.form {
            Form::Own | Form::ChatMl => self.tokenizer.encode_rendered(piece),
            Form::Dialogue | Form::Lines => {
                let mut tokens = Vec::new();
                self.tokenizer.encoder().encode(piece, &mut tokens).map(|()| tokens)
            }
        }
    }
}

/// The day it is, UTC.
pub(crate) fn today() -> Day {
    let now = DateTime::<Utc>::from(SystemTime::now());
    Day { year: now.year() as u16, month: now.month() as u8, day: now.day() as u8 }
}

/// The token whose name this is, if it is one and stands for no text.
fn single_token(tokenizer: &Tokenizer, name: &str) -> Option<u32> {
    match tokenizer.encode_rendered(name).ok()?.as_slice() {
        &[token] if matches!(tokenizer, Tokenizer::Hf(hf) if hf.name(token).as_deref() == Some(name)) => Some(token),
        _ => None,
    }
}

/// Names of a folder's special tokens, by the keys of `tokenizer_config.json`, else by their numbers.
fn special_names(files: &HfFiles) -> BTreeMap<String, String> {
    let settings: Value = serde_json::from_str(&files.tokenizer_config).unwrap_or_default();
    let settings = settings.as_object().into_iter().flatten();
    let parts = settings.filter(|(part, _)| part.ends_with("_token"));
    let name = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    parts.filter_map(|(part, value)| Some((part.clone(), name(value)?))).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use lockstep_model::hf_tokenizer::{HfTokenizer, SpecialTokens};
    use lockstep_model::tokenizer::TokenizerKind;
    use serde_json::json;

    use super::*;

    const DAY: Day = Day { year: 2026, month: 3, day: 7 };

    pub(crate) fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, content)| Message { role: role.to_string(), content: content.to_string() }).collect()
    }

    /// A tokenizer of bytes, as a model brings it, with special tokens from number 256 on.
    pub(crate) fn imported(special: &[&str], chat_template: Option<&str>) -> Tokenizer {
        let vocabulary: serde_json::Map<String, Value> =
            (0..=255u32).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
        let added = special.iter().zip(256..).map(|(content, id): (_, u32)| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
        });
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Fuse" }] },
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocabulary, "merges": [] },
        });
        let files = HfFiles {
            tokenizer_json: tokenizer.to_string(),
            tokenizer_config: json!({ "bos_token": { "content": "<s>" }, "add_bos_token": true }).to_string(),
            generation_config: None,
            chat_template: chat_template.map(str::to_owned),
            special: SpecialTokens { end: vec![256], ..SpecialTokens::default() },
            vocab_size: 256 + special.len(),
        };
        Tokenizer::Hf(HfTokenizer::new(files).unwrap())
    }

    #[test]
    fn a_models_own_template_writes_its_messages_and_tells_what_ends_an_answer() {
        let own = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}";
        let tokenizer = imported(&["</s>", "<s>", "<end>"], Some(own));
        let template = Template::of(&tokenizer).unwrap();
        assert_eq!((template.form(), template.ends(), template.stops().len()), (Form::Own, &[256, 258][..], 0));
        let tokens = template.prompt(&messages(&[("user", "a")]), DAY).unwrap();
        assert_eq!(tokens, [257, 0x5B, 0x75, 0x73, 0x65, 0x72, 0x5D, 0x61, 258]);

        // Where the mark is no token, its text ends an answer.
        let template = Template::of(&imported(&["</s>"], Some(own))).unwrap();
        assert_eq!((template.ends(), template.stops()), (&[256][..], &["<end>".to_string()][..]));
        // A template may refuse what it is asked.
        let strict = "{{ raise_exception('no') }}";
        let template = Template::of(&imported(&["</s>"], Some(strict))).unwrap();
        assert!(template.prompt(&messages(&[("user", "a")]), DAY).unwrap_err().to_string().ends_with("no"));
    }

    #[test]
    fn marks_of_chatml_are_used_where_the_model_knows_them() {
        let tokenizer = imported(&["</s>", "<|im_start|>", "<|im_end|>"], None);
        let template = Template::of(&tokenizer).unwrap();
        assert_eq!((template.form(), template.ends()), (Form::ChatMl, &[256, 258][..]));
        let tokens = template.prompt(&messages(&[("system", "s"), ("user", "u")]), DAY).unwrap();
        assert_eq!(tokenizer.decode(&tokens), "system\ns\nuser\nu\nassistant\n");
        assert_eq!(tokens.iter().filter(|&&token| token == 257).count(), 3);
        assert_eq!(Template::of(&imported(&["</s>", "<|im_start|>"], None)).unwrap().form(), Form::Dialogue);
    }

    #[test]
    fn other_models_go_on_with_a_dialogue() {
        let template = Template::of(&Tokenizer::Bytes).unwrap();
        assert_eq!((template.form(), template.stops()), (Form::Dialogue, &["\nUser:".to_string()][..]));
        let talk = messages(&[("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello\n"), ("user", "ok")]);
        let tokens = template.prompt(&talk, DAY).unwrap();
        let text = "Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\n\nUser: ok\n\nAssistant:";
        assert_eq!(Tokenizer::Bytes.decode(&tokens), text);
    }

    #[test]
    fn characters_that_spell_no_dialogue_are_lines() {
        let tokenizer = Tokenizer::for_text(TokenizerKind::Chars, "abc\n");
        let template = Template::of(&tokenizer).unwrap();
        assert_eq!(template.form(), Form::Lines);
        let tokens = template.prompt(&messages(&[("user", "ab"), ("assistant", "c")]), DAY).unwrap();
        assert_eq!(tokenizer.decode(&tokens), "ab\n\nc\n\n");
        let said = template.prompt(&messages(&[("user", "xyz")]), DAY).unwrap_err().to_string();
        assert!(said.contains("'x'"), "{said}");
    }
}
