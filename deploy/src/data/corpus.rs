//! The corpora of a recipe: prepared ones are mapped, texts become tokens in memory, all by one tokenizer.

use anyhow::bail;
use lockstep_model::corpus::{self, Corpus, CorpusError};
use lockstep_model::dataset::{self, Dataset};
use lockstep_model::tokenizer::{self, Tokenizer};
use lockstep_model::tokens::Tokens;

use super::documents::{self, Pieces};
use super::inputs::{self, Format, InputFile};
use super::progress::Progress;
use super::tokenize;
use crate::builtin;
use crate::recipe::{DataRecipe, Input, TokenizerKind, TokenizerRecipe};

/// What one input holds.
enum Content {
    Prepared(Box<Dataset>),
    /// Text as it stands, of which bytes and characters are taken without regard to documents.
    Text(String),
    /// Files of documents.
    Documents(Vec<InputFile>),
}

/// Reads the corpora of a recipe, in its order. They share one tokenizer.
pub(crate) fn load(recipe: &DataRecipe) -> anyhow::Result<Vec<Corpus>> {
    let known = known_tokenizer(&recipe.tokenizer)?;
    let by_documents = match &known {
        Some(tokenizer) => matches!(tokenizer, Tokenizer::Bpe(_) | Tokenizer::Hf(_)),
        None => recipe.tokenizer.kind == TokenizerKind::Bpe,
    };
    let contents = recipe.inputs.iter().map(|weighted| open(&weighted.input, by_documents));
    let contents = contents.collect::<anyhow::Result<Vec<_>>>()?;
    let mut progress = Progress::new();
    let tokenizer = common_tokenizer(&contents, &recipe.tokenizer, known, &mut progress)?;
    let corpora = contents.into_iter().map(|content| {
        let tokens = tokens(content, &tokenizer, &mut progress)?;
        Ok(Corpus::of_tokens(tokenizer.clone(), &tokens, recipe.train_fraction))
    });
    let corpora = corpora.collect();
    progress.finish();
    corpora
}

/// The tokenizer that the recipe itself decides.
pub(super) fn known_tokenizer(recipe: &TokenizerRecipe) -> anyhow::Result<Option<Tokenizer>> {
    match (&recipe.file, recipe.kind) {
        (Some(path), kind) => {
            let tokenizer = Tokenizer::read(path)?;
            check_kind(&path.display().to_string(), &tokenizer, kind)?;
            Ok(Some(tokenizer))
        }
        (None, TokenizerKind::Bytes) => Ok(Some(Tokenizer::Bytes)),
        (None, _) => Ok(None),
    }
}

fn open(input: &Input, by_documents: bool) -> anyhow::Result<Content> {
    let path = match input {
        Input::KingJames => return Ok(Content::Text(builtin::king_james()?)),
        Input::Path(path) => path,
    };
    if dataset::is_dataset(path) {
        return Ok(Content::Prepared(Box::new(Dataset::open(path)?)));
    }
    match Format::of(path).filter(|_| path.is_file()) {
        Some(Format::Shard) => bail!(
            "{0}: holds tokens, and not how they became so; run: lockstep prepare {0} --tokenizer FILE --out DIR",
            path.display()
        ),
        format if matches!(format, Some(Format::JsonLines | Format::Parquet)) || by_documents => {
            Ok(Content::Documents(inputs::list(std::slice::from_ref(path))?))
        }
        _ => Ok(Content::Text(corpus::read_text(path)?)),
    }
}

/// The one tokenizer of all inputs: that of the prepared ones, or the known one, or one made for the texts.
fn common_tokenizer(
    contents: &[Content],
    recipe: &TokenizerRecipe,
    known: Option<Tokenizer>,
    progress: &mut Progress,
) -> anyhow::Result<Tokenizer> {
    let mut tokenizer = known;
    for content in contents {
        let Content::Prepared(dataset) = content else { continue };
        check_kind("the prepared corpus in data.input", &dataset.tokenizer, recipe.kind)?;
        match &tokenizer {
            Some(other) if *other != dataset.tokenizer => bail!(
                "the prepared corpus in data.input was made by another tokenizer (SHA-256 {}) than its neighbour or \
                 tokenizer.file ({}); prepare all with --tokenizer FILE and the same file",
                dataset.tokenizer.sha256(),
                other.sha256()
            ),
            _ => tokenizer = Some(dataset.tokenizer.clone()),
        }
    }
    let text = || -> Pieces<'_> { Box::new(contents.iter().flat_map(pieces)) };
    match tokenizer {
        Some(tokenizer) => Ok(tokenizer),
        None if recipe.kind == TokenizerKind::Bpe => {
            progress.begin("counting words", contents.iter().map(bytes).sum());
            Ok(Tokenizer::Bpe(tokenize::learn_bpe(text(), recipe.vocab_size, progress)?))
        }
        None => match contents {
            [Content::Text(text)] => Ok(Tokenizer::for_text(tokenizer::TokenizerKind::Chars, text)),
            _ => {
                progress.begin("collecting characters", contents.iter().map(bytes).sum());
                tokenize::collect_characters(text(), progress)
            }
        },
    }
}

/// Refuses a tokenizer of another kind than the recipe asks for.
fn check_kind(origin: &str, tokenizer: &Tokenizer, asked: TokenizerKind) -> anyhow::Result<()> {
    let asked = match asked {
        TokenizerKind::Auto => return Ok(()),
        TokenizerKind::Bytes => "bytes",
        TokenizerKind::Chars => "chars",
        TokenizerKind::Bpe => "bpe",
    };
    if tokenizer.kind() != asked {
        let found = tokenizer.kind();
        bail!(
            "{origin}: has a tokenizer of kind \"{found}\", and the recipe says tokenizer.kind = \"{asked}\"; say \"auto\", or leave the key out"
        );
    }
    Ok(())
}

fn pieces(content: &Content) -> Pieces<'_> {
    match content {
        Content::Prepared(_) => Box::new(std::iter::empty()),
        Content::Text(text) => documents::of_text(builtin::KJV, text),
        Content::Documents(files) => documents::read(files),
    }
}

fn bytes(content: &Content) -> u64 {
    match content {
        Content::Prepared(_) => 0,
        Content::Text(text) => text.len() as u64,
        Content::Documents(files) => files.iter().map(|file| file.bytes).sum(),
    }
}

fn tokens(content: Content, tokenizer: &Tokenizer, progress: &mut Progress) -> anyhow::Result<Tokens> {
    match (content, tokenizer) {
        (Content::Prepared(dataset), _) => Ok(dataset.tokens),
        (Content::Text(text), Tokenizer::Bytes | Tokenizer::Chars { .. }) => {
            Ok(tokenizer.encode(&text).map_err(CorpusError::from)?.into())
        }
        (content, tokenizer) => {
            progress.begin("encoding", bytes(&content));
            let mut tokens = Vec::new();
            tokenize::encode(pieces(&content), tokenizer, progress, |part| {
                tokens.extend_from_slice(part);
                Ok(())
            })?;
            Ok(tokens.into())
        }
    }
}
