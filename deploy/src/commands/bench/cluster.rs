//! `lockstep bench cluster`: how fast a cluster on this machine trains, beside its workers without one.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;
use lockstep_coordinator::config::{CheckpointConfig, ClusterConfig, EvaluationConfig, RunConfig, SamplingConfig};
use lockstep_coordinator::engine::OnDispute;
use lockstep_coordinator::engine::command::Outcome;
use lockstep_coordinator::metrics::{self, Line, StepLine};
use lockstep_coordinator::observe::RunEvent;
use lockstep_coordinator::run_dir;
use lockstep_model::config::{
    AdamwConfig, BatchConfig, Decay, Objective, OptimizerConfig, ScheduleConfig, UpdateRule, WindowOrder,
};
use lockstep_model::sampler::{Source, TokenSource, WeightedCorpus};
use lockstep_model::step_filter::SkipConfig;
use lockstep_model::tokens::Tokens;
use serde::Serialize;
use tokio::net::TcpListener;

use super::setting::Setting;
use super::shape::Shape;
use super::{compute, median, peak_rss_bytes};
use crate::child::Watched;
use crate::cli::Measurement;
use crate::commands::block_on;
use crate::{launcher, telemetry};

/// Steps before the first that is measured: after as many a worker's gradients are in memory that was used before.
const WARM_UP: u32 = 20;
/// Windows of the corpus.
const WINDOWS: usize = 64;

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
        let cluster = Cluster::measure(measurement, &shape).await?;
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

/// What a cluster measured.
struct Cluster {
    /// From one commit to the next.
    step_secs: Vec<f64>,
    lines: Vec<StepLine>,
    peak_rss_bytes: Option<u64>,
    checkpoint_peak_rss_bytes: Option<u64>,
}

impl Cluster {
    /// Trains with a coordinator in this process, and workers in processes of their own.
    async fn measure(measurement: &Measurement, shape: &Shape) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let run = dir.path().join("run");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let launch = launcher::Launch {
            address: listener.local_addr()?,
            device: measurement.device,
            threads: measurement.threads(),
            log_dir: dir.path().join("logs"),
        };
        let watched = (0..measurement.workers).map(|_| Watched::new().0).collect();
        let last = u64::from(WARM_UP + measurement.steps);
        let commits = Arc::new(Mutex::new((Vec::new(), None)));
        let noted = commits.clone();
        let observer = Arc::new(move |event: &RunEvent| {
            if let RunEvent::Step { step, .. } = event {
                let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
                noted.0.push(Instant::now());
                if *step == last {
                    noted.1 = peak_rss_bytes();
                }
            }
        });
        let config = run_config(measurement, shape, &run);
        let summary = tokio::select! {
            summary = lockstep_coordinator::run(config, listener, std::future::pending(), observer) => summary?,
            error = launcher::supervise(launch, watched) => return Err(error),
        };
        if !matches!(summary.outcome, Outcome::Completed) {
            bail!("the run that was to be measured did not come to its end");
        }
        let lines = metrics::read(&run_dir::metrics(&run))?.into_iter().filter_map(|line| match line {
            Line::Step(line) => Some(line),
            Line::Validation(_) => None,
        });
        let (commits, peak_rss_bytes) = std::mem::take(&mut *commits.lock().unwrap_or_else(PoisonError::into_inner));
        let measured = &commits[WARM_UP as usize - 1..];
        Ok(Self {
            step_secs: measured.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect(),
            lines: lines.skip(WARM_UP as usize).collect(),
            peak_rss_bytes,
            checkpoint_peak_rss_bytes: super::peak_rss_bytes(),
        })
    }
}

/// One slot a worker, on tokens drawn at random.
fn run_config(measurement: &Measurement, shape: &Shape, run: &Path) -> RunConfig {
    let batch = BatchConfig { slots: measurement.workers, sequences_per_slot: shape.rows as u32 };
    let tokens = Tokens::from(shape.draw(0, 0, WINDOWS * (shape.length + 1)));
    let corpus = WeightedCorpus { weight: 1.0, training: tokens.clone(), validation: tokens };
    let source = TokenSource {
        corpora: vec![corpus],
        context: shape.length,
        order: WindowOrder::Random,
        seed: 1,
        batch,
        separator: None,
    };
    let adamw = AdamwConfig { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    RunConfig {
        recipe_name: measurement.shape.clone(),
        recipe_toml: String::new(),
        seed: 1,
        model: shape.model.clone(),
        initial: None,
        adapters: None,
        tokenizer: None,
        source: Arc::new(Source::Tokens(source)),
        objective: Objective::NextToken,
        bytes_per_token: None,
        optimizer: OptimizerConfig { rule: UpdateRule::Adamw(adamw), lr: 1e-3, grad_clip: None },
        skip: SkipConfig { max_in_a_row: 3, above_median: None },
        schedule: ScheduleConfig {
            steps: u64::from(WARM_UP + measurement.steps),
            warmup_steps: 0,
            decay: Decay::Constant,
            min_lr: 0.0,
        },
        batch,
        evaluation: EvaluationConfig { every_steps: 0, slots: 0 },
        sampling: SamplingConfig { every_steps: 0, prompts: Vec::new(), tokens: 0, temperature: 0.0, top_k: 0 },
        turns: None,
        checkpoint: CheckpointConfig { every_steps: 0, interval: None, keep_last: 1, stop_after: None },
        cluster: ClusterConfig {
            min_workers: measurement.workers,
            exact: true,
            audit: 0.0,
            on_dispute: OnDispute::Wait,
            heartbeat_interval: Duration::from_secs(1),
            liveness_timeout: Duration::from_secs(60),
        },
        run_dir: run.into(),
        resume: false,
    }
}

fn summarise(measurement: &Measurement, shape: &Shape, alone: &[compute::Measured], cluster: &Cluster) -> Summary {
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
