//! `lockstep bench wire`: how fast vectors are gathered, added and sent back.

use anyhow::Context as _;
use indicatif::HumanCount;
use lockstep_model::config::{Gelu, GptConfig, ModelConfig, Precision, UpdateRule};
use lockstep_model::device::DeviceChoice;
use lockstep_model::layout::Layout;
use serde::Serialize;

use super::shape::Shape;
use super::training::{Trained, Training};
use super::{ADAMW, median};
use crate::cli::BenchWire;
use crate::commands::block_on;
use crate::telemetry;

/// Elements of a row of the table that nearly all weights are in.
const WIDTH: usize = 64;

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Summary {
    /// Elements of the vector.
    floats: usize,
    workers: u32,
    /// Steps measured with each optimizer.
    steps: u32,
    /// With SGD, which does next to nothing.
    sgd: Exchange,
    adamw: Exchange,
    /// Of the coordinator, which writes no checkpoint meanwhile; none where the system does not say.
    peak_rss_bytes: Option<u64>,
}

/// The medians of steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Exchange {
    /// A step without loss and gradient.
    exchange_ms_median: f64,
    step_ms_median: f64,
    /// A worker's mean: loss and gradient.
    compute_ms_median: f64,
    /// A worker's mean: gradients on their way.
    upload_ms_median: f64,
    reduce_ms_median: f64,
    /// Optimizer, digests, and parameters made ready for the wire.
    optimizer_ms_median: f64,
}

/// Measures and prints.
pub(crate) fn run(args: &BenchWire) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let shape = Shape::of(table(args.floats as usize), 1);
    let training = |rule: UpdateRule| Training {
        shape: &shape,
        rule,
        precision: Precision::F32,
        workers: args.workers,
        threads: 1,
        device: DeviceChoice::Cpu,
        steps: args.steps,
    };
    let [sgd, adamw] = [UpdateRule::Sgd, ADAMW].map(training);
    let (sgd, adamw) = block_on(async { anyhow::Ok((sgd.measure().await?, adamw.measure().await?)) })
        .context("the exchange could not be measured")?;
    let of = |trained: &Trained| Exchange::of(trained, args.workers);
    let summary = Summary {
        floats: Layout::of(&shape.model).len(),
        workers: args.workers,
        steps: args.steps,
        sgd: of(&sgd),
        adamw: of(&adamw),
        peak_rss_bytes: adamw.peak_rss_bytes,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print(&summary);
    }
    Ok(())
}

/// A model of at least so many parameters, nearly all of them a table of tokens, which reads a token and computes little.
fn table(floats: usize) -> ModelConfig {
    let of = |vocab_size| {
        ModelConfig::Gpt(GptConfig {
            vocab_size,
            context: 1,
            layers: 1,
            heads: 1,
            width: WIDTH,
            bias: false,
            tied_head: true,
            score_head: false,
            gelu: Gelu::Tanh,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        })
    };
    let others = Layout::of(&of(0)).len();
    of(floats.saturating_sub(others).div_ceil(WIDTH))
}

impl Exchange {
    fn of(trained: &Trained, workers: u32) -> Self {
        let Trained { step_secs, lines, .. } = trained;
        let of_worker = |secs: f64| secs / f64::from(workers);
        let ms = |secs: Vec<f64>| 1e3 * median(secs);
        let exchanges = step_secs.iter().zip(lines).map(|(step, line)| step - of_worker(line.compute_secs));
        Self {
            exchange_ms_median: ms(exchanges.collect()),
            step_ms_median: ms(step_secs.clone()),
            compute_ms_median: ms(lines.iter().map(|line| of_worker(line.compute_secs)).collect()),
            upload_ms_median: ms(lines.iter().map(|line| of_worker(line.upload_secs)).collect()),
            reduce_ms_median: ms(lines.iter().map(|line| line.reduce_secs).collect()),
            optimizer_ms_median: ms(lines.iter().map(|line| line.optimizer_secs + line.publish_secs).collect()),
        }
    }
}

fn print(summary: &Summary) {
    let Summary { floats, workers, steps, sgd, adamw, peak_rss_bytes } = summary;
    println!("{} floats from {workers} workers and back, {steps} steps each", HumanCount(*floats as u64));
    println!("                     with SGD   with AdamW");
    let row = |name: &str, of: fn(&Exchange) -> f64| println!("{name:<18} {:>10.2}   {:>10.2}", of(sgd), of(adamw));
    row("exchange_ms_median", |exchange| exchange.exchange_ms_median);
    row("  upload", |exchange| exchange.upload_ms_median);
    row("  reduce", |exchange| exchange.reduce_ms_median);
    row("  optimizer", |exchange| exchange.optimizer_ms_median);
    row("compute_ms_median", |exchange| exchange.compute_ms_median);
    row("step_ms_median", |exchange| exchange.step_ms_median);
    if let Some(bytes) = peak_rss_bytes {
        println!(
            "peak_rss_bytes     {bytes} of the coordinator: {:.1} × 4 × floats",
            *bytes as f64 / (4.0 * *floats as f64)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_as_many_parameters_as_are_asked_for() {
        for floats in [100_000, 1_000_003, 50_000_000] {
            let parameters = Layout::of(&table(floats)).len();
            assert!((floats..floats + WIDTH).contains(&parameters), "{parameters}");
        }
    }
}
