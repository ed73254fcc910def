//! Prompts from a file, in the order in which they stand there.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, bail};
use lockstep_model::chat_template::Message;
use serde::Deserialize;

use crate::data::documents::{Place, Position};
use crate::data::jsonl::JsonLines;

/// What a line must be.
const EXPECTED: &str = "an object with a string or a list of messages under \"prompt\", or a list of messages under \
    \"messages\"; a message is an object with the strings role and content";

/// Where a prompt stands, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompt {
    pub(crate) messages: Vec<Message>,
    pub(crate) place: Place,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a prompt is neither a string nor a list of messages")]
enum Said {
    Text(String),
    Messages(Vec<Message>),
}

#[derive(Deserialize)]
struct Line {
    #[serde(alias = "messages")]
    prompt: Said,
}

/// What a person asks.
pub(crate) fn asked(content: String) -> Vec<Message> {
    vec![Message { role: "user".into(), content }]
}

/// The prompts of a file: of a `.txt` file its lines, of a `.jsonl` file objects. Answers at the end are dropped.
///
/// # Errors
/// If it cannot be read, or a line is none: that one is named, with what it must be.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Prompt>> {
    let shown = path.display();
    let unreadable = || format!("{shown}: cannot be read");
    match path.extension().and_then(|it| it.to_str()) {
        Some("txt") => {
            let text = fs::read_to_string(path).with_context(unreadable)?;
            let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
            let place = |number| Place { path: path.into(), position: Position::Line(number) };
            Ok(lines
                .map(|(number, line)| Prompt { messages: asked(line.trim().into()), place: place(number) })
                .collect())
        }
        Some("jsonl") => {
            let lines = JsonLines::<Line>::new(path, File::open(path).with_context(unreadable)?, EXPECTED);
            lines.map(|line| line.and_then(|(line, place, _)| prompt(line, place))).collect()
        }
        _ => bail!("{shown}: prompts are a .jsonl file, or a .txt file with one on each line"),
    }
}

fn prompt(line: Line, place: Place) -> anyhow::Result<Prompt> {
    let mut messages = match line.prompt {
        Said::Text(text) => asked(text),
        Said::Messages(messages) => messages,
    };
    while messages.last().is_some_and(|message| message.role == "assistant") {
        messages.pop();
    }
    match messages.last() {
        Some(last) if last.role == "user" && !last.content.trim().is_empty() => Ok(Prompt { messages, place }),
        Some(_) => bail!("{place}: its last turn, answers left out, is nothing that a user says"),
        None => bail!("{place}: there is no turn to answer; a line must be {EXPECTED}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(name: &str, text: &str) -> Result<Vec<(String, String)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        let inside = |said: String| said.replace(&format!("{}/", dir.path().display()), "");
        let prompts = read(&path).map_err(|error| inside(format!("{error:#}")))?;
        let shown = |prompt: Prompt| {
            let turns: Vec<String> =
                prompt.messages.iter().map(|turn| format!("{}: {}", turn.role, turn.content)).collect();
            (inside(prompt.place.to_string()), turns.join(" | "))
        };
        Ok(prompts.into_iter().map(shown).collect())
    }

    #[test]
    fn prompts_are_read_in_every_form() {
        let turn = |role: &str, content: &str| format!("{{\"role\":\"{role}\",\"content\":\"{content}\"}}");
        let (ask, answer) = (turn("user", "学?"), turn("assistant", "b"));
        let lines = format!(
            "{{\"prompt\":\"a\",\"chosen\":\"x\"}}\n\n{{\"prompt\":[{ask}]}}\n{{\"messages\":[{},{ask},{answer},{ask},{answer}]}}",
            turn("system", "s")
        );
        let expected = [
            ("a.jsonl: line 1", "user: a"),
            ("a.jsonl: line 3", "user: 学?"),
            ("a.jsonl: line 4", "system: s | user: 学? | assistant: b | user: 学?"),
        ];
        let found = read_text("a.jsonl", &lines).unwrap();
        assert_eq!(found.iter().map(|(place, said)| (&**place, &**said)).collect::<Vec<_>>(), expected);
        let found = read_text("a.txt", "one \r\n\n 二\n").unwrap();
        let expected = [("a.txt: line 1", "user: one"), ("a.txt: line 3", "user: 二")];
        assert_eq!(found.iter().map(|(place, said)| (&**place, &**said)).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_is_no_prompt_is_named() {
        for (name, text, problem) in [
            ("a.jsonl", "{\"prompt\":\"a\"}\n{\"text\":\"b\"}", "a.jsonl: line 2, byte 26: missing field `prompt`"),
            ("a.jsonl", "{\"prompt\":3}", "a.jsonl: line 1, byte 11: a prompt is neither"),
            ("a.jsonl", "{\"messages\":[]}", "a.jsonl: line 1: there is no turn to answer"),
            ("a.jsonl", "{\"messages\":[{\"role\":\"system\",\"content\":\"s\"}]}", "line 1: its last turn"),
            ("a.jsonl", "{\"prompt\":\" \"}", "line 1: its last turn"),
            ("a.csv", "a", "a.csv: prompts are a .jsonl file"),
        ] {
            let said = read_text(name, text).unwrap_err();
            assert!(said.contains(problem), "{said}");
        }
    }
}
