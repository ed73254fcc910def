//! Text sampled from fixed prompts while training, in the background.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lockstep_model::compute::Computer;
use lockstep_model::config::ModelConfig;
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::generate::{Choice, generate};
use lockstep_model::tokenizer::Tokenizer;

use crate::background::Background;
use crate::config::SamplingConfig;
use crate::observe::Sample;

/// Parameters to sample from.
pub(crate) struct Job {
    /// How many steps they have seen.
    pub(crate) step: u64,
    pub(crate) parameters: Vec<f32>,
}

/// Starts a thread that goes on from each prompt with the parameters it is sent. Each text goes to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    model: ModelConfig,
    tokenizer: Option<Tokenizer>,
    config: SamplingConfig,
    seed: u64,
    done: impl Fn(Sample) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    Background::start("sampler", move |jobs| {
        for Job { step, parameters } in jobs {
            for prompt in &config.prompts {
                let sampled = || sample(&model, tokenizer.as_ref(), &config, seed, prompt, &parameters);
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

fn sample(
    model: &ModelConfig,
    tokenizer: Option<&Tokenizer>,
    config: &SamplingConfig,
    seed: u64,
    prompt: &str,
    parameters: &[f32],
) -> anyhow::Result<String> {
    let device = ComputeDevice::open(DeviceChoice::Cpu).or_else(|_| ComputeDevice::open(DeviceChoice::Auto))?;
    let mut computer = Computer::new(model, &device);
    computer.load(parameters)?;
    match (model, model.context(), tokenizer) {
        (_, Some(context), Some(tokenizer)) => {
            let prompt = tokenizer.encode(prompt)?;
            let choice = Choice { temperature: config.temperature, top_k: config.top_k, top_p: 1.0, seed };
            let mut tokens = Vec::with_capacity(config.tokens);
            let end = tokenizer.end_of_text();
            generate(&computer, context, &prompt, config.tokens, &choice, end, |token| {
                tokens.push(token);
                true
            })?;
            Ok(tokenizer.decode(&tokens))
        }
        (ModelConfig::Line(_), ..) => {
            let x: f32 =
                prompt.trim().parse().map_err(|_| anyhow::anyhow!("{prompt:?} is no number to predict for"))?;
            Ok(format!(" → {:.2}", computer.predict(x)?))
        }
        _ => anyhow::bail!("a Transformer without a tokenizer generates no text"),
    }
}
