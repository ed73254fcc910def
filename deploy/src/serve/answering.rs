//! The output of a request under way: counted, timed, and logged when it is over.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::field::Empty;

use crate::web::error::ApiError;
use crate::web::scheduler::{FinishReason, Output};

/// How many tokens a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of all prompts, each once.
    pub(crate) prompt_tokens: usize,
    /// Chosen, ends of text not counted.
    pub(crate) completion_tokens: usize,
}

/// Text for one of a request's answers, which are numbered from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) choice: usize,
    /// May be empty.
    pub(crate) text: String,
    /// Why no more follows, if so.
    pub(crate) finish: Option<FinishReason>,
}

/// A request under way. Dropping it ends its sequences.
pub(crate) struct Answering {
    outputs: mpsc::UnboundedReceiver<Output>,
    /// Answers that are not over.
    open: usize,
    usage: Usage,
    watch: Stopwatch,
}

impl Answering {
    /// Of `choices` answers, to a request called `id` with prompts of `prompt_tokens` in all.
    pub(crate) fn new(
        id: &str,
        prompt_tokens: usize,
        choices: usize,
        outputs: mpsc::UnboundedReceiver<Output>,
    ) -> Self {
        let usage = Usage { prompt_tokens, completion_tokens: 0 };
        Self { outputs, open: choices, usage, watch: Stopwatch::start(id, prompt_tokens, choices) }
    }

    /// The next part; `None` once all answers are over.
    ///
    /// # Errors
    /// If one fails, or the server stops before it is over.
    pub(crate) async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// The same, for a stream.
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Part>, ApiError>> {
        loop {
            if self.open == 0 {
                self.watch.over(self.usage, "answered");
                return Poll::Ready(Ok(None));
            }
            let part = match ready!(self.outputs.poll_recv(context)) {
                Some(Output::Started) => {
                    self.watch.started();
                    continue;
                }
                Some(Output::Token { sequence, text }) => {
                    self.usage.completion_tokens += 1;
                    self.watch.token();
                    Part { choice: sequence, text, finish: None }
                }
                Some(Output::Finished { sequence, text, reason }) => {
                    self.open -= 1;
                    Part { choice: sequence, text, finish: Some(reason) }
                }
                Some(Output::Failed(problem)) => {
                    self.watch.over(self.usage, "failed");
                    return Poll::Ready(Err(ApiError::internal(problem)));
                }
                None => {
                    self.watch.over(self.usage, "cut off, as the server stops");
                    return Poll::Ready(Err(ApiError::stopping()));
                }
            };
            return Poll::Ready(Ok(Some(part)));
        }
    }

    /// Tokens so far.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.watch.over(self.usage, "given up, as the client is gone");
    }
}

/// When what happened, as a span's fields.
struct Stopwatch {
    span: tracing::Span,
    arrived: Instant,
    first_token: Option<Instant>,
    over: bool,
}

impl Stopwatch {
    fn start(id: &str, prompt_tokens: usize, choices: usize) -> Self {
        let span = tracing::info_span!(
            "request",
            id,
            prompt_tokens,
            choices,
            queue_ms = Empty,
            first_token_ms = Empty,
            tokens = Empty,
            tokens_per_sec = Empty
        );
        Self { span, arrived: Instant::now(), first_token: None, over: false }
    }

    /// A sequence began. The last one's wait is kept.
    fn started(&mut self) {
        self.span.record("queue_ms", milliseconds(self.arrived.elapsed()));
    }

    fn token(&mut self) {
        if self.first_token.is_none() {
            self.first_token = Some(Instant::now());
            self.span.record("first_token_ms", milliseconds(self.arrived.elapsed()));
        }
    }

    /// Logs the request, once.
    fn over(&mut self, usage: Usage, how: &str) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.span.record("tokens", usage.completion_tokens);
        if let Some(first) = self.first_token {
            let rate = usage.completion_tokens as f64 / first.elapsed().as_secs_f64();
            self.span.record("tokens_per_sec", rate.round());
        }
        tracing::info!(parent: &self.span, "{how}");
    }
}

fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn parts_are_counted_until_all_answers_are_over() {
        let (outputs, receiver) = mpsc::unbounded_channel();
        let mut answering = Answering::new("a", 3, 2, receiver);
        let token = |sequence, text: &str| Output::Token { sequence, text: text.into() };
        let finished = |sequence, reason| Output::Finished { sequence, text: String::new(), reason };
        for output in [
            Output::Started,
            token(0, "x"),
            Output::Started,
            token(1, ""),
            finished(0, FinishReason::Stop),
            token(1, "y"),
            finished(1, FinishReason::Length),
        ] {
            outputs.send(output).unwrap();
        }
        let mut parts = Vec::new();
        while let Some(Part { choice, text, finish }) = answering.next().await.unwrap() {
            parts.push((choice, text, finish));
        }
        let part = |choice, text: &str, finish| (choice, text.to_string(), finish);
        let expected = [
            part(0, "x", None),
            part(1, "", None),
            part(0, "", Some(FinishReason::Stop)),
            part(1, "y", None),
            part(1, "", Some(FinishReason::Length)),
        ];
        assert_eq!(parts, expected);
        assert_eq!(answering.usage(), Usage { prompt_tokens: 3, completion_tokens: 3 });
    }

    #[tokio::test]
    async fn an_end_before_the_end_is_an_error() {
        let (outputs, receiver) = mpsc::unbounded_channel();
        let mut answering = Answering::new("a", 3, 1, receiver);
        drop(outputs);
        assert_eq!(answering.next().await, Err(ApiError::stopping()));

        let (outputs, receiver) = mpsc::unbounded_channel();
        let mut answering = Answering::new("b", 3, 1, receiver);
        outputs.send(Output::Failed("no memory".into())).unwrap();
        assert_eq!(answering.next().await, Err(ApiError::internal("no memory")));
    }
}
