//! Token shards: files of tokens, in llm.c's layout or nanoGPT's, read through a memory map.
//!
//! | Layout | Begins with | Tokens |
//! |---|---|---|
//! | llm.c, GPT-2 | 256 int32: 20240520, 1, token count, zeros | uint16 |
//! | llm.c, Llama 3 | 256 int32: 20240801, 7, token count, zeros | uint32 |
//! | nanoGPT | nothing | uint16, to the end of the file |
//!
//! All numbers are little-endian. The first is written where 65,536 tokens are enough, else the second; all are read.

use std::fs::File;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::mapping::Mapping;

/// Length of llm.c's header, in bytes.
pub const HEADER_BYTES: usize = 1024;
/// Most tokens of a shard: their count is an int32.
pub const MAX_SHARD_TOKENS: u64 = i32::MAX as u64;

/// Tokens checked or copied at a time.
const BLOCK_TOKENS: usize = 1 << 16;

/// How a token is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// uint16.
    Two,
    /// uint32.
    Four,
}

impl Width {
    /// The narrower one that holds all tokens of a vocabulary.
    pub fn for_vocabulary(vocab_size: usize) -> Self {
        if vocab_size <= 1 << 16 { Self::Two } else { Self::Four }
    }

    fn bytes(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Four => 4,
        }
    }

    /// Magic number and version of llm.c's header.
    fn header(self) -> [i32; 2] {
        match self {
            Self::Two => [20_240_520, 1],
            Self::Four => [20_240_801, 7],
        }
    }
}

/// Why a shard cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// The system refused.
    #[error("{path}: cannot {action}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system says.
        error: io::Error,
    },
    /// The file is not what it says it is.
    #[error("{path}: at byte {offset}: {problem}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
}

impl ShardError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { path, action, error }
    }

    pub(crate) fn damaged(path: &Path, offset: u64, problem: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), offset, problem: problem.into() }
    }
}

/// The tokens of one file.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    mapping: Mapping,
    width: Width,
    first_byte: usize,
    tokens: usize,
}

impl Shard {
    /// Opens a shard of any layout and checks that it is as long as it says. What does not begin with a header of llm.c
    /// is taken as nanoGPT's.
    ///
    /// # Errors
    /// If it cannot be read, is of another version, too short or too long.
    pub fn open(path: &Path) -> Result<Self, ShardError> {
        let mapping = Mapping::open(path).map_err(ShardError::io(path, "read"))?;
        let bytes = mapping.bytes();
        let length = bytes.len() as u64;
        let number =
            |index: usize| bytes.get(index * 4..index * 4 + 4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let layout = [Width::Two, Width::Four].into_iter().find(|width| number(0) == Some(width.header()[0]));
        let Some(width) = layout else {
            if !bytes.len().is_multiple_of(2) {
                let problem = "the file ends within a token: without llm.c's header, tokens are uint16";
                return Err(ShardError::damaged(path, length - 1, problem));
            }
            let tokens = bytes.len() / 2;
            return Ok(Self { path: path.into(), mapping, width: Width::Two, first_byte: 0, tokens });
        };
        if bytes.len() < HEADER_BYTES {
            let problem = format!("the file ends within its header of {HEADER_BYTES} bytes; write or copy it again");
            return Err(ShardError::damaged(path, length, problem));
        }
        let [magic, version] = width.header();
        if number(1) != Some(version) {
            let found = number(1).unwrap_or_default();
            let problem = format!("layout {magic} has version {found} here, and version {version} is read");
            return Err(ShardError::damaged(path, 4, problem));
        }
        let count = number(2).and_then(|count| usize::try_from(count).ok());
        let Some(tokens) = count else {
            return Err(ShardError::damaged(path, 8, "the token count is negative"));
        };
        let wanted = (HEADER_BYTES + tokens * width.bytes()) as u64;
        if length != wanted {
            let problem = format!(
                "the file has {length} bytes, and its header of {tokens} tokens asks for {wanted}; write or copy it again"
            );
            return Err(ShardError::damaged(path, length.min(wanted), problem));
        }
        Ok(Self { path: path.into(), mapping, width, first_byte: HEADER_BYTES, tokens })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Appends the tokens of `range` to `out`. The range lies within the shard.
    pub fn copy(&self, range: Range<usize>, out: &mut Vec<u32>) {
        let size = self.width.bytes();
        let bytes = &self.mapping.bytes()[self.first_byte + range.start * size..self.first_byte + range.end * size];
        match self.width {
            Width::Two => out.extend(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))),
            Width::Four => out.extend(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        }
    }

    /// Whether all tokens are below `vocab_size`.
    ///
    /// # Errors
    /// Names the place of the first that is not.
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<(), ShardError> {
        let mut block = Vec::with_capacity(BLOCK_TOKENS);
        for start in (0..self.tokens).step_by(BLOCK_TOKENS) {
            block.clear();
            self.copy(start..self.tokens.min(start + BLOCK_TOKENS), &mut block);
            if let Some(index) = block.iter().position(|&token| token as usize >= vocab_size) {
                let offset = (self.first_byte + (start + index) * self.width.bytes()) as u64;
                let token = block[index];
                let problem = format!(
                    "token {token} is not below the tokenizer's vocabulary of {vocab_size}; is it the tokenizer that wrote the file?"
                );
                return Err(ShardError::damaged(&self.path, offset, problem));
            }
        }
        Ok(())
    }
}

/// Writes a shard in llm.c's layout.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
    width: Width,
    tokens: u64,
}

