//! What a line typed into a conversation asks for.

use std::path::PathBuf;

/// What `/help` says.
pub(crate) const HELP: &str = "\
/reset         forget the conversation; the system prompt stays
/system TEXT   what the model is told before all else; without TEXT, nothing
/save FILE     append the conversation to FILE, as a line of JSON
/help          this
/quit          end, as does Ctrl-D
Ctrl-C stops an answer; what was said of it stays.";

/// A line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// To be answered.
    Say(String),
    /// Nothing but white space.
    Nothing,
    /// Forget what was said.
    Reset,
    /// What the model is told beforehand, if anything.
    System(Option<String>),
    /// Keep the conversation in a file.
    Save(PathBuf),
    /// Say what can be asked.
    Help,
    /// End.
    Quit,
    /// No command, and why.
    Unknown(String),
}

impl Line {
    /// Understands a line.
    pub(crate) fn of(line: &str) -> Self {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            return if line.is_empty() { Self::Nothing } else { Self::Say(line.into()) };
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match (name, rest.is_empty()) {
            ("reset", true) => Self::Reset,
            ("system", without) => Self::System((!without).then(|| rest.into())),
            ("save", false) => Self::Save(rest.into()),
            ("save", true) => Self::Unknown("/save needs a file; for example /save chat.jsonl".into()),
            ("help", true) => Self::Help,
            ("quit" | "exit", true) => Self::Quit,
            _ => Self::Unknown(format!("/{name} is no command, or not with these words; /help lists them")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let said = [
            ("  How are you? ", Line::Say("How are you?".into())),
            (" \t", Line::Nothing),
            ("/reset", Line::Reset),
            ("/system Be  brief. ", Line::System(Some("Be  brief.".into()))),
            ("/system", Line::System(None)),
            ("/save my chats.jsonl", Line::Save("my chats.jsonl".into())),
            ("/help", Line::Help),
            ("/quit", Line::Quit),
        ];
        for (line, meaning) in said {
            assert_eq!(Line::of(line), meaning, "{line}");
        }
        for wrong in ["/save", "/resett", "/", "/quit now"] {
            assert!(matches!(Line::of(wrong), Line::Unknown(_)), "{wrong}");
        }
    }
}
