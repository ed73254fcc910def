//! Cross-entropy of logits, with its gradient made in the same pass: of a row, `w · (log Σ e^x - x[target])`, and
//! `w · (e^x / Σ e^x - [target])`. The gradient takes the logits' place; no log-probabilities are kept.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::elementary::exp;
use super::lanes::{LANES, reduce, sum};
use super::{CpuTensor, Operation, row_major, shape, tensor};

/// Rows that one thread works on at a time.
const ROWS: usize = 16;

/// The sum of weighted losses, `[1]`, of logits `[rows, V]`.
#[derive(Debug)]
pub(crate) struct CrossEntropy {
    /// Below V, one for each row.
    pub(crate) targets: Vec<u32>,
    /// One for each row; 1 where there are none.
    pub(crate) weights: Option<Vec<f32>>,
}

impl Operation<1> for CrossEntropy {
    type Saved = CpuTensor; // The gradient, if the sum's is 1.

    fn forward(self, [logits]: [CpuTensor; 1]) -> (CpuTensor, CpuTensor) {
        let mut logits = row_major(logits);
        let width = shape(&logits)[1];
        let weights = self.weights.unwrap_or_else(|| vec![1.0; self.targets.len()]);
        let mut losses = vec![0.0; self.targets.len()];
        let blocks = logits.storage_mut::<f32>().par_chunks_mut(ROWS * width).zip(losses.par_chunks_mut(ROWS));
        let blocks = blocks.zip(self.targets.par_chunks(ROWS)).zip(weights.par_chunks(ROWS));
        blocks.for_each(|(((logits, losses), targets), weights)| {
            AutoArch::new().dispatch(Forward { width, logits, losses, targets, weights });
        });
        (tensor(vec![losses.iter().sum::<f64>() as f32], &[1]), logits)
    }

    fn backward(mut logits: CpuTensor, gradient: CpuTensor) -> [CpuTensor; 1] {
        let factor = row_major(gradient).storage::<f32>()[0];
        if factor != 1.0 {
            logits.storage_mut::<f32>().par_iter_mut().for_each(|gradient| *gradient *= factor);
        }
        [logits]
    }
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
