//! Comparisons of two answers by people, out of JSON objects in the forms in which they are found.
//!
//! | form | object |
//! |---|---|
//! | prompt and answers | `{"prompt", "chosen", "rejected"}`, each a text or a list of messages; a list may begin with the prompt, which is then left out |
//! | conversation and answers | `{"messages"` or `"conversations", "chosen", "rejected"}`, of which the last two are a text, a message or a list |
//!
//! Each may have a `system` text besides. What `lockstep rate` writes has further keys: a line without `chosen` whose `choice`
//! is `tie` or `both_bad` prefers neither, `{"undo": ID}` takes back the line with that `id`, and `finish` says of the first and
//! the second answer, of which `choice` is one, whether it was cut off: `length`. Other keys are passed over.

use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::chat_template::Message;
use crate::conversation::{Malformed, kind, message, required, system, turns};

/// Two answers to one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// What is answered; may be empty.
    pub prompt: Vec<Message>,
    /// The better answer, at least one message.
    pub chosen: Vec<Message>,
    /// The other one.
    pub rejected: Vec<Message>,
    /// Of these two, whether it was cut off before its end.
    pub cut: [bool; 2],
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// One answer is better. What may take it back, if anything, names it so.
    Preferred(Comparison, Option<String>),
    /// Neither is.
    NoPreference(Option<String>),
    /// The line of this name does not count.
    Undone(String),
}

const PREFERENCE: &str = "prompt, chosen and rejected, texts or lists of messages";

/// What an object says of answers.
///
/// # Errors
/// Says what is there, and what was expected.
pub fn judgement(object: &Value) -> Result<Judgement, Malformed> {
    let Value::Object(fields) = object else {
        return Err(Malformed::new(format!("there is {}", kind(object)), PREFERENCE));
    };
    let id = fields.get("id").and_then(Value::as_str).map(str::to_owned);
    if let Some(Value::String(undone)) = fields.get("undo") {
        return Ok(Judgement::Undone(undone.clone()));
    }
    let undecided = fields.get("choice").is_some_and(|choice| choice == "tie" || choice == "both_bad");
    if undecided && !fields.contains_key("chosen") {
        return Ok(Judgement::NoPreference(id));
    }
    let [chosen, rejected] = [answer(fields, "chosen")?, answer(fields, "rejected")?];
    let mut prompt = system(fields, PREFERENCE)?;
    match ["prompt", "messages", "conversations"].map(|key| fields.get(key)) {
        [Some(Value::String(content)), ..] => prompt.push(message("user", content)),
        [Some(list), ..] | [None, Some(list), _] | [None, None, Some(list)] => {
            prompt.extend(turns(list, PREFERENCE, keys_of(list))?);
        }
        [None, None, None] => {
            let common = chosen.iter().zip(&rejected).take_while(|(chosen, rejected)| chosen == rejected).count();
            prompt.extend_from_slice(&chosen[..common]);
        }
    }
    prompt.retain(|message| message.role != "system" || !message.content.trim().is_empty());
    let answer = |mut answer: Vec<Message>, name: &str| {
        if answer.starts_with(&prompt) {
            answer.drain(..prompt.len());
        }
        match answer.last() {
            Some(last) if last.role == "assistant" => Ok(answer),
            Some(_) => Err(Malformed::new(format!("{name} does not end with an answer"), PREFERENCE)),
            None => Err(Malformed::new(format!("{name} says nothing after the prompt"), PREFERENCE)),
        }
    };
    let (chosen, rejected) = (answer(chosen, "chosen")?, answer(rejected, "rejected")?);
    Ok(Judgement::Preferred(Comparison { prompt, chosen, rejected, cut: cut(fields) }, id))
}

/// Whether the better answer and the other one were cut off; not, where nothing says so.
fn cut(fields: &Map<String, Value>) -> [bool; 2] {
    let was_cut = |shown: usize| fields.get("finish").is_some_and(|finish| finish[shown] == "length");
    match fields.get("choice").and_then(Value::as_str) {
        Some("first") => [was_cut(0), was_cut(1)],
        Some("second") => [was_cut(1), was_cut(0)],
        _ => [false; 2],
    }
}

/// An answer, perhaps after its prompt.
fn answer(fields: &Map<String, Value>, key: &str) -> Result<Vec<Message>, Malformed> {
    match required(fields, key, PREFERENCE)? {
        Value::String(content) => Ok(vec![message("assistant", content)]),
        single @ Value::Object(_) => {
            let list = Value::Array(vec![single.clone()]);
            turns(&list, PREFERENCE, keys_of(&list))
        }
        list => turns(list, PREFERENCE, keys_of(list)),
    }
}

/// By which keys a list of messages names speaker and text.
fn keys_of(list: &Value) -> [&'static str; 2] {
    match list.get(0).is_some_and(|first| first.get("from").is_some()) {
        true => ["from", "value"],
        false => ["role", "content"],
    }
}

