//! `lockstep compare`: what training and inference take of this machine, measured on a run's own model.
//!
//! Each side is a process of its own, so that its memory is its own, too. Nothing of what they compute is kept.

mod inference;
mod report;
mod table;
mod training;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, bail};
use lockstep_model::checkpoint::{self, Manifest};
use lockstep_model::config::{BatchConfig, ModelConfig, UpdateRule};
use lockstep_model::layout::Layout;
use serde::Serialize;

use self::report::Report;
use super::{Said, block_on, inspect, threads_each};
use crate::cli::{Compare, Side};
use crate::recipe::Recipe;
use crate::{child, lifeline, telemetry};

/// Tokens that a stream generates, at most.
const GENERATED: usize = 128;
/// Tokens of a prompt, at most.
const PROMPT: usize = 512;
/// Streams that are decoded at once, where it is not one.
const STREAMS: usize = 8;

/// What both sides are measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Workload {
    /// Tokens that the model reads at once.
    context: usize,
    /// Of a step of the optimizer, as the run's recipe has it: each sequence as long as the context.
    slots: u32,
    sequences_per_slot: u32,
    /// Of each stream.
    prompt_tokens: usize,
    generated_tokens: usize,
    /// At once.
    streams: usize,
}

impl Workload {
    /// That of a run.
    ///
    /// # Errors
    /// If its model reads no text, or too little at once.
    fn of(path: &Path, manifest: &Manifest, batch: BatchConfig) -> anyhow::Result<Self> {
        let shown = path.display();
        let Some(context) = manifest.model.context() else {
            bail!("{shown}: the run's model reads no text; choose a Transformer's run");
        };
        if manifest.model.has_score_head() {
            bail!("{shown}: the run's model scores answers, and writes none; choose the run that it began with");
        }
        if context < 4 {
            bail!("{shown}: the run's model reads {context} tokens at once, which are too few to measure");
        }
        let generated_tokens = GENERATED.min(context / 2);
        let prompt_tokens = PROMPT.min(context - generated_tokens);
        let BatchConfig { slots, sequences_per_slot, .. } = batch;
        Ok(Self { context, slots, sequences_per_slot, prompt_tokens, generated_tokens, streams: STREAMS })
    }

    /// Tokens that a training step learns from.
    fn tokens_per_step(&self) -> usize {
        self.slots as usize * self.sequences_per_slot as usize * self.context
    }
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Summary {
    checkpoint: PathBuf,
    step: u64,
    device: String,
    threads: u32,
    /// Elements of the flat vector.
    parameters: usize,
    /// Of these parameters, as the checkpoint says.
    params_sha256: String,
    optimizer: &'static str,
    /// That the model is trained with.
    dropout: f64,
    tokens_per_step: usize,
    workload: Workload,
    training: Report,
    inference: Report,
}

/// Measures both sides, and sets them beside each other.
pub(crate) fn run(args: &Compare) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let checkpoint = inspect::locate(&args.run)?;
    let manifest = checkpoint::read_manifest(&checkpoint)?;
    let recipe = Recipe::from_toml(&manifest.recipe_name, &manifest.recipe, &[])?;
    let workload = Workload::of(&checkpoint, &manifest, recipe.batch_of_optimizer())?;
    if let Some(side) = args.child {
        // Nobody waits for the answer any more once standard input ends.
        lifeline::hold(drop, || std::process::exit(0))?;
        let report = match side {
            Side::Training => training::measure(args, &checkpoint, &recipe)?,
            Side::Inference => inference::measure(args, &checkpoint, &workload)?,
        };
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    eprintln!("measuring training: {} steps of {} tokens", args.rounds + 1, workload.tokens_per_step());
    let training = block_on(measured(args, &checkpoint, Side::Training))?;
    let Workload { prompt_tokens, generated_tokens, .. } = workload;
    eprintln!("measuring inference: prompts of {prompt_tokens} tokens, each continued by {generated_tokens}");
    let inference = block_on(measured(args, &checkpoint, Side::Inference))?;
    let summary = Summary {
        checkpoint,
        step: manifest.step,
        device: training.device.clone(),
        threads: threads_each(args.threads, 1),
        parameters: Layout::of(&manifest.model).len(),
        params_sha256: manifest.params_sha256,
        optimizer: match recipe.optimizer.rule {
            UpdateRule::Adamw(_) => "adamw",
            UpdateRule::Muon(_) => "muon",
            UpdateRule::Nesterov(_) => "nesterov",
            UpdateRule::Sgd => "sgd",
        },
        dropout: match &manifest.model {
            ModelConfig::Gpt(gpt) => gpt.dropout,
            ModelConfig::Llama(llama) => llama.dropout,
            ModelConfig::Line(_) => 0.0,
        },
        tokens_per_step: workload.tokens_per_step(),
        workload,
        training,
        inference,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        table::print(&summary);
    }
    Ok(())
}

/// Has a process of its own measure one side.
async fn measured(args: &Compare, checkpoint: &Path, side: Side) -> anyhow::Result<Report> {
    let mut command = child::command("compare")?;
    command.arg(checkpoint).args(["--device", &args.device.to_string(), "--rounds", &args.rounds.to_string()]);
    command.args(["--threads", &threads_each(args.threads, 1).to_string(), "--child", side.name()]);
    let mut process = command.stdout(Stdio::piped()).spawn().context("a measuring process cannot be started")?;
    // Its line to this process, which lasts until it has answered.
    let _lifeline = process.stdin.take();
    let output = process.wait_with_output().await?;
    if !output.status.success() {
        return Err(Said(1).into());
    }
    serde_json::from_slice(&output.stdout).context("a measuring process said something else; are all of one version?")
}
