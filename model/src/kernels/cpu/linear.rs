//! Linear layers, with what is added to them: the product is added where bias and residual already stand.

use rayon::prelude::*;

use super::buffer::Buffer;
use super::product::{Before, Matrix, multiply};
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::config::Precision;

/// Elements of a row that one thread sums over all rows.
const COLUMNS: usize = 256;
/// Rows that one thread adds a bias to at a time.
const ROWS: usize = 16;

/// `x W + b + residual` of x `[.., in]`, W `[in, out]`, or its transpose, and, where they are, b `[out]` and residual
/// `[.., out]`, in this order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    /// Whether W is given as `[out, in]`.
    pub(crate) transposed: bool,
    pub(crate) has_bias: bool,
    pub(crate) has_residual: bool,
    /// Of all products.
    pub(crate) precision: Precision,
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    linear: Linear,
    /// For the gradient of W.
    x: Option<CpuTensor>,
    /// For the gradient of x.
    weight: Option<CpuTensor>,
    shape_of_x: Vec<usize>,
    shape_of_weight: Vec<usize>,
}

impl Linear {
    /// `[in, out]`.
    fn matrix(self, weight: &CpuTensor) -> Matrix<'_> {
        let matrix = Matrix::new(weight.storage::<f32>(), shape(weight)[1]);
        if self.transposed { matrix.transposed() } else { matrix }
    }
}

impl<const N: usize> Operation<N> for Linear {
    type Saved = Saved;

    fn forward(self, inputs: [CpuTensor; N], wanted: [bool; N]) -> (CpuTensor, Saved) {
        let mut inputs = inputs.into_iter().map(row_major);
        let mut next = || inputs.next().expect("as many inputs as the layer has");
        let (x, weight) = (next(), next());
        let bias = self.has_bias.then(&mut next);
        let residual = self.has_residual.then(next);

        let (shape_of_x, shape_of_weight) = (shape(&x), shape(&weight));
        let (matrix, mut shape) = (self.matrix(&weight), shape_of_x.clone());
        let (inputs, width) = (Matrix::new(x.storage(), matrix.rows()), matrix.columns());
        let rows = inputs.rows();
        shape.splice(shape.len() - 1.., [width]);
        let (mut y, before) = match (&bias, &residual) {
            (None, None) => (Buffer::of_any(rows * width), Before::Replaced),
            (Some(bias), None) => {
                let mut y = Buffer::of_any(rows * width);
                y.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(bias.storage()));
                (y, Before::Kept)
            }
            (bias, Some(residual)) => {
                let mut y = Buffer::of(residual.storage());
                if let Some(bias) = bias {
                    add_to_rows(&mut y, bias.storage());
                }
                (y, Before::Kept)
            }
        };
        multiply(&mut y, before, inputs, matrix, self.precision);
        let (weight, x) = (wanted[0].then_some(weight), wanted[1].then_some(x));
        (tensor(y, &shape), Saved { linear: self, x, weight, shape_of_x, shape_of_weight })
    }

    fn backward(saved: Saved, gradient: CpuTensor, wanted: [bool; N]) -> [Option<CpuTensor>; N] {
        let Saved { linear, x, weight, shape_of_x, shape_of_weight } = saved;
        let gradient = row_major(gradient);
        let axes = if linear.transposed { [1, 0] } else { [0, 1] };
        let [from, to] = axes.map(|axis| shape_of_weight[axis]);
        let upper = Matrix::new(gradient.storage(), to);
        let of_x = weight.map(|weight| {
            let mut of_x = Buffer::of_any(upper.rows() * from);
            multiply(&mut of_x, Before::Replaced, upper, linear.matrix(&weight).transposed(), linear.precision);
            tensor(of_x, &shape_of_x)
        });
        let of_weight = x.map(|x| {
            let (inputs, mut of_weight) = (Matrix::new(x.storage(), from), Buffer::of_any(from * to));
            let (left, right) = if linear.transposed { (upper, inputs) } else { (inputs, upper) };
            multiply(&mut of_weight, Before::Replaced, left.transposed(), right, linear.precision);
            tensor(of_weight, &shape_of_weight)
        });
        let mut gradients = vec![of_x, of_weight];
        if linear.has_bias {
            gradients.push(wanted[2].then(|| tensor(sum_of_rows(gradient.storage(), to), &[to])));
        }
        if linear.has_residual {
            gradients.push(Some(gradient));
        }
        gradients.try_into().expect("as many gradients as inputs")
    }
}

/// Adds `row` to each row of `rows`.
fn add_to_rows(rows: &mut [f32], row: &[f32]) {
    rows.par_chunks_mut(ROWS * row.len().max(1)).for_each(|rows| {
        for sums in rows.chunks_exact_mut(row.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    });
}

/// The sum of rows of `width` elements, in their order.
fn sum_of_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; width];
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(index, sums)| {
        for row in rows.chunks_exact(width) {
            sums.iter_mut().zip(&row[index * COLUMNS..]).for_each(|(sum, x)| *sum += x);
        }
    });
    sums
}
