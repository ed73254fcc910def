//! One membership: the loop that carries out what the [`Session`] decides.
//!
//! Slow things (transfers, computing) run as tasks that the membership owns; dropping it ends them, but for a gradient that
//! the device computes: that is finished and kept.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lockstep_model::compression::GradientFormat;
use lockstep_proto::v1;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Instrument, Span, debug, info, info_span, warn};

use crate::client::{Client, Control, Way};
use crate::clock_offset::ClockOffset;
use crate::compute::{Compute, Pulled};
use crate::device::{Answer, DeviceFailure, Outcome, Stop};
use crate::kept::KeptGradient;
use crate::lease::{GradientName, Parameters, Work};
use crate::runtime::SpanSource;
use crate::session::{Command, Departure, Event, MAX_ATTEMPTS, Session, Timing, TransferFailure};
use crate::shared::Shared;
use crate::translate::{self, BaseName, Instruction, Run, shortened};

/// Longest reason for declining a lease that the contract allows, bytes.
const REASON_LIMIT: usize = 1024;

/// A worker among a run's members.
pub(crate) struct Membership<C> {
    pub(crate) client: Client,
    pub(crate) control: Control,
    /// What computes leases.
    pub(crate) device: C,
    /// How many workers it stood for when it was admitted.
    pub(crate) workers: u32,
    /// Gradients of this run computed before.
    pub(crate) kept: Vec<KeptGradient>,
    pub(crate) run: Run,
    pub(crate) worker_id: u64,
    /// Elements of the parameters.
    pub(crate) elements: usize,
    /// Of a replica's moments, if they stay with it.
    pub(crate) kept_elements: usize,
    /// What gradients are rounded to, and so travel as.
    pub(crate) format: GradientFormat,
    /// What adapters stand on, if such are trained.
    pub(crate) base: Option<BaseName>,
    /// What vectors pass through, if the coordinator is on this machine.
    pub(crate) shared: Option<Arc<Shared>>,
    pub(crate) timing: Timing,
    pub(crate) spans: SpanSource,
}

impl<C: Compute> Membership<C> {
    /// Serves until the membership ends. `on_first_word` is called when the coordinator first says something.
    pub(crate) async fn serve(mut self, on_first_word: impl FnOnce()) -> Departure {
        let kept = std::mem::take(&mut self.kept);
        let session = Session::new(self.timing, kept.iter().map(|kept| kept.name).collect(), Duration::ZERO);
        let mut service = Service {
            session: session.with_places(self.device.places()),
            workers: self.device.workers(),
            membership: self,
            kept: kept.into_iter().map(|kept| (kept.name, kept.outcome)).collect(),
            leases: HashMap::new(),
            tasks: JoinSet::new(),
            pulled: Arc::default(),
            begun: None,
            clock_offset: ClockOffset::default(),
        };
        service.run(on_first_word).await
    }
}

/// A membership at work.
struct Service<C> {
    membership: Membership<C>,
    session: Session,
    /// How many workers the device stands for.
    workers: watch::Receiver<u32>,
    /// What may be answered from memory.
    kept: BTreeMap<GradientName, Outcome>,
    /// What the session knows by name: every lease that is not over.
    leases: HashMap<u64, Held>,
    /// Computing, pulling and pushing.
    tasks: JoinSet<Report>,
    /// The parameters that came by the network last, and memory for the next ones.
    pulled: Arc<Mutex<LastPulled>>,
    /// What the device computes that the session has yet to ask for.
    begun: Option<Begun>,
    clock_offset: ClockOffset,
}

/// A lease that the device computes as soon as it has the parameters: there and back again, it would have to wait for two
/// threads to wake.
struct Begun {
    lease: u64,
    stop: Stop,
    outcome: Answer<Outcome>,
}

/// Parameters that came by the network.
#[derive(Default)]
struct LastPulled {
    vector: Vec<f32>,
    /// BLAKE3 of them; `None` where they are none, or the coordinator did not say.
    digest: Option<[u8; 32]>,
}

