//! Short stories: somebody wants something, something is in the way, somebody helps.

use serde_json::{Value, json};

use super::Chance;

/// Who they are about, and by which word they are spoken of.
const HEROES: &[(&str, [&str; 3])] = &[
    ("a young fox", ["she", "her", "the fox"]),
    ("an old baker", ["he", "him", "the baker"]),
    ("a small owl", ["he", "him", "the owl"]),
    ("a shy giant", ["he", "him", "the giant"]),
    ("a brave mouse", ["she", "her", "the mouse"]),
    ("a tired farmer", ["she", "her", "the farmer"]),
    ("a clever goat", ["he", "him", "the goat"]),
    ("a quiet sailor", ["she", "her", "the sailor"]),
    ("a little tortoise", ["he", "him", "the tortoise"]),
    ("a merry smith", ["she", "her", "the smith"]),
];
const PLACES: &[&str] = &[
    "at the edge of a dark wood",
    "in a village by the sea",
    "on a green hill",
    "beside a slow river",
    "under an old bridge",
    "in a valley full of snow",
    "near a broken mill",
    "behind a high stone wall",
];
const WISHES: &[(&str, &str)] = &[
    ("a warm coat", "wore the coat all winter"),
    ("a red kite", "flew the kite until evening"),
    ("a loaf of bread", "ate the bread with honey"),
    ("a silver bell", "hung the bell over the door"),
    ("a boat", "sailed the boat down the stream"),
    ("a garden of roses", "sat among the roses every day"),
    ("a lamp", "lit the lamp each night"),
    ("a new drum", "beat the drum so that all could dance"),
    ("a map of the world", "read the map by the fire"),
    ("a good friend", "was never alone again"),
];
const TROUBLES: &[&str] = &[
    "But the rain fell for nine days and washed the road away.",
    "But there was not a single coin in the house.",
    "But a grey wolf slept in front of the gate.",
    "But nobody knew where to find one.",
    "But the wind was strong and the night was cold.",
    "But the shop had been closed for years.",
    "But the key lay at the bottom of the well.",
    "But the mountain was too steep to climb.",
];
const HELPERS: &[&str] = &[
    "a crow with one white feather",
    "a girl who sold apples",
    "a very old snail",
    "a boy with a wooden sword",
    "two busy ants",
    "a hen from the next farm",
    "a blind fiddler",
    "the keeper of the tower",
];
const HELP: &[&str] = &[
    "showed {them} a path that few had ever walked",
    "shared the last piece of cheese",
    "told {them} a secret about the moon",
    "carried the heavy basket up the hill",
    "sang until the trouble was forgotten",
    "lent {them} a rope and a lantern",
    "waited with {them} until the morning came",
    "taught {them} to be patient",
];
const LESSONS: &[&str] = &[
    "Those who ask are seldom refused.",
    "A small kindness goes a long way.",
    "What is shared grows larger.",
    "It is never too late to begin.",
    "Even a long road ends somewhere.",
    "Nobody is too little to help.",
];

/// One of them.
pub(super) fn story(chance: &mut Chance) -> Value {
    let (hero, [they, them, name]) = HEROES[chance.below(HEROES.len() as u64) as usize];
    let (place, trouble, helper) = (chance.pick(PLACES), chance.pick(TROUBLES), chance.pick(HELPERS));
    let (wish, end) = WISHES[chance.below(WISHES.len() as u64) as usize];
    let help = chance.pick(HELP).replace("{them}", them);
    let opening = match chance.below(4) {
        0 => format!("Once there was {hero} who lived {place}."),
        1 => format!("Long ago, {place}, there lived {hero}."),
        2 => format!("There was {hero}, and {they} lived {place}."),
        _ => format!("{} lived {hero}.", capitalised(place)),
    };
    let wanting = match chance.below(3) {
        0 => format!("More than anything, {name} wanted {wish}."),
        1 => format!("Every day {they} dreamed of {wish}."),
        _ => format!("One morning {name} said, \"I wish I had {wish}!\""),
    };
    let meeting = match chance.below(3) {
        0 => format!("Then {helper} came by and {help}."),
        1 => format!("On the way {they} met {helper}, who {help}."),
        _ => format!("\"Do not be sad,\" said {helper}, and {help}."),
    };
    let ending = match chance.below(3) {
        0 => format!("So {name} got {wish} after all, and {end}."),
        1 => format!("In the end {they} had {wish}, and {end}."),
        _ => format!("That is how {name} came to {wish}, and {end}."),
    };
    let mut text = format!("{opening} {wanting} {trouble} {meeting} {ending}");
    if chance.below(2) == 0 {
        text.push(' ');
        text.push_str(chance.pick(LESSONS));
    }
    json!({ "text": text })
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::{Kind, Part, lines};

    #[test]
    fn stories_are_whole() {
        for story in lines(Kind::Stories, Part::Train, 1).take(500) {
            let text = story["text"].as_str().unwrap();
            assert!(text.ends_with(['.', '!']) && !text.contains(['{', '}']), "{text}");
            assert!((150..600).contains(&text.len()), "{text}");
        }
    }

    #[test]
    fn a_text_begins_with_a_capital() {
        assert_eq!(capitalised("on a hill"), "On a hill");
    }
}
