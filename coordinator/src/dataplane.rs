//! What becomes of gradients: the tree sum, the optimizer, the published parameters.
//!
//! Vectors never pass through the engine. They wait in the [exchange](crate::exchange) under the lease that made them until
//! the engine accepts the block, and one thread adds them up, applies the step and publishes the result.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use lockstep_model::batch::Sums;
use lockstep_model::compression::{GradientFormat, Rounding};
use lockstep_model::config::OptimizerConfig;
use lockstep_model::layout::Layout;
use lockstep_model::optimizer::{self, OptimizerState, Stepped, Update};
use lockstep_model::step_filter::{SkipConfig, StepFilter, StepNumbers};
use lockstep_model::tree::{Block, TreeSum};
use tracing::Span;

use crate::background::Background;
use crate::exchange::{Publication, Published, Spare};
use crate::replicas::Replicas;

/// A run's changing numbers.
#[derive(Clone, Debug)]
pub(crate) struct State {
    /// Flat parameters, as they are published.
    pub(crate) parameters: Vec<f32>,
    /// Moments, and master parameters where they are apart.
    pub(crate) optimizer: OptimizerState,
    /// What is known of the last steps' gradients.
    pub(crate) filter: StepFilter,
}

/// What becomes of a step's gradient.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) layout: Layout,
    pub(crate) optimizer: OptimizerConfig,
    /// Elements that stand behind the gradient in what a replica pushes: its moments, if they stay with it.
    pub(crate) kept_elements: usize,
    /// Whether slots are replicas, of whose pseudo-gradients the mean is taken; else it is that over all that has a weight.
    pub(crate) replicas: bool,
    pub(crate) skip: SkipConfig,
    /// Of a step.
    pub(crate) slots: u32,
    /// What gradients are rounded to at every node of the sum.
    pub(crate) format: GradientFormat,
    /// Of the run, by which they are.
    pub(crate) seed: u64,
}

/// What the thread is asked to do, in order.
enum Job {
    Add { step: u64, block: Block, vector: Vec<f32>, span: Span },
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
    /// Time spent in the optimizer, which makes each piece of the next version ready as it goes.
    pub(crate) optimize: Duration,
    /// Time spent publishing what it made ready.
    pub(crate) publish: Duration,
}

/// The thread that owns parameters and optimizer. Dropping it ends the thread after the jobs at hand.
pub(crate) struct DataPlane {
    jobs: Background<Job>,
    publication: Publication,
    replicas: Replicas,
}

impl DataPlane {
    /// Starts with `state` published as `version`. Vectors that were added up go to `spare`. `applied` is called, on the
    /// thread, after each step.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub(crate) fn start(
        rules: Rules,
        version: u64,
        state: State,
        spare: Arc<Spare>,
        applied: impl Fn(anyhow::Result<Applied>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let publication = Publication::new(version, &state.parameters);
        let sum = TreeSum::new(rules.slots);
        let replicas = Replicas::default();
        replicas.set(&state.optimizer.replicas);
        let moments = BTreeMap::new();
        let plane = Plane { rules, state, sum, moments, replicas: replicas.clone(), spare, reduce: Duration::ZERO };
        let published = publication.clone();
        let jobs = Background::start("data-plane", move |jobs| plane.run(&jobs, &published, &applied))?;
        Ok(Self { jobs, publication, replicas })
    }

    /// What workers may pull.
    pub(crate) fn publication(&self) -> Publication {
        self.publication.clone()
    }

    /// What replicas remember of it.
    pub(crate) fn replicas(&self) -> Replicas {
        self.replicas.clone()
    }

    /// What is published now.
    pub(crate) fn published(&self) -> Published {
        self.publication.get()
    }

    /// Does something on the thread, after the jobs before.
    pub(crate) fn then(&self, act: impl FnOnce() + Send + 'static) {
        self.jobs.send(Job::Then(Box::new(act)));
    }

    /// Adds an accepted block to the sum of the step under way, `step`, whose span is `span`.
    pub(crate) fn add(&self, step: u64, block: Block, vector: Vec<f32>, span: &Span) {
        self.jobs.send(Job::Add { step, block, vector, span: span.clone() });
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
        self.publication.set(version, &state.parameters);
        self.replicas.set(&state.optimizer.replicas);
        self.jobs.send(Job::Restore(state));
    }

    /// Hands a copy of parameters and optimizer state, as they are after the jobs before, to `take` on the thread.
    pub(crate) fn snapshot(&self, take: impl FnOnce(State) + Send + 'static) {
        self.jobs.send(Job::Snapshot(Box::new(take)));
    }
}

