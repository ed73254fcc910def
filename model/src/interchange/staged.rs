//! A directory that appears whole or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::InterchangeError;

/// A directory under a hidden name beside its final one. Dropping it removes it.
#[derive(Debug)]
pub struct StagedDir {
    partial: PathBuf,
    target: PathBuf,
}

impl StagedDir {
    /// Begins the directory `target`, which must not exist yet.
    ///
    /// # Errors
    /// If it does, or the system refuses.
    pub fn create(target: &Path) -> Result<Self, InterchangeError> {
        let refused = |problem| Err(InterchangeError::refused(target, problem));
        let Some(name) = target.file_name() else { return refused("is no name for a new directory") };
        if target.exists() {
            return refused("is there already, and nothing is written over; remove it, or choose another --out");
        }
        let partial = target.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        if partial.exists() {
            let removed = fs::remove_dir_all(&partial);
            removed.map_err(InterchangeError::io(&partial, "remove what an earlier attempt left"))?;
        }
        fs::create_dir_all(&partial).map_err(InterchangeError::io(&partial, "create the directory"))?;
        Ok(Self { partial, target: target.into() })
    }

    /// Where to write what is to be in it.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Flushes everything to the disk and gives the directory its name.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn publish(self) -> Result<(), InterchangeError> {
        let Self { partial, target } = &self;
        sync(partial)?;
        fs::rename(partial, target).map_err(InterchangeError::io(target, "rename into place"))?;
        match target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) => sync_directory(parent),
            None => sync_directory(Path::new(".")),
        }
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        // Gone already where it was published; elsewhere, the error that led here says what went wrong.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Flushes a directory, and all in it before it.
fn sync(directory: &Path) -> Result<(), InterchangeError> {
    for entry in fs::read_dir(directory).map_err(InterchangeError::io(directory, "read back"))? {
        let path = entry.map_err(InterchangeError::io(directory, "read back"))?.path();
        match path.is_dir() {
            true => sync(&path)?,
            false => sync_file(&path)?,
        }
    }
    sync_directory(directory)
}

fn sync_file(path: &Path) -> Result<(), InterchangeError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(InterchangeError::io(path, "flush to the disk"))
}

/// Only Unix can open a directory for that.
fn sync_directory(path: &Path) -> Result<(), InterchangeError> {
    if cfg!(unix) { sync_file(path) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let staged = StagedDir::create(&target).unwrap();
        fs::create_dir(staged.path().join("sub")).unwrap();
        fs::write(staged.path().join("sub/file"), "text").unwrap();
        assert!(!target.exists());
        drop(staged);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        // What a killed attempt left is in nobody's way.
        fs::create_dir_all(dir.path().join(".out.partial/remains")).unwrap();
        let staged = StagedDir::create(&target).unwrap();
        fs::write(staged.path().join("file"), "text").unwrap();
        staged.publish().unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
        assert!(StagedDir::create(&target).unwrap_err().to_string().contains("is there already"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
