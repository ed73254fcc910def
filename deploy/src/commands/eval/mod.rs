//! `lockstep eval`: what a model makes of texts, of multiple-choice questions, of problems with a number as their answer, and of
//! pairs of answers.

mod choices;
mod preferences;
mod problems;
mod texts;

use std::path::{Path, PathBuf};

use anyhow::bail;
use indicatif::HumanCount;
use lockstep_model::checkpoint::{self, Manifest};
use lockstep_model::compute::Computer;
use lockstep_model::device::ComputeDevice;
use lockstep_model::tokenizer::Tokenizer;
use serde::Serialize;

use self::choices::AnswerScore;
use self::preferences::{PairScore, Pairs};
use self::problems::{ProblemScore, Problems};
use self::texts::{TextScore, Texts};
use super::{Caller, Usage, inspect, use_threads};
use crate::cli::Eval;
use crate::data::progress::Progress;
use crate::telemetry;

/// A model that is asked.
struct Subject {
    computer: Computer,
    /// Whether it gives scores, and no logits.
    scores: bool,
    tokenizer: Tokenizer,
    /// The most tokens that it reads at once.
    context: usize,
}

impl Subject {
    /// The model of a checkpoint, and what that says of it.
    fn open(path: &Path, device: &ComputeDevice) -> anyhow::Result<(Self, Manifest)> {
        let (manifest, parameters) = checkpoint::read_parameters(path)?;
        let (Some(context), Some(tokenizer)) = (manifest.model.context(), manifest.tokenizer.clone()) else {
            bail!("{}: the run's model reads no text; choose a Transformer's run", path.display());
        };
        let mut computer = Computer::new(&manifest.model, device);
        computer.load(&parameters)?;
        Ok((Self { computer, scores: manifest.model.has_score_head(), tokenizer, context }, manifest))
    }
}

/// What was found.
#[derive(Debug, Serialize)]
struct Summary {
    checkpoint: PathBuf,
    step: u64,
    params_sha256: String,
    device: String,
    /// Tokens that the model reads at once.
    context: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    texts: Option<TextScore>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    choices: Vec<AnswerScore>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    problems: Vec<ProblemScore>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    preferences: Vec<PairScore>,
}

/// Scores a model.
pub(crate) fn run(args: &Eval) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    use_threads(args.threads, Caller::Computes)?;
    let summary = score(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print(&summary);
    }
    Ok(())
}

fn score(args: &Eval) -> anyhow::Result<Summary> {
    let checkpoint = inspect::locate(&args.run)?;
    let device = ComputeDevice::open(args.device)?;
    let (subject, manifest) = Subject::open(&checkpoint, &device)?;
    let context = subject.context;
    let stride = args.stride.unwrap_or(context);
    if !(1..=context).contains(&stride) {
        let example = context.div_ceil(2);
        let text =
            format!("--stride {stride}: must be from 1 to the model's context, {context}; for example {example}");
        return Err(Usage(text).into());
    }
    // All input is looked at before anything is computed.
    let texts = Texts::open(&args.data, &subject.tokenizer)?;
    let files = args.choices.iter().map(|path| choices::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let problems = Problems::read(&args.problems, &checkpoint, &subject)?;
    let pairs = Pairs::read(args, &subject, &device)?;
    let mut progress = Progress::new();
    let texts = (!args.data.is_empty()).then(|| texts.score(&subject, stride, &mut progress)).transpose()?;
    let choices = args
        .choices
        .iter()
        .zip(&files)
        .map(|(path, questions)| choices::score(path, questions, &subject, &mut progress));
    let choices = choices.collect::<anyhow::Result<Vec<_>>>()?;
    let answer_tokens = args.answer_tokens as usize;
    let problems = problems.score(&subject, &manifest.model, answer_tokens, &device, &mut progress)?;
    let preferences = pairs.score(&subject, &mut progress)?;
    progress.finish();
    let Manifest { step, params_sha256, .. } = manifest;
    Ok(Summary {
        checkpoint,
        step,
        params_sha256,
        device: device.description,
        context,
        texts,
        choices,
        problems,
        preferences,
    })
}

fn print(summary: &Summary) {
    println!("checkpoint       {}", summary.checkpoint.display());
    println!("device           {}", summary.device);
    if let Some(texts) = &summary.texts {
        let [documents, tokens, bytes] = [texts.documents, texts.tokens, texts.bytes].map(HumanCount);
        println!("texts            {documents} documents, {tokens} tokens scored, of {bytes} bytes");
        println!("windows          of {} tokens, each {} after the one before", summary.context, texts.stride);
        println!("loss             {:.4} nats a token", texts.loss);
        println!("perplexity       {:.4}", texts.perplexity);
        println!("bits per byte    {:.4}", texts.bits_per_byte);
    }
    for choices in &summary.choices {
        let AnswerScore { file, questions, acc, acc_stderr, acc_norm, acc_norm_stderr } = choices;
        println!("questions        {} of {}", HumanCount(*questions), file.display());
        println!("acc              {acc:.4} ± {acc_stderr:.4}");
        println!("acc_norm         {acc_norm:.4} ± {acc_norm_stderr:.4}");
    }
    for score in &summary.problems {
        let ProblemScore { file, problems, exact, exact_stderr, ended, mean_tokens } = score;
        println!("problems         {} of {}", HumanCount(*problems), file.display());
        println!("exact            {exact:.4} ± {exact_stderr:.4}");
        println!("ended            {ended:.4} by themselves, after {mean_tokens:.1} tokens on average");
    }
    for score in &summary.preferences {
        let PairScore { file, pairs, loss, accuracy, accuracy_stderr, means, by } = score;
        println!("pairs            {} of {}, compared by {by}", HumanCount(*pairs), file.display());
        println!("loss             {loss:.4}");
        println!("accuracy         {accuracy:.4} ± {accuracy_stderr:.4}");
        println!("rewards          {:.4} and {:.4}, margin {:.4}", means.chosen, means.rejected, means.margin);
    }
}
