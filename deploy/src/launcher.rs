//! The workers of `train`: processes of their own, which do not outlive it.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use lockstep_model::device::DeviceChoice;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::task::JoinSet;

use crate::child::{self, ATTEMPTS, Watched};
use crate::commands::DISMISSED;
use crate::progress::say;

/// Exit statuses with which a worker says that it cannot work as it is: no such device, no memory for the model, refused.
const CANNOT_WORK: [i32; 2] = [1, 2];
/// Pause before a worker is started again; twice as long after each start that led to nothing, up to the longest.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Lines of a worker's log shown when it cannot be started.
const LOG_LINES: usize = 12;

/// How workers are started.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    /// Where the coordinator listens.
    pub(crate) address: SocketAddr,
    /// What they compute on.
    pub(crate) device: DeviceChoice,
    /// CPU threads of each.
    pub(crate) threads: u32,
    /// Where their logs go.
    pub(crate) log_dir: PathBuf,
}

/// Keeps the workers running until dropped; then their standard input closes and they end. Completes only with an error:
/// when none of them can work.
pub(crate) async fn supervise(launch: Launch, workers: Vec<Watched>) -> anyhow::Error {
    let prospects = Arc::new(Mutex::new(Prospects::new(workers.len())));
    let mut running = JoinSet::new();
    for (index, watched) in workers.into_iter().enumerate() {
        let log = launch.log_dir.join(format!("worker-{}.log", index + 1));
        let worker = Worker { launch: launch.clone(), index, log, prospects: prospects.clone() };
        running.spawn(worker.keep_running(watched));
    }
    match running.join_next().await {
        Some(Ok(error)) => error,
        Some(Err(panic)) => anyhow::Error::new(panic).context("the supervisor of a worker failed"),
        None => anyhow::anyhow!("there are no workers to supervise"),
    }
}

/// What can be hoped for of each worker.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Prospects(Vec<Prospect>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prospect {
    /// So many starts in a row ended by themselves before the worker was a member of the run.
    Starts { in_vain: u32 },
    /// The run goes on without it.
    Dismissed,
}

impl Prospects {
    fn new(workers: usize) -> Self {
        Self(vec![Prospect::Starts { in_vain: 0 }; workers])
    }

    /// A worker is a member.
    fn joined(&mut self, worker: usize) {
        self.0[worker] = Prospect::Starts { in_vain: 0 };
    }

    /// A worker is not to be started again.
    fn dismissed(&mut self, worker: usize) {
        self.0[worker] = Prospect::Dismissed;
    }

    /// A worker ended by itself; the pause before its next start.
    fn ended(&mut self, worker: usize) -> Duration {
        let Prospect::Starts { in_vain } = &mut self.0[worker] else { return LONGEST_PAUSE };
        *in_vain = in_vain.saturating_add(1);
        PAUSE.saturating_mul(2u32.saturating_pow(*in_vain - 1)).min(LONGEST_PAUSE)
    }

    /// Whether no worker that the run could have was a member in its last [`ATTEMPTS`] starts.
    fn are_none(&self) -> bool {
        self.0.iter().all(|prospect| match prospect {
            Prospect::Starts { in_vain } => *in_vain >= ATTEMPTS,
            Prospect::Dismissed => true,
        })
    }
}

/// One worker, over all its starts.
struct Worker {
    launch: Launch,
    index: usize,
    log: PathBuf,
    prospects: Arc<Mutex<Prospects>>,
}

