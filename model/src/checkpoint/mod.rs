//! What a run keeps on disk: parameters and optimizer state as safetensors, with a manifest that seals them.
//!
//! A checkpoint is a directory `step-000000123` of three files. It is written beside its final name, flushed to the
//! disk, and renamed: a name that looks right is whole, whatever happened in between. The manifest holds the SHA-256 of
//! each file and its own, and reading checks them.

mod base;
mod manifest;
mod tensors;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

pub use self::base::{BASE, BaseFile, keep_base};
pub use self::manifest::{FORMAT_VERSION, FileSeal, Manifest, Validation, read_manifest};
use self::tensors::{Tensors, flatten, has_prefix};
use crate::adapters::AdaptedLayout;
use crate::digest::{bytes_sha256, hex, vector_sha256, vectors_sha256};
use crate::optimizer::OptimizerState;
use crate::partial_dir::{self, PartialDir, Refused, sync_directory, sync_file};

const PARAMETERS: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const FIRST_MOMENT: &str = "first_moment.";
const SECOND_MOMENT: &str = "second_moment.";
const MASTER: &str = "master.";

/// A checkpoint in memory.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// What it says of itself.
    pub manifest: Manifest,
    /// What is trained, flat in [the manifest's layout](Manifest::layout): the model's parameters, or its adapters'.
    pub parameters: Vec<f32>,
    /// Moments, and master parameters where `parameters` are not these.
    pub optimizer: OptimizerState,
}

/// Why a checkpoint was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
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
    /// The files do not agree with one another.
    #[error("{path}: the checkpoint is damaged: {reason}", path = path.display())]
    Damaged {
        /// The checkpoint or file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Another release of the program wrote it.
    #[error(
        "{path}: the checkpoint has format version {found}, and this program reads {FORMAT_VERSION}; use the release \
         that wrote it",
        path = path.display()
    )]
    OtherVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// There is none.
    #[error("{path}: no checkpoint here; give the directory of a run or of a checkpoint", path = path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
}

impl From<Refused> for CheckpointError {
    fn from(Refused { path, action, error }: Refused) -> Self {
        Self::Io { path, action, error }
    }
}

impl CheckpointError {
    fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { path, action, error }
    }

    fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), reason: reason.into() }
    }
}

/// Name of the directory of step `step`.
pub fn directory_name(step: u64) -> String {
    format!("step-{step:09}")
}

/// The step whose [`directory_name`] this is; none for any other name.
pub fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (name == directory_name(step)).then_some(step)
}

/// A checkpoint that is whole on the disk, beside its final name. Dropping it removes it.
#[derive(Debug)]
pub struct Staged(PartialDir);

impl Staged {
    /// Gives the checkpoint its name, in the place of an earlier one of the same step, and returns its path.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn publish(self) -> Result<PathBuf, CheckpointError> {
        let target = self.0.target().to_path_buf();
        if target.exists() {
            fs::remove_dir_all(&target).map_err(CheckpointError::io(&target, "replace"))?;
        }
        self.0.publish()?;
        Ok(target)
    }
}

/// Writes a checkpoint into `directory` (of all checkpoints of a run), whole or not at all, to be published. Fills in the
/// manifest's digests and seals.
///
/// # Errors
/// If the system refuses, for example because the disk is full; nothing is then left behind.
pub fn write(
    directory: &Path,
    manifest: Manifest,
    parameters: &[f32],
    optimizer: &OptimizerState,
) -> Result<Staged, CheckpointError> {
    fs::create_dir_all(directory).map_err(CheckpointError::io(directory, "create the directory"))?;
    write_to(&directory.join(directory_name(manifest.step)), manifest, parameters, optimizer)
}

