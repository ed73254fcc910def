//! One rater's work: what is judged, what is shown, and what is to be sampled next. It decides, and does nothing itself.
//!
//! What is judged follows from the rater's lines in the file, the same whether they were found there at the start or written
//! since. A judgement taken back puts its pair before all others, to be judged again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lockstep_model::chat_template::Message;

use super::pair::{Pair, Task};
use super::preferences::{Choice, Id, Judgement, Line};
use crate::web::error::ApiError;

/// Pairs that are sampled before they are judged: the one that is read, and the next.
const AHEAD: usize = 2;

/// Where a rater's prompts come from.
#[derive(Clone, Debug)]
enum Source {
    /// A list, in the order in which they are to come, and how many of it have been taken.
    Planned { tasks: Vec<Task>, taken: usize },
    /// The rater, who has written one that nothing was done about yet.
    Typed { written: Option<Task> },
}

/// A rater's work.
#[derive(Clone, Debug)]
pub(crate) struct Desk {
    rater: String,
    seed: u64,
    source: Source,
    /// Judgements that hold, in the order in which they were made.
    live: Vec<Judgement>,
    /// Keys of their pairs.
    judged: BTreeSet<String>,
    /// How often the pair of a key was judged, taken back or not.
    attempts: BTreeMap<String, u32>,
    /// Pairs whose judgement was taken back; the last is shown first.
    returned: Vec<Pair>,
    /// Pairs that were sampled, in the order in which they are shown.
    ready: VecDeque<Pair>,
    /// Whether something is being sampled.
    sampling: bool,
    /// Whether the rater is here, so that it is worth sampling.
    here: bool,
    /// Keys of prompts to which all answers were alike.
    alike: BTreeSet<String>,
    /// Why nothing more can be sampled until the rater asks again.
    problem: Option<ApiError>,
}

/// How far a rater is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Pairs judged; where there is a list of prompts, of those that are in it.
    pub(crate) judged: usize,
    /// Pairs to judge, where that is known.
    pub(crate) total: Option<usize>,
    /// Of these, pairs that there will not be, as all answers were alike.
    pub(crate) alike: usize,
}

/// What is to be done about a judgement, or about taking one back.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Decision<T> {
    /// It is to be written down.
    Write(T),
    /// It stands there already.
    Nothing,
}

impl Desk {
    /// The desk of a rater who writes prompts.
    pub(crate) fn typed(seed: u64, rater: &str) -> Self {
        Self {
            rater: rater.into(),
            seed,
            source: Source::Typed { written: None },
            live: Vec::new(),
            judged: BTreeSet::new(),
            attempts: BTreeMap::new(),
            returned: Vec::new(),
            ready: VecDeque::new(),
            sampling: false,
            here: false,
            alike: BTreeSet::new(),
            problem: None,
        }
    }

    /// The desk of a rater who goes through `prompts`, which are all different, `rounds` times, each time in an order drawn
    /// from the seed and the rater.
    pub(crate) fn planned(seed: u64, rater: &str, prompts: &[Vec<Message>], rounds: u64) -> Self {
        let round = |count| {
            let mut tasks: Vec<Task> = prompts.iter().map(|prompt| Task::new(seed, rater, prompt, count)).collect();
            // Keys are digests, and so their order is drawn.
            tasks.sort_by(|a, b| a.key.cmp(&b.key));
            tasks
        };
        let tasks = (0..rounds).flat_map(round).collect();
        Self { source: Source::Planned { tasks, taken: 0 }, ..Self::typed(seed, rater) }
    }

    /// Takes in a line of the rater's that is in the file.
    pub(crate) fn apply(&mut self, line: Line) {
        match line {
            Line::Judgement(judgement) => {
                let Id { key, attempt } = &judgement.id;
                let attempts = self.attempts.entry(key.clone()).or_default();
                *attempts = (*attempts).max(*attempt);
                self.judged.insert(key.clone());
                self.returned.retain(|pair| pair.task.key != *key);
                self.ready.retain(|pair| pair.task.key != *key);
                self.live.push(*judgement);
            }
            Line::Undo(undo) => {
                let Some(at) = self.live.iter().rposition(|judgement| judgement.id == undo.undo) else { return };
                let Judgement { id, pair, .. } = self.live.remove(at);
                if !self.live.iter().any(|judgement| judgement.id.key == id.key) {
                    self.judged.remove(&id.key);
                    self.returned.push(pair);
                }
            }
        }
    }

