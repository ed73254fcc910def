//! Pairs of answers from the model, one pair after the other for each rater.

use std::sync::Arc;

use lockstep_model::chat_template::Message;
use lockstep_model::inference::{Overflow, Request, Sampling};
use lockstep_model::tokenizer::Tokenizer;

use super::pair::{Answer, Pair, Task};
use super::room::Room;
use crate::chat;
use crate::chat::learned::DAY;
use crate::chat::template::{PromptError, Template};
use crate::web::error::ApiError;
use crate::web::scheduler::{Output, Refusal, Scheduler, Sequence};

/// Answers that are sampled before a prompt is given up because they are all alike.
pub(crate) const MOST_ANSWERS: u64 = 8;

/// What answers are sampled with.
pub(crate) struct Sampler {
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) reader: Reader,
    /// The server's.
    pub(crate) seed: u64,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    /// Most tokens of an answer.
    pub(crate) max_tokens: usize,
    /// SHA-256 of the parameters, hexadecimal.
    pub(crate) params_sha256: String,
}

/// How a model reads prompts and writes answers.
pub(crate) struct Reader {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Template,
    /// Tokens of prompt and answer, at most.
    pub(crate) context: usize,
}

/// Why a model reads a prompt not.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    /// It cannot be written down for it.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// It leaves no room for an answer.
    #[error("it has {tokens} tokens, and the model reads {context} with its answer")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Of the model.
        context: usize,
    },
}

impl Reader {
    /// A prompt's tokens, as training writes them.
    ///
    /// # Errors
    /// If the model does not read it.
    pub(crate) fn tokens(&self, prompt: &[Message]) -> Result<Vec<u32>, Unreadable> {
        let tokens = self.template.prompt(prompt, DAY)?;
        match tokens.len() < self.context {
            true => Ok(tokens),
            false => Err(Unreadable::TooLong { tokens: tokens.len(), context: self.context }),
        }
    }
}

impl Sampler {
    /// Has pairs sampled for a rater, as the rater's desk wants them, until the room is gone.
    pub(crate) async fn serve(self: Arc<Self>, room: Arc<Room>, rater: String) {
        let mut changes = room.changes();
        loop {
            match room.next_task(&rater) {
                Some(task) => {
                    let sampled = self.pair(&task).await;
                    if let Ok(None) = sampled {
                        let prompt = task.prompt.last().map(|message| &*message.content).unwrap_or_default();
                        tracing::warn!(
                            rater,
                            prompt,
                            "{MOST_ANSWERS} answers were alike, and there is nothing to choose"
                        );
                    }
                    room.sampled(&rater, &task, sampled);
                }
                None if changes.changed().await.is_err() => return,
                None => {}
            }
        }
    }

    /// Two answers that differ, or nothing if there are none among as many as are tried.
    async fn pair(&self, task: &Task) -> Result<Option<Pair>, ApiError> {
        let draws = task.draws(self.seed);
        let prompt = self.reader.tokens(&task.prompt).map_err(|error| ApiError::parameter("prompt", error))?;
        let [first, mut other] = self.answers(&prompt, [0, 1].map(|number| draws.seed(number))).await?;
        let mut sampled = 2;
        while other.text == first.text && sampled < MOST_ANSWERS {
            [other] = self.answers(&prompt, [draws.seed(sampled)]).await?;
            sampled += 1;
        }
        if other.text == first.text {
            return Ok(None);
        }
        Ok(Some(Pair {
            task: task.clone(),
            answers: if draws.turned() { [other, first] } else { [first, other] },
            temperature: self.temperature,
            top_p: self.top_p,
            params_sha256: self.params_sha256.clone(),
        }))
    }

    /// One answer from each seed.
    async fn answers<const N: usize>(&self, prompt: &[u32], seeds: [u64; N]) -> Result<[Answer; N], ApiError> {
        let Reader { tokenizer, template, context } = &self.reader;
        let sequences = seeds.map(|seed| Sequence {
            request: Request {
                prompt: prompt.to_vec(),
                max_tokens: self.max_tokens.min(context - prompt.len()),
                sampling: Sampling { seed, temperature: self.temperature, top_p: self.top_p, ..Sampling::default() },
                ends: template.ends().to_vec(),
                overflow: Overflow::Stop,
            },
            answer: chat::answer::Answer::new(tokenizer, template.stops().to_vec()),
        });
        let outputs = self.scheduler.submit(sequences.into());
        let mut outputs = outputs.map_err(|refusal| match refusal {
            Refusal::Full => ApiError::queue_full(self.scheduler.places()),
            Refusal::Stopping => ApiError::stopping(),
        })?;
        let mut texts = seeds.map(|_| String::new());
        let mut finishes = seeds.map(|_| None);
        while finishes.iter().any(Option::is_none) {
            match outputs.recv().await {
                Some(Output::Started) => {}
                Some(Output::Token { sequence, text }) => texts[sequence].push_str(&text),
                Some(Output::Finished { sequence, text, reason }) => {
                    texts[sequence].push_str(&text);
                    finishes[sequence] = Some(reason);
                }
                Some(Output::Failed(problem)) => return Err(ApiError::internal(problem)),
                None => return Err(ApiError::stopping()),
            }
        }
        Ok(std::array::from_fn(|number| Answer {
            text: texts[number].trim_end().into(),
            seed: seeds[number],
            finish: finishes[number].expect("all have finished"),
        }))
    }
}
