//! Where vectors go: staged gradients, the tree sum, the optimizer, the published parameters.
//!
//! Vectors never pass through the engine. They wait here under the lease that made them until the engine accepts the
//! block, and one thread adds them up, applies the step and publishes the result.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lockstep_model::batch::Sums;
use lockstep_model::config::OptimizerConfig;
use lockstep_model::digest::bytes_sha256;
use lockstep_model::layout::Layout;
use lockstep_model::optimizer::{self, OptimizerState, Update};
use lockstep_model::step_filter::{SkipConfig, StepFilter, StepNumbers};
use lockstep_model::tree::{Block, TreeSum, add_vectors};
use lockstep_proto::chunk;
use tracing::Span;

use crate::background::Background;
use crate::engine::{LeaseId, WorkerId};

/// Gradients that were pushed and wait for their block to be accepted or discarded.
#[derive(Debug, Default)]
pub(crate) struct Staging(Mutex<Stage>);

#[derive(Debug, Default)]
struct Stage {
    /// Who may leave vectors here.
    members: HashSet<WorkerId>,
    /// By open lease; `None` until it is pushed.
    vectors: HashMap<(WorkerId, LeaseId), Option<Staged>>,
}

/// A pushed gradient.
#[derive(Debug)]
pub(crate) struct Staged {
    /// Flat, in layout order.
    pub(crate) vector: Vec<f32>,
    /// SHA-256 of its bytes.
    pub(crate) sha256: [u8; 32],
    /// Its L2 norm; not finite if an element is not.
    pub(crate) norm: f64,
}

impl Staging {
    /// Lets a new member leave vectors here.
    pub(crate) fn admit(&self, worker: WorkerId) {
        self.lock().members.insert(worker);
    }

    /// Expects a vector for a lease, until it is taken.
    pub(crate) fn open(&self, worker: WorkerId, lease: LeaseId) {
        self.lock().vectors.insert((worker, lease), None);
    }

    /// Keeps a vector for a lease if one is expected; `false` if the worker is no member. The first one stays, whatever comes
    /// later: what was judged by its digest is what is taken.
    pub(crate) fn put(&self, worker: WorkerId, lease: LeaseId, staged: Staged) -> bool {
        let mut stage = self.lock();
        if let Some(place @ None) = stage.vectors.get_mut(&(worker, lease)) {
            *place = Some(staged);
        }
        stage.members.contains(&worker)
    }

    /// Digest and norm of what waits for a lease.
    pub(crate) fn look(&self, worker: WorkerId, lease: LeaseId) -> Option<([u8; 32], f64)> {
        let stage = self.lock();
        let staged = stage.vectors.get(&(worker, lease))?.as_ref()?;
        Some((staged.sha256, staged.norm))
    }

    /// Takes a lease's vector out, and expects none any more.
    pub(crate) fn take(&self, worker: WorkerId, lease: LeaseId) -> Option<Vec<f32>> {
        self.lock().vectors.remove(&(worker, lease)).flatten().map(|staged| staged.vector)
    }

    /// Ends a membership: forgets all that the worker left, and takes nothing more from it.
    pub(crate) fn forget_worker(&self, worker: WorkerId) {
        let mut stage = self.lock();
        stage.members.remove(&worker);
        stage.vectors.retain(|(owner, _), _| *owner != worker);
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        // Every operation above leaves the stage whole, so a panic elsewhere cannot have broken it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parameters that workers may pull.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    /// Optimizer steps applied.
    pub(crate) version: u64,
    /// Little-endian f32 in layout order.
    pub(crate) bytes: Bytes,
    /// SHA-256 of `bytes`.
    pub(crate) sha256: [u8; 32],
}

impl Published {
    fn new(version: u64, parameters: &[f32]) -> Self {
        let bytes = chunk::to_bytes(parameters);
        Self { version, sha256: bytes_sha256(&bytes), bytes }
    }
}

/// The newest parameters, shared with the service.
#[derive(Clone, Debug)]
pub(crate) struct Publication(Arc<RwLock<Published>>);

impl Publication {
    /// What is published now.
    pub(crate) fn get(&self) -> Published {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, published: Published) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = published;
    }
}

/// A run's changing numbers.
#[derive(Clone, Debug)]
pub(crate) struct State {
    /// Flat parameters.
    pub(crate) parameters: Vec<f32>,
    /// Moments.
    pub(crate) optimizer: OptimizerState,
    /// What is known of the last steps' gradients.
    pub(crate) filter: StepFilter,
}

/// What the thread is asked to do, in order.
enum Job {
    Add { block: Block, vector: Vec<f32>, span: Span },
    Apply { step: u64, lr: f64, sums: Sums, span: Span },
    Restart,
    Restore(State),
    Snapshot(Box<dyn FnOnce(State) + Send>),
    Then(Box<dyn FnOnce() + Send>),
}

