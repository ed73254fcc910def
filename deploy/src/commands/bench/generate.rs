//! `lockstep bench generate`: how fast this machine reads prompts and continues them, beside how fast it reads memory.

use std::time::Instant;

use anyhow::ensure;
use indicatif::HumanCount;
use lockstep_model::ceiling::Weights;
use lockstep_model::device::ComputeDevice;
use lockstep_model::inference::{Engine, Limits, Overflow, Request, Sampling};
use lockstep_model::layout::{Layout, initial_parameters};
use serde::Serialize;

use super::shape::Shape;
use super::{median, peak_rss_bytes};
use crate::cli::BenchGenerate;
use crate::commands::{Caller, threads_each, use_threads};

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Summary {
    shape: String,
    device: String,
    threads: u32,
    parameters: usize,
    /// Of each prompt.
    prompt_tokens: usize,
    /// That follow each.
    tokens: usize,
    repetitions: u32,
    /// Of a prompt, read in one pass.
    prefill_tokens_per_sec: f64,
    /// Of one sequence, after its prompt.
    decode_tokens_per_sec: f64,
    /// Sequences at once.
    batch: u32,
    /// Of all of them together.
    batch_tokens_per_sec: f64,
    /// That are read for each token of one sequence, or of all at once.
    weight_bytes: usize,
    /// Of as many bytes, read again and again.
    memory_bytes_per_sec: f64,
    /// What one sequence would get if a token were reading the weights alone.
    memory_limit_tokens_per_sec: f64,
    peak_rss_bytes: Option<u64>,
}

/// Measures in this process, and prints the summary.
pub(crate) fn run(args: &BenchGenerate) -> anyhow::Result<()> {
    use_threads(args.threads, Caller::Computes)?;
    let shape = Shape::load(&args.shape)?;
    let summary = measure(args, &shape)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print(&summary);
    }
    Ok(())
}

fn measure(args: &BenchGenerate, shape: &Shape) -> anyhow::Result<Summary> {
    let device = ComputeDevice::open(args.device)?;
    // All prompts at once, so that what follows is decoding alone.
    let limits = Limits { sequences: args.batch as usize, prefill_tokens: usize::MAX };
    let mut engine = Engine::new(&shape.model, &initial_parameters(&shape.model, 0), &device, limits)?;
    let (prompt_tokens, tokens) = (shape.length / 2, shape.length / 4);
    ensure!(tokens > 0, "a context of {} is too short to measure: it takes 4 tokens", shape.length);

    let mut prompts = 0;
    let mut admit = |engine: &mut Engine| {
        prompts += 1;
        let prompt = shape.draw(prompts, 2, prompt_tokens);
        let (sampling, ends, overflow) = (Sampling::greedy(), Vec::new(), Overflow::Stop);
        engine.admit(Request { prompt, max_tokens: tokens + 1, sampling, ends, overflow })
    };
    let (mut prefill, mut decode, mut batch) = (Vec::new(), Vec::new(), Vec::new());
    for repetition in 0..=args.repetitions {
        admit(&mut engine)?;
        let prefilled = seconds(|| engine.step())?;
        let one = until_done(&mut engine)?;
        for _ in 0..args.batch {
            admit(&mut engine)?;
        }
        engine.step()?;
        let several = until_done(&mut engine)?;
        if repetition > 0 {
            prefill.push(prefilled);
            decode.push(one);
            batch.push(several);
        }
    }
    let weights = Weights::new(engine.weight_bytes());
    let reads =
        (0..args.repetitions * 4).map(|_| seconds(|| Ok::<_, anyhow::Error>(std::hint::black_box(weights.read()))));
    let read = median(reads.collect::<Result<_, _>>()?);
    Ok(Summary {
        shape: args.shape.clone(),
        device: device.description,
        threads: threads_each(args.threads, 1),
        parameters: Layout::of(&shape.model).len(),
        prompt_tokens,
        tokens,
        repetitions: args.repetitions,
        prefill_tokens_per_sec: prompt_tokens as f64 / median(prefill),
        decode_tokens_per_sec: tokens as f64 / median(decode),
        batch: args.batch,
        batch_tokens_per_sec: tokens as f64 * f64::from(args.batch) / median(batch),
        weight_bytes: engine.weight_bytes(),
        memory_bytes_per_sec: engine.weight_bytes() as f64 / read,
        memory_limit_tokens_per_sec: 1.0 / read,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

/// Seconds until all sequences have ended.
fn until_done(engine: &mut Engine) -> anyhow::Result<f64> {
    seconds(|| {
        while engine.running() > 0 {
            engine.step()?;
        }
        anyhow::Ok(())
    })
}

/// How long it takes.
fn seconds<T, E>(work: impl FnOnce() -> Result<T, E>) -> anyhow::Result<f64>
where
    anyhow::Error: From<E>,
{
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

fn print(summary: &Summary) {
    let Summary { shape, device, threads, prompt_tokens, tokens, repetitions, batch, .. } = summary;
    println!("shape      {shape}, {} parameters", HumanCount(summary.parameters as u64));
    println!("device     {device}, {threads} CPU thread(s); medians of {repetitions}");
    println!("prefill    {:.0} tokens/s, of {prompt_tokens} tokens", summary.prefill_tokens_per_sec);
    println!("decode     {:.0} tokens/s, of {tokens} tokens", summary.decode_tokens_per_sec);
    println!("batch {batch:<4} {:.0} tokens/s", summary.batch_tokens_per_sec);
    println!(
        "memory     {:.1} GB/s: {:.0} tokens/s, if {:.1} MB of weights were read and nothing else done",
        summary.memory_bytes_per_sec / 1e9,
        summary.memory_limit_tokens_per_sec,
        summary.weight_bytes as f64 / 1e6
    );
    if let Some(bytes) = summary.peak_rss_bytes {
        println!("peak_rss_bytes {bytes}");
    }
}
