//! Text sampled from fixed prompts while training, in the background.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lockstep_model::compute::Computer;
use lockstep_model::config::ModelConfig;
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::inference::{Engine, Limits, Overflow, Request, Sampling, TextStream, complete};
use lockstep_model::tokenizer::Tokenizer;

use crate::background::Background;
use crate::config::{SamplingConfig, Turns};
use crate::observe::Sample;

/// Parameters to sample from.
pub(crate) struct Job {
    /// How many steps they have seen.
    pub(crate) step: u64,
    pub(crate) parameters: Vec<f32>,
}

/// Starts a thread that goes on from each prompt, or answers it as one of `turns`, with the parameters it is sent. Each text
/// goes to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    model: ModelConfig,
    tokenizer: Option<Tokenizer>,
    config: SamplingConfig,
    turns: Option<Turns>,
    seed: u64,
    done: impl Fn(Sample) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    Background::start("sampler", move |jobs| {
        for Job { step, parameters } in jobs {
            for (index, prompt) in config.prompts.iter().enumerate() {
                let sampled = || match (&turns, &tokenizer) {
                    (Some(turns), Some(tokenizer)) => {
                        let writer =
                            Writer { model: &model, tokenizer, config: &config, seed, parameters: &parameters };
                        let prompt = turns.prompts.get(index).cloned().unwrap_or_default();
                        writer.answer(prompt, turns)
                    }
                    _ => sample(&model, tokenizer.as_ref(), &config, seed, prompt, &parameters),
                };
                // A panic in a backend costs the sample, not the run.
                let text = match catch_unwind(AssertUnwindSafe(sampled)) {
                    Ok(text) => text.map_err(|error| format!("{error:#}")),
                    Err(_) => Err("the CPU backend panicked; training is not affected".into()),
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

fn sample(
    model: &ModelConfig,
    tokenizer: Option<&Tokenizer>,
    config: &SamplingConfig,
    seed: u64,
    prompt: &str,
    parameters: &[f32],
) -> anyhow::Result<String> {
    match (model, tokenizer) {
        (ModelConfig::Line(_), _) => {
            let x: f32 =
                prompt.trim().parse().map_err(|_| anyhow::anyhow!("{prompt:?} is no number to predict for"))?;
            let mut computer = Computer::new(model, &device()?);
            computer.load(parameters)?;
            Ok(format!(" → {:.2}", computer.predict(x)?))
        }
        (_, Some(tokenizer)) => {
            let writer = Writer { model, tokenizer, config, seed, parameters };
            let mut tokens = Vec::with_capacity(config.tokens);
            writer.write(tokenizer.encode(prompt)?, tokenizer.stop_tokens(), |token| {
                tokens.push(token);
                true
            })?;
            Ok(tokenizer.decode(&tokens))
        }
        (_, None) => anyhow::bail!("a Transformer without a tokenizer generates no text"),
    }
}

/// The CPU, or else whatever there is.
fn device() -> Result<ComputeDevice, lockstep_model::device::DeviceError> {
    ComputeDevice::open(DeviceChoice::Cpu).or_else(|_| ComputeDevice::open(DeviceChoice::Auto))
}

/// What a text is written with.
struct Writer<'a> {
    model: &'a ModelConfig,
    tokenizer: &'a Tokenizer,
    config: &'a SamplingConfig,
    seed: u64,
    parameters: &'a [f32],
}

impl Writer<'_> {
    /// Gives what follows `prompt` to `each`, until one of `ends`, the length that the recipe allows, or until `each` is false.
    fn write(&self, prompt: Vec<u32>, ends: Vec<u32>, each: impl FnMut(u32) -> bool) -> anyhow::Result<()> {
        let Self { model, config, seed, parameters, .. } = *self;
        let mut engine = Engine::new(model, parameters, &device()?, Limits { sequences: 1, ..Limits::default() })?;
        let (temperature, top_k) = (config.temperature, config.top_k);
        let sampling = Sampling { temperature, top_k, seed, ..Sampling::default() };
        let request = Request { prompt, max_tokens: config.tokens, sampling, ends, overflow: Overflow::Slide };
        Ok(complete(&mut engine, request, each)?)
    }

    /// The answer to a prompt, on a line of its own; dots follow where it does not end by itself.
    fn answer(&self, prompt: Vec<u32>, turns: &Turns) -> anyhow::Result<String> {
        let mut stream = TextStream::new(self.tokenizer, turns.stops.clone());
        let (mut text, mut tokens) = (String::new(), 0);
        self.write(prompt, turns.ends.clone(), |token| {
            tokens += 1;
            text.push_str(&stream.push(token));
            !stream.stopped()
        })?;
        let ended = stream.stopped() || tokens < self.config.tokens;
        text.push_str(&stream.finish());
        Ok(format!("\n{}{}", text.trim(), if ended { "" } else { " …" }))
    }
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
