//! The file of judgements: a JSON object a line, appended and flushed to the disk one by one.
//!
//! ```text
//! {"id", "prompt": [{"role", "content"}, …], "chosen", "rejected", "choice": "first" | "second",
//!  "rater", "seeds": [n, n], "finish": ["stop" | "length", …], "temperature", "top_p", "params_sha256", "unix_ms"}
//! the same with "choice": "tie" | "both_bad" and "answers": [text, text] instead of chosen and rejected
//! {"undo": ID, "rater", "unix_ms"}
//! ```
//!
//! The choice says which answer was shown first, and so do the lists: theirs is the order shown. No two judgements have the
//! same id: a pair that is judged again after its judgement was taken back has another.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use lockstep_model::chat_template::Message;
use serde::{Deserialize, Serialize};

use super::pair::{Answer, Pair, Task};
use crate::web::scheduler::FinishReason;

/// What a line must be.
const EXPECTED: &str = "a judgement or an undo, as `lockstep rate` writes them";
/// What stands between the key of a pair and the number of a judgement of it.
const AGAIN: char = '-';

/// What a rater says of two answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Choice {
    /// The one shown first is better.
    First,
    /// The one shown second is.
    Second,
    /// Neither is.
    Tie,
    /// Neither is good.
    BothBad,
}

/// Names a judgement: which pair, and for the how many-th time it is judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Id {
    pub(crate) key: String,
    /// From 1.
    pub(crate) attempt: u32,
}

/// A line.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Line {
    Judgement(Box<Judgement>),
    Undo(Undo),
}

/// A pair judged.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Judgement {
    pub(crate) id: Id,
    pub(crate) pair: Pair,
    pub(crate) choice: Choice,
    pub(crate) rater: String,
    /// When, in milliseconds since 1970.
    pub(crate) unix_ms: u64,
}

/// A judgement taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Undo {
    /// Which one.
    pub(crate) undo: Id,
    pub(crate) rater: String,
    /// When, in milliseconds since 1970.
    pub(crate) unix_ms: u64,
}

/// A judgement as it is written.
#[derive(Serialize, Deserialize)]
struct Written {
    id: Id,
    prompt: Vec<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chosen: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rejected: Option<String>,
    choice: Choice,
    #[serde(skip_serializing_if = "Option::is_none")]
    answers: Option<[String; 2]>,
    rater: String,
    seeds: [u64; 2],
    finish: [FinishReason; 2],
    temperature: f64,
    top_p: f64,
    params_sha256: String,
    unix_ms: u64,
}

impl std::fmt::Display for Id {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.attempt {
            1 => formatter.write_str(&self.key),
            attempt => write!(formatter, "{}{AGAIN}{attempt}", self.key),
        }
    }
}

impl std::str::FromStr for Id {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (key, attempt) = match text.split_once(AGAIN) {
            None => (text, Some(1)),
            Some((key, attempt)) => (key, attempt.parse().ok().filter(|attempt| *attempt > 1)),
        };
        let is_key = key.len() == 16 && key.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let id = attempt.filter(|_| is_key).map(|attempt| Self { key: key.into(), attempt });
        id.filter(|id| id.to_string() == text).ok_or("an id is 16 hexadecimal digits, and may end in -2, -3 and so on")
    }
}

impl Serialize for Id {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Line {
    /// Whose it is.
    pub(crate) fn rater(&self) -> &str {
        match self {
            Self::Judgement(judgement) => &judgement.rater,
            Self::Undo(undo) => &undo.rater,
        }
    }

    /// As it stands in the file, with what ends it.
    fn to_text(&self) -> String {
        let text = match self {
            Self::Judgement(judgement) => serde_json::to_string(&Written::of(judgement)),
            Self::Undo(undo) => serde_json::to_string(undo),
        };
        text.expect("texts and numbers can be written") + "\n"
    }

    fn parse(text: &[u8]) -> serde_json::Result<Self> {
        let value: serde_json::Value = serde_json::from_slice(text)?;
        match value.get("undo") {
            Some(_) => serde_json::from_value(value).map(Self::Undo),
            None => serde_json::from_value::<Written>(value)?.read().map(|judgement| Self::Judgement(judgement.into())),
        }
    }
}

impl Written {
    fn of(judgement: &Judgement) -> Self {
        let Judgement { id, pair, choice, rater, unix_ms } = judgement.clone();
        let [first, second] = pair.answers;
        let (seeds, finish) = ([first.seed, second.seed], [first.finish, second.finish]);
        let (chosen, rejected, answers) = match choice {
            Choice::First => (Some(first.text), Some(second.text), None),
            Choice::Second => (Some(second.text), Some(first.text), None),
            Choice::Tie | Choice::BothBad => (None, None, Some([first.text, second.text])),
        };
        let (temperature, top_p, params_sha256) = (pair.temperature, pair.top_p, pair.params_sha256);
        let prompt = pair.task.prompt;
        Self {
            id,
            prompt,
            chosen,
            rejected,
            choice,
            answers,
            rater,
            seeds,
            finish,
            temperature,
            top_p,
            params_sha256,
            unix_ms,
        }
    }

