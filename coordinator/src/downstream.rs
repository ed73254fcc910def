//! What a relay is to workers of its own: a coordinator that computes what another one lends it.
//!
//! The service, the engine and the places where vectors wait are a run's; the steps, their rows and the parameters come from
//! above, through a [`Downstream`], and the sum of each block that was lent goes back by it. One task, [`Server::run`], owns all
//! that changes; vectors are added on a thread of their own.
//!
//! ```text
//! invite → the first worker's class → admit → { publish → compute → sum of the block }* → part or release
//! ```

mod actor;
mod adder;
mod cluster;
mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lockstep_model::batch::{Batch, Sums};
use lockstep_model::compression::GradientFormat;
use lockstep_model::ledger::slot_sha256;
use lockstep_proto::chunk;
use lockstep_proto::v1::{self, SpanTiming};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};

use self::actor::Actor;
use crate::engine::{DeviceClass, Lent};
use crate::observe::Observer;
use crate::run::FAREWELL;
use crate::service::{Base, Calls, Served, Service, blocking};
use crate::translate;

/// Most finished spans of workers that wait to be passed on; more are dropped.
const MAX_SPANS: usize = 65_536;

/// A handle to the workers of a relay. Clones share them.
#[derive(Clone, Debug)]
pub struct Downstream {
    orders: mpsc::UnboundedSender<Order>,
    served: watch::Receiver<Option<Arc<Served>>>,
    workers: watch::Receiver<u32>,
    held: Arc<Mutex<Held>>,
}

/// What outlives a membership, and what waits to be passed on.
#[derive(Debug, Default)]
struct Held {
    /// What adapters stand on, and its BLAKE3.
    base: Option<([u8; 32], Bytes)>,
    /// Finished spans of workers, by this machine's clock.
    spans: Vec<SpanTiming>,
}

/// Answers the calls of workers, and decides who computes what.
#[derive(Debug)]
pub struct Server {
    actor: Actor,
    calls: Calls,
}

/// What workers are told when they join, and what they will push.
#[derive(Clone, Debug)]
pub struct Terms {
    /// As it came from the coordinator above.
    pub invitation: v1::Invitation,
    /// Of a version of the parameters.
    pub elements: usize,
    /// Of what is pushed: besides, a replica's moments.
    pub pushed_elements: usize,
    /// What gradients are rounded to.
    pub format: GradientFormat,
}

/// The first worker that wants to take part, by whose class the relay joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstWorker {
    /// What it computes.
    pub class: DeviceClass,
    /// Its device in words.
    pub device: String,
}

/// A block as the coordinator above lent it.
#[derive(Clone, Debug)]
pub struct Loan {
    /// The lease's id there.
    pub lease: u64,
    /// What is to be computed.
    pub work: Lent,
    /// Seed of the run.
    pub seed: u64,
    /// W3C trace context of the step.
    pub traceparent: String,
    /// Of each local step that a slot takes; empty where slots are no replicas.
    pub learning_rates: Vec<f64>,
    /// The existing slots of the block, in order.
    pub slots: Vec<LoanedSlot>,
    /// What the replica begins with, if it has kept moments.
    pub moments: Vec<f32>,
}

/// The rows of one slot, ready to be sent.
#[derive(Clone, Debug)]
pub struct LoanedSlot {
    message: v1::Slot,
    sha256: [u8; 32],
    rows: usize,
    positions: usize,
}

impl LoanedSlot {
    /// A slot of this number, and the digest of the moments that it begins with, if they are not 0.
    pub fn new(number: u32, batch: &Batch, moments_blake3: Option<[u8; 32]>) -> Self {
        let [rows, length] = batch.columns.first().map_or([0, 0], |column| column.shape);
        let message = translate::slot(number, batch, moments_blake3);
        Self { message, sha256: slot_sha256(number, batch), rows, positions: rows * length }
    }
}

/// The sum of a block that was lent, as a worker would have computed it.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSum {
    /// Sums over the block, in tree order.
    pub sums: Sums,
    /// But for a gradient: of each slot, in order.
    pub slot_sums: Vec<Sums>,
    /// The gradient, or what takes its place, if that was asked for.
    pub gradient: Option<Vec<f32>>,
    /// For references: the number of each row, in order.
    pub row_values: Vec<f32>,
    /// SHA-256 of the rows that were computed.
    pub batch_sha256: [u8; 32],
    /// From the loan to the sum.
    pub compute: Duration,
}

/// What the task is asked to do.
enum Order {
    Invite { terms: Box<Terms>, reply: oneshot::Sender<FirstWorker> },
    Admit,
    Refuse { reason: String },
    Compute { loan: Box<Loan>, abandoned: Box<dyn Fn() -> bool + Send>, reply: Reply },
    Withdraw { lease: u64 },
    Release { reason: String, run_goes_on: bool },
    Part { reason: String },
    Farewell { reply: oneshot::Sender<()> },
}

/// Where the sum of a block goes, or why there is none.
type Reply = oneshot::Sender<Result<BlockSum, String>>;

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Invite { .. } => "invite",
            Self::Admit => "admit",
            Self::Refuse { .. } => "refuse",
            Self::Compute { .. } => "compute",
            Self::Withdraw { .. } => "withdraw",
            Self::Release { .. } => "release",
            Self::Part { .. } => "part",
            Self::Farewell { .. } => "farewell",
        })
    }
}

