//! The side that generates: prompts read and continued, one at a time and several at once.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use lockstep_model::config::ModelConfig;
use lockstep_model::device::ComputeDevice;
use lockstep_model::digest::{hex, vector_sha256};
use lockstep_model::inference::{Engine, Limits, Overflow, Request, Sampling, SequenceId};
use lockstep_model::layout::{Layout, TensorSpec};

use super::Workload;
use super::report::{Direction, Memory, Report};
use crate::cli::{Compare, ModelArgs};
use crate::commands::Caller;
use crate::commands::bench::shape::Shape;
use crate::commands::bench::{median, peak_rss_bytes};
use crate::commands::open_model::OpenModel;

/// Prompts continued at the same time.
struct Continued {
    /// Until each has its first token.
    prefill_secs: f64,
    /// From then on, until the first of them ends.
    decoded_tokens_per_sec: f64,
    /// What each came to, in the order of the prompts.
    tokens: Vec<Vec<u32>>,
}

/// Continues prompts drawn at random with a checkpoint's parameters.
pub(super) fn measure(args: &Compare, path: &Path, workload: &Workload) -> anyhow::Result<Report> {
    let start_rss_bytes = peak_rss_bytes();
    let model = ModelArgs { run: path.into(), device: args.device, threads: args.threads };
    let limits = Limits { sequences: workload.streams, ..Limits::default() };
    let OpenModel { mut engine, manifest, device: description, .. } =
        OpenModel::load(&model, limits, Caller::Computes)?;
    let device = ComputeDevice::open(args.device)?;
    let sha256_before = sha256(&engine)?;

    // Each prompt once, so that none of it is cached already.
    let shape = Shape::of(manifest.model.clone(), 1);
    let mut drawn = 0;
    let mut prompt = || {
        drawn += 1;
        shape.draw(drawn, 0, workload.prompt_tokens)
    };
    let mut continued = |prompts: Vec<Vec<u32>>| continued(&mut engine, prompts, workload.generated_tokens);
    // The first round is for memory to be asked for.
    let same = prompt();
    let dropout_active = continued(vec![same.clone()])?.tokens != continued(vec![same])?.tokens;
    continued((0..workload.streams).map(|_| prompt()).collect())?;
    let (mut prefill, mut one, mut several) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let alone = continued(vec![prompt()])?;
        prefill.push(workload.prompt_tokens as f64 / alone.prefill_secs);
        one.push(alone.decoded_tokens_per_sec);
        several.push(continued((0..workload.streams).map(|_| prompt()).collect())?.decoded_tokens_per_sec);
    }

    let peak_rss_bytes = peak_rss_bytes();
    let sha256_after = sha256(&engine)?;
    let of_stream = (workload.prompt_tokens + workload.generated_tokens) * engine.cache_bytes_per_token();
    let rates =
        [("prefill".to_string(), prefill), ("decode_1".into(), one), (format!("decode_{}", workload.streams), several)];
    Ok(Report {
        memory: Memory {
            parameters: parameter_bytes(&manifest.model, device.is_cpu()),
            cache: (workload.streams * of_stream) as u64,
            ..Memory::default()
        },
        device: description,
        start_rss_bytes,
        peak_rss_bytes,
        gpu_memory_bytes: device.memory_bytes(),
        tokens_per_sec: rates.into_iter().map(|(name, rates)| (name, median(rates))).collect(),
        direction: Direction {
            forward: "prompt → logits → token".into(),
            backward: None,
            update: None,
            grows: Some("cache of keys and values".into()),
        },
        dropout_active,
        parameters_changed: sha256_before != sha256_after,
        sha256_before,
        sha256_after,
    })
}

/// Of the parameters that the engine computes with, as they are in memory.
fn sha256(engine: &Engine) -> anyhow::Result<String> {
    Ok(hex(&vector_sha256(&engine.parameters()?)))
}

/// Bytes of parameters laid out for inference: once, but for a tied head on the CPU, which is there beside the embedding.
fn parameter_bytes(model: &ModelConfig, on_cpu: bool) -> u64 {
    let layout = Layout::of(model);
    let tied = match model {
        ModelConfig::Gpt(gpt) => gpt.tied_head,
        ModelConfig::Llama(llama) => llama.tied_head,
        ModelConfig::Line(_) => false,
    };
    let embedding = layout.tensors.first().filter(|_| tied && on_cpu).map_or(0, TensorSpec::elements);
    ((layout.len() + embedding) * size_of::<f32>()) as u64
}

/// Continues prompts of one length at the same time, each by `count` tokens.
fn continued(engine: &mut Engine, prompts: Vec<Vec<u32>>, count: usize) -> anyhow::Result<Continued> {
    let start = Instant::now();
    let request = |prompt| Request {
        prompt,
        max_tokens: count,
        sampling: Sampling::greedy(),
        ends: Vec::new(),
        overflow: Overflow::Stop,
    };
    let ids = prompts.into_iter().map(|prompt| engine.admit(request(prompt)));
    let ids: Vec<SequenceId> = ids.collect::<Result<_, _>>().context("a prompt is not taken")?;
    let mut tokens: BTreeMap<SequenceId, Vec<u32>> = BTreeMap::new();
    // Takes a step, and says how many tokens it brought.
    let mut step = |tokens: &mut BTreeMap<SequenceId, Vec<u32>>| -> anyhow::Result<usize> {
        let events = engine.step()?;
        events.iter().for_each(|event| tokens.entry(event.sequence).or_default().extend(event.token));
        Ok(events.len())
    };
    while tokens.len() < ids.len() {
        step(&mut tokens)?;
    }
    let prefill_secs = start.elapsed().as_secs_f64();
    let (start, mut decoded) = (Instant::now(), 0);
    while tokens.values().all(|tokens| tokens.len() < count) {
        decoded += step(&mut tokens)?;
    }
    let decoded_tokens_per_sec = decoded as f64 / start.elapsed().as_secs_f64();
    while tokens.values().any(|tokens| tokens.len() < count) {
        step(&mut tokens)?;
    }
    let tokens = ids.iter().filter_map(|id| tokens.remove(id)).collect();
    Ok(Continued { prefill_secs, decoded_tokens_per_sec, tokens })
}
