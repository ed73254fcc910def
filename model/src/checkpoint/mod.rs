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
mod tests {
    use super::manifest::MANIFEST;
    use super::*;
    use crate::adapters::AdapterConfig;
    use crate::config::{Gelu, GptConfig, LineConfig, ModelConfig};

    fn manifest(step: u64, val_loss: Option<f64>) -> Manifest {
        Manifest {
            step,
            train_loss: Some(1.0),
            validation: val_loss.map(|loss| Validation::new(step, loss, Some(4.0))),
            recipe_name: "line".into(),
            ..Manifest::new("r".into(), ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 }))
        }
    }

    fn publish(directory: &Path, manifest: Manifest, parameters: &[f32], optimizer: &OptimizerState) -> PathBuf {
        write(directory, manifest, parameters, optimizer).and_then(Staged::publish).unwrap()
    }

    fn moments() -> OptimizerState {
        OptimizerState {
            first_moment: vec![0.5, -0.5],
            second_moment: vec![1e-9, f32::MAX],
            ..OptimizerState::default()
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let replicas =
            OptimizerState { replicas: vec![vec![1.0, 2.0, 3.0, 4.0], vec![5.0, 6.0, 7.0, 8.0]], ..moments() };
        let with_one_moment = OptimizerState { replicas: vec![vec![1.0, 2.0]; 11], ..OptimizerState::default() };
        let apart = OptimizerState { master: vec![1.25, 1e-30], ..replicas.clone() };
        for optimizer in [moments(), OptimizerState::default(), replicas, with_one_moment, apart] {
            let path = publish(dir.path(), manifest(7, None), &[1.5, -0.0], &optimizer);
            let back = read(&path).unwrap();
            assert_eq!(path, dir.path().join("step-000000007"));
            assert_eq!(back.parameters.iter().map(|p| p.to_bits()).collect::<Vec<_>>(), [0x3fc0_0000, 0x8000_0000]);
            assert_eq!(back.optimizer, optimizer);
            assert_eq!(back.manifest.params_sha256, hex(&vector_sha256(&[1.5, -0.0])));
        }
    }

    #[test]
    fn a_checkpoint_cut_at_any_byte_or_changed_in_any_is_passed_over_for_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let old = publish(dir.path(), manifest(1, None), &[1.0, 2.0], &moments());
        let new = publish(dir.path(), manifest(2, Some(1.5)), &[3.0, 4.0], &moments());
        let passed_over = |damage: &dyn Fn() -> String| {
            let (found, damaged) = newest(dir.path()).unwrap();
            assert_eq!((found.unwrap().0, damaged.len()), (old.clone(), 1), "{}", damage());
            assert!(check(&new).is_err(), "{}", damage());
        };
        for name in [MANIFEST, PARAMETERS, OPTIMIZER] {
            let file = new.join(name);
            let whole = fs::read(&file).unwrap();
            fs::remove_file(&file).unwrap();
            passed_over(&|| format!("{name} missing"));
            for at in 0..whole.len() {
                fs::write(&file, &whole[..at]).unwrap();
                passed_over(&|| format!("{name} cut to {at} bytes"));
                let mut changed = whole.clone();
                changed[at] ^= 1 << (at % 8);
                fs::write(&file, &changed).unwrap();
                passed_over(&|| format!("{name} changed at byte {at}"));
            }
            fs::write(&file, &whole).unwrap();
        }
        assert_eq!(newest(dir.path()).unwrap().0.unwrap().0, new, "restored, it is whole again");
    }

    #[test]
    fn another_release_s_checkpoint_is_told_from_a_damaged_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MANIFEST), r#"{"format_version": 1, "run_id": "r"}"#).unwrap();
        let said = read(dir.path()).unwrap_err().to_string();
        assert!(said.contains("format version 1") && said.contains("reads 2"), "{said}");
    }

    #[test]
    fn adapters_are_merged_into_their_base_as_a_model_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let model = ModelConfig::Gpt(GptConfig {
            vocab_size: 3,
            context: 2,
            layers: 1,
            heads: 1,
            width: 2,
            bias: false,
            tied_head: true,
            score_head: false,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        });
        let adapters = AdapterConfig { rank: 1, alpha: 2.0, targets: vec!["c_fc".into()], whole: Vec::new() };
        let layout = AdaptedLayout::of(&model, &adapters);
        let base: Vec<f32> = (0..layout.base.len()).map(|i| i as f32).collect();
        keep_base(dir.path(), Manifest::new("r".into(), model.clone()), &base).unwrap();
        let initial_sha256 = Some(hex(&vector_sha256(&base)));
        let manifest = Manifest { adapters: Some(adapters), initial_sha256, ..Manifest::new("r".into(), model) };
        let trained: Vec<f32> = (0..layout.trained.len()).map(|i| i as f32 / 2.0).collect();
        let optimizer = OptimizerState { first_moment: vec![0.5; trained.len()], ..OptimizerState::default() };
        let path = publish(&dir.path().join("checkpoints"), manifest, &trained, &optimizer);
        let back = read(&path).unwrap();
        assert_eq!((&back.parameters, &back.optimizer), (&trained, &optimizer));
        assert_eq!(back.manifest.params_sha256, hex(&vector_sha256(&trained)));
        let (manifest, parameters) = read_parameters(&path).unwrap();
        assert_eq!((parameters.len(), manifest), (base.len(), back.manifest));
        assert_eq!(parameters, layout.merge(base.clone(), &trained));
        assert_ne!(parameters, base);
        fs::remove_dir_all(dir.path().join(BASE)).unwrap();
        assert!(read_parameters(&path).unwrap_err().to_string().contains("lockstep merge"));
    }

    #[test]
    fn a_diverged_run_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let diverged = Manifest { train_loss: Some(f64::NAN), ..manifest(3, Some(f64::NAN)) };
        let path = publish(dir.path(), diverged, &[f32::NAN, 2.0], &moments());
        assert!(read(&path).unwrap().manifest.validation.unwrap().loss.is_nan());
    }

    #[test]
    fn bits_per_byte_are_the_loss_in_another_unit() {
        let validation = Validation::new(1, 2.0 * std::f64::consts::LN_2, Some(4.0));
        assert_eq!(validation.bits_per_byte, Some(0.5));
        assert_eq!(
            serde_json::from_str::<Validation>(r#"{"step":1,"loss":2.0}"#).unwrap(),
            Validation::new(1, 2.0, None)
        );
    }

    #[test]
    fn a_refused_write_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("checkpoints");
        fs::write(&blocked, "a file where the directory should be").unwrap();
        assert!(matches!(write(&blocked, manifest(1, None), &[1.0, 2.0], &moments()), Err(CheckpointError::Io { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_published_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        drop(write(dir.path(), manifest(1, None), &[1.0, 2.0], &moments()).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// A device cannot be flushed; neither can a file on a disk that fails.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_disk_that_does_not_flush_is_named() {
        let said = CheckpointError::from(sync_file(Path::new("/dev/null")).unwrap_err()).to_string();
        assert!(said.starts_with("/dev/null: cannot flush to the disk: "), "{said}");
    }

    #[test]
    fn the_newest_and_the_best_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for (step, loss) in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.2)] {
            publish(dir.path(), manifest(step, Some(loss)), &[1.0, 2.0], &moments());
        }
        fs::create_dir_all(dir.path().join(".step-000000001.partial/remains")).unwrap();
        prune(dir.path(), 2, &mut BTreeSet::new()).unwrap();
        assert_eq!(kept(dir.path()), [2, 4, 5]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is left of the others");
    }

    #[test]
    fn no_damaged_checkpoint_takes_the_place_of_a_whole_one() {
        let dir = tempfile::tempdir().unwrap();
        for step in 1..=5 {
            publish(dir.path(), manifest(step, None), &[1.0, 2.0], &moments());
        }
        let damage = |step, name| fs::write(dir.path().join(directory_name(step)).join(name), "").unwrap();
        damage(5, PARAMETERS);
        damage(3, MANIFEST);
        prune(dir.path(), 2, &mut BTreeSet::new()).unwrap();
        assert_eq!(kept(dir.path()), [2, 3, 4, 5], "4 and 2 are the newest whole ones");
        damage(2, OPTIMIZER);
        damage(4, OPTIMIZER);
        prune(dir.path(), 1, &mut BTreeSet::new()).unwrap();
        assert_eq!(kept(dir.path()), [2, 3, 4, 5], "there is no whole one");
        remove_after(dir.path(), 3).unwrap();
        assert_eq!(kept(dir.path()), [2, 3]);
    }

    #[test]
    fn what_is_known_to_be_whole_is_not_read_again() {
        let dir = tempfile::tempdir().unwrap();
        for step in 1..=4 {
            publish(dir.path(), manifest(step, None), &[1.0, 2.0], &moments());
        }
        // If they were read, 3 and 4 would not count.
        for step in [3, 4] {
            fs::write(dir.path().join(directory_name(step)).join(PARAMETERS), "").unwrap();
        }
        let mut whole = [4].into();
        prune(dir.path(), 2, &mut whole).unwrap();
        assert_eq!((kept(dir.path()), &whole), (vec![2, 3, 4], &[2, 4].into()));
        whole.insert(3);
        prune(dir.path(), 2, &mut whole).unwrap();
        assert_eq!(kept(dir.path()), [3, 4]);
    }

    #[test]
    fn what_a_killed_start_left_half_done_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        remove_partial(&dir.path().join("none yet")).unwrap();
        publish(dir.path(), manifest(1, None), &[1.0, 2.0], &moments());
        let others = [".mine.partial", ".step-2.partial", ".step-000000003", "step-000000004-before-lr-change"];
        for name in [".step-000000002.partial", ".step-1000000000.partial"].iter().chain(&others) {
            fs::create_dir_all(dir.path().join(name).join("remains")).unwrap();
        }
        remove_partial(dir.path()).unwrap();
        assert_eq!(kept(dir.path()), [1]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1 + others.len());
    }

    #[test]
    fn only_what_is_named_as_one_is_a_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let last = 999_999_999;
        for step in [100, last, last + 1] {
            publish(dir.path(), manifest(step, None), &[1.0, 2.0], &moments());
        }
        for name in ["step-000000100-before-lr-change", "step-101", "step-+00000102", "step-", "steps"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("step-000000103"), "a file").unwrap();
        assert_eq!(kept(dir.path()), [100, last, last + 1], "by step, and not by name");
        assert_eq!(newest(dir.path()).unwrap().0.unwrap().1.manifest.step, last + 1);
        assert_eq!(newest_manifest(dir.path()).unwrap().unwrap().step, last + 1);
        remove_after(dir.path(), 50).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 6, "what others named stays");
    }

    /// The steps of what is there.
    fn kept(directory: &Path) -> Vec<u64> {
        list(directory).unwrap().iter().map(|path| step_of(path).unwrap()).collect()
    }
}
