//! What recipes of the stages `reward` and `dpo` learn from: pairs of answers to one prompt, of which people prefer one.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use indicatif::HumanCount;
use lockstep_coordinator::config::Turns;
use lockstep_model::chat_template::Message;
use lockstep_model::comparison::{self, Comparison};
use lockstep_model::pairs::{Pair, PairSource, Reading};
use lockstep_model::tokenizer::Tokenizer;

use super::conversations::{self, Found};
use super::documents::Place;
use super::lessons;
use crate::chat::learned;
use crate::chat::template::Template;
use crate::recipe::{DataRecipe, Recipe};

/// All that a run of these stages needs to know of its data.
pub(crate) struct Preferences {
    pub(crate) source: PairSource,
    pub(crate) tokenizer: Tokenizer,
    /// The prompts of samples, as a user's turns.
    pub(crate) turns: Turns,
    pub(crate) report: Report,
}

/// What was found, for people.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    counts: Counts,
    training: usize,
    validation: usize,
    pairs_per_step: u64,
    /// How messages are written.
    form: &'static str,
    /// The first pair, each answer in runs of text: whether each run is what is compared.
    example: [Vec<(bool, String)>; 2],
}

/// Judgements by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    found: usize,
    /// That prefer neither answer.
    undecided: usize,
    /// That were taken back.
    taken_back: usize,
    /// Of one and the same answer twice.
    equal: usize,
    /// With a turn that says nothing.
    empty: usize,
    /// Longer than the model's context.
    too_long: usize,
}

/// Pairs of the files at hand, as rows that a model reads.
pub(crate) struct Read {
    pub(crate) pairs: Vec<Pair>,
    pub(crate) counts: Counts,
}

/// Reads the preferences of a recipe with `data`, for a model whose tokenizer is `known` if it is trained further, and of whose
/// rows `reading` is compared.
///
/// # Errors
/// If a line cannot be read or written down, or none expresses a preference that fits.
pub(crate) fn load(
    recipe: &Recipe,
    data: &DataRecipe,
    context: usize,
    known: Option<Tokenizer>,
    reading: Reading,
) -> anyhow::Result<Preferences> {
    let judgements = Judgements::read(&lessons::files(data)?)?;
    let tokenizer = lessons::tokenizer(data, known, || judgements.conversations())?;
    let template = Template::of(&tokenizer)?;
    let Read { pairs, counts } = judgements.pairs(&template, context, reading)?;
    let Some(first) = pairs.first() else {
        bail!(
            "data.input: no line expresses a preference that can be learned, with a context of {context} tokens: {}",
            counts.in_words()
        );
    };
    let example = [0, 1].map(|answer| learned::runs(&tokenizer, &first[answer]));
    let (training, validation) = lessons::split(recipe, data, &pairs, "preferences")?;
    let report = Report {
        counts,
        training: training.len(),
        validation: validation.len(),
        pairs_per_step: recipe.batch.sequences_per_step(),
        form: template.form().name(),
        example,
    };
    let source = PairSource {
        training: training.into_iter().cloned().collect(),
        validation: validation.into_iter().cloned().collect(),
        reading,
        context,
        order: data.order,
        seed: recipe.seed,
        batch: recipe.batch,
        has_reference: reading == Reading::LogProbability,
        references: None,
    };
    let turns = lessons::turns(recipe, &template)?;
    Ok(Preferences { source, tokenizer, turns, report })
}

/// What the lines of files say.
pub(crate) struct Judgements {
    preferred: Vec<(Comparison, Place)>,
    counts: Counts,
}

impl Judgements {
    /// Reads files of lines.
    ///
    /// # Errors
    /// If one cannot be read: with file, line, and what was expected.
    pub(crate) fn read(files: &[PathBuf]) -> anyhow::Result<Self> {
        let lines = conversations::read_judgements(files)?;
        let lines = lines.into_iter().map(|Found { what, place }| (what, place));
        let (preferred, undecided, taken_back) = comparison::preferences(lines);
        let found = preferred.len() + undecided + taken_back;
        Ok(Self { preferred, counts: Counts { found, undecided, taken_back, ..Counts::default() } })
    }

    /// The prompts with both answers, as conversations.
    fn conversations(&self) -> Vec<Found<Vec<Message>>> {
        let both = |(Comparison { prompt, chosen, rejected, .. }, place): &(Comparison, Place)| {
            [chosen, rejected].map(|answer| Found { what: [&prompt[..], answer].concat(), place: place.clone() })
        };
        self.preferred.iter().flat_map(both).collect()
    }

    /// Writes them down as `template` says, for rows of at most `context` tokens.
    ///
    /// # Errors
    /// If one cannot be.
    pub(crate) fn pairs(self, template: &Template, context: usize, reading: Reading) -> anyhow::Result<Read> {
        let Self { preferred, mut counts } = self;
        let mut pairs = Vec::with_capacity(preferred.len());
        for (Comparison { prompt, chosen, rejected, cut }, place) in preferred {
            let is_empty = |message: &Message| message.content.trim().is_empty();
            if prompt.iter().chain(&chosen).chain(&rejected).any(is_empty) {
                counts.empty += 1;
                continue;
            }
            let row = |answer: &[Message], is_cut: bool| {
                learned::answer(template, &prompt, answer, is_cut).with_context(|| place.to_string())
            };
            let pair = [row(&chosen, cut[0])?, row(&rejected, cut[1])?];
            if pair[0] == pair[1] {
                counts.equal += 1;
            } else if pair.iter().any(|example| example.tokens.is_empty()) {
                counts.empty += 1;
            } else if pair.iter().any(|example| reading.length(example) > context) {
                counts.too_long += 1;
            } else {
                pairs.push(pair);
            }
        }
        Ok(Read { pairs, counts })
    }
}

