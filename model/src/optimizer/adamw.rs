//! AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in PyTorch's order of operations.

use super::{Part, Rates, keep};
use crate::config::AdamwConfig;
use crate::layout::TensorSpec;

/// Decays the parameters by `1 - lr · weight_decay`, updates both moments, and subtracts
/// `lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)`.
pub(super) fn step(config: &AdamwConfig, tensor: &TensorSpec, part: Part<'_>, rates: Rates) {
    let &AdamwConfig { beta1, beta2, epsilon, weight_decay } = config;
    let Rates { scale, lr, step } = rates;
    let keep = keep(tensor, lr, weight_decay);
    let (beta1_32, beta2_32) = (beta1 as f32, beta2 as f32);
    let (rest1, rest2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
    let step_size = (lr / (1.0 - libm::pow(beta1, step as f64))) as f32;
    let root_correction = (1.0 - libm::pow(beta2, step as f64)).sqrt() as f32;
    let epsilon = epsilon as f32;
    let moments = part.first_moment.iter_mut().zip(part.second_moment);
    for ((p, g), (m, v)) in part.parameters.iter_mut().zip(part.gradient).zip(moments) {
        let g = g * scale;
        *m = *m * beta1_32 + rest1 * g;
        *v = *v * beta2_32 + rest2 * g * g;
        let denominator = v.sqrt() / root_correction + epsilon;
        *p = *p * keep - step_size * (*m / denominator);
    }
}