impl Worker {
    /// Starts it, and starts it again whenever it ends without having been released.
    async fn keep_running(self, mut watched: Watched) -> anyhow::Error {
        let number = self.index + 1;
        loop {
            watched.started();
            let status = match self.run_once(&mut watched).await {
                Ok(status) => status,
                Err(error) => return error,
            };
            if status.success() {
                // Released: the run is over, and so is this worker.
                std::future::pending::<()>().await;
            }
            if status.code() == Some(DISMISSED.into()) {
                self.prospects().dismissed(self.index);
                say(&format!("worker {number} takes no part any more; it said: {}", last_lines(&self.log, 1)));
                std::future::pending::<()>().await;
            }
            let cannot_work = status.code().is_some_and(|code| CANNOT_WORK.contains(&code));
            let ended = match cannot_work {
                true => format!("worker {number} cannot work; it said: {}", last_lines(&self.log, 1)),
                false => format!("worker {number} ended ({status})"),
            };
            let pause = if watched.was_killed() { PAUSE } else { self.prospects().ended(self.index) };
            if self.prospects().are_none() {
                let said = last_lines(&self.log, LOG_LINES);
                let ended = if cannot_work { "cannot work".into() } else { format!("ended ({status})") };
                return anyhow::anyhow!("worker {number} {ended}, and no other can; {}:\n{said}", self.log.display());
            }
            say(&format!("{ended}; starting it again in {} s", pause.as_secs_f64()));
            tokio::time::sleep(pause).await;
        }
    }

    /// Starts it and waits for its end, noting when it becomes a member.
    async fn run_once(&self, watched: &mut Watched) -> anyhow::Result<ExitStatus> {
        let (mut child, output) = self.start()?;
        // Taken out, or waiting would close it and so end the worker.
        let _lifeline = child.stdin.take();
        let mut memberships = BufReader::new(output).lines();
        let note = async {
            while let Ok(Some(_)) = memberships.next_line().await {
                self.prospects().joined(self.index);
            }
        };
        let end = watched.end(&mut child);
        // All that it said counts: the output ends with the process.
        let (status, ()) = tokio::join!(end, note);
        status.context("a worker cannot be waited for")
    }

    fn start(&self) -> anyhow::Result<(Child, ChildStdout)> {
        let Self { launch, log, .. } = self;
        if let Err(error) = fs::create_dir_all(&launch.log_dir) {
            bail!("{}: cannot create the directory of the workers' logs: {error}", launch.log_dir.display());
        }
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("{}: cannot write the worker's log", log.display()))?;
        let mut child = child::command("worker")?
            .args(["--join", &launch.address.to_string(), "--device", &launch.device.to_string()])
            .args(["--threads", &launch.threads.to_string(), "--name", &format!("local-{}", self.index + 1)])
            .args(["--end-with-stdin", "--announce"])
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .context("a worker cannot be started")?;
        let output = child.stdout.take().context("a worker was started without a pipe")?;
        Ok((child, output))
    }

    fn prospects(&self) -> MutexGuard<'_, Prospects> {
        self.prospects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last so many lines of a log.
fn last_lines(log: &Path, number: usize) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let mut lines = VecDeque::new();
    for line in text.lines() {
        lines.push_back(line);
        if lines.len() > number {
            lines.pop_front();
        }
    }
    Vec::from(lines).join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_hope_while_one_worker_was_a_member_lately() {
        let mut prospects = Prospects::new(2);
        for _ in 0..10 {
            prospects.ended(0);
        }
        assert!(!prospects.are_none(), "the other one may still work");
        prospects.ended(1);
        prospects.joined(1);
        for _ in 1..ATTEMPTS {
            prospects.ended(1);
            assert!(!prospects.are_none());
        }
        prospects.ended(1);
        assert!(prospects.are_none());
        prospects.joined(0);
        assert!(!prospects.are_none());
    }

    #[test]
    fn one_who_was_dismissed_is_no_hope() {
        let mut prospects = Prospects::new(2);
        prospects.dismissed(0);
        assert!(!prospects.are_none());
        for _ in 0..ATTEMPTS {
            prospects.ended(1);
        }
        assert!(prospects.are_none());
    }

    #[test]
    fn pauses_grow_up_to_the_longest() {
        let mut prospects = Prospects::new(1);
        let pauses: Vec<f64> = (0..8).map(|_| prospects.ended(0).as_secs_f64()).collect();
        assert_eq!(pauses, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        prospects.joined(0);
        assert_eq!(prospects.ended(0), PAUSE);
    }
}
