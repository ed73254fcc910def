//! `lockstep generate`: text from a checkpoint, streamed as it comes.

use std::io::Write as _;

use anyhow::{Context as _, bail};
use lockstep_model::compute::Computer;
use lockstep_model::device::ComputeDevice;
use lockstep_model::generate::{self, Choice};

use super::{Usage, inspect};
use crate::cli::Generate;
use crate::telemetry;

/// Continues a prompt.
pub(crate) fn run(args: &Generate) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let choice = Choice { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    choice.validate().map_err(|error| Usage(error.to_string()))?;
    if args.prompt.is_empty() {
        return Err(Usage("--prompt is empty: a model continues at least one character".into()).into());
    }
    let path = inspect::locate(&args.run)?;
    let checkpoint = lockstep_model::checkpoint::read(&path)?;
    let (Some(context), Some(tokenizer)) = (checkpoint.manifest.model.context(), &checkpoint.manifest.tokenizer) else {
        bail!("{}: the run's model reads no text, so it writes none", path.display());
    };
    let prompt = tokenizer.encode(&args.prompt).map_err(|error| Usage(format!("--prompt: {error}")))?;
    let mut computer = Computer::new(&checkpoint.manifest.model, &ComputeDevice::open(args.device)?);
    computer.load(&checkpoint.parameters)?;

    let mut out = std::io::stdout().lock();
    let mut decoder = tokenizer.decoder();
    let mut written = write!(out, "{}", args.prompt);
    let end = tokenizer.end_of_text();
    generate::generate(&computer, context, &prompt, args.tokens, &choice, end, |token| {
        written = write!(out, "{}", decoder.push(token)).and_then(|()| out.flush());
        written.is_ok()
    })?;
    match written.and_then(|()| writeln!(out, "{}", decoder.finish())) {
        // Whoever reads has had enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("the text cannot be written"),
    }
}
