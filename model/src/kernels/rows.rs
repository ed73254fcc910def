//! What the CPU does to one row, or to one element of it, where it trains and where it generates.

use super::elementary::logistic;
use super::lanes::sum;

/// Mean μ of a row, 0 unless it is `centred`, and `s = 1 / √(mean of (x - μ)² + ε)`.
#[inline(always)]
pub(crate) fn mean_and_scale(row: &[f32], centred: bool, epsilon: f32) -> [f32; 2] {
    let share = 1.0 / row.len() as f32;
    let mean = if centred { sum(row, row, |x, _| x) * share } else { 0.0 };
    let variance = sum(row, row, |x, _| (x - mean) * (x - mean)) * share;
    [mean, 1.0 / (variance + epsilon).sqrt()]
}

/// The gate of SwiGLU (Shazeer, arXiv:2002.05202), element by element.
#[inline(always)]
pub(crate) fn gate(value: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((value, gate), up) in value.iter_mut().zip(gate).zip(up) {
        *value = gate * logistic(*gate) * up;
    }
}

/// Turns element i of a head's first half and element i of its second, as a point of the plane, by the angle of these
/// cosines and sines `[D/2]`, times `direction`: 1, or -1 for the way back.
#[inline(always)]
pub(crate) fn turn(head: &mut [f32], cos: &[f32], sin: &[f32], direction: f32) {
    let (first, second) = head.split_at_mut(cos.len());
    for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
        let (x, y, sin) = (*first, *second, sin * direction);
        *first = x * cos - y * sin;
        *second = y * cos + x * sin;
    }
}
