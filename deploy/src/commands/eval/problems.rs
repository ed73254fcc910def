//! How often a model's answer ends in the right number, and whether it ends by itself.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::slice;

use anyhow::{Context as _, bail};
use lockstep_model::chat_template::Message;
use lockstep_model::config::ModelConfig;
use lockstep_model::device::ComputeDevice;
use lockstep_model::inference::{Engine, Finish, Limits, Overflow, Request, Sampling, SequenceId, TextStream};
use lockstep_model::tokenizer::Tokenizer;
use serde::Serialize;

use super::Subject;
use crate::chat::learned::DAY;
use crate::chat::template::Template;
use crate::data::conversations::{self, Found};
use crate::data::progress::Progress;

/// Answers that are computed at once.
const AT_ONCE: usize = 16;

/// What a model makes of problems.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ProblemScore {
    pub(super) file: PathBuf,
    pub(super) problems: u64,
    /// Share whose answer has the reference's last number as its own.
    pub(super) exact: f64,
    pub(super) exact_stderr: f64,
    /// Share whose answer ends by itself, and is not cut.
    pub(super) ended: f64,
    /// Tokens of an answer, on average.
    pub(super) mean_tokens: f64,
}

/// A problem, ready to be put.
struct Problem {
    prompt: Vec<u32>,
    /// The number that the answer is to end in.
    number: String,
    bytes: u64,
}

/// An answer under way.
struct Answering {
    problem: usize,
    stream: TextStream,
    text: String,
    tokens: u64,
}

/// Problems to be put, in the order of the command line.
pub(super) struct Problems {
    files: Vec<(PathBuf, Vec<Problem>)>,
    template: Template,
}

impl Problems {
    /// Reads the problems of each file, for the model of the checkpoint at `path`, which is to solve them.
    ///
    /// # Errors
    /// If a file cannot be read, or has a conversation without an answer that holds a number; or if the model writes no text.
    pub(super) fn read(files: &[PathBuf], path: &Path, subject: &Subject) -> anyhow::Result<Self> {
        if !files.is_empty() && subject.scores {
            bail!("{}: the run's model scores answers, and writes none", path.display());
        }
        let template = Template::of(&subject.tokenizer)?;
        let files = files.iter().map(|file| Ok((file.clone(), read(file, &template)?)));
        Ok(Self { files: files.collect::<anyhow::Result<_>>()?, template })
    }

    /// Has them solved in answers of at most `max_tokens`, of which each token is the likeliest.
    ///
    /// # Errors
    /// If a problem is too long for the model, or the device fails.
    pub(super) fn score(
        &self,
        subject: &Subject,
        model: &ModelConfig,
        max_tokens: usize,
        device: &ComputeDevice,
        progress: &mut Progress,
    ) -> anyhow::Result<Vec<ProblemScore>> {
        if self.files.is_empty() {
            return Ok(Vec::new());
        }
        let limits = Limits { sequences: AT_ONCE, ..Limits::default() };
        let mut engine = Engine::new(model, &subject.computer.parameters()?, device, limits)?;
        let of_file = |(file, problems): &(PathBuf, Vec<Problem>)| {
            progress.begin("solving", problems.iter().map(|problem| problem.bytes).sum());
            of_problems(file, problems, max_tokens, &subject.tokenizer, &self.template, &mut engine, progress)
        };
        self.files.iter().map(of_file).collect()
    }
}

fn read(file: &PathBuf, template: &Template) -> anyhow::Result<Vec<Problem>> {
    let problem = |Found { what: messages, place }: Found<Vec<Message>>| {
        let Some((answer, before)) = messages.split_last().filter(|(last, _)| last.role == "assistant") else {
            bail!("{place}: the conversation does not end with an answer to compare with");
        };
        let number = last_number(&answer.content)
            .with_context(|| format!("{place}: the answer has no number to compare with"))?;
        let prompt = template.prompt(before, DAY).with_context(|| place.to_string())?;
        let bytes = messages.iter().map(|message| message.content.len() as u64).sum();
        Ok(Problem { prompt, number, bytes })
    };
    conversations::read(slice::from_ref(file))?.into_iter().map(problem).collect()
}