/// What happened to a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Applied {
    /// The step, now the published version.
    pub(crate) step: u64,
    /// Norm of the mean gradient.
    pub(crate) grad_norm: f64,
    /// Whether the parameters were left as they were, because the gradient is of no use.
    pub(crate) skipped: bool,
    /// Time spent adding gradients.
    pub(crate) reduce: Duration,
    /// Time spent in the optimizer.
    pub(crate) optimize: Duration,
    /// Time spent publishing.
    pub(crate) publish: Duration,
}

/// The thread that owns parameters and optimizer. Dropping it ends the thread after the jobs at hand.
pub(crate) struct DataPlane {
    jobs: Background<Job>,
    publication: Publication,
}

impl DataPlane {
    /// Starts with `state` published as `version`. `applied` is called, on the thread, after each step.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub(crate) fn start(
        layout: Layout,
        config: OptimizerConfig,
        skip: SkipConfig,
        slots: u32,
        version: u64,
        state: State,
        applied: impl Fn(anyhow::Result<Applied>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let published = Published::new(version, &state.parameters);
        let publication = Publication(Arc::new(RwLock::new(published)));
        let plane = Plane { layout, config, skip, slots, state, sum: TreeSum::new(slots), reduce: Duration::ZERO };
        let published = publication.clone();
        let jobs = Background::start("data-plane", move |jobs| plane.run(&jobs, &published, &applied))?;
        Ok(Self { jobs, publication })
    }

    /// What workers may pull.
    pub(crate) fn publication(&self) -> Publication {
        self.publication.clone()
    }

    /// SHA-256 of what is published.
    pub(crate) fn published_sha256(&self) -> [u8; 32] {
        self.publication.get().sha256
    }

    /// Does something on the thread, after the jobs before.
    pub(crate) fn then(&self, act: impl FnOnce() + Send + 'static) {
        self.jobs.send(Job::Then(Box::new(act)));
    }

    /// Adds an accepted block to the sum of the step under way, whose span is `span`.
    pub(crate) fn add(&self, block: Block, vector: Vec<f32>, span: &Span) {
        self.jobs.send(Job::Add { block, vector, span: span.clone() });
    }

    /// Applies the step, all of whose slots were added, at learning rate `lr`.
    pub(crate) fn apply(&self, step: u64, lr: f64, sums: Sums, span: &Span) {
        self.jobs.send(Job::Apply { step, lr, sums, span: span.clone() });
    }

    /// Forgets what was added to the sum of the step under way.
    pub(crate) fn restart(&self) {
        self.jobs.send(Job::Restart);
    }

    /// Goes on from `state`, which is published at once as `version`.
    pub(crate) fn restore(&self, version: u64, state: State) {
        self.publication.set(Published::new(version, &state.parameters));
        self.jobs.send(Job::Restore(state));
    }

    /// Hands a copy of parameters and optimizer state, as they are after the jobs before, to `take` on the thread.
    pub(crate) fn snapshot(&self, take: impl FnOnce(State) + Send + 'static) {
        self.jobs.send(Job::Snapshot(Box::new(take)));
    }
}

struct Plane {
    layout: Layout,
    config: OptimizerConfig,
    skip: SkipConfig,
    slots: u32,
    state: State,
    sum: TreeSum<Vec<f32>>,
    /// Time spent adding since the last step.
    reduce: Duration,
}

impl Plane {
    fn run(mut self, jobs: &Receiver<Job>, publication: &Publication, applied: &impl Fn(anyhow::Result<Applied>)) {
        for job in jobs {
            match job {
                Job::Add { block, vector, span } => self.add(block, vector, &span),
                Job::Apply { step, lr, sums, span } => applied(self.apply(step, lr, sums, &span, publication)),
                Job::Restart => self.sum = TreeSum::new(self.slots),
                Job::Restore(state) => {
                    self.sum = TreeSum::new(self.slots);
                    self.state = state;
                }
                Job::Snapshot(take) => take(self.state.clone()),
                Job::Then(act) => act(),
            }
        }
    }

    fn add(&mut self, block: Block, vector: Vec<f32>, span: &Span) {
        let _span = tracing::info_span!(target: "lockstep", parent: span, "reduce").entered();
        let start = Instant::now();
        let inserted = self.sum.insert(block, vector, |left, right| add_vectors(left, &right));
        debug_assert!(inserted.is_ok(), "the engine accepts every slot of a step once");
        self.reduce += start.elapsed();
    }

    fn apply(
        &mut self,
        step: u64,
        lr: f64,
        sums: Sums,
        span: &Span,
        publication: &Publication,
    ) -> anyhow::Result<Applied> {
        let sum = std::mem::replace(&mut self.sum, TreeSum::new(self.slots));
        let gradient = sum
            .into_root()
            .ok_or_else(|| anyhow::anyhow!("step {step}: the engine asked for a step whose gradient is incomplete"))?;
        let reduce = std::mem::take(&mut self.reduce);

        let start = Instant::now();
        let report = {
            let _span = tracing::info_span!(target: "lockstep", parent: span, "optimizer").entered();
            let State { parameters, optimizer, filter } = &mut self.state;
            let update = Update { gradient_sum: &gradient, weight_sum: sums.weight, lr, step };
            let accepts = |grad_norm| !filter.skips(self.skip, StepNumbers { loss: sums.mean(), grad_norm });
            optimizer::step_if(&self.config, &self.layout, parameters, optimizer, update, accepts)
        };
        let optimize = start.elapsed();

        let start = Instant::now();
        let _span = tracing::info_span!(target: "lockstep", parent: span, "publish").entered();
        publication.set(Published::new(step, &self.state.parameters));
        let (grad_norm, skipped) = (report.grad_norm, !report.applied);
        Ok(Applied { step, grad_norm, skipped, reduce, optimize, publish: start.elapsed() })
    }
}

