//! Conversations, or comparisons of answers, from files: a JSON object a line, or one JSON array of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lockstep_model::chat_template::Message;
use lockstep_model::comparison::{self, Judgement};
use lockstep_model::conversation::{self, Malformed};
use serde_json::Value;

use super::documents::{Place, Position};

/// Characters of a bad line that are shown.
const SHOWN: usize = 60;

/// Something as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found<T> {
    pub(crate) what: T,
    /// Where its object begins.
    pub(crate) place: Place,
}

/// What an object is read as: one thing or several.
type Parse<T> = fn(&Value) -> Result<Vec<T>, Malformed>;

/// The conversations of files, in order; of a directory those of its `.jsonl` and `.json` files, by their paths.
///
/// # Errors
/// If one cannot be read, or an object in it holds no conversation: with file, line, what was expected, and how it begins.
pub(crate) fn read(inputs: &[PathBuf]) -> anyhow::Result<Vec<Found<Vec<Message>>>> {
    read_objects(inputs, conversation::conversations)
}

/// What the objects of such files say of answers.
///
/// # Errors
/// As [`read`]'s.
pub(crate) fn read_judgements(inputs: &[PathBuf]) -> anyhow::Result<Vec<Found<Judgement>>> {
    read_objects(inputs, |object| Ok(vec![comparison::judgement(object)?]))
}

fn read_objects<T>(inputs: &[PathBuf], parse: Parse<T>) -> anyhow::Result<Vec<Found<T>>> {
    let mut found = Vec::new();
    for input in inputs {
        for path in files(input)? {
            let bytes = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
            Reader { path: path.into(), bytes: &bytes, at: 0, line: 1, parse }.read(&mut found)?;
        }
    }
    Ok(found)
}

