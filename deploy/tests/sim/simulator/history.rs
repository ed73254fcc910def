//! A run as it looks from outside the engine: what invariants are checked against.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use lockstep_coordinator::engine::command::{Lease, Outcome, ReleaseReason, Task};
use lockstep_coordinator::engine::event::BlockDone;
use lockstep_coordinator::engine::{Command, EngineConfig, Event, LeaseId, Start, Ticket, WorkerId};
use lockstep_model::batch::Sums;
use lockstep_model::tree::Block;

use super::numbers::{Numbers, Params, Quiet, Vector};

/// Something that invariants speak of.
#[derive(Debug)]
pub(crate) enum Seen<'a> {
    /// The engine is about to hear this; of what comes from a worker, for which start of the coordinator it was meant.
    Heard { event: &'a Event, meant_for: Option<u64> },
    /// The engine decided this, and it is about to be carried out.
    Decided(&'a Command),
    /// An accepted gradient enters the sum.
    Added { block: Block, vector: Option<Vector> },
    /// The optimizer applied a step, and the new version is published.
    Applied { step: u64, params: Params, skipped: bool },
    /// A coordinator starts, or the run goes back: to a checkpoint (`saved`), or to the beginning. `newest` is the newest
    /// that it could have been.
    Restored { step: u64, params: Params, saved: bool, newest: u64 },
    /// A validation loss is written down, and whether it was there already.
    Validated { step: u64, sums: Sums, already: bool },
    /// Everything that follows from an event is done. How many vectors wait.
    Settled { staged: usize },
    /// The run is over for good, with these validation losses.
    Over { outcome: &'a Outcome, validations: &'a [(u64, Sums)] },
}

/// A member.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) connected: bool,
}

/// An open lease.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    pub(crate) lease: Lease,
    /// Whether its gradient is on its way.
    pub(crate) travels: bool,
    /// Whether its result has come.
    pub(crate) answered: bool,
}

/// What is known of a run under one coordinator.
#[derive(Debug)]
pub(crate) struct History {
    pub(crate) config: EngineConfig,
    pub(crate) numbers: Numbers,
    pub(crate) quiet: Rc<Quiet>,
    /// Names of workers that may compute wrong.
    pub(crate) wrong: Rc<BTreeSet<String>>,
    pub(crate) incarnation: u64,
    /// What is published.
    pub(crate) version: u64,
    pub(crate) params: Params,
    /// Whether the optimizer works, or an earlier version is being restored.
    pub(crate) changing: bool,
    pub(crate) finished: bool,
    pub(crate) stop_requested: bool,
    pub(crate) joining: BTreeMap<Ticket, String>,
    pub(crate) members: BTreeMap<WorkerId, Member>,
    pub(crate) open: BTreeMap<(WorkerId, LeaseId), Open>,
    /// What the last result came under.
    pub(crate) answering: Option<(WorkerId, LeaseId)>,
    /// Blocks that count in the work under way.
    pub(crate) counted: Vec<Block>,
    /// Results that came in time for the work under way, with the name of who computed them.
    pub(crate) results: Vec<(String, BlockDone)>,
    /// Names of those whose result for a block that counts is not what two others computed.
    pub(crate) outvoted: BTreeSet<String>,
    pub(crate) quarantined: BTreeSet<String>,
    /// By name, the first step in which a gradient counts that no other worker confirmed.
    pub(crate) unchecked_since: BTreeMap<String, u64>,
    /// Whether what the first version says of rows is known.
    pub(crate) referenced: bool,
    /// The checkpoint being written, and the newest on disk.
    pub(crate) writing: Option<u64>,
    pub(crate) saved: Option<u64>,
}

impl History {
    pub(crate) fn new(
        config: EngineConfig,
        numbers: Numbers,
        quiet: Rc<Quiet>,
        wrong: Rc<BTreeSet<String>>,
        incarnation: u64,
    ) -> Self {
        let unchecked_since = match &config.start {
            Start::Fresh | Start::Relay => BTreeMap::new(),
            Start::Resumed { unchecked_since, .. } => unchecked_since.clone(),
        };
        let (quarantined, referenced) = (config.quarantined.clone(), config.reference_slots == 0);
        Self {
            config,
            numbers,
            params: numbers.initial(),
            quiet,
            wrong,
            incarnation,
            version: 0,
            changing: false,
            finished: false,
            stop_requested: false,
            joining: BTreeMap::new(),
            members: BTreeMap::new(),
            open: BTreeMap::new(),
            answering: None,
            counted: Vec::new(),
            results: Vec::new(),
            outvoted: BTreeSet::new(),
            quarantined,
            unchecked_since,
            referenced,
            writing: None,
            saved: None,
        }
    }

    /// How many members have their control stream open.
    pub(crate) fn connected(&self) -> usize {
        self.members.values().filter(|member| member.connected).count()
    }

    /// The result that came under a lease.
    pub(crate) fn result(&self, worker: WorkerId, lease: LeaseId) -> Option<&BlockDone> {
        let mut results = self.results.iter().map(|(_, done)| done);
        results.find(|done| (done.worker, done.lease) == (worker, lease))
    }

    /// The names of those whose result equals the one that came under a lease, its own among them; twice the one who
    /// gave it twice.
    pub(crate) fn opinions(&self, worker: WorkerId, lease: LeaseId) -> Vec<&str> {
        let Some(counted) = self.result(worker, lease) else { return Vec::new() };
        let equal = self.results.iter().filter(|(_, done)| same(done, counted));
        equal.map(|(name, _)| name.as_str()).collect()
    }

