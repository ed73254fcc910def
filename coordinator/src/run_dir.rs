//! The directory of a run: who holds it, and where everything in it lies.
//!
//! ```text
//! RUN/lock             held by the coordinator that advances the run
//! RUN/run.json         the run's id and how often its coordinator was started
//! RUN/recipe.toml      the recipe in full
//! RUN/checkpoints/     step-000000123/ and so on
//! RUN/base/            the model whose adapters are trained, if such are
//! RUN/metrics.jsonl    one line a step
//! RUN/references.json  what the first version says of the rows that later ones are compared with
//! RUN/ledger.jsonl     what each step was trained on
//! RUN/loss.svg         the same as a picture
//! RUN/samples.txt      text sampled while training
//! RUN/reports/         steps whose gradient was of no use: slots and text
//! RUN/logs/            what the local workers said
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use lockstep_model::checkpoint::BASE;
use serde::{Deserialize, Serialize};

/// A run's identity over all its starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// 32 hexadecimal digits.
    pub run_id: String,
    /// Starts of the run's coordinator so far, this one included.
    pub incarnation: u64,
    /// While the run goes back: checkpoints of later steps than this are not to be gone on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted_up_to: Option<u64>,
    /// Names of workers that computed wrong: they are not admitted any more.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub quarantined: BTreeSet<String>,
}

/// A run directory that this process alone may write.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    identity: Identity,
    /// Held until dropped.
    _lock: File,
}

impl RunDir {
    /// Takes hold of `root`, creating it where it is new, and counts this start.
    ///
    /// `new_run_id` names the run if it is new.
    ///
    /// # Errors
    /// If another process holds it, if it holds a run and `resume` is false, if it holds none and `resume` is true, or if
    /// the system refuses.
    pub fn open(root: &Path, resume: bool, new_run_id: &str) -> anyhow::Result<Self> {
        let shown = root.display();
        fs::create_dir_all(root).with_context(|| format!("{shown}: cannot create the run directory"))?;
        let lock = File::create(root.join("lock")).with_context(|| format!("{shown}: cannot create the lock file"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "{shown}: another coordinator holds this run; stop it (`lockstep status` shows a live one), or choose \
                 another --run"
            ),
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("{shown}: cannot lock")),
        }
        let path = identity_file(root);
        let identity = match fs::read_to_string(&path) {
            Ok(_) if !resume => {
                bail!("{shown}: holds a run already; continue it with --resume, or choose another --run")
            }
            Ok(text) => {
                let earlier: Identity =
                    serde_json::from_str(&text).with_context(|| format!("{}: is no run identity", path.display()))?;
                Identity { incarnation: earlier.incarnation + 1, ..earlier }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && resume => {
                bail!("{shown}: there is no run to resume here; leave --resume out to start one")
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Identity {
                run_id: new_run_id.into(),
                incarnation: 1,
                trusted_up_to: None,
                quarantined: BTreeSet::new(),
            },
            Err(error) => return Err(error).with_context(|| format!("{}: cannot read", path.display())),
        };
        replace(&path, &serde_json::to_string_pretty(&identity)?)?;
        Ok(Self { root: root.into(), identity, _lock: lock })
    }

    /// Which run, and which start of it.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Writes down up to which step checkpoints can be trusted, so that a coordinator that starts while the run goes back
    /// goes back, too; `None` once it is back.
    ///
    /// # Errors
    /// If a later start has taken over, or the system refuses.
    pub fn trust_up_to(&mut self, step: Option<u64>) -> anyhow::Result<()> {
        self.change(|identity| identity.trusted_up_to = step)
    }

    /// Writes down that nobody of this name is to be admitted any more.
    ///
    /// # Errors
    /// If a later start has taken over, or the system refuses.
    pub fn quarantine(&mut self, name: &str) -> anyhow::Result<()> {
        self.change(|identity| {
            identity.quarantined.insert(name.into());
        })
    }

    fn change(&mut self, change: impl FnOnce(&mut Identity)) -> anyhow::Result<()> {
        self.fence().check()?;
        change(&mut self.identity);
        replace(&identity_file(&self.root), &serde_json::to_string_pretty(&self.identity)?)
    }

    /// What tells this start of the run from later ones.
    pub fn fence(&self) -> Fence {
        Fence { root: self.root.clone(), identity: self.identity.clone() }
    }

    /// Where the run's files lie.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where checkpoints lie.
    pub fn checkpoints(&self) -> PathBuf {
        checkpoints(&self.root)
    }

    /// Where the base of adapters lies.
    pub fn base(&self) -> PathBuf {
        base(&self.root)
    }

    /// The metrics file.
    pub fn metrics(&self) -> PathBuf {
        metrics(&self.root)
    }

    /// The ledger file.
    pub fn ledger(&self) -> PathBuf {
        ledger(&self.root)
    }

    /// What the first version says of rows.
    pub fn references(&self) -> PathBuf {
        references(&self.root)
    }

    /// The picture of the losses.
    pub fn loss_svg(&self) -> PathBuf {
        self.root.join("loss.svg")
    }

    /// Where reports of skipped steps lie.
    pub fn reports(&self) -> PathBuf {
        self.root.join("reports")
    }

    /// The sampled texts.
    pub fn samples(&self) -> PathBuf {
        self.root.join("samples.txt")
    }

    /// Stores the recipe.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn write_recipe(&self, recipe_toml: &str) -> anyhow::Result<()> {
        replace(&recipe(&self.root), recipe_toml)
    }
}

/// Keeps two coordinators from advancing one run, on file systems whose locks do not work or where the lock was removed: a
/// later start counts itself in `run.json`, and the earlier one finds that before it changes anything for good.
#[derive(Clone, Debug)]
pub struct Fence {
    root: PathBuf,
    identity: Identity,
}

