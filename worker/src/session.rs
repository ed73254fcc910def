//! What a worker does next, from admission to the end of one membership: a pure state machine.
//!
//! Events go in, commands come out; whoever drives the session carries them out and reports back. It knows leases and
//! parameter versions by name only, takes the time as an argument and has no other input, so the same events give the
//! same commands in a running worker and in a simulation in virtual time.
//!
//! A lease waits in the queue, is computed, and, if it is a gradient, uploaded. It ends with exactly one of
//! [`Command::SendResult`], [`Command::SendDeclined`] and [`Command::Discard`], unless the membership ends first. The device
//! does one thing at a time: it takes parameters or computes. Uploads go on beside it. What a relay has in a device's place
//! computes several leases at once, if they are of one step.
//!
//! Gradients that were computed in earlier memberships are offered first of all. A lease that asks for one of them is not
//! computed but answered from memory, once: a coordinator that asks a second time wants it computed anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::lease::{GradientName, Lease, Parameters, Task};

/// Uploads under way at once. While the device computes one block the one before it travels; with more than that waiting,
/// the network is the bottleneck and computed vectors would only pile up in memory.
const MAX_UPLOADS: usize = 2;

/// How often a vector that arrives damaged is sent in all. Damage that repeats is not chance: a new connection may help.
pub(crate) const MAX_ATTEMPTS: u32 = 3;

/// The coordinator's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between heartbeats.
    pub heartbeat_interval: Duration,
    /// Silence after which either side gives the other up.
    pub liveness_timeout: Duration,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The coordinator lends a block.
    Leased(Lease),
    /// The coordinator lends something that makes no sense.
    Unreadable {
        /// The lease's id.
        lease: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The coordinator wants a lease no longer.
    Revoked {
        /// The lease's id.
        lease: u64,
    },
    /// The coordinator heard a heartbeat.
    HeartbeatAcked,
    /// The coordinator ends the membership for good.
    Released {
        /// Why, in its words.
        reason: String,
        /// Whether the run goes on without this worker.
        run_goes_on: bool,
    },
    /// A [`Command::Pull`] succeeded: the device holds this version, and no other.
    ParametersArrived {
        /// The version.
        parameters: Parameters,
    },
    /// A [`Command::Pull`] failed.
    PullFailed {
        /// The version.
        parameters: Parameters,
        /// How.
        failure: TransferFailure,
    },
    /// A [`Command::Compute`] succeeded.
    Computed {
        /// The lease's id.
        lease: u64,
    },
    /// A [`Command::Compute`] failed; what the device held is lost.
    ComputeFailed {
        /// The lease's id.
        lease: u64,
        /// What happened and which setting to change.
        reason: String,
    },
    /// A [`Command::Push`] succeeded.
    Pushed {
        /// The lease's id.
        lease: u64,
    },
    /// A [`Command::Push`] failed.
    PushFailed {
        /// The lease's id.
        lease: u64,
        /// How.
        failure: TransferFailure,
    },
    /// Time passed: [`Session::next_deadline`] is reached.
    Tick,
}

impl Event {
    /// Whether it shows that the coordinator lives and can be heard on the control stream.
    fn comes_from_coordinator(&self) -> bool {
        match self {
            Self::Leased(_) | Self::Unreadable { .. } | Self::Revoked { .. } => true,
            Self::HeartbeatAcked | Self::Released { .. } => true,
            Self::ParametersArrived { .. } | Self::PullFailed { .. } => false,
            Self::Computed { .. } | Self::ComputeFailed { .. } => false,
            Self::Pushed { .. } | Self::PushFailed { .. } | Self::Tick => false,
        }
    }
}

