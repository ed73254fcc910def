//! A prepared corpus: a directory of token shards, the tokenizer that made them, and a manifest that seals both.
//!
//! | File | What it is |
//! |---|---|
//! | `manifest.json` | [`DatasetManifest`]: counts and digests |
//! | `tokenizer.json` | the [tokenizer](crate::tokenizer::Tokenizer) |
//! | `shard-00000.bin`, … | the tokens, in llm.c's [layout](crate::shard) |
//!
//! It is written beside its final name and renamed when whole. Opening it reads everything once and checks every digest;
//! afterwards the shards are read through memory maps.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::hex;
use crate::partial_dir::{PartialDir, Refused, sync_file};
use crate::shard::{MAX_SHARD_TOKENS, Shard, ShardError, ShardWriter, Width};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::tokens::Tokens;

/// Version of the manifest's form.
pub const FORMAT_VERSION: u32 = 1;
/// Tokens of a shard, but for the last: as in llm.c's own data scripts.
pub const SHARD_TOKENS: u64 = 100_000_000;
/// The part of a shard that has a digest of its own, in bytes, so that damage can be placed.
pub const BLOCK_BYTES: usize = 4 << 20;

const MANIFEST: &str = "manifest.json";
const TOKENIZER: &str = "tokenizer.json";

/// What a prepared corpus says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetManifest {
    /// [`FORMAT_VERSION`] of the program that wrote it.
    pub format_version: u32,
    /// SHA-256 of `tokenizer.json`, hexadecimal.
    pub tokenizer_sha256: String,
    /// How many distinct tokens the tokenizer has.
    pub vocab_size: usize,
    /// Tokens in all shards.
    pub tokens: u64,
    /// Bytes of text that they stand for.
    pub bytes: u64,
    /// Documents.
    pub documents: u64,
    /// The shards, in order.
    pub shards: Vec<ShardSeal>,
}

/// Size and digests of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardSeal {
    /// Its name within the directory.
    pub file: String,
    /// Tokens in it.
    pub tokens: u64,
    /// Length in bytes, header included.
    pub bytes: u64,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// SHA-256 of each [`BLOCK_BYTES`] of the file; the last block may be shorter.
    pub block_sha256: Vec<String>,
}

/// Why there is no prepared corpus.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
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
    /// There is something where it should be written.
    #[error("{path}: is there already, and is not replaced; give another --out, or remove it", path = path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// The manifest is not one, or does not fit the other files.
    #[error("{path}: {problem}; prepare the corpus again", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A shard is damaged.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The tokenizer is.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl DatasetError {
    fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { path, action, error }
    }

    fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), problem: problem.into() }
    }
}

impl From<Refused> for DatasetError {
    fn from(Refused { path, action, error }: Refused) -> Self {
        Self::Io { path, action, error }
    }
}

/// A prepared corpus, checked and mapped.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// What it says of itself.
    pub manifest: DatasetManifest,
    /// How its text became tokens.
    pub tokenizer: Tokenizer,
    /// All its tokens.
    pub tokens: Tokens,
}

/// Whether `path` is the directory of a prepared corpus.
pub fn is_dataset(path: &Path) -> bool {
    path.join(MANIFEST).is_file()
}

impl Dataset {
    /// Opens a prepared corpus, having checked every digest.
    ///
    /// # Errors
    /// If a file cannot be read or is not what was written; a shard's damage is named with its place.
    pub fn open(dir: &Path) -> Result<Self, DatasetError> {
        let path = dir.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(DatasetError::io(&path, "read"))?;
        let manifest: DatasetManifest = serde_json::from_str(&text)
            .map_err(|error| DatasetError::damaged(&path, format!("is no manifest of a prepared corpus: {error}")))?;
        if manifest.format_version != FORMAT_VERSION {
            let problem =
                format!("has format version {}, this program reads {FORMAT_VERSION}", manifest.format_version);
            return Err(DatasetError::damaged(&path, problem));
        }
        let tokenizer = Tokenizer::read(&dir.join(TOKENIZER))?;
        if tokenizer.sha256() != manifest.tokenizer_sha256 || tokenizer.vocab_size() != manifest.vocab_size {
            let problem = "is not the tokenizer that the manifest names: its SHA-256 or vocabulary is another";
            return Err(DatasetError::damaged(&dir.join(TOKENIZER), problem));
        }
        let shards = open_all(dir, &manifest)?;
        let tokens = Tokens::from(shards);
        if tokens.len() as u64 != manifest.tokens {
            let problem = format!("names {} tokens, and its shards hold {}", manifest.tokens, tokens.len());
            return Err(DatasetError::damaged(&path, problem));
        }
        Ok(Self { manifest, tokenizer, tokens })
    }
}

