//! Which rows each lease was sent, by digest: what comes back must have been computed from them.

use std::collections::BTreeMap;
use std::ops::Range;

use lockstep_model::ledger::block_sha256;

use crate::engine::command::Task;
use crate::engine::{LeaseId, WorkerId};
use crate::ledger::shown;

/// What one lease was sent.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) task: Task,
    /// The worker's name.
    pub(crate) name: String,
    pub(crate) slots: Range<u32>,
    /// Of each slot.
    pub(crate) digests: Vec<[u8; 32]>,
}

/// Leases that are open, by whom they were sent to: what one says of another's lease changes nothing.
#[derive(Debug, Default)]
pub(crate) struct SentRows(BTreeMap<(WorkerId, LeaseId), Sent>);

impl SentRows {
    /// Remembers what a lease was sent to a worker with.
    pub(crate) fn lend(&mut self, worker: WorkerId, lease: LeaseId, sent: Sent) {
        self.0.insert((worker, lease), sent);
    }

    /// Whether what a worker computed under a lease is what it was sent; if not, says so. A lease that is not open is for
    /// the engine to judge.
    pub(crate) fn check(&self, worker: WorkerId, lease: LeaseId, computed: [u8; 32]) -> Result<(), String> {
        let Some(sent) = self.0.get(&(worker, lease)) else { return Ok(()) };
        let sent = block_sha256(sent.digests.iter().copied());
        if computed == sent {
            return Ok(());
        }
        Err(format!(
            "it computed other rows for lease {lease} than it was sent (SHA-256 {} and {}): they were damaged on the way, or \
             in its memory",
            shown(&computed),
            shown(&sent)
        ))
    }

    /// The lease is over: what it was sent.
    pub(crate) fn take(&mut self, worker: WorkerId, lease: LeaseId) -> Option<Sent> {
        self.0.remove(&(worker, lease))
    }

    /// Forgets all leases.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
