//! What the runtime hears, in the domain's types: from the service, and from the threads that work for it.

use std::path::PathBuf;
use std::time::Duration;

use lockstep_model::batch::Sums;
use lockstep_model::checkpoint::Checkpoint;
use lockstep_model::digest::vector_sha256;
use lockstep_model::tree::Block;
use lockstep_proto::v1::{self, coordinator_message};
use tokio::sync::{mpsc, oneshot};

use crate::dataplane::Applied;
use crate::engine::command::{Refusal, Task};
use crate::engine::event::{BlockDone, KeptBlock};
use crate::engine::{DeviceClass, LeaseId, WorkerId};
use crate::observe::Sample;

/// One thing that happened.
#[derive(Debug)]
pub(crate) enum Input {
    /// The data plane applied a step, or could not.
    Applied(anyhow::Result<Applied>),
    /// The archive wrote a checkpoint, or could not.
    Archived { step: u64, written: Result<PathBuf, String> },
    /// The sampler has a text.
    Sampled(Sample),
    /// A worker wants to join.
    Join(Applicant),
    /// A member opened its control stream; what is sent here reaches it. Dropping the sender closes the stream.
    Opened { worker: WorkerId, out: mpsc::UnboundedSender<coordinator_message::Kind> },
    /// A member's control stream ended.
    Closed { worker: WorkerId, reason: String },
    /// A member lives.
    Heartbeat { worker: WorkerId, sent_unix_nanos: u64, clock_offset_nanos: i64 },
    /// A member begins to push the gradient of a lease.
    PushBegun { worker: WorkerId, lease: LeaseId },
    /// A member finished a lease.
    Result { worker: WorkerId, result: Finished },
    /// A member cannot do a lease.
    Declined { worker: WorkerId, lease: LeaseId, reason: String },
    /// A relay stands for another number of workers.
    Workers { worker: WorkerId, workers: u32 },
    /// A new member has gradients from an earlier membership.
    Kept { worker: WorkerId, blocks: Vec<KeptBlock> },
    /// An earlier checkpoint was loaded, as the engine asked; `None`: there is none, the run begins anew.
    RolledBack(anyhow::Result<Option<Box<Checkpoint>>>),
    /// Somebody asks what the run is doing.
    Status { reply: oneshot::Sender<v1::StatusReply> },
}

/// A worker that wants to join.
#[derive(Debug)]
pub(crate) struct Applicant {
    pub(crate) name: String,
    pub(crate) device: String,
    pub(crate) class: DeviceClass,
    /// How many it stands for.
    pub(crate) workers: u32,
    pub(crate) reply: oneshot::Sender<Result<WorkerId, Refusal>>,
}

/// A lease done, in the domain's types.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) lease: LeaseId,
    pub(crate) step: u64,
    pub(crate) version: u64,
    pub(crate) block: Block,
    pub(crate) sums: Sums,
    pub(crate) slot_sums: Vec<Sums>,
    /// Digest of the gradient, as the worker says; `None` where there is none.
    pub(crate) digest: Option<[u8; 32]>,
    /// Numbers of rows, for a reference.
    pub(crate) row_values: Vec<f32>,
    /// L2 norm of the vector that was pushed for it; `None` if there is no such vector.
    pub(crate) norm: Option<f64>,
    /// Digest of the rows that were computed.
    pub(crate) batch_sha256: [u8; 32],
    pub(crate) compute: Duration,
    pub(crate) upload: Duration,
    pub(crate) spans: Vec<v1::SpanTiming>,
}

impl Finished {
    /// As the engine hears of it, from this worker.
    pub(crate) fn block_done(&self, worker: WorkerId) -> BlockDone {
        let (task, digest) = match (&self.row_values[..], self.digest) {
            ([], Some(digest)) => (Task::Gradient, Some(digest)),
            ([], None) => (Task::Evaluate, None),
            (row_values, _) => (Task::Reference, Some(vector_sha256(row_values))),
        };
        let &Self { lease, step, version, block, sums, norm, compute, .. } = self;
        let slot_sums = self.slot_sums.clone();
        BlockDone { worker, lease, step, version, task, block, digest, norm, sums, slot_sums, compute }
    }
}
