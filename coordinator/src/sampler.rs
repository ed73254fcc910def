//! Text sampled from fixed prompts while training, on a thread of its own.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use lockstep_model::compute::Computer;
use lockstep_model::config::ModelConfig;
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::generate::{Choice, generate};
use lockstep_model::tokenizer::Tokenizer;

use crate::config::SamplingConfig;
use crate::observe::Sample;

/// Parameters to sample from.
struct Job {
    step: u64,
    parameters: Vec<f32>,
}

/// The thread that samples. Dropping it waits for the samples under way.
#[derive(Debug)]
pub(crate) struct Sampler {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// Takes parameters to the thread.
#[derive(Clone, Debug)]
pub(crate) struct Handle(Sender<Job>);

impl Handle {
    /// Asks for a text from each prompt with the parameters after `step`.
    pub(crate) fn sample(&self, step: u64, parameters: Vec<f32>) {
        // The thread ends only when the run does.
        let _ = self.0.send(Job { step, parameters });
    }
}

impl Sampler {
    /// Starts the thread; each text goes to `done`.
    pub(crate) fn start(
        model: ModelConfig,
        tokenizer: Option<Tokenizer>,
        config: SamplingConfig,
        seed: u64,
        done: impl Fn(Sample) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let thread = std::thread::Builder::new().name("sampler".into()).spawn(move || {
            for Job { step, parameters } in queue {
                for prompt in &config.prompts {
                    let text = sample(&model, tokenizer.as_ref(), &config, seed, prompt, &parameters);
                    let text = text.map_err(|error| format!("{error:#}"));
                    done(Sample { step, prompt: prompt.clone(), text });
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// A handle for another thread; `None` only while this is being dropped.
    pub(crate) fn handle(&self) -> Option<Handle> {
        self.jobs.clone().map(Handle)
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.jobs = None;
        // A panic in a backend costs the samples, not the run.
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::warn!("the sampling thread panicked; training is not affected");
        }
    }
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
    match (model, tokenizer) {
        (ModelConfig::Gpt(gpt), Some(tokenizer)) => {
            let prompt = tokenizer.encode(prompt)?;
            let choice = Choice { temperature: config.temperature, top_k: config.top_k, top_p: 1.0, seed };
            let mut tokens = Vec::with_capacity(config.tokens);
            let end = tokenizer.end_of_text();
            generate(&computer, gpt.context, &prompt, config.tokens, &choice, end, |token| {
                tokens.push(token);
                true
            })?;
            Ok(tokenizer.decode(&tokens))
        }
        (ModelConfig::Line(_), _) => {
            let x: f32 =
                prompt.trim().parse().map_err(|_| anyhow::anyhow!("{prompt:?} is no number to predict for"))?;
            Ok(format!(" → {:.2}", computer.predict(x)?))
        }
        (ModelConfig::Gpt(_), None) => anyhow::bail!("a Transformer without a tokenizer generates no text"),
    }
}
