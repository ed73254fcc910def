//! Which files are read, and as what.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use lockstep_model::dataset;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// UTF-8 text.
    Text,
    /// A JSON object a line, with a `text`.
    JsonLines,
    /// A table with a column `text`.
    Parquet,
    /// Tokens of llm.c or nanoGPT.
    Shard,
}

impl Format {
    /// What a file's name says; nothing for other names.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?;
        let formats =
            [("txt", Self::Text), ("jsonl", Self::JsonLines), ("parquet", Self::Parquet), ("bin", Self::Shard)];
        formats.into_iter().find(|(known, _)| extension.eq_ignore_ascii_case(known)).map(|(_, format)| format)
    }
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InputFile {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    /// Its length.
    pub(crate) bytes: u64,
}

/// The files that `inputs` mean: files in the order given, those of a directory by their paths.
///
/// # Errors
/// If one cannot be read, is of no known format, or a directory holds none.
pub(crate) fn list(inputs: &[PathBuf]) -> anyhow::Result<Vec<InputFile>> {
    let mut files = Vec::new();
    for input in inputs {
        let shown = input.display();
        let metadata = fs::metadata(input).with_context(|| format!("{shown}: cannot be read"))?;
        if !metadata.is_dir() {
            let Some(format) = Format::of(input) else {
                bail!("{shown}: the name must end in .txt, .jsonl, .parquet or .bin, which says what the file holds");
            };
            files.push(InputFile { path: input.clone(), format, bytes: metadata.len() });
            continue;
        }
        if dataset::is_dataset(input) {
            bail!("{shown}: is a prepared corpus already; train on it with data.input = \"{shown}\"");
        }
        let mut found = Vec::new();
        collect(input, &mut found)?;
        if found.is_empty() {
            bail!("{shown}: the directory holds no .txt, .jsonl, .parquet or .bin file");
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        files.extend(found);
    }
    Ok(files)
}

/// Adds the files of a known format below a directory.
fn collect(directory: &Path, found: &mut Vec<InputFile>) -> anyhow::Result<()> {
    let unreadable = || format!("{}: cannot be read", directory.display());
    for entry in fs::read_dir(directory).with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        let metadata = fs::metadata(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        if metadata.is_dir() {
            collect(&path, found)?;
        } else if let Some(format) = Format::of(&path) {
            found.push(InputFile { path, format, bytes: metadata.len() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_read_in_the_order_of_paths() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("b")).unwrap();
        for name in ["c.TXT", "a.jsonl", "b/x.parquet", "d.md"] {
            fs::write(dir.path().join(name), "four").unwrap();
        }
        let files = list(&[dir.path().join("c.TXT"), dir.path().into()]).unwrap();
        let shown =
            files.iter().map(|file| (file.path.file_name().unwrap().to_str().unwrap(), file.format, file.bytes));
        let expected = [
            ("c.TXT", Format::Text, 4),
            ("a.jsonl", Format::JsonLines, 4),
            ("x.parquet", Format::Parquet, 4),
            ("c.TXT", Format::Text, 4),
        ];
        assert_eq!(shown.collect::<Vec<_>>(), expected);
        let refused = |name: &str| format!("{:#}", list(&[dir.path().join(name)]).unwrap_err());
        assert!(refused("d.md").contains(".jsonl"));
        assert!(refused("missing.txt").contains("missing.txt"));
        fs::remove_file(dir.path().join("b/x.parquet")).unwrap();
        assert!(refused("b").contains("holds no"));
    }
}
