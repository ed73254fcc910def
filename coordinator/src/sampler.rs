//! Text sampled from fixed prompts while training, in the background.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use lockstep_model::adapters::{AdaptedLayout, AdapterConfig};
use lockstep_model::checkpoint::BaseFile;
use lockstep_model::compute::Computer;
use lockstep_model::config::ModelConfig;
use lockstep_model::device::{ComputeDevice, DeviceChoice, DeviceError};
use lockstep_model::inference::{Engine, Limits, Overflow, Request, Sampling, TextStream, complete};
use lockstep_model::tokenizer::Tokenizer;

use crate::background::Background;
use crate::config::{SamplingConfig, Turns};
use crate::observe::Sample;

/// Parameters to sample from.
pub(crate) struct Job {
    /// How many steps they have seen.
    pub(crate) step: u64,
    /// What is trained.
    pub(crate) parameters: Vec<f32>,
}

/// Starts a thread that goes on from each prompt, or answers it as one of `turns`, with the parameters it is sent, or the
/// adapters, merged into their base. Each text goes to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    model: ModelConfig,
    adapters: Option<(AdapterConfig, Arc<BaseFile>)>,
    tokenizer: Option<Tokenizer>,
    config: SamplingConfig,
    turns: Option<Turns>,
    seed: u64,
    done: impl Fn(Sample) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    let sampler = Sampler { model, tokenizer, config, turns, seed };
    Background::start("sampler", move |jobs| {
        for Job { step, mut parameters } in jobs {
            if let Some((adapters, base)) = &adapters {
                parameters = AdaptedLayout::of(&sampler.model, adapters).merge(base.parameters(), &parameters);
            }
            let mut engine = None;
            for (index, prompt) in sampler.config.prompts.iter().enumerate() {
                // A panic in a backend costs the sample, not the run.
                let sampled = || sampler.sample(index, prompt, &parameters, &mut engine);
                let text = match catch_unwind(AssertUnwindSafe(sampled)) {
                    Ok(text) => text.map_err(|error| format!("{error:#}")),
                    Err(_) => {
                        engine = None;
                        Err("the CPU backend panicked; training is not affected".into())
                    }
                };
                done(Sample { step, prompt: prompt.clone(), text });
            }
        }
    })
}

/// What stands above a text that is sampled after step `step`: the start of the run, too, if it was started again, and how
/// often it went back, since a step that is done again is sampled again.
pub(crate) fn heading(step: u64, start: u64, roll_backs: u64) -> String {
    let start = if start > 1 { format!(", start {start}") } else { String::new() };
    let back = match roll_backs {
        0 => String::new(),
        1 => ", gone back once".into(),
        times => format!(", gone back {times} times"),
    };
    format!("── step {step}{start}{back} ──")
}

/// What texts are written with, apart from the parameters.
struct Sampler {
    model: ModelConfig,
    tokenizer: Option<Tokenizer>,
    config: SamplingConfig,
    turns: Option<Turns>,
    seed: u64,
}

impl Sampler {
    /// What follows a prompt, or answers it. The engine is made with the first one, and serves the others.
    fn sample(
        &self,
        index: usize,
        prompt: &str,
        parameters: &[f32],
        engine: &mut Option<Engine>,
    ) -> anyhow::Result<String> {
        let tokenizer = match (&self.model, &self.tokenizer) {
            (ModelConfig::Line(_), _) => {
                let x: f32 =
                    prompt.trim().parse().map_err(|_| anyhow::anyhow!("{prompt:?} is no number to predict for"))?;
                let mut computer = Computer::new(&self.model, &device()?);
                computer.load(parameters)?;
                return Ok(format!(" → {:.2}", computer.predict(x)?));
            }
            (_, Some(tokenizer)) => tokenizer,
            (_, None) => anyhow::bail!("a Transformer without a tokenizer generates no text"),
        };
        let engine = match engine {
            Some(engine) => engine,
            None => {
                let limits = Limits { sequences: 1, ..Limits::default() };
                engine.insert(Engine::new(&self.model, parameters, &device()?, limits)?)
            }
        };
        if let Some(turns) = &self.turns {
            let prompt = turns.prompts.get(index).cloned().unwrap_or_default();
            return self.answer(engine, tokenizer, prompt, turns);
        }
        let mut tokens = Vec::with_capacity(self.config.tokens);
        let request = self.request(tokenizer.encode(prompt)?, tokenizer.stop_tokens());
        complete(engine, request, |token| {
            tokens.push(token);
            true
        })?;
        Ok(tokenizer.decode(&tokens))
    }

    fn request(&self, prompt: Vec<u32>, ends: Vec<u32>) -> Request {
        let SamplingConfig { temperature, top_k, tokens: max_tokens, .. } = self.config;
        let sampling = Sampling { temperature, top_k, seed: self.seed, ..Sampling::default() };
        Request { prompt, max_tokens, sampling, ends, overflow: Overflow::Slide }
    }

    /// The answer to a prompt, on a line of its own; dots follow where it does not end by itself.
    fn answer(
        &self,
        engine: &mut Engine,
        tokenizer: &Tokenizer,
        prompt: Vec<u32>,
        turns: &Turns,
    ) -> anyhow::Result<String> {
        let mut stream = TextStream::new(tokenizer, turns.stops.clone());
        let (mut text, mut tokens) = (String::new(), 0);
        complete(engine, self.request(prompt, turns.ends.clone()), |token| {
            tokens += 1;
            text.push_str(&stream.push(token));
            !stream.stopped()
        })?;
        let ended = stream.stopped() || tokens < self.config.tokens;
        text.push_str(&stream.finish());
        Ok(format!("\n{}{}", text.trim(), if ended { "" } else { " …" }))
    }
}

/// The CPU, or else whatever there is.
fn device() -> Result<ComputeDevice, DeviceError> {
    ComputeDevice::open(DeviceChoice::Cpu).or_else(|_| ComputeDevice::open(DeviceChoice::Auto))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heading_tells_a_step_that_was_done_again() {
        let headings = [heading(5, 1, 0), heading(5, 2, 0), heading(5, 1, 1), heading(5, 3, 2)];
        let expected = ["step 5", "step 5, start 2", "step 5, gone back once", "step 5, start 3, gone back 2 times"];
        assert_eq!(headings, expected.map(|heading| format!("── {heading} ──")));
    }
}
