//! What the run is doing and waiting for, in words.

use std::collections::BTreeMap;
use std::ops::Range;

use super::command::{DiscardReason, Task};
use super::finding::in_words;
use super::id::{DeviceClass, LeaseId, WorkerId};
use super::work::Work;
use super::{Counts, Engine, Phase};

/// Most workers that `waiting_for` names.
const WORKERS_NAMED: usize = 3;

/// A look at a run.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineStatus {
    /// Optimizer steps applied.
    pub step: u64,
    /// How many there are to be.
    pub total_steps: u64,
    /// What, or whom, the run waits for.
    pub waiting_for: String,
    /// Whether an evaluation is under way, and no step.
    pub evaluating: bool,
    /// Who takes part, in the order of admission.
    pub members: Vec<MemberStatus>,
    /// Device classes that took part, by earlier coordinators too; one, if the run is exact.
    pub classes: Vec<DeviceClass>,
    /// How often something happened.
    pub counts: Counts,
    /// Names of workers that computed wrong, and are not admitted any more.
    pub quarantined: Vec<String>,
    /// Results and leases that did not count, by reason.
    pub discards: BTreeMap<DiscardReason, u64>,
}

/// A look at a member.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberStatus {
    /// Its id.
    pub worker: WorkerId,
    /// Its own name.
    pub name: String,
    /// Its device in words.
    pub device: String,
    /// Its device class.
    pub class: DeviceClass,
    /// How many workers it stands for.
    pub workers: u32,
    /// Whether its control stream is open.
    pub connected: bool,
    /// Gradient slots a second while computing; `None` before its first.
    pub slots_per_sec: Option<f64>,
    /// Leases it holds.
    pub leases: Vec<LeaseId>,
    /// Blocks accepted from it.
    pub blocks_accepted: u64,
}

impl Engine {
    /// What the run is doing.
    pub fn status(&self) -> EngineStatus {
        let leases = |worker| match &self.phase {
            Phase::Work(work) => work.leases().of(worker).collect(),
            _ => Vec::new(),
        };
        let members = self.members.iter().map(|(worker, member)| MemberStatus {
            worker,
            name: member.name.clone(),
            device: member.device.clone(),
            class: member.class,
            workers: member.workers,
            connected: member.connected,
            slots_per_sec: member.slots_per_sec,
            leases: leases(worker),
            blocks_accepted: member.blocks_accepted,
        });
        EngineStatus {
            step: self.version,
            total_steps: self.config.total_steps,
            waiting_for: self.waiting_for(),
            evaluating: matches!(&self.phase, Phase::Work(work) if work.task() != Task::Gradient),
            members: members.collect(),
            classes: self.classes.iter().copied().collect(),
            counts: self.counts,
            quarantined: self.quarantined.iter().cloned().collect(),
            discards: self.discards.clone(),
        }
    }

    /// What, or whom, the run waits for, such that a person knows where to look.
    fn waiting_for(&self) -> String {
        match &self.phase {
            Phase::Begin => "its first event".to_string(),
            Phase::Idle => self.waiting_for_a_lease(),
            Phase::Work(work)
                if self.config.is_relay() && work.free_count() == 0 && work.leases().iter().next().is_none() =>
            {
                self.waiting_for_a_lease()
            }
            Phase::Work(work) => self.waiting_for_work(work),
            Phase::Apply(_) => format!("the optimizer to apply step {}", self.version + 1),
            Phase::RollBack => "an earlier version of the parameters to be restored".to_string(),
            Phase::End(_) => format!("a checkpoint of step {}", self.saving.unwrap_or(self.version)),
            Phase::Finished(outcome) => format!("nothing: {outcome}"),
        }
    }

    fn waiting_for_work(&self, work: &Work) -> String {
        let of = match work.task() {
            Task::Gradient => format!("step {}", work.step),
            Task::Evaluate => format!("the evaluation at step {}", work.step),
            Task::Reference => "the reference".into(),
        };
        let leases: Vec<(WorkerId, Range<u32>)> =
            work.leases().iter().map(|(worker, _, block)| (worker, work.range(block))).collect();
        let named = leases.iter().take(WORKERS_NAMED);
        let named =
            named.map(|(worker, slots)| format!("{} to finish {} of {of}", self.name(*worker), in_words(slots)));
        let unconfirmed = work.reviews().iter().filter(|(block, _)| !work.is_held(**block));
        let unconfirmed = unconfirmed.map(|(block, review)| {
            let (slots, names) = (in_words(&work.range(*block)), review.names().join(" and "));
            match review.is_disputed() {
                true => format!("a third worker to decide about {slots} of {of}, which {names} computed differently"),
                false => format!("a worker of another name to confirm {slots} of {of}, by {names}"),
            }
        });
        let unnamed = leases.len().saturating_sub(WORKERS_NAMED);
        let unnamed = (unnamed > 0).then(|| format!("{} to finish theirs", more_workers(unnamed)));
        let missing = (work.free_count() > 0).then(|| self.waiting_for_workers()).flatten();
        named.chain(unnamed).chain(unconfirmed).chain(missing).collect::<Vec<_>>().join(", ")
    }

    /// A relay that has nothing to lend on waits for somebody to lend it to, or for the coordinator above.
    fn waiting_for_a_lease(&self) -> String {
        self.waiting_for_workers().unwrap_or_else(|| "a lease from the coordinator".into())
    }

    /// Whom it takes before work is leased out, if anybody.
    fn waiting_for_workers(&self) -> Option<String> {
        let connected = self.members.connected_workers();
        let missing = (self.workers_needed() as usize).checked_sub(connected).filter(|missing| *missing > 0)?;
        let joining = self.members.iter().find(|(_, member)| !member.connected);
        Some(match joining {
            Some((worker, _)) => format!("{} to open its control stream", self.name(worker)),
            None if self.members.none_so_far() => "a first worker".to_string(),
            None if connected == 0 => "a worker, since every one has left".to_string(),
            None => format!("{} (cluster.min_workers = {})", more_workers(missing), self.config.min_workers),
        })
    }

    fn name(&self, worker: WorkerId) -> String {
        let member = self.members.get(worker);
        member.map_or_else(|| format!("worker {worker}"), |member| format!("worker {worker} ({})", member.name))
    }
}

fn more_workers(number: usize) -> String {
    format!("{number} more worker{}", if number == 1 { "" } else { "s" })
}