    /// The pair to judge now, and the id of its judgement.
    pub(crate) fn offer(&self) -> Option<(Id, &Pair)> {
        self.offered().next()
    }

    /// All pairs that may be judged, the one to judge now first.
    fn offered(&self) -> impl Iterator<Item = (Id, &Pair)> {
        let pairs = self.returned.iter().rev().chain(&self.ready);
        pairs.map(|pair| (Id { key: pair.task.key.clone(), attempt: self.attempts(&pair.task.key) + 1 }, pair))
    }

    fn attempts(&self, key: &str) -> u32 {
        self.attempts.get(key).copied().unwrap_or_default()
    }

    /// The last judgement that holds, which may be taken back.
    pub(crate) fn last(&self) -> Option<&Judgement> {
        self.live.last()
    }

    /// All judgements that hold.
    pub(crate) fn live(&self) -> &[Judgement] {
        &self.live
    }

    /// How far the rater is.
    pub(crate) fn progress(&self) -> Progress {
        match &self.source {
            Source::Typed { .. } => Progress { judged: self.live.len(), total: None, alike: 0 },
            Source::Planned { tasks, .. } => {
                let judged = tasks.iter().filter(|task| self.judged.contains(&task.key)).count();
                Progress { judged, total: Some(tasks.len()), alike: self.alike.len() }
            }
        }
    }

    /// Whether the rater writes the prompts.
    pub(crate) fn is_typed(&self) -> bool {
        matches!(self.source, Source::Typed { .. })
    }

    /// Notes that the rater is here, and takes what stood in the way, if something did. Whether that changes anything.
    pub(crate) fn arrive(&mut self) -> (bool, Option<ApiError>) {
        let is_new = !std::mem::replace(&mut self.here, true);
        let problem = self.problem.take();
        (is_new || problem.is_some(), problem)
    }

    /// Whether there is no pair to judge yet, and will be one.
    pub(crate) fn is_waiting(&self) -> bool {
        self.offer().is_none() && (self.sampling || self.problem.is_some() || self.peek().is_some())
    }

    /// What would be sampled next.
    fn peek(&self) -> Option<(usize, &Task)> {
        match &self.source {
            Source::Typed { written } => written.as_ref().map(|task| (0, task)),
            Source::Planned { tasks, taken } => {
                let is_open =
                    |key: &String| !self.judged.contains(key) && self.returned.iter().all(|pair| pair.task.key != *key);
                (*taken..).zip(&tasks[*taken..]).find(|(_, task)| is_open(&task.key))
            }
        }
    }

    /// What to sample now, if anything; [`Self::sampled`] tells what came of it.
    pub(crate) fn next_task(&mut self) -> Option<Task> {
        if self.sampling || !self.here || self.problem.is_some() || self.ready.len() >= AHEAD {
            return None;
        }
        let (at, task) = self.peek().map(|(at, task)| (at, task.clone()))?;
        match &mut self.source {
            Source::Typed { written } => *written = None,
            Source::Planned { taken, .. } => *taken = at + 1,
        }
        self.sampling = true;
        Some(task)
    }

    /// Takes in what was sampled for a task: a pair, or nothing where all answers were alike.
    pub(crate) fn sampled(&mut self, task: &Task, sampled: Result<Option<Pair>, ApiError>) {
        self.sampling = false;
        match sampled {
            Ok(Some(pair)) => self.ready.push_back(pair),
            Ok(None) if self.is_typed() => {
                let why = "the model gave the same answer again and again; ask something else, or start `lockstep rate` with a \
                           higher --temperature";
                self.problem = Some(ApiError::conflict("alike", why));
            }
            Ok(None) => {
                self.alike.insert(task.key.clone());
            }
            Err(problem) => {
                self.problem = Some(problem);
                // It is next again.
                match &mut self.source {
                    Source::Typed { .. } => {}
                    Source::Planned { tasks, taken } => {
                        *taken = tasks.iter().position(|other| other.key == task.key).unwrap_or(*taken);
                    }
                }
            }
        }
    }

