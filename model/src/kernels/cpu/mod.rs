//! The operations on the CPU backend, burn-flex, one file each; and how one with a backward pass of our own becomes part of
//! burn's graph, with or without gradients.

pub(super) mod attention;
mod buffer;
pub(super) mod cross_entropy;
pub(super) mod dropout;
pub(super) mod embed;
pub(super) mod gelu;
mod head;
pub(super) mod linear;
pub(super) mod norm;
pub(crate) mod product;
pub(super) mod rotate;
pub(super) mod swiglu;

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::{DType, Tensor, TensorData};

use self::buffer::Buffer;

/// A tensor of the CPU backend.
pub(super) type CpuTensor = FloatTensor<Flex>;

/// An operation on `N` tensors, each f32.
pub(super) trait Operation<const N: usize>: Debug + Send + Sized + 'static {
    /// What backward needs of forward.
    type Saved: Clone + Debug + Send + 'static;

    /// The result, and what backward needs for the gradients of the inputs that are `wanted`.
    fn forward(self, inputs: [CpuTensor; N], wanted: [bool; N]) -> (CpuTensor, Self::Saved);

    /// The result alone.
    fn result(self, inputs: [CpuTensor; N]) -> CpuTensor {
        self.forward(inputs, [false; N]).0
    }

    /// The gradients of the inputs, of the result's: of those that are `wanted`, as forward was told; none need be there of
    /// others, such as frozen weights.
    fn backward(saved: Self::Saved, gradient: CpuTensor, wanted: [bool; N]) -> [Option<CpuTensor>; N];
}

/// Whether `x` is on the CPU backend, so that [`run`] takes it.
pub(super) fn holds<const D: usize>(x: &Tensor<D>) -> bool {
    primitives::<Autodiff<Flex>, 1>(&[x.clone().into_dispatch()]).is_some()
        || primitives::<Flex, 1>(&[x.clone().into_dispatch()]).is_some()
}

/// The result of `operation`, recorded for the backward pass if an input is.
///
/// # Panics
/// If the inputs are not all on the CPU backend, all with the same kind of device.
pub(super) fn run<const N: usize, const D: usize, O: Operation<N>>(
    operation: O,
    inputs: [DispatchTensor; N],
) -> Tensor<D> {
    if let Some(tensors) = primitives::<Flex, N>(&inputs) {
        drop(inputs);
        return Tensor::from_primitive::<Flex>(operation.result(tensors));
    }
    let tensors = primitives::<Autodiff<Flex>, N>(&inputs).expect("all inputs are on the CPU backend");
    drop(inputs);
    let nodes = tensors.each_ref().map(|tensor| tensor.node());
    let wanted = tensors.each_ref().map(|tensor| tensor.is_tracked());
    let tensors = tensors.map(|tensor| tensor.into_parts().0);
    let output = match Recorded::<O>(PhantomData).prepare::<NoCheckpointing>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(step) => {
            let (output, saved) = operation.forward(tensors, wanted);
            step.finish(saved, output)
        }
        OpsKind::UnTracked(step) => step.finish(operation.result(tensors)),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

/// The backend's own tensors, if all are `B`'s.
fn primitives<B: Backend, const N: usize>(tensors: &[DispatchTensor; N]) -> Option<[FloatTensor<B>; N]>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    let primitive = |tensor: &DispatchTensor| match DispatchTensor::try_into_backend(tensor.clone()) {
        Ok(BackendTensor::<B>::Float(tensor)) => Some(tensor),
        _ => None,
    };
    let tensors: Vec<_> = tensors.iter().map(primitive).collect::<Option<_>>()?;
    tensors.try_into().ok()
}

/// The step of burn's graph that runs an operation backward.
#[derive(Debug)]
struct Recorded<O>(PhantomData<O>);

impl<const N: usize, O: Operation<N>> Backward<Flex, N> for Recorded<O> {
    type State = O::Saved;

    fn backward(self, ops: Ops<O::Saved, N>, gradients: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        for (parent, gradient) in ops.parents.into_iter().zip(O::backward(ops.state, gradient, wanted)) {
            if let Some(parent) = parent {
                gradients.register::<Flex>(parent.id, gradient.expect("a gradient that is wanted is computed"));
            }
        }
    }
}

/// See [`filled`](super::filled).
pub(crate) fn filled<E>(shape: &[usize], fill: impl FnOnce(&mut [f32]) -> Result<(), E>) -> Result<TensorData, E> {
    let mut values = Buffer::of_any(shape.iter().product());
    fill(&mut values)?;
    Ok(data(values, shape))
}

/// A tensor of `values`, row-major.
fn tensor(values: impl Into<Buffer>, shape: &[usize]) -> CpuTensor {
    CpuTensor::from_data(data(values.into(), shape))
}

fn data(values: Buffer, shape: &[usize]) -> TensorData {
    TensorData::from_bytes(values.into_bytes(), shape.to_vec(), DType::F32)
}

/// The shape of `x`.
fn shape(x: &CpuTensor) -> Vec<usize> {
    x.layout().shape().iter().copied().collect()
}

/// `x`, row-major: itself, or a copy if it is a view that is not.
fn row_major(x: CpuTensor) -> CpuTensor {
    if x.is_contiguous() && x.as_slice::<f32>().is_some_and(|all| all.len() == x.storage::<f32>().len()) {
        x
    } else {
        x.to_contiguous()
    }
}