impl Counts {
    /// What is left out, and why.
    pub(crate) fn in_words(self) -> String {
        let Self { found, undecided, taken_back, equal, empty, too_long } = self;
        let count = |count: usize| HumanCount(count as u64);
        let judgements = if found == 1 { "judgement" } else { "judgements" };
        format!(
            "{} {judgements} found, of which {} prefer neither answer, {} were taken back, {} have equal answers, {} an empty \
             turn, {} are too long",
            count(found),
            count(undecided),
            count(taken_back),
            count(equal),
            count(empty),
            count(too_long)
        )
    }
}

impl Report {
    /// What was found, and an example.
    pub(crate) fn in_full(&self) -> String {
        let [chosen, rejected] = self.example.each_ref().map(|runs| lessons::marked(runs, lessons::marks()));
        format!("{self}\n{chosen}which is preferred to\n{rejected}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { counts, training, validation, pairs_per_step, form, .. } = self;
        let count = |count: usize| HumanCount(count as u64);
        writeln!(f, "{}; those are left out", counts.in_words())?;
        writeln!(
            f,
            "{} pairs to train on and {} to validate on, written as {form}: once through them in {} steps",
            count(*training),
            count(*validation),
            HumanCount((*training as u64).div_ceil(*pairs_per_step))
        )?;
        write!(f, "the first of them, with what is compared marked:")
    }
}

#[cfg(test)]
mod tests {
    use lockstep_model::packing::Example;

    use super::*;
    use crate::recipe::tests::dpo;

    fn preferences(lines: &[String], sets: &[&str]) -> anyhow::Result<Preferences> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, lines.join("\n")).unwrap();
        let recipe = dpo(&[&[format!("data.input={}", path.display()).as_str()], sets].concat());
        let context = recipe.model.context().unwrap();
        load(&recipe, recipe.data.as_ref().unwrap(), context, None, Reading::LogProbability)
    }

    fn lines(count: usize) -> Vec<String> {
        let line = |i| format!("{{\"prompt\":\"{i}?\",\"chosen\":\"{}\",\"rejected\":\"no\"}}", "a".repeat(i % 7 + 1));
        (0..count).map(line).collect()
    }

    const SETS: &[&str] = &["tokenizer.kind=bytes", "model.context=48", "sampling.every_steps=0"];

    #[test]
    fn what_is_left_out_is_counted() {
        let more = [
            r#"{"prompt":"q","choice":"tie","answers":["a","b"]}"#.to_string(),
            r#"{"prompt":"q","chosen":"a","rejected":"b","id":"1"}"#.into(),
            r#"{"undo":"1"}"#.into(),
            r#"{"prompt":"q","chosen":"a","rejected":"a"}"#.into(),
            r#"{"prompt":"q","chosen":"","rejected":"a"}"#.into(),
            format!(r#"{{"prompt":"q","chosen":"a","rejected":"{}"}}"#, "long ".repeat(10)),
        ];
        let Preferences { report, source, .. } = preferences(&[lines(20), more.to_vec()].concat(), SETS).unwrap();
        let expected = Counts { found: 25, undecided: 1, taken_back: 1, equal: 1, empty: 1, too_long: 1 };
        assert_eq!(report.counts, expected);
        assert_eq!((source.training.len(), source.validation.len()), (18, 2));
        expect_test::expect![[r#"
            25 judgements found, of which 1 prefer neither answer, 1 were taken back, 1 have equal answers, 1 an empty turn, 1 are too long; those are left out
            18 pairs to train on and 2 to validate on, written as dialogue: once through them in 2 steps
            the first of them, with what is compared marked:"#]]
        .assert_eq(&report.to_string());
        let marked = report.example.each_ref().map(|runs| lessons::marked(runs, ["⟦", "⟧"]));
        assert_eq!(marked[0], "  │ User: 0?\n  │ \n  │ Assistant:⟦ a⟧\n  │ ⟦⟧\n  │ ⟦User:⟧\n");
        assert_eq!(marked[1], marked[0].replace(" a", " no"));
    }

    #[test]
    fn earlier_answers_are_read_and_not_compared() {
        let line = r#"{"prompt":[{"role":"user","content":"q"},{"role":"assistant","content":"ab"},{"role":"user","content":"r"}],"chosen":"c","rejected":"d"}"#;
        let source =
            preferences(&[vec![line.to_string()], lines(20)].concat(), &["tokenizer.kind=bytes"]).unwrap().source;
        let learned = |example: &Example| example.learned.iter().filter(|learned| **learned).count();
        let all = source.training.iter().chain(&*source.validation);
        let pair = all.max_by_key(|pair| pair[0].tokens.len()).unwrap();
        assert_eq!(learned(&pair[0]), " c\n\nUser:".len());
    }

    #[test]
    fn nothing_to_learn_is_refused_in_words() {
        let said = |lines: &[String], sets: &[&str]| {
            format!("{:#}", preferences(lines, &[SETS, sets].concat()).err().unwrap())
        };
        let none = said(&[r#"{"prompt":"q","choice":"tie"}"#.into()], &[]);
        assert!(none.contains("no line expresses a preference") && none.contains("1 prefer neither"), "{none}");
        let short = said(&lines(20), &["model.context=8"]);
        assert!(short.contains("20 are too long"), "{short}");
        let alone = said(&lines(1), &[]);
        assert!(alone.contains("of 1 preferences none is left to train on"), "{alone}");
        let other = said(&[r#"{"messages":[]}"#.into()], &[]);
        assert!(other.contains("a.jsonl: line 1: there is no chosen"), "{other}");
    }
}
