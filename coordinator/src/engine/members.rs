//! Who takes part, how fast they are, and who has fallen silent.

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::time::Duration;

use super::command::Task;
use super::event::KeptBlock;
use super::id::{DeviceClass, WorkerId};
use super::leases::Pace;
use super::shares::{Shares, Speeds};
use super::time::Time;

/// Weight of a worker's newest measurement in its speed.
const SPEED_SMOOTHING: f64 = 0.3;
/// How many kinds of [`Task`] there are.
const TASKS: usize = 3;

/// A worker that was admitted and has not left.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Its own name; need not be unique.
    pub(super) name: String,
    /// Its device in words.
    pub(super) device: String,
    /// Its device class.
    pub(super) class: DeviceClass,
    /// How many workers it stands for: more than one if it is a relay.
    pub(super) workers: u32,
    /// Whether its control stream is open: it can be leased work.
    pub(super) connected: bool,
    /// When it last said anything.
    pub(super) last_heard: Time,
    /// Gradient slots it computes in a second if all its workers have some, smoothed; `None` before its first.
    pub(super) slots_per_sec: Option<f64>,
    /// Seconds from a lease to its result, for each slot of one of its workers and by task, smoothed.
    secs_per_slot: [Option<f64>; TASKS],
    /// Gradients it has from an earlier membership.
    pub(super) kept: Vec<KeptBlock>,
    /// Leases it declined since the last one it did.
    pub(super) declined_in_a_row: u32,
    /// Blocks accepted from it.
    pub(super) blocks_accepted: u64,
    /// Whether it is noted of its name that nobody checked a block of its that counts.
    pub(super) noted_unchecked: bool,
}

impl Member {
    /// How fast it answers a lease, as far as is known.
    pub(super) fn pace(&self, task: Task) -> Pace {
        Pace { workers: self.workers, secs_per_slot: self.secs_per_slot(task) }
    }

    /// Seconds from a lease to its result, for each slot of one of its workers, smoothed; `None` before the first.
    fn secs_per_slot(&self, task: Task) -> Option<f64> {
        self.secs_per_slot[task as usize]
    }

    /// Takes note that it computed `slots` slots in `compute`, and that `turnaround` passed since they were leased.
    fn measure(&mut self, task: Task, slots: usize, compute: Duration, turnaround: Duration) {
        let rounds = self.pace(task).rounds(slots);
        if task == Task::Gradient && !compute.is_zero() {
            // Had all its workers had as much to do as the busiest.
            let newest = (rounds * self.workers as usize) as f64 / compute.as_secs_f64();
            self.slots_per_sec = Some(smoothed(self.slots_per_sec, newest));
        }
        let newest = turnaround.as_secs_f64() / rounds as f64;
        let known = &mut self.secs_per_slot[task as usize];
        *known = Some(smoothed(*known, newest));
    }

