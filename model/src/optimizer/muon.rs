//! Muon (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>): momentum, made orthogonal, for the matrices
//! between embedding and head. Whatever else a model has follows AdamW.
//!
//! Updates are scaled as Liu et al. do (arXiv:2502.16982), to the root mean square that AdamW's usually have, so that both
//! rules share one learning rate and one weight decay.

use super::matrix::{product, transposed};
use super::{Part, Rates, keep};
use crate::config::MuonConfig;
use crate::layout::TensorSpec;
use crate::pieces::l2_norm;

/// Of the odd polynomial `a x + b x³ + c x⁵` that the iteration applies to all singular values at once.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.775, 2.0315];
const ITERATIONS: usize = 5;
/// Stands for the norm of a matrix that is smaller.
const MIN_NORM: f64 = 1e-7;
/// Root mean square of AdamW's updates, by Liu et al.
const UPDATE_RMS: f64 = 0.2;

/// Decays the matrix by `1 - lr · weight_decay`, updates the momentum, and subtracts
/// `0.2 · √max(rows, columns) · lr` times what [`orthogonal`] makes of Nesterov's momentum.
pub(super) fn step(config: &MuonConfig, tensor: &TensorSpec, part: Part<'_>, rates: Rates) {
    let [rows, columns] = tensor.shape[..] else { unreachable!("{} is no matrix", tensor.name) };
    let Rates { scale, lr, .. } = rates;
    let keep = keep(tensor, lr, config.adamw.weight_decay);
    let (momentum, rest) = (config.momentum as f32, (1.0 - config.momentum) as f32);
    let mut direction = Vec::with_capacity(rows * columns);
    for (m, g) in part.first_moment.iter_mut().zip(part.gradient) {
        let g = g * scale;
        *m = *m * momentum + rest * g;
        direction.push(*m * momentum + rest * g);
    }
    let direction = orthogonal(direction, rows, columns);
    let step_size = (UPDATE_RMS * (rows.max(columns) as f64).sqrt() * lr) as f32;
    for (p, d) in part.parameters.iter_mut().zip(direction) {
        *p = *p * keep - step_size * d;
    }
}

/// A matrix `[rows, columns]` with the singular vectors of `matrix` and singular values near 1 (between 0.7 and 1.2), by a
/// quintic Newton-Schulz iteration.
fn orthogonal(matrix: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    if rows > columns {
        let wide = orthogonal(transposed(&matrix, rows, columns), columns, rows);
        return transposed(&wide, columns, rows);
    }
    let [a, b, c] = COEFFICIENTS;
    let norm = l2_norm(&matrix).max(MIN_NORM) as f32;
    let mut x = matrix; // [rows, columns]
    x.iter_mut().for_each(|x| *x /= norm);
    for _ in 0..ITERATIONS {
        let square = product(&x, &transposed(&x, rows, columns), [rows, columns, rows]); // X Xᵀ
        let mut polynomial = product(&square, &square, [rows, rows, rows]);
        polynomial.iter_mut().zip(&square).for_each(|(p, s)| *p = b * s + c * *p);
        let turned = product(&polynomial, &x, [rows, rows, columns]);
        x.iter_mut().zip(turned).for_each(|(x, t)| *x = a * *x + t);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The singular values of the result are the polynomial's, iterated on those of the input over their norm: seen on
    /// matrices that are diagonal but for a rotation on either side.
    #[test]
    fn singular_vectors_stay_and_values_follow_the_polynomial() {
        let (rows, columns) = (2, 3);
        let (left, right) = (0.3f64, 1.1f64);
        let build = |values: [f64; 2]| -> Vec<f32> {
            let u = [[left.cos(), -left.sin()], [left.sin(), left.cos()]];
            let v = [[right.cos(), 0.0, right.sin()], [0.0, 1.0, 0.0]];
            let element = |i: usize, j: usize| (0..2).map(|k| u[i][k] * values[k] * v[k][j]).sum::<f64>() as f32;
            (0..rows * columns).map(|index| element(index / columns, index % columns)).collect()
        };
        let values = [3.0, 0.5];
        let norm = (9.0f64 + 0.25).sqrt();
        let followed = values.map(|value| {
            (0..ITERATIONS).fold(value / norm, |x, _| {
                let [a, b, c] = COEFFICIENTS.map(f64::from);
                a * x + b * x.powi(3) + c * x.powi(5)
            })
        });
        assert!(followed.iter().all(|value| (0.7..1.2).contains(value)), "{followed:?}");
        let expected = build(followed);
        let wide = orthogonal(build(values), rows, columns);
        let tall = orthogonal(transposed(&build(values), rows, columns), columns, rows);
        for found in [wide, transposed(&tall, columns, rows)] {
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn nothing_becomes_nothing() {
        assert_eq!(orthogonal(vec![0.0; 6], 3, 2), [0.0; 6]);
    }
}
