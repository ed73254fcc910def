//! `ledger.jsonl`: what each committed step was trained on, and whose results counted.
//!
//! A lease goes out with the digest of each of its slots; a result comes back with the digest of what was computed. Those
//! of accepted results are what a step was trained on, and at its commit every slot must be there once.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, bail};
use lockstep_model::digest::hex;
use lockstep_model::ledger::Ledger;
use serde::{Deserialize, Serialize};

use crate::engine::command::{Lease, Task};
use crate::engine::{LeaseId, WorkerId};
use crate::journal::Journal;
use crate::sent::{Sent, SentRows};

/// Bytes of a slot's digest that a line shows; the step's digest covers all of it.
const SHOWN_BYTES: usize = 8;

/// A committed step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The step, from 1.
    pub step: u64,
    /// Sequences in it.
    pub rows: u64,
    /// The first 16 hexadecimal digits of each slot's digest, in order.
    pub slots: Vec<String>,
    /// Of each slot, the name of the worker whose result counted.
    pub by: Vec<String>,
    /// Digest of the run's [`Ledger`] after the step.
    pub sha256: String,
}

/// What a line shows of a slot's digest.
pub fn shown(slot_sha256: &[u8; 32]) -> String {
    hex(&slot_sha256[..SHOWN_BYTES])
}

/// The open file, and what the step under way is trained on.
#[derive(Debug)]
pub(crate) struct LedgerFile {
    journal: Journal<Line>,
    ledger: Ledger,
    rows_per_step: u64,
    sent: SentRows,
    /// Of each slot of the step under way what was accepted, and from whom.
    accepted: Vec<Option<([u8; 32], String)>>,
}

impl LedgerFile {
    /// Opens `path` where a run of `slots` slots and `rows_per_step` sequences a step goes on: after the steps of `ledger`,
    /// the last of whose lines has the seal `sealed`. Later lines are dropped.
    ///
    /// # Errors
    /// If the file cannot be read or cut, or holds something else.
    pub(crate) fn open(
        path: &Path,
        ledger: Ledger,
        sealed: &str,
        slots: u32,
        rows_per_step: u64,
    ) -> anyhow::Result<Self> {
        let (mut last, steps) = (None, ledger.steps);
        let journal = Journal::open(path, up_to(steps), Some(sealed), |line: Line| last = Some(line))?;
        if last.map_or(steps > 0, |last| last.step != steps || last.sha256 != hex(&ledger.sha256)) {
            tracing::warn!(
                "{}: does not agree with the checkpoint of step {steps}; the run goes on, and `lockstep verify` says what \
                 is wrong with the file",
                path.display()
            );
        }
        let accepted = vec![None; slots as usize];
        Ok(Self { journal, ledger, rows_per_step, sent: SentRows::default(), accepted })
    }

    /// Goes back to the steps of `ledger`, and forgets all leases and what was accepted since.
    ///
    /// # Errors
    /// If the file cannot be read or cut.
    pub(crate) fn truncate(&mut self, ledger: Ledger) -> anyhow::Result<()> {
        self.journal.truncate(up_to(ledger.steps), |_| {})?;
        self.ledger = ledger;
        self.sent.clear();
        self.restart();
        Ok(())
    }

    /// Forgets what was accepted for the step under way.
    pub(crate) fn restart(&mut self) {
        self.accepted.fill(None);
    }

    /// Remembers the digests of the slots that a lease was sent to a worker with.
    pub(crate) fn lend(
        &mut self,
        worker: WorkerId,
        name: &str,
        lease: &Lease,
        slots: Range<u32>,
        digests: Vec<[u8; 32]>,
    ) {
        self.sent.lend(worker, lease.id, Sent { task: lease.task, name: name.into(), slots, digests });
    }

    /// Whether what a worker computed under a lease is what it was sent; if not, says so. A lease that is not open is for
    /// the engine to judge.
    pub(crate) fn check(&self, worker: WorkerId, lease: LeaseId, computed: [u8; 32]) -> Result<(), String> {
        self.sent.check(worker, lease, computed)
    }

