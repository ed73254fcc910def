//! Dropout, with what is added to it. The factors are drawn once, and held for the backward pass.

use rayon::prelude::*;

use super::buffer::Buffer;
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::dropout::Factors;

/// Elements that one thread works on at a time.
const PART: usize = 1 << 12;

/// The product of the first input with the factors, plus the second where there is one.
#[derive(Debug)]
pub(crate) struct ApplyDropout {
    pub(crate) factors: Factors,
}

impl<const N: usize> Operation<N> for ApplyDropout {
    type Saved = CpuTensor; // The factors.

    fn forward(self, inputs: [CpuTensor; N], _wanted: [bool; N]) -> (CpuTensor, CpuTensor) {
        let mut inputs = inputs.into_iter().map(row_major);
        let (mut x, onto) = (inputs.next().expect("one input at least"), inputs.next());
        let mut factors = Buffer::of_any(x.storage::<f32>().len());
        self.factors.fill_all(&mut factors);
        let shape = shape(&x);
        let parts = x.storage_mut::<f32>().par_chunks_mut(PART).zip(factors.par_chunks(PART));
        match &onto {
            None => parts.for_each(|(x, factors)| multiply(x, factors)),
            Some(onto) => parts.zip(onto.storage::<f32>().par_chunks(PART)).for_each(|((x, factors), onto)| {
                for ((x, factor), onto) in x.iter_mut().zip(factors).zip(onto) {
                    *x = onto + *x * factor;
                }
            }),
        }
        (x, tensor(factors, &shape))
    }

    fn backward(factors: CpuTensor, gradient: CpuTensor, _wanted: [bool; N]) -> [Option<CpuTensor>; N] {
        let gradient = row_major(gradient);
        let mut of_x = gradient.clone();
        let parts = of_x.storage_mut::<f32>().par_chunks_mut(PART).zip(factors.storage::<f32>().par_chunks(PART));
        parts.for_each(|(gradient, factors)| multiply(gradient, factors));
        let mut gradients = [of_x, gradient].into_iter();
        std::array::from_fn(|_| gradients.next())
    }
}

fn multiply(values: &mut [f32], factors: &[f32]) {
    values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
}
