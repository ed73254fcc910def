//! Processes that tests start: none outlives its test, and none runs for ever.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// After so long a process is killed: whatever waits for it hears of its end, and fails.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// A process that dies with this value.
pub(crate) struct Running {
    child: Child,
    lines: Option<BufReader<ChildStderr>>,
    /// All that was read so far.
    pub(crate) said: String,
    _limit: Limit,
}

impl Running {
    /// Starts a program whose standard error is read.
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program starts");
        let lines = child.stderr.take().map(BufReader::new);
        let _limit = Limit::of(&child);
        Self { child, lines, said: String::new(), _limit }
    }

    /// Reads on until a line contains `wanted`, and returns it.
    pub(crate) fn wait_for(&mut self, wanted: &str) -> String {
        let lines = self.lines.as_mut().expect("standard error is read until the end only once");
        loop {
            let mut line = String::new();
            let read = lines.read_line(&mut line).expect("standard error is readable");
            assert!(read > 0, "ended before it said {wanted:?}:\n{}", self.said);
            self.said.push_str(&line);
            if line.contains(wanted) {
                return line;
            }
        }
    }

    /// Kills it as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("the process can be killed");
        self.child.wait().expect("the process can be waited for");
    }

    /// Sends a signal by name, as `kill` does.
    #[cfg(unix)]
    pub(crate) fn signal(&self, name: &str) {
        send_signal(self.child.id(), name);
    }

    /// The process id.
    #[cfg(unix)]
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Reads what is left and returns the exit status.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        if let Some(mut lines) = self.lines.take() {
            lines.read_to_string(&mut self.said).expect("standard error is UTF-8");
        }
        self.child.wait().expect("the process can be waited for").code()
    }
}

impl Drop for Running {
    /// A test that fails shows what all of its processes said.
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            if let Some(lines) = &mut self.lines {
                let _ = lines.read_to_string(&mut self.said);
            }
            eprintln!("process {} had said:\n{}", self.child.id(), self.said);
        }
    }
}

/// Runs a program to its end.
pub(crate) fn output(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let _limit = Limit::of(&child);
    child.wait_with_output().expect("the program can be waited for")
}

/// Kills a process at its [`LIMIT`], unless it is dropped before.
struct Limit {
    _ends: Sender<()>,
}

impl Limit {
    fn of(child: &Child) -> Self {
        let (ends, end) = channel();
        let id = child.id();
        std::thread::spawn(move || {
            if end.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                eprintln!("process {id} still runs after {LIMIT:?}: it is killed");
                kill(id);
            }
        });
        Self { _ends: ends }
    }
}

#[cfg(unix)]
fn kill(process: u32) {
    send_signal(process, "KILL");
}

#[cfg(windows)]
fn kill(process: u32) {
    let killed = Command::new("taskkill").args(["/F", "/PID", &process.to_string()]).status();
    killed.expect("taskkill is there");
}

/// Sends a signal by name, as `kill` does; a process that has just ended gets none.
#[cfg(unix)]
pub(crate) fn send_signal(process: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &process.to_string()]).stderr(Stdio::null()).status();
    sent.expect("kill is there");
}
