//! A model's parameter tensors on a device, and their gradients.

use burn::tensor::{Gradients, Tensor, Transaction};

use crate::config::Precision;
use crate::projection::{Adapter, Projection};

/// One tensor of a model, and what is trained beside it.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) leaf: Leaf,
    /// Of a matrix alone.
    pub(crate) adapter: Option<Adapter>,
}

impl From<Leaf> for Part {
    fn from(leaf: Leaf) -> Self {
        Self { leaf, adapter: None }
    }
}

impl Part {
    pub(crate) fn untracked(self) -> Self {
        Self { leaf: self.leaf.untracked(), adapter: self.adapter.map(Adapter::untracked) }
    }
}

/// A model's tensors, handed out in layout order.
pub(crate) struct Leaves<'a> {
    parts: std::slice::Iter<'a, Part>,
    precision: Precision,
}

impl<'a> Leaves<'a> {
    /// All of them, in layout order, of a model whose projections multiply in `precision`.
    pub(crate) fn new(parts: &'a [Part], precision: Precision) -> Self {
        Self { parts: parts.iter(), precision }
    }

    /// The next tensor, which the layout says is a matrix, and no projection of a layer.
    pub(crate) fn matrix(&mut self) -> Tensor<2> {
        match self.parts.next() {
            Some(Part { leaf: Leaf::Matrix(matrix), adapter: None }) => matrix.clone(),
            _ => unreachable!("layout and assembly name the same tensors; load() comes before computing"),
        }
    }

    /// The next tensor, which the layout says is a projection of a layer, with its adapter.
    pub(crate) fn projection(&mut self) -> Projection {
        match self.parts.next() {
            Some(Part { leaf: Leaf::Matrix(weight), adapter }) => {
                Projection { weight: weight.clone(), adapter: adapter.clone(), precision: self.precision }
            }
            _ => unreachable!("layout and assembly name the same tensors; load() comes before computing"),
        }
    }

    /// The next tensor, which the layout says is a vector.
    pub(crate) fn vector(&mut self) -> Tensor<1> {
        match self.parts.next() {
            Some(Part { leaf: Leaf::Vector(vector), .. }) => vector.clone(),
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
