//! GELU, exact or by tanh. Forward computes value and derivative in one pass; backward is one product.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::config;
use crate::kernels::elementary::{gelu, gelu_by_tanh};

/// Elements that one thread works on at a time.
const BLOCK: usize = 1 << 14;

/// `x Φ(x)`, or its approximation, element by element.
#[derive(Debug)]
pub(crate) struct Gelu(pub(crate) config::Gelu);

impl Operation<1> for Gelu {
    type Saved = CpuTensor; // The derivative.

    fn forward(self, [x]: [CpuTensor; 1], _wanted: [bool; 1]) -> (CpuTensor, CpuTensor) {
        let x = row_major(x);
        let shape = shape(&x);
        let x = x.storage::<f32>();
        let [mut value, mut slope] = [x.len(); 2].map(Buffer::of_any);
        let blocks = value.par_chunks_mut(BLOCK).zip(slope.par_chunks_mut(BLOCK)).zip(x.par_chunks(BLOCK));
        blocks.for_each(|((value, slope), x)| AutoArch::new().dispatch(Forward { gelu: self.0, x, value, slope }));
        (tensor(value, &shape), tensor(slope, &shape))
    }

    fn backward(slope: CpuTensor, gradient: CpuTensor, _wanted: [bool; 1]) -> [Option<CpuTensor>; 1] {
        let mut gradient = row_major(gradient);
        let blocks = gradient.storage_mut::<f32>().par_chunks_mut(BLOCK).zip(slope.storage::<f32>().par_chunks(BLOCK));
        blocks.for_each(|(gradient, slope)| {
            gradient.iter_mut().zip(slope).for_each(|(gradient, slope)| *gradient *= slope);
        });
        [Some(gradient)]
    }
}

struct Forward<'a> {
    gelu: config::Gelu,
    x: &'a [f32],
    value: &'a mut [f32],
    slope: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let elements = self.x.iter().zip(self.value).zip(self.slope);
        match self.gelu {
            config::Gelu::Exact => elements.for_each(|((x, value), slope)| (*value, *slope) = gelu(*x)),
            config::Gelu::Tanh => elements.for_each(|((x, value), slope)| (*value, *slope) = gelu_by_tanh(*x)),
        }
    }
}
