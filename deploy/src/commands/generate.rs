//! `lockstep generate`: text from a checkpoint, streamed as it comes.

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::Context as _;
use lockstep_model::inference::{Finish, Limits, Overflow, Request, Sampling, SequenceId, TextStream};
use serde_json::json;

use super::open_model::OpenModel;
use super::{Caller, Usage};
use crate::cli::Generate;
use crate::telemetry;

/// Continuations that are computed at once, at most.
const AT_ONCE: u32 = 16;

/// A continuation under way.
struct Sample {
    seed: u64,
    stream: TextStream,
    text: String,
    tokens: usize,
    /// `None` where a stop string ended it.
    finish: Option<Finish>,
}

/// Continues a prompt.
pub(crate) fn run(args: &Generate) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let sampling = args.sampling.sampling()?;
    if args.prompt.is_empty() {
        return Err(Usage("--prompt is empty: a model continues at least one character".into()).into());
    }
    let limits = Limits { sequences: args.samples.min(AT_ONCE) as usize, ..Limits::default() };
    let mut model = OpenModel::load(&args.model, limits, Caller::Computes)?;
    let prompt = model.tokenizer.encode(&args.prompt).map_err(|error| Usage(format!("--prompt: {error}")))?;
    let written = write(args, sampling, &prompt, &mut model, &mut io::stdout().lock());
    match written {
        // Whoever reads has had enough.
        Err(error) if error.downcast_ref().is_some_and(|e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe) => Ok(()),
        written => written.context("the text cannot be written"),
    }
}

/// Writes all continuations: a single one as it comes, several one after the other, in the order of their seeds.
fn write(
    args: &Generate,
    sampling: Sampling,
    prompt: &[u32],
    model: &mut OpenModel,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let streams = args.samples == 1 && !args.json;
    if streams {
        write!(out, "{}", args.prompt)?;
        out.flush()?;
    }
    let mut seeds = (0..u64::from(args.samples)).map(|sample| sampling.seed.wrapping_add(sample));
    let mut order = Vec::new();
    let mut running = BTreeMap::<SequenceId, Sample>::new();
    let mut ended = BTreeMap::<SequenceId, Sample>::new();
    let mut next_to_write = 0;
    loop {
        while model.engine.running() < args.samples.min(AT_ONCE) as usize {
            let Some(seed) = seeds.next() else { break };
            let request = Request {
                prompt: prompt.to_vec(),
                max_tokens: args.tokens,
                sampling: Sampling { seed, ..sampling },
                ends: model.tokenizer.stop_tokens(),
                overflow: Overflow::Slide,
            };
            let id = model.engine.admit(request).map_err(|error| Usage(error.to_string()))?;
            let stream = TextStream::new(&model.tokenizer, args.stop.clone());
            running.insert(id, Sample { seed, stream, text: String::new(), tokens: 0, finish: None });
            order.push(id);
        }
        if running.is_empty() {
            break;
        }
        for event in model.engine.step()? {
            let Some(sample) = running.get_mut(&event.sequence) else { continue };
            let text = event.token.map_or_else(String::new, |token| sample.stream.push(token));
            sample.tokens += usize::from(event.token.is_some());
            if streams {
                write!(out, "{text}")?;
                out.flush()?;
            }
            sample.text.push_str(&text);
            if sample.stream.stopped() || event.finish.is_some() {
                sample.finish = event.finish.filter(|_| !sample.stream.stopped());
                model.engine.cancel(event.sequence);
                ended.extend(running.remove_entry(&event.sequence));
            }
        }
        while let Some(sample) = order.get(next_to_write).and_then(|id| ended.remove(id)) {
            next_to_write += 1;
            sample.write(args, streams, next_to_write, out)?;
        }
    }
    Ok(())
}

impl Sample {
    /// Writes what has not been written of it, as the `number`th.
    fn write(self, args: &Generate, streams: bool, number: usize, out: &mut impl Write) -> anyhow::Result<()> {
        let Self { seed, stream, text, tokens, finish } = self;
        let rest = stream.finish();
        if args.json {
            let finish_reason = if finish == Some(Finish::Length) { "length" } else { "stop" };
            let text = text + &rest;
            let sample = json!({
                "prompt": args.prompt, "text": text, "tokens": tokens, "seed": seed, "finish_reason": finish_reason
            });
            writeln!(out, "{sample}")?;
        } else if streams {
            writeln!(out, "{rest}")?;
        } else {
            writeln!(out, "── {number} of {}, seed {seed} ──\n{}{text}{rest}\n", args.samples, args.prompt)?;
        }
        out.flush()?;
        Ok(())
    }
}
