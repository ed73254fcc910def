//! Files of JSON lines, each of which seals those before it: a changed, removed or inserted line is found.
//!
//! A line ends with `"seal"`: the first 16 hexadecimal digits of SHA-256(seal of the line before, as text, and the line
//! without its own seal). Before the first line the seal is empty. The last seal stands for all lines, and checkpoints
//! hold it.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use lockstep_model::digest::{bytes_sha256, hex};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::run_dir::replace;

/// What stands between a line's content and its seal.
const BEFORE_SEAL: &str = ",\"seal\":\"";
const AFTER_SEAL: &str = "\"}";
/// Bytes of a digest that a seal shows.
const SEAL_BYTES: usize = 8;

/// A file of sealed lines, open for appending.
#[derive(Debug)]
pub(crate) struct Journal<L> {
    path: PathBuf,
    file: File,
    seal: String,
    lines: PhantomData<fn(L)>,
}

/// One line as it was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry<L> {
    /// What it says, or why it says nothing.
    pub line: Result<L, String>,
    /// Its seal; empty where it has none.
    pub seal: String,
    /// Whether the seal is right, given that of the line before.
    pub follows: bool,
    text: String,
}

impl<L: Serialize + DeserializeOwned> Journal<L> {
    /// Opens `path`, creating it where it is new. Keeps the lines up to the first that is not `wanted`, as they are, and
    /// drops the others. Also returns what it kept.
    ///
    /// # Errors
    /// If the file cannot be read or rewritten, or a line to keep is malformed.
    pub(crate) fn open(path: &Path, wanted: impl Fn(&L) -> bool) -> anyhow::Result<(Self, Vec<L>)> {
        let (mut text, mut seal, mut kept) = (String::new(), String::new(), Vec::new());
        for (number, entry) in (1..).zip(read(path)?) {
            match entry.line {
                Ok(line) if wanted(&line) => kept.push(line),
                Ok(_) => break,
                Err(problem) => bail!("{}: line {number}: {problem}", path.display()),
            }
            text.push_str(&entry.text);
            text.push('\n');
            seal = entry.seal;
        }
        replace(path, &text)?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.with_context(|| format!("{}: cannot open for appending", path.display()))?;
        Ok((Self { path: path.into(), file, seal, lines: PhantomData }, kept))
    }

    /// Drops the lines from the first that is not `wanted` on; returns the others.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn truncate(&mut self, wanted: impl Fn(&L) -> bool) -> anyhow::Result<Vec<L>> {
        let (journal, kept) = Self::open(&self.path, wanted)?;
        *self = journal;
        Ok(kept)
    }

    /// Appends a line, an object of at least one field.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn append(&mut self, line: &L) -> anyhow::Result<()> {
        let mut text = serde_json::to_string(line)?;
        let seal = seal_after(&self.seal, &text);
        text.truncate(text.len() - 1);
        text.extend([BEFORE_SEAL, &seal, AFTER_SEAL, "\n"]);
        // One write a line, so that a reader never sees half of one from a live run.
        let written = self.file.write_all(text.as_bytes());
        written.with_context(|| {
            format!(
                "{}: cannot append. Free space or make it writable, then continue with --resume",
                self.path.display()
            )
        })?;
        self.seal = seal;
        Ok(())
    }

    /// The last line's seal; empty where there is no line.
    pub(crate) fn seal(&self) -> &str {
        &self.seal
    }

    /// A handle by which what was appended so far can be flushed to the disk.
    ///
    /// # Errors
    /// If the system has no more handles.
    pub(crate) fn handle(&self) -> anyhow::Result<File> {
        self.file.try_clone().with_context(|| format!("{}: cannot be opened once more", self.path.display()))
    }
}

/// The seal of a line whose content is `text`, after one whose seal is `before`.
fn seal_after(before: &str, text: &str) -> String {
    hex(&bytes_sha256([before, text].concat().as_bytes())[..SEAL_BYTES])
}

/// The lines of a file as they are; none where there is no file. A last line that was cut by a crash is left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read<L: DeserializeOwned>(path: &Path) -> anyhow::Result<Vec<Entry<L>>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes.with_context(|| format!("{}: cannot read", path.display()))?,
    };
    let text = String::from_utf8_lossy(&bytes);
    let (mut entries, mut before) = (Vec::new(), String::new());
    for text in text.lines() {
        let (content, seal) = parts(text);
        let follows = seal == seal_after(&before, &content);
        let line = serde_json::from_str(text).map_err(|error| error.to_string());
        before = seal.into();
        entries.push(Entry { line, seal: seal.into(), follows, text: text.into() });
    }
    if !text.ends_with('\n') && entries.last().is_some_and(|last| last.line.is_err()) {
        entries.pop();
    }
    Ok(entries)
}

