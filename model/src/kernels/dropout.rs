//! Dropout (Srivastava et al. 2014): each element times its factor, which backward draws again.

use rayon::prelude::*;

use super::cpu::{CpuTensor, Operation, row_major};
use crate::dropout::Factors;

/// Elements that one thread works on at a time.
const BLOCK: usize = 1 << 11;

/// Multiplies a tensor's elements, row-major, by their factors.
#[derive(Debug)]
pub(super) struct Dropout(pub(super) Factors);

impl Operation<1> for Dropout {
    type Saved = Factors;

    fn forward(self, [x]: [CpuTensor; 1]) -> (CpuTensor, Factors) {
        (multiply(x, self.0), self.0)
    }

    fn backward(factors: Factors, gradient: CpuTensor) -> [CpuTensor; 1] {
        [multiply(gradient, factors)]
    }
}

fn multiply(x: CpuTensor, factors: Factors) -> CpuTensor {
    let mut x = row_major(x);
    x.storage_mut::<f32>().par_chunks_mut(BLOCK).enumerate().for_each(|(index, values)| {
        let mut block = [0.0; BLOCK];
        let block = &mut block[..values.len()];
        factors.fill((index * BLOCK) as u64, block);
        values.iter_mut().zip(block).for_each(|(value, factor)| *value *= *factor);
    });
    x
}
