//! Who has nothing to do, or not enough for all that they stand for, and who of them is fast.

use std::collections::BTreeSet;

use super::id::WorkerId;

/// Workers that could have a lease, or one more.
#[derive(Clone, Debug, Default)]
pub(super) struct Idle {
    workers: BTreeSet<WorkerId>,
    /// Those who have come since it was last said how fast they are.
    new: Vec<WorkerId>,
    /// Seconds for a slot, by worker, infinite of those who are not idle or not known: a binary tree of which each node holds
    /// the least below it. Its root is number 1; there are as many leaves as there are inner nodes and one more.
    least: Vec<f64>,
}

impl Idle {
    /// A worker has nothing to do.
    pub(super) fn insert(&mut self, worker: WorkerId) {
        if self.workers.insert(worker) {
            self.new.push(worker);
        }
    }

    /// A worker has, or is gone.
    pub(super) fn remove(&mut self, worker: WorkerId) {
        if self.workers.remove(&worker) {
            self.set(worker, f64::INFINITY);
        }
    }

    /// Those who come after `after`, in their order.
    pub(super) fn after(&self, WorkerId(after): WorkerId) -> impl Iterator<Item = WorkerId> {
        self.workers.range(WorkerId(after + 1)..).copied()
    }

    /// Takes note of how many seconds a slot takes those who have come, as far as that is known.
    pub(super) fn measure(&mut self, secs_per_slot: impl Fn(WorkerId) -> Option<f64>) {
        for worker in std::mem::take(&mut self.new) {
            if let (true, Some(secs)) = (self.workers.contains(&worker), secs_per_slot(worker)) {
                self.set(worker, secs);
            }
        }
    }

    /// The first who comes after `after` and is fast enough, of those of whom it is known how many seconds a slot takes them.
    /// Whoever is faster than one who is fast enough must be so, too.
    pub(super) fn first_fast(&self, WorkerId(after): WorkerId, fast_enough: impl Fn(f64) -> bool) -> Option<WorkerId> {
        let leaves = self.least.len() / 2;
        let fits = |node: usize| self.least[node].is_finite() && fast_enough(self.least[node]);
        if after as usize + 1 >= leaves || !fits(1) {
            return None;
        }
        let mut node = leaves + after as usize + 1;
        // Upwards to the first subtree to the right that has one.
        while !fits(node) {
            while node % 2 == 1 {
                node /= 2;
            }
            if node == 0 {
                return None;
            }
            node += 1;
        }
        while node < leaves {
            node *= 2;
            node += usize::from(!fits(node));
        }
        Some(WorkerId((node - leaves) as u64))
    }

    fn set(&mut self, WorkerId(worker): WorkerId, secs_per_slot: f64) {
        let leaves = self.least.len() / 2;
        if worker as usize >= leaves {
            if secs_per_slot.is_infinite() {
                return;
            }
            self.grow((worker as usize + 1).next_power_of_two());
        }
        let mut node = self.least.len() / 2 + worker as usize;
        self.least[node] = secs_per_slot;
        while node > 1 {
            node /= 2;
            self.least[node] = self.least[2 * node].min(self.least[2 * node + 1]);
        }
    }

    fn grow(&mut self, leaves: usize) {
        let known = self.least.split_off(self.least.len() / 2);
        self.least = vec![f64::INFINITY; 2 * leaves];
        self.least[leaves..leaves + known.len()].copy_from_slice(&known);
        for node in (1..leaves).rev() {
            self.least[node] = self.least[2 * node].min(self.least[2 * node + 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_first_that_is_fast_enough_is_found(
            acts in prop::collection::vec((1..70u64, prop::option::weighted(0.7, prop::option::of(0.1..9.0f64))), 1..150),
            after in 0..80u64,
            limit in 0.0..9.0f64,
        ) {
            let (mut idle, mut plain) = (Idle::default(), BTreeMap::new());
            for (worker, act) in acts {
                match act {
                    Some(secs) => {
                        idle.remove(WorkerId(worker));
                        idle.insert(WorkerId(worker));
                        idle.measure(|_| secs);
                        plain.insert(WorkerId(worker), secs);
                    }
                    None => {
                        idle.remove(WorkerId(worker));
                        plain.remove(&WorkerId(worker));
                    }
                }
                let later = plain.range(WorkerId(after + 1)..);
                let mut fast = later.clone().filter(|(_, secs)| secs.is_some_and(|secs| secs < limit));
                let found = idle.first_fast(WorkerId(after), |secs| secs < limit);
                prop_assert_eq!(found, fast.next().map(|(worker, _)| *worker));
                prop_assert!(idle.after(WorkerId(after)).eq(later.map(|(worker, _)| *worker)));
            }
        }
    }
}
