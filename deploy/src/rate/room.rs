//! All desks, and the file that they write: decisions of the desks are carried out here.
//!
//! Whoever writes holds the file from the decision to the end of the line, so that nothing changes in between; desks are held
//! for moments alone, and readers do not wait for the disk.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lockstep_model::chat_template::Message;
use tokio::sync::watch;

use super::desk::{Decision, Desk};
use super::pair::{Pair, Task};
use super::preferences::{Choice, Id, Judgement, Line, PreferenceFile, Undo};
use crate::web::error::ApiError;
use crate::web::since_1970;

/// Raters at their desks.
pub(crate) struct Room {
    file: Mutex<PreferenceFile>,
    desks: Mutex<BTreeMap<String, Desk>>,
    /// Tells all who wait that something has changed.
    changed: watch::Sender<()>,
}

impl Room {
    /// A room whose judgements go to `file`. `desks` know what is in it.
    pub(crate) fn new(file: PreferenceFile, desks: BTreeMap<String, Desk>) -> Self {
        Self { file: Mutex::new(file), desks: Mutex::new(desks), changed: watch::Sender::new(()) }
    }

    /// Tells of each change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What `look` finds at a rater's desk.
    pub(crate) fn look<T>(&self, rater: &str, look: impl FnOnce(&Desk) -> T) -> T {
        look(&self.desks()[rater])
    }

    /// All desks.
    pub(crate) fn desks(&self) -> MutexGuard<'_, BTreeMap<String, Desk>> {
        self.desks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a rater's desk, and tells who waits.
    fn change<T>(&self, rater: &str, change: impl FnOnce(&mut Desk) -> T) -> T {
        let changed = change(self.desks().get_mut(rater).expect("every rater has a desk"));
        self.changed.send_replace(());
        changed
    }

    /// Notes that a rater is here.
    ///
    /// # Errors
    /// What stood in the way of the next pair, once.
    pub(crate) fn arrive(&self, rater: &str) -> Result<(), ApiError> {
        let (changes, problem) = self.desks().get_mut(rater).map_or((false, None), Desk::arrive);
        if changes {
            self.changed.send_replace(());
        }
        problem.map_or(Ok(()), Err)
    }

    /// What to sample for a rater now, if anything.
    pub(crate) fn next_task(&self, rater: &str) -> Option<Task> {
        self.desks().get_mut(rater).and_then(Desk::next_task)
    }

    /// Takes in what came of it.
    pub(crate) fn sampled(&self, rater: &str, task: &Task, sampled: Result<Option<Pair>, ApiError>) {
        self.change(rater, |desk| desk.sampled(task, sampled));
    }

    /// Takes in what a rater asks the model.
    ///
    /// # Errors
    /// If it is not the time for it.
    pub(crate) fn write(&self, rater: &str, prompt: &[Message]) -> Result<(), ApiError> {
        self.change(rater, |desk| desk.write(prompt))
    }

    /// Writes a judgement down. It is on the disk when this returns. Once more, it changes nothing.
    ///
    /// # Errors
    /// If the judgement does not fit, or cannot be written.
    pub(crate) fn judge(&self, rater: &str, id: Id, choice: Choice) -> Result<(), ApiError> {
        let mut file = self.file();
        match self.look(rater, |desk| desk.judge(&id, choice))? {
            Decision::Nothing => Ok(()),
            Decision::Write(pair) => {
                let judgement = Judgement { id, pair, choice, rater: rater.into(), unix_ms: unix_ms() };
                self.commit(&mut file, Line::Judgement(judgement.into()))
            }
        }
    }

    /// Writes down that a judgement is taken back. It is on the disk when this returns. Once more, it changes nothing.
    ///
    /// # Errors
    /// If it is not the last one, or this cannot be written.
    pub(crate) fn undo(&self, rater: &str, id: Id) -> Result<(), ApiError> {
        let mut file = self.file();
        match self.look(rater, |desk| desk.undo(&id))? {
            Decision::Nothing => Ok(()),
            Decision::Write(()) => {
                let undo = Undo { undo: id, rater: rater.into(), unix_ms: unix_ms() };
                self.commit(&mut file, Line::Undo(undo))
            }
        }
    }

    fn commit(&self, file: &mut PreferenceFile, line: Line) -> Result<(), ApiError> {
        file.append(&line).map_err(|error| {
            tracing::error!("{error:#}");
            ApiError::internal(format!("this was not kept: {error:#}"))
        })?;
        let rater = line.rater().to_owned();
        self.change(&rater, |desk| desk.apply(line));
        Ok(())
    }

    fn file(&self) -> MutexGuard<'_, PreferenceFile> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unix_ms() -> u64 {
    since_1970().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::super::pair::Pair;
    use super::super::preferences::tests::pair;
    use super::super::prompts::asked;
    use super::*;

    /// A room with one rater, who has a pair to judge.
    fn room(file: PreferenceFile) -> (Room, Id) {
        let mut desk = Desk::planned(1, "ann", &[asked("a".into()), asked("b".into())], 1);
        desk.arrive();
        let task = desk.next_task().unwrap();
        desk.sampled(&task, Ok(Some(Pair { task: task.clone(), ..pair(0, "", ["x", "y"]) })));
        let id = desk.offer().unwrap().0;
        (Room::new(file, [("ann".into(), desk)].into()), id)
    }

    #[test]
    fn what_cannot_be_written_down_is_not_judged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        let (file, _) = PreferenceFile::open(&path).unwrap();
        let (room, id) = room(file.unwritable());
        let said = room.judge("ann", id.clone(), Choice::First).unwrap_err().to_json()["error"]["message"].to_string();
        assert!(said.contains("this was not kept: ") && said.contains("free space or make it writable"), "{said}");
        assert_eq!(room.look("ann", |desk| (desk.progress().judged, desk.offer().unwrap().0)), (0, id));
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn whoever_waits_is_told_of_each_change() {
        let dir = tempfile::tempdir().unwrap();
        let (file, _) = PreferenceFile::open(&dir.path().join("p.jsonl")).unwrap();
        let (room, id) = room(file);
        let mut changes = room.changes();
        let mut changed = || {
            let changed = changes.has_changed().unwrap();
            changes.mark_unchanged();
            changed
        };
        room.arrive("ann").unwrap();
        assert!(!changed(), "the rater was here before");
        room.judge("ann", id.clone(), Choice::Tie).unwrap();
        assert!(changed());
        room.judge("ann", id.clone(), Choice::Tie).unwrap();
        assert!(!changed(), "the same once more");
        room.undo("ann", id).unwrap();
        assert!(changed());
        let task = room.next_task("ann").unwrap();
        room.sampled("ann", &task, Ok(None));
        assert!(changed());
    }
}
