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
pub use self::folder::{Imported, is_folder, read_folder, write_folder};
pub use self::gguf_model::write_gguf;
pub use self::staged::StagedDir;
use crate::config::ModelConfig;
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