fn of_problems(
    file: &Path,
    problems: &[Problem],
    max_tokens: usize,
    tokenizer: &Tokenizer,
    template: &Template,
    engine: &mut Engine,
    progress: &mut Progress,
) -> anyhow::Result<ProblemScore> {
    let mut waiting: VecDeque<usize> = (0..problems.len()).collect();
    let mut running = BTreeMap::<SequenceId, Answering>::new();
    let (mut exact, mut ended, mut tokens) = (0u64, 0u64, 0u64);
    loop {
        while engine.running() < AT_ONCE {
            let Some(problem) = waiting.pop_front() else { break };
            let request = Request {
                prompt: problems[problem].prompt.clone(),
                max_tokens,
                sampling: Sampling::greedy(),
                ends: template.ends().to_vec(),
                overflow: Overflow::Stop,
            };
            let id = engine.admit(request).with_context(|| format!("{}: problem {}", file.display(), problem + 1))?;
            let stream = TextStream::new(tokenizer, template.stops().to_vec());
            running.insert(id, Answering { problem, stream, text: String::new(), tokens: 0 });
        }
        if running.is_empty() {
            break;
        }
        for event in engine.step()? {
            let Some(answering) = running.get_mut(&event.sequence) else { continue };
            if let Some(token) = event.token {
                answering.tokens += 1;
                let text = answering.stream.push(token);
                answering.text.push_str(&text);
            }
            let stopped = answering.stream.stopped();
            if !stopped && event.finish.is_none() {
                continue;
            }
            engine.cancel(event.sequence);
            let Some(Answering { problem, stream, text, tokens: its_tokens }) = running.remove(&event.sequence) else {
                continue;
            };
            let Problem { number, bytes, .. } = &problems[problem];
            exact += u64::from(last_number(&(text + &stream.finish())).as_ref() == Some(number));
            ended += u64::from(stopped || event.finish != Some(Finish::Length));
            tokens += its_tokens;
            progress.advance(*bytes);
        }
    }
    let count = problems.len() as u64;
    let share = |of: u64| of as f64 / count.max(1) as f64;
    let exact = share(exact);
    Ok(ProblemScore {
        file: file.into(),
        problems: count,
        exact,
        exact_stderr: (exact * (1.0 - exact) / count.max(1) as f64).sqrt(),
        ended: share(ended),
        mean_tokens: share(tokens),
    })
}

/// The last number of a text: digits, perhaps with commas between thousands, after a sign and before decimals; without commas, a
/// sign of + and decimals of 0.
fn last_number(text: &str) -> Option<String> {
    let is_part = |c: char| c.is_ascii_digit() || c == ',' || c == '.';
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let before = text[..end].trim_end_matches(is_part);
    let digits: String = text[before.len()..end].chars().filter(|c| *c != ',').collect();
    let digits = digits.trim_start_matches('.');
    // A hyphen after a word or a number parts them.
    let negative = before.strip_suffix('-').is_some_and(|rest| !rest.ends_with(char::is_alphanumeric));
    let (whole, decimals) = digits.split_once('.').unwrap_or((digits, ""));
    let decimals = decimals.trim_end_matches('0');
    let sign = if negative { "-" } else { "" };
    let whole = match whole.trim_start_matches('0') {
        "" => "0",
        whole => whole,
    };
    Some(if decimals.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{decimals}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_by_what_they_are() {
        for (text, number) in [
            ("The answer is 72.", Some("72")),
            ("48/2 = <<48/2=24>>24 clips\n#### 1,072", Some("1072")),
            ("it costs $10.50 a day", Some("10.5")),
            ("so 007.00.", Some("7")),
            ("from 3 to -4", Some("-4")),
            ("12-5", Some("5")),
            ("一共有 35 个", Some("35")),
            ("0.25", Some("0.25")),
            ("none", None),
            ("7", Some("7")),
        ] {
            assert_eq!(last_number(text).as_deref(), number, "{text}");
        }
    }
}