    fn read(self) -> serde_json::Result<Judgement> {
        let texts = match (self.choice, self.chosen, self.rejected, self.answers) {
            (Choice::First, Some(chosen), Some(rejected), None) => [chosen, rejected],
            (Choice::Second, Some(chosen), Some(rejected), None) => [rejected, chosen],
            (Choice::Tie | Choice::BothBad, None, None, Some(answers)) => answers,
            _ => {
                let wanted =
                    "chosen and rejected go with the choices first and second, and answers with tie and both_bad";
                return Err(serde::de::Error::custom(wanted));
            }
        };
        let [first, second] = texts;
        let answer = |text, place: usize| Answer { text, seed: self.seeds[place], finish: self.finish[place] };
        let pair = Pair {
            task: Task { key: self.id.key.clone(), prompt: self.prompt },
            answers: [answer(first, 0), answer(second, 1)],
            temperature: self.temperature,
            top_p: self.top_p,
            params_sha256: self.params_sha256,
        };
        Ok(Judgement { id: self.id, pair, choice: self.choice, rater: self.rater, unix_ms: self.unix_ms })
    }
}

/// The file, which this process alone writes.
#[derive(Debug)]
pub(crate) struct PreferenceFile {
    path: PathBuf,
    file: File,
    /// Its length in bytes, as this process left it.
    end: u64,
}

/// What was found in a file.
#[derive(Debug, PartialEq)]
pub(crate) struct Found {
    pub(crate) lines: Vec<Line>,
    /// Bytes of a last line that a crash had cut, and that are gone now.
    pub(crate) cut_bytes: u64,
}

impl PreferenceFile {
    /// Opens `path`, creating it where it is new, and takes hold of it. What a crash left of a last line is removed: nobody
    /// was told that it was kept.
    ///
    /// # Errors
    /// If another process holds it, the system refuses, or a line is none of ours: that one is named.
    pub(crate) fn open(path: &Path) -> anyhow::Result<(Self, Found)> {
        let shown = path.display();
        let is_new = !path.exists();
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file =
            file.with_context(|| format!("{shown}: cannot be opened for judgements; --out names another file"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("{shown}: another process is writing judgements there; stop it, or name another file with --out")
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("{shown}: cannot be locked")),
        }
        if is_new && cfg!(unix) {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let synced = File::open(parent).and_then(|parent| parent.sync_all());
            synced.with_context(|| format!("{}: cannot be flushed to the disk", parent.display()))?;
        }
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).with_context(|| format!("{shown}: cannot be read"))?;
        let (lines, whole) = parse(&bytes).map_err(|(number, problem)| {
            anyhow::anyhow!("{shown}: line {number}: {problem}; a line must be {EXPECTED}. --out names another file")
        })?;
        let mut opened = Self { path: path.into(), file, end: bytes.len() as u64 };
        if whole < bytes.len() {
            opened.cut(whole as u64).with_context(|| format!("{shown}: cannot be cut to {whole} bytes"))?;
        } else if !bytes.is_empty() && !bytes.ends_with(b"\n") {
            opened.write("\n")?;
        }
        Ok((opened, Found { lines, cut_bytes: (bytes.len() - whole) as u64 }))
    }

    /// Appends a line. It is on the disk when this returns, or not in the file.
    ///
    /// # Errors
    /// If the system refuses, or another process has changed the file.
    pub(crate) fn append(&mut self, line: &Line) -> anyhow::Result<()> {
        self.write(&line.to_text())
    }

