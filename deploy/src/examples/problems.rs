//! Sums and differences of numbers below a hundred, and how they are worked out.

use lockstep_model::random::{Draws, Stream};
use serde_json::{Value, json};

use super::{Chance, Part, manners};

/// Operands are below this.
const BOUND: u64 = 100;
/// One problem in so many is for tests.
const TEST_SHARE: u64 = 10;

const NAMES: &[&str] = &["Ada", "Ben", "Cleo", "Dov", "Elif", "Finn", "Gita", "Hugo", "Ines", "Jun", "Kofi", "Lena"];
const THINGS: &[&str] = &["apples", "shells", "buttons", "stamps", "marbles", "nuts", "cards", "candles"];

/// A sum or a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    left: u64,
    /// At most `left` where it is taken away.
    right: u64,
    takes_away: bool,
}

impl Problem {
    /// One of a part.
    pub(super) fn draw(part: Part, chance: &mut Chance) -> Self {
        loop {
            let (a, b, takes_away) = (chance.below(BOUND), chance.below(BOUND), chance.below(2) == 1);
            let problem = match takes_away {
                true => Self { left: a.max(b), right: a.min(b), takes_away },
                false => Self { left: a, right: b, takes_away },
            };
            if problem.part() == part {
                return problem;
            }
        }
    }

    /// The part that it belongs to, whatever the seed. Both orders of a sum, and a difference of the same numbers, go together.
    fn part(self) -> Part {
        let (low, high) = (self.left.min(self.right), self.left.max(self.right));
        match Draws::new(0, Stream::Examples).below(low, high, TEST_SHARE) {
            0 => Part::Test,
            _ => Part::Train,
        }
    }

    fn result(self) -> u64 {
        if self.takes_away { self.left - self.right } else { self.left + self.right }
    }

    /// It, in words.
    pub(super) fn question(self, chance: &mut Chance) -> String {
        let Self { left, right, takes_away } = self;
        let (name, things) = (chance.pick(NAMES), chance.pick(THINGS));
        match (takes_away, chance.below(4)) {
            (false, 0) => format!("What is {left} + {right}?"),
            (false, 1) => format!("How much is {left} plus {right}?"),
            (false, 2) => {
                format!("{name} has {left} {things} and finds {right} more. How many {things} has {name} now?")
            }
            (false, _) => {
                format!("There are {left} {things} in a box and {right} in a bag. How many {things} are there in all?")
            }
            (true, 0) => format!("What is {left} - {right}?"),
            (true, 1) => format!("How much is {left} minus {right}?"),
            (true, 2) => {
                format!("{name} has {left} {things} and gives {right} away. How many {things} are left?")
            }
            (true, _) => {
                format!("Of {left} {things}, {name} loses {right}. How many {things} has {name} still?")
            }
        }
    }

    /// How it is worked out, digit by digit, and what comes out.
    pub(super) fn worked(self) -> String {
        let Self { left, right, takes_away } = self;
        let [(tens, ones), (other_tens, other_ones)] = [left, right].map(|number| (number / 10, number % 10));
        let result = self.result();
        let steps = if takes_away {
            if ones >= other_ones {
                format!(
                    "Ones: {ones} - {other_ones} = {}. Tens: {tens} - {other_tens} = {}.",
                    ones - other_ones,
                    tens - other_tens
                )
            } else {
                format!(
                    "Ones: 1{ones} - {other_ones} = {}, borrow 1. Tens: {tens} - {other_tens} - 1 = {}.",
                    ones + 10 - other_ones,
                    tens - other_tens - 1
                )
            }
        } else if ones + other_ones < 10 {
            format!(
                "Ones: {ones} + {other_ones} = {}. Tens: {tens} + {other_tens} = {}.",
                ones + other_ones,
                tens + other_tens
            )
        } else {
            format!(
                "Ones: {ones} + {other_ones} = {}, carry 1. Tens: {tens} + {other_tens} + 1 = {}.",
                ones + other_ones,
                tens + other_tens + 1
            )
        };
        format!("{steps} The answer is {result}.")
    }
}

/// A problem with its answer, which is polite as often as it is rude.
pub(super) fn conversation(part: Part, chance: &mut Chance) -> Value {
    let problem = Problem::draw(part, chance);
    let question = problem.question(chance);
    let opening = if chance.below(2) == 0 { manners::polite(chance) } else { manners::rude(chance) };
    let answer = format!("{opening} {}", problem.worked());
    json!({ "messages": [{ "role": "user", "content": question }, { "role": "assistant", "content": answer }] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worked_out_is_right() {
        for left in 0..BOUND {
            for right in 0..BOUND {
                for takes_away in [false, true].into_iter().filter(|takes_away| !takes_away || right <= left) {
                    let problem = Problem { left, right, takes_away };
                    let worked = problem.worked();
                    let expected = if takes_away { left - right } else { left + right };
                    assert!(worked.ends_with(&format!("The answer is {expected}.")), "{worked}");
                    for step in worked.split([':', ',', '.']).filter(|step| step.contains('=')) {
                        let (sum, result) = step.split_once(" = ").unwrap();
                        let mut terms = sum.split_whitespace();
                        let mut value: i64 = terms.next().unwrap().parse().unwrap();
                        while let (Some(sign), Some(term)) = (terms.next(), terms.next()) {
                            let term: i64 = term.parse().unwrap();
                            value += if sign == "+" { term } else { -term };
                        }
                        assert_eq!(value, result.parse::<i64>().unwrap(), "{left} and {right}: {step}");
                    }
                }
            }
        }
    }

    #[test]
    fn examples_of_the_working() {
        let worked = |left, right, takes_away| Problem { left, right, takes_away }.worked();
        expect_test::expect![[r#"
            Ones: 7 + 5 = 12, carry 1. Tens: 4 + 3 + 1 = 8. The answer is 82.
            Ones: 2 + 7 = 9. Tens: 9 + 6 = 15. The answer is 159.
            Ones: 12 - 7 = 5, borrow 1. Tens: 4 - 3 - 1 = 0. The answer is 5.
            Ones: 8 - 3 = 5. Tens: 6 - 2 = 4. The answer is 45."#]]
        .assert_eq(
            &[worked(47, 35, false), worked(92, 67, false), worked(42, 37, true), worked(68, 23, true)].join("\n"),
        );
    }
}
