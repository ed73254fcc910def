//! Parameters follow gradients: one pass over flat vectors, piece by piece, and Muon's matrices before.
//!
//! Everything here rounds the same on every machine: plain `f32` and `f64` arithmetic in a fixed order, `sqrt` (exact by
//! IEEE 754) and `libm`. Only so can a run be the same whatever coordinates it.

mod adamw;
mod matrix;
mod muon;
mod nesterov;

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::compression::advance;
use crate::config::{MuonConfig, UpdateRule};
use crate::layout::{Layout, TensorSpec};
use crate::pieces::{PIECE_ELEMENTS, in_pieces, l2_norm};

/// What an optimizer remembers between steps. Vectors are flat in layout order, and empty for rules that need none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Running mean of gradients; Muon's momentum; Nesterov's, which is a running sum.
    pub first_moment: Vec<f32>,
    /// Running mean of squared gradients; 0 where Muon rules.
    pub second_moment: Vec<f32>,
    /// Moments of each replica, where they stay with it: what [`into_moments`](Self::into_moments) gives. Empty before there
    /// are any.
    pub replicas: Vec<Vec<f32>>,
    /// The parameters that it goes on from, where those that are published [differ](advance) from them; else empty.
    pub master: Vec<f32>,
}

impl OptimizerState {
    /// The state before the first step, for `elements` parameters.
    pub fn new(rule: &UpdateRule, elements: usize) -> Self {
        let moment = |number: usize| if number <= rule.moments() { vec![0.0; elements] } else { Vec::new() };
        Self { first_moment: moment(1), second_moment: moment(2), ..Self::default() }
    }

    /// The state that has these moments, of `elements` parameters, the first before the second.
    pub fn with_moments(mut moments: Vec<f32>, elements: usize) -> Self {
        let second_moment = moments.split_off(elements.min(moments.len()));
        Self { first_moment: moments, second_moment, ..Self::default() }
    }

    /// Its moments, the first before the second.
    pub fn into_moments(self) -> Vec<f32> {
        [self.first_moment, self.second_moment].concat()
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Global L2 norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Whether parameters and state were changed.
    pub applied: bool,
}

/// What a step is made of, besides parameters and state.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The gradient's sum over the step's slots, flat in layout order.
    pub gradient_sum: &'a [f32],
    /// The weights' sum over the step's slots.
    pub weight_sum: f64,
    /// The mean gradient is scaled down to this global L2 norm if it is larger; `None`: never.
    pub grad_clip: Option<f64>,
    /// The step's learning rate.
    pub lr: f64,
    /// The step's number, from 1.
    pub step: u64,
}

/// What all tensors of a step share.
#[derive(Clone, Copy)]
struct Rates {
    /// Turns a gradient's sum into the clipped mean.
    scale: f32,
    lr: f64,
    /// From 1.
    step: u64,
}

/// A share of every vector of a step. Moments are empty where the rule has none.
struct Part<'a> {
    parameters: &'a mut [f32],
    gradient: &'a [f32],
    first_moment: &'a mut [f32],
    second_moment: &'a mut [f32],
}

impl Part<'_> {
    /// What of `tensor` is in this part, which begins at element `start`.
    fn part(&mut self, start: usize, tensor: &TensorSpec) -> Part<'_> {
        let within = |at: usize| at.clamp(start, start + self.gradient.len()) - start;
        let range = within(tensor.range().start)..within(tensor.range().end);
        Part {
            gradient: &self.gradient[range.clone()],
            parameters: &mut self.parameters[range.clone()],
            first_moment: self.first_moment.get_mut(range.clone()).unwrap_or_default(),
            second_moment: self.second_moment.get_mut(range).unwrap_or_default(),
        }
    }
}

/// What weight decay leaves of a parameter of `tensor`.
fn keep(tensor: &TensorSpec, lr: f64, weight_decay: f64) -> f32 {
    if tensor.decay { (1.0 - lr * weight_decay) as f32 } else { 1.0 }
}

/// One optimizer step, in place; see [`step_if`].
pub fn step(
    rule: &UpdateRule,
    layout: &Layout,
    parameters: &mut [f32],
    state: &mut OptimizerState,
    update: Update<'_>,
) -> StepReport {
    step_if(rule, layout, parameters, state, update, |_| true, |_, _| ()).report
}