/// The content of a line without its seal, and the seal; empty where there is none.
fn parts(text: &str) -> (String, &str) {
    let sealed = text.strip_suffix(AFTER_SEAL).and_then(|text| text.rsplit_once(BEFORE_SEAL));
    sealed.map_or_else(|| (text.into(), ""), |(content, seal)| (format!("{content}}}"), seal))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn journal(path: &Path, lines: u64) -> Journal<Value> {
        let (mut journal, _) = Journal::open(path, |_| true).unwrap();
        (1..=lines).for_each(|step| journal.append(&json!({ "step": step, "by": ["a", "b"] })).unwrap());
        journal
    }

    /// The numbers of the lines that do not follow from the one before.
    fn broken(path: &Path) -> Vec<usize> {
        let entries = read::<Value>(path).unwrap();
        (1..)
            .zip(entries)
            .filter(|(_, entry)| !entry.follows || entry.line.is_err())
            .map(|(number, _)| number)
            .collect()
    }

    #[test]
    fn a_line_seals_those_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let seal = journal(&path, 5).seal().to_string();
        let text = fs::read_to_string(&path).unwrap();
        let first = text.lines().next().unwrap();
        assert_eq!(
            first,
            format!(
                r#"{{"by":["a","b"],"step":1,"seal":"{}"}}"#,
                &hex(&bytes_sha256(br#"{"by":["a","b"],"step":1}"#))[..16]
            )
        );
        assert!(text.ends_with(&format!("\"seal\":\"{seal}\"}}\n")));
        assert_eq!(broken(&path), [0; 0]);

        let lines: Vec<&str> = text.lines().collect();
        let write = |lines: &[&str]| fs::write(&path, lines.join("\n") + "\n").unwrap();
        let changed = lines[2].replace("\"step\":3", "\"step\":4");
        write(&[lines[0], lines[1], &changed, lines[3], lines[4]]);
        assert_eq!(broken(&path), [3], "changed");
        write(&[lines[0], lines[1], lines[3], lines[4]]);
        assert_eq!(broken(&path), [3], "removed");
        write(&[lines[0], lines[1], lines[1], lines[2], lines[3]]);
        assert_eq!(broken(&path), [3], "repeated: the next follows from the second of the two");
        write(&[lines[0], lines[1], "nonsense", lines[2]]);
        assert_eq!(broken(&path), [3, 4], "inserted");
        write(&[lines[0], "{\"step\":2}", lines[1]]);
        assert_eq!(broken(&path), [2, 3], "without a seal");
    }

    #[test]
    fn every_bit_is_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        drop(journal(&path, 2));
        let whole = fs::read(&path).unwrap();
        let seals = |path| read::<Value>(path).unwrap().into_iter().map(|entry| entry.seal).collect::<Vec<_>>();
        let before = seals(&path);
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1 << (at % 8);
            fs::write(&path, &changed).unwrap();
            // Only the end of the last line can change unseen, as it seals nothing: its seal is what checkpoints hold.
            assert!(!broken(&path).is_empty() || seals(&path) != before || at == whole.len() - 1, "byte {at}");
        }
    }

    #[test]
    fn going_back_keeps_lines_as_they_are_and_the_chain_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
        let mut back = journal(&path, 5);
        let up_to = |step: u64| move |line: &Value| line["step"].as_u64() <= Some(step);
        assert_eq!(back.truncate(up_to(3)).unwrap().len(), 3);
        back.append(&json!({ "step": 4, "by": ["a", "b"] })).unwrap();
        drop(journal(&other, 4));
        assert_eq!(fs::read(&path).unwrap(), fs::read(&other).unwrap());

        // A crash in the middle of a line.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":5,\"b").unwrap();
        let (mut resumed, kept) = Journal::<Value>::open(&path, |_| true).unwrap();
        assert_eq!(kept.len(), 4);
        resumed.append(&json!({ "step": 5, "by": ["a", "b"] })).unwrap();
        drop(journal(&other, 0));
        assert_eq!(broken(&path), [0; 0]);
        assert_eq!(read::<Value>(&path).unwrap().len(), 5);
    }

    #[test]
    fn a_malformed_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        fs::write(&path, "nonsense\n{\"step\":1}\n").unwrap();
        let said = Journal::<Value>::open(&path, |_| true).unwrap_err().to_string();
        assert!(said.contains("a.jsonl: line 1: "), "{said}");
    }
}
