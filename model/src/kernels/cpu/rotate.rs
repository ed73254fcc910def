//! Rotary positions (Su et al., arXiv:2104.09864): element i of a head's first half and element i of its second are turned,
//! as a point of the plane, by an angle of the position's. Backward turns the other way.

use std::sync::Arc;

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::{CpuTensor, Operation, row_major, shape};

/// Turns `[B, H, T, D]`.
#[derive(Debug)]
pub(crate) struct Rotate {
    /// Cosines `[T, D/2]`.
    pub(crate) cos: Arc<Vec<f32>>,
    /// Sines `[T, D/2]`.
    pub(crate) sin: Arc<Vec<f32>>,
}

impl Operation<1> for Rotate {
    type Saved = [Arc<Vec<f32>>; 2];

    fn forward(self, [x]: [CpuTensor; 1]) -> (CpuTensor, [Arc<Vec<f32>>; 2]) {
        (turn(x, &self.cos, &self.sin, 1.0), [self.cos, self.sin])
    }

    fn backward([cos, sin]: [Arc<Vec<f32>>; 2], gradient: CpuTensor) -> [CpuTensor; 1] {
        [turn(gradient, &cos, &sin, -1.0)]
    }
}

/// `x` turned by the angles, times `direction`.
fn turn(x: CpuTensor, cos: &[f32], sin: &[f32], direction: f32) -> CpuTensor {
    let mut x = row_major(x);
    let width = shape(&x)[3];
    x.storage_mut::<f32>().par_chunks_mut(2 * cos.len()).for_each(|head| {
        AutoArch::new().dispatch(Turn { width, head, cos, sin, direction });
    });
    x
}

struct Turn<'a> {
    /// D.
    width: usize,
    /// `[T, D]`.
    head: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    direction: f32,
}

impl WithSimd for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let half = self.width / 2;
        let angles = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
        for (row, (cos, sin)) in self.head.chunks_exact_mut(self.width).zip(angles) {
            let (first, second) = row.split_at_mut(half);
            for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                let (x, y, sin) = (*first, *second, sin * self.direction);
                *first = x * cos - y * sin;
                *second = y * cos + x * sin;
            }
        }
    }
}