/// The same as the directory `target`.
fn write_to(
    target: &Path,
    mut manifest: Manifest,
    parameters: &[f32],
    optimizer: &OptimizerState,
) -> Result<Staged, CheckpointError> {
    manifest.params_sha256 = hex(&vector_sha256(parameters));
    manifest.optimizer_sha256 = optimizer_sha256(optimizer);
    let partial = PartialDir::create(target)?;
    write_files(partial.path(), manifest, parameters, optimizer)?;
    Ok(Staged(partial))
}

fn write_files(
    partial: &Path,
    mut manifest: Manifest,
    parameters: &[f32],
    optimizer: &OptimizerState,
) -> Result<(), CheckpointError> {
    let layout = manifest.layout();
    let tensors = |prefix: &str, vector| Tensors { prefix: prefix.into(), layout: &layout, vector };
    let OptimizerState { first_moment, second_moment, replicas, master } = optimizer;
    let remembered = [(FIRST_MOMENT, first_moment), (SECOND_MOMENT, second_moment), (MASTER, master)];
    let remembered = remembered.into_iter().filter(|(_, vector)| !vector.is_empty());
    let mut remembered: Vec<_> = remembered.map(|(prefix, vector)| tensors(prefix, vector.as_slice())).collect();
    for (replica, vector) in replicas.iter().enumerate() {
        let kinds = [FIRST_MOMENT, SECOND_MOMENT].into_iter().zip(vector.chunks(layout.len()));
        remembered.extend(kinds.map(|(kind, vector)| tensors(&of_replica(replica, kind), vector)));
    }
    for (name, groups) in [(PARAMETERS, vec![tensors("", parameters)]), (OPTIMIZER, remembered)] {
        let path = partial.join(name);
        let views = groups.iter().flat_map(Tensors::views);
        let metadata = Some([("format".to_string(), "pt".to_string())].into());
        safetensors::serialize_to_file(views, metadata, &path)
            .map_err(|error| CheckpointError::io(&path, "write")(std::io::Error::other(error)))?;
        sync_file(&path)?;
        manifest.files.insert(name.into(), seal(&path)?);
    }
    manifest::write(partial, manifest)?;
    Ok(sync_directory(partial)?)
}

/// Reads a checkpoint and checks every digest.
///
/// # Errors
/// If it is not there, unreadable or damaged.
pub fn read(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let (manifest, parameters) = read_trained(path)?;
    let layout = manifest.layout();
    let (optimizer_path, remembered) = read_sealed(path, &manifest, OPTIMIZER)?;
    let vector = |prefix: &str| match has_prefix(&optimizer_path, &remembered, prefix)? {
        true => flatten(&optimizer_path, &remembered, prefix, &layout),
        false => Ok(Vec::new()),
    };
    let mut replicas = Vec::new();
    while has_prefix(&optimizer_path, &remembered, &of_replica(replicas.len(), ""))? {
        let kinds = [FIRST_MOMENT, SECOND_MOMENT].map(|kind| vector(&of_replica(replicas.len(), kind)));
        replicas.push(kinds.into_iter().collect::<Result<Vec<_>, _>>()?.concat());
    }
    let optimizer = OptimizerState {
        first_moment: vector(FIRST_MOMENT)?,
        second_moment: vector(SECOND_MOMENT)?,
        replicas,
        master: vector(MASTER)?,
    };
    if optimizer_sha256(&optimizer) != manifest.optimizer_sha256 {
        return Err(CheckpointError::damaged(path, "the optimizer's state has another SHA-256 than the manifest says"));
    }
    Ok(Checkpoint { manifest, parameters, optimizer })
}

/// Of all moments, one after the other, and of master parameters.
fn optimizer_sha256(optimizer: &OptimizerState) -> String {
    let OptimizerState { first_moment, second_moment, replicas, master } = optimizer;
    let of_versions = [first_moment, second_moment].into_iter();
    hex(&vectors_sha256(&of_versions.chain(replicas).chain([master]).map(Vec::as_slice).collect::<Vec<_>>()))
}