impl ShardWriter {
    /// Begins a file.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn create(path: &Path, width: Width) -> Result<Self, ShardError> {
        let file = File::create(path).map_err(ShardError::io(path, "create"))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER_BYTES]).map_err(ShardError::io(path, "write"))?;
        Ok(Self { path: path.into(), file, width, tokens: 0 })
    }

    /// Tokens written so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Appends tokens, of which there must not be more than [`MAX_SHARD_TOKENS`] in all, each within the width.
    ///
    /// # Errors
    /// If the system refuses, for example because the disk is full.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), ShardError> {
        let written = tokens.iter().try_for_each(|token| match self.width {
            Width::Two => self.file.write_all(&(*token as u16).to_le_bytes()),
            Width::Four => self.file.write_all(&token.to_le_bytes()),
        });
        self.tokens += tokens.len() as u64;
        written.map_err(ShardError::io(&self.path, "write"))
    }

    /// Writes the header and flushes to the disk.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn finish(mut self) -> Result<(), ShardError> {
        let [magic, version] = self.width.header();
        let header: Vec<u8> = [magic, version, self.tokens as i32].iter().flat_map(|n| n.to_le_bytes()).collect();
        let written = self.file.seek(SeekFrom::Start(0));
        let written = written.and_then(|_| self.file.write_all(&header)).and_then(|()| self.file.flush());
        written.and_then(|()| self.file.get_ref().sync_all()).map_err(ShardError::io(&self.path, "write"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn written(path: &Path, width: Width, tokens: &[u32]) {
        let mut writer = ShardWriter::create(path, width).unwrap();
        tokens.chunks(3).for_each(|some| writer.push(some).unwrap());
        assert_eq!(writer.tokens(), tokens.len() as u64);
        writer.finish().unwrap();
    }

    fn all(shard: &Shard) -> Vec<u32> {
        let mut tokens = Vec::new();
        shard.copy(0..shard.len(), &mut tokens);
        tokens
    }

    #[test]
    fn the_layout_is_llm_cs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        written(&path, Width::Two, &[1, 65_535]);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes[..12], [0x88, 0xD8, 0x34, 0x01, 1, 0, 0, 0, 2, 0, 0, 0]);
        assert!(bytes[12..HEADER_BYTES].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[HEADER_BYTES..], [1, 0, 0xFF, 0xFF]);
        written(&path, Width::Four, &[65_536]);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes[..12], [0xA1, 0xD9, 0x34, 0x01, 7, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[HEADER_BYTES..], [0, 0, 1, 0]);
    }

    proptest! {
        #[test]
        fn tokens_survive_both_widths(tokens in proptest::collection::vec(any::<u16>(), 0..50), cut in 0.0..1.0) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.bin");
            let tokens: Vec<u32> = tokens.into_iter().map(u32::from).collect();
            for width in [Width::Two, Width::Four] {
                written(&path, width, &tokens);
                let shard = Shard::open(&path).unwrap();
                prop_assert_eq!(all(&shard), tokens.clone());
                let start = (cut * tokens.len() as f64) as usize;
                let mut part = Vec::new();
                shard.copy(start..tokens.len(), &mut part);
                prop_assert_eq!(&part, &tokens[start..]);
            }
        }
    }

    #[test]
    fn a_file_without_header_is_nanogpts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.bin");
        fs::write(&path, [5, 0, 0, 1, 7, 0]).unwrap();
        assert_eq!(all(&Shard::open(&path).unwrap()), [5, 256, 7]);
        fs::write(&path, [5, 0, 0]).unwrap();
        assert!(matches!(Shard::open(&path), Err(ShardError::Damaged { offset: 2, .. })));
        fs::write(&path, []).unwrap();
        assert!(Shard::open(&path).unwrap().is_empty());
    }

    #[test]
    fn a_damaged_shard_is_named_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        written(&path, Width::Two, &[1, 2, 3]);
        let whole = fs::read(&path).unwrap();
        let offset_of = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            match Shard::open(&path) {
                Err(ShardError::Damaged { offset, .. }) => offset,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(offset_of(&whole[..HEADER_BYTES + 5]), 1029);
        assert_eq!(offset_of(&whole[..100]), 100);
        assert_eq!(offset_of(&[&whole[..], &[0, 0]].concat()), 1030);
        let mut other_version = whole.clone();
        other_version[4] = 2;
        assert_eq!(offset_of(&other_version), 4);
        let mut negative = whole;
        negative[11] = 0x80;
        assert_eq!(offset_of(&negative), 8);
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_named_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        written(&path, Width::Four, &[1, 2, 90_000]);
        let shard = Shard::open(&path).unwrap();
        shard.check_vocabulary(90_001).unwrap();
        assert!(matches!(shard.check_vocabulary(90_000), Err(ShardError::Damaged { offset: 1032, .. })));
    }
}
