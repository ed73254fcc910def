//! Multiple choice, scored as EleutherAI's lm-evaluation-harness does: each choice by the log-probability of its tokens after
//! those of the question.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use lockstep_model::batch::Sums;
use lockstep_model::scoring::{Scorer, Window};
use lockstep_model::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use super::Subject;
use crate::data::documents::Place;
use crate::data::jsonl::JsonLines;
use crate::data::progress::Progress;

/// What a line must be.
const EXPECTED: &str = "an object with a string under \"question\" or \"prompt\", a list of two strings or more under \"choices\", \
    and under \"answer\" the number of the right one, from 0, or its letter, from A";

#[derive(Deserialize)]
struct Line {
    #[serde(alias = "prompt")]
    question: String,
    choices: Vec<String>,
    answer: serde_json::Value,
}

/// A question, checked.
#[derive(Debug)]
pub(super) struct Question {
    text: String,
    /// Two or more, none of them empty.
    choices: Vec<String>,
    /// Which of them is right, from 0.
    answer: usize,
    place: Place,
    /// Of its line.
    bytes: u64,
}

/// How often a model took the right choice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct AnswerScore {
    pub(super) file: PathBuf,
    pub(super) questions: u64,
    /// Share of questions whose right choice has the highest log-probability.
    pub(super) acc: f64,
    /// Standard error of that share p of n: `√(p (1 - p) / n)`.
    pub(super) acc_stderr: f64,
    /// The same by log-probability for each byte of the choice.
    pub(super) acc_norm: f64,
    pub(super) acc_norm_stderr: f64,
}

/// Reads a file of questions.
///
/// # Errors
/// Names the first line that is none, and what it must be.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Question>> {
    let file = File::open(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let questions: Vec<Question> =
        JsonLines::new(path, file, EXPECTED).map(|line| check(line?)).collect::<anyhow::Result<_>>()?;
    if questions.is_empty() {
        bail!("{}: holds no question; a line must be {EXPECTED}", path.display());
    }
    Ok(questions)
}

fn check((line, place, bytes): (Line, Place, u64)) -> anyhow::Result<Question> {
    let Line { question: text, choices, answer } = line;
    let problem = if text.trim().is_empty() {
        Some("the question is empty".to_string())
    } else if choices.len() < 2 {
        Some(format!("too few choices: {}", choices.len()))
    } else {
        let empty = choices.iter().position(|choice| choice.trim().is_empty());
        empty.map(|index| format!("choice {index} is empty"))
    };
    let right = index_of(&answer).filter(|index| *index < choices.len());
    match (problem, right) {
        (None, Some(answer)) => Ok(Question { text, choices, answer, place, bytes }),
        (Some(problem), _) => bail!("{place}: {problem}; a line must be {EXPECTED}"),
        (None, None) => {
            bail!("{place}: answer {answer} is none of {} choices; a line must be {EXPECTED}", choices.len())
        }
    }
}

/// The number of a choice, from 0, that a number or a letter means.
fn index_of(answer: &serde_json::Value) -> Option<usize> {
    match answer.as_str().map(str::as_bytes) {
        Some([letter]) if letter.is_ascii_alphabetic() => Some(usize::from(letter.to_ascii_uppercase() - b'A')),
        Some(_) => None,
        None => usize::try_from(answer.as_u64()?).ok(),
    }
}

