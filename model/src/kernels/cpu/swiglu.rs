//! The gate of SwiGLU (Shazeer, arXiv:2002.05202): `g σ(g) u`, with derivatives `u σ (1 + g (1 - σ))` and `g σ`, where σ is
//! the logistic function of g.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::kernels::elementary::logistic;
use crate::kernels::rows::gate;

/// Elements that one thread works on at a time.
const BLOCK: usize = 1 << 14;

/// Of gate g and u, element by element.
#[derive(Debug)]
pub(crate) struct SwiGlu;

impl Operation<2> for SwiGlu {
    type Saved = [CpuTensor; 2]; // The inputs.

    fn forward(self, inputs: [CpuTensor; 2], _wanted: [bool; 2]) -> (CpuTensor, [CpuTensor; 2]) {
        let inputs = inputs.map(row_major);
        let [gate, up] = inputs.each_ref().map(|input| input.storage::<f32>());
        let mut value = Buffer::of_any(gate.len());
        let blocks = value.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK));
        blocks.for_each(|((value, gate), up)| AutoArch::new().dispatch(Forward { gate, up, value }));
        let shape = shape(&inputs[0]);
        (tensor(value, &shape), inputs)
    }

    fn backward(inputs: [CpuTensor; 2], gradient: CpuTensor, _wanted: [bool; 2]) -> [Option<CpuTensor>; 2] {
        let [gate, up] = inputs.each_ref().map(|input| input.storage::<f32>());
        let mut gradient = row_major(gradient);
        let mut of_up = Buffer::of_any(up.len());
        let blocks = gradient.storage_mut::<f32>().par_chunks_mut(BLOCK).zip(of_up.par_chunks_mut(BLOCK));
        let blocks = blocks.zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)));
        blocks.for_each(|((gradient, of_up), (gate, up))| {
            AutoArch::new().dispatch(Backward { gate, up, gradient, of_up });
        });
        let shape = shape(&gradient);
        [Some(gradient), Some(tensor(of_up, &shape))]
    }
}

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    value: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        gate(self.value, self.gate, self.up);
    }
}

struct Backward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    /// The result's on entry, the gate's on exit.
    gradient: &'a mut [f32],
    of_up: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let gradients = self.gradient.iter_mut().zip(self.of_up);
        for (((gradient, of_up), gate), up) in gradients.zip(self.gate).zip(self.up) {
            let logistic = logistic(*gate);
            *of_up = *gradient * (gate * logistic);
            *gradient *= up * (logistic * gate.mul_add(1.0 - logistic, 1.0));
        }
    }
}
