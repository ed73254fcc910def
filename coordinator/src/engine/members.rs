//! Who takes part, how fast they are, and who has fallen silent.

use std::collections::BTreeMap;
use std::time::Duration;

use super::command::Task;
use super::event::KeptBlock;
use super::id::{DeviceClass, WorkerId};
use super::time::Time;

/// Weight of a worker's newest measurement in its speed.
const SPEED_SMOOTHING: f64 = 0.3;

/// A worker that was admitted and has not left.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Its own name; need not be unique.
    pub(super) name: String,
    /// Its device in words.
    pub(super) device: String,
    /// Its device class.
    pub(super) class: DeviceClass,
    /// Whether its control stream is open: it can be leased work.
    pub(super) connected: bool,
    /// When it last said anything.
    pub(super) last_heard: Time,
    /// Gradient slots it computes in a second, smoothed; `None` before its first.
    pub(super) slots_per_sec: Option<f64>,
    /// Seconds from a lease to its result, for each slot and by task, smoothed.
    secs_per_slot: BTreeMap<Task, f64>,
    /// Gradients it has from an earlier membership.
    pub(super) kept: Vec<KeptBlock>,
    /// Leases it declined since the last one it did.
    pub(super) declined_in_a_row: u32,
    /// Blocks accepted from it.
    pub(super) blocks_accepted: u64,
}

impl Member {
    /// Seconds from a lease to its result, for each slot, smoothed; `None` before the first.
    pub(super) fn secs_per_slot(&self, task: Task) -> Option<f64> {
        self.secs_per_slot.get(&task).copied()
    }

    /// Takes note that it computed `slots` slots in `compute`, and that `turnaround` passed since they were leased.
    pub(super) fn measure(&mut self, task: Task, slots: usize, compute: Duration, turnaround: Duration) {
        if task == Task::Gradient && !compute.is_zero() {
            let newest = slots as f64 / compute.as_secs_f64();
            self.slots_per_sec = Some(smoothed(self.slots_per_sec, newest));
        }
        let newest = turnaround.as_secs_f64() / slots as f64;
        let known = self.secs_per_slot.get(&task).copied();
        self.secs_per_slot.insert(task, smoothed(known, newest));
    }

    /// Takes note that it has not computed `slots` slots in `turnaround`: it is slower than it was thought to be, if that is
    /// more than it should have taken.
    pub(super) fn measure_at_least(&mut self, task: Task, slots: usize, turnaround: Duration) {
        let least = turnaround.as_secs_f64() / slots as f64;
        let known = self.secs_per_slot(task);
        if least == 0.0 || known.is_some_and(|known| known >= least) {
            return;
        }
        self.secs_per_slot.insert(task, smoothed(known, least));
        if task == Task::Gradient {
            let most = least.recip();
            self.slots_per_sec = Some(self.slots_per_sec.map_or(most, |speed| smoothed(Some(speed), speed.min(most))));
        }
    }
}

fn smoothed(known: Option<f64>, newest: f64) -> f64 {
    known.map_or(newest, |known| known + SPEED_SMOOTHING * (newest - known))
}

/// All members, by id.
#[derive(Clone, Debug, Default)]
pub(super) struct Members {
    members: BTreeMap<WorkerId, Member>,
    admitted: u64,
    connected: usize,
}

impl Members {
    /// Takes a worker in, under a new id.
    pub(super) fn admit(&mut self, name: String, device: String, class: DeviceClass, now: Time) -> WorkerId {
        self.admitted += 1;
        let worker = WorkerId(self.admitted);
        let member = Member {
            name,
            device,
            class,
            connected: false,
            last_heard: now,
            slots_per_sec: None,
            secs_per_slot: BTreeMap::new(),
            kept: Vec::new(),
            declined_in_a_row: 0,
            blocks_accepted: 0,
        };
        self.members.insert(worker, member);
        worker
    }

    /// A member.
    pub(super) fn get(&self, worker: WorkerId) -> Option<&Member> {
        self.members.get(&worker)
    }

    /// A member, to change.
    pub(super) fn get_mut(&mut self, worker: WorkerId) -> Option<&mut Member> {
        self.members.get_mut(&worker)
    }

    /// Takes note that a member's control stream is open; whether it is a member.
    pub(super) fn connect(&mut self, worker: WorkerId) -> bool {
        let Some(member) = self.members.get_mut(&worker) else { return false };
        self.connected += usize::from(!std::mem::replace(&mut member.connected, true));
        true
    }

    /// Ends a membership.
    pub(super) fn remove(&mut self, worker: WorkerId) -> Option<Member> {
        let member = self.members.remove(&worker)?;
        self.connected -= usize::from(member.connected);
        Some(member)
    }

    /// How many members' control streams are open.
    pub(super) fn connected_count(&self) -> usize {
        self.connected
    }

    /// All members, in the order in which they were admitted.
    pub(super) fn iter(&self) -> impl Iterator<Item = (WorkerId, &Member)> {
        self.members.iter().map(|(worker, member)| (*worker, member))
    }

    /// The members whose control stream is open.
    pub(super) fn connected(&self) -> impl Iterator<Item = (WorkerId, &Member)> {
        self.iter().filter(|(_, member)| member.connected)
    }

    /// Whether there is no member, connected or not.
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Whether nobody was ever admitted.
    pub(super) fn none_so_far(&self) -> bool {
        self.admitted == 0
    }

    /// Each connected member's part of `slots` slots by its speed, rounded down, but at least 1. One that is not
    /// measured yet counts as fast as the others on average.
    pub(super) fn shares(&self, slots: u32) -> Vec<(WorkerId, u32)> {
        let known: Vec<f64> = self.connected().filter_map(|(_, member)| member.slots_per_sec).collect();
        let mean = if known.is_empty() { 1.0 } else { known.iter().sum::<f64>() / known.len() as f64 };
        let speed = |member: &Member| member.slots_per_sec.unwrap_or(mean);
        let sum: f64 = self.connected().map(|(_, member)| speed(member)).sum();
        let share = |member: &Member| ((f64::from(slots) * speed(member) / sum) as u32).max(1);
        self.connected().map(|(worker, member)| (worker, share(member))).collect()
    }

    /// Seconds that a slot takes, on average over those of whom it is known; `None` while it is of nobody.
    pub(super) fn mean_secs_per_slot(&self, task: Task) -> Option<f64> {
        let known: Vec<f64> = self.members.values().filter_map(|member| member.secs_per_slot(task)).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    }

    /// When the next member is to be given up, should nothing be heard from it.
    pub(super) fn next_silence(&self, timeout: Duration) -> Option<Time> {
        self.members.values().map(|member| member.last_heard + timeout).min()
    }

    /// The members of whom nothing was heard for `timeout`.
    pub(super) fn silent(&self, now: Time, timeout: Duration) -> Vec<WorkerId> {
        let silent = self.iter().filter(|(_, member)| member.last_heard + timeout <= now);
        silent.map(|(worker, _)| worker).collect()
    }
}
