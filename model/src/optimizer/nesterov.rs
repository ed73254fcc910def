//! Stochastic gradient descent with Nesterov's momentum, in the form of Sutskever et al. 2013 as PyTorch has it
//! (`SGD(momentum=…, nesterov=True)`).

use super::{Part, Rates};
use crate::config::NesterovConfig;

/// With momentum `μ`: `b ← μ · b + g`, then subtracts `lr · (g + μ · b)`.
pub(super) fn step(config: NesterovConfig, part: Part<'_>, rates: Rates) {
    let Rates { scale, lr, .. } = rates;
    let (momentum, lr) = (config.momentum as f32, lr as f32);
    for ((p, g), b) in part.parameters.iter_mut().zip(part.gradient).zip(part.first_moment) {
        let g = g * scale;
        *b = *b * momentum + g;
        *p -= lr * (g + momentum * *b);
    }
}
