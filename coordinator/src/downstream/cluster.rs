//! The workers of a relay during one of its memberships: from an invitation to its end.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use lockstep_model::batch::Sums;
use lockstep_model::compression::Rounding;
use lockstep_model::ledger::block_sha256;
use lockstep_model::tree::{Block, TreeSum, sum_leaves};
use lockstep_proto::v1;
use lockstep_proto::v1::coordinator_message::Kind as Message;
use tokio::sync::{mpsc, oneshot};

use super::adder::{self, Job};
use super::{BlockSum, FirstWorker, Held, Loan, Reply, Terms, lock};
use crate::background::Background;
use crate::engine::command::{Lease, Refusal, Task};
use crate::engine::{Command, Engine, EngineConfig, Event, LeaseId, Time, WorkerId};
use crate::exchange::{Publication, Staging};
use crate::input::{Applicant, Finished, Input};
use crate::observe::Observer;
use crate::roster::Roster;
use crate::sent::{Sent, SentRows};
use crate::service::{Base, Served, unix_nanos};
use crate::translate;

/// The workers, and what was lent to them.
pub(super) struct Cluster {
    pub(super) served: Arc<Served>,
    pub(super) engine: Engine,
    pub(super) stage: Stage,
    /// Positions of a slot of the last gradient that was lent.
    pub(super) slot_positions: usize,
    origin: Instant,
    queue: mpsc::UnboundedReceiver<Input>,
    roster: Roster,
    sent: SentRows,
    /// By the lease's id above.
    loans: BTreeMap<u64, UnderWay>,
    /// The result that the engine is judging.
    judging: Option<Finished>,
    adder: Background<Job>,
    held: Arc<Mutex<Held>>,
}

/// How far a membership has come.
pub(super) enum Stage {
    /// Workers may come; with the first one the relay joins.
    Invited { first: Option<oneshot::Sender<FirstWorker>>, applicants: Vec<Applicant> },
    /// The relay is a member.
    Member,
    /// It was released, and so is everybody.
    Released(v1::Release),
}

/// A block that was lent, as far as it has come.
struct UnderWay {
    loan: Loan,
    moments_blake3: Option<[u8; 32]>,
    since: Instant,
    /// Slots whose results count.
    counted: usize,
    /// Of a gradient.
    sums: TreeSum<Sums>,
    /// Of anything else, by slot.
    slot_sums: BTreeMap<u32, Sums>,
    /// Of references, by the first slot of the part that they are of.
    row_values: BTreeMap<u32, Vec<f32>>,
    reply: Reply,
}

