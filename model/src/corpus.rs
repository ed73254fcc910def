//! Text from disk, checked, and its split into training and validation parts.

use std::fs;
use std::path::{Path, PathBuf};

use crate::tokenizer::{Tokenizer, TokenizerKind, UnknownCharacter};
use crate::tokens::Tokens;

/// Why there is no corpus.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// The file or directory cannot be read.
    #[error("{path}: cannot be read: {error}; set data.input to a .txt file or a directory of such files", path = path.display())]
    Unreadable {
        /// Where.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// A directory without text files.
    #[error("{path}: the directory holds no .txt file; set data.input to one that does", path = path.display())]
    NoFiles {
        /// Where.
        path: PathBuf,
    },
    /// A file that is no UTF-8.
    #[error("{path}: invalid UTF-8 at byte {offset}; convert the file (for example with iconv -t UTF-8)", path = path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Of the first bad byte.
        offset: usize,
    },
    /// Nothing to train on.
    #[error("{path}: the corpus is empty; set data.input to text", path = path.display())]
    Empty {
        /// Where.
        path: PathBuf,
    },
    /// Text that the tokenizer does not cover.
    #[error(transparent)]
    UnknownCharacter(#[from] UnknownCharacter),
}

/// Reads a text file, or all `.txt` files below a directory in the order of their paths, joined by nothing.
///
/// # Errors
/// If there is no text, or it is no UTF-8.
pub fn read_text(path: &Path) -> Result<String, CorpusError> {
    let unreadable = |path: &Path| {
        let path = path.to_path_buf();
        move |error| CorpusError::Unreadable { path, error }
    };
    let mut files = Vec::new();
    if fs::metadata(path).map_err(unreadable(path))?.is_dir() {
        collect_text_files(path, &mut files)?;
        files.sort();
        if files.is_empty() {
            return Err(CorpusError::NoFiles { path: path.into() });
        }
    } else {
        files.push(path.to_path_buf());
    }
    let mut text = String::new();
    for file in files {
        let bytes = fs::read(&file).map_err(unreadable(&file))?;
        let part = std::str::from_utf8(&bytes)
            .map_err(|error| CorpusError::NotUtf8 { path: file, offset: error.valid_up_to() })?;
        text.push_str(part);
    }
    if text.is_empty() { Err(CorpusError::Empty { path: path.into() }) } else { Ok(text) }
}

fn collect_text_files(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), CorpusError> {
    let unreadable = |error| CorpusError::Unreadable { path: directory.into(), error };
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_dir() {
            collect_text_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "txt") {
            files.push(path);
        }
    }
    Ok(())
}

/// A corpus as tokens, in memory or in mapped shards.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// How the text became tokens.
    pub tokenizer: Tokenizer,
    /// The first part, to train on.
    pub training: Tokens,
    /// The rest, to validate on.
    pub validation: Tokens,
}

impl Corpus {
    /// Tokenizes `text`; the first `train_fraction` of the tokens (rounded down) are for training.
    ///
    /// # Errors
    /// If the tokenizer does not cover the text, which one made for it does.
    pub fn of_text(text: &str, kind: TokenizerKind, train_fraction: f64) -> Result<Self, CorpusError> {
        let tokenizer = Tokenizer::for_text(kind, text);
        let tokens = tokenizer.encode(text)?;
        Ok(Self::of_tokens(tokenizer, &tokens.into(), train_fraction))
    }

    /// Splits `tokens`; the first `train_fraction` of them (rounded down) are for training.
    pub fn of_tokens(tokenizer: Tokenizer, tokens: &Tokens, train_fraction: f64) -> Self {
        let (training, validation) = tokens.split_at((tokens.len() as f64 * train_fraction) as usize);
        Self { tokenizer, training, validation }
    }

    /// Bytes of text for each token of the validation part, on average; `None` where it stands for no text.
    pub fn validation_bytes_per_token(&self) -> Option<f64> {
        let lengths = self.tokenizer.byte_lengths();
        let mut bytes = 0;
        self.validation.for_each_block(|block| {
            bytes += block.iter().map(|&token| u64::from(lengths[token as usize])).sum::<u64>();
        });
        (bytes > 0).then(|| bytes as f64 / self.validation.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_read_in_the_order_of_paths() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("b")).unwrap();
        for (name, text) in [("c.txt", "3"), ("a.txt", "1"), ("b/x.txt", "2"), ("d.md", "no")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        assert_eq!(read_text(dir.path()).unwrap(), "123");
    }

    #[test]
    fn bad_input_is_named_with_file_and_offset() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("bad.txt");
        assert!(matches!(read_text(&file), Err(CorpusError::Unreadable { .. })));
        assert!(matches!(read_text(dir.path()), Err(CorpusError::NoFiles { .. })));
        fs::write(&file, "").unwrap();
        assert!(matches!(read_text(&file), Err(CorpusError::Empty { .. })));
        fs::write(&file, b"good \xFF bad").unwrap();
        assert!(matches!(read_text(&file), Err(CorpusError::NotUtf8 { offset: 5, .. })));
    }

    #[test]
    fn the_first_part_is_for_training() {
        let corpus = Corpus::of_text("abcdefghij", TokenizerKind::Chars, 0.9).unwrap();
        assert_eq!(corpus.training.to_vec(), (0..9).collect::<Vec<u32>>());
        assert_eq!(corpus.validation.to_vec(), [9]);
    }

    #[test]
    fn bytes_are_those_of_the_validation_part() {
        let bytes = |text, kind| Corpus::of_text(text, kind, 0.5).unwrap().validation_bytes_per_token();
        assert_eq!(bytes("学abc习习", TokenizerKind::Chars), Some(7.0 / 3.0));
        assert_eq!(bytes("学abc", TokenizerKind::Bytes), Some(1.0));
        assert_eq!(bytes("", TokenizerKind::Chars), None);
    }
}