    /// Takes in what the rater asks the model.
    ///
    /// # Errors
    /// If prompts come from a list, or an earlier one is not judged yet.
    pub(crate) fn write(&mut self, prompt: &[Message]) -> Result<(), ApiError> {
        let is_busy = self.sampling || self.offer().is_some();
        let Source::Typed { written } = &mut self.source else {
            return Err(ApiError::conflict("prompts_given", "prompts come from a list here"));
        };
        if is_busy || written.is_some() {
            return Err(ApiError::conflict("pair_waits", "a pair of answers is to be judged first"));
        }
        let mut tasks = (0..).map(|count| Task::new(self.seed, &self.rater, prompt, count));
        *written = tasks.find(|task| !self.attempts.contains_key(&task.key));
        self.problem = None;
        Ok(())
    }

    /// Whether the judgement `id` is to be written down, and of which pair.
    ///
    /// # Errors
    /// If the pair was judged otherwise, if the judgement was taken back, or if there is no such pair.
    pub(crate) fn judge(&self, id: &Id, choice: Choice) -> Result<Decision<Pair>, ApiError> {
        if let Some(judgement) = self.live.iter().rfind(|judgement| judgement.id == *id) {
            return match judgement.choice == choice {
                true => Ok(Decision::Nothing),
                false => {
                    let why = "the pair was judged otherwise before, perhaps in another tab; take that back first";
                    Err(ApiError::conflict("judged_otherwise", why))
                }
            };
        }
        if id.attempt <= self.attempts(&id.key) {
            return Err(ApiError::conflict(
                "taken_back",
                "this judgement was taken back; judge the pair as it is shown now",
            ));
        }
        match self.offered().find(|(offered, _)| offered == id) {
            Some((_, pair)) => Ok(Decision::Write(pair.clone())),
            None => Err(ApiError::unknown("unknown_pair", format!("there is no pair {id} to judge"))),
        }
    }

