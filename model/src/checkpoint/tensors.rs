//! A checkpoint's vectors as safetensors.

use std::borrow::Cow;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View};

use super::CheckpointError;
use crate::layout::{Layout, TensorSpec};

/// One vector's tensors under a name prefix, as safetensors writes them.
pub(super) struct Tensors<'a> {
    pub(super) prefix: String,
    pub(super) layout: &'a Layout,
    pub(super) vector: &'a [f32],
}

impl<'a> Tensors<'a> {
    pub(super) fn views(&self) -> impl Iterator<Item = (String, TensorView<'a>)> {
        self.layout.tensors.iter().map(|tensor| {
            let view = TensorView { shape: &tensor.shape, values: &self.vector[tensor.range()] };
            (format!("{}{}", self.prefix, tensor.name), view)
        })
    }
}

pub(super) struct TensorView<'a> {
    shape: &'a [usize],
    values: &'a [f32],
}

impl View for TensorView<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}

/// The flat vector of the tensors under `prefix`.
pub(super) fn flatten(path: &Path, bytes: &[u8], prefix: &str, layout: &Layout) -> Result<Vec<f32>, CheckpointError> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| CheckpointError::damaged(path, error.to_string()))?;
    let mut vector = Vec::with_capacity(layout.len());
    for TensorSpec { name, shape, .. } in &layout.tensors {
        let name = format!("{prefix}{name}");
        let tensor = file.tensor(&name).map_err(|error| CheckpointError::damaged(path, error.to_string()))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
            let reason = format!("{name} is {:?} {:?}, the model has F32 {shape:?}", tensor.dtype(), tensor.shape());
            return Err(CheckpointError::damaged(path, reason));
        }
        vector.extend(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
    Ok(vector)
}

pub(super) fn has_prefix(path: &Path, bytes: &[u8], prefix: &str) -> Result<bool, CheckpointError> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| CheckpointError::damaged(path, error.to_string()))?;
    Ok(file.names().iter().any(|name| name.starts_with(prefix)))
}
