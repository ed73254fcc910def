//! Cross-entropy of a model's logits, fused with the products that make them. Of a row of logits the loss is
//! `w · (log Σ e^x - x[target])`, and its gradient `w · (e^x / Σ e^x - [target])` takes the logits' place in the same pass.
//!
//! Rows are worked on a part at a time, from the product with the table to the gradients of row and table, so that no more
//! than one part's logits are ever there (as in Hsu et al., arXiv:2410.10989). Gradients are made forward, where there is
//! to be a backward pass, which multiplies them by the sum's own.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::product::{Before, Matrix, multiply};
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::config::Precision;
use crate::kernels::elementary::exp;
use crate::kernels::lanes::{LANES, reduce, sum};

/// Rows that one thread works on at a time.
const ROWS: usize = 16;
/// Logits of a part, about: 16 MiB.
const PART: usize = 1 << 22;
/// Rows of a part, at least: with fewer, adding to the table's gradient costs as much as computing it.
const LEAST_ROWS: usize = 256;

/// The sum of weighted losses, `[1]`, of the logits of x `[rows, C]` by the table `[V, C]`.
#[derive(Debug)]
pub(crate) struct CrossEntropy {
    /// Below V, one for each row.
    pub(crate) targets: Vec<u32>,
    /// One for each row; 1 where there are none.
    pub(crate) weights: Option<Vec<f32>>,
    /// Of the products with the table.
    pub(crate) precision: Precision,
}

impl Operation<2> for CrossEntropy {
    type Saved = [Option<CpuTensor>; 2]; // The gradients of x and the table, if the sum's is 1.

    fn forward(self, [x, table]: [CpuTensor; 2], wanted: [bool; 2]) -> (CpuTensor, Self::Saved) {
        let inputs = [row_major(x), row_major(table)];
        let buffer = |input: usize| wanted[input].then(|| Buffer::of_any(inputs[input].storage::<f32>().len()));
        let [mut of_x, mut of_table] = [buffer(0), buffer(1)];
        let loss = self.losses(&inputs, [of_x.as_deref_mut(), of_table.as_deref_mut()]);
        let as_tensor = |(gradient, input): (Buffer, usize)| tensor(gradient, &shape(&inputs[input]));
        (loss, [of_x.map(|of_x| as_tensor((of_x, 0))), of_table.map(|of_table| as_tensor((of_table, 1)))])
    }

    fn backward(gradients: Self::Saved, gradient: CpuTensor, _wanted: [bool; 2]) -> [Option<CpuTensor>; 2] {
        let factor = row_major(gradient).storage::<f32>()[0];
        gradients.map(|gradient| {
            let mut gradient = gradient?;
            if factor != 1.0 {
                gradient.storage_mut::<f32>().par_iter_mut().for_each(|gradient| *gradient *= factor);
            }
            Some(gradient)
        })
    }
}

impl CrossEntropy {
    /// The sum of losses, and the gradients of x and the table where there is a place for them.
    fn losses(self, [x, table]: &[CpuTensor; 2], [mut of_x, mut of_table]: [Option<&mut [f32]>; 2]) -> CpuTensor {
        let [vocab_size, width] = shape(table)[..] else { unreachable!("the table is a matrix") };
        let table = Matrix::new(table.storage(), width);
        let precision = self.precision;
        let weights = self.weights.unwrap_or_else(|| vec![1.0; self.targets.len()]);
        let rows = (PART / vocab_size).max(LEAST_ROWS);
        let parts = x.storage::<f32>().chunks(rows * width).zip(self.targets.chunks(rows)).zip(weights.chunks(rows));
        let mut losses = Vec::with_capacity(self.targets.len());
        let mut logits = Buffer::of_any(rows.min(self.targets.len()) * vocab_size);
        for (part, ((x, targets), weights)) in parts.enumerate() {
            let (x, logits) = (Matrix::new(x, width), &mut logits[..targets.len() * vocab_size]);
            multiply(logits, Before::Replaced, x, table.transposed(), precision);
            losses.extend(losses_of(logits, targets, weights));
            let upper = Matrix::new(logits, vocab_size);
            if let Some(of_x) = &mut of_x {
                let of_x = &mut of_x[part * rows * width..][..targets.len() * width];
                multiply(of_x, Before::Replaced, upper, table, precision);
            }
            if let Some(of_table) = &mut of_table {
                let before = if part == 0 { Before::Replaced } else { Before::Kept };
                multiply(of_table, before, upper.transposed(), x, precision);
            }
        }
        tensor(vec![losses.iter().sum::<f64>() as f32], &[1])
    }
}

/// The losses of logits, whose gradient takes their place.
fn losses_of(logits: &mut [f32], targets: &[u32], weights: &[f32]) -> Vec<f64> {
    let width = logits.len() / targets.len();
    let mut losses = vec![0.0; targets.len()];
    let blocks = logits.par_chunks_mut(ROWS * width).zip(losses.par_chunks_mut(ROWS));
    let blocks = blocks.zip(targets.par_chunks(ROWS)).zip(weights.par_chunks(ROWS));
    blocks.for_each(|(((logits, losses), targets), weights)| {
        AutoArch::new().dispatch(Forward { width, logits, losses, targets, weights });
    });
    losses
}

struct Forward<'a> {
    width: usize,
    /// Their gradient on exit.
    logits: &'a mut [f32],
    losses: &'a mut [f64],
    targets: &'a [u32],
    weights: &'a [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let rows = self.logits.chunks_exact_mut(self.width).zip(self.losses);
        for (((row, loss), &target), &weight) in rows.zip(self.targets).zip(self.weights) {
            let (target, largest) = (target as usize, maximum(row));
            let of_target = row[target] - largest;
            for x in row.iter_mut() {
                *x = exp(*x - largest);
            }
            let total = sum(row, row, |x, _| x);
            *loss = f64::from(weight) * (libm::log(f64::from(total)) - f64::from(of_target));
            let share = weight / total;
            for x in row.iter_mut() {
                *x *= share;
            }
            row[target] -= weight;
        }
    }
}

/// The largest of `values`. NaNs may be passed over: they reach the sum by themselves.
#[inline(always)]
fn maximum(values: &[f32]) -> f32 {
    let larger = |left: f32, right: f32| if right > left { right } else { left };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    let largest = reduce(lanes, larger);
    rest.iter().fold(largest, |largest, &value| larger(largest, value))
}
