//! A run directory: checkpoints and the lines of validation losses. It survives the coordinator.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_coordinator::engine::{DeviceClass, Start};
use lockstep_model::batch::Sums;

use super::numbers::Params;

/// A checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) step: u64,
    pub(crate) params: Params,
    pub(crate) validated: bool,
    pub(crate) skipped_in_a_row: u32,
    pub(crate) unchecked_since: BTreeMap<String, u64>,
    /// Whether its digests are right; what was being written when the coordinator died may look like a checkpoint.
    pub(crate) whole: bool,
}

/// What lies in the directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    /// By step.
    checkpoints: Vec<Checkpoint>,
    /// Boundary and loss.
    pub(crate) validations: Vec<(u64, Sums)>,
    /// Whether what the first version says of rows is written down.
    pub(crate) referenced: bool,
    /// While the run goes back: checkpoints of later steps are not to be gone on from.
    pub(crate) trusted_up_to: Option<u64>,
    /// Names of workers that computed wrong.
    pub(crate) quarantined: BTreeSet<String>,
    /// How often a coordinator has started.
    pub(crate) incarnation: u64,
}

impl Disk {
    /// Adds a checkpoint, in place of one of the same step, and removes the oldest beyond `keep_last` whole ones.
    pub(crate) fn write(&mut self, checkpoint: Checkpoint, keep_last: usize) {
        self.checkpoints.retain(|known| known.step != checkpoint.step);
        self.checkpoints.push(checkpoint);
        self.checkpoints.sort_by_key(|known| known.step);
        let whole = self.checkpoints.iter().filter(|known| known.whole).count();
        for _ in keep_last..whole {
            if let Some(oldest) = self.checkpoints.iter().position(|known| known.whole) {
                self.checkpoints.remove(oldest);
            }
        }
    }

    /// The newest checkpoint of step `at_most` or earlier that is whole; or, where `careless`, that is there at all.
    pub(crate) fn newest(&self, at_most: u64, careless: bool) -> Option<Checkpoint> {
        let fits = |known: &&Checkpoint| known.step <= at_most && (known.whole || careless);
        self.checkpoints.iter().rev().find(fits).cloned()
    }

    /// Removes checkpoints after `step`.
    pub(crate) fn remove_after(&mut self, step: u64) {
        self.checkpoints.retain(|known| known.step <= step);
    }

    /// Cuts off the lines after a boundary to which the run goes back.
    pub(crate) fn cut(&mut self, step: u64, validated: bool) {
        self.validations.retain(|(line, _)| *line < step || (validated && *line == step));
    }

    /// Whether the validation loss of a boundary is recorded.
    pub(crate) fn is_validated(&self, step: u64) -> bool {
        self.validations.iter().any(|(line, _)| *line == step)
    }
}

impl Checkpoint {
    /// How an engine starts from it.
    pub(crate) fn start(&self, classes: impl IntoIterator<Item = DeviceClass>) -> Start {
        Start::Resumed {
            step: self.step,
            validated: self.validated,
            classes: classes.into_iter().collect(),
            skipped_in_a_row: self.skipped_in_a_row,
            unchecked_since: self.unchecked_since.clone(),
        }
    }
}