/// A lease and what has become of it.
struct Held {
    work: Arc<Work>,
    /// From the start of work on it to its end.
    span: Option<Span>,
    /// Ends the computation.
    stop: Stop,
    outcome: Option<Outcome>,
    /// Of its gradient, once it was sent.
    vector_blake3: Option<[u8; 32]>,
    /// Ends the upload.
    upload: Option<AbortHandle>,
    upload_time: Duration,
}

/// How a task ended.
enum Report {
    Pulled { parameters: Parameters, result: Result<Option<Begun>, TransferFailure> },
    Computed { lease: u64, result: Result<Outcome, DeviceFailure> },
    Pushed { lease: u64, result: Result<(Duration, [u8; 32]), TransferFailure> },
}

impl<C: Compute> Service<C> {
    async fn run(&mut self, on_first_word: impl FnOnce()) -> Departure {
        let began = Instant::now();
        let mut on_first_word = Some(on_first_word);
        if let Some(departure) = self.tell_workers() {
            return departure;
        }
        loop {
            let deadline = tokio::time::Instant::from_std(began + self.session.next_deadline());
            let event = tokio::select! {
                biased;
                message = self.membership.control.incoming.message() => match message {
                    Ok(Some(message)) => {
                        if let Some(on_first_word) = on_first_word.take() {
                            on_first_word();
                        }
                        self.heard(message)
                    }
                    Ok(None) => return Departure::Lost("the coordinator closed the control stream".into()),
                    Err(status) => return Departure::Lost(format!("the control stream broke: {}", status.message())),
                },
                Some(report) = self.tasks.join_next() => match report {
                    Ok(report) => Some(self.note(report)),
                    Err(error) if error.is_cancelled() => None,
                    Err(error) => return Departure::Lost(format!("a task of this worker failed: {error}")),
                },
                Ok(()) = self.workers.changed() => match self.tell_workers() {
                    Some(departure) => return departure,
                    None => None,
                },
                () = tokio::time::sleep_until(deadline) => Some(Event::Tick),
            };
            for command in event.map_or_else(Vec::new, |event| self.session.handle(event, began.elapsed())) {
                if let Some(departure) = self.act(command) {
                    return departure;
                }
            }
            // Revoked while its parameters came.
            if let Some(begun) = self.begun.take() {
                begun.stop.set();
            }
        }
    }

    /// Says how many workers this one stands for, if the coordinator does not know. Without any, the membership ends.
    fn tell_workers(&mut self) -> Option<Departure> {
        let workers = *self.workers.borrow_and_update();
        match workers {
            0 => Some(Departure::Deserted),
            _ if workers == self.membership.workers => None,
            _ => {
                self.membership.workers = workers;
                self.send(v1::worker_message::Kind::Workers(v1::Workers { workers }))
            }
        }
    }

    /// Turns a message into an event, keeping what the session need not see.
    fn heard(&mut self, message: v1::CoordinatorMessage) -> Option<Event> {
        let Some(instruction) = translate::instruction(message) else {
            debug!("the coordinator sent a message of a kind that this build does not know");
            return None;
        };
        Some(match instruction {
            Instruction::Lease(work) => {
                let lease = work.lease;
                self.leases.entry(lease.id).or_insert_with(|| Held::new(work));
                Event::Leased(lease)
            }
            Instruction::Unreadable { lease, reason } => Event::Unreadable { lease, reason },
            Instruction::Revoke { lease } => Event::Revoked { lease },
            Instruction::HeartbeatAck { sent_unix_nanos, received_unix_nanos } => {
                self.clock_offset.observe(sent_unix_nanos, received_unix_nanos, unix_nanos());
                Event::HeartbeatAcked
            }
            Instruction::Release { reason, run_goes_on } => Event::Released { reason, run_goes_on },
        })
    }