/// What [`step_if`] gives.
#[derive(Debug)]
pub struct Stepped<T> {
    /// What it did.
    pub report: StepReport,
    /// What was made of each piece of the parameters, in order.
    pub pieces: Vec<T>,
    /// What the parameters have changed by, as [`advance`] gives it, where they are not the master ones.
    pub difference: Option<Vec<u8>>,
}

/// One optimizer step, in place, if `accepts` says so of the norm of the mean gradient; else it changes neither master
/// parameters nor moments. The mean over the global batch is taken here, once, and its norm clipped. Where master parameters
/// are apart, those that are published follow them, after either. Pieces of the parameters are shown to `finished` with their
/// place once they are as they will be, changed or not, in parallel.
pub fn step_if<T: Send>(
    rule: &UpdateRule,
    layout: &Layout,
    parameters: &mut [f32],
    state: &mut OptimizerState,
    update: Update<'_>,
    accepts: impl FnOnce(f64) -> bool,
    finished: impl Fn(usize, &[f32]) -> T + Sync,
) -> Stepped<T> {
    if state.master.is_empty() {
        let (report, pieces) = step_in_place(rule, layout, parameters, state, update, accepts, finished);
        return Stepped { report, pieces, difference: None };
    }
    let mut master = std::mem::take(&mut state.master);
    let (report, _) = step_in_place(rule, layout, &mut master, state, update, accepts, |_, _| ());
    let (pieces, difference) = advance(parameters, &master, finished);
    state.master = master;
    Stepped { report, pieces, difference: Some(difference) }
}

/// A step of parameters that are the master ones. Pieces are independent of one another, and are taken in parallel.
fn step_in_place<T: Send>(
    rule: &UpdateRule,
    layout: &Layout,
    parameters: &mut [f32],
    state: &mut OptimizerState,
    update: Update<'_>,
    accepts: impl FnOnce(f64) -> bool,
    finished: impl Fn(usize, &[f32]) -> T + Sync,
) -> (StepReport, Vec<T>) {
    let Update { gradient_sum, weight_sum, grad_clip, lr, step } = update;
    let grad_norm = l2_norm(gradient_sum) / weight_sum;
    if !accepts(grad_norm) {
        return (StepReport { grad_norm, applied: false }, in_pieces(parameters, finished));
    }
    let clip = match grad_clip {
        Some(limit) if grad_norm > limit => limit / (grad_norm + 1e-6),
        _ => 1.0,
    };
    let rates = Rates { scale: (clip / weight_sum) as f32, lr, step };
    let is_whole = |tensor: &TensorSpec| matches!(rule, UpdateRule::Muon(_)) && tensor.is_hidden_matrix();
    if let UpdateRule::Muon(muon) = rule {
        let tensors = cut(layout.tensors.iter().map(TensorSpec::elements), parameters, gradient_sum, state);
        let matrices =
            tensors.into_par_iter().zip(&layout.tensors).filter(|(_, tensor)| tensor.trainable && is_whole(tensor));
        matrices.for_each(|(part, tensor)| muon::step(muon, tensor, part, rates));
    }
    let pieces = vec![PIECE_ELEMENTS; gradient_sum.len().div_ceil(PIECE_ELEMENTS)];
    let pieces = cut(pieces.into_iter(), parameters, gradient_sum, state);
    let shown = pieces.into_par_iter().enumerate().map(|(index, mut piece)| {
        let start = index * PIECE_ELEMENTS;
        for tensor in tensors_within(layout, start..start + piece.parameters.len()) {
            if tensor.trainable && !is_whole(tensor) {
                let part = piece.part(start, tensor);
                match rule {
                    UpdateRule::Sgd => sgd(part, rates),
                    UpdateRule::Nesterov(nesterov) => nesterov::step(*nesterov, part, rates),
                    UpdateRule::Adamw(adamw) | UpdateRule::Muon(MuonConfig { adamw, .. }) => {
                        adamw::step(adamw, tensor, part, rates);
                    }
                }
            }
        }
        finished(start, piece.parameters)
    });
    (StepReport { grad_norm, applied: true }, shown.collect())
}

/// The tensors that have elements in `range`.
fn tensors_within(layout: &Layout, range: Range<usize>) -> impl Iterator<Item = &TensorSpec> {
    let first = layout.tensors.partition_point(|tensor| tensor.range().end <= range.start);
    layout.tensors[first..].iter().take_while(move |tensor| tensor.range().start < range.end)
}

