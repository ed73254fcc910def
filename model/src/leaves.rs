//! A model's parameter tensors on a device, and their gradients.

use burn::tensor::{Gradients, Tensor, Transaction};

/// Parameter tensors, handed out in layout order.
pub(crate) struct Leaves<'a>(std::slice::Iter<'a, Leaf>);

impl<'a> Leaves<'a> {
    /// All of them, in layout order.
    pub(crate) fn new(leaves: &'a [Leaf]) -> Self {
        Self(leaves.iter())
    }

    /// The next tensor, which the layout says is a matrix.
    pub(crate) fn matrix(&mut self) -> Tensor<2> {
        match self.0.next() {
            Some(Leaf::Matrix(matrix)) => matrix.clone(),
            _ => unreachable!("layout and assembly name the same tensors; load() comes before computing"),
        }
    }

    /// The next tensor, which the layout says is a vector.
    pub(crate) fn vector(&mut self) -> Tensor<1> {
        match self.0.next() {
            Some(Leaf::Vector(vector)) => vector.clone(),
            _ => unreachable!("layout and assembly name the same tensors; load() comes before computing"),
        }
    }
}

/// One parameter tensor on the device.
#[derive(Clone, Debug)]
pub(crate) enum Leaf {
    Matrix(Tensor<2>),
    Vector(Tensor<1>),
}

impl Leaf {
    pub(crate) fn is_trainable(&self) -> bool {
        match self {
            Self::Matrix(tensor) => tensor.is_require_grad(),
            Self::Vector(tensor) => tensor.is_require_grad(),
        }
    }

    pub(crate) fn untracked(&self) -> Self {
        match self {
            Self::Matrix(tensor) => Self::Matrix(tensor.clone().inner()),
            Self::Vector(tensor) => Self::Vector(tensor.clone().inner()),
        }
    }

    /// This tensor's gradient; zeros where the loss does not depend on it.
    pub(crate) fn gradient(&self, gradients: &mut Gradients) -> Self {
        match self {
            Self::Matrix(tensor) => {
                let gradient = tensor.grad_remove(gradients);
                Self::Matrix(gradient.unwrap_or_else(|| tensor.clone().inner().zeros_like()))
            }
            Self::Vector(tensor) => {
                let gradient = tensor.grad_remove(gradients);
                Self::Vector(gradient.unwrap_or_else(|| tensor.clone().inner().zeros_like()))
            }
        }
    }

    /// Adds it to what is to be read back.
    pub(crate) fn register(self, read: Transaction) -> Transaction {
        match self {
            Self::Matrix(tensor) => read.register(tensor),
            Self::Vector(tensor) => read.register(tensor),
        }
    }
}

/// The sum of two gradients, tensor by tensor.
pub(crate) fn add_on_device(left: Vec<Leaf>, right: Vec<Leaf>) -> Vec<Leaf> {
    let add = |pair: (Leaf, Leaf)| match pair {
        (Leaf::Matrix(left), Leaf::Matrix(right)) => Leaf::Matrix(left + right),
        (Leaf::Vector(left), Leaf::Vector(right)) => Leaf::Vector(left + right),
        _ => unreachable!("both are gradients of the same leaves, in the same order"),
    };
    left.into_iter().zip(right).map(add).collect()
}