    /// Turns the end of a task into an event, keeping what it brought.
    fn note(&mut self, report: Report) -> Event {
        match report {
            Report::Pulled { parameters, result: Ok(begun) } => {
                self.begun = begun;
                Event::ParametersArrived { parameters }
            }
            Report::Pulled { parameters, result: Err(failure) } => Event::PullFailed { parameters, failure },
            Report::Computed { lease, result: Ok(outcome) } => {
                if let Some(held) = self.leases.get_mut(&lease) {
                    held.outcome = Some(outcome);
                }
                Event::Computed { lease }
            }
            Report::Computed { lease, result: Err(failure) } => {
                Event::ComputeFailed { lease, reason: failure.to_string() }
            }
            Report::Pushed { lease, result: Ok((upload_time, vector_blake3)) } => {
                if let Some(held) = self.leases.get_mut(&lease) {
                    (held.upload_time, held.vector_blake3) = (upload_time, Some(vector_blake3));
                }
                Event::Pushed { lease }
            }
            Report::Pushed { lease, result: Err(failure) } => Event::PushFailed { lease, failure },
        }
    }

    /// Carries one command out; says if the membership is over.
    fn act(&mut self, command: Command) -> Option<Departure> {
        match command {
            Command::SendKept(names) => self.send(v1::worker_message::Kind::Kept(translate::kept(&names))),
            Command::Pull { parameters, lease } => {
                self.pull(parameters, lease);
                None
            }
            Command::Compute { lease } => {
                self.compute(lease);
                None
            }
            Command::Abandon { lease } => {
                self.abandon(lease);
                None
            }
            Command::Recall { lease } => {
                self.recall(lease);
                None
            }
            Command::Forget => {
                self.kept.clear();
                None
            }
            Command::Push { lease } => {
                self.push(lease);
                None
            }
            Command::SendResult { lease } => self.send_result(lease),
            Command::SendDeclined { lease, reason } => {
                warn!("lease {lease} declined: {reason}");
                self.leases.remove(&lease);
                let reason = shortened(&reason, REASON_LIMIT);
                self.send(v1::worker_message::Kind::Declined(v1::LeaseDeclined { lease_id: lease, reason }))
            }
            Command::Discard { lease } => {
                self.leases.remove(&lease).inspect(|held| held.stop.set());
                None
            }
            Command::SendHeartbeat => {
                let clock_offset_nanos = self.clock_offset.nanos();
                let heartbeat = v1::Heartbeat { sent_unix_nanos: unix_nanos(), clock_offset_nanos };
                self.send(v1::worker_message::Kind::Heartbeat(heartbeat))
            }
            Command::Leave(departure) => Some(departure),
        }
    }

