//! A run that is measured: a coordinator in this process, workers in processes of their own.

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
use lockstep_model::compression::Compression;
use lockstep_model::config::{
    BatchConfig, Decay, Objective, OptimizerConfig, Precision, ScheduleConfig, UpdateRule, WindowOrder,
};
use lockstep_model::device::DeviceChoice;
use lockstep_model::sampler::{Source, TokenSource, WeightedCorpus};
use lockstep_model::step_filter::SkipConfig;
use lockstep_model::tokens::Tokens;
use tokio::net::TcpListener;

use super::shape::Shape;
use crate::child::Watched;
use crate::launcher;

/// Steps before the first that is measured: after as many a worker's gradients are in memory that was used before.
const WARM_UP: u32 = 20;
/// Windows of the corpus.
const WINDOWS: usize = 64;

/// What is run.
#[derive(Clone, Debug)]
pub(super) struct Training<'a> {
    pub(super) shape: &'a Shape,
    pub(super) rule: UpdateRule,
    pub(super) precision: Precision,
    /// One slot a step for each.
    pub(super) workers: u32,
    /// CPU threads of each worker.
    pub(super) threads: u32,
    pub(super) device: DeviceChoice,
    /// Steps to be measured.
    pub(super) steps: u32,
}

/// What was measured.
pub(super) struct Trained {
    /// From one commit to the next.
    pub(super) step_secs: Vec<f64>,
    /// What the run noted of the same steps.
    pub(super) lines: Vec<StepLine>,
    /// Of the coordinator, which writes no checkpoint before the end; none where the system does not say.
    pub(super) peak_rss_bytes: Option<u64>,
    /// The same, with the checkpoint at the end.
    pub(super) checkpoint_peak_rss_bytes: Option<u64>,
}

impl Training<'_> {
    /// Trains with a coordinator in this process, and workers in processes of their own.
    ///
    /// # Errors
    /// If the run does not come to its end.
    pub(super) async fn measure(&self) -> anyhow::Result<Trained> {
        let dir = tempfile::tempdir()?;
        let run = dir.path().join("run");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let launch = launcher::Launch {
            address: listener.local_addr()?,
            device: self.device,
            threads: self.threads,
            log_dir: dir.path().join("logs"),
        };
        let watched = (0..self.workers).map(|_| Watched::new().0).collect();
        let last = u64::from(WARM_UP + self.steps);
        let commits = Arc::new(Mutex::new((Vec::new(), None)));
        let noted = commits.clone();
        let observer = Arc::new(move |event: &RunEvent| {
            if let RunEvent::Step { step, .. } = event {
                let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
                noted.0.push(Instant::now());
                if *step == last {
                    noted.1 = super::peak_rss_bytes();
                }
            }
        });
        let config = self.config(&run);
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
        Ok(Trained {
            step_secs: measured.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect(),
            lines: lines.skip(WARM_UP as usize).collect(),
            peak_rss_bytes,
            checkpoint_peak_rss_bytes: super::peak_rss_bytes(),
        })
    }

    /// One slot a worker, on tokens drawn at random.
    fn config(&self, run: &Path) -> RunConfig {
        let shape = self.shape;
        let batch = BatchConfig { slots: self.workers, sequences_per_slot: shape.rows as u32, local_steps: 1 };
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
        RunConfig {
            recipe_name: "bench".into(),
            recipe_toml: String::new(),
            seed: 1,
            model: shape.model.clone(),
            initial: None,
            adapters: None,
            tokenizer: None,
            source: Arc::new(Source::Tokens(source)),
            objective: Objective::NextToken,
            precision: self.precision,
            bytes_per_token: None,
            optimizer: OptimizerConfig { rule: self.rule.clone(), lr: 1e-3, grad_clip: None },
            outer: None,
            keep_moments: false,
            skip: SkipConfig { max_in_a_row: 3, above_median: None },
            schedule: ScheduleConfig {
                steps: u64::from(WARM_UP + self.steps),
                warmup_steps: 0,
                decay: Decay::Constant,
                min_lr: 0.0,
            },
            batch,
            compression: Compression::default(),
            evaluation: EvaluationConfig { every_steps: 0, slots: 0 },
            sampling: SamplingConfig { every_steps: 0, prompts: Vec::new(), tokens: 0, temperature: 0.0, top_k: 0 },
            turns: None,
            checkpoint: CheckpointConfig { every_steps: 0, interval: None, keep_last: 1, stop_after: None },
            cluster: ClusterConfig {
                min_workers: self.workers,
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
}
