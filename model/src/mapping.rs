//! Files as memory.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// A file's bytes, read from the disk as they are looked at.
#[derive(Debug)]
pub(crate) struct Mapping(Option<Mmap>);

impl Mapping {
    /// Maps all of a file.
    ///
    /// # Errors
    /// If the system refuses.
    #[allow(unsafe_code)]
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // An empty file cannot be mapped.
        if file.metadata()?.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the map is only read, and only as bytes, for which any value is valid. Shards are written once, under
        // another name, and renamed when whole; that nobody shortens one under a running program is what its user is
        // asked for, as by every program that maps files (else the system ends the program, with SIGBUS on Unix).
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self(Some(map)))
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
