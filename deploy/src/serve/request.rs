//! What a client asks for: bodies of `/v1/chat/completions` and `/v1/completions`, checked.
//!
//! Parameters that OpenAI has and this server cannot honour are refused by name, unless they ask for nothing.

use lockstep_model::chat_template::Message;
use lockstep_model::inference::Sampling;
use serde_json::{Value, json};

use crate::web::error::ApiError;
use crate::web::fields::{Fields, shown};

/// Most stop strings, as with OpenAI.
const MAX_STOPS: usize = 4;
/// Most answers to one prompt, as with OpenAI.
const MAX_CHOICES: usize = 128;

/// What both have in common.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Generation {
    /// Which model, if it is said.
    pub(crate) model: Option<String>,
    /// Answers to each prompt.
    pub(crate) choices: usize,
    /// Tokens of each answer, if it is said.
    pub(crate) max_tokens: Option<usize>,
    /// How tokens are chosen; the seed is that of the first answer.
    pub(crate) sampling: Sampling,
    /// Texts before which an answer ends.
    pub(crate) stops: Vec<String>,
    /// Whether it is sent as it comes.
    pub(crate) stream: bool,
    /// Whether a stream ends with the count of its tokens.
    pub(crate) include_usage: bool,
}

/// A request for answers to a conversation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ChatRequest {
    /// At least one.
    pub(crate) messages: Vec<Message>,
    pub(crate) generation: Generation,
}

/// A text to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A request for continuations of texts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CompletionRequest {
    /// At least one.
    pub(crate) prompts: Vec<Prompt>,
    /// Whether the prompt comes back before its continuation.
    pub(crate) echo: bool,
    pub(crate) generation: Generation,
}

/// A parameter, the values of it that ask for nothing, and why there are no others.
type Refusal = (&'static str, fn(&Value) -> bool, &'static str);

const NO_TOOLS: &str = "this server calls no tools";
const NO_LOGPROBS: &str = "this server tells no probabilities";
const TEXT_ALONE: &str = "this server reads and writes text alone";

const REFUSED: &[Refusal] = &[
    ("tools", is_empty, NO_TOOLS),
    ("tool_choice", |value| value == "none" || value == "auto", NO_TOOLS),
    ("parallel_tool_calls", Value::is_boolean, NO_TOOLS),
    ("functions", is_empty, NO_TOOLS),
    ("function_call", |value| value == "none" || value == "auto", NO_TOOLS),
    ("logprobs", |value| value == false, NO_LOGPROBS),
    ("top_logprobs", |value| value == 0, NO_LOGPROBS),
    ("logit_bias", is_empty, "this server favours no tokens"),
    (
        "response_format",
        |value| *value == json!({ "type": "text" }),
        "this server holds answers to no format; only {\"type\": \"text\"} can be asked for",
    ),
    ("modalities", |value| *value == json!(["text"]), TEXT_ALONE),
    ("audio", is_empty, TEXT_ALONE),
    ("prediction", is_empty, "this server takes no predicted outputs"),
    ("reasoning_effort", |value| value == "none", "this server knows no reasoning models"),
    ("verbosity", |value| value == "medium", "this server knows no verbosity; say it in a message"),
    ("web_search_options", is_empty, "this server searches nothing"),
    ("store", |value| value == false, "this server keeps nothing"),
    ("service_tier", |value| value == "auto" || value == "default", "this server has one tier"),
    ("best_of", |value| *value == 1, "this server ranks no answers; ask for several with n"),
    ("suffix", |value| value == "", "this server continues texts, and fills no gaps"),
];

/// What tells who asks, and changes no answer.
const SET_ASIDE: &[&str] = &["user", "metadata", "safety_identifier", "prompt_cache_key"];

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty)
}

