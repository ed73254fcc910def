//! Processes of this very program that `train` starts, and starts again when they die.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

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

/// What can befall a child from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blow {
    /// Its end, without a word.
    Kill,
    /// It stands still.
    Stop,
    /// It goes on.
    Continue,
}

/// A child over all its starts, from the side of who keeps it running.
#[derive(Debug)]
pub(crate) struct Watched {
    blows: mpsc::UnboundedReceiver<Blow>,
    started: Instant,
    failures: u32,
    killed: bool,
}

impl Watched {
    /// A child to start, and what can be sent to befall it whenever it runs.
    pub(crate) fn new() -> (Self, mpsc::UnboundedSender<Blow>) {
        let (sender, blows) = mpsc::unbounded_channel();
        (Self { blows, started: Instant::now(), failures: 0, killed: false }, sender)
    }

    /// It is started.
    pub(crate) fn started(&mut self) {
        // What was meant for the process before.
        while self.blows.try_recv().is_ok() {}
        (self.started, self.killed) = (Instant::now(), false);
    }

    /// Waits for its end, and deals it meanwhile what is to befall it. May be dropped before, and nothing is lost.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) async fn end(&mut self, child: &mut Child) -> io::Result<ExitStatus> {
        loop {
            tokio::select! {
                status = child.wait() => return status,
                Some(blow) = self.blows.recv() => self.killed |= deal(child, blow) && blow == Blow::Kill,
            }
        }
    }

    /// It ended; says whether to give it up. That it was killed is not held against it.
    pub(crate) fn ended(&mut self) -> bool {
        if !self.killed {
            self.failures = if self.started.elapsed() < STARTED { self.failures + 1 } else { 0 };
        }
        self.failures >= ATTEMPTS
    }
}

/// Says whether it arrived. The process is our child and not waited for yet, so that its number is nobody else's.
#[cfg(unix)]
fn deal(child: &Child, blow: Blow) -> bool {
    use rustix::process::{Pid, Signal, kill_process};
    let signal = match blow {
        Blow::Kill => Signal::KILL,
        Blow::Stop => Signal::STOP,
        Blow::Continue => Signal::CONT,
    };
    let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    id.is_some_and(|id| kill_process(id, signal).is_ok())
}

/// There are no such signals.
#[cfg(not(unix))]
fn deal(_: &Child, _: Blow) -> bool {
    false
}
