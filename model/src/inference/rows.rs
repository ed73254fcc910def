//! What happens to each row by itself: norms and activations.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use crate::config::Gelu;
use crate::kernels::elementary::{gelu, gelu_by_tanh};
use crate::kernels::rows::{gate, mean_and_scale};

/// Elements below which another thread costs more than it brings.
const WORTH_THREADS: usize = 1 << 13;

/// Normalisation of rows: layer norm (Ba et al., arXiv:1607.06450), or root-mean-square norm (Zhang and Sennrich,
/// arXiv:1910.07467).
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    /// Whether the mean is subtracted.
    centred: bool,
    epsilon: f32,
}

/// What stands between the two matrices of a feed-forward layer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Activation {
    /// Of each element.
    Gelu(Gelu),
    /// The first half of a row is the gate of the second (Shazeer, arXiv:2002.05202).
    SwiGlu,
}

impl Norm {
    pub(super) fn layer(weight: &[f32], bias: Option<&[f32]>, epsilon: f64) -> Self {
        Self { weight: weight.to_vec(), bias: bias.map(<[f32]>::to_vec), centred: true, epsilon: epsilon as f32 }
    }

    pub(super) fn root_mean_square(weight: &[f32], epsilon: f64) -> Self {
        Self { weight: weight.to_vec(), bias: None, centred: false, epsilon: epsilon as f32 }
    }

    /// Of each row of `x`, in `y`.
    pub(super) fn of(&self, x: &[f32], y: &mut Vec<f32>) {
        let width = self.weight.len();
        y.resize(x.len(), 0.0);
        y.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(rows_worth_a_thread(width)).for_each(|(y, x)| {
            y.copy_from_slice(x);
            self.apply(y);
        });
    }

    /// Changes rows.
    pub(super) fn apply(&self, rows: &mut [f32]) {
        AutoArch::new().dispatch(Normalise { norm: self, rows });
    }
}

struct Normalise<'a> {
    norm: &'a Norm,
    rows: &'a mut [f32],
}

impl WithSimd for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let Norm { weight, bias, centred, epsilon } = self.norm;
        for row in self.rows.chunks_exact_mut(weight.len()) {
            let [mean, scale] = mean_and_scale(row, *centred, *epsilon);
            match bias {
                Some(bias) => {
                    for ((x, weight), bias) in row.iter_mut().zip(weight).zip(bias) {
                        *x = ((*x - mean) * scale).mul_add(*weight, *bias);
                    }
                }
                None => row.iter_mut().zip(weight).for_each(|(x, weight)| *x = (*x - mean) * scale * weight),
            }
        }
    }
}

impl Activation {
    /// Of rows `x` of `width` elements, in `y`; half as many are left of a gate and its row.
    pub(super) fn of(self, x: &mut Vec<f32>, width: usize, y: &mut Vec<f32>) {
        match self {
            Self::Gelu(kind) => {
                let rows = x.par_chunks_mut(width).with_min_len(rows_worth_a_thread(width));
                rows.for_each(|rows| AutoArch::new().dispatch(ApplyGelu { kind, rows }));
                std::mem::swap(x, y);
            }
            Self::SwiGlu => {
                y.resize(x.len() / 2, 0.0);
                let rows =
                    y.par_chunks_mut(width / 2).zip(x.par_chunks(width)).with_min_len(rows_worth_a_thread(width));
                rows.for_each(|(y, x)| {
                    let (gate, up) = x.split_at(width / 2);
                    AutoArch::new().dispatch(Gate { gate, up, y });
                });
            }
        }
    }
}

struct ApplyGelu<'a> {
    kind: Gelu,
    rows: &'a mut [f32],
}

impl WithSimd for ApplyGelu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        match self.kind {
            Gelu::Exact => self.rows.iter_mut().for_each(|x| *x = gelu(*x).0),
            Gelu::Tanh => self.rows.iter_mut().for_each(|x| *x = gelu_by_tanh(*x).0),
        }
    }
}

struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        gate(self.y, self.gate, self.up);
    }
}

/// Rows that it is worth to have a thread of their own for.
fn rows_worth_a_thread(width: usize) -> usize {
    WORTH_THREADS.div_ceil(width)
}