/// How a vector failed to arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferFailure {
    /// Bytes changed or were lost on the way; sending it again may help.
    Damaged(String),
    /// The receiving side does not want or have it; sending it again does not help.
    Refused(String),
    /// The connection is gone.
    Disconnected(String),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Tell the coordinator which gradients are kept from earlier memberships; the first message of this one.
    SendKept(Vec<GradientName>),
    /// Fetch parameters and load them into the device, in place of those it holds.
    Pull {
        /// The version.
        parameters: Parameters,
        /// The lease that needs them.
        lease: u64,
    },
    /// Compute a lease with the parameters loaded.
    Compute {
        /// The lease's id.
        lease: u64,
    },
    /// Take the gradient that a lease asks for from memory, as if it had been computed.
    Recall {
        /// The lease's id.
        lease: u64,
    },
    /// Nothing more will be recalled in this membership.
    Forget,
    /// Send the gradient of a computed or recalled lease.
    Push {
        /// The lease's id.
        lease: u64,
    },
    /// Stop computing a lease, which leaves the parameters in the device, or stop sending it. Nothing need be reported.
    Abandon {
        /// The lease's id.
        lease: u64,
    },
    /// Report a lease done, and forget it.
    SendResult {
        /// The lease's id.
        lease: u64,
    },
    /// Give a lease back, and forget it.
    SendDeclined {
        /// The lease's id.
        lease: u64,
        /// What happened and which setting to change.
        reason: String,
    },
    /// Forget a lease that nobody wants.
    Discard {
        /// The lease's id.
        lease: u64,
    },
    /// Tell the coordinator that this worker lives.
    SendHeartbeat,
    /// End the membership. Nothing follows.
    Leave(Departure),
}

/// Why a membership ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The run is over, the coordinator said: do not join again.
    Released(String),
    /// The run goes on without this worker, the coordinator said: do not join again.
    Dismissed(String),
    /// The coordinator cannot be reached as it is: join again.
    Lost(String),
    /// A relay whose last worker is gone: join again with the next one.
    Deserted,
}

/// One membership.
#[derive(Clone, Debug)]
pub struct Session {
    timing: Timing,
    /// What is to be offered to the coordinator, until that is done.
    offer: Vec<GradientName>,
    /// What can be answered from memory.
    kept: BTreeSet<GradientName>,
    /// Leases not started, in the order of arrival.
    queue: VecDeque<Lease>,
    device: Device,
    /// How many leases the device computes at once.
    places: usize,
    /// The parameters in the device.
    held: Option<Parameters>,
    /// Leases on their way to the coordinator, with the number of the attempt.
    uploads: BTreeMap<u64, u32>,
    heartbeat_due: Duration,
    /// When the coordinator last said anything.
    last_heard: Duration,
}

/// What the device is doing.
#[derive(Clone, Debug)]
enum Device {
    Pulling {
        parameters: Parameters,
        attempt: u32,
    },
    /// Leases of one task of one step, with the same parameters; none: it is idle.
    Computing(Vec<Lease>),
}

/// Nothing at all.
const IDLE: Device = Device::Computing(Vec::new());

impl Session {
    /// A membership that begins at `now`, counted from any fixed origin, with the gradients `kept` from earlier ones, from the
    /// oldest to the newest. The first heartbeat is due at once.
    pub fn new(timing: Timing, kept: Vec<GradientName>, now: Duration) -> Self {
        Self {
            timing,
            kept: kept.iter().copied().collect(),
            offer: kept,
            queue: VecDeque::new(),
            device: IDLE,
            places: 1,
            held: None,
            uploads: BTreeMap::new(),
            heartbeat_due: now,
            last_heard: now,
        }
    }

    /// The same, of a device that computes up to so many leases of a step at once.
    pub fn with_places(self, places: usize) -> Self {
        Self { places: places.max(1), ..self }
    }

    /// When the session wants a [`Event::Tick`].
    pub fn next_deadline(&self) -> Duration {
        self.heartbeat_due.min(self.last_heard + self.timing.liveness_timeout)
    }

