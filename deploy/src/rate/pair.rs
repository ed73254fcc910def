//! Pairs of answers, and what is drawn for them.
//!
//! All that is drawn is a function of the server's seed, the rater, the prompt and how often the rater has had it: which
//! seeds answers are sampled from, which of them is shown first, and in which order a rater goes through the prompts.

use lockstep_model::chat_template::Message;
use lockstep_model::digest::{bytes_sha256, hex};
use lockstep_model::random::{Draws, Stream};

use crate::web::scheduler::FinishReason;

/// Seeds are below this: any reader of JSON keeps such numbers.
const SEEDS: u64 = 1 << 53;
/// Which draw tells the order of the answers, and which the seeds.
const ORDER: u64 = 0;
const SEED: u64 = 1;

/// What a rater is to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    /// Names the pair: 16 hexadecimal digits.
    pub(crate) key: String,
    pub(crate) prompt: Vec<Message>,
}

/// Two answers to a prompt, as they are shown: the first, then the second.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pair {
    pub(crate) task: Task,
    pub(crate) answers: [Answer; 2],
    /// What they were sampled with.
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    /// SHA-256 of the parameters, hexadecimal.
    pub(crate) params_sha256: String,
}

/// An answer of the model's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) seed: u64,
    pub(crate) finish: FinishReason,
}

impl Task {
    /// What `rater` is asked about `prompt` for the time numbered `count`, from 0.
    pub(crate) fn new(seed: u64, rater: &str, prompt: &[Message], count: u64) -> Self {
        let what = serde_json::to_vec(&(seed, rater, prompt, count)).expect("texts and numbers can be written");
        Self { key: hex(&bytes_sha256(&what)[..8]), prompt: prompt.to_vec() }
    }

    /// What is drawn for its pair.
    pub(crate) fn draws(&self, seed: u64) -> PairDraws {
        let key = u64::from_str_radix(&self.key, 16).expect("a key is hexadecimal digits");
        PairDraws(Draws::new(seed, Stream::Ratings).derive(0, key))
    }
}

/// What is drawn for a pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairDraws(Draws);

impl PairDraws {
    /// The seed of the answer numbered `number`, as they are sampled.
    pub(crate) fn seed(self, number: u64) -> u64 {
        self.0.below(SEED, number, SEEDS)
    }

    /// Whether the answer that was sampled last is shown first.
    pub(crate) fn turned(self) -> bool {
        self.0.words(ORDER, 0)[0] & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(content: &str) -> Vec<Message> {
        vec![Message { role: "user".into(), content: content.into() }]
    }

    #[test]
    fn a_pair_is_named_by_all_that_makes_it() {
        let task = Task::new(1, "ann", &prompt("a"), 0);
        assert_eq!(task, Task::new(1, "ann", &prompt("a"), 0));
        let others = [
            Task::new(2, "ann", &prompt("a"), 0),
            Task::new(1, "bob", &prompt("a"), 0),
            Task::new(1, "ann", &prompt("b"), 0),
            Task::new(1, "ann", &prompt("a"), 1),
        ];
        assert!(others.iter().all(|other| other.key != task.key && other.key.len() == 16), "{others:?}");
    }

    #[test]
    fn either_answer_comes_first_as_often_and_seeds_differ() {
        let tasks = (0..1000).map(|number| Task::new(1, "ann", &prompt("a"), number).draws(1));
        let (mut turned, mut seeds) = (0, std::collections::BTreeSet::new());
        for draws in tasks {
            turned += u32::from(draws.turned());
            assert!((0..3).all(|number| draws.seed(number) < SEEDS && seeds.insert(draws.seed(number))));
        }
        assert!((440..560).contains(&turned), "{turned}");
    }
}
