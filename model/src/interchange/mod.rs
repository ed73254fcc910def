//! Models in the forms of others: Hugging Face folders, read and written, and GGUF, written.
//!
//! ```text
//! config.json, *.safetensors, tokenizer.json, … → Imported → a run's checkpoint → a folder again, or a GGUF file
//! ```
//!
//! Parameters are one flat vector here as elsewhere; tensors of files are read from a memory map into it, and written from
//! it one by one, so that no second copy of the model is held.

mod element;
mod folder;
mod gguf;
mod gguf_model;
mod gguf_vocabulary;
mod hf_config;
mod hf_tokenizer_files;
mod names;
mod staged;
mod weights;

use std::path::{Path, PathBuf};

pub use self::element::ElementType;
pub use self::folder::{Imported, describe_folder, is_folder, read_folder, write_folder};
pub use self::gguf_model::write_gguf;
pub use self::staged::StagedDir;
use crate::config::{GptConfig, ModelConfig};
use crate::layout::{Layout, TensorSpec};
use crate::partial_dir::Refused;
use crate::tokenizer::Tokenizer;

/// A model that is written in a form of others.
#[derive(Clone, Copy, Debug)]
pub struct Exported<'a> {
    /// What it is called.
    pub name: &'a str,
    /// Its shape.
    pub model: &'a ModelConfig,
    /// Its parameters, flat in layout order.
    pub parameters: &'a [f32],
    /// How text becomes tokens.
    pub tokenizer: &'a Tokenizer,
    /// In what form numbers are written.
    pub element: ElementType,
}

impl<'a> Exported<'a> {
    /// The tensors that others expect, in layout order, with their values, none where all are 0: those of a GPT-2 always
    /// have biases.
    ///
    /// # Errors
    /// If a number would be an infinity in the form asked for.
    fn tensors(&self, path: &Path) -> Result<Vec<(TensorSpec, &'a [f32])>, InterchangeError> {
        let Self { model, parameters, element, .. } = *self;
        let layout = Layout::of(model);
        let holds = |tensor: &&TensorSpec| parameters[tensor.range()].iter().all(|value| element.holds(*value));
        if let Some(tensor) = layout.tensors.iter().find(|tensor| !holds(tensor)) {
            let (name, form) = (&tensor.name, element.torch_name());
            let problem = format!("{name} holds a number too large for {form}; take --dtype f32");
            return Err(InterchangeError::refused(path, problem));
        }
        let complete = match model.clone() {
            ModelConfig::Gpt(gpt) => ModelConfig::Gpt(GptConfig { bias: true, ..gpt }),
            other => other,
        };
        let values = |spec: TensorSpec| {
            let ours = layout.tensors.iter().find(|tensor| tensor.name == spec.name);
            (spec, ours.map_or(&[][..], |tensor| &parameters[tensor.range()]))
        };
        Ok(Layout::of(&complete).tensors.into_iter().map(values).collect())
    }
}

/// Why a model was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum InterchangeError {
    /// The system refused.
    #[error("{path}: cannot {action}: {error}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        error: std::io::Error,
    },
    /// A file holds, or would have to hold, what cannot be.
    #[error("{path}: {problem}", path = path.display())]
    Refused {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
}

impl InterchangeError {
    fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { path, action, error }
    }

    fn refused(path: &Path, problem: impl Into<String>) -> Self {
        Self::Refused { path: path.into(), problem: problem.into() }
    }
}

impl From<Refused> for InterchangeError {
    fn from(Refused { path, action, error }: Refused) -> Self {
        Self::Io { path, action, error }
    }
}
