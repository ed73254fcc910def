//! Sequences under way, and what each step does for them.

use std::cmp::Reverse;

use rayon::prelude::*;

use super::backend::Backend;
use super::network::Run;
use super::sampling::{Sampling, SamplingError};
use crate::compute::ComputeError;
use crate::config::ModelConfig;
use crate::device::ComputeDevice;
use crate::layout::Layout;

/// Cached tokens that are worth waiting a step for, or copying from another sequence.
const WORTH_SHARING: usize = 16;

/// How much is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences, at least 1.
    pub sequences: usize,
    /// Tokens of prompts in one step, at least 1; sequences that are past theirs wait so long for their next token.
    pub prefill_tokens: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sequences: 8, prefill_tokens: 256 }
    }
}

/// What becomes of a sequence that is as long as the model's context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// It ends.
    Stop,
    /// Its older half is forgotten, and the rest read again from position 0 on.
    Slide,
}

/// A text to be continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// The most tokens to be chosen.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Tokens that end the sequence when they are chosen.
    pub ends: Vec<u32>,
    /// What happens at the end of the context. With [`Overflow::Stop`], a prompt must fit.
    pub overflow: Overflow,
}

/// Why a request is not taken.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum RequestError {
    /// Nothing to continue.
    #[error("the prompt is empty: a model continues at least one token")]
    Empty,
    /// The model does not read so much.
    #[error("the prompt has {tokens} tokens, and the model's context is {context}: shorten it")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Of the model.
        context: usize,
    },
    /// Not of this model's vocabulary.
    #[error("the prompt has token {token}, and the model's vocabulary {vocab_size}")]
    Token {
        /// The token.
        token: u32,
        /// Of the model.
        vocab_size: usize,
    },
    /// The next token cannot be chosen so.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// As many sequences as there may be are under way.
    #[error("{0} sequences are under way, and no more may be: wait for one to end")]
    Full(usize),
}

/// Names a sequence of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

/// What a step did for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which sequence.
    pub sequence: SequenceId,
    /// The token that was chosen; none where it was an end.
    pub token: Option<u32>,
    /// Why there are no more, if so.
    pub finish: Option<Finish>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model chose an end.
    End,
    /// It has as many tokens as it may have, or the context has.
    Length,
}

/// Continues sequences with fixed parameters.
#[derive(Debug)]
pub struct Engine {
    backend: Backend,
    context: usize,
    vocab_size: usize,
    limits: Limits,
    slots: Vec<Slot>,
    next: u64,
}

/// Room for a sequence, and what the last one in it left.
#[derive(Debug, Default)]
struct Slot {
    sequence: Option<Sequence>,
    /// All tokens, prompt first.
    tokens: Vec<u32>,
    /// Where in them the part begins that the model reads.
    start: usize,
    /// Tokens from `start` on that are in the cache.
    cached: usize,
    /// Rises from sequence to sequence.
    last_used: u64,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    request: Request,
    /// Whether its slot's cache is its own.
    started: bool,
}

impl Slot {
    /// What the model reads.
    fn window(&self) -> &[u32] {
        &self.tokens[self.start..]
    }

    /// How many of its cached tokens `prompt` begins with, at least one of which is to be read.
    fn shared(&self, prompt: &[u32], cached: usize) -> usize {
        let pairs = self.window()[..cached].iter().zip(&prompt[..prompt.len() - 1]);
        pairs.take_while(|(ours, theirs)| ours == theirs).count()
    }
}

impl Engine {
    /// An engine for `model` with `parameters`, flat in layout order, on `device`.
    ///
    /// # Errors
    /// If the model is no Transformer, or the parameters are not as many as its layout has.
    pub fn new(
        model: &ModelConfig,
        parameters: &[f32],
        device: &ComputeDevice,
        limits: Limits,
    ) -> Result<Self, ComputeError> {
        let expected = Layout::of(model).len();
        if parameters.len() != expected {
            return Err(ComputeError::Parameters { expected, found: parameters.len() });
        }
        let no_text = || ComputeError::Input("the straight line generates no text: choose a Transformer's run".into());
        let backend = Backend::new(model, parameters, device)?.ok_or_else(no_text)?;
        let (context, vocab_size) = (model.context().unwrap_or(0), model.vocab_size());
        Ok(Self { backend, context, vocab_size, limits, slots: Vec::new(), next: 0 })
    }

