//! Conversations to learn from, out of JSON objects in the forms in which they are found.
//!
//! | form | object |
//! |---|---|
//! | messages | `{"messages": [{"role", "content"}]}` |
//! | ShareGPT | `{"conversations": [{"from", "value"}]}` |
//! | Alpaca | `{"instruction", "input", "output"}`; Self-Instruct has several `instances` of `input` and `output` |
//! | prompt and completion | `{"prompt", "completion"}`, texts or lists of messages |
//! | question and answer | `{"question", "answer"}` |
//!
//! ShareGPT and Alpaca may have a `system` text besides. Other keys are passed over.

use serde_json::{Map, Value};

use crate::chat_template::Message;

/// An object that holds no conversation.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{found}; expected {expected}")]
pub struct Malformed {
    /// What is there instead.
    found: String,
    /// What should be.
    expected: &'static str,
}

impl Malformed {
    pub(crate) fn new(found: String, expected: &'static str) -> Self {
        Self { found, expected }
    }
}

/// All forms, for an object that has none of them.
const FORMS: &str = "an object with messages, conversations, instruction and output, prompt and completion, or question \
                     and answer";
const MESSAGES: &str = "messages: a list of objects with the texts role (system, user or assistant) and content";
const SHAREGPT: &str =
    "conversations: a list of objects with the texts from (system, human, user, gpt or assistant) and value";
const ALPACA: &str = "the texts instruction and output, and input if there is any";
const INSTANCES: &str = "the text instruction, and instances: a list of objects with the texts input and output";
const COMPLETION: &str = "prompt and completion, both texts or lists of messages";
const QUESTION: &str = "the texts question and answer";

/// The conversations of an object: one, or as many as it has instances. Messages of the system's that are empty are left out.
///
/// # Errors
/// Says what is there, and what was expected.
pub fn conversations(object: &Value) -> Result<Vec<Vec<Message>>, Malformed> {
    let Value::Object(fields) = object else {
        return Err(Malformed { found: format!("there is {}", kind(object)), expected: FORMS });
    };
    let mut all = if let Some(list) = fields.get("messages") {
        vec![turns(list, MESSAGES, ["role", "content"])?]
    } else if let Some(list) = fields.get("conversations") {
        vec![[system(fields, SHAREGPT)?, turns(list, SHAREGPT, ["from", "value"])?].concat()]
    } else if fields.contains_key("instruction") {
        instructions(fields)?
    } else if fields.contains_key("prompt") {
        let [prompt, completion] =
            [("prompt", "user"), ("completion", "assistant")].map(|(key, role)| {
                match required(fields, key, COMPLETION)? {
                    Value::String(content) => Ok(vec![message(role, content)]),
                    list => turns(list, COMPLETION, ["role", "content"]),
                }
            });
        vec![[prompt?, completion?].concat()]
    } else if fields.contains_key("question") {
        let [question, answer] = ["question", "answer"].map(|key| text(fields, key, QUESTION));
        vec![vec![message("user", question?), message("assistant", answer?)]]
    } else {
        let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
        return Err(Malformed { found: format!("there are the keys {keys:?}"), expected: FORMS });
    };
    for messages in &mut all {
        messages.retain(|message| message.role != "system" || !message.content.trim().is_empty());
    }
    Ok(all)
}

/// A message of so and so.
pub(crate) fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

/// Turns in a list of objects, in which `keys` name speaker and text.
pub(crate) fn turns(
    list: &Value,
    expected: &'static str,
    [speaker, said]: [&str; 2],
) -> Result<Vec<Message>, Malformed> {
    let Value::Array(turns) = list else {
        return Err(Malformed { found: format!("the turns are {}", kind(list)), expected });
    };
    let turn = |turn: &Value| {
        let Value::Object(fields) = turn else {
            return Err(Malformed { found: format!("a turn is {}", kind(turn)), expected });
        };
        let role = match text(fields, speaker, expected)? {
            "system" => "system",
            "user" | "human" => "user",
            "assistant" | "gpt" => "assistant",
            other => return Err(Malformed { found: format!("{speaker} is {other:?}"), expected }),
        };
        Ok(message(role, text(fields, said, expected)?))
    };
    turns.iter().map(turn).collect()
}

/// An instruction with its output, or with each of its instances.
fn instructions(fields: &Map<String, Value>) -> Result<Vec<Vec<Message>>, Malformed> {
    let conversation = |instance: &Map<String, Value>, expected| {
        let instruction = text(fields, "instruction", expected)?;
        let input = match instance.get("input") {
            None | Some(Value::Null) => "",
            Some(_) => text(instance, "input", expected)?,
        };
        let asked = if input.trim().is_empty() { instruction.into() } else { format!("{instruction}\n\n{input}") };
        let mut messages = system(fields, expected)?;
        messages.extend([message("user", &asked), message("assistant", text(instance, "output", expected)?)]);
        Ok(messages)
    };
    let Some(instances) = fields.get("instances") else { return Ok(vec![conversation(fields, ALPACA)?]) };
    let Value::Array(instances) = instances else {
        return Err(Malformed { found: format!("the instances are {}", kind(instances)), expected: INSTANCES });
    };
    let instance = |instance: &Value| match instance {
        Value::Object(instance) => conversation(instance, INSTANCES),
        other => Err(Malformed { found: format!("an instance is {}", kind(other)), expected: INSTANCES }),
    };
    instances.iter().map(instance).collect()
}

/// The message of a `system` text, if there is one.
pub(crate) fn system(fields: &Map<String, Value>, expected: &'static str) -> Result<Vec<Message>, Malformed> {
    match fields.get("system") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(_) => Ok(vec![message("system", text(fields, "system", expected)?)]),
    }
}