    /// The result of a worker's lease counts: its slots, if they are trained on, are those of the step under way.
    ///
    /// # Errors
    /// If a slot counts already, or nothing is known of the lease.
    pub(crate) fn accept(&mut self, worker: WorkerId, lease: LeaseId) -> anyhow::Result<()> {
        let sent = self.sent.take(worker, lease);
        let Sent { task, name, slots, digests } =
            sent.with_context(|| format!("lease {lease} of worker {worker} counts, and was never sent"))?;
        if task != Task::Gradient {
            return Ok(());
        }
        for (slot, digest) in slots.zip(digests) {
            let place = self.accepted.get_mut(slot as usize).with_context(|| format!("there is no slot {slot}"))?;
            if let Some((_, first)) = place.replace((digest, name.clone())) {
                bail!("slot {slot} of step {} counts twice: from {first} and from {name}", self.ledger.steps + 1);
            }
        }
        Ok(())
    }

    /// The result of a worker's lease does not, or will not, count.
    pub(crate) fn discard(&mut self, worker: WorkerId, lease: LeaseId) {
        self.sent.take(worker, lease);
    }

    /// Step `step` is committed: writes its line.
    ///
    /// # Errors
    /// If it is not the next one, a slot is missing, or the system refuses.
    pub(crate) fn commit(&mut self, step: u64) -> anyhow::Result<()> {
        if step != self.ledger.steps + 1 {
            bail!("step {step} is committed after step {}", self.ledger.steps);
        }
        let (mut digests, mut by) = (Vec::new(), Vec::new());
        for (slot, accepted) in self.accepted.iter_mut().enumerate() {
            let (digest, worker) =
                accepted.take().with_context(|| format!("step {step} is committed without slot {slot}"))?;
            digests.push(digest);
            by.push(worker);
        }
        self.ledger.commit(self.rows_per_step, &digests);
        let slots = digests.iter().map(shown).collect();
        let line = Line { step, rows: self.rows_per_step, slots, by, sha256: hex(&self.ledger.sha256) };
        self.journal.append(&line)
    }

    /// The steps committed so far.
    pub(crate) fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// The last line's seal.
    pub(crate) fn seal(&self) -> &str {
        self.journal.seal()
    }

    /// A handle by which what was written so far can be flushed to the disk.
    ///
    /// # Errors
    /// If the system has no more handles.
    pub(crate) fn handle(&self) -> anyhow::Result<File> {
        self.journal.handle()
    }
}

/// Whether a line belongs to the part of a run up to step `step`.
pub fn up_to(step: u64) -> impl Fn(&Line) -> bool {
    move |line| line.step <= step
}

#[cfg(test)]
mod tests {
    use lockstep_model::ledger;
    use lockstep_model::tree::Block;

    use super::*;
    use crate::journal;

    const SLOTS: u32 = 3;

    /// Who holds all leases but where it is said otherwise.
    const HOLDER: WorkerId = WorkerId(1);

    fn new(path: &Path) -> LedgerFile {
        LedgerFile::open(path, Ledger::default(), "", SLOTS, 6).unwrap()
    }

    fn digest(step: u64, slot: u32) -> [u8; 32] {
        [step as u8 * 16 + slot as u8; 32]
    }

    /// Lends slots of a step under a lease.
    fn lend(file: &mut LedgerFile, lease: u64, worker: &str, step: u64, slots: Range<u32>) {
        let digests = slots.clone().map(|slot| digest(step, slot)).collect();
        // What the block is does not matter here, as its slots are given.
        let (id, block) = (LeaseId(lease), Block::leaf(slots.start));
        let lease = Lease { id, step, version: step - 1, task: Task::Gradient, block };
        file.lend(HOLDER, worker, &lease, slots, digests);
    }

    fn step(file: &mut LedgerFile, step: u64) {
        lend(file, step * 10, "slow", step, 2..3);
        lend(file, step * 10 + 1, "fast", step, 0..2);
        file.accept(HOLDER, LeaseId(step * 10 + 1)).unwrap();
        file.accept(HOLDER, LeaseId(step * 10)).unwrap();
        file.commit(step).unwrap();
    }

    fn lines(path: &Path) -> Vec<Line> {
        let entries = journal::read(path).unwrap().into_iter();
        let whole = |entry: journal::Entry<Line>| entry.line.ok().filter(|_| entry.follows).unwrap();
        entries.map(whole).collect()
    }

