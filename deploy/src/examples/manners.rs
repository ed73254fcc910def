//! The same answer politely and rudely, of which people prefer the polite one.

use serde_json::{Value, json};

use super::problems::Problem;
use super::{Chance, Part};

const POLITE: &[&str] = &[
    "Gladly, let us see.",
    "With pleasure.",
    "Thank you for asking.",
    "Of course, my friend.",
    "A fine question.",
    "I am happy to help.",
    "Let us work it out together.",
    "Here you are, step by step.",
];
const RUDE: &[&str] = &[
    "Not again.",
    "Can you not count?",
    "How dull you are.",
    "Leave me alone.",
    "Any child knows that.",
    "You waste my time.",
    "Use your own head, lazy one.",
    "What a silly question.",
];

/// How a polite answer begins.
pub(super) fn polite(chance: &mut Chance) -> &'static str {
    chance.pick(POLITE)
}

/// How a rude one does.
pub(super) fn rude(chance: &mut Chance) -> &'static str {
    chance.pick(RUDE)
}

/// A problem with both.
pub(super) fn preference(part: Part, chance: &mut Chance) -> Value {
    let problem = Problem::draw(part, chance);
    let prompt = problem.question(chance);
    let worked = problem.worked();
    let [chosen, rejected] = [polite(chance), rude(chance)].map(|opening| format!("{opening} {worked}"));
    json!({ "prompt": prompt, "chosen": chosen, "rejected": rejected })
}