    fn pull(&mut self, parameters: Parameters, lease: u64) {
        let held = self.held(lease);
        let (work, stop, lease_span) = (held.work.clone(), held.stop.clone(), held.span());
        let (step, slot, version) = (work.lease.step, work.first_slot(), parameters.version);
        let span = info_span!(target: "lockstep", parent: &lease_span, "pull", step, slot, version);
        let (mut client, device) = (self.membership.client.clone(), self.membership.device.clone());
        let (run, elements, shared) =
            (self.membership.run.clone(), self.membership.elements, self.membership.shared.clone());
        let (pulled, base) = (self.pulled.clone(), self.membership.base);
        let has_moments = work.slots.iter().any(|slot| slot.moments_blake3.is_some());
        let next = (!has_moments).then(|| (work.clone(), stop.clone(), lease_span.clone()));
        let task = async move {
            let refused = |failure: DeviceFailure| TransferFailure::Refused(failure.to_string());
            if let Some(base) = base
                && let Err(failure) = fetch_base(&mut client, &device, &run, base).await
            {
                return Report::Pulled { parameters, result: Err(failure) };
            }
            if let Some(version) = shared.and_then(|shared| shared.version(parameters)) {
                let (loaded, outcome) = device.load_shared(parameters, version, next);
                match loaded.await {
                    Ok(true) => {
                        let begun = outcome.map(|outcome| Begun { lease, stop, outcome });
                        return Report::Pulled { parameters, result: Ok(begun) };
                    }
                    Ok(false) => {} // Overwritten meanwhile; the coordinator will say what is there now.
                    Err(failure) => return Report::Pulled { parameters, result: Err(refused(failure)) },
                }
            }
            // Gone if the difference does not arrive whole: then all of the version is pulled the next time.
            let LastPulled { vector, digest: held } = std::mem::take(&mut *lock(&pulled));
            let by_difference = held.is_some() && held == work.difference_from;
            let mut difference = (by_difference && device.passes_on()).then(Vec::new);
            let arrived = match by_difference {
                true => client.pull_difference(&run, parameters, vector, difference.as_mut()).await,
                false => client.pull(&run, parameters, elements, vector).await,
            };
            let digest = parameters.digest;
            let keep = |vector| *lock(&pulled) = LastPulled { vector, digest };
            let result = match arrived {
                Ok(vector) => {
                    device.load(Pulled { name: parameters, vector, difference }).await.map(keep).map_err(refused)
                }
                Err(failure) => Err(failure),
            };
            Report::Pulled { parameters, result: result.map(|()| None) }
        };
        self.tasks.spawn(task.instrument(span));
    }

    fn compute(&mut self, lease: u64) {
        if let Some(Begun { outcome, .. }) = self.begun.take_if(|begun| begun.lease == lease) {
            self.tasks.spawn(async move { Report::Computed { lease, result: outcome.get().await } });
            return;
        }
        let held = self.held(lease);
        let (work, stop, span) = (held.work.clone(), held.stop.clone(), held.span());
        let device = self.membership.device.clone();
        let Some(blake3) = work.slots.iter().find_map(|slot| slot.moments_blake3) else {
            let outcome = device.compute(work, Vec::new(), stop, span);
            self.tasks.spawn(async move { Report::Computed { lease, result: outcome.await } });
            return;
        };
        let (mut client, run, elements) =
            (self.membership.client.clone(), self.membership.run.clone(), self.membership.kept_elements);
        self.tasks.spawn(async move {
            let result = match fetch_moments(&mut client, &run, blake3, elements).instrument(span.clone()).await {
                Ok(moments) => device.compute(work, moments, stop, span).await,
                Err(failure) => Err(failure),
            };
            Report::Computed { lease, result }
        });
    }

    /// Ends the computation or the upload of a lease.
    fn abandon(&mut self, lease: u64) {
        let held = self.held(lease);
        held.stop.set();
        if let Some(upload) = &held.upload {
            upload.abort();
        }
        self.membership.device.abandon(lease);
    }

    /// Takes a lease's gradient from memory.
    fn recall(&mut self, lease: u64) {
        let name = self.held(lease).work.lease.gradient_name();
        let kept = name.and_then(|name| self.kept.remove(&name));
        self.held(lease).outcome = Some(kept.expect("the session recalls, once, only what is kept"));
    }

    fn push(&mut self, lease: u64) {
        let held = self.held(lease);
        let (work, lease_span) = (held.work.clone(), held.span());
        let gradient = held.outcome.as_ref().and_then(|outcome| outcome.gradient.clone());
        let gradient = gradient.expect("the session has a gradient pushed only after it was computed");
        let format = self.membership.format;
        let bytes = format.bytes(gradient.len());
        let span = info_span!(
            target: "lockstep", parent: &lease_span, "upload", step = work.lease.step, slot = work.first_slot(), bytes
        );
        let (mut client, run) = (self.membership.client.clone(), self.membership.run.clone());
        let (worker_id, shared) = (self.membership.worker_id, self.membership.shared.clone());
        let task = async move {
            let began = Instant::now();
            let way = shared.as_deref().map_or(Way::Network(format), Way::Memory);
            let pushed = client.push(&run, worker_id, lease, &gradient, way, &work.traceparent).await;
            Report::Pushed { lease, result: pushed.map(|digest| (began.elapsed(), digest)) }
        };
        let upload = self.tasks.spawn(task.instrument(span));
        self.held(lease).upload = Some(upload);
    }

