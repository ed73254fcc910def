//! Material for a first run through all stages, made up from templates of our own: what is written is a function of kind, part,
//! seed and number.
//!
//! | Kind | Line | For |
//! |---|---|---|
//! | [`stories`] | `{"text"}` | pre-training |
//! | [`problems`] | `{"messages"}`: a sum or a difference, and how it is worked out | `sft`, `eval --problems` |
//! | [`manners`] | `{"prompt", "chosen", "rejected"}`: the same, politely and rudely | `reward`, `dpo`, `eval --preferences` |
//!
//! Training and test parts of problems and manners have no sum in common, whatever the seeds.

mod manners;
mod problems;
mod stories;

use std::collections::HashSet;

use lockstep_model::random::{Draws, Stream};
use serde_json::Value;

/// What is made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Short stories.
    Stories,
    /// Sums and differences, as conversations.
    Problems,
    /// The same with a polite answer and a rude one.
    Manners,
}

/// What it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// To learn from.
    Train,
    /// To be asked about what was not learned.
    Test,
}

/// Draws of one line that follow one another.
struct Chance {
    draws: Draws,
    line: u64,
    drawn: u64,
}

impl Chance {
    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        self.draws.below(self.line, self.drawn, bound)
    }

    /// One of some things.
    fn pick<'a, T: ?Sized>(&mut self, things: &[&'a T]) -> &'a T {
        things[self.below(things.len() as u64) as usize]
    }
}

/// The lines of a kind, without end. Stories do not repeat; problems come again in other words.
pub(crate) fn lines(kind: Kind, part: Part, seed: u64) -> impl Iterator<Item = Value> {
    // Kinds and parts have draws of their own.
    let draws = Draws::new(seed, Stream::Examples).derive(kind as u64, part as u64);
    let mut told = HashSet::new();
    (0u64..).filter_map(move |line| {
        let mut chance = Chance { draws, line, drawn: 0 };
        let value = match kind {
            Kind::Stories => stories::story(&mut chance),
            Kind::Problems => problems::conversation(part, &mut chance),
            Kind::Manners => manners::preference(part, &mut chance),
        };
        told.insert(value.to_string()).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(kind: Kind, part: Part, seed: u64) -> Vec<String> {
        lines(kind, part, seed).take(2000).map(|line| line.to_string()).collect()
    }

    #[test]
    fn lines_are_a_function_of_their_seed_and_do_not_repeat() {
        for kind in [Kind::Stories, Kind::Problems, Kind::Manners] {
            let lines = some(kind, Part::Train, 3);
            assert_eq!(lines, some(kind, Part::Train, 3));
            assert_ne!(lines, some(kind, Part::Train, 4));
            assert_ne!(lines, some(kind, Part::Test, 3));
            assert_eq!(lines.iter().collect::<HashSet<_>>().len(), lines.len());
        }
    }

    #[test]
    fn what_is_tested_was_not_learned() {
        let sums = |kind, part, seed| -> HashSet<String> {
            let numbers = |line: Value| {
                let question = line["prompt"].as_str().or(line["messages"][0]["content"].as_str()).unwrap();
                let numbers = question.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
                numbers.collect::<Vec<_>>().join(" ")
            };
            lines(kind, part, seed).take(2000).map(numbers).collect()
        };
        for kind in [Kind::Problems, Kind::Manners] {
            let learned = &sums(Kind::Problems, Part::Train, 1) | &sums(Kind::Manners, Part::Train, 2);
            let tested = sums(kind, Part::Test, 5);
            assert!(tested.len() > 300 && learned.len() > 1000, "{} of {}", tested.len(), learned.len());
            assert_eq!(learned.intersection(&tested).next(), None);
        }
    }
}