/// Lets a model answer the questions of the file `path`.
///
/// # Errors
/// If a question cannot become tokens, a choice is longer than the model's context, or the device fails.
pub(super) fn score(
    path: &Path,
    questions: &[Question],
    subject: &Subject,
    progress: &mut Progress,
) -> anyhow::Result<AnswerScore> {
    progress.begin("answering", questions.iter().map(|question| question.bytes).sum());
    let mut found: Vec<Vec<f64>> = questions.iter().map(|question| vec![f64::NAN; question.choices.len()]).collect();
    let mut scorer = Scorer::new(&subject.computer, subject.context);
    let mut take = |done: Vec<((usize, usize), Sums)>| {
        for ((question, choice), sums) in done {
            found[question][choice] = -sums.loss;
            if choice == 0 {
                progress.advance(questions[question].bytes);
            }
        }
    };
    for (index, question) in questions.iter().enumerate() {
        for (number, choice) in question.choices.iter().enumerate() {
            let window = window(&question.text, choice, &subject.tokenizer, subject.context);
            let window = window.with_context(|| format!("{}: choice {number}", question.place))?;
            take(scorer.push(window, (index, number))?);
        }
    }
    take(scorer.finish()?);

    let right = |value: fn(f64, &str) -> f64| {
        let is_right = |(question, found): &(&Question, &Vec<f64>)| {
            let values = found.iter().zip(&question.choices).map(|(&found, choice)| value(found, choice));
            highest(values) == question.answer
        };
        questions.iter().zip(&found).filter(is_right).count() as f64 / questions.len() as f64
    };
    let stderr = |share: f64| (share * (1.0 - share) / questions.len() as f64).sqrt();
    let (acc, acc_norm) = (right(|found, _| found), right(|found, choice| found / choice.len() as f64));
    Ok(AnswerScore {
        file: path.into(),
        questions: questions.len() as u64,
        acc,
        acc_stderr: stderr(acc),
        acc_norm,
        acc_norm_stderr: stderr(acc_norm),
    })
}

/// The tokens of a question and a choice, of which the choice's count. A space stands between, where neither has white space
/// there; white space counts as the choice's. What is too long loses tokens of the question, from its beginning.
fn window(question: &str, choice: &str, tokenizer: &Tokenizer, context: usize) -> anyhow::Result<Window> {
    let parted = question.ends_with(char::is_whitespace) || choice.starts_with(char::is_whitespace);
    let space = if parted { "" } else { " " };
    let tokens = tokenizer.encode(&format!("{question}{space}{choice}"))?;
    let before = tokenizer.encode(question.trim_end())?.len();
    // Tokens may reach over the place where both meet, and leave none to the choice: then its last one counts.
    let scored = tokens.len() - before.min(tokens.len().saturating_sub(1));
    if scored > context || scored == tokens.len() {
        bail!(
            "{choice:?} is {scored} tokens of {} in all, and the model reads {context}, at least one before it",
            tokens.len()
        );
    }
    let first = tokens.len().saturating_sub(context + 1);
    Ok(Window { tokens: tokens[first..].to_vec(), scored })
}

/// Where the highest value is: the first of several.
fn highest(values: impl Iterator<Item = f64>) -> usize {
    let first = (0, f64::NEG_INFINITY);
    values.enumerate().fold(first, |best, (index, value)| if value > best.1 { (index, value) } else { best }).0
}

#[cfg(test)]
mod tests {
    use std::fs;

    use lockstep_model::compute::Computer;
    use lockstep_model::config::{Gelu, GptConfig, ModelConfig};
    use lockstep_model::device::{ComputeDevice, DeviceChoice};
    use lockstep_model::layout::Layout;

    use super::*;