    fn send_result(&mut self, lease: u64) -> Option<Departure> {
        let Held { work, span, outcome, vector_blake3, upload_time, .. } =
            self.leases.remove(&lease).expect("the session reports a lease before it forgets it");
        let outcome = outcome.expect("the session reports a lease done only after it was computed");
        drop(span); // the lease's own span is over, and travels with its result
        let spans = (self.membership.spans)();
        let result =
            translate::block_result(&self.membership.run, &work.lease, &outcome, vector_blake3, upload_time, spans);
        self.send(v1::worker_message::Kind::Result(result))
    }

    /// Puts a message on the control stream, without waiting: a stream that takes no more is lost.
    fn send(&self, kind: v1::worker_message::Kind) -> Option<Departure> {
        let sent = self.membership.control.outgoing.try_send(v1::WorkerMessage { kind: Some(kind) });
        sent.err().map(|_| Departure::Lost("the control stream takes no more messages".into()))
    }

    /// A lease that the session has not ended yet.
    fn held(&mut self, lease: u64) -> &mut Held {
        self.leases.get_mut(&lease).expect("the session names only leases that came and are not over")
    }
}

impl Held {
    fn new(work: Work) -> Self {
        let (stop, upload_time) = (Stop::default(), Duration::ZERO);
        Self { work: Arc::new(work), span: None, stop, outcome: None, vector_blake3: None, upload: None, upload_time }
    }

    /// The lease's span, which begins with the first work on it.
    fn span(&mut self) -> Span {
        let Work { lease, traceparent, .. } = &*self.work;
        let (step, slot, traceparent) = (lease.step, self.work.first_slot(), traceparent.as_str());
        let begin = || info_span!(target: "lockstep", parent: None, "lease", step, slot, traceparent);
        self.span.get_or_insert_with(begin).clone()
    }
}

/// Has the device hold what adapters stand on: it is fetched once, and stays over memberships.
async fn fetch_base(
    client: &mut Client,
    device: &impl Compute,
    run: &Run,
    base: BaseName,
) -> Result<(), TransferFailure> {
    let refused = |failure: DeviceFailure| TransferFailure::Refused(failure.to_string());
    if device.holds(base).await.map_err(refused)? {
        return Ok(());
    }
    let parameters = client.pull_base(run, base).await?;
    info!("fetched the base of the adapters: {} parameters", base.elements);
    device.load_base(base, parameters).await.map_err(refused)
}

/// Fetches the moments that a replica begins with; a lease whose moments do not come cannot be computed.
async fn fetch_moments(
    client: &mut Client,
    run: &Run,
    blake3: [u8; 32],
    elements: usize,
) -> Result<Vec<f32>, DeviceFailure> {
    let mut attempts = 1..=MAX_ATTEMPTS;
    loop {
        match client.pull_moments(run, blake3, elements).await {
            Ok(moments) => return Ok(moments),
            Err(TransferFailure::Damaged(reason)) if attempts.next().is_some_and(|attempt| attempt < MAX_ATTEMPTS) => {
                warn!("a replica's moments arrived damaged ({reason}); fetching them again");
            }
            Err(
                TransferFailure::Damaged(reason)
                | TransferFailure::Refused(reason)
                | TransferFailure::Disconnected(reason),
            ) => return Err(DeviceFailure(format!("the replica's moments did not come: {reason}"))),
        }
    }
}

fn lock(pulled: &Mutex<LastPulled>) -> MutexGuard<'_, LastPulled> {
    pulled.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Now, by this machine's clock.
fn unix_nanos() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since_epoch.as_nanos().try_into().unwrap_or(u64::MAX)
}