    /// Takes one event and says what to do, in order. Reports about leases that are no longer here are ignored.
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Command> {
        if event.comes_from_coordinator() {
            self.last_heard = now;
        }
        let mut commands = match std::mem::take(&mut self.offer) {
            kept if kept.is_empty() => Vec::new(),
            kept => vec![Command::SendKept(kept)],
        };
        commands.extend(match event {
            Event::Leased(lease) => self.leased(lease),
            Event::Unreadable { lease, .. } if self.knows(lease) => Vec::new(),
            Event::Unreadable { lease, reason } => vec![Command::SendDeclined { lease, reason }],
            Event::Revoked { lease } => self.revoked(lease),
            Event::HeartbeatAcked => Vec::new(),
            Event::Released { reason, run_goes_on: false } => vec![Command::Leave(Departure::Released(reason))],
            Event::Released { reason, run_goes_on: true } => vec![Command::Leave(Departure::Dismissed(reason))],
            Event::ParametersArrived { parameters } => self.parameters_arrived(parameters),
            Event::PullFailed { parameters, failure } => self.pull_failed(parameters, failure),
            Event::Computed { lease } => self.computed(lease),
            Event::ComputeFailed { lease, reason } => self.compute_failed(lease, reason),
            Event::Pushed { lease } => match self.uploads.remove(&lease) {
                Some(_) => vec![Command::SendResult { lease }],
                None => Vec::new(),
            },
            Event::PushFailed { lease, failure } => self.push_failed(lease, failure),
            Event::Tick => self.tick(now),
        });
        if !matches!(commands.last(), Some(Command::Leave(_))) {
            commands.extend(self.start_next());
        }
        commands
    }

    /// Whether a lease has come and is not over.
    fn knows(&self, id: u64) -> bool {
        self.computing().iter().any(|lease| lease.id == id)
            || self.uploads.contains_key(&id)
            || self.queue.iter().any(|lease| lease.id == id)
    }

    /// The leases that the device computes.
    fn computing(&self) -> &[Lease] {
        match &self.device {
            Device::Computing(leases) => leases,
            Device::Pulling { .. } => &[],
        }
    }

    fn leased(&mut self, lease: Lease) -> Vec<Command> {
        if self.knows(lease.id) {
            return Vec::new();
        }
        self.queue.push_back(lease);
        let past = lease.task == Task::Gradient && self.kept.iter().all(|kept| kept.step < lease.step);
        match past && !self.kept.is_empty() {
            true => {
                self.kept.clear();
                vec![Command::Forget]
            }
            false => Vec::new(),
        }
    }

    fn revoked(&mut self, id: u64) -> Vec<Command> {
        if let Some(place) = self.queue.iter().position(|lease| lease.id == id) {
            self.queue.remove(place);
            return vec![Command::Discard { lease: id }];
        }
        let under_way = self.finish_computing(id).is_some() || self.uploads.remove(&id).is_some();
        match under_way {
            true => vec![Command::Abandon { lease: id }, Command::Discard { lease: id }],
            false => Vec::new(),
        }
    }

    fn parameters_arrived(&mut self, arrived: Parameters) -> Vec<Command> {
        if matches!(self.device, Device::Pulling { parameters, .. } if parameters == arrived) {
            self.device = IDLE;
            self.held = Some(arrived);
        }
        Vec::new()
    }

    fn pull_failed(&mut self, failed: Parameters, failure: TransferFailure) -> Vec<Command> {
        let Device::Pulling { parameters, attempt } = self.device else { return Vec::new() };
        if parameters != failed {
            return Vec::new();
        }
        self.device = IDLE;
        match failure {
            TransferFailure::Damaged(_) if attempt < MAX_ATTEMPTS => self.start_pull(attempt + 1),
            TransferFailure::Refused(reason) => {
                let (declined, others): (Vec<_>, Vec<_>) =
                    self.queue.drain(..).partition(|lease| lease.parameters == parameters);
                self.queue = others.into();
                declined.iter().map(|l| Command::SendDeclined { lease: l.id, reason: reason.clone() }).collect()
            }
            TransferFailure::Damaged(reason) | TransferFailure::Disconnected(reason) => {
                let version = parameters.version;
                vec![Command::Leave(Departure::Lost(format!("version {version} did not arrive: {reason}")))]
            }
        }
    }

    fn computed(&mut self, id: u64) -> Vec<Command> {
        match self.finish_computing(id) {
            None => Vec::new(),
            Some(Task::Evaluate | Task::Reference) => vec![Command::SendResult { lease: id }],
            Some(Task::Gradient) => {
                self.uploads.insert(id, 1);
                vec![Command::Push { lease: id }]
            }
        }
    }

