//! `lockstep bench cluster`: how fast a cluster on this machine trains, beside its workers without one.

use lockstep_coordinator::metrics::StepLine;
use serde::Serialize;

use super::setting::Setting;
use super::shape::Shape;
use super::training::{Trained, Training};
use super::{ADAMW, compute, median};
use crate::cli::Measurement;
use crate::commands::block_on;
use crate::telemetry;

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Summary {
    /// Tokens of a step are those of all workers.
    #[serde(flatten)]
    setting: Setting,
    /// In the median step.
    tokens_per_sec: f64,
    /// Of the same workers when they exchange nothing.
    alone_tokens_per_sec: f64,
    /// What the cluster loses of that.
    overhead_ratio: f64,
    step_ms_median: f64,
    /// A worker's mean of a step, in the median: loss and gradient.
    compute_ms_median: f64,
    /// The same: gradients on their way.
    upload_ms_median: f64,
    /// Medians of the coordinator's own work on a step: gradients added, optimizer, parameters made ready for the wire.
    reduce_ms_median: f64,
    optimizer_ms_median: f64,
    publish_ms_median: f64,
    /// Of the coordinator, which writes no checkpoint before the end; none where the system does not say.
    peak_rss_bytes: Option<u64>,
    /// The same, with the checkpoint at the end.
    checkpoint_peak_rss_bytes: Option<u64>,
}

/// Measures and prints.
pub(crate) fn run(measurement: &Measurement) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let shape = Shape::load(&measurement.shape)?;
    let half = measurement.steps.div_ceil(2);
    let (alone, cluster) = block_on(async {
        let mut alone = compute::measure(measurement, half).await?;
        let training = Training {
            shape: &shape,
            rule: ADAMW,
            precision: measurement.precision,
            workers: measurement.workers,
            threads: measurement.threads(),
            device: measurement.device,
            steps: measurement.steps,
        };
        let cluster = training.measure().await?;
        for (worker, again) in alone.iter_mut().zip(compute::measure(measurement, half).await?) {
            worker.step_secs.extend(again.step_secs);
        }
        anyhow::Ok((alone, cluster))
    })?;
    let summary = summarise(measurement, &shape, &alone, &cluster);
    if measurement.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print(&summary);
    }
    Ok(())
}

fn summarise(measurement: &Measurement, shape: &Shape, alone: &[compute::Measured], cluster: &Trained) -> Summary {
    let tokens_per_step = shape.tokens() * measurement.workers as usize;
    let device = alone.first().map_or("", |worker| &worker.device);
    let step_secs = median(cluster.step_secs.clone());
    let tokens_per_sec = tokens_per_step as f64 / step_secs;
    let alone_tokens_per_sec = compute::tokens_per_sec(shape, alone);
    let ms = |secs: fn(&StepLine) -> f64| 1e3 * median(cluster.lines.iter().map(secs).collect());
    Summary {
        setting: Setting::new(measurement, shape, device, tokens_per_step),
        tokens_per_sec,
        alone_tokens_per_sec,
        overhead_ratio: 1.0 - tokens_per_sec / alone_tokens_per_sec,
        step_ms_median: 1e3 * step_secs,
        compute_ms_median: ms(|line| line.compute_secs) / f64::from(measurement.workers),
        reduce_ms_median: ms(|line| line.reduce_secs),
        optimizer_ms_median: ms(|line| line.optimizer_secs),
        publish_ms_median: ms(|line| line.publish_secs),
        upload_ms_median: ms(|line| line.upload_secs) / f64::from(measurement.workers),
        peak_rss_bytes: cluster.peak_rss_bytes,
        checkpoint_peak_rss_bytes: cluster.checkpoint_peak_rss_bytes,
    }
}

fn print(summary: &Summary) {
    summary.setting.print();
    println!(
        "tokens_per_sec   {:.0}, and {:.0} without a cluster",
        summary.tokens_per_sec, summary.alone_tokens_per_sec
    );
    println!("overhead_ratio   {:.3}", summary.overhead_ratio);
    summary.setting.print_step(summary.step_ms_median);
    println!("  compute        {:.2}, of a worker", summary.compute_ms_median);
    println!("  upload         {:.2}, of a worker", summary.upload_ms_median);
    println!("  reduce         {:.2}", summary.reduce_ms_median);
    println!("  optimizer      {:.2}", summary.optimizer_ms_median);
    println!("  publish        {:.2}", summary.publish_ms_median);
    if let (Some(bytes), Some(checkpoint)) = (summary.peak_rss_bytes, summary.checkpoint_peak_rss_bytes) {
        println!("peak_rss_bytes   {bytes} of the coordinator, {checkpoint} with a checkpoint");
    }
}
