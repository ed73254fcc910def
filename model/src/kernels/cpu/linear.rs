//! Linear layers, with what is added to them: the product is added where bias and residual already stand.

use rayon::prelude::*;

use super::buffer::Buffer;
use super::product::{Before, Matrix, multiply};
use super::{CpuTensor, Operation, row_major, shape, tensor};

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
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    linear: Linear,
    x: CpuTensor,
    weight: CpuTensor,
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

    fn forward(self, inputs: [CpuTensor; N]) -> (CpuTensor, Saved) {
        let mut inputs = inputs.into_iter().map(row_major);
        let mut next = || inputs.next().expect("as many inputs as the layer has");
        let (x, weight) = (next(), next());
        let bias = self.has_bias.then(&mut next);
        let residual = self.has_residual.then(next);

        let (matrix, mut shape) = (self.matrix(&weight), shape(&x));
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
        multiply(&mut y, before, inputs, matrix);
        (tensor(y, &shape), Saved { linear: self, x, weight })
    }

    fn backward(saved: Saved, gradient: CpuTensor) -> [CpuTensor; N] {
        let Saved { linear, x, weight } = saved;
        let gradient = row_major(gradient);
        let (matrix, shape_of_x) = (linear.matrix(&weight), shape(&x));
        let (inputs, width) = (Matrix::new(x.storage(), matrix.rows()), matrix.columns());
        let upper = Matrix::new(gradient.storage(), width);

        let mut of_x = Buffer::of_any(x.storage::<f32>().len());
        multiply(&mut of_x, Before::Replaced, upper, matrix.transposed());
        let mut of_weight = Buffer::of_any(weight.storage::<f32>().len());
        if linear.transposed {
            multiply(&mut of_weight, Before::Replaced, upper.transposed(), inputs);
        } else {
            multiply(&mut of_weight, Before::Replaced, inputs.transposed(), upper);
        }
        let mut gradients = vec![tensor(of_x, &shape_of_x), tensor(of_weight, &shape(&weight))];
        if linear.has_bias {
            gradients.push(tensor(sum_of_rows(gradient.storage(), width), &[width]));
        }
        if linear.has_residual {
            gradients.push(gradient);
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
