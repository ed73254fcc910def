//! Loss, perplexity and bits per byte of texts, each document by itself.

use std::path::PathBuf;
use std::slice;

use anyhow::{Context as _, bail};
use lockstep_model::batch::Sums;
use lockstep_model::dataset::{self, Dataset};
use lockstep_model::scoring::{Scorer, windows};
use lockstep_model::tokenizer::Tokenizer;
use serde::Serialize;

use super::Subject;
use crate::commands::initial::same_tokens;
use crate::data::documents::{self, Piece};
use crate::data::inputs::{self, InputFile};
use crate::data::progress::Progress;

/// Where documents come from.
enum Source {
    Files(Vec<InputFile>),
    Prepared(Box<Dataset>),
}

/// Texts to be scored, in the order of the command line.
pub(super) struct Texts(Vec<Source>);

/// What a model makes of texts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct TextScore {
    pub(super) documents: u64,
    /// Scored: all that have another before them in their document.
    pub(super) tokens: u64,
    /// Of text that these tokens stand for.
    pub(super) bytes: u64,
    /// How far windows are apart.
    pub(super) stride: usize,
    /// Nats a token.
    pub(super) loss: f64,
    pub(super) perplexity: f64,
    pub(super) bits_per_byte: f64,
}

impl Texts {
    /// Finds all inputs. Prepared corpora are checked, and must be of `tokenizer`.
    ///
    /// # Errors
    /// If one cannot be read, is damaged, or holds other tokens than the model's.
    pub(super) fn open(inputs: &[PathBuf], tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        let open = |input: &PathBuf| {
            if !dataset::is_dataset(input) {
                return Ok(Source::Files(inputs::list(slice::from_ref(input))?));
            }
            let dataset = Dataset::open(input)?;
            if !same_tokens(&dataset.tokenizer, tokenizer) {
                bail!(
                    "{}: was prepared with another tokenizer than the model's; give the texts that it was prepared from",
                    input.display()
                );
            }
            Ok(Source::Prepared(Box::new(dataset)))
        };
        inputs.iter().map(open).collect::<anyhow::Result<_>>().map(Self)
    }

    fn bytes(&self) -> u64 {
        let bytes = |source: &Source| match source {
            Source::Files(files) => files.iter().map(|file| file.bytes).sum::<u64>(),
            Source::Prepared(dataset) => dataset.manifest.bytes,
        };
        self.0.iter().map(bytes).sum()
    }

    /// Scores all documents.
    ///
    /// # Errors
    /// If one cannot be read or become tokens, the device fails, or there is nothing to score.
    pub(super) fn score(&self, subject: &Subject, stride: usize, progress: &mut Progress) -> anyhow::Result<TextScore> {
        progress.begin("scoring", self.bytes());
        let mut tally = Tally {
            stride,
            context: subject.context,
            byte_lengths: subject.tokenizer.byte_lengths(),
            scorer: Scorer::new(&subject.computer, subject.context),
            progress,
            documents: 0,
            bytes: 0,
            sums: Sums::default(),
        };
        for source in &self.0 {
            match source {
                Source::Files(files) => of_files(files, &subject.tokenizer, &mut tally)?,
                Source::Prepared(dataset) => of_corpus(dataset, &mut tally)?,
            }
        }
        tally.finish()
    }
}

/// Adds the documents of files.
fn of_files(files: &[InputFile], tokenizer: &Tokenizer, tally: &mut Tally<'_>) -> anyhow::Result<()> {
    let mut whole: Option<Piece> = None;
    for piece in documents::read(files) {
        let piece = piece?;
        let document = match whole.take() {
            None => piece,
            Some(mut begun) => {
                begun.text.push_str(&piece.text);
                Piece { read_bytes: begun.read_bytes + piece.read_bytes, ends_document: piece.ends_document, ..begun }
            }
        };
        if !document.ends_document {
            whole = Some(document);
            continue;
        }
        let tokens = tokenizer.encode(&document.text).with_context(|| document.place.to_string())?;
        tally.add(&tokens, document.text.len() as u64, document.read_bytes)?;
    }
    Ok(())
}

/// Adds the documents of a prepared corpus: what lies between ends of text, or all of it where nothing marks ends.
fn of_corpus(dataset: &Dataset, tally: &mut Tally<'_>) -> anyhow::Result<()> {
    let end_of_text = dataset.tokenizer.end_of_text();
    let (mut document, mut added) = (Vec::new(), Ok(()));
    dataset.tokens.for_each_block(|block| {
        for &token in block {
            if Some(token) != end_of_text {
                document.push(token);
            } else if added.is_ok() {
                added = tally.add_tokens(&document);
                document.clear();
            }
        }
    });
    added?;
    tally.add_tokens(&document)
}

/// What was scored so far.
struct Tally<'a> {
    stride: usize,
    context: usize,
    /// Of each token.
    byte_lengths: Vec<u32>,
    /// Windows come with the bytes of input that they advance.
    scorer: Scorer<'a, u64>,
    progress: &'a mut Progress,
    documents: u64,
    bytes: u64,
    sums: Sums,
}

impl Tally<'_> {
    /// Adds a document of which the tokens are known alone.
    fn add_tokens(&mut self, tokens: &[u32]) -> anyhow::Result<()> {
        let bytes = tokens.iter().map(|&token| u64::from(self.byte_lengths[token as usize])).sum();
        self.add(tokens, bytes, bytes)
    }

    /// Adds a document of `bytes` of text, for which `read_bytes` of the input were read.
    fn add(&mut self, tokens: &[u32], bytes: u64, read_bytes: u64) -> anyhow::Result<()> {
        let Some((&first, others)) = tokens.split_first() else { return Ok(()) };
        self.documents += 1;
        // Nothing stands before the first token, so that its bytes are not scored.
        self.bytes += bytes.saturating_sub(u64::from(self.byte_lengths[first as usize]));
        let (mut scored, mut advanced) = (0, 0);
        for window in windows(tokens, self.context, self.stride) {
            scored += window.scored;
            let reached = (read_bytes as f64 * scored as f64 / others.len() as f64) as u64;
            let done = self.scorer.push(window, reached - advanced)?;
            advanced = reached;
            self.take(done);
        }
        Ok(())
    }

    fn take(&mut self, done: Vec<(u64, Sums)>) {
        for (read_bytes, sums) in done {
            self.sums = self.sums + sums;
            self.progress.advance(read_bytes);
        }
    }

    fn finish(mut self) -> anyhow::Result<TextScore> {
        let rest = self.scorer.finish()?;
        self.take(rest);
        let Sums { loss: nats, weight: tokens, .. } = self.sums;
        if tokens == 0.0 {
            bail!("--data: there is nothing to score: no document has a token that stands after another");
        }
        let loss = nats / tokens;
        Ok(TextScore {
            documents: self.documents,
            tokens: tokens as u64,
            bytes: self.bytes,
            stride: self.stride,
            loss,
            perplexity: loss.exp(),
            bits_per_byte: nats / std::f64::consts::LN_2 / self.bytes as f64,
        })
    }
}