#[cfg(test)]
mod tests {
    use lockstep_model::config::{LineConfig, ModelConfig, UpdateRule};

    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn only_members_leave_vectors() {
        let (staging, worker, lease) = (Staging::default(), WorkerId(1), LeaseId(7));
        let staged = || Staged { vector: vec![1.0], sha256: [3; 32], norm: 1.0 };
        assert!(!staging.put(worker, lease, staged()));
        staging.admit(worker);
        assert!(staging.put(worker, lease, staged()));
        assert_eq!(staging.look(worker, lease), None, "nobody asked for it");
        staging.open(worker, lease);
        assert!(staging.put(worker, lease, staged()));
        assert_eq!(staging.look(worker, lease), Some(([3; 32], 1.0)));
        staging.put(worker, lease, Staged { vector: vec![2.0], sha256: [4; 32], norm: 2.0 });
        assert_eq!(staging.look(worker, lease), Some(([3; 32], 1.0)), "the first one stays");
        staging.forget_worker(worker);
        assert!(!staging.put(worker, lease, staged()));
        assert_eq!(staging.take(worker, lease), None);
    }

    /// A plane of three slots over two parameters, 1 and 2, and what it says of each step.
    fn plane() -> (DataPlane, Receiver<anyhow::Result<Applied>>) {
        let layout = Layout::of(&ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 }));
        let config = OptimizerConfig { rule: UpdateRule::Sgd, lr: 0.5, grad_clip: None };
        let skip = SkipConfig { max_in_a_row: 3, above_median: None };
        let (done, news) = channel();
        let state =
            State { parameters: vec![1.0, 2.0], optimizer: OptimizerState::default(), filter: StepFilter::default() };
        let plane = DataPlane::start(layout, config, skip, 3, 0, state, move |applied| {
            let _ = done.send(applied);
        });
        (plane.unwrap(), news)
    }

    fn apply(plane: &DataPlane, step: u64) {
        plane.apply(step, 0.5, Sums { loss: 1.0, weight: 4.0 }, &Span::none());
    }

    const LEFT: Block = Block { level: 1, index: 0 };
    const RIGHT: Block = Block { level: 1, index: 1 };

    #[test]
    fn blocks_become_a_step_and_a_published_version() {
        let (plane, news) = plane();
        plane.add(RIGHT, vec![4.0, 0.0], &Span::none());
        plane.add(LEFT, vec![4.0, 8.0], &Span::none());
        apply(&plane, 1);
        let applied = news.recv().unwrap().unwrap();
        assert_eq!((applied.step, applied.grad_norm, applied.skipped), (1, 8f64.sqrt(), false));
        let published = plane.publication().get();
        let bytes = chunk::to_bytes(&[0.0, 1.0]);
        assert_eq!((published.version, published.sha256), (1, bytes_sha256(&bytes)));
        assert_eq!(published.bytes, bytes);

        apply(&plane, 2);
        assert!(news.recv().unwrap().is_err(), "no slot of step 2 was added");
    }

    #[test]
    fn a_gradient_of_no_use_changes_nothing() {
        let (plane, news) = plane();
        plane.add(Block { level: 2, index: 0 }, vec![f32::NAN, 0.0], &Span::none());
        apply(&plane, 1);
        assert!(news.recv().unwrap().unwrap().skipped);
        let published = plane.publication().get();
        assert_eq!((published.version, published.bytes), (1, chunk::to_bytes(&[1.0, 2.0])));
    }

    #[test]
    fn a_step_starts_over_and_a_run_goes_back() {
        let (plane, news) = plane();
        plane.add(LEFT, vec![100.0, 100.0], &Span::none());
        plane.restart();
        plane.add(Block { level: 2, index: 0 }, vec![8.0, 8.0], &Span::none());
        apply(&plane, 1);
        news.recv().unwrap().unwrap();
        assert_eq!(plane.publication().get().bytes, chunk::to_bytes(&[0.0, 1.0]));

        plane.add(LEFT, vec![100.0, 100.0], &Span::none());
        let state =
            State { parameters: vec![5.0, 6.0], optimizer: OptimizerState::default(), filter: StepFilter::default() };
        plane.restore(0, state);
        assert_eq!(plane.publication().get().version, 0);
        plane.add(Block { level: 2, index: 0 }, vec![8.0, 8.0], &Span::none());
        apply(&plane, 1);
        news.recv().unwrap().unwrap();
        assert_eq!(plane.publication().get().bytes, chunk::to_bytes(&[4.0, 5.0]));
    }
}