    fn of(text: &str) -> anyhow::Result<Vec<Question>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.jsonl");
        fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn questions_are_read_in_all_their_forms() {
        let questions = of(r#"{"question":"1 + 1 =","choices":["2","3"],"answer":0}

            {"id":7,"prompt":"b","choices":["x","y","z"],"answer":"C"}
            {"prompt":"b","choices":["x","y","z"],"answer":"b"}"#);
        let answers: Vec<usize> = questions.unwrap().iter().map(|question| question.answer).collect();
        assert_eq!(answers, [0, 2, 1]);
    }

    #[test]
    fn a_line_that_is_no_question_is_named_with_what_was_expected() {
        let good = r#"{"question":"q","choices":["a","b"],"answer":1}"#;
        for (bad, problem) in [
            ("{", "EOF while parsing an object"),
            (r#"{"choices":["a","b"],"answer":0}"#, "missing field `question`"),
            (r#"{"question":"q","prompt":"p","choices":["a","b"],"answer":0}"#, "duplicate field `question`"),
            (r#"{"question":"q","answer":0}"#, "missing field `choices`"),
            (r#"{"question":"q","choices":["a","b"]}"#, "missing field `answer`"),
            (r#"{"question":"q","choices":"ab","answer":0}"#, "invalid type: string \"ab\", expected a sequence"),
            (r#"{"question":" ","choices":["a","b"],"answer":0}"#, "the question is empty"),
            (r#"{"question":"q","choices":["a"],"answer":0}"#, "too few choices: 1"),
            (r#"{"question":"q","choices":["a",""],"answer":0}"#, "choice 1 is empty"),
            (r#"{"question":"q","choices":["a","b"],"answer":2}"#, "answer 2 is none of 2 choices"),
            (r#"{"question":"q","choices":["a","b"],"answer":"C"}"#, "answer \"C\" is none of 2 choices"),
            (r#"{"question":"q","choices":["a","b"],"answer":-1}"#, "answer -1 is none of 2 choices"),
            (r#"{"question":"q","choices":["a","b"],"answer":null}"#, "answer null is none of 2 choices"),
        ] {
            let said = format!("{:#}", of(&format!("{good}\n{bad}\n{good}")).unwrap_err());
            assert!(said.contains("q.jsonl: line 2") && said.contains(problem), "{said}");
            assert!(said.ends_with(EXPECTED), "{said}");
        }
        assert!(of("\n").unwrap_err().to_string().contains("holds no question"));
    }

    #[test]
    fn the_choice_counts_and_the_question_is_what_is_cut() {
        let window = |question, choice| window(question, choice, &Tokenizer::Bytes, 8).map(|w| (w.tokens, w.scored));
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
        assert_eq!(window("to be", "or").unwrap(), (bytes("to be or"), 3));
        assert_eq!(window("to be\n", "or").unwrap(), (bytes("to be\nor"), 3));
        assert_eq!(window("to be", "\nor").unwrap(), (bytes("to be\nor"), 3));
        assert_eq!(window("or not to be", "that").unwrap(), (bytes("o be that"), 5));
        assert_eq!(window("x", "seven b").unwrap(), (bytes("x seven b"), 8));
        let said = window("x", "eight by").unwrap_err().to_string();
        assert!(said.contains("is 9 tokens of 10 in all, and the model reads 8"), "{said}");
    }

    /// A model of equal logits finds shorter choices likelier, and all alike by the byte: then the first is taken.
    #[test]
    fn a_model_that_knows_nothing_takes_the_shortest_choice_and_the_first_of_equals() {
        let model = ModelConfig::Gpt(GptConfig {
            vocab_size: 256,
            context: 16,
            layers: 1,
            heads: 1,
            width: 8,
            bias: false,
            tied_head: true,
            score_head: false,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        });
        let mut computer = Computer::new(&model, &ComputeDevice::open(DeviceChoice::Cpu).unwrap());
        computer.load(&vec![0.0; Layout::of(&model).len()]).unwrap();
        let subject = Subject { computer, scores: false, tokenizer: Tokenizer::Bytes, context: 16 };
        let question = |choices: &[&str], answer| {
            serde_json::json!({ "question": "q", "choices": choices, "answer": answer }).to_string()
        };
        let accuracy = |lines: &[String]| {
            let questions = of(&lines.join("\n")).unwrap();
            let score = score(Path::new("q.jsonl"), &questions, &subject, &mut Progress::new()).unwrap();
            let AnswerScore { acc, acc_stderr, acc_norm, acc_norm_stderr, questions: count, .. } = score;
            for (share, stderr) in [(acc, acc_stderr), (acc_norm, acc_norm_stderr)] {
                assert_eq!(stderr, (share * (1.0 - share) / count as f64).sqrt());
            }
            [acc, acc_norm]
        };
        // Equal in length: the first of equals, by either measure.
        assert_eq!(accuracy(&[question(&["aa", "bb", "cc"], 0)]), [1.0, 1.0]);
        assert_eq!(accuracy(&[question(&["aa", "bb", "cc"], 1)]), [0.0, 0.0]);
        // n bytes and a space cost n + 1 times ln 256: least for the shortest, and least for each byte of the longest.
        assert_eq!(accuracy(&[question(&["aaa", "b", "cccc"], 1)]), [1.0, 0.0]);
        assert_eq!(accuracy(&[question(&["aaa", "b", "cccc"], 2)]), [0.0, 1.0]);
        // What begins with its own white space costs its own bytes alone: all equal, for each byte.
        let lines = [question(&["\naaa", "\nb"], 0), question(&["\naaa", "\nb"], 1), question(&["aa", "bb"], 1)];
        assert_eq!(accuracy(&lines), [1.0 / 3.0, 1.0 / 3.0]);
    }
}