/// What the names of a replica's moments of a kind begin with.
fn of_replica(replica: usize, kind: &str) -> String {
    format!("replica.{replica}.{kind}")
}

/// Reads the model of a checkpoint, without the optimizer's state, and checks the digests of what it reads: its parameters,
/// flat in the model's layout, with adapters [merged](AdaptedLayout::merge) into the base.
///
/// # Errors
/// If it, or its base, is not there, unreadable or damaged.
pub fn read_parameters(path: &Path) -> Result<(Manifest, Vec<f32>), CheckpointError> {
    let (manifest, trained) = read_trained(path)?;
    let Some(adapters) = &manifest.adapters else { return Ok((manifest, trained)) };
    let layout = AdaptedLayout::of(&manifest.model, adapters);
    let base = BaseFile::of_checkpoint(path, &manifest, &layout.base)?;
    let merged = layout.merge(base.parameters(), &trained);
    Ok((manifest, merged))
}

/// Reads what is trained.
fn read_trained(path: &Path) -> Result<(Manifest, Vec<f32>), CheckpointError> {
    let manifest = read_manifest(path)?;
    let (file, bytes) = read_sealed(path, &manifest, PARAMETERS)?;
    let parameters = flatten(&file, &bytes, "", &manifest.layout())?;
    match hex(&vector_sha256(&parameters)) == manifest.params_sha256 {
        true => Ok((manifest, parameters)),
        false => Err(CheckpointError::damaged(path, "parameters have another SHA-256 than the manifest says")),
    }
}

/// The path and bytes of one of a checkpoint's files.
fn read_sealed(path: &Path, manifest: &Manifest, name: &str) -> Result<(PathBuf, Vec<u8>), CheckpointError> {
    let (path, sealed) = (path.join(name), manifest.files.get(name));
    let bytes = fs::read(&path).map_err(CheckpointError::io(&path, "read"))?;
    let found = FileSeal { bytes: bytes.len() as u64, sha256: hex(&bytes_sha256(&bytes)) };
    check_seal(&path, sealed, &found)?;
    Ok((path, bytes))
}

/// Checks the digests of a checkpoint's manifest and files, in little memory.
///
/// # Errors
/// If it is not there, unreadable or damaged.
pub fn check(path: &Path) -> Result<(), CheckpointError> {
    let manifest = read_manifest(path)?;
    [PARAMETERS, OPTIMIZER].into_iter().try_for_each(|name| {
        let path = path.join(name);
        check_seal(&path, manifest.files.get(name), &seal(&path)?)
    })
}

fn check_seal(path: &Path, sealed: Option<&FileSeal>, found: &FileSeal) -> Result<(), CheckpointError> {
    match sealed == Some(found) {
        true => Ok(()),
        false => Err(CheckpointError::damaged(path, "its size or SHA-256 is not the manifest's")),
    }
}

/// The checkpoints in `directory`, oldest first: what is not named as one is none. Empty where there is no such directory.
///
/// # Errors
/// If the directory cannot be read.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut found = entries(directory)?;
    found.retain(|path| step_of(path).is_some() && path.is_dir());
    found.sort_by_key(|path| step_of(path));
    Ok(found)
}

/// Removes what starts that were killed left of checkpoints that were not, or no longer, whole. Nobody may write to
/// `directory` meanwhile.
///
/// # Errors
/// If the directory cannot be read or something not be removed.
pub fn remove_partial(directory: &Path) -> Result<(), CheckpointError> {
    for path in entries(directory)? {
        let name = path.file_name().and_then(|name| name.to_str());
        let of = name.and_then(|name| name.strip_prefix('.')?.strip_suffix(".partial"));
        if of.is_some_and(|of| step_of(Path::new(of)).is_some()) && path.is_dir() {
            fs::remove_dir_all(&path).map_err(CheckpointError::io(&path, "remove an unfinished checkpoint"))?;
        }
    }
    Ok(())
}