/// Cuts all vectors of a step into parts of these lengths.
fn cut<'a>(
    lengths: impl Iterator<Item = usize>,
    mut parameters: &'a mut [f32],
    mut gradient: &'a [f32],
    state: &'a mut OptimizerState,
) -> Vec<Part<'a>> {
    let (mut first, mut second) = (&mut state.first_moment[..], &mut state.second_moment[..]);
    let part = |length: usize| Part {
        parameters: take(&mut parameters, length),
        gradient: gradient.split_off(..length.min(gradient.len())).unwrap_or_default(),
        first_moment: take(&mut first, length),
        second_moment: take(&mut second, length),
    };
    lengths.map(part).collect()
}

/// The next `count` elements, or as many as there are.
fn take<'a>(rest: &mut &'a mut [f32], count: usize) -> &'a mut [f32] {
    rest.split_off_mut(..count.min(rest.len())).unwrap_or_default()
}

/// Stochastic gradient descent.
fn sgd(part: Part<'_>, Rates { scale, lr, .. }: Rates) {
    let lr = lr as f32;
    for (p, g) in part.parameters.iter_mut().zip(part.gradient) {
        *p -= lr * (g * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AdamwConfig, NesterovConfig};
    use crate::digest::{hex, vector_sha256};

    const ADAMW: UpdateRule =
        UpdateRule::Adamw(AdamwConfig { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 });

    /// Never clipped.
    fn update(gradient_sum: &[f32], weight_sum: f64, lr: f64, step: u64) -> Update<'_> {
        Update { gradient_sum, weight_sum, grad_clip: None, lr, step }
    }

    fn layout(decayed: usize, plain: usize) -> Layout {
        let spec = |name: &str, offset, length, decay| TensorSpec {
            name: name.into(),
            shape: vec![length],
            offset,
            decay,
            trainable: true,
        };
        Layout { tensors: vec![spec("w", 0, decayed, true), spec("b", decayed, plain, false)] }
    }

    /// The rule written down once more, in f64 and element by element.
    #[test]
    fn adamw_follows_the_papers_formula() {
        let layout = layout(5, 3);
        let mut parameters: Vec<f32> = (0..8).map(|i| 0.3 - 0.1 * i as f32).collect();
        let mut state = OptimizerState::new(&ADAMW, 8);
        let mut plain: Vec<(f64, f64, f64)> = parameters.iter().map(|&p| (f64::from(p), 0.0, 0.0)).collect();
        for t in 1..=20u64 {
            let gradient: Vec<f32> = (0..8).map(|i| ((i as u64 * 7 + t * 3) % 11) as f32 - 5.0).collect();
            step(&ADAMW, &layout, &mut parameters, &mut state, update(&gradient, 4.0, 1e-2, t));
            for (i, (p, m, v)) in plain.iter_mut().enumerate() {
                let g = f64::from(gradient[i]) / 4.0;
                *p *= 1.0 - 1e-2 * if i < 5 { 0.1 } else { 0.0 };
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.95 * *v + 0.05 * g * g;
                let (m_hat, v_hat) = (*m / (1.0 - 0.9f64.powi(t as i32)), *v / (1.0 - 0.95f64.powi(t as i32)));
                *p -= 1e-2 * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
        for (ours, (plain, ..)) in parameters.iter().zip(plain) {
            assert!((f64::from(*ours) - plain).abs() < 1e-6, "{ours} is not {plain}");
        }
    }

    /// So is Nesterov's, in the form in which the velocity is `-lr · b` (Sutskever et al. 2013): the gradient is that at the
    /// point to which the velocity leads.
    #[test]
    fn nesterov_looks_ahead() {
        let (momentum, lr) = (0.9, 0.7);
        let rule = UpdateRule::Nesterov(NesterovConfig { momentum });
        // Of f(x) = a x² / 2, seen from where the optimizer's parameters stand: already ahead.
        let slopes = [0.3, 1.1, 0.05];
        let (mut parameters, mut state) = (vec![1.0f32, -2.0, 0.5], OptimizerState::new(&rule, 3));
        let mut plain: Vec<(f64, f64)> = parameters.iter().map(|&x| (f64::from(x), 0.0)).collect();
        for t in 1..=30 {
            let gradient: Vec<f32> = parameters.iter().zip(slopes).map(|(x, a)| a as f32 * x).collect();
            step(&rule, &layout(2, 1), &mut parameters, &mut state, update(&gradient, 1.0, lr, t));
            for (index, ((x, velocity), a)) in plain.iter_mut().zip(slopes).enumerate() {
                let ahead = *x + momentum * *velocity;
                *velocity = momentum * *velocity - lr * a * ahead;
                *x += *velocity;
                let ours = f64::from(parameters[index]);
                assert!((ours - (*x + momentum * *velocity)).abs() < 1e-5, "step {t}: {ours} for {x} and {velocity}");
            }
        }
        assert!(state.second_moment.is_empty());
    }

    #[test]
    fn without_momentum_nesterov_is_plain_descent() {
        let gradient = [0.3f32, -1.7, 2.5];
        let [ours, plain] = [UpdateRule::Nesterov(NesterovConfig { momentum: 0.0 }), UpdateRule::Sgd].map(|rule| {
            let (mut parameters, mut state) = (vec![1.0f32, 0.1, -0.6], OptimizerState::new(&rule, 3));
            (1..=5).for_each(|t| {
                step(&rule, &layout(3, 0), &mut parameters, &mut state, update(&gradient, 3.0, 0.1, t));
            });
            parameters
        });
        assert_eq!(ours, plain);
    }

    #[test]
    fn adamw_and_sgd_agree_with_burns() {
        use burn::tensor::Tensor;
        use burn_optim::{AdamWConfig, Optimizer, SgdConfig};

        use crate::device::{ComputeDevice, DeviceChoice};

        let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
        let start: Vec<f32> = crate::probe::parameters(16).iter().map(|p| p * 20.0).collect();
        let gradient = |t: u64| -> Vec<f32> { (0..16).map(|i| ((i * 7 + t * 3) % 11) as f32 / 4.0 - 1.2).collect() };
        let ours = |rule: &UpdateRule| {
            let (mut parameters, mut state) = (start.clone(), OptimizerState::new(rule, 16));
            for t in 1..=30 {
                step(rule, &layout(16, 0), &mut parameters, &mut state, update(&gradient(t), 1.0, 1e-2, t));
            }
            parameters
        };
        fn theirs<O: Optimizer>(
            optimizer: &O,
            start: &[f32],
            gradient: impl Fn(u64) -> Vec<f32>,
            device: &ComputeDevice,
        ) -> Vec<f32> {
            let tensor = |values: &[f32]| Tensor::<1>::from_floats(values, device.handle());
            let (mut parameters, mut state) = (tensor(start), None);
            for t in 1..=30 {
                (parameters, state) = optimizer.step(1e-2, parameters, tensor(&gradient(t)), state);
            }
            parameters.into_data().try_into_vec().unwrap()
        }
        let burns_adamw = AdamWConfig::new().with_beta_2(0.95).with_epsilon(1e-8).with_weight_decay(0.1).build();
        for (ours, theirs) in [
            (ours(&ADAMW), theirs(&burns_adamw, &start, gradient, &device)),
            (ours(&UpdateRule::Sgd), theirs(&SgdConfig::new().build(), &start, gradient, &device)),
        ] {
            assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 2e-6), "{ours:?} is not {theirs:?}");
        }
    }

    #[test]
    fn clipping_scales_the_whole_gradient_to_the_limit() {
        let mut parameters = vec![0.0; 2];
        let update = Update { grad_clip: Some(1.0), ..update(&[6.0, 8.0], 2.0, 1.0, 1) };
        let state = &mut OptimizerState::default();
        let report = step(&UpdateRule::Sgd, &layout(1, 1), &mut parameters, state, update);
        assert_eq!(report.grad_norm, 5.0);
        assert!((parameters[0] + 0.6).abs() < 1e-6 && (parameters[1] + 0.8).abs() < 1e-6, "{parameters:?}");
    }

    /// The master parameters take the very steps that they take alone, and the published ones follow closely.
    #[test]
    fn what_is_published_as_differences_leaves_the_master_alone() {
        let layout = layout(90, 10);
        let mut alone = crate::probe::parameters(100);
        let mut published = alone.clone();
        let mut held = alone.clone();
        let mut state = OptimizerState::new(&ADAMW, 100);
        let mut apart = OptimizerState { master: alone.clone(), ..state.clone() };
        for t in 1..=20u64 {
            let gradient: Vec<f32> = (0..100).map(|i| ((i * 7 + t * 3) % 11) as f32 - 5.0).collect();
            let update = Update { grad_clip: Some(1.0), ..update(&gradient, 4.0, 1e-2, t) };
            let accepts = |_| t % 5 != 0;
            let one = step_if(&ADAMW, &layout, &mut alone, &mut state, update, accepts, |_, _| ());
            let two = step_if(&ADAMW, &layout, &mut published, &mut apart, update, accepts, |_, piece| piece.to_vec());
            assert_eq!((one.report, &alone), (two.report, &apart.master));
            assert_eq!((one.difference, two.pieces.concat()), (None, published.clone()));
            crate::compression::add_difference(&two.difference.unwrap(), &mut held);
            assert_eq!(held, published);
            let worst = alone.iter().zip(&published).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-2 / 200.0, "step {t}: off by {worst}");
        }
        assert_eq!((state.first_moment, state.second_moment), (apart.first_moment, apart.second_moment));
    }

    #[test]
    fn frozen_tensors_stay() {
        let mut layout = layout(2, 2);
        layout.tensors[0].trainable = false;
        let mut parameters = vec![1.0; 4];
        let mut state = OptimizerState::new(&ADAMW, 4);
        step(&ADAMW, &layout, &mut parameters, &mut state, update(&[1.0; 4], 1.0, 1e-2, 1));
        assert_eq!(parameters[..2], [1.0, 1.0]);
        assert!(parameters[2] < 1.0);
    }

    /// The same bits on every platform: a digest computed once and pinned.
    #[test]
    fn the_coordinators_arithmetic_is_pinned() {
        let elements = 10_007;
        let layout = layout(elements - 100, 100);
        let mut parameters = crate::probe::parameters(elements);
        let mut state = OptimizerState::new(&ADAMW, elements);
        let mut norms = Vec::new();
        for t in 1..=5u64 {
            let gradient: Vec<f32> = parameters.iter().enumerate().map(|(i, p)| p * (i as f32 + t as f32)).collect();
            let lr = crate::schedule::learning_rate(
                &crate::config::ScheduleConfig {
                    steps: 5,
                    warmup_steps: 2,
                    decay: crate::config::Decay::Cosine { steps: 5 },
                    min_lr: 1e-4,
                },
                1e-2,
                t,
            );
            let update = Update { grad_clip: Some(1.0), ..update(&gradient, 3.0, lr, t) };
            norms.push(step(&ADAMW, &layout, &mut parameters, &mut state, update).grad_norm);
        }
        expect_test::expect!["5ebe5d62fd18ceb78d001959e3d45e42c840049cad0d572a4896996f8011076a"]
            .assert_eq(&hex(&vector_sha256(&parameters)));
        expect_test::expect![
            "[5562.367646304424, 4750.595256732812, 3286.1605103982815, 2336.7786039859157, 2034.7345469381853]"
        ]
        .assert_eq(&format!("{norms:?}"));
    }

    /// So it is with matrix products: a wide matrix, a tall one, an embedding and a vector.
    #[test]
    fn muons_arithmetic_is_pinned() {
        let shapes: [(&str, &[usize]); 4] =
            [("wide", &[37, 61]), ("tall", &[70, 23]), ("wte.weight", &[13, 11]), ("norm.weight", &[17])];
        let mut layout = Layout { tensors: Vec::new() };
        for (name, shape) in shapes {
            let (name, shape, offset) = (name.into(), shape.to_vec(), layout.len());
            layout.tensors.push(TensorSpec { name, decay: shape.len() == 2, shape, offset, trainable: true });
        }
        let adamw = AdamwConfig { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let rule = UpdateRule::Muon(MuonConfig { momentum: 0.95, adamw });
        let mut parameters = crate::probe::parameters(layout.len());
        let mut state = OptimizerState::new(&rule, layout.len());
        for t in 1..=5u64 {
            let gradient: Vec<f32> = (0..layout.len() as u64).map(|i| ((i * 7 + t * 3) % 11) as f32 - 5.0).collect();
            let update = Update { grad_clip: Some(1.0), ..update(&gradient, 4.0, 1e-2, t) };
            step(&rule, &layout, &mut parameters, &mut state, update);
        }
        let unused = layout.tensors.iter().filter(|tensor| tensor.is_hidden_matrix());
        assert!(unused.flat_map(|tensor| &state.second_moment[tensor.range()]).all(|moment| *moment == 0.0));
        expect_test::expect!["21c82cabb49a6b801363558255f7a43bb6bcd7b71c0418bd828d06dec209b011"]
            .assert_eq(&hex(&vector_sha256(&parameters)));
    }
}
