//! What a recipe of stage `sft` learns from: conversations, what of them is learned, and the rows that they are packed into.

use std::fmt;

use anyhow::{Context as _, bail};
use indicatif::HumanCount;
use lockstep_coordinator::config::Turns;
use lockstep_model::packing::{PackedRows, PackedSource};
use lockstep_model::tokenizer::Tokenizer;

use super::conversations::{self, Found};
use super::lessons;
use crate::chat::learned;
use crate::chat::template::Template;
use crate::recipe::{DataRecipe, Recipe};

/// All that a run of this stage needs to know of its data.
pub(crate) struct Supervised {
    pub(crate) source: PackedSource,
    pub(crate) tokenizer: Tokenizer,
    /// The prompts of samples, as a user's turns.
    pub(crate) turns: Turns,
    pub(crate) report: Report,
}

/// What was found, for people.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    counts: Counts,
    /// Conversations, rows and learned tokens to train on, and rows to validate on.
    training: usize,
    rows: usize,
    learned: usize,
    validation: usize,
    context: usize,
    rows_per_step: u64,
    /// How messages are written.
    form: &'static str,
    /// The first conversation that is learned, in runs of text: whether each is learned.
    example: Vec<(bool, String)>,
}

/// Conversations by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    found: usize,
    /// Without a turn of the assistant's, or one of which anything is learned.
    no_answer: usize,
    /// With a turn that says nothing.
    empty: usize,
    /// Longer than the model's context.
    too_long: usize,
}

/// Reads the conversations of a recipe with `data`, for a model whose tokenizer is `known` if it is trained further.
///
/// # Errors
/// If a conversation cannot be read or written down, or nothing is learned from any.
pub(crate) fn load(
    recipe: &Recipe,
    data: &DataRecipe,
    context: usize,
    known: Option<Tokenizer>,
) -> anyhow::Result<Supervised> {
    let found = conversations::read(&lessons::files(data)?)?;
    let tokenizer = lessons::tokenizer(data, known, || found.clone())?;
    let template = Template::of(&tokenizer)?;
    let (mut counts, mut examples) = (Counts { found: found.len(), ..Counts::default() }, Vec::new());
    for Found { what: messages, place } in &found {
        if messages.iter().any(|message| message.content.trim().is_empty()) {
            counts.empty += 1;
            continue;
        }
        let example = learned::example(&template, messages).with_context(|| place.to_string())?;
        match example.tokens.len() {
            0 => counts.no_answer += 1,
            length if length > context => counts.too_long += 1,
            _ => examples.push(example),
        }
    }
    let shown = examples.first().map(|example| learned::runs(&tokenizer, example)).unwrap_or_default();
    if examples.is_empty() {
        let counts = counts.in_words();
        bail!("data.input: no token of any conversation is learned, with a context of {context} tokens: {counts}");
    }
    let (training, validation) = lessons::split(recipe, data, &examples, "conversations")?;
    let source = PackedSource {
        training: PackedRows::pack(training.iter().copied(), context),
        validation: PackedRows::pack(validation.iter().copied(), context),
        order: data.order,
        seed: recipe.seed,
        batch: recipe.batch,
    };
    let report = Report {
        counts,
        training: training.len(),
        rows: source.training.rows(),
        learned: source.training.learned(),
        validation: validation.len(),
        context,
        rows_per_step: recipe.batch.sequences_per_step(),
        form: template.form().name(),
        example: shown,
    };
    let turns = lessons::turns(recipe, &template)?;
    Ok(Supervised { source, tokenizer, turns, report })
}

impl Counts {
    /// What is left out, and why.
    fn in_words(self) -> String {
        let Self { found, no_answer, empty, too_long } = self;
        let conversations = if found == 1 { "conversation" } else { "conversations" };
        format!(
            "{} {conversations} found, of which {} have no answer, {} an empty turn, {} are too long",
            HumanCount(found as u64),
            HumanCount(no_answer as u64),
            HumanCount(empty as u64),
            HumanCount(too_long as u64)
        )
    }
}

