//! Results that need confirmation before they count: which ones, and when they have it.
//!
//! Reviewing a block may only cause it to be computed again. What counts in the end is what the step's slots are, so that
//! nothing here shows in the parameters of a run whose workers compute right.

use std::collections::{BTreeMap, VecDeque};

use lockstep_model::random::{Draws, Stream};
use lockstep_model::tree::Block;

use super::command::Task;
use super::event::BlockDone;
use super::id::{DeviceClass, LeaseId, WorkerId};
use super::work::Norm;

/// A gradient is suspicious beyond so many times the usual norm.
const UNUSUAL: f64 = 10.0;
/// What is usual is the median over so many committed steps.
const STEPS_REMEMBERED: u64 = 64;
/// Fewer norms than this say nothing of what is usual.
const LEAST_NORMS: usize = 8;
/// A worker that computes something else so often is unreliable.
const OWN_ATTEMPTS: usize = 3;

/// Why a gradient looks wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Suspicion {
    /// Its norm.
    pub(super) norm: f64,
    /// What is usual; `None` where the norm is not finite.
    pub(super) median: Option<f64>,
}

/// One block, with the results that have come so far.
#[derive(Clone, Debug)]
pub(super) struct Review {
    /// Whether it was drawn for an audit: only another worker can confirm it.
    pub(super) audited: bool,
    /// Whether its gradient looks wrong.
    pub(super) suspicious: bool,
    /// Of the worker that computed it first: others of its class compute the same bits.
    pub(super) class: DeviceClass,
    results: Vec<Opinion>,
}

/// A result, and whose it is. One who joins again is the same by its name.
#[derive(Clone, Debug)]
pub(super) struct Opinion {
    /// The worker's name.
    pub(super) name: String,
    /// What it computed.
    pub(super) done: BlockDone,
}

/// What the results so far say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// These results are equal, and of two workers.
    Confirmed(usize, usize),
    /// The only worker there is computed the same twice.
    Unchecked(usize),
    /// The only worker there is never computed the same.
    Unreliable,
    /// Nothing yet.
    Open,
}

impl Review {
    /// A block that was first computed by a worker of class `class`.
    pub(super) fn new(audited: bool, suspicious: bool, class: DeviceClass) -> Self {
        Self { audited, suspicious, class, results: Vec::new() }
    }

    /// Adds a result.
    pub(super) fn add(&mut self, opinion: Opinion) {
        self.results.push(opinion);
    }

    /// The results so far.
    pub(super) fn results(&self) -> &[Opinion] {
        &self.results
    }

    /// Whether a worker of this name has given its result.
    pub(super) fn has_result_of(&self, name: &str) -> bool {
        self.results.iter().any(|opinion| opinion.name == name)
    }

    /// Whether results of two workers differ.
    pub(super) fn is_disputed(&self) -> bool {
        let Some((first, others)) = self.results.split_first() else { return false };
        others.iter().any(|other| other.name != first.name && !same(&other.done, &first.done))
    }

    /// Whether all results are of one worker.
    pub(super) fn is_single(&self) -> bool {
        self.results.iter().all(|opinion| opinion.name == self.results[0].name)
    }

    /// The names of those who gave results, each once.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.results.iter().map(|opinion| opinion.name.clone()).collect();
        names.dedup();
        names
    }

    /// What the results say.
    pub(super) fn verdict(&self) -> Verdict {
        let pairs = (0..self.results.len()).flat_map(|second| (0..second).map(move |first| (first, second)));
        let equal = pairs.filter(|(first, second)| same(&self.results[*first].done, &self.results[*second].done));
        let equal: Vec<(usize, usize)> = equal.collect();
        let of_two = equal.iter().find(|(first, second)| self.results[*first].name != self.results[*second].name);
        match (of_two, equal.first()) {
            (Some((first, second)), _) => Verdict::Confirmed(*first, *second),
            (None, Some((first, _))) if self.is_single() && !self.audited => Verdict::Unchecked(*first),
            (None, None) if self.is_single() && self.results.len() >= OWN_ATTEMPTS => Verdict::Unreliable,
            _ => Verdict::Open,
        }
    }

    /// Removes the results of a worker; the leases that they came under.
    pub(super) fn forget(&mut self, worker: WorkerId) -> Vec<LeaseId> {
        self.results.extract_if(.., |opinion| opinion.done.worker == worker).map(|opinion| opinion.done.lease).collect()
    }

    /// The results, apart from result `counted`: each with whether it is equal to that one.
    pub(super) fn into_others(self, counted: usize) -> (Opinion, Vec<(Opinion, bool)>) {
        let mut results = self.results;
        let counted = results.remove(counted);
        let with_equality = |opinion: Opinion| {
            let equal = same(&opinion.done, &counted.done);
            (opinion, equal)
        };
        let others = results.into_iter().map(with_equality).collect();
        (counted, others)
    }
}

/// Whether two results for a block are the same to the bit.
fn same(one: &BlockDone, other: &BlockDone) -> bool {
    let bits = |done: &BlockDone| -> Vec<u64> {
        let all = std::iter::once(&done.sums).chain(&done.slot_sums);
        all.flat_map(|sums| [sums.loss.to_bits(), sums.weight.to_bits()]).collect()
    };
    one.digest == other.digest && bits(one) == bits(other)
}

/// Whether a block is among the share `audit` of all blocks that is audited.
pub(super) fn is_audited(audit: f64, seed: u64, step: u64, task: Task, block: Block) -> bool {
    let task = match task {
        Task::Gradient => 0,
        Task::Evaluate => 1 << 63,
    };
    let node = u64::from(block.level) << 32 | u64::from(block.index) | task;
    audit > 0.0 && Draws::new(seed, Stream::Audit).unit(step, node) < audit
}

/// The norms of committed gradients, and what is unusual by them.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate {
    /// By weight, since a sum over more tokens is longer: step and norm, in the order of steps.
    norms: BTreeMap<u64, VecDeque<(u64, f64)>>,
}

impl Gate {
    /// Why a gradient looks wrong, if it does.
    pub(super) fn suspect(&self, Norm { weight, norm }: Norm) -> Option<Suspicion> {
        if !norm.is_finite() {
            return Some(Suspicion { norm, median: None });
        }
        let mut known: Vec<f64> = self.norms.get(&weight.to_bits())?.iter().map(|(_, norm)| *norm).collect();
        if known.len() < LEAST_NORMS {
            return None;
        }
        let middle = known.len() / 2;
        let (_, median, _) = known.select_nth_unstable_by(middle, f64::total_cmp);
        (norm > UNUSUAL * *median).then_some(Suspicion { norm, median: Some(*median) })
    }

    /// Takes note of the gradients of a step that is committed.
    pub(super) fn commit(&mut self, step: u64, norms: &[Norm]) {
        for Norm { weight, norm } in norms.iter().filter(|norm| norm.norm.is_finite()) {
            self.norms.entry(weight.to_bits()).or_default().push_back((step, *norm));
        }
        for known in self.norms.values_mut() {
            while known.front().is_some_and(|(old, _)| old + STEPS_REMEMBERED <= step) {
                known.pop_front();
            }
        }
        self.norms.retain(|_, known| !known.is_empty());
    }

    /// Forgets steps after `step`, to which the run went back.
    pub(super) fn forget_after(&mut self, step: u64) {
        self.norms.values_mut().for_each(|known| known.retain(|(committed, _)| *committed <= step));
    }
}
