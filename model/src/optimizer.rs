//! Parameters follow gradients: one fused, fixed-order pass over flat vectors.
//!
//! Everything here rounds the same on every machine: plain `f32` and `f64` arithmetic in a fixed order, `sqrt` (exact by
//! IEEE 754) and `libm`. Only so can a run be the same whatever coordinates it.

use serde::{Deserialize, Serialize};

use crate::config::{OptimizerConfig, UpdateRule};
use crate::layout::Layout;

/// Elements of one partial sum of the squared norm.
const NORM_BLOCK: usize = 4096;
/// Interleaved partial sums within a block.
const NORM_LANES: usize = 8;

/// What an optimizer remembers between steps. Vectors are flat in layout order, and empty for rules that need none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Running mean of gradients.
    pub first_moment: Vec<f32>,
    /// Running mean of squared gradients.
    pub second_moment: Vec<f32>,
}

impl OptimizerState {
    /// The state before the first step, for `elements` parameters.
    pub fn new(config: &OptimizerConfig, elements: usize) -> Self {
        match config.rule {
            UpdateRule::Adamw { .. } => Self { first_moment: vec![0.0; elements], second_moment: vec![0.0; elements] },
            UpdateRule::Sgd => Self::default(),
        }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Global L2 norm of the mean gradient, before clipping.
    pub grad_norm: f64,
}

/// What a step is made of, besides parameters and state.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The gradient's sum over the step's slots, flat in layout order.
    pub gradient_sum: &'a [f32],
    /// The weights' sum over the step's slots.
    pub weight_sum: f64,
    /// The step's learning rate.
    pub lr: f64,
    /// The step's number, from 1.
    pub step: u64,
}