/// Opens and checks all shards, on all cores.
fn open_all(dir: &Path, manifest: &DatasetManifest) -> Result<Vec<Shard>, DatasetError> {
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let per_thread = manifest.shards.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let groups = manifest.shards.chunks(per_thread);
        let open = |seal: &ShardSeal| open_sealed(&dir.join(&seal.file), seal, manifest.vocab_size);
        let running: Vec<_> =
            groups.map(|group| scope.spawn(move || group.iter().map(open).collect::<Result<Vec<_>, _>>())).collect();
        let mut shards = Vec::with_capacity(manifest.shards.len());
        for thread in running {
            shards.extend(thread.join().expect("reading and hashing do not panic")?);
        }
        Ok(shards)
    })
}

fn open_sealed(path: &Path, seal: &ShardSeal, vocab_size: usize) -> Result<Shard, ShardError> {
    let found = self::seal(path, &seal.file, seal.tokens)?;
    if found.bytes != seal.bytes {
        let problem = format!(
            "the file has {} bytes, {} were written; copy it again, or prepare the corpus again",
            found.bytes, seal.bytes
        );
        return Err(ShardError::damaged(path, found.bytes.min(seal.bytes), problem));
    }
    if found.sha256 != seal.sha256 {
        let differs = found.block_sha256.iter().zip(&seal.block_sha256).position(|(found, sealed)| found != sealed);
        let offset = (differs.unwrap_or(0) * BLOCK_BYTES) as u64;
        let end = (offset + BLOCK_BYTES as u64).min(found.bytes);
        let problem = format!(
            "something before byte {end} is not what was written (another SHA-256); copy the file again, or prepare the \
             corpus again"
        );
        return Err(ShardError::damaged(path, offset, problem));
    }
    let shard = Shard::open(path)?;
    shard.check_vocabulary(vocab_size)?;
    Ok(shard)
}

/// Reads a file to its end and digests it.
fn seal(path: &Path, name: &str, tokens: u64) -> Result<ShardSeal, ShardError> {
    let mut file = File::open(path).map_err(ShardError::io(path, "read"))?;
    let (mut whole, mut bytes, mut block_sha256) = (Sha256::new(), 0, Vec::new());
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    loop {
        block.clear();
        file.by_ref().take(BLOCK_BYTES as u64).read_to_end(&mut block).map_err(ShardError::io(path, "read"))?;
        if block.is_empty() {
            break;
        }
        whole.update(&block);
        block_sha256.push(hex(&Sha256::digest(&block)));
        bytes += block.len() as u64;
    }
    Ok(ShardSeal { file: name.into(), tokens, bytes, sha256: hex(&whole.finalize()), block_sha256 })
}

/// Writes a prepared corpus, whole or not at all.
#[derive(Debug)]
pub struct DatasetWriter {
    /// Where it is written; removed unless it is finished.
    partial: PartialDir,
    tokenizer: Tokenizer,
    width: Width,
    shard_tokens: u64,
    shard: Option<ShardWriter>,
    seals: Vec<ShardSeal>,
}

impl DatasetWriter {
    /// Begins a corpus at `target`, where there must be nothing (or an empty directory), with shards of `shard_tokens`.
    ///
    /// # Errors
    /// If there is something, or the system refuses.
    pub fn create(target: &Path, tokenizer: Tokenizer, shard_tokens: u64) -> Result<Self, DatasetError> {
        check_free(target)?;
        if target.file_name().is_none() {
            return Err(DatasetError::Exists { path: target.into() });
        }
        let partial = PartialDir::create(target)?;
        let width = Width::for_vocabulary(tokenizer.vocab_size());
        let shard_tokens = shard_tokens.clamp(1, MAX_SHARD_TOKENS);
        Ok(Self { partial, tokenizer, width, shard_tokens, shard: None, seals: Vec::new() })
    }

    /// Appends tokens of the tokenizer's vocabulary.
    ///
    /// # Errors
    /// If the system refuses, for example because the disk is full.
    pub fn push(&mut self, mut tokens: &[u32]) -> Result<(), DatasetError> {
        while !tokens.is_empty() {
            let mut shard = match self.shard.take() {
                Some(shard) => shard,
                None => ShardWriter::create(&self.partial.path().join(self.shard_name()), self.width)?,
            };
            let (now, later) = tokens.split_at(tokens.len().min((self.shard_tokens - shard.tokens()) as usize));
            shard.push(now)?;
            tokens = later;
            match shard.tokens() == self.shard_tokens {
                true => self.seal_shard(shard)?,
                false => self.shard = Some(shard),
            }
        }
        Ok(())
    }