    fn write(&mut self, text: &str) -> anyhow::Result<()> {
        let path = self.path.clone();
        let shown = path.display();
        let found = self.file.metadata().with_context(|| format!("{shown}: cannot be looked at"))?.len();
        if found != self.end {
            bail!(
                "{shown}: another process has changed it: it has {found} bytes, and was left at {}. Nothing is written \
                 there any more; start `lockstep rate` again",
                self.end
            );
        }
        if let Err(error) = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data()) {
            // What came of the line is nobody's. Where it cannot be removed, the file is not written again, by its length.
            let _ = self.cut(found);
            return Err(error)
                .with_context(|| format!("{shown}: cannot be appended to; free space or make it writable"));
        }
        self.end += text.len() as u64;
        Ok(())
    }

    fn cut(&mut self, end: u64) -> io::Result<()> {
        self.file.set_len(end)?;
        self.file.sync_data()?;
        self.end = end;
        Ok(())
    }
}

/// The lines of a file, and where the last whole one ends; or the number of one that is none, and why.
fn parse(bytes: &[u8]) -> Result<(Vec<Line>, usize), (usize, String)> {
    let (mut lines, mut whole) = (Vec::new(), 0);
    for (number, text) in (1..).zip(bytes.split_inclusive(|byte| *byte == b'\n')) {
        match Line::parse(text) {
            Ok(line) => lines.push(line),
            Err(_) if text.trim_ascii().is_empty() && text.ends_with(b"\n") => {}
            Err(_) if !text.ends_with(b"\n") && is_cut(text) => return Ok((lines, whole)),
            Err(error) => {
                // The library counts lines within what it was given, a single one.
                let said = error.to_string();
                return Err((number, said.split(" at line ").next().unwrap_or(&said).into()));
            }
        }
        whole += text.len();
    }
    Ok((lines, whole))
}