    /// The most tokens that the model reads.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes that each token of a sequence takes of memory, as long as it is cached.
    pub fn cache_bytes_per_token(&self) -> usize {
        self.backend.cache_bytes_per_token()
    }

    /// Bytes of weights that are read in a step, be it for one sequence or for several.
    pub fn weight_bytes(&self) -> usize {
        self.backend.weight_bytes()
    }

    /// The parameters as they are in memory now, flat in layout order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn parameters(&self) -> Result<Vec<f32>, ComputeError> {
        self.backend.parameters()
    }

    /// Sequences under way.
    pub fn running(&self) -> usize {
        self.slots.iter().filter(|slot| slot.sequence.is_some()).count()
    }

    /// Takes a request, which the next steps work on.
    ///
    /// # Errors
    /// If it makes no sense for this model, or too many are under way.
    pub fn admit(&mut self, request: Request) -> Result<SequenceId, RequestError> {
        let (tokens, context, vocab_size) = (request.prompt.len(), self.context, self.vocab_size);
        request.sampling.validate()?;
        if tokens == 0 {
            return Err(RequestError::Empty);
        }
        if tokens > context && request.overflow == Overflow::Stop {
            return Err(RequestError::TooLong { tokens, context });
        }
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(RequestError::Token { token, vocab_size });
        }
        let slot = self.room_for(&request.prompt).ok_or(RequestError::Full(self.limits.sequences))?;
        let id = SequenceId(self.next);
        self.next += 1;
        self.slots[slot].last_used = self.next;
        self.slots[slot].sequence = Some(Sequence { id, request, started: false });
        Ok(id)
    }

    /// Gives a sequence up. Whether it was under way.
    pub fn cancel(&mut self, sequence: SequenceId) -> bool {
        let slot = self.slots.iter_mut().find(|slot| slot.sequence.as_ref().is_some_and(|s| s.id == sequence));
        slot.is_some_and(|slot| slot.sequence.take().is_some())
    }

    /// Reads a part of the prompts that are not read yet, and gives each other sequence its next token.
    ///
    /// # Errors
    /// If the device fails; all sequences are lost then.
    pub fn step(&mut self) -> Result<Vec<Event>, ComputeError> {
        let counts = self.plan();
        let slots = &self.slots;
        let runs = counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(slot, &count)| {
            let Slot { cached: start, .. } = slots[slot];
            let (window, end) = (slots[slot].window(), start + count);
            Run { place: slot, tokens: &window[start..end], start, wants_logits: end == window.len() }
        });
        let runs: Vec<Run<'_>> = runs.collect();
        let answers: Vec<usize> = runs.iter().filter(|run| run.wants_logits).map(|run| run.place).collect();
        let logits = match self.backend.forward(&runs) {
            Ok(logits) => logits,
            Err(error) => {
                self.slots.iter_mut().for_each(|slot| *slot = Slot::default());
                (0..self.slots.len()).for_each(|slot| self.backend.keep(slot, 0, 0));
                return Err(error);
            }
        };
        let picks = answers.par_iter().zip(&logits).map(|(&slot, logits)| {
            let Slot { sequence, tokens, .. } = &slots[slot];
            sequence.as_ref().map_or(0, |s| s.request.sampling.pick(logits, tokens, s.request.prompt.len()))
        });
        let picks: Vec<u32> = picks.collect();
        self.slots.iter_mut().zip(counts).for_each(|(slot, count)| slot.cached += count);
        Ok(answers.into_iter().zip(picks).filter_map(|(slot, token)| self.take(slot, token)).collect())
    }

    /// A slot without a sequence: the one whose cache `prompt` shares most with, or else a new one, or else the one that was not
    /// used for longest.
    fn room_for(&mut self, prompt: &[u32]) -> Option<usize> {
        let idle = self.slots.iter().enumerate().filter(|(_, slot)| slot.sequence.is_none());
        let best = idle.map(|(index, slot)| (slot.shared(prompt, slot.cached), Reverse(slot.last_used), index)).max();
        let may_grow = self.slots.len() < self.limits.sequences.max(1);
        match best {
            Some((shared, _, index)) if shared > 0 || !may_grow => Some(index),
            _ if may_grow => {
                self.slots.push(Slot::default());
                self.backend.add_place();
                Some(self.slots.len() - 1)
            }
            _ => None,
        }
    }

    /// How many tokens each slot's sequence reads in the next step: one of those that are past their prompts, and as many of
    /// the others' as are allowed, first come first served.
    pub(super) fn plan(&mut self) -> Vec<usize> {
        let mut counts = vec![0; self.slots.len()];
        let mut waiting = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let Some(sequence) = &slot.sequence else { continue };
            match slot.window().len() - slot.cached {
                1 if sequence.started => counts[index] = 1,
                _ => waiting.push((sequence.id, index)),
            }
        }
        waiting.sort_unstable();
        let mut left = self.limits.prefill_tokens.max(1);
        for (_, index) in waiting {
            if left == 0 || !self.start(index, &counts) {
                continue;
            }
            let slot = &self.slots[index];
            counts[index] = left.min(slot.window().len() - slot.cached);
            left -= counts[index];
        }
        counts
    }

    /// Gives a sequence that has not started its place in its slot's cache, with what another slot's holds of its prompt.
    /// `false` where what one reads in this step, as `counts` says, is worth waiting for.
    fn start(&mut self, index: usize, counts: &[usize]) -> bool {
        let Some(sequence) = self.slots[index].sequence.as_ref().filter(|sequence| !sequence.started) else {
            return true;
        };
        let (context, request) = (self.context, &sequence.request);
        let prompt = request.prompt.clone();
        let start = prompt.len().saturating_sub(context);
        let window = &prompt[start..];
        let reserved = context.min(window.len().saturating_add(request.max_tokens));
        let best = (self.slots.iter().zip(counts).enumerate())
            .map(|(other, (slot, count))| {
                (slot.shared(window, slot.cached), slot.shared(window, slot.cached + count), other)
            })
            .max_by_key(|&(now, later, other)| (now.max(later), now, other == index));
        let (now, later, source) = best.unwrap_or_default();
        if later >= now + WORTH_SHARING {
            return false;
        }
        let own = self.slots[index].shared(window, self.slots[index].cached);
        let cached = if now >= own + WORTH_SHARING { now } else { own };
        if cached > own {
            self.backend.copy(source, index, cached);
        }
        self.backend.keep(index, cached, reserved);
        let slot = &mut self.slots[index];
        (slot.tokens, slot.start, slot.cached) = (prompt, start, cached);
        if let Some(sequence) = &mut slot.sequence {
            sequence.started = true;
        }
        true
    }

    /// Adds the token that was chosen to a slot's sequence.
    fn take(&mut self, index: usize, token: u32) -> Option<Event> {
        let context = self.context;
        let slot = &mut self.slots[index];
        let Sequence { id, request, .. } = slot.sequence.as_ref()?;
        let mut event = Event { sequence: *id, token: Some(token), finish: None };
        if request.max_tokens == 0 {
            event = Event { token: None, finish: Some(Finish::Length), ..event };
        } else if request.ends.contains(&token) {
            event = Event { token: None, finish: Some(Finish::End), ..event };
        } else {
            slot.tokens.push(token);
            let full = slot.window().len() > context;
            if slot.tokens.len() - request.prompt.len() >= request.max_tokens
                || full && request.overflow == Overflow::Stop
            {
                event.finish = Some(Finish::Length);
            } else if full {
                slot.start = slot.tokens.len() - context.div_ceil(2);
                slot.cached = 0;
                self.backend.keep(index, 0, context);
            }
        }
        if event.finish.is_some() {
            slot.sequence = None;
        }
        Some(event)
    }
}

/// Continues one text, and gives each token out as it is chosen, until it ends or `each` returns `false`.
///
/// # Errors
/// If the request makes no sense for this model, or the device fails.
pub fn complete(engine: &mut Engine, request: Request, mut each: impl FnMut(u32) -> bool) -> Result<(), ComputeError> {
    let id = engine.admit(request).map_err(|error| ComputeError::Input(error.to_string()))?;
    loop {
        for event in engine.step()?.into_iter().filter(|event| event.sequence == id) {
            if event.token.is_some_and(|token| !each(token)) {
                engine.cancel(id);
                return Ok(());
            }
            if event.finish.is_some() {
                return Ok(());
            }
        }
    }
}