impl ChatRequest {
    /// Reads a body. `seed` is taken where it names none.
    ///
    /// # Errors
    /// Names the parameter that makes no sense, or cannot be honoured.
    pub(crate) fn parse(body: &[u8], seed: u64) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let messages = match fields.value("messages") {
            Some(Value::Array(messages)) if !messages.is_empty() => messages,
            Some(other) => return Err(ApiError::parameter("messages", must_be("a list of messages", &other))),
            None => return Err(ApiError::parameter("messages", "is missing")),
        };
        let messages = messages.into_iter().enumerate().map(|(index, message)| message_of(index, message));
        let messages = messages.collect::<Result<_, _>>()?;
        let newer = fields.count("max_completion_tokens", 1..=usize::MAX)?;
        let generation = Generation::take(&mut fields, newer, seed)?;
        fields.finish()?;
        Ok(Self { messages, generation })
    }
}

impl CompletionRequest {
    /// Reads a body. `seed` is taken where it names none.
    ///
    /// # Errors
    /// Names the parameter that makes no sense, or cannot be honoured.
    pub(crate) fn parse(body: &[u8], seed: u64) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let prompt = fields.value("prompt").ok_or_else(|| ApiError::parameter("prompt", "is missing"))?;
        let prompts = prompts_of(&prompt).ok_or_else(|| {
            let expected = "a string, a list of strings, a list of tokens, or a list of such lists";
            ApiError::parameter("prompt", must_be(expected, &prompt))
        })?;
        let echo = fields.flag("echo")?;
        let generation = Generation::take(&mut fields, None, seed)?;
        fields.finish()?;
        Ok(Self { prompts, echo, generation })
    }
}

impl Generation {
    /// Takes what both requests have; `max_tokens` is what a newer name of that parameter said.
    fn take(fields: &mut Fields, max_tokens: Option<usize>, seed: u64) -> Result<Self, ApiError> {
        let older = fields.count("max_tokens", 1..=usize::MAX)?;
        if let (Some(newer), Some(older)) = (max_tokens, older)
            && newer != older
        {
            let problem = format!("says {older}, and max_completion_tokens {newer}; leave the older one out");
            return Err(ApiError::parameter("max_tokens", problem));
        }
        let stream = fields.flag("stream")?;
        let include_usage = match fields.value("stream_options") {
            None => false,
            Some(_) if !stream => {
                return Err(ApiError::parameter("stream_options", "is only for \"stream\": true"));
            }
            Some(options) => {
                let mut options = Fields::of(options, "stream_options")?;
                let include_usage = options.flag("include_usage")?;
                options.only("include_obfuscation", |value| value == false, "this server pads nothing")?;
                options.finish()?;
                include_usage
            }
        };
        let sampling = Sampling {
            temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_k: fields.count("top_k", 0..=usize::MAX)?.unwrap_or(0),
            top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", 0.0..=10.0)?.unwrap_or(1.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            seed: fields.integer("seed")?.unwrap_or(seed),
        };
        sampling.validate().map_err(|error| ApiError::body(error.to_string()))?;
        let generation = Self {
            model: fields.text("model")?,
            choices: fields.count("n", 1..=MAX_CHOICES)?.unwrap_or(1),
            max_tokens: max_tokens.or(older),
            sampling,
            stops: stops_of(fields)?,
            stream,
            include_usage,
        };
        for (name, neutral, why) in REFUSED {
            fields.only(name, neutral, why)?;
        }
        for name in SET_ASIDE {
            fields.value(name);
        }
        Ok(generation)
    }
}

fn must_be(expected: &str, value: &Value) -> String {
    format!("must be {expected}, and is {}", shown(value))
}

