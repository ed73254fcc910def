//! Who is here, and how to reach them: what a coordinator and a relay do alike with those who join and leave.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use lockstep_proto::v1;
use lockstep_proto::v1::coordinator_message::Kind as Message;
use tokio::sync::mpsc;

use crate::engine::command::{Refusal, ReleaseReason};
use crate::engine::{Event, LeaseId, Ticket, WorkerId};
use crate::exchange::Staging;
use crate::input::Applicant;
use crate::observe::{Observer, RunEvent};
use crate::service::unix_nanos;

/// A worker that was admitted.
struct Member {
    name: String,
    /// To its control stream, from when it is opened to when nothing more will be said.
    out: Option<mpsc::UnboundedSender<Message>>,
    clock_offset_nanos: i64,
}

/// The members, and those who asked to be.
pub(crate) struct Roster {
    members: BTreeMap<WorkerId, Member>,
    /// Requests to join that the engine has not answered.
    joining: HashMap<Ticket, Applicant>,
    next_ticket: u64,
    staging: Arc<Staging>,
    observer: Observer,
}

impl Roster {
    /// Nobody yet. Vectors of those who come wait in `staging`; `observer` hears of coming and going.
    pub(crate) fn new(staging: Arc<Staging>, observer: Observer) -> Self {
        Self { members: BTreeMap::new(), joining: HashMap::new(), next_ticket: 0, staging, observer }
    }

    /// A worker wants to join.
    pub(crate) fn ask(&mut self, applicant: Applicant) -> Event {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        let Applicant { name, device, class, workers, .. } = &applicant;
        let (name, device, class, workers) = (name.clone(), device.clone(), *class, *workers);
        self.joining.insert(ticket, applicant);
        Event::JoinRequested { ticket, name, device, class, workers }
    }

    /// A worker opened its control stream, to which `out` leads.
    pub(crate) fn open(&mut self, worker: WorkerId, out: mpsc::UnboundedSender<Message>) -> Event {
        match self.members.get_mut(&worker) {
            Some(member) => member.out = Some(out),
            // Not, or no longer, a member: dropping the sender closes the stream.
            None => drop(out),
        }
        Event::ControlOpened { worker }
    }

    /// A control stream ended. That a worker leaves is no news once all were let go.
    pub(crate) fn close(&mut self, worker: WorkerId, reason: String, is_news: bool) -> Event {
        self.staging.forget_worker(worker);
        if self.members.remove(&worker).is_some() && is_news {
            self.tell(&RunEvent::WorkerLeft { worker: worker.0, reason, workers: self.members.len() });
        }
        Event::ControlClosed { worker }
    }

    /// A worker lives: it is told that this was heard.
    pub(crate) fn heartbeat(&mut self, worker: WorkerId, sent_unix_nanos: u64, clock_offset_nanos: i64) -> Event {
        if let Some(member) = self.members.get_mut(&worker) {
            member.clock_offset_nanos = clock_offset_nanos;
        }
        let received_unix_nanos = unix_nanos();
        self.send(worker, Message::HeartbeatAck(v1::HeartbeatAck { sent_unix_nanos, received_unix_nanos }));
        Event::Heartbeat { worker }
    }

    /// Makes the worker that holds the ticket a member.
    pub(crate) fn admit(&mut self, ticket: Ticket, worker: WorkerId) {
        let Some(Applicant { name, device, reply, .. }) = self.joining.remove(&ticket) else { return };
        self.staging.admit(worker);
        let member = Member { name: name.clone(), out: None, clock_offset_nanos: 0 };
        self.members.insert(worker, member);
        let workers = self.members.len();
        self.tell(&RunEvent::WorkerJoined { worker: worker.0, name, device, workers });
        // A worker that hung up meanwhile will be found silent.
        let _ = reply.send(Ok(worker));
    }

    /// Turns the worker that holds the ticket away.
    pub(crate) fn refuse(&mut self, ticket: Ticket, reason: Refusal) {
        let Some(Applicant { name, reply, .. }) = self.joining.remove(&ticket) else { return };
        self.tell(&RunEvent::WorkerRefused { name, reason: reason.to_string() });
        let _ = reply.send(Err(reason));
    }

    /// Ends a membership for good.
    pub(crate) fn release(&mut self, worker: WorkerId, reason: &ReleaseReason) {
        let run_goes_on = !matches!(reason, ReleaseReason::RunOver(_));
        self.send(worker, Message::Release(v1::Release { reason: reason.to_string(), run_goes_on }));
        if let (ReleaseReason::Declined { .. } | ReleaseReason::Quarantined { .. }, Some(member)) =
            (reason, self.members.get_mut(&worker))
        {
            member.out = None;
        }
    }

    /// Closes a worker's control stream.
    pub(crate) fn disconnect(&mut self, worker: WorkerId, reason: String) {
        self.staging.forget_worker(worker);
        if self.members.remove(&worker).is_some() {
            self.tell(&RunEvent::WorkerLeft { worker: worker.0, reason, workers: self.members.len() });
        }
    }

    /// Says that a lease is no longer wanted.
    pub(crate) fn revoke(&self, worker: WorkerId, lease: LeaseId) {
        self.send(worker, Message::Revoke(v1::Revoke { lease_id: lease.0 }));
    }

    /// Sends a message to a member.
    pub(crate) fn send(&self, worker: WorkerId, message: Message) {
        // A closed stream is news of its own: `Input::Closed` is on its way.
        if let Some(out) = self.members.get(&worker).and_then(|member| member.out.as_ref()) {
            let _ = out.send(message);
        }
    }

    /// Sends a message to all members.
    pub(crate) fn send_all(&self, message: &Message) {
        self.members.keys().for_each(|worker| self.send(*worker, message.clone()));
    }

    /// Whether there is a member whose control stream has not been closed: it is open, or about to be opened.
    pub(crate) fn has_company(&self) -> bool {
        !self.members.is_empty()
    }

    /// Ends the control streams, after what was sent on them.
    pub(crate) fn hang_up(&mut self) {
        self.members.values_mut().for_each(|member| member.out = None);
    }

    /// A member's name, and what to add to its clock to get this machine's, in nanoseconds.
    pub(crate) fn look(&self, worker: WorkerId) -> Option<(&str, i64)> {
        self.members.get(&worker).map(|member| (member.name.as_str(), member.clock_offset_nanos))
    }

    fn tell(&self, event: &RunEvent) {
        (self.observer)(event);
    }
}