fn files(input: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let unreadable = || format!("{}: cannot be read", input.display());
    if !fs::metadata(input).with_context(unreadable)?.is_dir() {
        return Ok(vec![input.into()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(input).with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        files.extend(path.extension().is_some_and(|it| it == "jsonl" || it == "json").then_some(path));
    }
    if files.is_empty() {
        bail!("{}: the directory holds no .jsonl or .json file", input.display());
    }
    files.sort();
    Ok(files)
}

/// Goes through a file.
struct Reader<'a, T> {
    parse: Parse<T>,
    path: Arc<Path>,
    bytes: &'a [u8],
    /// How far it is, and in which line that is.
    at: usize,
    line: u64,
}

impl<T> Reader<'_, T> {
    fn read(mut self, found: &mut Vec<Found<T>>) -> anyhow::Result<()> {
        self.skip_space();
        let is_array = self.peek() == Some(b'[');
        if is_array {
            self.advance(1);
        }
        loop {
            self.skip_space();
            match self.peek() {
                None if is_array => return Err(self.refuse(self.at, "the array ends nowhere; expected ]")),
                None => return Ok(()),
                Some(b']') if is_array => return Ok(()),
                Some(_) => self.object(is_array, found)?,
            }
            self.skip_space();
            match self.peek() {
                Some(b',') if is_array => self.advance(1),
                Some(byte) if is_array && byte != b']' => {
                    return Err(self.refuse(self.at, "expected , or ] after an object of the array"));
                }
                _ => {}
            }
        }
    }

    /// The object that begins here: of an array as long as it is, else a line.
    fn object(&mut self, is_array: bool, found: &mut Vec<Found<T>>) -> anyhow::Result<()> {
        let (start, line) = (self.at, self.line);
        let rest = &self.bytes[start..];
        let length = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        let (value, length) = if is_array {
            let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<Value>();
            (values.next().unwrap_or(Ok(Value::Null)), values.byte_offset())
        } else {
            (serde_json::from_slice(&rest[..length]), length)
        };
        let value: Value = value.map_err(|error| {
            // The library counts lines within what it was given.
            let said = error.to_string();
            let problem = said.split(" at line ").next().unwrap_or(&said);
            let column = if error.line() == 1 { format!(" at byte {} of it", error.column()) } else { String::new() };
            self.refuse(start, &format!("is no JSON: {problem}{column}; expected an object"))
        })?;
        let things = (self.parse)(&value).map_err(|error| self.refuse(start, &error.to_string()))?;
        let place = Place { path: self.path.clone(), position: Position::Line(line) };
        found.extend(things.into_iter().map(|what| Found { what, place: place.clone() }));
        self.advance(length);
        Ok(())
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        let space = self.bytes[self.at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.advance(space);
    }

    fn advance(&mut self, by: usize) {
        self.line += self.bytes[self.at..self.at + by].iter().filter(|byte| **byte == b'\n').count() as u64;
        self.at += by;
    }

    /// Says what is wrong with what begins at `start`, in the present line.
    fn refuse(&self, start: usize, problem: &str) -> anyhow::Error {
        let rest = &self.bytes[start..];
        let line = rest.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let text = String::from_utf8_lossy(&line[..line.len().min(4 * SHOWN)]);
        let beginning: String = text.trim_end().chars().take(SHOWN).collect();
        let more = if text.trim_end().chars().count() > SHOWN { "…" } else { "" };
        let begins = if beginning.is_empty() { String::new() } else { format!("; it begins: {beginning}{more}") };
        anyhow::anyhow!("{}: line {}: {problem}{begins}", self.path.display(), self.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(name: &str, text: &[u8]) -> Result<Vec<(String, String)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        let inside = |said: String| said.replace(&format!("{}/", dir.path().display()), "");
        let found = read(&[path]).map_err(|error| inside(format!("{error:#}")))?;
        let shown = |found: Found<Vec<Message>>| {
            let said: Vec<String> = found.what.into_iter().map(|message| message.content).collect();
            (inside(found.place.to_string()), said.join("|"))
        };
        Ok(found.into_iter().map(shown).collect())
    }

    #[test]
    fn lines_and_arrays_are_read_with_their_places() {
        let lines = "\n{\"question\":\"q\",\"answer\":\"学\"}\r\n\n{\"instruction\":\"i\",\"instances\":[{\"output\":\"a\"},{\"output\":\"b\"}]}";
        let expected = [("a.jsonl: line 2", "q|学"), ("a.jsonl: line 4", "i|a"), ("a.jsonl: line 4", "i|b")];
        let read = read_text("a.jsonl", lines.as_bytes()).unwrap();
        assert_eq!(read.iter().map(|(place, said)| (&**place, &**said)).collect::<Vec<_>>(), expected);
        let array =
            b"[\n  {\n \"question\": \"q\",\n \"answer\": \"a\"\n },\n  {\"prompt\":\"p\",\"completion\":\"c\"}\n]\n";
        let read = read_text("a.json", array).unwrap();
        let expected = [("a.json: line 2", "q|a"), ("a.json: line 6", "p|c")];
        assert_eq!(read.iter().map(|(place, said)| (&**place, &**said)).collect::<Vec<_>>(), expected);
        assert_eq!(read_text("empty.json", b" \n").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place_and_its_beginning() {
        let good = "{\"question\":\"q\",\"answer\":\"a\"}";
        let long = format!("{{\"text\":\"{}\"}}", "学".repeat(100));
        let files = [
            ("a.jsonl", format!("{good}\n\n{{\"question\":\"q\"}}\n")),
            ("a.jsonl", format!("{good}\n{{\"question\":\n{good}")),
            ("a.jsonl", format!("{good}\n{long}\n")),
            ("a.jsonl", format!("{good}\n[{good}]\n")),
            ("a.json", format!("[\n{good},\n{{\"answer\":\"a\"}}\n]")),
            ("a.json", format!("[\n{good}\n{good}]")),
            ("a.json", format!("[\n{good},\n")),
            ("a.json", format!("[{good},\n{{\"question\"}}]")),
        ];
        let said: Vec<String> =
            files.iter().map(|(name, text)| read_text(name, text.as_bytes()).unwrap_err()).collect();
        expect_test::expect![[r#"
            a.jsonl: line 3: there is no answer; expected the texts question and answer; it begins: {"question":"q"}
            a.jsonl: line 2: is no JSON: EOF while parsing a value at byte 12 of it; expected an object; it begins: {"question":
            a.jsonl: line 2: there are the keys ["text"]; expected an object with messages, conversations, instruction and output, prompt and completion, or question and answer; it begins: {"text":"学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学学…
            a.jsonl: line 2: there is a list; expected an object with messages, conversations, instruction and output, prompt and completion, or question and answer; it begins: [{"question":"q","answer":"a"}]
            a.json: line 3: there are the keys ["answer"]; expected an object with messages, conversations, instruction and output, prompt and completion, or question and answer; it begins: {"answer":"a"}
            a.json: line 3: expected , or ] after an object of the array; it begins: {"question":"q","answer":"a"}]
            a.json: line 3: the array ends nowhere; expected ]
            a.json: line 2: is no JSON: expected `:` at byte 12 of it; expected an object; it begins: {"question"}]"#]].assert_eq(&said.join("\n"));
        let said = read_text("a.jsonl", b"{\"question\":\"\xFF\"}").unwrap_err();
        assert!(said.starts_with("a.jsonl: line 1: is no JSON"), "{said}");
    }

    #[test]
    fn a_directory_is_read_in_the_order_of_paths() {
        let dir = tempfile::tempdir().unwrap();
        for (name, answer) in [("b.json", "2"), ("a.jsonl", "1"), ("c.md", "no")] {
            fs::write(dir.path().join(name), format!("{{\"question\":\"q\",\"answer\":\"{answer}\"}}")).unwrap();
        }
        let found = read(&[dir.path().into()]).unwrap();
        assert_eq!(found.iter().map(|found| &*found.what[1].content).collect::<Vec<_>>(), ["1", "2"]);
        fs::remove_file(dir.path().join("a.jsonl")).unwrap();
        fs::remove_file(dir.path().join("b.json")).unwrap();
        assert!(read(&[dir.path().into()]).unwrap_err().to_string().contains("holds no .jsonl"));
        assert!(read(&[dir.path().join("none")]).unwrap_err().to_string().contains("none: cannot be read"));
    }
}
