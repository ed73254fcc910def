//! What happened, in order: a hash of all of it, by which two runs of a seed are compared, and the last of it in full.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};

use lockstep_coordinator::engine::event::BlockDone;
use lockstep_coordinator::engine::{Command, Event, Time};

/// So much is kept for whoever has to find out what went wrong.
const KEPT: usize = 60;

/// Something that happened.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    /// The engine heard something.
    Event(Event),
    /// The engine decided something.
    Command(Command),
    /// Something else, in words.
    Note(String),
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(Event::BlockDone(done)) => {
                let BlockDone { worker, lease, step, version, task, block, norm, .. } = done;
                write!(f, "  result of worker {worker} for lease {lease}: {task} of block {block} of step {step} ")?;
                write!(f, "with version {version}, norm {norm:?}")
            }
            Self::Event(event) => write!(f, "  {event:?}"),
            Self::Command(command) => write!(f, "    -> {command}"),
            Self::Note(note) => write!(f, "* {note}"),
        }
    }
}

/// The course of a run.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: Fnv,
    recent: VecDeque<(Time, Entry)>,
    /// Print everything as it happens.
    verbose: bool,
    entries: u64,
}

impl Trace {
    pub(crate) fn new(verbose: bool) -> Self {
        Self { hash: Fnv(0xcbf2_9ce4_8422_2325), recent: VecDeque::new(), verbose, entries: 0 }
    }

    pub(crate) fn add(&mut self, now: Time, entry: Entry) {
        // A hash takes whatever is written to it.
        let _ = write!(self.hash, "{} {entry:?}", now.0.as_nanos());
        self.entries += 1;
        if self.verbose {
            println!("{:10.4} {entry}", now.0.as_secs_f64());
        }
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back((now, entry));
    }

    /// Of all that happened.
    pub(crate) fn hash(&self) -> u64 {
        self.hash.0
    }

    /// How much happened.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// The last of it, a line each.
    pub(crate) fn recent(&self) -> String {
        self.recent.iter().fold(String::new(), |mut text, (time, entry)| {
            let _ = writeln!(text, "{:10.4} {entry}", time.0.as_secs_f64());
            text
        })
    }
}

/// FNV-1a with 64 bits.
#[derive(Debug)]
struct Fnv(u64);

impl fmt::Write for Fnv {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Ok(())
    }
}