/// Whether `text` is the beginning of an object and no more; a file that was longer than what of it reached the disk ends in
/// zeros.
fn is_cut(text: &[u8]) -> bool {
    let zeros = text.iter().rev().take_while(|byte| **byte == 0).count();
    let rest = &text[..text.len() - zeros];
    rest.is_empty() || rest.starts_with(b"{") && Line::parse(rest).err().is_none_or(|error| error.is_eof())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    pub(crate) fn pair(key: u64, prompt: &str, texts: [&str; 2]) -> Pair {
        let answer = |text: &str, seed| Answer { text: text.into(), seed, finish: FinishReason::Stop };
        Pair {
            task: Task {
                key: format!("{key:016x}"),
                prompt: vec![Message { role: "user".into(), content: prompt.into() }],
            },
            answers: [answer(texts[0], 7), answer(texts[1], 8)],
            temperature: 1.0,
            top_p: 0.9,
            params_sha256: "ab".into(),
        }
    }

    impl PreferenceFile {
        /// The same on a disk that takes nothing.
        pub(crate) fn unwritable(self) -> Self {
            Self { file: File::open(&self.path).unwrap(), ..self }
        }
    }

    pub(crate) fn judged(pair: Pair, attempt: u32, choice: Choice, rater: &str) -> Line {
        let id = Id { key: pair.task.key.clone(), attempt };
        Line::Judgement(Box::new(Judgement { id, pair, choice, rater: rater.into(), unix_ms: 5 }))
    }

    pub(crate) fn undone(key: u64, attempt: u32, rater: &str) -> Line {
        Line::Undo(Undo { undo: Id { key: format!("{key:016x}"), attempt }, rater: rater.into(), unix_ms: 6 })
    }

    fn lines() -> Vec<Line> {
        vec![
            judged(pair(1, "学?", ["\"yes\"\n", "no"]), 1, Choice::Second, "ann"),
            undone(1, 1, "ann"),
            judged(pair(1, "学?", ["\"yes\"\n", "no"]), 2, Choice::First, "ann"),
            judged(pair(2, "b", ["一", "二"]), 1, Choice::Tie, "安"),
            judged(pair(3, "b", ["x", "y"]), 1, Choice::BothBad, "安"),
        ]
    }

    /// A file of these lines, in a directory that goes with the first value.
    fn written(lines: &[Line]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        let (mut file, found) = PreferenceFile::open(&path).unwrap();
        assert_eq!(found, Found { lines: vec![], cut_bytes: 0 });
        lines.iter().for_each(|line| file.append(line).unwrap());
        (dir, path)
    }

    #[test]
    fn lines_are_what_trainers_read() {
        let (_dir, path) = written(&lines());
        expect_test::expect![[r#"
            {"id":"0000000000000001","prompt":[{"role":"user","content":"学?"}],"chosen":"no","rejected":"\"yes\"\n","choice":"second","rater":"ann","seeds":[7,8],"finish":["stop","stop"],"temperature":1.0,"top_p":0.9,"params_sha256":"ab","unix_ms":5}
            {"undo":"0000000000000001","rater":"ann","unix_ms":6}
            {"id":"0000000000000001-2","prompt":[{"role":"user","content":"学?"}],"chosen":"\"yes\"\n","rejected":"no","choice":"first","rater":"ann","seeds":[7,8],"finish":["stop","stop"],"temperature":1.0,"top_p":0.9,"params_sha256":"ab","unix_ms":5}
            {"id":"0000000000000002","prompt":[{"role":"user","content":"b"}],"choice":"tie","answers":["一","二"],"rater":"安","seeds":[7,8],"finish":["stop","stop"],"temperature":1.0,"top_p":0.9,"params_sha256":"ab","unix_ms":5}
            {"id":"0000000000000003","prompt":[{"role":"user","content":"b"}],"choice":"both_bad","answers":["x","y"],"rater":"安","seeds":[7,8],"finish":["stop","stop"],"temperature":1.0,"top_p":0.9,"params_sha256":"ab","unix_ms":5}
        "#]]
        .assert_eq(&fs::read_to_string(&path).unwrap());
        assert_eq!(PreferenceFile::open(&path).unwrap().1, Found { lines: lines(), cut_bytes: 0 });
    }

    #[test]
    fn a_file_is_one_processs_and_nobody_elses() {
        let (_dir, path) = written(&lines()[..1]);
        let (mut file, _) = PreferenceFile::open(&path).unwrap();
        let said = PreferenceFile::open(&path).unwrap_err().to_string();
        assert!(said.contains("p.jsonl: another process is writing"), "{said}");
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"\n").unwrap();
        let said = file.append(&lines()[1]).unwrap_err().to_string();
        assert!(said.contains("another process has changed it"), "{said}");
    }

    #[test]
    fn a_line_that_is_not_on_the_disk_is_not_in_the_file() {
        let (_dir, path) = written(&lines()[..1]);
        let (file, _) = PreferenceFile::open(&path).unwrap();
        let mut file = file.unwritable();
        let said = format!("{:#}", file.append(&lines()[1]).unwrap_err());
        assert!(said.contains("p.jsonl: cannot be appended to; free space or make it writable: "), "{said}");
        // Where there is space again, the next line follows the one before.
        drop(file);
        let (mut file, found) = PreferenceFile::open(&path).unwrap();
        assert_eq!(found, Found { lines: lines()[..1].to_vec(), cut_bytes: 0 });
        file.append(&lines()[1]).unwrap();
    }

    #[test]
    fn other_files_are_refused_and_stay_as_they_are() {
        let good = lines()[0].to_text();
        for (text, number, problem) in [
            ("hello".to_string(), 1, "expected value"),
            (
                format!("{good}{{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}}\n"),
                2,
                "invalid type: string \"a\"",
            ),
            (format!("{good}\n{}", good.replace("second", "tie")), 3, "chosen and rejected go with"),
            (format!("{good}{{\"id\":\n{good}"), 2, "EOF while parsing"),
            (format!("{good}[1, 2"), 2, "EOF while parsing a list"),
            (good.replace("0000000000000001", "x"), 1, "an id is 16"),
            ("{\"undo\":5}\n".into(), 1, "expected a string"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("p.jsonl");
            fs::write(&path, &text).unwrap();
            let said = format!("{:#}", PreferenceFile::open(&path).unwrap_err());
            assert!(said.contains(&format!("p.jsonl: line {number}: ")) && said.contains(problem), "{said}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    proptest! {
        /// A crash at any byte, with or without zeros behind it, loses the line under way and no other.
        #[test]
        fn whatever_a_crash_leaves_the_lines_before_it_are_there(
            count in 1..5usize, cut in any::<Index>(), zeros in 0..9usize,
        ) {
            let lines = lines();
            let (_dir, path) = written(&lines[..count]);
            let whole = fs::read(&path).unwrap();
            let last = count - 1;
            let before = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let at = before + cut.index(whole.len() - before);
            fs::write(&path, [&whole[..at], &vec![0; zeros]].concat()).unwrap();
            let (mut file, found) = PreferenceFile::open(&path).unwrap();
            // All but what ends the line may have reached the disk.
            let kept = if at + 1 == whole.len() && zeros == 0 { count } else { last };
            prop_assert_eq!(&found.lines, &lines[..kept]);
            file.append(&lines[count]).unwrap();
            drop(file);
            let expected = [&lines[..kept], &lines[count..=count]].concat();
            prop_assert_eq!(PreferenceFile::open(&path).unwrap().1, Found { lines: expected, cut_bytes: 0 });
        }
    }
}
