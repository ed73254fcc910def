//! `lockstep prepare`: texts become token shards.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::bail;
use lockstep_model::bpe::MIN_VOCAB_SIZE;
use lockstep_model::dataset::{self, DatasetWriter, SHARD_TOKENS};
use lockstep_model::tokenizer::Tokenizer;

use super::Usage;
use crate::cli::Prepare;
use crate::data::documents;
use crate::data::inputs::{self, Format, InputFile};
use crate::data::progress::Progress;
use crate::data::tokenize;
use crate::telemetry;

/// Tokens learned where the command line does not say how many.
const DEFAULT_VOCAB_SIZE: usize = 4096;

/// Where the tokenizer comes from.
enum Choice {
    Bytes,
    Chars,
    Bpe { vocab_size: usize },
    File(PathBuf),
}

/// Prepares a corpus.
pub(crate) fn run(args: &Prepare) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let choice = choice(args)?;
    dataset::check_free(&args.out)?;
    let files = inputs::list(&args.inputs)?;
    let began = Instant::now();
    let mut progress = Progress::new();
    let manifest = prepare(&files, &choice, &args.out, &mut progress)?;
    progress.finish();

    let per_token = manifest.bytes as f64 / manifest.tokens as f64;
    let secs = began.elapsed().as_secs_f64();
    println!("prepared    {} in {secs:.1} seconds", args.out.display());
    println!("documents   {}", manifest.documents);
    println!("text        {} bytes", manifest.bytes);
    println!("tokens      {} ({per_token:.3} bytes each), of a vocabulary of {}", manifest.tokens, manifest.vocab_size);
    println!("shards      {}", manifest.shards.len());
    println!("\nTrain on it with:\n  --set data.input={} --set tokenizer.kind=auto", args.out.display());
    Ok(())
}

fn choice(args: &Prepare) -> Result<Choice, Usage> {
    let choice = match args.tokenizer.as_str() {
        "bytes" => Choice::Bytes,
        "chars" => Choice::Chars,
        "bpe" => Choice::Bpe { vocab_size: args.vocab_size.unwrap_or(DEFAULT_VOCAB_SIZE) },
        file if Path::new(file).is_file() => Choice::File(file.into()),
        other => {
            return Err(Usage(format!(
                "--tokenizer {other}: is neither bytes, chars or bpe nor a file; for example bpe"
            )));
        }
    };
    match (&choice, args.vocab_size) {
        (Choice::Bpe { vocab_size }, _) if *vocab_size < MIN_VOCAB_SIZE => Err(Usage(format!(
            "--vocab-size {vocab_size}: a vocabulary holds all 256 bytes and the end of text, so at least {MIN_VOCAB_SIZE}; \
             for example {DEFAULT_VOCAB_SIZE}"
        ))),
        (Choice::Bpe { .. }, _) | (_, None) => Ok(choice),
        (_, Some(_)) => Err(Usage("--vocab-size: only --tokenizer bpe learns a vocabulary; leave it out".into())),
    }
}

fn prepare(
    files: &[InputFile],
    choice: &Choice,
    out: &Path,
    progress: &mut Progress,
) -> anyhow::Result<dataset::DatasetManifest> {
    let total_bytes = files.iter().map(|file| file.bytes).sum();
    let tokens = files.iter().find(|file| file.format == Format::Shard);
    let tokenizer = match (choice, tokens) {
        (Choice::Chars | Choice::Bpe { .. }, Some(shard)) => bail!(
            "{}: holds tokens, not text to learn from; say which tokenizer made them, with --tokenizer FILE",
            shard.path.display()
        ),
        (Choice::Bytes, _) => Tokenizer::Bytes,
        (Choice::File(path), _) => Tokenizer::read(path)?,
        (Choice::Chars, None) => {
            progress.begin("collecting characters", total_bytes);
            tokenize::collect_characters(documents::read(files), progress)?
        }
        (Choice::Bpe { vocab_size }, None) => {
            progress.begin("counting words", total_bytes);
            Tokenizer::Bpe(tokenize::learn_bpe(documents::read(files), *vocab_size, progress)?)
        }
    };

    let mut writer = DatasetWriter::create(out, tokenizer.clone(), SHARD_TOKENS)?;
    let mut written = 0;
    let sink = |tokens: &[u32]| {
        written += tokens.len();
        Ok(writer.push(tokens)?)
    };
    let counts = if tokens.is_some() && files.iter().all(|file| file.format == Format::Shard) {
        tokenize::copy_shards(files, &tokenizer, progress, sink)?
    } else {
        progress.begin("encoding", total_bytes);
        tokenize::encode(documents::read(files), &tokenizer, progress, sink)?
    };
    if written == 0 {
        bail!("{}: there is no text in the inputs, so nothing to prepare", files[0].path.display());
    }
    Ok(writer.finish(counts.bytes, counts.documents)?)
}
