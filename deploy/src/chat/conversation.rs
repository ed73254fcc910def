//! What was said so far, and as much of it as the model can read.

use lockstep_model::chat_template::{Day, Message};
use serde::Serialize;

use super::template::{PromptError, Template};

/// A conversation: a system prompt, if any, and turns of user and assistant.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conversation {
    system: Option<String>,
    turns: Vec<Message>,
}

/// How it is saved.
#[derive(Serialize)]
struct Saved {
    messages: Vec<Message>,
}

/// Why there is no prompt of a conversation.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConversationError {
    /// It cannot be written down for the model.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// Its last turn alone is too long.
    #[error(
        "that is {tokens} tokens with what goes along, and the model reads at most {limit} before its answer: say it in \
         fewer words, shorten the system prompt, or ask for a shorter answer (--tokens)"
    )]
    TooLong {
        /// Of the last turn and the system prompt.
        tokens: usize,
        /// As many fit.
        limit: usize,
    },
}

impl Conversation {
    /// One in which nothing was said yet.
    pub(crate) fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    /// Forgets all turns.
    pub(crate) fn reset(&mut self) {
        self.turns.clear();
    }

    /// Changes what the model is told beforehand.
    pub(crate) fn set_system(&mut self, system: Option<String>) {
        self.system = system;
    }

    /// The user's turn.
    pub(crate) fn ask(&mut self, content: String) {
        self.turns.push(Message { role: "user".into(), content });
    }

    /// The model's turn.
    pub(crate) fn answer(&mut self, content: String) {
        self.turns.push(Message { role: "assistant".into(), content });
    }

    /// Takes the last turn back.
    pub(crate) fn take_back(&mut self) {
        self.turns.pop();
    }

    /// The prompt for the next answer, in at most `limit` tokens. The oldest turns that do not fit are forgotten; how many,
    /// is returned beside the tokens. What is left begins with a turn of the user's.
    ///
    /// # Errors
    /// If the last turn alone does not fit, or the template refuses the messages.
    pub(crate) fn prompt(
        &mut self,
        template: &Template,
        today: Day,
        limit: usize,
    ) -> Result<(Vec<u32>, usize), ConversationError> {
        let mut forgotten = 0;
        loop {
            let tokens = template.prompt(&self.messages(), today)?;
            if tokens.len() <= limit {
                return Ok((tokens, forgotten));
            }
            let next_question = self.turns.iter().skip(1).position(|turn| turn.role == "user");
            let Some(turns) = next_question.map(|position| position + 1) else {
                return Err(ConversationError::TooLong { tokens: tokens.len(), limit });
            };
            self.turns.drain(..turns);
            forgotten += turns;
        }
    }

    /// The conversation as a line of JSON, as training data is written: `{"messages":[…]}`.
    pub(crate) fn to_json_line(&self) -> String {
        let saved = Saved { messages: self.messages() };
        format!("{}\n", serde_json::to_string(&saved).expect("texts can be written"))
    }

    fn messages(&self) -> Vec<Message> {
        let system = self.system.iter().map(|content| Message { role: "system".into(), content: content.clone() });
        system.chain(self.turns.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use lockstep_model::tokenizer::Tokenizer;

    use super::*;

    const DAY: Day = Day { year: 2026, month: 3, day: 7 };

    #[test]
    fn the_oldest_turns_are_forgotten_and_the_system_prompt_is_not() {
        let template = Template::of(&Tokenizer::Bytes).unwrap();
        let mut talk = Conversation::new(Some("Rhyme.".into()));
        for turn in ["one", "two", "three"] {
            talk.ask(turn.into());
            talk.answer(turn.to_uppercase());
        }
        talk.ask("four".into());
        let mut prompt = |limit| talk.prompt(&template, DAY, limit);
        let (all, forgotten) = prompt(1000).unwrap();
        assert_eq!(forgotten, 0);
        let (rest, forgotten) = prompt(all.len() - 1).unwrap();
        let text = Tokenizer::Bytes.decode(&rest);
        assert_eq!(forgotten, 2);
        assert!(text.starts_with("Rhyme.\n\nUser: two\n\nAssistant: TWO\n\nUser: three"), "{text}");
        let (last, forgotten) = prompt(45).unwrap();
        assert_eq!(forgotten, 4, "what was forgotten before is not counted again");
        assert_eq!(Tokenizer::Bytes.decode(&last), "Rhyme.\n\nUser: four\n\nAssistant:");
        let said = prompt(20).unwrap_err().to_string();
        assert!(said.starts_with("that is 30 tokens") && said.contains("at most 20"), "{said}");
    }

    #[test]
    fn a_conversation_is_kept_as_a_line() {
        let mut talk = Conversation::new(None);
        talk.ask("Hi \"you\"\n".into());
        talk.answer("学".into());
        talk.ask("lost".into());
        talk.take_back();
        let line = talk.to_json_line();
        let expected = r#"{"messages":[{"role":"user","content":"Hi \"you\"\n"},{"role":"assistant","content":"学"}]}"#;
        assert_eq!(line.trim_end(), expected);
        talk.reset();
        assert_eq!(talk.to_json_line(), "{\"messages\":[]}\n");
    }
}
