//! Normalisation over the last axis: layer norm (Ba et al., arXiv:1607.06450) and root-mean-square norm (Zhang and
//! Sennrich, arXiv:1910.07467).
//!
//! With `x̂ = (x - μ) s` and `y = x̂ w + b`, where `s = 1 / √(mean of (x - μ)² + ε)`, and μ is 0 in the root-mean-square
//! norm: for `g = dy w`, `dx = s (g - mean g - x̂ · mean of (g x̂))`, without `mean g` where μ is 0; `dw` is the sum of
//! `dy x̂` over rows, `db` that of `dy`.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::kernels::lanes::sum;
use crate::kernels::rows::mean_and_scale;

/// Rows that one thread works on at a time, and whose share of the parameters' gradients is added up at once.
const ROWS: usize = 64;

/// Which of the two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    /// Whether μ is subtracted.
    pub(crate) centred: bool,
    /// ε.
    pub(crate) epsilon: f32,
}

/// What backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    norm: Norm,
    x: CpuTensor,
    weight: CpuTensor,
    /// μ and s of each row.
    statistics: Vec<[f32; 2]>,
}

impl Operation<2> for Norm {
    type Saved = Saved;

    fn forward(self, [x, weight]: [CpuTensor; 2], _wanted: [bool; 2]) -> (CpuTensor, Saved) {
        self.normalise(x, weight, None)
    }

    fn backward(saved: Saved, gradient: CpuTensor, [_, of_weight]: [bool; 2]) -> [Option<CpuTensor>; 2] {
        let [x, weight, _] = saved.backward(gradient, of_weight);
        [x, weight]
    }
}

impl Operation<3> for Norm {
    type Saved = Saved;

    fn forward(self, [x, weight, bias]: [CpuTensor; 3], _wanted: [bool; 3]) -> (CpuTensor, Saved) {
        self.normalise(x, weight, Some(bias))
    }

    fn backward(saved: Saved, gradient: CpuTensor, [_, of_weight, of_bias]: [bool; 3]) -> [Option<CpuTensor>; 3] {
        saved.backward(gradient, of_weight || of_bias)
    }
}

impl Norm {
    fn normalise(self, x: CpuTensor, weight: CpuTensor, bias: Option<CpuTensor>) -> (CpuTensor, Saved) {
        let (x, weight, bias) = (row_major(x), row_major(weight), bias.map(row_major));
        let (shape, values, weights) = (shape(&x), x.storage::<f32>(), weight.storage::<f32>());
        let width = weights.len();
        let biases = bias.as_ref().map(|bias| bias.storage::<f32>());
        let mut y = Buffer::of_any(values.len());
        let mut statistics = vec![[0.0; 2]; values.len() / width];
        let blocks = values.par_chunks(ROWS * width).zip(y.par_chunks_mut(ROWS * width));
        blocks.zip(statistics.par_chunks_mut(ROWS)).for_each(|((x, y), statistics)| {
            AutoArch::new().dispatch(Forward { norm: self, x, weights, biases, y, statistics });
        });
        (tensor(y, &shape), Saved { norm: self, x, weight, statistics })
    }
}

impl Saved {
    /// The gradients of x, and where they are wanted, of weight and bias.
    fn backward(self, gradient: CpuTensor, of_parameters: bool) -> [Option<CpuTensor>; 3] {
        let mut gradient = row_major(gradient);
        let (x, weights) = (self.x.storage::<f32>(), self.weight.storage::<f32>());
        let (norm, width) = (self.norm, weights.len());
        let mut shares = vec![0.0; self.statistics.len().div_ceil(ROWS) * 2 * width];
        let blocks = gradient.storage_mut::<f32>().par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width));
        let blocks = blocks.zip(self.statistics.par_chunks(ROWS)).zip(shares.par_chunks_mut(2 * width));
        blocks.for_each(|(((gradient, x), statistics), share)| {
            AutoArch::new().dispatch(Backward { norm, x, weights, statistics, gradient, share, of_parameters });
        });
        if !of_parameters {
            return [Some(gradient), None, None];
        }
        let mut sums = vec![0.0; 2 * width];
        for share in shares.chunks_exact(2 * width) {
            sums.iter_mut().zip(share).for_each(|(sum, share)| *sum += share);
        }
        let biases = sums.split_off(width);
        [gradient, tensor(sums, &[width]), tensor(biases, &[width])].map(Some)
    }
}

struct Forward<'a> {
    norm: Norm,
    x: &'a [f32],
    weights: &'a [f32],
    biases: Option<&'a [f32]>,
    y: &'a mut [f32],
    statistics: &'a mut [[f32; 2]],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let width = self.weights.len();
        let rows = self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width));
        for ((x, y), statistics) in rows.zip(self.statistics) {
            let [mean, scale] = mean_and_scale(x, self.norm.centred, self.norm.epsilon);
            *statistics = [mean, scale];
            match self.biases {
                Some(biases) => {
                    for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(self.weights).zip(biases) {
                        *y = ((x - mean) * scale).mul_add(*weight, *bias);
                    }
                }
                None => {
                    for ((y, x), weight) in y.iter_mut().zip(x).zip(self.weights) {
                        *y = (x - mean) * scale * weight;
                    }
                }
            }
        }
    }
}

struct Backward<'a> {
    norm: Norm,
    x: &'a [f32],
    weights: &'a [f32],
    statistics: &'a [[f32; 2]],
    /// The result's on entry, x's on exit.
    gradient: &'a mut [f32],
    /// The weights' gradient, then the biases'.
    share: &'a mut [f32],
    /// Whether these are computed.
    of_parameters: bool,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let width = self.weights.len();
        let share = 1.0 / width as f32;
        let (weight_sums, bias_sums) = self.share.split_at_mut(width);
        let rows = self.x.chunks_exact(width).zip(self.gradient.chunks_exact_mut(width));
        for ((x, gradient), &[mean, scale]) in rows.zip(self.statistics) {
            if self.of_parameters {
                let sums = weight_sums.iter_mut().zip(&mut *bias_sums);
                for (((weight_sum, bias_sum), gradient), x) in sums.zip(&*gradient).zip(x) {
                    *weight_sum = ((x - mean) * scale).mul_add(*gradient, *weight_sum);
                    *bias_sum += gradient;
                }
            }
            for (gradient, weight) in gradient.iter_mut().zip(self.weights) {
                *gradient *= weight;
            }
            let mean_gradient = if self.norm.centred { sum(gradient, x, |g, _| g) * share } else { 0.0 };
            let along = sum(gradient, x, |g, x| g * ((x - mean) * scale)) * share;
            for (gradient, x) in gradient.iter_mut().zip(x) {
                *gradient = scale * ((x - mean) * scale).mul_add(-along, *gradient - mean_gradient);
            }
        }
    }
}