    /// Ends the corpus, which holds `documents` documents of `bytes` bytes of text in all.
    ///
    /// # Errors
    /// If the system refuses; nothing is then left behind.
    pub fn finish(mut self, bytes: u64, documents: u64) -> Result<DatasetManifest, DatasetError> {
        if let Some(shard) = self.shard.take() {
            self.seal_shard(shard)?;
        }
        let manifest = DatasetManifest {
            format_version: FORMAT_VERSION,
            tokenizer_sha256: self.tokenizer.sha256(),
            vocab_size: self.tokenizer.vocab_size(),
            tokens: self.seals.iter().map(|seal| seal.tokens).sum(),
            bytes,
            documents,
            shards: std::mem::take(&mut self.seals),
        };
        let text = serde_json::to_string_pretty(&manifest).expect("numbers and texts can be written");
        for (name, text) in [(TOKENIZER, self.tokenizer.to_json()), (MANIFEST, text)] {
            let path = self.partial.path().join(name);
            fs::write(&path, text).map_err(DatasetError::io(&path, "write"))?;
            sync_file(&path)?;
        }
        let target = self.partial.target();
        check_free(target)?;
        if target.exists() {
            fs::remove_dir(target).map_err(DatasetError::io(target, "replace the empty directory"))?;
        }
        self.partial.publish()?;
        Ok(manifest)
    }

    fn shard_name(&self) -> String {
        format!("shard-{:05}.bin", self.seals.len())
    }

    fn seal_shard(&mut self, shard: ShardWriter) -> Result<(), DatasetError> {
        let (name, tokens) = (self.shard_name(), shard.tokens());
        shard.finish()?;
        self.seals.push(seal(&self.partial.path().join(&name), &name, tokens)?);
        Ok(())
    }
}

/// Refuses a place where there is something.
///
/// # Errors
/// If there is a file, or a directory that is not empty, or it cannot be looked at.
pub fn check_free(target: &Path) -> Result<(), DatasetError> {
    let taken = match fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => true,
        Err(error) => return Err(DatasetError::io(target, "look at what is there")(error)),
    };
    if taken { Err(DatasetError::Exists { path: target.into() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, tokens: &[u32], shard_tokens: u64) -> DatasetManifest {
        let mut writer = DatasetWriter::create(dir, Tokenizer::Bytes, shard_tokens).unwrap();
        tokens.chunks(7).for_each(|some| writer.push(some).unwrap());
        writer.finish(tokens.len() as u64, 3).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_over_several_shards() {
        let dir = tempfile::tempdir().unwrap();
        let tokens: Vec<u32> = (0..100).map(|i| i * 37 % 256).collect();
        for shard_tokens in [1, 10, 33, 100, 1000] {
            let path = dir.path().join(shard_tokens.to_string());
            let manifest = write(&path, &tokens, shard_tokens);
            assert_eq!(manifest.shards.len() as u64, 100u64.div_ceil(shard_tokens));
            let back = Dataset::open(&path).unwrap();
            assert_eq!(
                (back.tokens.to_vec(), &back.manifest, &back.tokenizer),
                (tokens.clone(), &manifest, &Tokenizer::Bytes)
            );
        }
        assert!(is_dataset(&dir.path().join("10")) && !is_dataset(dir.path()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5, "nothing is left beside them");
    }

    #[test]
    fn damage_is_found_and_placed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("corpus");
        let tokens: Vec<u32> = (0..5_000_000u32).map(|i| i % 251).collect();
        write(&path, &tokens, SHARD_TOKENS);
        let shard = path.join("shard-00000.bin");
        let whole = fs::read(&shard).unwrap();
        let offset_of = |bytes: &[u8]| {
            fs::write(&shard, bytes).unwrap();
            match Dataset::open(&path) {
                Err(DatasetError::Shard(ShardError::Damaged { offset, path, .. })) if path == shard => offset,
                other => panic!("{other:?}"),
            }
        };
        for place in [0, 1500, BLOCK_BYTES, whole.len() - 1] {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            assert_eq!(offset_of(&changed), (place / BLOCK_BYTES * BLOCK_BYTES) as u64);
        }
        assert_eq!(offset_of(&whole[..whole.len() / 2]), whole.len() as u64 / 2);
        fs::write(&shard, &whole).unwrap();
        Dataset::open(&path).unwrap();

        fs::write(path.join(TOKENIZER), r#"{"kind":"chars","vocabulary":"ab"}"#).unwrap();
        assert!(Dataset::open(&path).unwrap_err().to_string().contains("tokenizer.json"));
        fs::write(path.join(MANIFEST), "{}").unwrap();
        assert!(Dataset::open(&path).unwrap_err().to_string().contains("manifest.json"));
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_left_half_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("corpus");
        let mut writer = DatasetWriter::create(&path, Tokenizer::Bytes, 10).unwrap();
        writer.push(&[1; 25]).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::create_dir(&path).unwrap();
        write(&path, &[1, 2], 10);
        assert!(matches!(DatasetWriter::create(&path, Tokenizer::Bytes, 10), Err(DatasetError::Exists { .. })));
    }
}
