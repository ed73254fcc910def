//! A model in the form of others, on the disk whole or not at all.

use std::path::Path;

use super::InterchangeError;
use crate::partial_dir::{PartialDir, sync_all};

/// A directory that has no name yet. Dropping it removes it.
#[derive(Debug)]
pub struct StagedDir(PartialDir);

impl StagedDir {
    /// Begins the directory `target`, which must not exist yet.
    ///
    /// # Errors
    /// If it does, or the system refuses.
    pub fn create(target: &Path) -> Result<Self, InterchangeError> {
        let refused = |problem| Err(InterchangeError::refused(target, problem));
        if target.file_name().is_none() {
            return refused("is no name for a new directory");
        }
        if target.exists() {
            return refused("is there already, and nothing is written over; remove it, or choose another --out");
        }
        Ok(Self(PartialDir::create(target)?))
    }

    /// Where to write what is to be in it.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Flushes everything to the disk and gives the directory its name.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn publish(self) -> Result<(), InterchangeError> {
        sync_all(self.path())?;
        Ok(self.0.publish()?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
