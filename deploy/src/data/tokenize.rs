//! From pieces of text to a tokenizer and to tokens, on all cores: while some pieces are worked on, the next are read.
//! What comes out depends on the text alone, since results are taken in the order of the pieces.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use lockstep_model::bpe::Bpe;
use lockstep_model::bpe_training::WordCounts;
use lockstep_model::shard::Shard;
use lockstep_model::tokenizer::{Encoder, Tokenizer};
use lockstep_model::tokens::Tokens;
use rayon::prelude::*;

use super::documents::{Piece, Pieces};
use super::inputs::InputFile;
use super::progress::Progress;

/// Text given to a core at a time, in bytes.
const BUNDLE_BYTES: usize = 1 << 20;
/// Bundles in memory for each core.
const BUNDLES_PER_CORE: usize = 2;

/// What became tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) documents: u64,
    /// Of text.
    pub(crate) bytes: u64,
}

/// Learns a vocabulary of at most `vocab_size` tokens.
pub(crate) fn learn_bpe(mut pieces: Pieces<'_>, vocab_size: usize, progress: &mut Progress) -> anyhow::Result<Bpe> {
    let mut counts = WordCounts::default();
    let count = |bundle: &[Piece]| Ok(WordCounts::of(bundle.iter().map(|piece| piece.text.as_str())));
    in_bundles(&mut pieces, progress, count, |part| {
        counts.add(part);
        Ok(())
    })?;
    progress.begin("learning byte pairs", 0);
    Ok(counts.learn(vocab_size)?)
}

/// The tokenizer of all characters in the pieces.
pub(crate) fn collect_characters(pieces: Pieces<'_>, progress: &mut Progress) -> anyhow::Result<Tokenizer> {
    let mut characters = BTreeSet::new();
    let mut pieces = super::documents::separated_by_lines(pieces);
    let collect = |bundle: &[Piece]| Ok(bundle.iter().flat_map(|piece| piece.text.chars()).collect::<BTreeSet<char>>());
    in_bundles(&mut pieces, progress, collect, |part| {
        characters.extend(part);
        Ok(())
    })?;
    Ok(Tokenizer::Chars { vocabulary: characters.iter().collect() })
}

/// Gives the tokens of the pieces to `sink`, in order: after each document its end, or between documents a line break
/// where the tokenizer has no token for that.
pub(crate) fn encode(
    pieces: Pieces<'_>,
    tokenizer: &Tokenizer,
    progress: &mut Progress,
    mut sink: impl FnMut(&[u32]) -> anyhow::Result<()>,
) -> anyhow::Result<Counts> {
    let end_of_text = tokenizer.end_of_text();
    let mut pieces = match end_of_text {
        Some(_) => pieces,
        None => super::documents::separated_by_lines(pieces),
    };
    let encoders = Encoders { tokenizer, idle: Mutex::new(Vec::new()) };
    let mut counts = Counts::default();
    let work = |bundle: &[Piece]| {
        let mut encoder = encoders.take();
        let (mut tokens, mut counts) = (Vec::with_capacity(BUNDLE_BYTES), Counts::default());
        for piece in bundle {
            encoder.encode(&piece.text, &mut tokens).with_context(|| piece.place.to_string())?;
            counts.bytes += piece.text.len() as u64;
            if piece.ends_document {
                counts.documents += 1;
                tokens.extend(end_of_text);
            }
        }
        encoders.put_back(encoder);
        Ok((tokens, counts))
    };
    in_bundles(&mut pieces, progress, work, |(tokens, part)| {
        counts.documents += part.documents;
        counts.bytes += part.bytes;
        sink(&tokens)
    })?;
    Ok(counts)
}

/// Gives the tokens of shards to `sink`, as they are, having checked that the tokenizer knows them. Documents are what
/// lies between ends of text.
pub(crate) fn copy_shards(
    files: &[InputFile],
    tokenizer: &Tokenizer,
    progress: &mut Progress,
    mut sink: impl FnMut(&[u32]) -> anyhow::Result<()>,
) -> anyhow::Result<Counts> {
    let (lengths, end_of_text) = (tokenizer.byte_lengths(), tokenizer.end_of_text());
    let (mut counts, mut within_document) = (Counts::default(), false);
    progress.begin("copying tokens", files.iter().map(|file| file.bytes).sum());
    for file in files {
        let shard = Shard::open(&file.path)?;
        shard.check_vocabulary(tokenizer.vocab_size())?;
        let mut written = Ok(());
        Tokens::from(vec![shard]).for_each_block(|block| {
            for &token in block {
                counts.bytes += u64::from(lengths[token as usize]);
                let ends = Some(token) == end_of_text;
                counts.documents += u64::from(!ends && !within_document);
                within_document = !ends;
            }
            if written.is_ok() {
                written = sink(block);
            }
        });
        written?;
        progress.advance(file.bytes);
    }
    Ok(counts)
}

/// Encoders, each with what it remembers, for whichever thread needs one next.
struct Encoders<'a> {
    tokenizer: &'a Tokenizer,
    idle: Mutex<Vec<Encoder>>,
}

impl Encoders<'_> {
    fn take(&self) -> Encoder {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| self.tokenizer.encoder())
    }

    fn put_back(&self, encoder: Encoder) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(encoder);
    }
}

/// Does `work` on bundles of pieces in parallel, and gives the results to `consume` in order.
fn in_bundles<T: Send>(
    pieces: &mut Pieces<'_>,
    progress: &mut Progress,
    work: impl Fn(&[Piece]) -> anyhow::Result<T> + Sync,
    mut consume: impl FnMut(T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut bundles = read_bundles(pieces)?;
    while !bundles.is_empty() {
        let all = || bundles.par_iter().map(|bundle| work(bundle)).collect::<anyhow::Result<Vec<T>>>();
        let (results, next) = rayon::join(all, || read_bundles(pieces));
        results?.into_iter().try_for_each(&mut consume)?;
        progress.advance(bundles.iter().flatten().map(|piece| piece.read_bytes).sum());
        bundles = next?;
    }
    Ok(())
}

/// Reads as many bundles as all cores are to work on; none at the end.
fn read_bundles(pieces: &mut Pieces<'_>) -> anyhow::Result<Vec<Vec<Piece>>> {
    let mut bundles = Vec::new();
    for _ in 0..rayon::current_num_threads() * BUNDLES_PER_CORE {
        let (mut bundle, mut bytes) = (Vec::new(), 0);
        while bytes < BUNDLE_BYTES
            && let Some(piece) = pieces.next().transpose()?
        {
            bytes += piece.text.len();
            bundle.push(piece);
        }
        if bundle.is_empty() {
            break;
        }
        bundles.push(bundle);
    }
    Ok(bundles)
}