/// The preferences that lines express together, in their order, each with what belongs to it, and how many lines express none:
/// because neither answer is better, and because they were taken back.
pub fn preferences<T>(lines: impl IntoIterator<Item = (Judgement, T)>) -> (Vec<(Comparison, T)>, usize, usize) {
    let (mut undone, mut judged) = (HashSet::new(), Vec::new());
    for (judgement, place) in lines {
        match judgement {
            Judgement::Undone(id) => {
                undone.insert(id);
            }
            other => judged.push((other, place)),
        }
    }
    let (mut preferred, mut undecided, mut taken_back) = (Vec::new(), 0, 0);
    for (judgement, place) in judged {
        let is_undone = |id: Option<String>| id.is_some_and(|id| undone.contains(&id));
        match judgement {
            Judgement::Preferred(_, id) | Judgement::NoPreference(id) if is_undone(id.clone()) => taken_back += 1,
            Judgement::Preferred(comparison, _) => preferred.push((comparison, place)),
            _ => undecided += 1,
        }
    }
    (preferred, undecided, taken_back)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(object: Value) -> Comparison {
        match judgement(&object) {
            Ok(Judgement::Preferred(comparison, _)) => comparison,
            other => panic!("{object}: {other:?}"),
        }
    }

    #[test]
    fn every_form_is_read() {
        let user = json!({ "role": "user", "content": "q" });
        let [a, b] = ["a", "b"].map(|content| json!({ "role": "assistant", "content": content }));
        let expected = Comparison {
            prompt: vec![message("user", "q")],
            chosen: vec![message("assistant", "a")],
            rejected: vec![message("assistant", "b")],
            cut: [false; 2],
        };
        for object in [
            json!({ "prompt": "q", "chosen": "a", "rejected": "b" }),
            json!({ "prompt": [user], "chosen": [a], "rejected": [b] }),
            json!({ "prompt": [user], "chosen": "a", "rejected": "b", "choice": "first", "id": "1" }),
            json!({ "chosen": [user, a], "rejected": [user, b] }),
            json!({ "prompt": [user], "chosen": [user, a], "rejected": [user, b] }),
            json!({ "messages": [user], "chosen": a, "rejected": b }),
            json!({ "conversations": [{ "from": "human", "value": "q" }], "chosen": { "from": "gpt", "value": "a" }, "rejected": { "from": "gpt", "value": "b" } }),
        ] {
            assert_eq!(read(object), expected);
        }
        let with_system = json!({ "system": "s", "prompt": "q", "chosen": "a", "rejected": "b" });
        assert_eq!(read(with_system).prompt, [message("system", "s"), message("user", "q")]);
        assert_eq!(read(json!({ "chosen": "a", "rejected": "b" })).prompt, []);
        for (choice, cut) in [("first", [false, true]), ("second", [true, false])] {
            let finish = ["stop", "length"];
            let line = json!({ "prompt": "q", "chosen": "a", "rejected": "b", "choice": choice, "finish": finish });
            assert_eq!(read(line).cut, cut);
        }
    }

    #[test]
    fn what_was_taken_back_or_left_open_is_no_preference() {
        let lines = [
            json!({ "prompt": "q", "chosen": "a", "rejected": "b", "id": "1" }),
            json!({ "prompt": "q", "chosen": "c", "rejected": "d", "id": "2" }),
            json!({ "prompt": "q", "answers": ["a", "b"], "choice": "tie", "id": "3" }),
            json!({ "prompt": "q", "answers": ["a", "b"], "choice": "both_bad", "id": "4" }),
            json!({ "undo": "1" }),
            json!({ "undo": "4" }),
            json!({ "prompt": "q", "chosen": "a", "rejected": "b", "id": "5" }),
        ];
        let lines = lines.iter().zip(1..).map(|(line, number)| (judgement(line).unwrap(), number));
        let (preferred, undecided, taken_back) = preferences(lines);
        assert_eq!(preferred.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [2, 7]);
        assert_eq!((undecided, taken_back), (1, 2));
    }

    #[test]
    fn what_is_malformed_is_told_with_what_was_expected() {
        let refused = [
            json!([]),
            json!({ "prompt": "q", "chosen": "a" }),
            json!({ "prompt": 3, "chosen": "a", "rejected": "b" }),
            json!({ "prompt": "q", "chosen": null, "rejected": "b" }),
            json!({ "prompt": "q", "chosen": [], "rejected": "b" }),
            json!({ "prompt": "q", "chosen": [{ "role": "user", "content": "a" }], "rejected": "b" }),
            json!({ "chosen": [{ "role": "user", "content": "q" }], "rejected": [{ "role": "user", "content": "q" }] }),
        ];
        let said: Vec<String> = refused.iter().map(|object| judgement(object).unwrap_err().to_string()).collect();
        expect_test::expect![[r#"
            there is a list; expected prompt, chosen and rejected, texts or lists of messages
            there is no rejected; expected prompt, chosen and rejected, texts or lists of messages
            the turns are a number; expected prompt, chosen and rejected, texts or lists of messages
            the turns are null; expected prompt, chosen and rejected, texts or lists of messages
            chosen says nothing after the prompt; expected prompt, chosen and rejected, texts or lists of messages
            chosen does not end with an answer; expected prompt, chosen and rejected, texts or lists of messages
            chosen says nothing after the prompt; expected prompt, chosen and rejected, texts or lists of messages"#]]
        .assert_eq(&said.join("\n"));
    }
}