    /// The names of those whose result for the same block is another.
    fn contradictions(&self, worker: WorkerId, lease: LeaseId) -> Vec<String> {
        let Some(counted) = self.result(worker, lease) else { return Vec::new() };
        let others = self.results.iter().filter(|(_, done)| done.block == counted.block && !same(done, counted));
        others.map(|(name, _)| name.clone()).collect()
    }

    /// Whether another worker confirmed the result that came under a lease.
    pub(crate) fn is_confirmed(&self, worker: WorkerId, lease: LeaseId) -> bool {
        self.opinions(worker, lease).windows(2).any(|pair| pair[0] != pair[1])
    }

    /// Takes note of what was seen.
    pub(crate) fn note(&mut self, seen: &Seen<'_>) {
        match seen {
            Seen::Heard { event, .. } => self.note_event(event),
            Seen::Decided(command) => self.note_command(command),
            Seen::Applied { step, params, .. } => {
                self.version = *step;
                self.params = *params;
                self.changing = false;
            }
            Seen::Restored { step, params, saved, .. } => {
                self.version = *step;
                self.params = *params;
                self.changing = false;
                self.saved = saved.then_some(*step);
                self.begin_work();
                self.unchecked_since.retain(|_, since| *since <= *step);
            }
            Seen::Added { .. } | Seen::Validated { .. } | Seen::Settled { .. } | Seen::Over { .. } => {}
        }
    }

    fn begin_work(&mut self) {
        self.counted.clear();
        self.results.clear();
    }

    fn note_event(&mut self, event: &Event) {
        self.answering = None;
        match event {
            Event::JoinRequested { ticket, name, .. } => drop(self.joining.insert(*ticket, own_name(name))),
            Event::ControlOpened { worker } => {
                if let Some(member) = self.members.get_mut(worker) {
                    member.connected = true;
                }
            }
            Event::ControlClosed { worker } => self.forget(*worker),
            Event::PushBegun { worker, lease } => {
                if let Some(open) = self.open.get_mut(&(*worker, *lease)) {
                    open.travels = true;
                }
            }
            Event::BlockDone(done) => {
                self.answering = Some((done.worker, done.lease));
                let Some(open) = self.open.get_mut(&(done.worker, done.lease)) else { return };
                let Lease { step, version, task, block, .. } = open.lease;
                let fits = (done.step, done.version, done.task, done.block) == (step, version, task, block);
                if let (false, true, Some(member)) = (open.answered, fits, self.members.get(&done.worker)) {
                    self.results.push((member.name.clone(), done.clone()));
                }
                open.answered = true;
            }
            Event::CheckpointWritten { step } => {
                self.writing = None;
                self.saved = Some(*step);
            }
            Event::CheckpointFailed { .. } => self.writing = None,
            Event::StopRequested { .. } => self.stop_requested = true,
            _ => {}
        }
    }

    fn note_command(&mut self, command: &Command) {
        match command {
            Command::Admit { ticket, worker, .. } => {
                let name = self.joining.remove(ticket).unwrap_or_default();
                self.members.insert(*worker, Member { name, connected: false });
            }
            Command::Refuse { ticket, .. } => drop(self.joining.remove(ticket)),
            Command::Lease { worker, lease } => {
                self.open.insert((*worker, lease.id), Open { lease: *lease, travels: false, answered: false });
            }
            Command::Accept { worker, lease, step, block } => {
                let confirmed = self.is_confirmed(*worker, *lease);
                if confirmed {
                    self.outvoted.extend(self.contradictions(*worker, *lease));
                }
                let open = self.open.remove(&(*worker, *lease));
                if let (false, Some(Open { lease: Lease { task: Task::Gradient, .. }, .. }), Some(member)) =
                    (confirmed, open, self.members.get(worker))
                {
                    self.unchecked_since.entry(member.name.clone()).or_insert(*step);
                }
                self.counted.push(*block);
            }
            Command::Discard { worker, lease, .. } => drop(self.open.remove(&(*worker, *lease))),
            Command::ApplyStep { .. } => {
                self.changing = true;
                self.begin_work();
            }
            Command::RecordValidation { .. } => self.begin_work(),
            Command::RecordReferences => {
                self.referenced = true;
                self.begin_work();
            }
            Command::RestartStep { step } => {
                self.begin_work();
                self.unchecked_since.retain(|_, since| *since < *step);
            }
            Command::RollBack { .. } => {
                self.changing = true;
                self.begin_work();
            }
            Command::Checkpoint { step } => self.writing = Some(*step),
            Command::Release { worker, reason } => {
                if let (ReleaseReason::Quarantined { .. }, Some(member)) = (reason, self.members.get(worker)) {
                    self.quarantined.insert(member.name.clone());
                }
                self.forget(*worker);
            }
            Command::Disconnect { worker, .. } => self.forget(*worker),
            Command::Quarantine { name } => drop(self.quarantined.insert(own_name(name))),
            Command::Finish { .. } => self.finished = true,
            Command::Sample { .. } | Command::Report(_) => {}
            Command::GiveBack { .. } => unreachable!("there are no relays"),
        }
    }

    fn forget(&mut self, worker: WorkerId) {
        self.members.remove(&worker);
    }
}

/// The name of a worker, whatever it calls itself by now: see [`Mutation::rename`](super::Mutation::rename).
fn own_name(name: &str) -> String {
    name.split('/').next().unwrap_or_default().to_owned()
}

/// Whether two results are equal to the bit and for the same block.
fn same(one: &BlockDone, other: &BlockDone) -> bool {
    let bits = |sums: &Sums| (sums.loss.to_bits(), sums.weight.to_bits());
    let slots = |done: &BlockDone| done.slot_sums.iter().map(bits).collect::<Vec<_>>();
    (one.task, one.block, one.digest) == (other.task, other.block, other.digest)
        && bits(&one.sums) == bits(&other.sums)
        && slots(one) == slots(other)
}