/// What lies in `directory`, in no order; nothing where there is no such directory.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(CheckpointError::io(directory, "list"))?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    paths.collect::<Result<_, _>>().map_err(CheckpointError::io(directory, "list"))
}

/// The newest checkpoint in `directory` that is whole, with what was wrong with newer ones; `None` where there is none.
///
/// # Errors
/// If the directory cannot be read.
#[allow(clippy::type_complexity)]
pub fn newest(directory: &Path) -> Result<(Option<(PathBuf, Checkpoint)>, Vec<CheckpointError>), CheckpointError> {
    let mut damaged = Vec::new();
    for path in list(directory)?.into_iter().rev() {
        match read(&path) {
            Ok(checkpoint) => return Ok((Some((path, checkpoint)), damaged)),
            Err(error) => damaged.push(error),
        }
    }
    Ok((None, damaged))
}

/// The newest manifest in `directory` that is whole; what it seals is not looked at. `None` where there is none.
///
/// # Errors
/// If the directory cannot be read.
pub fn newest_manifest(directory: &Path) -> Result<Option<Manifest>, CheckpointError> {
    Ok(list(directory)?.iter().rev().find_map(|path| read_manifest(path).ok()))
}

/// Removes what is older than the `keep_last` newest checkpoints that are whole, but for the one of the least validation
/// loss. Where there are not so many whole ones, nothing is removed. `whole` are the steps of those that were found whole
/// before, or were written since: they are not read again. What is found whole now is added.
///
/// # Errors
/// If the directory cannot be read or a checkpoint not be removed.
pub fn prune(directory: &Path, keep_last: usize, whole: &mut BTreeSet<u64>) -> Result<(), CheckpointError> {
    let all = list(directory)?;
    let loss = |path: &PathBuf| {
        let manifest = read_manifest(path).ok()?;
        manifest.validation.filter(|_| manifest.is_validated()).map(|validation| validation.loss)
    };
    let best = all.iter().filter_map(|path| Some((loss(path)?, path))).min_by(|a, b| a.0.total_cmp(&b.0));
    let best = best.map(|(_, path)| path);
    let mut kept = 0;
    let oldest_kept = all.iter().rposition(|path| {
        let known = step_of(path).is_some_and(|step| whole.contains(&step));
        if known || check(path).is_ok() {
            whole.extend(step_of(path));
            kept += 1;
        }
        kept == keep_last.max(1)
    });
    for path in all[..oldest_kept.unwrap_or(0)].iter().filter(|path| Some(*path) != best) {
        remove(path).map_err(CheckpointError::io(path, "remove an old checkpoint"))?;
    }
    Ok(())
}

/// Removes the checkpoints of later steps than `step`, the newest first, so that a part of this leaves no gap.
///
/// # Errors
/// If the directory cannot be read or a checkpoint not be removed.
pub fn remove_after(directory: &Path, step: u64) -> Result<(), CheckpointError> {
    for path in list(directory)?.iter().rev().filter(|path| step_of(path).is_some_and(|later| later > step)) {
        remove(path).map_err(CheckpointError::io(path, "remove a checkpoint that the run goes back behind"))?;
    }
    Ok(())
}

/// Removes a checkpoint, its name first, so that nobody finds a part of it.
fn remove(path: &Path) -> std::io::Result<()> {
    let hidden = partial_dir::hidden(path);
    if hidden.exists() {
        fs::remove_dir_all(&hidden)?;
    }
    fs::rename(path, &hidden)?;
    fs::remove_dir_all(hidden)
}

fn seal(path: &Path) -> Result<FileSeal, CheckpointError> {
    let mut file = File::open(path).map_err(CheckpointError::io(path, "read back"))?;
    let (mut hasher, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut buffer).map_err(CheckpointError::io(path, "read back"))?;
        if read == 0 {
            return Ok(FileSeal { bytes, sha256: hex(&hasher.finalize()) });
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
    }
}

#[cfg(test)]
mod tests;
