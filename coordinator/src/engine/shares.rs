//! Which part of the free slots each worker should have, by its speed.
//!
//! A share is the slots times the worker's speed, divided by the sum of all speeds, and a little more than that
//! ([`TOLERANCE`]), all in `f64` and in the order of the workers. That sum takes time in proportion to them, and changes with
//! each result; so it is kept as a whole number besides, which nearly always shows already how the share is rounded.

use std::cell::OnceCell;

use super::members::{Member, Members};

/// By so much more than its share a worker may be lent, as a part of it. Blocks are powers of two: who is a moment slower than
/// its equals would otherwise have half of what they have, and the other half would be lent when it is done, to be pushed as a
/// vector of its own. With this much more, the whole takes nine eighths of the time at most; in two halves it takes three
/// halves, if nobody else is free for the second. More would leave a slow worker idle beside a much faster one.
const TOLERANCE: f64 = 0.125;
/// Speeds are added up in whole units of so many slots a second.
const UNIT: f64 = 1.0 / (1u64 << 40) as f64;
/// Shares by the two sums differ by less than this, relatively: for up to a million workers that compute a slot in less
/// than an hour on average.
const MARGIN: f64 = 1e-6;
const SLOWEST: f64 = 1.0 / 3600.0;

/// The speeds of those who are connected and measured, added up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Speeds {
    /// Of how many workers they are.
    known: u32,
    units: u128,
}

impl Speeds {
    /// Adds the speed of a member that stands for so many workers, in slots a second, if it is known.
    pub(super) fn add(&mut self, slots_per_sec: Option<f64>, workers: u32) {
        if let Some(speed) = slots_per_sec {
            self.known += workers;
            self.units += (speed / UNIT) as u128;
        }
    }

    /// Takes a speed out again.
    pub(super) fn subtract(&mut self, slots_per_sec: Option<f64>, workers: u32) {
        if let Some(speed) = slots_per_sec {
            self.known -= workers;
            self.units -= (speed / UNIT) as u128;
        }
    }
}

/// How many slots each worker should have.
pub(super) struct Shares<'a> {
    slots: u32,
    speeds: Speeds,
    members: &'a Members,
    exact: OnceCell<Total>,
}

/// The speeds of all, where who is not measured yet counts as fast as the others on average, worker by worker.
#[derive(Clone, Copy, Debug)]
struct Total {
    /// Of one worker.
    mean: f64,
    sum: f64,
}

impl<'a> Shares<'a> {
    /// Parts of `slots` slots for all connected members, whose speeds add up to `speeds`.
    pub(super) fn new(slots: u32, speeds: Speeds, members: &'a Members) -> Self {
        Self { slots, speeds, members, exact: OnceCell::new() }
    }

    /// A member's part, with what is tolerated, rounded down, but at least 1.
    pub(super) fn of(&self, member: &Member) -> u32 {
        let about = self.share(member, self.about());
        let [least, most] = [1.0 - MARGIN, 1.0 + MARGIN].map(|factor| (about * factor) as u32);
        let certain = least == most && self.speeds.sum() >= SLOWEST * f64::from(self.speeds.known);
        let share = if certain { least } else { self.share(member, *self.exact.get_or_init(|| self.total())) as u32 };
        share.max(1)
    }

    fn share(&self, member: &Member, Total { mean, sum }: Total) -> f64 {
        let speed = member.slots_per_sec.unwrap_or(mean * f64::from(member.workers));
        f64::from(self.slots) * speed / sum * (1.0 + TOLERANCE)
    }

    /// By the whole numbers.
    fn about(&self) -> Total {
        let mean = if self.speeds.known == 0 { 1.0 } else { self.speeds.sum() / f64::from(self.speeds.known) };
        Total { mean, sum: mean * self.members.connected_workers() as f64 }
    }

    /// In the order of the members.
    fn total(&self) -> Total {
        let members = || self.members.connected().map(|(_, member)| (member.slots_per_sec, f64::from(member.workers)));
        let known = members().filter_map(|(speed, workers)| Some((speed?, workers)));
        let (sum, workers) = known.fold((0.0, 0.0), |(sum, all), (speed, workers)| (sum + speed, all + workers));
        let mean = if workers == 0.0 { 1.0 } else { sum / workers };
        Total { mean, sum: members().map(|(speed, workers)| speed.unwrap_or(mean * workers)).sum() }
    }
}

impl Speeds {
    fn sum(&self) -> f64 {
        self.units as f64 * UNIT
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::command::Task;
    use super::super::id::DeviceClass;
    use super::super::time::Time;
    use super::*;

    proptest! {
        /// Equal workers, whose shares are whole numbers, and any others.
        #[test]
        fn shares_are_those_by_the_sum_in_order(
            all in prop::collection::vec(
                (prop::option::of(prop_oneof![Just(250), 1..100_000u64]), prop_oneof![3 => Just(1), 1 => 1..9u32]),
                1..40,
            ),
            slots in 1..5000u32,
            gone in any::<prop::sample::Index>(),
        ) {
            let mut members = Members::default();
            for (millis, workers) in &all {
                let class = DeviceClass([0; 32]);
                let worker = members.admit("host".into(), "cpu".into(), class, *workers, Time::default());
                members.connect(worker);
                for takes in millis.iter().flat_map(|millis| [*millis, millis * 3, *millis]) {
                    let takes = Duration::from_millis(takes);
                    members.measure(worker, Task::Gradient, 3, takes, takes);
                }
            }
            let leaves = members.iter().nth(gone.index(all.len())).map(|(worker, _)| worker);
            leaves.filter(|_| all.len() > 1).and_then(|worker| members.remove(worker));
            let first = members.iter().next().map(|(worker, _)| worker);
            if let Some(worker) = first {
                members.set_workers(worker, 3);
            }
            let shares = members.shares(slots);
            for (_, member) in members.connected() {
                prop_assert_eq!(shares.of(member), (shares.share(member, shares.total()) as u32).max(1));
            }
        }
    }
}
