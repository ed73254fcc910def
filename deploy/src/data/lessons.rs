//! What all stages share that learn from conversations.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use lockstep_coordinator::config::Turns;
use lockstep_model::chat_template::Message;
use lockstep_model::sampler::Permutation;
use lockstep_model::tokenizer::{self, Tokenizer};

use super::conversations::Found;
use super::corpus;
use super::documents::Piece;
use super::progress::Progress;
use super::tokenize;
use crate::chat::learned::DAY;
use crate::chat::template::Template;
use crate::recipe::{DataRecipe, Input, Recipe, TokenizerKind};

/// Where the conversations of a recipe with `data` are.
///
/// # Errors
/// If it names the built-in text.
pub(super) fn files(data: &DataRecipe) -> anyhow::Result<Vec<PathBuf>> {
    let files = data.inputs.iter().map(|weighted| match &weighted.input {
        Input::Path(path) => Ok(path.clone()),
        Input::KingJames => bail!("data.input: the built-in text holds no conversations; name a .jsonl or .json file"),
    });
    files.collect()
}

/// The tokenizer that is `known`, or that the recipe names, or else one that is learned from `conversations` as they are written
/// without one: as a dialogue.
///
/// # Errors
/// If it cannot be read or learned.
pub(super) fn tokenizer(
    data: &DataRecipe,
    known: Option<Tokenizer>,
    conversations: impl FnOnce() -> Vec<Found<Vec<Message>>>,
) -> anyhow::Result<Tokenizer> {
    let named = match known {
        Some(known) => Some(known),
        None => corpus::known_tokenizer(&data.tokenizer)?,
    };
    if let Some(tokenizer) = named {
        return Ok(tokenizer);
    }
    let template = Template::of(&Tokenizer::Bytes)?;
    let piece = |found: &Found<Vec<Message>>| {
        let text = template.render(&found.what, false, DAY)?;
        let read_bytes = text.len() as u64;
        Ok(Piece { text, starts_document: true, ends_document: true, place: found.place.clone(), read_bytes })
    };
    let pieces = conversations().iter().map(piece).collect::<anyhow::Result<Vec<Piece>>>()?;
    match data.tokenizer.kind {
        TokenizerKind::Bpe => {
            let mut progress = Progress::new();
            progress.begin("counting words", pieces.iter().map(|piece| piece.read_bytes).sum());
            let learned =
                tokenize::learn_bpe(Box::new(pieces.into_iter().map(Ok)), data.tokenizer.vocab_size, &mut progress);
            progress.finish();
            Ok(Tokenizer::Bpe(learned?))
        }
        _ => {
            let text: String = pieces.into_iter().map(|piece| piece.text).collect();
            Ok(Tokenizer::for_text(tokenizer::TokenizerKind::Chars, &text))
        }
    }
}

/// Things in an order drawn from the seed, parted into those to train on and those to validate on.
///
/// # Errors
/// If one part that is wanted has none of the `things`; names the key.
pub(super) fn split<'a, T>(
    recipe: &Recipe,
    data: &DataRecipe,
    all: &'a [T],
    things: &str,
) -> anyhow::Result<(Vec<&'a T>, Vec<&'a T>)> {
    let (share, count) = (data.train_fraction, all.len());
    let order = Permutation::of_conversations(recipe.seed, count.max(1) as u64);
    let mut training: Vec<&T> = (0..count).map(|place| &all[order.at(place as u64) as usize]).collect();
    let validation = training.split_off((count as f64 * share) as usize);
    let without = match (training.len(), validation.len()) {
        (0, _) => "train",
        (_, 0) if recipe.evaluation.slots > 0 => "validate",
        _ => return Ok((training, validation)),
    };
    bail!("data.train_fraction = {share:?}: of {count} {things} none is left to {without} on; give more of them")
}

/// The prompts of samples, as a user's turns.
///
/// # Errors
/// If the template refuses one.
pub(super) fn turns(recipe: &Recipe, template: &Template) -> anyhow::Result<Turns> {
    let prompt = |prompt: &String| {
        let asked = Message { role: "user".into(), content: prompt.clone() };
        template.prompt(&[asked], DAY).with_context(|| format!("sampling.prompts: {prompt:?}"))
    };
    let prompts = match recipe.sampling.every_steps {
        0 => Vec::new(),
        _ => recipe.sampling.prompts.iter().map(prompt).collect::<anyhow::Result<_>>()?,
    };
    Ok(Turns { prompts, ends: template.ends().to_vec(), stops: template.stops().to_vec() })
}

/// What marks text that is learned: green on a terminal, else brackets.
pub(super) fn marks() -> [&'static str; 2] {
    if std::io::stderr().is_terminal() { ["\u{1b}[32m", "\u{1b}[0m"] } else { ["⟦", "⟧"] }
}

/// Runs of text, marked where they are learned, in lines with a margin.
pub(super) fn marked(runs: &[(bool, String)], [begin, end]: [&str; 2]) -> String {
    let runs = runs.iter().map(|(learned, text)| match learned {
        // Colour does not go on in the next line's margin.
        true => format!("{begin}{}{end}", text.replace('\n', &format!("{end}\n{begin}"))),
        false => text.clone(),
    });
    runs.collect::<String>().lines().map(|line| format!("  │ {line}\n")).collect()
}
