//! Processes of this very program that `train` starts, and starts again when they die.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::process::Command;

/// A child that ends sooner than this after its start counts as failed to start.
const STARTED: Duration = Duration::from_secs(5);
/// Failed starts in a row after which a child is not started again.
pub(crate) const ATTEMPTS: u32 = 3;

/// A command of this program, as a child that does not outlive this process: its standard input is a pipe, which ends when
/// this process does.
///
/// # Errors
/// If the program's own file cannot be found.
pub(crate) fn command(name: &str) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("the program's own file cannot be found")?;
    let mut command = Command::new(program);
    // Ctrl-C in a terminal reaches every process of the group: it is for `train` to decide what follows.
    #[cfg(unix)]
    command.process_group(0);
    #[cfg(windows)]
    command.creation_flags(0x200); // CREATE_NEW_PROCESS_GROUP
    command.arg(name).stdin(Stdio::piped()).kill_on_drop(true);
    Ok(command)
}

/// The starts of one child.
#[derive(Debug)]
pub(crate) struct Starts {
    last: Instant,
    failures: u32,
}

impl Starts {
    /// Before the first one.
    pub(crate) fn new() -> Self {
        Self { last: Instant::now(), failures: 0 }
    }

    /// Another one.
    pub(crate) fn started(&mut self) {
        self.last = Instant::now();
    }

    /// The child ended; says whether to give it up.
    pub(crate) fn ended(&mut self) -> bool {
        self.failures = if self.last.elapsed() < STARTED { self.failures + 1 } else { 0 };
        self.failures >= ATTEMPTS
    }
}