    #[test]
    fn a_step_s_line_says_what_it_was_trained_on_and_by_whom() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut file = new(&path);
        step(&mut file, 1);
        let mut ledger = Ledger::default();
        ledger.commit(6, &[0, 1, 2].map(|slot| digest(1, slot)));
        assert_eq!(file.ledger(), ledger);
        let slots = ["1010101010101010", "1111111111111111", "1212121212121212"].map(String::from).into();
        let by = ["fast", "fast", "slow"].map(String::from).into();
        assert_eq!(lines(&path), [Line { step: 1, rows: 6, slots, by, sha256: hex(&ledger.sha256) }]);
    }

    #[test]
    fn each_slot_counts_once_and_none_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = new(&dir.path().join("ledger.jsonl"));
        lend(&mut file, 1, "a", 1, 0..2);
        lend(&mut file, 2, "b", 1, 1..2);
        file.accept(HOLDER, LeaseId(1)).unwrap();
        let said = file.accept(HOLDER, LeaseId(2)).unwrap_err().to_string();
        assert_eq!(said, "slot 1 of step 1 counts twice: from a and from b");
        let said = file.commit(1).unwrap_err().to_string();
        assert_eq!(said, "step 1 is committed without slot 2");
        assert!(file.accept(HOLDER, LeaseId(1)).unwrap_err().to_string().contains("lease 1"), "it is no longer open");
        assert!(file.commit(5).unwrap_err().to_string().contains("step 5"));
    }

    #[test]
    fn what_was_computed_must_be_what_was_sent() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = new(&dir.path().join("ledger.jsonl"));
        lend(&mut file, 1, "a", 1, 0..2);
        let sent = ledger::block_sha256([digest(1, 0), digest(1, 1)]);
        assert_eq!(file.check(HOLDER, LeaseId(1), sent), Ok(()));
        let said = file.check(HOLDER, LeaseId(1), [9; 32]).unwrap_err();
        assert!(said.contains("other rows for lease 1") && said.contains("0909090909090909"), "{said}");
        file.discard(HOLDER, LeaseId(1));
        assert_eq!(file.check(HOLDER, LeaseId(1), [9; 32]), Ok(()), "the engine judges leases that are not open");
    }

    #[test]
    fn what_one_says_of_another_s_lease_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = new(&dir.path().join("ledger.jsonl"));
        lend(&mut file, 1, "holder", 1, 0..3);
        let other = WorkerId(2);
        assert_eq!(file.check(other, LeaseId(1), [9; 32]), Ok(()), "for the engine to judge");
        file.discard(other, LeaseId(1));
        assert!(file.accept(other, LeaseId(1)).unwrap_err().to_string().contains("lease 1 of worker 2"));
        file.accept(HOLDER, LeaseId(1)).unwrap();
        file.commit(1).unwrap();
    }

    #[test]
    fn going_back_is_as_if_nothing_had_been() {
        let dir = tempfile::tempdir().unwrap();
        let (path, quiet) = (dir.path().join("ledger.jsonl"), dir.path().join("quiet.jsonl"));
        let mut file = new(&path);
        (1..=2).for_each(|s| step(&mut file, s));
        let (saved, sealed) = (file.ledger(), file.seal().to_string());
        (3..=5).for_each(|s| step(&mut file, s));
        lend(&mut file, 99, "fast", 6, 0..2);
        file.accept(HOLDER, LeaseId(99)).unwrap();
        file.truncate(saved).unwrap();
        lend(&mut file, 100, "fast", 3, 0..2);
        file.accept(HOLDER, LeaseId(100)).unwrap();
        file.restart();
        step(&mut file, 3);
        drop(file);
        let mut resumed = LedgerFile::open(&path, saved, &sealed, SLOTS, 6).unwrap();
        (3..=4).for_each(|s| step(&mut resumed, s));

        let mut file = new(&quiet);
        (1..=4).for_each(|s| step(&mut file, s));
        assert_eq!((file.ledger(), file.seal()), (resumed.ledger(), resumed.seal()));
        assert_eq!(lines(&path), lines(&quiet));
    }
}
