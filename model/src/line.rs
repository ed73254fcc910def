//! The straight line `y = weight · x + bias`: two parameters, squared error.

use burn::tensor::Tensor;

use crate::leaves::Leaves;

/// The line's parameters as tensors.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    weight: Tensor<2>, // [1, 1]
    bias: Tensor<1>,   // [1]
}

impl Line {
    /// Takes the tensors from `leaves` in layout order.
    pub(crate) fn assemble(leaves: &mut Leaves<'_>) -> Self {
        Self { weight: leaves.matrix(), bias: leaves.vector() }
    }

    /// Predictions `[rows, 1]` for `x` `[rows, 1]`.
    pub(crate) fn predict(&self, x: Tensor<2>) -> Tensor<2> {
        x * self.weight.clone() + self.bias.clone().unsqueeze::<2>()
    }
}
