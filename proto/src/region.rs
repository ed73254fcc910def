//! Vectors by way of memory, between processes of one machine: a file without a name, which whoever made it opens to others
//! by its number. It is read and written, never mapped, so that no process sees another's memory change under its feet.
//!
//! A vector has a stamp, which says what it is. Whoever writes takes the stamp away first and puts the new one there last;
//! whoever reads looks at it before and after: a vector that was overwritten meanwhile is not taken for another.
//!
//! Only Linux has such files. Elsewhere none can be made, and vectors travel in [chunks](crate::chunk).

use std::io;

/// Proof that a region is the one that was offered, and not what happens to have its path on another machine.
pub type Token = [u8; 32];

/// The stamp of parameters, by their digest: a run that went back may have another version of the same number.
pub fn stamp_of(digest: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *digest;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(target_os = "linux")]
pub use linux::Region;
#[cfg(not(target_os = "linux"))]
pub use nowhere::Region;

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::FileExt as _;

    use super::{Token, io};

    /// Where the stamp is, after the token.
    const STAMP_AT: u64 = size_of::<Token>() as u64;
    /// Where elements begin: a page of their own.
    const ELEMENTS_AT: u64 = 4096;
    /// The stamp of nothing.
    const NOTHING: u64 = u64::MAX;

    /// One vector in memory, with a stamp.
    #[derive(Debug)]
    pub struct Region {
        file: File,
        elements: usize,
    }

    impl Region {
        /// An empty region for a vector of `elements`, that lives as long as somebody has it open.
        ///
        /// # Errors
        /// If the system refuses.
        pub fn create(token: &Token, elements: usize) -> io::Result<Self> {
            let file = File::from(rustix::fs::memfd_create("lockstep", rustix::fs::MemfdFlags::CLOEXEC)?);
            file.set_len(ELEMENTS_AT + 4 * elements as u64)?;
            file.write_all_at(token, 0)?;
            let region = Self { file, elements };
            region.put_stamp(NOTHING)?;
            Ok(region)
        }

        /// Of its vector.
        pub fn elements(&self) -> usize {
            self.elements
        }

        /// By which other processes of this machine and user [open](Self::open) it, while this one has it.
        pub fn path(&self) -> String {
            format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
        }

        /// The region at `path`; `None` if there is none that has this token and size, as on another machine.
        pub fn open(path: &str, token: &Token, elements: usize) -> Option<Self> {
            if !path.starts_with("/proc/") {
                return None;
            }
            let file = File::options().read(true).write(true).open(path).ok()?;
            let mut found = Token::default();
            file.read_exact_at(&mut found, 0).ok()?;
            let length = file.metadata().ok()?.len();
            (found == *token && length == ELEMENTS_AT + 4 * elements as u64).then_some(Self { file, elements })
        }

        /// Takes the stamp away, as whoever writes does first.
        ///
        /// # Errors
        /// If the system refuses.
        pub fn clear(&self) -> io::Result<()> {
            self.put_stamp(NOTHING)
        }

        /// Puts elements there, from element `start` on.
        ///
        /// # Errors
        /// If they go beyond the region, or the system refuses.
        pub fn write(&self, start: usize, elements: &[f32]) -> io::Result<()> {
            self.check(start, elements.len())?;
            self.file.write_all_at(bytemuck::cast_slice(elements), ELEMENTS_AT + 4 * start as u64)
        }

        /// Says what the vector is, as whoever writes does last.
        ///
        /// # Errors
        /// If the system refuses.
        pub fn put_stamp(&self, stamp: u64) -> io::Result<()> {
            self.file.write_all_at(&stamp.to_ne_bytes(), STAMP_AT)
        }

        /// Fetches the elements from `start` on.
        ///
        /// # Errors
        /// If they go beyond the region, or the system refuses.
        pub fn read(&self, start: usize, elements: &mut [f32]) -> io::Result<()> {
            self.check(start, elements.len())?;
            self.file.read_exact_at(bytemuck::cast_slice_mut(elements), ELEMENTS_AT + 4 * start as u64)
        }

        /// Whether the vector with this stamp is there: what was read between two times that it was is that vector's.
        ///
        /// # Errors
        /// If the system refuses.
        pub fn has(&self, stamp: u64) -> io::Result<bool> {
            let mut found = [0; 8];
            self.file.read_exact_at(&mut found, STAMP_AT)?;
            Ok(stamp != NOTHING && u64::from_ne_bytes(found) == stamp)
        }

        fn check(&self, start: usize, count: usize) -> io::Result<()> {
            if start + count <= self.elements {
                return Ok(());
            }
            let text = format!("elements {start} to {} of a region of {}", start + count, self.elements);
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod nowhere {
    use super::{Token, io};

    /// None of these can be made here.
    #[derive(Debug)]
    pub enum Region {}

    impl Region {
        /// Fails.
        ///
        /// # Errors
        /// Always.
        pub fn create(_: &Token, _: usize) -> io::Result<Self> {
            Err(io::ErrorKind::Unsupported.into())
        }

        /// Of none.
        pub fn elements(&self) -> usize {
            match *self {}
        }

        /// Of none.
        pub fn path(&self) -> String {
            match *self {}
        }

        /// There is none.
        pub fn open(_: &str, _: &Token, _: usize) -> Option<Self> {
            None
        }

        /// Of none.
        ///
        /// # Errors
        /// None.
        pub fn clear(&self) -> io::Result<()> {
            match *self {}
        }

        /// Of none.
        ///
        /// # Errors
        /// None.
        pub fn write(&self, _: usize, _: &[f32]) -> io::Result<()> {
            match *self {}
        }

        /// Of none.
        ///
        /// # Errors
        /// None.
        pub fn put_stamp(&self, _: u64) -> io::Result<()> {
            match *self {}
        }

        /// Of none.
        ///
        /// # Errors
        /// None.
        pub fn read(&self, _: usize, _: &mut [f32]) -> io::Result<()> {
            match *self {}
        }

        /// Of none.
        ///
        /// # Errors
        /// None.
        pub fn has(&self, _: u64) -> io::Result<bool> {
            match *self {}
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const TOKEN: Token = [7; 32];

    #[test]
    fn a_vector_is_read_by_its_stamp_from_wherever_it_is_opened() {
        let here = Region::create(&TOKEN, 3).unwrap();
        let there = Region::open(&here.path(), &TOKEN, 3).unwrap();
        assert!(!there.has(5).unwrap() && !there.has(u64::MAX).unwrap(), "nothing was written yet");
        here.write(0, &[1.0, 2.0]).unwrap();
        here.write(2, &[-3.5]).unwrap();
        here.put_stamp(5).unwrap();
        assert!(there.has(5).unwrap() && !there.has(4).unwrap());
        let mut found = [0.0; 2];
        there.read(1, &mut found).unwrap();
        assert_eq!(found, [2.0, -3.5]);
        there.clear().unwrap();
        assert!(!here.has(5).unwrap(), "it is being written");
        assert!(here.write(1, &[0.0; 3]).is_err() && here.read(2, &mut found).is_err(), "beyond its end");
    }

    #[test]
    fn what_has_another_token_or_size_or_is_no_region_is_not_opened() {
        let region = Region::create(&TOKEN, 3).unwrap();
        assert!(Region::open(&region.path(), &[8; 32], 3).is_none());
        assert!(Region::open(&region.path(), &TOKEN, 4).is_none());
        for path in ["", "/etc/passwd", "/proc/self/cmdline", "/proc/0/fd/3"] {
            assert!(Region::open(path, &TOKEN, 3).is_none(), "{path}");
        }
        let path = region.path();
        drop(region);
        assert!(Region::open(&path, &TOKEN, 3).is_none());
    }
}
