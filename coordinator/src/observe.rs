//! What a run tells those who watch it: progress bars, logs, traces.

use std::path::PathBuf;
use std::sync::Arc;

use lockstep_model::checkpoint::Validation;
use lockstep_proto::v1::SpanTiming;

use crate::pair_means::PairMeans;

/// Receives the run's events, in order, on the run's own task: it must not block.
pub type Observer = Arc<dyn Fn(&RunEvent) + Send + Sync>;

/// Something worth showing.
#[derive(Clone, Debug)]
pub enum RunEvent {
    /// The run can be joined.
    Started {
        /// 32 hexadecimal digits.
        run_id: String,
        /// The step it continues after; 0 for a new run.
        step: u64,
        /// Steps in all.
        total_steps: u64,
    },
    /// A worker became a member.
    WorkerJoined {
        /// Its id.
        worker: u64,
        /// Its own name.
        name: String,
        /// Its device in words.
        device: String,
        /// Members now.
        workers: usize,
    },
    /// A membership ended.
    WorkerLeft {
        /// Its id.
        worker: u64,
        /// Why.
        reason: String,
        /// Members now.
        workers: usize,
    },
    /// A worker was not admitted.
    WorkerRefused {
        /// Its own name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A step was committed.
    Step {
        /// The step.
        step: u64,
        /// Mean loss.
        loss: f64,
        /// Where pairs are learned from, what they are given.
        pairs: Option<PairMeans>,
        /// Tokens (or rows) a second.
        tokens_per_sec: f64,
    },
    /// Something that a person should know, in words.
    Finding(String),
    /// The run went back to an earlier step.
    RolledBack {
        /// The step it goes on after.
        step: u64,
    },
    /// A validation was measured.
    Validation {
        /// What was measured.
        validation: Validation,
        /// Where pairs are learned from, what they are given.
        pairs: Option<PairMeans>,
    },
    /// A text was sampled.
    Sample(Sample),
    /// A checkpoint was written.
    Checkpoint {
        /// The step it holds.
        step: u64,
        /// Where.
        path: PathBuf,
    },
    /// Spans of work, by a worker's clock.
    Spans {
        /// The worker's id.
        worker: u64,
        /// Its own name.
        name: String,
        /// What to add to its clock to get the coordinator's.
        clock_offset_nanos: i64,
        /// The spans.
        spans: Vec<SpanTiming>,
    },
}

/// A text sampled while training.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The step it follows.
    pub step: u64,
    /// What was to be continued.
    pub prompt: String,
    /// The continuation, or the error in words.
    pub text: Result<String, String>,
}