struct Plane {
    rules: Rules,
    state: State,
    sum: TreeSum<Vec<f32>>,
    /// What replicas remember of the step under way, by slot.
    moments: BTreeMap<u32, Vec<f32>>,
    replicas: Replicas,
    spare: Arc<Spare>,
    /// Time spent adding since the last step.
    reduce: Duration,
}

impl Plane {
    fn run(mut self, jobs: &Receiver<Job>, publication: &Publication, applied: &impl Fn(anyhow::Result<Applied>)) {
        for job in jobs {
            match job {
                Job::Add { step, block, vector, span } => self.add(step, block, vector, &span),
                Job::Apply { step, lr, sums, span } => applied(self.apply(step, lr, sums, &span, publication)),
                Job::Restart => self.begin(),
                Job::Restore(state) => {
                    self.begin();
                    self.state = state;
                }
                Job::Snapshot(take) => take(self.state.clone()),
                Job::Then(act) => act(),
            }
        }
    }

    /// Forgets what was added.
    fn begin(&mut self) {
        self.sum = TreeSum::new(self.rules.slots);
        self.moments.clear();
    }

    fn add(&mut self, step: u64, block: Block, mut vector: Vec<f32>, span: &Span) {
        let _span = tracing::info_span!(target: "lockstep", parent: span, "reduce").entered();
        let start = Instant::now();
        if self.rules.kept_elements > 0 {
            self.moments.insert(block.index, vector.split_off(vector.len() - self.rules.kept_elements));
        }
        let rounding = Rounding { format: self.rules.format, seed: self.rules.seed, step };
        let inserted = self.sum.insert(block, vector, |left, right, node| {
            let sum = rounding.add(left, &right, node);
            self.spare.give_back(right);
            sum
        });
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
        let sum = std::mem::replace(&mut self.sum, TreeSum::new(self.rules.slots));
        let moments = std::mem::take(&mut self.moments);
        let gradient = sum
            .into_root()
            .ok_or_else(|| anyhow::anyhow!("step {step}: the engine asked for a step whose gradient is incomplete"))?;
        let reduce = std::mem::take(&mut self.reduce);

        let start = Instant::now();
        let State { parameters, optimizer, filter } = &mut self.state;
        let draft = publication.draft(step, parameters.len());
        let Stepped { report, pieces: digests, difference } = {
            let _span = tracing::info_span!(target: "lockstep", parent: span, "optimizer").entered();
            let Rules { optimizer: OptimizerConfig { rule, grad_clip, .. }, layout, replicas, skip, slots, .. } =
                &self.rules;
            let weight_sum = if *replicas { f64::from(*slots) } else { sums.weight };
            let update = Update { gradient_sum: &gradient, weight_sum, grad_clip: *grad_clip, lr, step };
            let accepts = |grad_norm| !filter.skips(*skip, StepNumbers { loss: sums.mean(), grad_norm });
            let add = |start, piece: &[f32]| draft.add(start, piece);
            optimizer::step_if(rule, layout, parameters, optimizer, update, accepts, add)
        };
        self.spare.give_back(gradient);
        let optimize = start.elapsed();

        let start = Instant::now();
        let _span = tracing::info_span!(target: "lockstep", parent: span, "publish").entered();
        if report.applied && self.rules.kept_elements > 0 {
            self.state.optimizer.replicas = moments.into_values().collect();
            self.replicas.set(&self.state.optimizer.replicas);
        }
        publication.publish(draft, &digests, &self.state.parameters, difference);
        let (grad_norm, skipped) = (report.grad_norm, !report.applied);
        Ok(Applied { step, grad_norm, skipped, reduce, optimize, publish: start.elapsed() })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use bytes::Bytes;
    use lockstep_model::config::{LineConfig, ModelConfig, NesterovConfig, UpdateRule};
    use lockstep_model::pieces::vector_blake3;
    use lockstep_proto::chunk;

    use super::*;

    /// A plane of three slots over two parameters, 1 and 2, and what it says of each step.
    fn plane() -> (DataPlane, Receiver<anyhow::Result<Applied>>) {
        plane_with(UpdateRule::Sgd, OptimizerState::default(), |_| ())
    }

    /// The same by another rule and its state, with whatever `change` makes of the other rules.
    fn plane_with(
        rule: UpdateRule,
        optimizer_state: OptimizerState,
        change: impl FnOnce(&mut Rules),
    ) -> (DataPlane, Receiver<anyhow::Result<Applied>>) {
        let layout = Layout::of(&ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 }));
        let optimizer = OptimizerConfig { rule, lr: 0.5, grad_clip: None };
        let skip = SkipConfig { max_in_a_row: 3, above_median: None };
        let (done, news) = channel();
        let state = State { parameters: vec![1.0, 2.0], optimizer: optimizer_state, filter: StepFilter::default() };
        let format = GradientFormat::F32;
        let mut rules = Rules { layout, optimizer, kept_elements: 0, replicas: false, skip, slots: 3, format, seed: 1 };
        change(&mut rules);
        let plane = DataPlane::start(rules, 0, state, Arc::default(), move |applied| {
            let _ = done.send(applied);
        });
        (plane.unwrap(), news)
    }

    /// The newest version, and its bytes.
    fn published(plane: &DataPlane) -> (u64, Bytes) {
        let published = plane.publication().get();
        (published.version, plane.publication().bytes(&published).unwrap())
    }

    fn apply(plane: &DataPlane, step: u64) {
        plane.apply(step, 0.5, Sums { loss: 1.0, weight: 4.0, ..Sums::default() }, &Span::none());
    }

    const LEFT: Block = Block { level: 1, index: 0 };
    const RIGHT: Block = Block { level: 1, index: 1 };

    #[test]
    fn blocks_become_a_step_and_a_published_version() {
        let (plane, news) = plane();
        plane.add(1, RIGHT, vec![4.0, 0.0], &Span::none());
        plane.add(1, LEFT, vec![4.0, 8.0], &Span::none());
        apply(&plane, 1);
        let applied = news.recv().unwrap().unwrap();
        assert_eq!((applied.step, applied.grad_norm, applied.skipped), (1, 8f64.sqrt(), false));
        assert_eq!(published(&plane), (1, chunk::to_bytes(&[0.0, 1.0])));

        apply(&plane, 2);
        assert!(news.recv().unwrap().is_err(), "no slot of step 2 was added");
    }

    #[test]
    fn what_replicas_learned_is_their_mean_whatever_they_read() {
        let rule = UpdateRule::Nesterov(NesterovConfig { momentum: 0.5 });
        let state = OptimizerState::new(&rule, 2);
        let (plane, news) = plane_with(rule, state, |rules| rules.replicas = true);
        plane.add(1, LEFT, vec![3.0, 1.5], &Span::none());
        plane.add(1, RIGHT, vec![3.0, 0.0], &Span::none());
        apply(&plane, 1);
        assert_eq!(news.recv().unwrap().unwrap().grad_norm, (6f64.powi(2) + 1.5f64.powi(2)).sqrt() / 3.0);
        // The mean over three, (2, 0.5), and half of it as momentum, at a rate of 0.5.
        assert_eq!(published(&plane), (1, chunk::to_bytes(&[1.0 - 0.5 * 3.0, 2.0 - 0.5 * 0.75])));
    }

    #[test]
    fn moments_are_kept_once_the_step_counts() {
        let (plane, news) = plane_with(UpdateRule::Sgd, OptimizerState::default(), |rules| {
            (rules.replicas, rules.kept_elements) = (true, 1);
        });
        let round = |step, moments: [f32; 3], last: f32| {
            for (slot, moment) in (0..3).zip(moments).rev() {
                plane.add(
                    step,
                    Block::leaf(slot),
                    vec![1.0, if slot == 2 { last } else { 1.0 }, moment],
                    &Span::none(),
                );
            }
            apply(&plane, step);
            news.recv().unwrap().unwrap().skipped
        };
        let kept = || [0, 1, 2].map(|slot| plane.replicas().blake3(slot));
        let of = |moments: [f32; 3]| moments.map(|moment| Some(vector_blake3(&[moment])));
        assert_eq!(kept(), [None; 3]);
        assert!(!round(1, [7.0, 8.0, 9.0], 1.0));
        assert_eq!((published(&plane), kept()), ((1, chunk::to_bytes(&[0.5, 1.5])), of([7.0, 8.0, 9.0])));
        assert!(round(2, [1.0, 2.0, 3.0], f32::NAN), "a step of no use");
        assert_eq!(kept(), of([7.0, 8.0, 9.0]));
        plane.add(3, Block::leaf(1), vec![1.0, 1.0, 100.0], &Span::none());
        plane.restart();
        assert!(!round(3, [4.0, 5.0, 6.0], 1.0));
        assert_eq!(kept(), of([4.0, 5.0, 6.0]));

        let optimizer = OptimizerState { replicas: vec![vec![3.0]; 3], ..OptimizerState::default() };
        plane.restore(0, State { parameters: vec![1.0, 2.0], optimizer, filter: StepFilter::default() });
        assert_eq!(kept(), of([3.0; 3]));
        let (snapshot, taken) = channel();
        plane.snapshot(move |state| snapshot.send(state.optimizer.replicas).unwrap());
        assert_eq!(taken.recv().unwrap(), [[3.0], [3.0], [3.0]]);
    }

    #[test]
    fn a_gradient_of_no_use_changes_nothing() {
        let (plane, news) = plane();
        plane.add(1, Block { level: 2, index: 0 }, vec![f32::NAN, 0.0], &Span::none());
        apply(&plane, 1);
        assert!(news.recv().unwrap().unwrap().skipped);
        assert_eq!(published(&plane), (1, chunk::to_bytes(&[1.0, 2.0])));
    }

    #[test]
    fn sums_are_rounded_where_blocks_meet() {
        let (plane, news) =
            plane_with(UpdateRule::Sgd, OptimizerState::default(), |rules| rules.format = GradientFormat::Int8);
        let rounding = Rounding { format: GradientFormat::Int8, seed: 1, step: 1 };
        let leaf = |slot: u32, mut gradient: Vec<f32>| {
            rounding.round(Block::leaf(slot), &mut gradient);
            gradient
        };
        let [one, two, three] = [leaf(0, vec![100.0, 0.3]), leaf(1, vec![90.0, 0.2]), leaf(2, vec![70.0, 0.1])];
        let left = rounding.add(one.clone(), &two, LEFT);
        let sum = rounding.add(left, &three, Block { level: 2, index: 0 });
        for (slot, gradient) in [(2, three), (0, one), (1, two)] {
            plane.add(1, Block::leaf(slot), gradient, &Span::none());
        }
        apply(&plane, 1);
        news.recv().unwrap().unwrap();
        assert_eq!(published(&plane).1, chunk::to_bytes(&[1.0 - 0.5 * (sum[0] * 0.25), 2.0 - 0.5 * (sum[1] * 0.25)]));
    }

    #[test]
    fn what_is_published_follows_the_master() {
        let master = vec![1.0, 2.0];
        let apart = OptimizerState { master, ..OptimizerState::default() };
        let (plane, news) = plane_with(UpdateRule::Sgd, apart, |_| ());
        let before = plane.published().digest;
        // The second master parameter is 1.999 then, and the difference is no bf16.
        plane.add(1, Block { level: 2, index: 0 }, vec![8.0, 0.008], &Span::none());
        apply(&plane, 1);
        news.recv().unwrap().unwrap();
        let published = plane.published();
        let difference = published.difference.clone().unwrap();
        let mut held = [1.0, 2.0];
        lockstep_model::compression::add_difference(&difference.bytes, &mut held);
        assert_eq!(difference.from, before);
        assert_eq!(plane.publication().bytes(&published), Some(chunk::to_bytes(&held)));
        let (asked, answer) = channel();
        plane.snapshot(move |state| asked.send(state).unwrap());
        let state = answer.recv().unwrap();
        assert_eq!((state.parameters, state.optimizer.master), (held.to_vec(), vec![0.0, 2.0 - 0.5 * (0.008 * 0.25)]));
        assert!(held[0] == 0.0 && held[1] != 2.0 - 0.001 && (held[1] - 1.999).abs() < 1e-5, "{held:?}");
    }

    #[test]
    fn a_step_starts_over_and_a_run_goes_back() {
        let (plane, news) = plane();
        plane.add(1, LEFT, vec![100.0, 100.0], &Span::none());
        plane.restart();
        plane.add(1, Block { level: 2, index: 0 }, vec![8.0, 8.0], &Span::none());
        apply(&plane, 1);
        news.recv().unwrap().unwrap();
        assert_eq!(published(&plane), (1, chunk::to_bytes(&[0.0, 1.0])));

        plane.add(1, LEFT, vec![100.0, 100.0], &Span::none());
        let state =
            State { parameters: vec![5.0, 6.0], optimizer: OptimizerState::default(), filter: StepFilter::default() };
        plane.restore(0, state);
        assert_eq!(plane.publication().get().version, 0);
        plane.add(1, Block { level: 2, index: 0 }, vec![8.0, 8.0], &Span::none());
        apply(&plane, 1);
        news.recv().unwrap().unwrap();
        assert_eq!(published(&plane), (1, chunk::to_bytes(&[4.0, 5.0])));
    }
}
