//! What `lockstep bench` can be asked.

use clap::{Args, Subcommand};
use lockstep_model::config::Precision;
use lockstep_model::device::DeviceChoice;
use serde::Deserialize as _;
use serde::de::IntoDeserializer as _;
use serde::de::value::Error as ValueError;

use crate::commands::threads_each;

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Measure how fast workers compute loss and gradient.
    Compute(BenchCompute),
    /// Measure how fast a cluster trains, beside its workers without one.
    Cluster(BenchCluster),
    /// Measure how fast vectors are gathered, added and sent back.
    Wire(BenchWire),
    /// Measure how fast a model reads prompts and continues them.
    Generate(BenchGenerate),
}

/// What is measured.
#[derive(Args, Clone, Debug)]
pub(crate) struct Measurement {
    /// tiny, small, gpt2s, llama, stories, the directory of a run, or a recipe: embedded, or the path of a TOML file.
    #[arg(long, default_value = "small")]
    pub(crate) shape: String,
    /// What to compute on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// CPU threads of each worker [default: cores / workers, at least 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Workers at the same time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) workers: u32,
    /// Steps, of each worker.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// In what products are computed: f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = precision)]
    pub(crate) precision: Precision,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// As a recipe has it.
fn precision(name: &str) -> Result<Precision, String> {
    Precision::deserialize(name.into_deserializer()).map_err(|error: ValueError| error.to_string())
}

impl Measurement {
    /// CPU threads of each worker.
    pub(crate) fn threads(&self) -> u32 {
        threads_each(self.threads, self.workers)
    }
}

#[derive(Args, Debug)]
#[command(
    after_help = "Each worker is a process of its own and trains on tokens drawn at random; all begin at the same time. A step is loss,
gradient and flat vector of one slot: what a worker does between parameters that arrive and a gradient that leaves.

Examples:
  lockstep bench compute --shape small --workers 2 --threads 1
  lockstep bench compute --shape shakespeare-char-cpu --device wgpu:0 --json"
)]
pub(crate) struct BenchCompute {
    #[command(flatten)]
    pub(crate) measurement: Measurement,
    /// Be one of the workers: requests on standard input, reports on standard output.
    #[arg(long, hide = true)]
    pub(crate) child: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "A coordinator and its workers train, with AdamW, on tokens drawn at random, one slot a worker and step. Before and after,
the same workers compute without exchanging anything. A cluster's step lasts from one commit to the next: parameters fetched,
loss and gradient, gradients sent and added, optimizer, publication.

Examples:
  lockstep bench cluster --shape small --workers 2
  lockstep bench cluster --shape tiny --workers 2 --steps 100 --json"
)]
pub(crate) struct BenchCluster {
    #[command(flatten)]
    pub(crate) measurement: Measurement,
}

#[derive(Args, Debug)]
#[command(
    after_help = "A model whose weights are nearly all in one table trains on one token a slot, so that next to nothing is computed. The
exchange is a step without loss and gradient: gradients sent and added, the optimizer (SGD, which is little; then AdamW),
parameters published, fetched and loaded.

Examples:
  lockstep bench wire --floats 50_000_000
  lockstep bench wire --floats 10_000_000 --workers 4 --json"
)]
pub(crate) struct BenchWire {
    /// Elements of the vector that travels, at least.
    #[arg(long, default_value_t = 10_000_000, value_parser = floats)]
    pub(crate) floats: u64,
    /// Workers, each a process with one CPU thread.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) workers: u32,
    /// Steps with each optimizer.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A number, perhaps with `_` between its digits.
fn floats(text: &str) -> Result<u64, String> {
    let number = text.replace('_', "").parse::<u64>().map_err(|error| error.to_string())?;
    match number {
        100_000..=1_000_000_000 => Ok(number),
        _ => Err("from 100_000 to 1_000_000_000 can be sent".into()),
    }
}

#[derive(Args, Debug)]
#[command(
    after_help = "Prompts are tokens drawn at random, half as long as the model's context, and a quarter as many tokens follow, each the
likeliest: of one sequence, then of several at once. Medians over the repetitions.

Examples:
  lockstep bench generate --shape small
  lockstep bench generate --shape runs/quickstart-1 --threads 1 --json"
)]
pub(crate) struct BenchGenerate {
    /// tiny, small, gpt2s, llama, stories, the directory of a run, or a recipe: embedded, or the path of a TOML file.
    #[arg(long, default_value = "small")]
    pub(crate) shape: String,
    /// What to compute on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// CPU threads [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Sequences at once, in the last measurement.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) batch: u32,
    /// How often each is measured.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repetitions: u32,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