    /// Whether it is to be written down that the judgement `id` is taken back.
    ///
    /// # Errors
    /// If it is not the last, or there is none.
    pub(crate) fn undo(&self, id: &Id) -> Result<Decision<()>, ApiError> {
        if self.last().is_some_and(|last| last.id == *id) {
            return Ok(Decision::Write(()));
        }
        if self.live.iter().any(|judgement| judgement.id == *id) {
            return Err(ApiError::conflict(
                "not_last",
                "other judgements were made since; take back the last one first",
            ));
        }
        match id.attempt <= self.attempts(&id.key) {
            true => Ok(Decision::Nothing),
            false => Err(ApiError::unknown("unknown_judgement", format!("there is no judgement {id}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::preferences::Undo;
    use super::super::preferences::tests::pair;
    use super::super::prompts::asked;
    use super::*;

    fn prompts(count: usize) -> Vec<Vec<Message>> {
        (0..count).map(|number| asked(format!("prompt {number}"))).collect()
    }

    fn answered(task: &Task) -> Pair {
        Pair { task: task.clone(), ..pair(0, "", ["a", "b"]) }
    }

    /// Samples all that is wanted.
    fn sample(desk: &mut Desk) {
        while let Some(task) = desk.next_task() {
            desk.sampled(&task, Ok(Some(answered(&task))));
        }
    }

    fn offer(desk: &Desk) -> Id {
        desk.offer().expect("a pair is there").0
    }

    /// Judges as the server does; what was written.
    fn judge(desk: &mut Desk, id: &Id, choice: Choice) -> Option<Line> {
        let Ok(Decision::Write(pair)) = desk.judge(id, choice) else { return None };
        let line = Line::Judgement(Box::new(Judgement {
            id: id.clone(),
            pair,
            choice,
            rater: desk.rater.clone(),
            unix_ms: 0,
        }));
        desk.apply(line.clone());
        Some(line)
    }

    fn undo(desk: &mut Desk, id: &Id) -> Option<Line> {
        let Ok(Decision::Write(())) = desk.undo(id) else { return None };
        let line = Line::Undo(Undo { undo: id.clone(), rater: desk.rater.clone(), unix_ms: 0 });
        desk.apply(line.clone());
        Some(line)
    }

    fn code<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        result.unwrap_err().to_json()["error"]["code"].as_str().unwrap().into()
    }

    #[test]
    fn pairs_are_sampled_ahead_once_the_rater_is_here() {
        let mut desk = Desk::planned(1, "ann", &prompts(5), 1);
        assert_eq!((desk.next_task(), desk.is_waiting()), (None, true));
        assert_eq!((desk.arrive(), desk.arrive()), ((true, None), (false, None)));
        let first = desk.next_task().unwrap();
        assert_eq!(desk.next_task(), None, "one at a time");
        desk.sampled(&first, Ok(Some(answered(&first))));
        assert!(!desk.is_waiting());
        let second = desk.next_task().unwrap();
        desk.sampled(&second, Ok(Some(answered(&second))));
        assert_eq!(desk.next_task(), None, "enough ahead");
        let id = offer(&desk);
        assert_eq!(id.key, first.key);
        assert!(judge(&mut desk, &id, Choice::Tie).is_some());
        assert_eq!((offer(&desk).key, desk.next_task().is_some()), (second.key, true));
    }

    #[test]
    fn raters_go_through_all_prompts_in_orders_of_their_own() {
        let order = |rater: &str, seed| {
            let mut desk = Desk::planned(seed, rater, &prompts(20), 2);
            desk.arrive();
            let mut seen = Vec::new();
            for done in 0.. {
                sample(&mut desk);
                assert_eq!(desk.progress(), Progress { judged: done, total: Some(40), alike: 0 });
                let Some((id, pair)) = desk.offer() else { break };
                seen.push(pair.task.prompt[0].content.clone());
                assert!(judge(&mut desk, &id, Choice::First).is_some());
            }
            assert!(!desk.is_waiting());
            seen
        };
        let ann = order("ann", 1);
        let sorted = |half: &[String]| half.iter().cloned().collect::<BTreeSet<_>>();
        assert_eq!((ann.len(), sorted(&ann[..20]).len(), sorted(&ann[20..]).len()), (40, 20, 20));
        assert_eq!(ann, order("ann", 1));
        assert!(ann[..20] != ann[20..] && ann != order("bob", 1) && ann != order("ann", 2));
    }

    #[test]
    fn a_judgement_counts_once_and_can_be_taken_back() {
        let mut desk = Desk::planned(1, "ann", &prompts(3), 1);
        desk.arrive();
        sample(&mut desk);
        let first = offer(&desk);
        assert!(judge(&mut desk, &first, Choice::First).is_some());
        // Sent twice, from two tabs, or after it was taken back.
        assert_eq!(desk.judge(&first, Choice::First), Ok(Decision::Nothing));
        assert_eq!(code(desk.judge(&first, Choice::Tie)), "judged_otherwise");
        let second = offer(&desk);
        assert!(judge(&mut desk, &second, Choice::BothBad).is_some());
        assert_eq!(code(desk.undo(&first)), "not_last");
        assert!(undo(&mut desk, &second).is_some());
        assert_eq!(desk.undo(&second), Ok(Decision::Nothing));
        assert_eq!(code(desk.judge(&second, Choice::BothBad)), "taken_back");
        assert_eq!(offer(&desk), Id { attempt: 2, ..second.clone() });
        assert!(undo(&mut desk, &first).is_some());
        assert_eq!((offer(&desk).key, desk.progress().judged), (first.key.clone(), 0));
        let again = offer(&desk);
        assert!(judge(&mut desk, &again, Choice::Second).is_some());
        // The other tab still shows what was sampled before: that may be judged, too.
        sample(&mut desk);
        let later = Id { key: desk.ready[0].task.key.clone(), attempt: 1 };
        assert!(judge(&mut desk, &later, Choice::Tie).is_some());
        assert_eq!(offer(&desk), Id { attempt: 2, ..second });

        let nothing = Id { key: "f".repeat(16), attempt: 1 };
        assert_eq!(code(desk.judge(&nothing, Choice::Tie)), "unknown_pair");
        assert_eq!(code(desk.undo(&nothing)), "unknown_judgement");
        assert_eq!(code(desk.judge(&Id { attempt: 4, ..first }, Choice::Tie)), "unknown_pair");
    }

    #[test]
    fn prompts_whose_answers_are_alike_are_passed_over_and_failures_are_tried_again() {
        let mut desk = Desk::planned(1, "ann", &prompts(2), 1);
        desk.arrive();
        let first = desk.next_task().unwrap();
        desk.sampled(&first, Err(ApiError::stopping()));
        assert_eq!((desk.next_task(), desk.is_waiting()), (None, true));
        assert_eq!(desk.arrive(), (true, Some(ApiError::stopping())));
        assert_eq!(desk.next_task().as_ref(), Some(&first));
        desk.sampled(&first, Ok(None));
        sample(&mut desk);
        let id = offer(&desk);
        assert!(id.key != first.key && judge(&mut desk, &id, Choice::Tie).is_some());
        assert_eq!((desk.progress(), desk.is_waiting()), (Progress { judged: 1, total: Some(2), alike: 1 }, false));
    }

    #[test]
    fn a_rater_may_write_one_prompt_after_the_other() {
        let mut desk = Desk::typed(1, "ann");
        desk.arrive();
        assert!(desk.next_task().is_none() && !desk.is_waiting());
        desk.write(&asked("a".into())).unwrap();
        assert!(desk.is_waiting());
        assert_eq!(code(desk.write(&asked("b".into()))), "pair_waits");
        sample(&mut desk);
        assert_eq!(code(desk.write(&asked("b".into()))), "pair_waits");
        let id = offer(&desk);
        assert!(judge(&mut desk, &id, Choice::First).is_some());
        // The same once more has another pair.
        desk.write(&asked("a".into())).unwrap();
        let task = desk.next_task().unwrap();
        assert_ne!(task.key, id.key);
        desk.sampled(&task, Ok(None));
        assert!(desk.is_waiting() && desk.arrive().1.is_some() && !desk.is_waiting());
        assert_eq!(desk.progress(), Progress { judged: 1, total: None, alike: 0 });
        assert_eq!(code(Desk::planned(1, "ann", &prompts(1), 1).write(&asked("a".into()))), "prompts_given");
    }

    proptest! {
        /// A desk made anew from the lines that were written goes on where this one is, whatever was done.
        #[test]
        fn a_restart_goes_on_where_the_file_says(actions in prop::collection::vec(0..6u8, 0..60), rounds in 1..3u64) {
            let fresh = || Desk::planned(3, "ann", &prompts(4), rounds);
            let (mut desk, mut lines) = (fresh(), Vec::new());
            desk.arrive();
            for action in actions {
                sample(&mut desk);
                let choices = [Choice::First, Choice::Second, Choice::Tie, Choice::BothBad];
                let id = desk.offer().map(|(id, _)| id);
                let last = desk.last().map(|last| last.id.clone());
                match (choices.get(usize::from(action)), id, last) {
                    (Some(&choice), Some(id), _) => lines.extend(judge(&mut desk, &id, choice)),
                    (None, _, Some(last)) => lines.extend(undo(&mut desk, &last)),
                    _ => {}
                }
                let mut restarted = fresh();
                lines.iter().for_each(|line| restarted.apply(line.clone()));
                restarted.arrive();
                sample(&mut restarted);
                prop_assert_eq!(restarted.progress(), desk.progress());
                prop_assert_eq!(restarted.live(), desk.live());
                sample(&mut desk);
                prop_assert_eq!(restarted.offer(), desk.offer());
            }
            // No two judgements have the same id.
            let ids = lines.iter().filter_map(|line| match line {
                Line::Judgement(judgement) => Some(judgement.id.to_string()),
                Line::Undo(_) => None,
            });
            let ids: Vec<String> = ids.collect();
            prop_assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len());
        }
    }
}
