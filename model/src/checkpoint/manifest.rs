//! What a checkpoint says of itself, sealed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::adapters::{AdapterConfig, trained_layout};
use crate::config::ModelConfig;
use crate::digest::{bytes_sha256, hex};
use crate::layout::Layout;
use crate::ledger::Ledger;
use crate::partial_dir::sync_file;
use crate::step_filter::StepFilter;
use crate::tokenizer::Tokenizer;

/// Version of the manifest's form.
pub const FORMAT_VERSION: u32 = 2;

/// The manifest's file.
pub(super) const MANIFEST: &str = "manifest.json";
/// What a manifest's text ends with while its seal is empty.
const UNSEALED_END: &str = "\"seal\": \"\"\n}";

/// What a checkpoint says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the program that wrote it.
    pub format_version: u32,
    /// The run.
    pub run_id: String,
    /// Optimizer steps committed.
    pub step: u64,
    /// Mean training loss of that step; none before the first.
    pub train_loss: Option<f64>,
    /// Mean validation loss, and the step it was measured after.
    pub validation: Option<Validation>,
    /// The model.
    pub model: ModelConfig,
    /// The adapters that are trained alone, if there are any. Then vectors of the checkpoint are theirs, and the model's own
    /// parameters, whose digest is `initial_sha256`, are the run's [base](super::BaseFile).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<AdapterConfig>,
    /// How text becomes tokens.
    pub tokenizer: Option<Tokenizer>,
    /// SHA-256 of the corpus' tokens, hexadecimal; empty of a model that was imported.
    pub corpus_sha256: String,
    /// SHA-256 of the parameters that the run began with, where they came from another model, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_sha256: Option<String>,
    /// SHA-256 of the log-probabilities by the model that the run began with, to which later ones are compared, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub references_sha256: Option<String>,
    /// The recipe's name.
    pub recipe_name: String,
    /// The recipe in full, as TOML.
    pub recipe: String,
    /// Device classes of the workers that contributed, hexadecimal.
    pub device_classes: Vec<String>,
    /// By what the next steps' gradients are judged.
    pub filter: StepFilter,
    /// By a worker's name, the first step in which a gradient of its counts that nobody checked.
    pub unchecked_since: BTreeMap<String, u64>,
    /// Tokens (or rows) trained on so far.
    pub tokens: u64,
    /// Which ones they were.
    pub ledger: Ledger,
    /// Seal of the last line of the run's ledger file; empty before the first.
    pub ledger_seal: String,
    /// Seal of the last line of the run's metrics; empty before the first.
    pub metrics_seal: String,
    /// SHA-256 of what is trained, as workers compute with it, as little-endian f32 in layout order, hexadecimal.
    pub params_sha256: String,
    /// SHA-256 of first and second moments likewise, one after the other, then of those of each replica that keeps such, then
    /// of master parameters where they are apart.
    pub optimizer_sha256: String,
    /// The other files.
    pub files: BTreeMap<String, FileSeal>,
    /// SHA-256 of the manifest's own text, with this still empty, hexadecimal.
    pub seal: String,
}

impl Manifest {
    /// That of a run of `model` before its first step, which says nothing yet of corpus and recipe.
    pub fn new(run_id: String, model: ModelConfig) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            run_id,
            step: 0,
            train_loss: None,
            validation: None,
            model,
            adapters: None,
            tokenizer: None,
            corpus_sha256: String::new(),
            initial_sha256: None,
            references_sha256: None,
            recipe_name: String::new(),
            recipe: String::new(),
            device_classes: Vec::new(),
            filter: StepFilter::default(),
            unchecked_since: BTreeMap::new(),
            tokens: 0,
            ledger: Ledger::default(),
            ledger_seal: String::new(),
            metrics_seal: String::new(),
            params_sha256: String::new(),
            optimizer_sha256: String::new(),
            files: BTreeMap::new(),
            seal: String::new(),
        }
    }

    /// The layout of what is trained, and so of the checkpoint's vectors.
    pub fn layout(&self) -> Layout {
        trained_layout(&self.model, self.adapters.as_ref())
    }

    /// Whether the validation loss of these very parameters is known.
    pub fn is_validated(&self) -> bool {
        self.validation.is_some_and(|validation| validation.step == self.step)
    }
}

/// The part of a manifest that every format version has.
#[derive(Deserialize)]
struct Versioned {
    format_version: u32,
}

/// A validation result.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Optimizer steps applied when it was measured.
    pub step: u64,
    /// Mean loss; NaN where the run diverged.
    #[serde(deserialize_with = "crate::number::or_nan")]
    pub loss: f64,
    /// The loss in bits for each byte of text; none where that is not known.
    #[serde(default)]
    pub bits_per_byte: Option<f64>,
}

impl Validation {
    /// A mean loss of `loss` nats a token, after `step`, where a token stands for `bytes_per_token` bytes of text.
    pub fn new(step: u64, loss: f64, bytes_per_token: Option<f64>) -> Self {
        let bits_per_byte = bytes_per_token.map(|bytes| loss / std::f64::consts::LN_2 / bytes);
        Self { step, loss, bits_per_byte }
    }
}

/// Size and digest of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSeal {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// Writes a manifest into `directory`, with its seal.
pub(super) fn write(directory: &Path, mut manifest: Manifest) -> Result<(), CheckpointError> {
    let path = directory.join(MANIFEST);
    manifest.seal.clear();
    let text = serde_json::to_string_pretty(&manifest)
        .map_err(|error| CheckpointError::io(&path, "write")(std::io::Error::other(error)))?;
    let sealed_end = UNSEALED_END.replace("\"\"", &format!("\"{}\"", hex(&bytes_sha256(text.as_bytes()))));
    let body = text.strip_suffix(UNSEALED_END).unwrap_or(&text);
    fs::write(&path, format!("{body}{sealed_end}")).map_err(CheckpointError::io(&path, "write"))?;
    Ok(sync_file(&path)?)
}

/// Reads a checkpoint's manifest alone.
///
/// # Errors
/// If it is not there, unreadable, of another format version, or not what was written.
pub fn read_manifest(path: &Path) -> Result<Manifest, CheckpointError> {
    let file = path.join(MANIFEST);
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(CheckpointError::NotFound { path: path.into() });
        }
        Err(error) => return Err(CheckpointError::io(&file, "read")(error)),
    };
    let malformed = |error: serde_json::Error| CheckpointError::damaged(&file, error.to_string());
    let Versioned { format_version } = serde_json::from_str(&text).map_err(malformed)?;
    if format_version != FORMAT_VERSION {
        return Err(CheckpointError::OtherVersion { path: file, found: format_version });
    }
    let manifest: Manifest = serde_json::from_str(&text).map_err(malformed)?;
    let sealed_end = UNSEALED_END.replace("\"\"", &format!("\"{}\"", manifest.seal));
    let unsealed = text.strip_suffix(&sealed_end).map(|body| format!("{body}{UNSEALED_END}"));
    if unsealed.is_none_or(|unsealed| hex(&bytes_sha256(unsealed.as_bytes())) != manifest.seal) {
        return Err(CheckpointError::damaged(&file, "it is not what was written: its seal is another"));
    }
    Ok(manifest)
}