    /// Takes note that it has not computed `slots` slots in `turnaround`: it is slower than it was thought to be, if that is
    /// more than it should have taken.
    fn measure_at_least(&mut self, task: Task, slots: usize, turnaround: Duration) {
        let least = turnaround.as_secs_f64() / self.pace(task).rounds(slots) as f64;
        let known = self.secs_per_slot(task);
        if least == 0.0 || known.is_some_and(|known| known >= least) {
            return;
        }
        self.secs_per_slot[task as usize] = Some(smoothed(known, least));
        if task == Task::Gradient {
            let most = f64::from(self.workers) / least;
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
    /// By id, from `first` on; `None` of those who are gone.
    members: VecDeque<Option<Box<Member>>>,
    first: u64,
    count: usize,
    connected: usize,
    /// Those whom the connected ones stand for.
    connected_workers: usize,
    /// Who was heard when, the longest ago first. Void where the member was heard again, or is gone; the first never is.
    heard: VecDeque<(Time, WorkerId)>,
    speeds: Speeds,
    /// By task, the answer of [`Self::mean_secs_per_slot`] while it holds.
    means: [OnceLock<Option<f64>>; TASKS],
}

impl Members {
    /// Takes a worker in that stands for so many, under a new id.
    pub(super) fn admit(
        &mut self,
        name: String,
        device: String,
        class: DeviceClass,
        workers: u32,
        now: Time,
    ) -> WorkerId {
        let member = Member {
            name,
            device,
            class,
            workers: workers.max(1),
            connected: false,
            last_heard: now,
            slots_per_sec: None,
            secs_per_slot: [None; TASKS],
            kept: Vec::new(),
            declined_in_a_row: 0,
            blocks_accepted: 0,
            noted_unchecked: false,
        };
        self.members.push_back(Some(Box::new(member)));
        self.count += 1;
        let worker = WorkerId(self.first + self.members.len() as u64);
        self.heard.push_back((now, worker));
        worker
    }

    /// Ids count from 1: the place of one that was given out and is not forgotten.
    fn place(&self, WorkerId(worker): WorkerId) -> Option<usize> {
        worker.checked_sub(self.first + 1).map(|place| place as usize)
    }

    /// A member.
    pub(super) fn get(&self, worker: WorkerId) -> Option<&Member> {
        self.members.get(self.place(worker)?)?.as_deref()
    }

    /// A member, to change.
    pub(super) fn get_mut(&mut self, worker: WorkerId) -> Option<&mut Member> {
        let place = self.place(worker)?;
        self.members.get_mut(place)?.as_deref_mut()
    }

    /// Takes note that a member's control stream is open; whether it is a member.
    pub(super) fn connect(&mut self, worker: WorkerId) -> bool {
        let Some(member) = self.get_mut(worker) else { return false };
        if !std::mem::replace(&mut member.connected, true) {
            let (speed, workers) = (member.slots_per_sec, member.workers);
            self.connected += 1;
            self.connected_workers += workers as usize;
            self.speeds.add(speed, workers);
        }
        true
    }

    /// Ends a membership.
    pub(super) fn remove(&mut self, worker: WorkerId) -> Option<Member> {
        let place = self.place(worker)?;
        let member = *self.members.get_mut(place)?.take()?;
        self.count -= 1;
        self.means = Default::default();
        if member.connected {
            self.connected -= 1;
            self.connected_workers -= member.workers as usize;
            self.speeds.subtract(member.slots_per_sec, member.workers);
        }
        while self.members.front().is_some_and(Option::is_none) {
            self.members.pop_front();
            self.first += 1;
        }
        self.forget_void();
        Some(member)
    }

    /// Takes note that a worker lives.
    pub(super) fn hear(&mut self, worker: WorkerId, now: Time) {
        let Some(member) = self.get_mut(worker).filter(|member| member.last_heard < now) else { return };
        member.last_heard = now;
        self.heard.push_back((now, worker));
        self.forget_void();
        if self.heard.len() > 4 * self.count.max(16) {
            let mut heard = std::mem::take(&mut self.heard);
            heard.retain(|(at, worker)| self.was_last_heard(*worker, *at));
            self.heard = heard;
        }
    }

    fn was_last_heard(&self, worker: WorkerId, at: Time) -> bool {
        self.get(worker).is_some_and(|member| member.last_heard == at)
    }

    fn forget_void(&mut self) {
        while self.heard.front().is_some_and(|(at, worker)| !self.was_last_heard(*worker, *at)) {
            self.heard.pop_front();
        }
    }

    /// Takes note that a member computed `slots` slots in `compute`, and that `turnaround` passed since they were leased.
    pub(super) fn measure(
        &mut self,
        worker: WorkerId,
        task: Task,
        slots: usize,
        compute: Duration,
        turnaround: Duration,
    ) {
        self.change_speed(worker, |member| member.measure(task, slots, compute, turnaround));
    }

    /// Takes note that a member has not computed `slots` slots in `turnaround`: it is slower than it was thought to be, if
    /// that is more than it should have taken.
    pub(super) fn measure_at_least(&mut self, worker: WorkerId, task: Task, slots: usize, turnaround: Duration) {
        self.change_speed(worker, |member| member.measure_at_least(task, slots, turnaround));
    }

    fn change_speed(&mut self, worker: WorkerId, change: impl FnOnce(&mut Member)) {
        self.means = Default::default();
        let Some(member) = self.get_mut(worker) else { return };
        let (before, workers_before) = (member.slots_per_sec, member.workers);
        change(member);
        let (after, workers) = (member.slots_per_sec, member.workers);
        if member.connected {
            self.speeds.subtract(before, workers_before);
            self.speeds.add(after, workers);
            self.connected_workers = self.connected_workers - workers_before as usize + workers as usize;
        }
    }

    /// Takes note of how many workers a member stands for now. What each of them does is expected to stay the same.
    pub(super) fn set_workers(&mut self, worker: WorkerId, workers: u32) {
        self.change_speed(worker, |member| {
            let factor = f64::from(workers) / f64::from(member.workers);
            member.slots_per_sec = member.slots_per_sec.map(|speed| speed * factor);
            member.workers = workers;
        });
    }

    /// Nothing is noted of anybody's unchecked blocks any more.
    pub(super) fn forget_unchecked(&mut self) {
        self.members.iter_mut().flatten().for_each(|member| member.noted_unchecked = false);
    }

    /// How many members' control streams are open.
    pub(super) fn connected_count(&self) -> usize {
        self.connected
    }

    /// How many workers these stand for.
    pub(super) fn connected_workers(&self) -> usize {
        self.connected_workers
    }

    /// All members, in the order in which they were admitted.
    pub(super) fn iter(&self) -> impl Iterator<Item = (WorkerId, &Member)> {
        let ids = (self.first + 1..).map(WorkerId);
        ids.zip(&self.members).filter_map(|(worker, member)| Some((worker, member.as_deref()?)))
    }

    /// The members whose control stream is open.
    pub(super) fn connected(&self) -> impl Iterator<Item = (WorkerId, &Member)> {
        self.iter().filter(|(_, member)| member.connected)
    }

    /// Whether there is no member, connected or not.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether nobody was ever admitted.
    pub(super) fn none_so_far(&self) -> bool {
        self.first == 0 && self.members.is_empty()
    }

    /// Each connected member's part of `slots` slots by its speed.
    pub(super) fn shares(&self, slots: u32) -> Shares<'_> {
        Shares::new(slots, self.speeds, self)
    }

    /// Seconds that a slot takes a worker, on average over those of whom it is known; `None` while it is of nobody.
    pub(super) fn mean_secs_per_slot(&self, task: Task) -> Option<f64> {
        *self.means[task as usize].get_or_init(|| {
            let known = self.iter().filter_map(|(_, member)| member.secs_per_slot(task));
            let (sum, count) = known.fold((0.0, 0), |(sum, count), secs| (sum + secs, count + 1));
            (count > 0).then(|| sum / f64::from(count))
        })
    }

    /// When the next member is to be given up, should nothing be heard from it.
    pub(super) fn next_silence(&self, timeout: Duration) -> Option<Time> {
        self.heard.front().map(|(at, _)| *at + timeout)
    }

    /// The members of whom nothing was heard for `timeout`.
    pub(super) fn silent(&self, now: Time, timeout: Duration) -> Vec<WorkerId> {
        let long_ago = self.heard.iter().take_while(|(at, _)| *at + timeout <= now);
        let silent = long_ago.filter(|(at, worker)| self.was_last_heard(*worker, *at));
        let mut silent: Vec<WorkerId> = silent.map(|(_, worker)| *worker).collect();
        silent.sort();
        silent
    }
}