impl Downstream {
    /// Workers that come over `listener`, for the coordinator at `upstream`. `observer` hears of their coming and going.
    pub fn new(listener: TcpListener, upstream: String, observer: Observer) -> (Self, Server) {
        let (orders, queue) = mpsc::unbounded_channel();
        let (questions, asked) = mpsc::unbounded_channel();
        let (serving, served) = watch::channel(None);
        let (count, workers) = watch::channel(0);
        let held = Arc::<Mutex<Held>>::default();
        let calls = Service::new(served.clone(), questions).listen(listener);
        let actor = Actor::new(queue, asked, serving, count, held.clone(), upstream, observer);
        (Self { orders, served, workers, held }, Server { actor, calls })
    }

    /// Has workers join by these terms, and waits for the first one that wants to take part. All that belongs to an earlier
    /// invitation is over. `None` if the server is gone.
    pub async fn invite(&self, terms: Terms) -> Option<FirstWorker> {
        let (reply, first) = oneshot::channel();
        self.order(Order::Invite { terms: Box::new(terms), reply });
        first.await.ok()
    }

    /// The coordinator above has taken the relay in: so are the workers who wait.
    pub fn admit(&self) {
        self.order(Order::Admit);
    }

    /// It has refused it: the first worker is told why.
    pub fn refuse(&self, reason: String) {
        self.order(Order::Refuse { reason });
    }

    /// The relay is no member any more: streams are closed, and workers join anew.
    pub fn part(&self, reason: String) {
        self.order(Order::Part { reason });
    }

    /// The relay was released: so are its workers. Waits until they have gone, for a moment.
    pub async fn release(self, reason: String, run_goes_on: bool) {
        self.order(Order::Release { reason, run_goes_on });
        let (reply, gone) = oneshot::channel();
        self.order(Order::Farewell { reply });
        let _ = tokio::time::timeout(FAREWELL, gone).await;
    }

    /// How many workers there are, those behind other relays included.
    pub fn workers(&self) -> watch::Receiver<u32> {
        self.workers.clone()
    }

    /// Whether what adapters stand on is here, by its BLAKE3.
    pub fn holds_base(&self, blake3: [u8; 32]) -> bool {
        lock(&self.held).base.as_ref().is_some_and(|(held, _)| *held == blake3)
    }

    /// Keeps it for workers, over memberships.
    pub async fn keep_base(&self, blake3: [u8; 32], parameters: Vec<f32>) -> Result<(), String> {
        let bytes = blocking(move || chunk::to_bytes(&parameters)).await?;
        lock(&self.held).base = Some((blake3, bytes.clone()));
        if let Some(served) = &*self.served.borrow() {
            // It may be there already.
            let _ = served.base.set(Base::Memory(bytes));
        }
        Ok(())
    }

    /// Publishes a version of the parameters, by its BLAKE3, and gives its memory back; by `difference` it is what was published
    /// before, if that is known. `None` if its digest is another.
    ///
    /// # Errors
    /// If the relay is no member.
    pub async fn publish(
        &self,
        version: u64,
        digest: [u8; 32],
        parameters: Vec<f32>,
        difference: Option<Vec<u8>>,
    ) -> Result<Option<Vec<f32>>, String> {
        let served = self.served.borrow().clone().ok_or("the relay's membership is over")?;
        blocking(move || {
            let publication = &served.publication;
            publication.set_by(version, &parameters, difference);
            (publication.get().digest == digest).then_some(parameters)
        })
        .await
    }

    /// Lends a block to workers, and waits for the sum of it. `abandoned` says whether it was [withdrawn](Self::withdraw) before
    /// it began.
    ///
    /// # Errors
    /// In words, if nobody computes it.
    pub fn compute(
        &self,
        loan: Loan,
        abandoned: Box<dyn Fn() -> bool + Send>,
    ) -> impl Future<Output = Result<BlockSum, String>> + Send + use<> {
        let (reply, sum) = oneshot::channel();
        self.order(Order::Compute { loan: Box::new(loan), abandoned, reply });
        async { sum.await.unwrap_or_else(|_| Err("the relay's membership is over".into())) }
    }

    /// A block is not wanted any more.
    pub fn withdraw(&self, lease: u64) {
        self.order(Order::Withdraw { lease });
    }

    /// Spans of workers that have finished since this was last called.
    pub fn take_spans(&self) -> Vec<SpanTiming> {
        std::mem::take(&mut lock(&self.held).spans)
    }

    fn order(&self, order: Order) {
        // A task that is gone does nothing any more, and answers nothing.
        let _ = self.orders.send(order);
    }
}

impl Server {
    /// Serves until all handles are gone, and all that came is answered.
    pub async fn run(mut self) {
        self.actor.run().await;
        self.calls.finish(Instant::now() + FAREWELL).await;
    }
}

impl Held {
    /// Spans of a worker whose clock is behind by so much.
    fn add_spans(&mut self, spans: Vec<SpanTiming>, clock_offset_nanos: i64) {
        let room = MAX_SPANS.saturating_sub(self.spans.len());
        self.spans.extend(spans.into_iter().take(room).map(|span| SpanTiming {
            start_unix_nanos: span.start_unix_nanos.saturating_add_signed(clock_offset_nanos),
            ..span
        }));
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}