impl Fence {
    /// Whether the newest start of the run is still this one.
    ///
    /// # Errors
    /// If it is not, or that cannot be found out.
    pub fn check(&self) -> anyhow::Result<()> {
        let Identity { run_id, incarnation, .. } = identity(&self.root)?;
        if run_id != self.identity.run_id {
            bail!("{}: holds another run now ({run_id}); this coordinator stops", self.root.display());
        }
        if incarnation != self.identity.incarnation {
            bail!(
                "{}: start {incarnation} of this run has taken over from start {}, which ends here. A run has one coordinator \
                 at a time",
                self.root.display(),
                self.identity.incarnation
            );
        }
        Ok(())
    }
}

/// The identity of the run in `root`.
///
/// # Errors
/// If there is no run, or its identity cannot be read.
pub fn identity(root: &Path) -> anyhow::Result<Identity> {
    let path = identity_file(root);
    let text = fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}: is no run identity", path.display()))
}

fn identity_file(root: &Path) -> PathBuf {
    root.join("run.json")
}

/// Writes what a run is known by into the directory `root`: of one that no coordinator was started for yet.
///
/// # Errors
/// If the system refuses.
pub fn write_new(root: &Path, run_id: &str, recipe_toml: &str) -> anyhow::Result<()> {
    let (run_id, quarantined) = (run_id.into(), BTreeSet::new());
    let identity = Identity { run_id, incarnation: 0, trusted_up_to: None, quarantined };
    replace(&identity_file(root), &serde_json::to_string_pretty(&identity)?)?;
    replace(&recipe(root), recipe_toml)
}

/// Where the metrics of the run in `root` lie.
pub fn metrics(root: &Path) -> PathBuf {
    root.join("metrics.jsonl")
}

/// Where the ledger of the run in `root` lies.
pub fn ledger(root: &Path) -> PathBuf {
    root.join("ledger.jsonl")
}

/// Where that lies which the first version of the run in `root` says of rows.
pub fn references(root: &Path) -> PathBuf {
    root.join("references.json")
}

/// Where the checkpoints of the run in `root` lie.
pub fn checkpoints(root: &Path) -> PathBuf {
    root.join("checkpoints")
}

/// Where the base of the adapters that the run in `root` trains lies, if it does: a checkpoint of its own.
pub fn base(root: &Path) -> PathBuf {
    root.join(BASE)
}

/// Where the recipe of the run in `root` lies.
pub fn recipe(root: &Path) -> PathBuf {
    root.join("recipe.toml")
}

/// Whether `root` holds a run, so that there is one to resume.
pub fn holds_run(root: &Path) -> bool {
    identity_file(root).exists()
}

/// Gives a file this text, whole and on the disk, or leaves it as it is.
pub(crate) fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    let written = File::create(&partial).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.with_context(|| format!("{}: cannot write", partial.display()))?;
    fs::rename(&partial, path).with_context(|| format!("{}: cannot replace", path.display()))?;
    match path.parent() {
        // Only Unix can open a directory, which makes the rename durable.
        Some(parent) if cfg!(unix) => File::open(parent)
            .and_then(|directory| directory.sync_all())
            .with_context(|| format!("{}: cannot flush to the disk", parent.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_coordinator_at_a_time_and_starts_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunDir::open(dir.path(), false, "a").unwrap();
        let second = RunDir::open(dir.path(), true, "b").unwrap_err();
        assert!(second.to_string().contains("another coordinator holds this run"), "{second}");
        drop(first);
        let resumed = RunDir::open(dir.path(), true, "b").unwrap();
        let Identity { run_id, incarnation, .. } = resumed.identity();
        assert_eq!((run_id.as_str(), *incarnation), ("a", 2));
    }

    #[test]
    fn a_later_start_fences_off_an_earlier_one_whose_lock_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunDir::open(dir.path(), false, "a").unwrap();
        first.fence().check().unwrap();
        fs::remove_file(dir.path().join("lock")).unwrap();
        let second = RunDir::open(dir.path(), true, "b").unwrap();
        second.fence().check().unwrap();
        let said = first.fence().check().unwrap_err().to_string();
        assert!(said.contains("start 2") && said.contains("start 1"), "{said}");
    }

    #[test]
    fn later_starts_know_whom_and_what_not_to_trust() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = RunDir::open(dir.path(), false, "a").unwrap();
        first.trust_up_to(Some(7)).unwrap();
        first.quarantine("broken").unwrap();
        // Its lock is lost, and another start takes over: from then on it changes nothing.
        fs::remove_file(dir.path().join("lock")).unwrap();
        let mut second = RunDir::open(dir.path(), true, "b").unwrap();
        assert_eq!(second.identity().trusted_up_to, Some(7));
        assert_eq!(second.identity().quarantined, ["broken".to_string()].into());
        second.trust_up_to(None).unwrap();
        assert!(first.trust_up_to(Some(3)).unwrap_err().to_string().contains("has taken over"));
        drop(second);
        assert_eq!(RunDir::open(dir.path(), true, "b").unwrap().identity().trusted_up_to, None);
    }

    #[test]
    fn a_run_is_neither_overwritten_nor_resumed_from_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let nothing = RunDir::open(dir.path(), true, "a").unwrap_err();
        assert!(nothing.to_string().contains("no run to resume"), "{nothing}");
        drop(RunDir::open(dir.path(), false, "a").unwrap());
        let again = RunDir::open(dir.path(), false, "a").unwrap_err();
        assert!(again.to_string().contains("--resume"), "{again}");
    }
}