impl Cluster {
    /// Workers join by these terms from now on.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn invite(
        terms: Terms,
        first: oneshot::Sender<FirstWorker>,
        held: Arc<Mutex<Held>>,
        observer: Observer,
    ) -> std::io::Result<Self> {
        let Terms { invitation, elements, pushed_elements, format } = terms;
        // Different from that of any other membership, of this process or one before.
        let invitation = v1::Invitation { incarnation: unix_nanos(), ..invitation };
        let liveness_timeout = Duration::from_millis(invitation.liveness_timeout_ms.into());
        let (inputs, queue) = mpsc::unbounded_channel();
        let staging = Arc::new(Staging::default());
        let base = OnceLock::new();
        if let (Some(adapters), Some((blake3, bytes))) = (&invitation.adapters, &lock(&held).base)
            && adapters.base_blake3 == blake3
        {
            let _ = base.set(Base::Memory(bytes.clone()));
        }
        let spare = staging.spare.clone();
        let adder = Background::start("relay-sums", move |jobs| adder::run(jobs, &spare))?;
        let served = Served {
            invitation,
            pushed_elements,
            inputs,
            staging: staging.clone(),
            publication: Publication::empty(elements),
            replicas: Default::default(),
            format,
            base,
        };
        Ok(Self {
            served: Arc::new(served),
            engine: Engine::new(EngineConfig::relay(liveness_timeout), Time::default()),
            stage: Stage::Invited { first: Some(first), applicants: Vec::new() },
            slot_positions: 0,
            origin: Instant::now(),
            queue,
            roster: Roster::new(staging, observer),
            sent: SentRows::default(),
            loans: BTreeMap::new(),
            judging: None,
            adder,
            held,
        })
    }

    /// What a worker did.
    pub(super) async fn next_input(&mut self) -> Option<Input> {
        self.queue.recv().await
    }

    /// When to [`tick`](Self::tick).
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.engine.next_deadline().map(|deadline| self.origin + deadline.0)
    }

    /// How many workers there are, or want to be.
    pub(super) fn workers(&self) -> u32 {
        match &self.stage {
            Stage::Invited { applicants, .. } => {
                applicants.iter().filter(|one| !one.reply.is_closed()).map(|one| one.workers).sum()
            }
            Stage::Member | Stage::Released(_) => self.engine.workers(),
        }
    }

    /// Tells who invited that the first worker has come.
    pub(super) fn present_first(&mut self) {
        if let Stage::Invited { first, applicants } = &mut self.stage
            && let Some(applicant) = applicants.first()
            && let Some(first) = first.take()
        {
            let _ = first.send(FirstWorker { class: applicant.class, device: applicant.device.clone() });
        }
    }

    /// Whether there is a worker whose control stream has not been closed.
    pub(super) fn has_company(&self) -> bool {
        self.roster.has_company()
    }

    /// The relay is a member: so are those who wait, if the engine takes them.
    pub(super) fn admit(&mut self) {
        if let Stage::Invited { applicants, .. } = std::mem::replace(&mut self.stage, Stage::Member) {
            for applicant in applicants {
                let asked = self.roster.ask(applicant);
                self.decide(asked);
            }
        }
    }

    /// The relay was refused for what its first worker computes.
    pub(super) fn refuse(&mut self, reason: &str) {
        if let Stage::Invited { applicants, .. } = &mut self.stage
            && !applicants.is_empty()
        {
            let first = applicants.remove(0);
            tracing::warn!("worker {} is not admitted: {reason}", first.name);
            let _ = first.reply.send(Err(Refusal::Above { reason: reason.into() }));
        }
    }

    /// The relay was released, and so is everybody.
    pub(super) fn release(&mut self, reason: &str, run_goes_on: bool) {
        let release = v1::Release { reason: reason.into(), run_goes_on };
        let before = std::mem::replace(&mut self.stage, Stage::Released(release));
        if let Stage::Invited { applicants, .. } = before {
            for applicant in applicants {
                let _ = applicant.reply.send(Err(Refusal::Released { reason: reason.into() }));
            }
        }
        self.tell_released();
    }

    /// Tells all who can be told that they are released; who opens its stream later is told then.
    fn tell_released(&mut self) {
        if let Stage::Released(release) = &self.stage {
            self.roster.send_all(&Message::Release(release.clone()));
            self.roster.hang_up();
        }
    }

    /// Lends a block.
    pub(super) fn lend(&mut self, mut loan: Loan, reply: Reply) {
        let work = loan.work;
        let overlaps = |other: &UnderWay| {
            let other = other.loan.work.block;
            other.contains(work.block) || work.block.contains(other)
        };
        let fits = work.block.exists(work.step_slots)
            && work.block.slots(work.step_slots).len() == loan.slots.len()
            && !matches!(self.stage, Stage::Released(_));
        if !fits || self.loans.values().any(overlaps) {
            let block = work.block;
            let _ = reply.send(Err(format!("block {block} of step {} is no block, or is lent already", work.step)));
            return;
        }
        let slots = loan.slots.len() as u32;
        let moments = std::mem::take(&mut loan.moments);
        let moments_blake3 = (!moments.is_empty()).then(|| self.served.replicas.keep(&moments));
        if work.task == Task::Gradient {
            let rounding = Rounding { format: self.served.format, seed: loan.seed, step: work.step };
            self.adder.send(Job::Begin { lease: loan.lease, block: work.block, slots, rounding });
            self.slot_positions = loan.slots.first().map_or(0, |slot| slot.positions);
        }
        let under_way = UnderWay {
            moments_blake3,
            since: Instant::now(),
            counted: 0,
            sums: TreeSum::new(slots),
            slot_sums: BTreeMap::new(),
            row_values: BTreeMap::new(),
            reply,
            loan,
        };
        self.loans.insert(under_way.loan.lease, under_way);
        self.decide(Event::Lent(work));
    }

    /// A block is not wanted any more.
    pub(super) fn withdraw(&mut self, lease: u64) {
        if let Some(under_way) = self.end(lease) {
            self.adder.send(Job::Drop { lease });
            self.decide(Event::Withdrawn { block: under_way.loan.work.block });
        }
    }

    /// Takes a block out of those that are under way.
    fn end(&mut self, lease: u64) -> Option<UnderWay> {
        let under_way = self.loans.remove(&lease)?;
        if let Some(blake3) = under_way.moments_blake3 {
            self.served.replicas.forget(blake3);
        }
        Some(under_way)
    }

    /// Time has passed.
    pub(super) fn tick(&mut self) {
        self.decide(Event::Tick);
    }

    /// Turns what a worker did into an event, and carries out what the engine decides.
    pub(super) fn hear(&mut self, input: Input) {
        let event = match input {
            Input::Join(applicant) => match &mut self.stage {
                Stage::Invited { applicants, .. } => {
                    applicants.retain(|other| !other.reply.is_closed());
                    applicants.push(applicant);
                    return;
                }
                Stage::Member => self.roster.ask(applicant),
                Stage::Released(release) => {
                    let _ = applicant.reply.send(Err(Refusal::Released { reason: release.reason.clone() }));
                    return;
                }
            },
            Input::Opened { worker, out } => {
                let opened = self.roster.open(worker, out);
                self.tell_released();
                opened
            }
            Input::Closed { worker, reason } => self.roster.close(worker, reason, matches!(self.stage, Stage::Member)),
            Input::Heartbeat { worker, sent_unix_nanos, clock_offset_nanos } => {
                self.roster.heartbeat(worker, sent_unix_nanos, clock_offset_nanos)
            }
            Input::PushBegun { worker, lease } => Event::PushBegun { worker, lease },
            Input::Workers { worker, workers } => Event::Workers { worker, workers },
            Input::Kept { worker, blocks } => Event::Kept { worker, blocks },
            Input::Declined { worker, lease, reason } => {
                if self.engine.holds(worker, lease) {
                    tracing::warn!(worker = worker.0, lease = lease.0, "lease declined: {reason}");
                }
                Event::Declined { worker, lease, reason }
            }
            Input::Result { worker, result } => return self.judge(worker, result),
            // A run's own.
            Input::Applied(_) | Input::Archived { .. } | Input::Sampled(_) | Input::RolledBack(_) => return,
            Input::Status { .. } => return,
        };
        self.decide(event);
    }

    /// Passes a result on to the engine, if it was computed from what its worker was sent.
    fn judge(&mut self, worker: WorkerId, mut result: Finished) {
        let spans = std::mem::take(&mut result.spans);
        if let Some((_, clock_offset_nanos)) = self.roster.look(worker).filter(|_| !spans.is_empty()) {
            lock(&self.held).add_spans(spans, clock_offset_nanos);
        }
        let lease = result.lease;
        if let Err(reason) = self.sent.check(worker, lease, result.batch_sha256) {
            tracing::warn!(worker = worker.0, "{reason}");
            return self.decide(Event::Declined { worker, lease, reason });
        }
        let done = result.block_done(worker);
        if done.task == Task::Reference && self.engine.holds(worker, lease) {
            let (found, expected) = (result.row_values.len(), self.rows(result.block));
            if expected != Some(found) {
                let reason = format!("its result for lease {lease} has {found} rows");
                return self.decide(Event::Declined { worker, lease, reason });
            }
        }
        self.judging = Some(result);
        self.decide(Event::BlockDone(done));
        self.judging = None;
    }

    /// How many rows the slots of a block have.
    fn rows(&self, block: Block) -> Option<usize> {
        let (under_way, range) = self.part(block)?;
        Some(under_way.loan.slots[range].iter().map(|slot| slot.rows).sum())
    }

    /// What a block was lent as part of, and which of its slots are those of the block.
    fn part(&self, block: Block) -> Option<(&UnderWay, Range<usize>)> {
        let under_way = self.loans.values().find(|under_way| under_way.loan.work.block.contains(block))?;
        Some((under_way, range(&under_way.loan, block)))
    }

    fn decide(&mut self, event: Event) {
        let now = Time(self.origin.elapsed());
        for command in self.engine.handle(event, now) {
            self.carry_out(command);
        }
    }

    fn carry_out(&mut self, command: Command) {
        match &command {
            Command::Refuse { .. } | Command::Release { .. } | Command::Disconnect { .. } => {
                tracing::info!("{command}");
            }
            _ => tracing::debug!("{command}"),
        }
        match command {
            Command::Admit { ticket, worker, .. } => self.roster.admit(ticket, worker),
            Command::Refuse { ticket, reason } => self.roster.refuse(ticket, reason),
            Command::Lease { worker, lease } => {
                if lease.task == Task::Gradient {
                    self.served.staging.open(worker, lease.id);
                }
                if let Some(message) = self.lease_message(worker, &lease) {
                    self.roster.send(worker, Message::Lease(message));
                }
            }
            Command::Accept { worker, lease, block, .. } => {
                self.sent.take(worker, lease);
                self.accept(worker, lease, block);
            }
            Command::Discard { worker, lease, reason } => {
                self.sent.take(worker, lease);
                self.served.staging.discard(worker, lease);
                if reason.is_to_be_revoked() {
                    self.roster.revoke(worker, lease);
                }
            }
            Command::Release { worker, reason } => self.roster.release(worker, &reason),
            Command::Disconnect { worker, reason } => self.roster.disconnect(worker, reason.to_string()),
            Command::GiveBack { block, reason } => {
                let lent = self.part(block).map(|(under_way, _)| under_way.loan.lease);
                if let Some(under_way) = lent.and_then(|lease| self.end(lease)) {
                    self.adder.send(Job::Drop { lease: under_way.loan.lease });
                    let block = under_way.loan.work.block;
                    let _ = under_way.reply.send(Err(reason));
                    self.decide(Event::Withdrawn { block });
                }
            }
            // What is said of a run and its steps; a relay has none of its own.
            Command::Report(_)
            | Command::ApplyStep { .. }
            | Command::Quarantine { .. }
            | Command::RestartStep { .. }
            | Command::RollBack { .. }
            | Command::RecordValidation { .. }
            | Command::RecordReferences
            | Command::Sample { .. }
            | Command::Checkpoint { .. }
            | Command::Finish { .. } => {}
        }
    }

    /// The lease with its rows, of which the digests are remembered.
    fn lease_message(&mut self, worker: WorkerId, lease: &Lease) -> Option<v1::Lease> {
        let (UnderWay { loan, .. }, range) = self.part(lease.block)?;
        let slots = &loan.slots[range];
        let message = v1::Lease {
            slots: slots.iter().map(|slot| slot.message.clone()).collect(),
            seed: loan.seed,
            traceparent: loan.traceparent.clone(),
            step_slots: loan.work.step_slots,
            ..translate::lease(lease, loan.learning_rates.clone(), self.served.publication.get())
        };
        let sent = Sent {
            task: lease.task,
            name: String::new(),
            slots: lease.block.slots(loan.work.step_slots),
            digests: slots.iter().map(|slot| slot.sha256).collect(),
        };
        self.sent.lend(worker, lease.id, sent);
        Some(message)
    }

    /// A part of what was lent counts. The last one completes its sum.
    fn accept(&mut self, worker: WorkerId, lease: LeaseId, part: Block) {
        let vector = self.served.staging.take(worker, lease);
        let Some(result) = self.judging.take() else { return };
        let lent = self.part(part).map(|(under_way, _)| under_way.loan.lease);
        let Some(under_way) = lent.and_then(|lent| self.loans.get_mut(&lent)) else { return };
        let (work, first) = (under_way.loan.work, range(&under_way.loan, part));
        under_way.counted += first.len();
        match work.task {
            Task::Gradient => {
                // Cannot overlap what is there: the engine accepts each slot once.
                let _ = under_way.sums.insert(part.within(work.block), result.sums, |left, right, _| left + right);
                if let Some(vector) = vector {
                    self.adder.send(Job::Add { lease: under_way.loan.lease, part, vector });
                }
            }
            Task::Evaluate | Task::Reference => {
                let slots = part.slots(work.step_slots);
                under_way.row_values.insert(slots.start, result.row_values);
                under_way.slot_sums.extend(slots.zip(result.slot_sums));
            }
        }
        if under_way.counted == under_way.loan.slots.len() {
            let lent = under_way.loan.lease;
            self.complete(lent);
        }
    }

    fn complete(&mut self, lease: u64) {
        let Some(under_way) = self.end(lease) else { return };
        let UnderWay { loan, since, sums, slot_sums, row_values, reply, .. } = under_way;
        let slot_sums: Vec<Sums> = slot_sums.into_values().collect();
        let of_slots = || sum_leaves(slot_sums.iter().copied().map(Ok::<_, ()>), |left, right, _| left + right);
        let sums = match loan.work.task {
            Task::Gradient => sums.into_root(),
            Task::Evaluate | Task::Reference => of_slots().unwrap_or_default(),
        };
        let sum = BlockSum {
            sums: sums.unwrap_or_default(),
            slot_sums,
            gradient: None,
            row_values: row_values.into_values().flatten().collect(),
            batch_sha256: block_sha256(loan.slots.iter().map(|slot| slot.sha256)),
            compute: since.elapsed(),
        };
        match loan.work.task {
            Task::Gradient => self.adder.send(Job::Finish { lease, sum: Box::new(sum), since, reply }),
            // Whoever asked may be gone.
            Task::Evaluate | Task::Reference => drop(reply.send(Ok(sum))),
        }
    }
}

/// The places of a block's slots among those of a loan that holds it.
fn range(loan: &Loan, block: Block) -> Range<usize> {
    let work = loan.work;
    let first = work.block.slots(work.step_slots).start;
    let slots = block.slots(work.step_slots);
    (slots.start - first) as usize..(slots.end - first) as usize
}