    fn compute_failed(&mut self, id: u64, reason: String) -> Vec<Command> {
        match self.finish_computing(id) {
            None => Vec::new(),
            Some(_) => {
                self.held = None;
                vec![Command::SendDeclined { lease: id, reason }]
            }
        }
    }

    /// Frees the place that the device had for this lease, if it was computing it: its task.
    fn finish_computing(&mut self, id: u64) -> Option<Task> {
        let Device::Computing(leases) = &mut self.device else { return None };
        let place = leases.iter().position(|lease| lease.id == id)?;
        Some(leases.remove(place).task)
    }

    fn push_failed(&mut self, lease: u64, failure: TransferFailure) -> Vec<Command> {
        let Some(attempt) = self.uploads.remove(&lease) else { return Vec::new() };
        match failure {
            TransferFailure::Damaged(_) if attempt < MAX_ATTEMPTS => {
                self.uploads.insert(lease, attempt + 1);
                vec![Command::Push { lease }]
            }
            TransferFailure::Refused(reason) => vec![Command::SendDeclined { lease, reason }],
            TransferFailure::Damaged(reason) | TransferFailure::Disconnected(reason) => {
                vec![Command::Leave(Departure::Lost(format!("lease {lease} could not be sent: {reason}")))]
            }
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Command> {
        let silence = now.saturating_sub(self.last_heard);
        if silence >= self.timing.liveness_timeout {
            let reason = format!("the coordinator has said nothing for {:.1} s", silence.as_secs_f64());
            return vec![Command::Leave(Departure::Lost(reason))];
        }
        if now < self.heartbeat_due {
            return Vec::new();
        }
        self.heartbeat_due = now + self.timing.heartbeat_interval;
        vec![Command::SendHeartbeat]
    }

    /// Starts what can be started: sends what is answered from memory, and gives an idle device the lease at the head of the
    /// queue, or the parameters it needs.
    fn start_next(&mut self) -> Vec<Command> {
        let mut commands = Vec::new();
        while self.uploads.len() + self.gradients_computed() < MAX_UPLOADS
            && let Some(lease) = self.next_from_memory()
        {
            self.uploads.insert(lease, 1);
            commands.extend([Command::Recall { lease }, Command::Push { lease }]);
        }
        while self.uploads.len() < MAX_UPLOADS
            && let Device::Computing(leases) = &mut self.device
            && leases.len() < self.places
            && let Some(next) = self.queue.front().copied()
        {
            let same =
                |other: &Lease| (other.step, other.task, other.parameters) == (next.step, next.task, next.parameters);
            match self.held == Some(next.parameters) {
                true if leases.iter().all(same) => {
                    self.queue.pop_front();
                    leases.push(next);
                    commands.push(Command::Compute { lease: next.id });
                }
                false if leases.is_empty() => commands.extend(self.start_pull(1)),
                _ => break,
            }
        }
        commands
    }

    /// How many leases the device computes that will have to be uploaded once they are done.
    fn gradients_computed(&self) -> usize {
        self.computing().iter().filter(|lease| lease.task == Task::Gradient).count()
    }

    /// Takes the first lease that asks for something kept out of the queue, and what it asks for out of what is kept.
    fn next_from_memory(&mut self) -> Option<u64> {
        let place =
            self.queue.iter().position(|lease| lease.gradient_name().is_some_and(|n| self.kept.contains(&n)))?;
        let lease = self.queue.remove(place)?;
        self.kept.remove(&lease.gradient_name()?);
        Some(lease.id)
    }

    /// Has an idle device take the parameters that the lease at the head of the queue needs, if there is one.
    fn start_pull(&mut self, attempt: u32) -> Vec<Command> {
        let Some(&Lease { id, parameters, .. }) = self.queue.front() else { return Vec::new() };
        self.device = Device::Pulling { parameters, attempt };
        self.held = None;
        vec![Command::Pull { parameters, lease: id }]
    }
}

#[cfg(test)]
mod tests;
