//! Files of JSON objects, one a line: of documents, with their text under `text`, or of anything else.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::documents::{Document, Place, Position};

#[derive(Deserialize)]
struct Text {
    text: String,
}

/// The documents of a file.
pub(super) fn documents(path: &Path, file: File) -> impl Iterator<Item = anyhow::Result<Document>> + Send + use<> {
    let lines = JsonLines::<Text>::new(path, file, "an object with a string under \"text\"");
    lines.map(|line| line.map(|(Text { text }, place, bytes)| (text, place, bytes)))
}

/// Reads lines, each with its place and its length in bytes; blank ones are passed over.
pub(crate) struct JsonLines<L> {
    path: Arc<Path>,
    input: BufReader<File>,
    /// What a line must be, in words.
    expected: &'static str,
    /// Lines and bytes read so far.
    lines: u64,
    bytes: u64,
    line: PhantomData<fn() -> L>,
}

impl<L: DeserializeOwned> JsonLines<L> {
    /// Of the file at `path`, each line of which is to be what `expected` says.
    pub(crate) fn new(path: &Path, file: File, expected: &'static str) -> Self {
        let input = BufReader::with_capacity(1 << 20, file);
        Self { path: path.into(), input, expected, lines: 0, bytes: 0, line: PhantomData }
    }

    /// The next line that is not blank; `None` at the end.
    fn next_line(&mut self) -> anyhow::Result<Option<(L, Place, u64)>> {
        let (mut line, mut length) = (Vec::new(), 0);
        while line.trim_ascii().is_empty() {
            line.clear();
            let read = self.input.read_until(b'\n', &mut line);
            let shown = self.path.display();
            let read = read.with_context(|| format!("{shown}: cannot be read from byte {} on", self.bytes))?;
            if read == 0 {
                return Ok(None);
            }
            self.lines += 1;
            self.bytes += read as u64;
            length += read as u64;
        }
        let parsed = serde_json::from_slice(&line).map_err(|error| self.refuse(&error, line.len()))?;
        let place = Place { path: self.path.clone(), position: Position::Line(self.lines) };
        Ok(Some((parsed, place, length)))
    }

    /// Says what is wrong with the line just read, of `length` bytes.
    fn refuse(&self, error: &serde_json::Error, length: usize) -> anyhow::Error {
        // The library counts lines within what it was given, a single one.
        let said = error.to_string();
        let problem = said.split(" at line ").next().unwrap_or(&said);
        let byte = self.bytes - length as u64 + error.column().saturating_sub(1) as u64;
        let (path, line) = (self.path.display(), self.lines);
        anyhow::anyhow!("{path}: line {line}, byte {byte}: {problem}; a line must be {}", self.expected)
    }
}

impl<L: DeserializeOwned> Iterator for JsonLines<L> {
    type Item = anyhow::Result<(L, Place, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_line().transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(text: &[u8]) -> Vec<Result<(String, u64), String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        fs::write(&path, text).unwrap();
        let lines = documents(Path::new("a.jsonl"), File::open(&path).unwrap());
        lines.map(|line| line.map(|(text, _, bytes)| (text, bytes)).map_err(|error| error.to_string())).collect()
    }

    #[test]
    fn each_line_is_a_document() {
        let lines = read("{\"text\":\"one\\n\"}\n\n{\"id\":3,\"text\":\"学\"}".as_bytes());
        assert_eq!(lines, [Ok(("one\n".into(), 17)), Ok(("学".into(), 22))]);
    }

    #[test]
    fn a_bad_line_is_named_with_line_and_byte() {
        let error = |text: &[u8]| read(text).into_iter().find_map(Result::err).unwrap();
        expect_test::expect![[
            r#"a.jsonl: line 2, byte 28: missing field `text`; a line must be an object with a string under "text""#
        ]]
        .assert_eq(&error(b"{\"text\":\"one\"}\n{\"txet\":\"two\"}\n"));
        for (text, place) in [
            (&b"{\"text\":\"a\"}\n\n{\"text\":3}"[..], "line 3, byte 22"),
            (b"{\"text\":\"a\"", "line 1, byte 10"),
            (b"{\"text\":\"a\xFF\"}", "line 1"),
            (b"[]\n", "line 1"),
            (b"{\"text\":null}", "line 1"),
        ] {
            assert!(error(text).contains(place), "{}", error(text));
        }
    }
}
