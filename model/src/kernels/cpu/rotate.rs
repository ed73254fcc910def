//! Rotary positions (Su et al., arXiv:2104.09864): element i of a head's first half and element i of its second are turned,
//! as a point of the plane, by an angle of the position's. Backward turns the other way.

use std::sync::Arc;

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::{CpuTensor, Operation, row_major, shape};
use crate::kernels::rows::turn;

/// Turns `[B, H, T, D]`.
#[derive(Clone, Debug)]
pub(crate) struct Rotate {
    /// Cosines `[T, D/2]`.
    pub(crate) cos: Arc<Vec<f32>>,
    /// Sines `[T, D/2]`.
    pub(crate) sin: Arc<Vec<f32>>,
    /// Of each token `[B, T]`, that which has position 0; the first of its row, where there are none.
    pub(crate) starts: Option<Arc<Vec<u32>>>,
}

impl Operation<1> for Rotate {
    type Saved = Self;

    fn forward(self, [x]: [CpuTensor; 1], _wanted: [bool; 1]) -> (CpuTensor, Self) {
        (self.turn(x, 1.0), self)
    }

    fn backward(saved: Self, gradient: CpuTensor, _wanted: [bool; 1]) -> [Option<CpuTensor>; 1] {
        [Some(saved.turn(gradient, -1.0))]
    }
}

impl Rotate {
    /// `x` turned by the angles, times `direction`.
    fn turn(&self, x: CpuTensor, direction: f32) -> CpuTensor {
        let mut x = row_major(x);
        let [_, heads, length, width] = shape(&x)[..] else { unreachable!("rows, heads, positions, elements") };
        x.storage_mut::<f32>().par_chunks_mut(length * width).enumerate().for_each(|(index, head)| {
            let starts = self.starts.as_ref().map(|starts| &starts[index / heads * length..][..length]);
            AutoArch::new().dispatch(Turn { width, head, cos: &self.cos, sin: &self.sin, starts, direction });
        });
        x
    }
}

struct Turn<'a> {
    /// D.
    width: usize,
    /// `[T, D]`.
    head: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    starts: Option<&'a [u32]>,
    direction: f32,
}

impl WithSimd for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let half = self.width / 2;
        for (token, row) in self.head.chunks_exact_mut(self.width).enumerate() {
            let position = token - self.starts.map_or(0, |starts| starts[token] as usize);
            let (cos, sin) = (&self.cos[position * half..][..half], &self.sin[position * half..][..half]);
            turn(row, cos, sin, self.direction);
        }
    }
}
