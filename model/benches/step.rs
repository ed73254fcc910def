//! Tokens per second of a training step on the CPU: loss, gradient, flat vector. `RAYON_NUM_THREADS` sets the threads.
//!
//! `cargo bench --workspace --bench step -- [tiny|small|gpt2s|llama] [STEPS]`

use std::time::Instant;

use lockstep_model::batch::{Batch, Column, Values};
use lockstep_model::compute::{Computer, SlotKey};
use lockstep_model::config::{Gelu, GptConfig, LlamaConfig, ModelConfig};
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::layout::initial_parameters;

fn gpt(layers: usize, heads: usize, width: usize, context: usize, vocab_size: usize) -> ModelConfig {
    let (gelu, norm_epsilon, dropout) = (Gelu::Exact, 1e-5, 0.0);
    let (bias, tied_head) = (true, false);
    ModelConfig::Gpt(GptConfig {
        vocab_size,
        context,
        layers,
        heads,
        width,
        bias,
        tied_head,
        gelu,
        norm_epsilon,
        dropout,
    })
}

/// A model, the rows of its batch, its context and its vocabulary.
fn shape(name: &str) -> Option<(ModelConfig, usize, usize, usize)> {
    Some(match name {
        "tiny" => (gpt(4, 4, 128, 64, 65), 12, 64, 65),
        "small" => (gpt(6, 6, 384, 256, 65), 4, 256, 65),
        "gpt2s" => (gpt(6, 8, 512, 256, 8192), 4, 256, 8192),
        "llama" => {
            let config = LlamaConfig {
                vocab_size: 65,
                context: 256,
                layers: 6,
                heads: 6,
                kv_heads: 2,
                width: 384,
                ffn_width: 1024,
                qk_norm: true,
                tied_head: true,
                rope_theta: 10_000.0,
                norm_epsilon: 1e-5,
                dropout: 0.0,
            };
            (ModelConfig::Llama(config), 4, 256, 65)
        }
        _ => return None,
    })
}

fn batch(rows: usize, context: usize, vocab_size: usize) -> Batch {
    let draw = |i: usize, salt: usize| ((i * 7919 + salt) * 104_729 / 13 % vocab_size) as u32;
    let column = |name: &str, salt| {
        let values = Values::U32((0..rows * context).map(|i| draw(i, salt)).collect());
        Column { name: name.into(), shape: [rows, context], values }
    };
    Batch { columns: vec![column("tokens", 13), column("targets", 7)] }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let steps = words.iter().find_map(|word| word.parse().ok()).unwrap_or(20);
    let named: Vec<&str> = words.iter().map(String::as_str).filter(|word| shape(word).is_some()).collect();
    let named = if named.is_empty() { vec!["tiny", "small", "gpt2s", "llama"] } else { named };
    let device = ComputeDevice::open(DeviceChoice::Cpu).expect("this build has the CPU backend");
    for name in named {
        let Some((model, rows, context, vocab_size)) = shape(name) else { continue };
        let mut computer = Computer::new(&model, &device);
        computer.load(&initial_parameters(&model, 1)).expect("parameters of this model");
        let batch = batch(rows, context, vocab_size);
        let step = |step| computer.gradient(&batch, SlotKey { seed: 1, step, slot: 0 }).expect("a batch of this model");
        let loss = (0..3).fold(f64::NAN, |_, index| step(index).sums.mean());
        let mut seconds: Vec<f64> = (0..steps)
            .map(|index| {
                let start = Instant::now();
                step(index);
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        let tokens_per_sec = (rows * context) as f64 / median;
        println!(
            "{name}: {tokens_per_sec:.0} tokens/s, {:.2} ms a step (median of {steps}), loss {loss:.6}",
            median * 1e3
        );
    }
}
