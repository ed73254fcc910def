//! How workers come and go, and what becomes of their leases.

use super::command::{Command, DiscardReason, DisconnectReason, Failure, Outcome, Refusal, ReleaseReason};
use super::event::KeptBlock;
use super::id::{DeviceClass, LeaseId, Ticket, WorkerId};
use super::members::Member;
use super::{Engine, Phase};

/// After so many leases declined in a row, a worker is released.
const DECLINES_BEFORE_RELEASE: u32 = 3;

impl Engine {
    /// Admits or refuses a worker. The first one admitted decides the class of an exact run.
    pub(super) fn join(&mut self, ticket: Ticket, name: String, device: String, class: DeviceClass, workers: u32) {
        let other_class = self.classes.first().filter(|_| self.config.exact && !self.classes.contains(&class));
        let refusal = match (self.ending(), other_class) {
            (Some(outcome), _) => Some(Refusal::Ending { outcome }),
            (None, _) if self.quarantined.contains(&name) => Some(Refusal::Quarantined),
            (None, Some(relay)) if self.config.is_relay() => {
                Some(Refusal::OtherClassThanRelay { relay: *relay, worker: class })
            }
            (None, Some(run)) => Some(Refusal::OtherClass { run: *run, worker: class }),
            (None, None) => None,
        };
        if let Some(reason) = refusal {
            return self.command(Command::Refuse { ticket, reason });
        }
        self.classes.insert(class);
        let worker = self.members.admit(name, device, class, workers, self.now);
        self.command(Command::Admit { ticket, worker, class });
    }

    /// A control stream is open: its worker can be leased work, unless it has no business here.
    pub(super) fn connect(&mut self, worker: WorkerId) {
        self.hear(worker);
        if self.members.connect(worker) {
            if let (Some(member), Phase::Work(work)) = (self.members.get(worker), &mut self.phase) {
                work.leases_mut().arrive(worker, member.workers);
            }
            return;
        }
        match &self.phase {
            // It was admitted before the run was over, and could not be told.
            Phase::Finished(outcome) => {
                let reason = ReleaseReason::RunOver(outcome.clone());
                self.command(Command::Release { worker, reason });
            }
            _ => self.command(Command::Disconnect { worker, reason: DisconnectReason::NotAMember }),
        }
    }

    /// Takes note of what a worker still has from an earlier membership.
    pub(super) fn offer(&mut self, worker: WorkerId, blocks: Vec<KeptBlock>) {
        self.hear(worker);
        if let Some(member) = self.members.get_mut(worker) {
            member.kept = blocks;
        }
    }

    /// Takes note that a worker lives.
    pub(super) fn hear(&mut self, worker: WorkerId) {
        self.members.hear(worker, self.now);
    }

    /// A worker is gone.
    pub(super) fn leave(&mut self, worker: WorkerId) {
        self.remove(worker, DiscardReason::WorkerLeft);
    }

    /// Gives up those who have been silent for too long.
    pub(super) fn give_up_silent(&mut self) {
        for worker in self.members.silent(self.now, self.config.liveness_timeout) {
            let Some(member) = self.remove(worker, DiscardReason::WorkerSilent) else { continue };
            let silence = self.now.since(member.last_heard);
            let reason = if member.connected {
                DisconnectReason::Silent { silence }
            } else {
                DisconnectReason::NeverOpened { silence }
            };
            self.command(Command::Disconnect { worker, reason });
        }
    }

    /// Takes back a lease that its worker cannot or did not compute. One who never can is released; a run whose last
    /// worker never can has failed.
    pub(super) fn decline(&mut self, worker: WorkerId, lease: LeaseId, discard: DiscardReason, reason: String) {
        self.hear(worker);
        let (Some(member), Phase::Work(work)) = (self.members.get_mut(worker), &mut self.phase) else { return };
        let Some(block) = work.leases().get(worker, lease).map(|holding| holding.block) else { return };
        work.decline(worker, lease);
        member.declined_in_a_row += 1;
        let (name, leases) = (member.name.clone(), member.declined_in_a_row);
        self.discard(worker, lease, discard);
        if self.config.is_relay() {
            self.give_back_if_nobody_computes(block, reason.clone());
        }
        if leases < DECLINES_BEFORE_RELEASE {
            return;
        }
        self.release(worker, ReleaseReason::Declined { leases, reason: reason.clone() });
        if self.members.is_empty() && !self.config.is_relay() {
            self.end(Outcome::Failed { reason: Failure::NobodyComputes { name, reason } });
        }
    }

    /// Ends a membership for good.
    pub(super) fn release(&mut self, worker: WorkerId, reason: ReleaseReason) {
        self.remove(worker, DiscardReason::WorkerReleased);
        self.command(Command::Release { worker, reason });
    }

    /// Ends a membership, and frees the blocks leased under it.
    fn remove(&mut self, worker: WorkerId, reason: DiscardReason) -> Option<Member> {
        let member = self.members.remove(worker)?;
        if let Phase::Work(work) = &mut self.phase {
            let held: Vec<LeaseId> = work.leases().of(worker).collect();
            for lease in &held {
                work.take_back(worker, *lease);
            }
            work.leases_mut().depart(worker);
            for lease in held.into_iter().chain(work.bid_farewell(worker)) {
                *self.discards.entry(reason).or_default() += 1;
                self.commands.push(Command::Discard { worker, lease, reason });
            }
        }
        Some(member)
    }
}
