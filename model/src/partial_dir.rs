//! A directory that appears under its name whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// What the system refused, and where.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) path: PathBuf,
    /// What was tried.
    pub(crate) action: &'static str,
    pub(crate) error: io::Error,
}

impl Refused {
    fn to(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self { path, action, error }
    }
}

/// A directory under a hidden name beside its final one. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct PartialDir {
    path: PathBuf,
    target: PathBuf,
}

impl PartialDir {
    /// Begins the directory `target`, which has a name, without what an earlier attempt left of it.
    pub(crate) fn create(target: &Path) -> Result<Self, Refused> {
        let partial = Self { path: hidden(target), target: target.into() };
        if partial.path.exists() {
            fs::remove_dir_all(&partial.path).map_err(Refused::to(&partial.path, "remove an unfinished attempt"))?;
        }
        fs::create_dir_all(&partial.path).map_err(Refused::to(&partial.path, "create the directory"))?;
        Ok(partial)
    }

    /// Where to write what is to be in it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What it will be.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Gives it its name, which nothing but an empty directory may have, for good. What is in it is flushed already.
    pub(crate) fn publish(self) -> Result<(), Refused> {
        fs::rename(&self.path, &self.target).map_err(Refused::to(&self.target, "rename into place"))?;
        let parent = self.target.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_directory(parent.unwrap_or(Path::new(".")))
    }
}

impl Drop for PartialDir {
    fn drop(&mut self) {
        // Gone already where it was published. Elsewhere the error that led here says what went wrong; that the remains of
        // an attempt cannot be removed either adds nothing.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The name of `target` while it is not, or no longer, whole.
pub(crate) fn hidden(target: &Path) -> PathBuf {
    target.with_file_name(format!(".{}.partial", target.file_name().unwrap_or_default().to_string_lossy()))
}

/// Flushes a directory to the disk, and all in it before it.
pub(crate) fn sync_all(directory: &Path) -> Result<(), Refused> {
    for entry in fs::read_dir(directory).map_err(Refused::to(directory, "read back"))? {
        let path = entry.map_err(Refused::to(directory, "read back"))?.path();
        match path.is_dir() {
            true => sync_all(&path)?,
            false => sync_file(&path)?,
        }
    }
    sync_directory(directory)
}

/// Flushes a file to the disk.
pub(crate) fn sync_file(path: &Path) -> Result<(), Refused> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Refused::to(path, "flush to the disk"))
}

/// Makes what was named within `path` durable. Only Unix can open a directory for that.
pub(crate) fn sync_directory(path: &Path) -> Result<(), Refused> {
    if cfg!(unix) { sync_file(path) } else { Ok(()) }
}