/// One optimizer step, in place. The mean over the global batch is taken here, once.
///
/// AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in PyTorch's order of operations: decay the parameter
/// by `1 - lr · weight_decay`, update both moments, and subtract `lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)`.
pub fn step(
    config: &OptimizerConfig,
    layout: &Layout,
    parameters: &mut [f32],
    state: &mut OptimizerState,
    update: Update<'_>,
) -> StepReport {
    let Update { gradient_sum, weight_sum, lr, step } = update;
    let grad_norm = l2_norm(gradient_sum) / weight_sum;
    let clip = match config.grad_clip {
        Some(limit) if grad_norm > limit => limit / (grad_norm + 1e-6),
        _ => 1.0,
    };
    let scale = (clip / weight_sum) as f32;
    for tensor in layout.tensors.iter().filter(|tensor| tensor.trainable) {
        let range = tensor.range();
        let (parameters, gradient) = (&mut parameters[range.clone()], &gradient_sum[range.clone()]);
        match config.rule {
            UpdateRule::Sgd => {
                let lr = lr as f32;
                for (p, g) in parameters.iter_mut().zip(gradient) {
                    *p -= lr * (g * scale);
                }
            }
            UpdateRule::Adamw { beta1, beta2, epsilon, weight_decay } => {
                let decay = if tensor.decay { weight_decay } else { 0.0 };
                let keep = (1.0 - lr * decay) as f32;
                let (beta1_32, beta2_32) = (beta1 as f32, beta2 as f32);
                let (rest1, rest2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
                let step_size = (lr / (1.0 - libm::pow(beta1, step as f64))) as f32;
                let root_correction = (1.0 - libm::pow(beta2, step as f64)).sqrt() as f32;
                let epsilon = epsilon as f32;
                let first = &mut state.first_moment[range.clone()];
                let second = &mut state.second_moment[range];
                for (((p, g), m), v) in parameters.iter_mut().zip(gradient).zip(first).zip(second) {
                    let g = g * scale;
                    *m = *m * beta1_32 + rest1 * g;
                    *v = *v * beta2_32 + rest2 * g * g;
                    let denominator = v.sqrt() / root_correction + epsilon;
                    *p = *p * keep - step_size * (*m / denominator);
                }
            }
        }
    }
    StepReport { grad_norm }
}

/// The L2 norm, summed in `f64` in one fixed order: eight interleaved lanes in blocks of 4,096, blocks in order.
pub fn l2_norm(vector: &[f32]) -> f64 {
    let block_sum = |block: &[f32]| {
        let mut lanes = [0f64; NORM_LANES];
        let mut groups = block.chunks_exact(NORM_LANES);
        for group in groups.by_ref() {
            for (lane, &value) in lanes.iter_mut().zip(group) {
                *lane += f64::from(value) * f64::from(value);
            }
        }
        for (lane, &value) in lanes.iter_mut().zip(groups.remainder()) {
            *lane += f64::from(value) * f64::from(value);
        }
        lanes.iter().sum::<f64>()
    };
    vector.chunks(NORM_BLOCK).map(block_sum).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{hex, vector_sha256};
    use crate::layout::TensorSpec;

    fn adamw(grad_clip: Option<f64>) -> OptimizerConfig {
        let rule = UpdateRule::Adamw { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        OptimizerConfig { rule, lr: 1e-2, grad_clip }
    }

    fn update(gradient_sum: &[f32], weight_sum: f64, lr: f64, step: u64) -> Update<'_> {
        Update { gradient_sum, weight_sum, lr, step }
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
        let (config, layout) = (adamw(None), layout(5, 3));
        let mut parameters: Vec<f32> = (0..8).map(|i| 0.3 - 0.1 * i as f32).collect();
        let mut state = OptimizerState::new(&config, 8);
        let mut plain: Vec<(f64, f64, f64)> = parameters.iter().map(|&p| (f64::from(p), 0.0, 0.0)).collect();
        for t in 1..=20u64 {
            let gradient: Vec<f32> = (0..8).map(|i| ((i as u64 * 7 + t * 3) % 11) as f32 - 5.0).collect();
            step(&config, &layout, &mut parameters, &mut state, update(&gradient, 4.0, 1e-2, t));
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

    #[test]
    fn adamw_and_sgd_agree_with_burns() {
        use burn::tensor::Tensor;
        use burn_optim::{AdamWConfig, Optimizer, SgdConfig};

        use crate::device::{ComputeDevice, DeviceChoice};

        let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
        let start: Vec<f32> = crate::probe::parameters(16).iter().map(|p| p * 20.0).collect();
        let gradient = |t: u64| -> Vec<f32> { (0..16).map(|i| ((i * 7 + t * 3) % 11) as f32 / 4.0 - 1.2).collect() };
        let ours = |config: &OptimizerConfig| {
            let (mut parameters, mut state) = (start.clone(), OptimizerState::new(config, 16));
            for t in 1..=30 {
                step(config, &layout(16, 0), &mut parameters, &mut state, update(&gradient(t), 1.0, 1e-2, t));
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
        let sgd = OptimizerConfig { rule: UpdateRule::Sgd, lr: 1e-2, grad_clip: None };
        for (ours, theirs) in [
            (ours(&adamw(None)), theirs(&burns_adamw, &start, gradient, &device)),
            (ours(&sgd), theirs(&SgdConfig::new().build(), &start, gradient, &device)),
        ] {
            assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 2e-6), "{ours:?} is not {theirs:?}");
        }
    }

    #[test]
    fn clipping_scales_the_whole_gradient_to_the_limit() {
        let config = OptimizerConfig { rule: UpdateRule::Sgd, lr: 1.0, grad_clip: Some(1.0) };
        let mut parameters = vec![0.0; 2];
        let report = step(
            &config,
            &layout(1, 1),
            &mut parameters,
            &mut OptimizerState::default(),
            update(&[6.0, 8.0], 2.0, 1.0, 1),
        );
        assert_eq!(report.grad_norm, 5.0);
        assert!((parameters[0] + 0.6).abs() < 1e-6 && (parameters[1] + 0.8).abs() < 1e-6, "{parameters:?}");
    }

    #[test]
    fn frozen_tensors_stay() {
        let mut layout = layout(2, 2);
        layout.tensors[0].trainable = false;
        let mut parameters = vec![1.0; 4];
        let mut state = OptimizerState::new(&adamw(None), 4);
        step(&adamw(None), &layout, &mut parameters, &mut state, update(&[1.0; 4], 1.0, 1e-2, 1));
        assert_eq!(parameters[..2], [1.0, 1.0]);
        assert!(parameters[2] < 1.0);
    }

    /// The same bits on every platform: a digest computed once and pinned.
    #[test]
    fn the_coordinators_arithmetic_is_pinned() {
        let elements = 10_007;
        let (config, layout) = (adamw(Some(1.0)), layout(elements - 100, 100));
        let mut parameters = crate::probe::parameters(elements);
        let mut state = OptimizerState::new(&config, elements);
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
            norms.push(step(&config, &layout, &mut parameters, &mut state, update(&gradient, 3.0, lr, t)).grad_norm);
        }
        expect_test::expect!["5ebe5d62fd18ceb78d001959e3d45e42c840049cad0d572a4896996f8011076a"]
            .assert_eq(&hex(&vector_sha256(&parameters)));
        expect_test::expect![
            "[5562.367646304424, 4750.595256732812, 3286.1605103982815, 2336.7786039859157, 2034.7345469381853]"
        ]
        .assert_eq(&format!("{norms:?}"));
    }
}
