//! The frozen parameters that a run's adapters stand on: a checkpoint of their own, `RUN/base`, kept once, so that the run
//! does not depend on where they came from.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf, absolute};

use safetensors::tensor::{Dtype, SafeTensors};

use super::{CheckpointError, Manifest, PARAMETERS, check_seal, read_manifest, seal, write_to};
use crate::layout::Layout;
use crate::mapping::Mapping;
use crate::optimizer::OptimizerState;

/// The directory's name within that of a run.
pub const BASE: &str = "base";

/// A base on the disk, which is read as it is looked at, and held in memory nowhere.
pub struct BaseFile {
    mapping: Mapping,
    /// Of each tensor in the order of a layout, where its bytes are in the file.
    places: Vec<Range<usize>>,
    /// SHA-256 of all parameters there, hexadecimal.
    sha256: String,
}

impl fmt::Debug for BaseFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BaseFile").field("sha256", &self.sha256).finish_non_exhaustive()
    }
}

/// Keeps `parameters`, in the layout of `manifest`'s model, as the base of the run in `root`, whole or not at all.
///
/// # Errors
/// If the system refuses.
pub fn keep_base(root: &Path, manifest: Manifest, parameters: &[f32]) -> Result<(), CheckpointError> {
    write_to(&root.join(BASE), manifest, parameters, &OptimizerState::default())?.publish().map(|_| ())
}

impl BaseFile {
    /// Opens the base in `directory` for a model with adapters, whose base has this `layout`, and checks its seals.
    ///
    /// # Errors
    /// If it is not there, unreadable or damaged, or lacks a tensor.
    pub fn open(directory: &Path, layout: &Layout) -> Result<Self, CheckpointError> {
        let manifest = read_manifest(directory)?;
        let path = directory.join(PARAMETERS);
        check_seal(&path, manifest.files.get(PARAMETERS), &seal(&path)?)?;
        let mapping = Mapping::open(&path).map_err(CheckpointError::io(&path, "read"))?;
        let damaged = |reason: String| CheckpointError::damaged(&path, reason);
        let bytes = mapping.bytes();
        let file = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
        let mut places = Vec::with_capacity(layout.tensors.len());
        for tensor in &layout.tensors {
            let found = file.tensor(&tensor.name).map_err(|error| damaged(error.to_string()))?;
            if found.dtype() != Dtype::F32 || found.shape() != tensor.shape {
                let (dtype, shape, wanted) = (found.dtype(), found.shape(), &tensor.shape);
                return Err(damaged(format!("{} is {dtype:?} {shape:?}, the model has F32 {wanted:?}", tensor.name)));
            }
            let start = found.data().as_ptr() as usize - bytes.as_ptr() as usize;
            places.push(start..start + found.data().len());
        }
        Ok(Self { places, sha256: manifest.params_sha256, mapping })
    }

    /// Opens the base of the checkpoint at `path` of a run, which `manifest` says it has.
    ///
    /// # Errors
    /// As [`Self::open`]'s, and if it is another one than the run began with.
    pub fn of_checkpoint(path: &Path, manifest: &Manifest, layout: &Layout) -> Result<Self, CheckpointError> {
        let directory = directory_of(path);
        let base = match Self::open(&directory, layout) {
            Err(CheckpointError::NotFound { .. }) => {
                let reason = "it holds adapters, and the model that they belong to is not there; keep checkpoints in their \
                              run's directory, beside its \"base\", or make one model of both with `lockstep merge`";
                return Err(CheckpointError::damaged(path, format!("{}: {reason}", directory.display())));
            }
            opened => opened?,
        };
        if manifest.initial_sha256.as_ref() != Some(&base.sha256) {
            let wanted = manifest.initial_sha256.as_deref().unwrap_or("none");
            let reason = format!(
                "adapters belong to a model of SHA-256 {wanted}, and {} is {}",
                directory.display(),
                base.sha256
            );
            return Err(CheckpointError::damaged(path, reason));
        }
        Ok(base)
    }

    /// SHA-256 of all parameters of the checkpoint, hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// BLAKE3 of the elements in layout order, as little-endian f32.
    pub fn blake3(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for place in &self.places {
            hasher.update(&self.mapping.bytes()[place.clone()]);
        }
        hasher.finalize().into()
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.places.iter().map(|place| place.len() / 4).sum()
    }

    /// All elements, flat in layout order.
    pub fn parameters(&self) -> Vec<f32> {
        let bytes = self.places.iter().flat_map(|place| self.mapping.bytes()[place.clone()].as_chunks().0);
        bytes.map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// Some of the bytes of all elements in layout order, little-endian f32.
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        let (mut bytes, mut start) = (Vec::with_capacity(range.len()), 0);
        for place in &self.places {
            let end = start + place.len();
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                bytes.extend_from_slice(&self.mapping.bytes()[place.start + from - start..place.start + to - start]);
            }
            start = end;
        }
        bytes
    }
}

/// Where the base of the checkpoint at `path` is: it is `RUN/checkpoints/step-…`.
fn directory_of(path: &Path) -> PathBuf {
    let path = absolute(path).unwrap_or_else(|_| path.into());
    path.parent().and_then(Path::parent).unwrap_or(&path).join(BASE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LineConfig, ModelConfig};
    use crate::pieces::vector_blake3;

    #[test]
    fn a_base_is_read_in_the_order_of_the_layout() {
        let dir = tempfile::tempdir().unwrap();
        let model = ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 });
        // The file has the bias first, as safetensors orders by name.
        keep_base(dir.path(), Manifest::new("r".into(), model.clone()), &[1.5, -2.0]).unwrap();
        let directory = dir.path().join(BASE);
        let layout = Layout::of(&model);
        let base = BaseFile::open(&directory, &layout).unwrap();
        assert_eq!((base.elements(), base.parameters()), (2, vec![1.5, -2.0]));
        assert_eq!(base.blake3(), vector_blake3(&[1.5, -2.0]));
        let bytes: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        for (from, to) in (0..=8).flat_map(|from| (from..=8).map(move |to| (from, to))) {
            assert_eq!(base.bytes(from..to), bytes[from..to]);
        }
        let bias = Layout { tensors: vec![layout.tensors[1].clone()] };
        assert_eq!(BaseFile::open(&directory, &bias).unwrap().parameters(), [-2.0]);
        let mut other = layout.clone();
        other.tensors[0].shape = vec![1, 2];
        assert!(BaseFile::open(&directory, &other).unwrap_err().to_string().contains("the model has F32 [1, 2]"));

        let checkpoint = dir.path().join("checkpoints/step-000000001");
        let manifest = Manifest { initial_sha256: Some(base.sha256().into()), ..Manifest::new("r".into(), model) };
        BaseFile::of_checkpoint(&checkpoint, &manifest, &layout).unwrap();
        let another = Manifest { initial_sha256: Some("00".into()), ..manifest.clone() };
        let said = BaseFile::of_checkpoint(&checkpoint, &another, &layout).unwrap_err().to_string();
        assert!(said.contains("belong to a model of SHA-256 00"), "{said}");
        let elsewhere = dir.path().join("step-000000001");
        let said = BaseFile::of_checkpoint(&elsewhere, &manifest, &layout).unwrap_err().to_string();
        assert!(said.contains("lockstep merge"), "{said}");

        let file = directory.join(PARAMETERS);
        let mut damaged = std::fs::read(&file).unwrap();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&file, damaged).unwrap();
        assert!(BaseFile::open(&directory, &layout).unwrap_err().to_string().contains("SHA-256"));
    }
}