impl Report {
    /// What was found, and an example.
    pub(crate) fn in_full(&self) -> String {
        format!("{self}\n{}", lessons::marked(&self.example, lessons::marks()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { counts, training, rows, learned, validation, context, rows_per_step, form, .. } = self;
        let count = |count: usize| HumanCount(count as u64);
        writeln!(f, "{}; those are left out", counts.in_words())?;
        writeln!(
            f,
            "{} to train on and {} to validate on, written as {form}; {} tokens are learned",
            count(*training),
            count(*validation),
            count(*learned)
        )?;
        let steps = (*rows as u64).div_ceil(*rows_per_step);
        writeln!(
            f,
            "{} rows of {} tokens: once through them in {} steps",
            count(*rows),
            count(*context),
            HumanCount(steps)
        )?;
        write!(f, "the first of them, with what is learned marked:")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::tests::sft;

    fn supervised(lines: &[String], sets: &[&str]) -> anyhow::Result<Supervised> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, lines.join("\n")).unwrap();
        let recipe = sft(&[&[format!("data.input={}", path.display()).as_str()], sets].concat());
        load(&recipe, recipe.data.as_ref().unwrap(), recipe.model.context().unwrap(), None)
    }

    fn lines(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("{{\"question\":\"{i}?\",\"answer\":\"{}\"}}", "a".repeat(i % 7 + 1))).collect()
    }

    const SETS: &[&str] = &["tokenizer.kind=bytes", "model.context=48", "sampling.every_steps=0"];

    #[test]
    fn what_is_left_out_is_counted() {
        let more = [
            "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}".to_string(),
            "{\"question\":\"\",\"answer\":\"a\"}".into(),
            "{\"question\":\"q\",\"answer\":\" \"}".into(),
            format!("{{\"question\":\"q\",\"answer\":\"{}\"}}", "long ".repeat(10)),
        ];
        let Supervised { report, .. } = supervised(&[lines(20), more.to_vec()].concat(), SETS).unwrap();
        assert_eq!(report.counts, Counts { found: 24, no_answer: 1, empty: 2, too_long: 1 });
        assert_eq!((report.training, report.validation), (19, 1));
        expect_test::expect![[r#"
            24 conversations found, of which 1 have no answer, 2 an empty turn, 1 are too long; those are left out
            19 to train on and 1 to validate on, written as dialogue; 224 tokens are learned
            19 rows of 48 tokens: once through them in 3 steps
            the first of them, with what is learned marked:"#]]
        .assert_eq(&report.to_string());
        let marked = lessons::marked(&report.example, ["⟦", "⟧"]);
        assert_eq!(marked, "  │ User: 0?\n  │ \n  │ Assistant:⟦ a⟧\n  │ ⟦⟧\n  │ ⟦User:⟧\n");
    }

    #[test]
    fn order_and_split_are_drawn_from_the_seed() {
        let digest = |seed: &str| {
            let source = supervised(&lines(50), &[SETS, &[seed]].concat()).unwrap().source;
            lockstep_model::sampler::Source::Packed(source).sha256()
        };
        assert_eq!(digest("seed=1"), digest("seed=1"));
        assert_ne!(digest("seed=1"), digest("seed=2"));
    }

    #[test]
    fn nothing_to_learn_is_refused_in_words() {
        let said =
            |lines: &[String], sets: &[&str]| format!("{:#}", supervised(lines, &[SETS, sets].concat()).err().unwrap());
        let none = said(&["{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}".into()], &[]);
        assert!(
            none.contains("no token of any conversation is learned") && none.contains("1 have no answer"),
            "{none}"
        );
        let short = said(&lines(20), &["model.context=8"]);
        assert!(short.contains("20 are too long"), "{short}");
        let alone = said(&lines(1), &[]);
        assert!(alone.contains("of 1 conversations none is left to train on"), "{alone}");
        let built_in = said(&[], &["data.input=builtin:kjv"]);
        assert!(built_in.contains("holds no conversations"), "{built_in}");
    }
}
