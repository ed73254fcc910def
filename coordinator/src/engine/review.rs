//! Results that need confirmation before they count: which ones, and when they have it.
//!
//! Reviewing a block may only cause it to be computed again. What counts in the end is what the step's slots are, so that
//! nothing here shows in the parameters of a run whose workers compute right.

use std::collections::{BTreeMap, VecDeque};

use lockstep_model::batch::Sums;
use lockstep_model::random::{Draws, Stream};
use lockstep_model::step_filter::{LEAST_NORMS, STEPS_REMEMBERED};
use lockstep_model::tree::Block;

use super::command::Task;
use super::event::BlockDone;
use super::id::{DeviceClass, LeaseId, WorkerId};
use super::work::Norm;

/// A gradient is suspicious beyond so many times the usual norm.
const UNUSUAL: f64 = 10.0;
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
    /// Whether its worker is still a member: only then is the vector here, and can count.
    pub(super) present: bool,
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
        // The one that counts comes first.
        let in_order =
            equal.filter_map(|(first, second)| match (self.results[first].present, self.results[second].present) {
                (true, _) => Some((first, second)),
                (false, true) => Some((second, first)),
                (false, false) => None,
            });
        let equal: Vec<(usize, usize)> = in_order.collect();
        let of_two = equal.iter().find(|(first, second)| self.results[*first].name != self.results[*second].name);
        match (of_two, equal.first()) {
            (Some((first, second)), _) => Verdict::Confirmed(*first, *second),
            (None, Some((first, _))) if self.is_single() && !self.audited => Verdict::Unchecked(*first),
            (None, None) if self.is_single() && self.results.len() >= OWN_ATTEMPTS => Verdict::Unreliable,
            _ => Verdict::Open,
        }
    }

    /// A worker is gone: its results are heard, and can count no more. The leases that they came under.
    pub(super) fn bid_farewell(&mut self, worker: WorkerId) -> Vec<LeaseId> {
        let of_worker = |opinion: &&mut Opinion| opinion.present && opinion.done.worker == worker;
        let gone = self.results.iter_mut().filter(of_worker).map(|opinion| {
            opinion.present = false;
            opinion.done.lease
        });
        gone.collect()
    }

    /// The results of those who are still there.
    pub(super) fn present(&self) -> impl Iterator<Item = &Opinion> {
        self.results.iter().filter(|opinion| opinion.present)
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
        let numbers = |sums: &Sums| [[sums.loss, sums.weight].as_slice(), &sums.pairs.to_array()].concat();
        all.flat_map(numbers).map(f64::to_bits).collect()
    };
    one.digest == other.digest && bits(one) == bits(other)
}

/// Whether a block is among the share `audit` of all blocks that is audited. Where there is any, references all are: they are
/// computed once, and every step depends on them.
pub(super) fn is_audited(audit: f64, seed: u64, step: u64, task: Task, block: Block) -> bool {
    let task = match task {
        Task::Gradient => 0,
        Task::Evaluate => 1 << 63,
        Task::Reference => return audit > 0.0,
    };
    let node = u64::from(block.level) << 32 | u64::from(block.index) | task;
    audit > 0.0 && Draws::new(seed, Stream::Audit).unit(step, node) < audit
}

/// The norms of committed gradients, and what is unusual by them.
#[derive(Clone, Debug, Default)]
pub(super) struct Gate {
    /// By the number of slots, since a sum over more tokens is longer.
    norms: BTreeMap<usize, Norms>,
}

/// Norms of gradients of as many slots.
#[derive(Clone, Debug, Default)]
struct Norms {
    /// Of each step in which there are some, in order: the bits of the norms, sorted. Norms are not negative, so that their
    /// bits are in the order of the numbers.
    steps: VecDeque<(u64, Vec<u64>)>,
    /// Their median, once somebody asked.
    usual: Option<Option<f64>>,
}

impl Gate {
    /// Why a gradient looks wrong, if it does.
    pub(super) fn suspect(&mut self, Norm { slots, norm }: Norm) -> Option<Suspicion> {
        if !norm.is_finite() {
            return Some(Suspicion { norm, median: None });
        }
        let median = self.norms.get_mut(&slots)?.usual()?;
        (norm > UNUSUAL * median).then_some(Suspicion { norm, median: Some(median) })
    }

    /// Takes note of the gradients of a step that is committed.
    pub(super) fn commit(&mut self, step: u64, norms: &[Norm]) {
        let mut sorted: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for Norm { slots, norm } in norms.iter().filter(|norm| norm.norm.is_finite()) {
            sorted.entry(*slots).or_default().push(norm.abs().to_bits());
        }
        for (slots, mut norms) in sorted {
            norms.sort_unstable();
            self.norms.entry(slots).or_default().steps.push_back((step, norms));
        }
        self.retain(|old| old + STEPS_REMEMBERED as u64 > step);
    }

    /// Forgets steps after `step`, to which the run went back.
    pub(super) fn forget_after(&mut self, step: u64) {
        self.retain(|committed| committed <= step);
    }

    fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        for norms in self.norms.values_mut() {
            norms.steps.retain(|(step, _)| keep(*step));
            norms.usual = None;
        }
        self.norms.retain(|_, norms| !norms.steps.is_empty());
    }
}

impl Norms {
    fn usual(&mut self) -> Option<f64> {
        *self.usual.get_or_insert_with(|| {
            let sorted: Vec<&[u64]> = self.steps.iter().map(|(_, norms)| norms.as_slice()).collect();
            let count = sorted.iter().map(|norms| norms.len()).sum::<usize>();
            (count >= LEAST_NORMS).then(|| f64::from_bits(nth(&sorted, count / 2)))
        })
    }
}

/// What would stand at place `n`, were several sorted lists one: by bisection over the bits, so that it takes no longer for
/// lists that are longer.
fn nth(sorted: &[&[u64]], n: usize) -> u64 {
    let (mut least, mut most) = (0, u64::MAX);
    while least < most {
        let middle = least + (most - least) / 2;
        let up_to = sorted.iter().map(|numbers| numbers.partition_point(|number| *number <= middle)).sum::<usize>();
        if up_to > n { most = middle } else { least = middle + 1 }
    }
    least
}

#[cfg(test)]
mod tests {
    use lockstep_model::step_filter::usual;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_usual_is_the_median_of_the_last_steps(
            steps in prop::collection::vec(prop::collection::vec((1..3usize, 0.0..1e3f64), 0..20), 1..80),
            back in prop::option::of(0..80u64),
        ) {
            let mut gate = Gate::default();
            let mut plain: Vec<(u64, Norm)> = Vec::new();
            for (step, norms) in (1..).zip(steps) {
                let norms: Vec<Norm> = norms.into_iter().map(|(slots, norm)| Norm { slots, norm }).collect();
                gate.commit(step, &norms);
                plain.extend(norms.into_iter().map(|norm| (step, norm)));
                plain.retain(|(old, _)| old + STEPS_REMEMBERED as u64 > step);
                if let Some(back) = back.filter(|back| back + 3 == step) {
                    gate.forget_after(back);
                    plain.retain(|(old, _)| *old <= back);
                }
                for slots in 1..4 {
                    let known = plain.iter().filter(|(_, norm)| norm.slots == slots).map(|(_, norm)| norm.norm);
                    prop_assert_eq!(gate.norms.get_mut(&slots).and_then(Norms::usual), usual(known));
                }
            }
        }
    }
}
