//! Which part of the free slots each worker should have, by its speed.
//!
//! A share is the slots times the worker's speed, divided by the sum of all speeds, all in `f64` and in the order of the
//! workers. That sum takes time in proportion to them, and changes with each result; so it is kept as a whole number
//! besides, which nearly always shows already how the share is rounded.

use std::cell::OnceCell;

use super::members::{Member, Members};

/// Speeds are added up in whole units of so many slots a second.
const UNIT: f64 = 1.0 / (1u64 << 40) as f64;
/// Shares by the two sums differ by less than this, relatively: for up to a million workers that compute a slot in less
/// than an hour on average.
const MARGIN: f64 = 1e-6;
const SLOWEST: f64 = 1.0 / 3600.0;

/// The speeds of those who are connected and measured, added up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Speeds {
    known: u32,
    units: u128,
}

impl Speeds {
    /// Adds a speed in slots a second, if it is known.
    pub(super) fn add(&mut self, slots_per_sec: Option<f64>) {
        if let Some(speed) = slots_per_sec {
            self.known += 1;
            self.units += (speed / UNIT) as u128;
        }
    }

    /// Takes a speed out again.
    pub(super) fn subtract(&mut self, slots_per_sec: Option<f64>) {
        if let Some(speed) = slots_per_sec {
            self.known -= 1;
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

/// The speeds of all, where who is not measured yet counts as fast as the others on average.
#[derive(Clone, Copy, Debug)]
struct Total {
    mean: f64,
    sum: f64,
}

impl<'a> Shares<'a> {
    /// Parts of `slots` slots for all connected members, whose speeds add up to `speeds`.
    pub(super) fn new(slots: u32, speeds: Speeds, members: &'a Members) -> Self {
        Self { slots, speeds, members, exact: OnceCell::new() }
    }

    /// A member's part, rounded down, but at least 1.
    pub(super) fn of(&self, member: &Member) -> u32 {
        let about = self.share(member, self.about());
        let [least, most] = [1.0 - MARGIN, 1.0 + MARGIN].map(|factor| (about * factor) as u32);
        let certain = least == most && self.speeds.sum() >= SLOWEST * f64::from(self.speeds.known);
        let share = if certain { least } else { self.share(member, *self.exact.get_or_init(|| self.total())) as u32 };
        share.max(1)
    }

    fn share(&self, member: &Member, Total { mean, sum }: Total) -> f64 {
        f64::from(self.slots) * member.slots_per_sec.unwrap_or(mean) / sum
    }

    /// By the whole numbers.
    fn about(&self) -> Total {
        let mean = if self.speeds.known == 0 { 1.0 } else { self.speeds.sum() / f64::from(self.speeds.known) };
        Total { mean, sum: mean * self.members.connected_count() as f64 }
    }

    /// In the order of the members.
    fn total(&self) -> Total {
        let known: Vec<f64> = self.members.connected().filter_map(|(_, member)| member.slots_per_sec).collect();
        let mean = if known.is_empty() { 1.0 } else { known.iter().sum::<f64>() / known.len() as f64 };
        Total { mean, sum: self.members.connected().map(|(_, member)| member.slots_per_sec.unwrap_or(mean)).sum() }
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
            millis in prop::collection::vec(prop::option::of(prop_oneof![Just(250), 1..100_000u64]), 1..40),
            slots in 1..5000u32,
            gone in any::<prop::sample::Index>(),
        ) {
            let mut members = Members::default();
            for millis in &millis {
                let class = DeviceClass([0; 32]);
                let worker = members.admit("host".into(), "cpu".into(), class, Time::default());
                members.connect(worker);
                for takes in millis.iter().flat_map(|millis| [*millis, millis * 3, *millis]) {
                    let takes = Duration::from_millis(takes);
                    members.measure(worker, Task::Gradient, 3, takes, takes);
                }
            }
            let leaves = members.iter().nth(gone.index(millis.len())).map(|(worker, _)| worker);
            leaves.filter(|_| millis.len() > 1).and_then(|worker| members.remove(worker));
            let shares = members.shares(slots);
            for (_, member) in members.connected() {
                prop_assert_eq!(shares.of(member), (shares.share(member, shares.total()) as u32).max(1));
            }
        }
    }
}
