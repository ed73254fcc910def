//! What is answered, in OpenAI's form: one object, or a stream of events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};
use tokio_stream::Stream;

use super::answering::{Answering, Part, Usage};
use crate::web::error::ApiError;
use crate::web::scheduler::FinishReason;

/// What ends a stream.
const DONE: &str = "[DONE]";

/// Which of the two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// What stands around all answers to a request.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    pub(crate) endpoint: Endpoint,
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Names the parameters: the same ones, with the same seed, give the same answer.
    pub(crate) fingerprint: String,
}

impl Envelope {
    fn around(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    /// All answers at once.
    fn whole(&self, choices: Vec<(String, FinishReason)>, usage: Usage) -> Value {
        let object = match self.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completions => "text_completion",
        };
        let choice = |(index, (text, finish)): (usize, (String, FinishReason))| {
            let mut choice = json!({ "index": index, "logprobs": null, "finish_reason": finish.name() });
            match self.endpoint {
                Endpoint::Chat => {
                    choice["message"] = json!({ "role": "assistant", "content": text, "refusal": null });
                }
                Endpoint::Completions => choice["text"] = text.into(),
            }
            choice
        };
        let choices = choices.into_iter().enumerate().map(choice).collect();
        let mut body = self.around(object, choices);
        body["usage"] = usage.to_json();
        body
    }

    /// A piece of one answer; of a chat's, the first says who speaks.
    fn chunk(&self, index: usize, text: &str, finish: Option<FinishReason>, first: bool) -> Value {
        let mut choice = json!({ "index": index, "logprobs": null, "finish_reason": finish.map(FinishReason::name) });
        let object = match self.endpoint {
            Endpoint::Chat => {
                let mut delta = json!({});
                if first {
                    delta["role"] = "assistant".into();
                }
                if first || !text.is_empty() {
                    delta["content"] = text.into();
                }
                choice["delta"] = delta;
                "chat.completion.chunk"
            }
            Endpoint::Completions => {
                choice["text"] = text.into();
                "text_completion"
            }
        };
        self.around(object, json!([choice]))
    }
}

impl Usage {
    fn to_json(self) -> Value {
        let Self { prompt_tokens, completion_tokens } = self;
        let total_tokens = prompt_tokens + completion_tokens;
        json!({ "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total_tokens })
    }
}

/// Waits for all answers. Each begins with its text in `beginnings`, one for each answer.
pub(crate) async fn whole(
    envelope: &Envelope,
    beginnings: Vec<String>,
    mut answering: Answering,
) -> Result<Response, ApiError> {
    let mut choices: Vec<_> = beginnings.into_iter().map(|text| (text, FinishReason::Length)).collect();
    while let Some(Part { choice, text, finish }) = answering.next().await? {
        let Some((answer, reason)) = choices.get_mut(choice) else { continue };
        answer.push_str(&text);
        *reason = finish.unwrap_or(*reason);
    }
    Ok(Json(envelope.whole(choices, answering.usage())).into_response())
}

/// Sends answers as they come.
pub(crate) fn stream(
    envelope: Envelope,
    beginnings: Vec<String>,
    answering: Answering,
    include_usage: bool,
) -> Response {
    let mut events = Events { envelope, answering, include_usage, ready: VecDeque::new(), over: false };
    for (index, text) in beginnings.iter().enumerate() {
        if events.envelope.endpoint == Endpoint::Chat || !text.is_empty() {
            let chunk = events.envelope.chunk(index, text, None, true);
            events.send(chunk);
        }
    }
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// Parts as events. Dropped with its response when the client is gone, and the request with it.
struct Events {
    envelope: Envelope,
    answering: Answering,
    include_usage: bool,
    ready: VecDeque<Event>,
    over: bool,
}

impl Events {
    /// Sends a chunk. Where usage is asked for, all chunks have a place for it.
    fn send(&mut self, mut chunk: Value) {
        if self.include_usage && chunk.get("usage").is_none() {
            chunk["usage"] = Value::Null;
        }
        self.ready.push_back(Event::default().data(chunk.to_string()));
    }

    fn take(&mut self, part: Result<Option<Part>, ApiError>) {
        match part {
            Ok(Some(Part { choice, text, finish })) => {
                if !text.is_empty() {
                    self.send(self.envelope.chunk(choice, &text, None, false));
                }
                if finish.is_some() {
                    self.send(self.envelope.chunk(choice, "", finish, false));
                }
            }
            Ok(None) => {
                self.over = true;
                if self.include_usage {
                    let mut chunk = self.envelope.chunk(0, "", None, false);
                    chunk["choices"] = json!([]);
                    chunk["usage"] = self.answering.usage().to_json();
                    self.send(chunk);
                }
                self.ready.push_back(Event::default().data(DONE));
            }
            // The status is sent already: the error is an event, and the last one.
            Err(error) => {
                self.over = true;
                self.ready.push_back(Event::default().data(error.to_json().to_string()));
            }
        }
    }
}

impl Stream for Events {
    type Item = Result<Event, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(event) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if this.over {
                return Poll::Ready(None);
            }
            let part = ready!(this.answering.poll_next(context));
            this.take(part);
        }
    }
}