/// A text, or up to four.
fn stops_of(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let Some(value) = fields.value("stop") else { return Ok(Vec::new()) };
    let stops: Option<Vec<String>> = match &value {
        Value::String(stop) => Some(vec![stop.clone()]),
        Value::Array(stops) => stops.iter().map(|stop| stop.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let valid = |stops: &Vec<String>| stops.len() <= MAX_STOPS && !stops.iter().any(String::is_empty);
    let expected = "a string that is not empty, or a list of up to four";
    stops.filter(valid).ok_or_else(|| ApiError::parameter("stop", must_be(expected, &value)))
}

/// One prompt or several.
fn prompts_of(value: &Value) -> Option<Vec<Prompt>> {
    let items = match value {
        Value::String(text) => return Some(vec![Prompt::Text(text.clone())]),
        Value::Array(items) if !items.is_empty() => items,
        _ => return None,
    };
    if let Some(tokens) = tokens_of(value) {
        return Some(vec![Prompt::Tokens(tokens)]);
    }
    let prompt = |item: &Value| match item {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        item => tokens_of(item).map(Prompt::Tokens),
    };
    items.iter().map(prompt).collect()
}

fn tokens_of(value: &Value) -> Option<Vec<u32>> {
    let token = |item: &Value| item.as_u64().and_then(|token| u32::try_from(token).ok());
    value.as_array()?.iter().map(token).collect()
}

/// One turn of a conversation.
fn message_of(index: usize, value: Value) -> Result<Message, ApiError> {
    let mut fields = Fields::of(value, &format!("messages[{index}]"))?;
    let role = match fields.text("role")?.as_deref() {
        Some(role @ ("system" | "user" | "assistant")) => role.to_owned(),
        // What OpenAI calls a system message since its reasoning models.
        Some("developer") => "system".into(),
        Some(other) => {
            let problem = format!("must be system, developer, user or assistant, and is {other:?}; {NO_TOOLS}");
            return Err(ApiError::parameter(fields.path("role"), problem));
        }
        None => return Err(ApiError::parameter(fields.path("role"), "is missing")),
    };
    let path = fields.path("content");
    let content = match fields.value("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate().map(|(part, value)| part_of(&format!("{path}[{part}]"), value));
            parts.collect::<Result<String, _>>()?
        }
        Some(other) => return Err(ApiError::parameter(path, must_be("a string or a list of texts", &other))),
        None => return Err(ApiError::parameter(path, "is missing")),
    };
    fields.finish()?;
    Ok(Message { role, content })
}

/// A part of a message: `{"type": "text", "text": …}`.
fn part_of(path: &str, value: Value) -> Result<String, ApiError> {
    let mut fields = Fields::of(value, path)?;
    fields.only("type", |kind| kind == "text", TEXT_ALONE)?;
    let text = fields.text("text")?.ok_or_else(|| ApiError::parameter(fields.path("text"), "is missing"))?;
    fields.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(more: &Value) -> Result<ChatRequest, String> {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ChatRequest::parse(body.to_string().as_bytes(), 9).map_err(|error| said(&error))
    }

    fn completion(body: &Value) -> Result<CompletionRequest, String> {
        CompletionRequest::parse(body.to_string().as_bytes(), 9).map_err(|error| said(&error))
    }

    fn said(error: &ApiError) -> String {
        error.to_json()["error"]["message"].as_str().unwrap().into()
    }

    #[test]
    fn what_is_not_said_is_as_openai_has_it() {
        let request = chat(&json!({})).unwrap();
        assert_eq!(request.messages, [Message { role: "user".into(), content: "Hi".into() }]);
        let generation = request.generation;
        assert_eq!((generation.choices, generation.max_tokens, generation.stream), (1, None, false));
        assert_eq!(generation.sampling, Sampling { seed: 9, ..Sampling::default() });
        assert_eq!(completion(&json!({ "prompt": "a" })).unwrap().generation, generation);
    }

    #[test]
    fn what_is_said_holds() {
        let request = chat(&json!({
            "model": "m", "n": 2, "max_completion_tokens": 7, "max_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": 3,
            "stop": ["a", "b"], "presence_penalty": -1.5, "min_p": 0.1, "top_k": 4, "repetition_penalty": 1.1,
            "frequency_penalty": 2, "stream": true, "stream_options": { "include_usage": true }, "user": "x",
        }));
        let Generation { model, choices, max_tokens, sampling, stops, stream, include_usage } =
            request.unwrap().generation;
        assert_eq!((model.as_deref(), choices, max_tokens), (Some("m"), 2, Some(7)));
        assert_eq!((stops, stream, include_usage), (vec!["a".to_string(), "b".into()], true, true));
        let expected = Sampling {
            temperature: 0.0,
            top_k: 4,
            top_p: 0.5,
            min_p: 0.1,
            repetition_penalty: 1.1,
            presence_penalty: -1.5,
            frequency_penalty: 2.0,
            seed: 3,
        };
        assert_eq!(sampling, expected);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_and_what_asks_for_nothing_is_not() {
        let refused = [
            json!({ "tools": [{ "type": "function" }] }),
            json!({ "logprobs": true }),
            json!({ "response_format": { "type": "json_object" } }),
            json!({ "logit_bias": { "5": 1 } }),
            json!({ "best_of": 2 }),
            json!({ "temprature": 1 }),
        ];
        for more in refused {
            let name = more.as_object().unwrap().keys().next().unwrap().clone();
            assert!(chat(&more).unwrap_err().starts_with(&format!("{name}: this server")), "{more}");
        }
        let neutral = json!({
            "tools": [], "tool_choice": "auto", "logprobs": false, "response_format": { "type": "text" }, "logit_bias": {},
            "store": false, "stop": null, "metadata": { "a": "b" }, "functions": null,
        });
        assert_eq!(chat(&neutral), chat(&json!({})));
    }

    #[test]
    fn wrong_values_are_named() {
        let wrong = [
            (json!({ "max_tokens": 3, "max_completion_tokens": 4 }), "max_tokens: says 3"),
            (json!({ "stop": ["a", "b", "c", "d", "e"] }), "stop: must be"),
            (json!({ "stop": "" }), "stop: must be"),
            (json!({ "n": 1000 }), "n: must be"),
            (json!({ "stream_options": {} }), "stream_options: is only for"),
            (json!({ "messages": [] }), "messages: must be"),
            (json!({ "messages": [{ "role": "tool", "content": "" }] }), "messages[0].role: must be"),
            (json!({ "messages": [{ "role": "user" }] }), "messages[0].content: is missing"),
            (
                json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
                "messages[0].content[0].type: this server",
            ),
            (
                json!({ "messages": [{ "role": "user", "content": "", "name": "Ann" }] }),
                "messages[0].name: this server",
            ),
        ];
        for (more, beginning) in wrong {
            let said = chat(&more).unwrap_err();
            assert!(said.starts_with(beginning), "{more}: {said}");
        }
        assert!(chat(&json!({ "top_p": 0 })).is_err());
    }

    #[test]
    fn an_answer_comes_back_as_it_went_out() {
        let messages = json!([
            { "role": "developer", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": "c", "refusal": null, "annotations": [], "tool_calls": null },
        ]);
        let request = chat(&json!({ "messages": messages })).unwrap();
        let messages: Vec<_> = request.messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        assert_eq!(messages, [("system", "Be brief."), ("user", "ab"), ("assistant", "c")]);
    }

    #[test]
    fn prompts_are_texts_or_tokens() {
        let text = |text: &str| Prompt::Text(text.into());
        let prompts = [
            (json!("a"), Some(vec![text("a")])),
            (json!(["a", "b"]), Some(vec![text("a"), text("b")])),
            (json!([1, 2]), Some(vec![Prompt::Tokens(vec![1, 2])])),
            (json!([[1, 2], [3]]), Some(vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])])),
            (json!([]), None),
            (json!([1, -2]), None),
            (json!(5), None),
        ];
        for (value, expected) in prompts {
            let parsed = completion(&json!({ "prompt": value }));
            assert_eq!(parsed.ok().map(|request| request.prompts), expected, "{value}");
        }
        assert!(completion(&json!({ "prompt": "a", "suffix": "b" })).unwrap_err().starts_with("suffix: "));
        assert!(completion(&json!({ "prompt": "a", "echo": true })).unwrap().echo);
    }
}