/// What a key holds.
pub(crate) fn required<'a>(
    fields: &'a Map<String, Value>,
    key: &str,
    expected: &'static str,
) -> Result<&'a Value, Malformed> {
    fields.get(key).ok_or_else(|| Malformed { found: format!("there is no {key}"), expected })
}

fn text<'a>(fields: &'a Map<String, Value>, key: &str, expected: &'static str) -> Result<&'a str, Malformed> {
    let value = required(fields, key, expected)?;
    value.as_str().ok_or_else(|| Malformed { found: format!("{key} is {}", kind(value)), expected })
}

/// What a value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(object: Value) -> Vec<Vec<(String, String)>> {
        let pair = |message: Message| (message.role, message.content);
        let all = conversations(&object).unwrap_or_else(|error| panic!("{object}: {error}"));
        all.into_iter().map(|messages| messages.into_iter().map(pair).collect()).collect()
    }

    fn said(turns: &[(&str, &str)]) -> Vec<(String, String)> {
        turns.iter().map(|(role, content)| (role.to_string(), content.to_string())).collect()
    }

    #[test]
    fn every_form_is_read() {
        let asked = said(&[("user", "q"), ("assistant", "a")]);
        for object in [
            json!({ "messages": [{ "role": "user", "content": "q" }, { "role": "assistant", "content": "a" }] }),
            json!({ "conversations": [{ "from": "human", "value": "q" }, { "from": "gpt", "value": "a" }], "id": 3 }),
            json!({ "conversations": [{ "from": "user", "value": "q" }, { "from": "assistant", "value": "a" }] }),
            json!({ "instruction": "q", "input": "", "output": "a" }),
            json!({ "instruction": "q", "output": "a" }),
            json!({ "instruction": "q", "instances": [{ "input": "", "output": "a" }] }),
            json!({ "prompt": "q", "completion": "a" }),
            json!({ "prompt": [{ "role": "user", "content": "q" }], "completion": "a" }),
            json!({ "question": "q", "answer": "a" }),
            json!({ "messages": [
                { "role": "system", "content": " " }, { "role": "user", "content": "q" }, { "role": "assistant", "content": "a" }
            ] }),
        ] {
            assert_eq!(read(object), std::slice::from_ref(&asked));
        }
        let with_input = json!({ "system": "s", "instruction": "i", "input": "x", "output": "a" });
        assert_eq!(read(with_input), [said(&[("system", "s"), ("user", "i\n\nx"), ("assistant", "a")])]);
        let sharegpt = json!({ "system": "s", "conversations": [{ "from": "human", "value": "q" }] });
        assert_eq!(read(sharegpt), [said(&[("system", "s"), ("user", "q")])]);
        let instances = [json!({ "input": "x", "output": "a" }), json!({ "input": "y", "output": "b" })];
        let several = json!({ "instruction": "i", "instances": instances });
        let expected = [("x", "a"), ("y", "b")].map(|(x, a)| said(&[("user", &format!("i\n\n{x}")), ("assistant", a)]));
        assert_eq!(read(several), expected);
    }

    #[test]
    fn what_is_malformed_is_told_with_what_was_expected() {
        let refused = [
            json!(3),
            json!({ "text": "a story" }),
            json!({ "messages": "hi" }),
            json!({ "messages": ["hi"] }),
            json!({ "messages": [{ "role": "user" }] }),
            json!({ "messages": [{ "role": "user", "content": [] }] }),
            json!({ "messages": [{ "role": "narrator", "content": "hi" }] }),
            json!({ "conversations": {} }),
            json!({ "conversations": [{ "from": "bot", "value": "hi" }] }),
            json!({ "instruction": "q" }),
            json!({ "instruction": "q", "input": 3, "output": "a" }),
            json!({ "instruction": "q", "output": null }),
            json!({ "instruction": "q", "output": "a", "system": 1 }),
            json!({ "instruction": "q", "instances": "a" }),
            json!({ "instruction": "q", "instances": [3] }),
            json!({ "prompt": "q" }),
            json!({ "prompt": "q", "completion": true }),
            json!({ "question": "q", "answer": 72 }),
        ];
        let said: Vec<String> = refused.iter().map(|object| conversations(object).unwrap_err().to_string()).collect();
        expect_test::expect![[r#"
            there is a number; expected an object with messages, conversations, instruction and output, prompt and completion, or question and answer
            there are the keys ["text"]; expected an object with messages, conversations, instruction and output, prompt and completion, or question and answer
            the turns are a text; expected messages: a list of objects with the texts role (system, user or assistant) and content
            a turn is a text; expected messages: a list of objects with the texts role (system, user or assistant) and content
            there is no content; expected messages: a list of objects with the texts role (system, user or assistant) and content
            content is a list; expected messages: a list of objects with the texts role (system, user or assistant) and content
            role is "narrator"; expected messages: a list of objects with the texts role (system, user or assistant) and content
            the turns are an object; expected conversations: a list of objects with the texts from (system, human, user, gpt or assistant) and value
            from is "bot"; expected conversations: a list of objects with the texts from (system, human, user, gpt or assistant) and value
            there is no output; expected the texts instruction and output, and input if there is any
            input is a number; expected the texts instruction and output, and input if there is any
            output is null; expected the texts instruction and output, and input if there is any
            system is a number; expected the texts instruction and output, and input if there is any
            the instances are a text; expected the text instruction, and instances: a list of objects with the texts input and output
            an instance is a number; expected the text instruction, and instances: a list of objects with the texts input and output
            there is no completion; expected prompt and completion, both texts or lists of messages
            the turns are true or false; expected prompt and completion, both texts or lists of messages
            answer is a number; expected the texts question and answer"#]]
        .assert_eq(&said.join("\n"));
    }
}
