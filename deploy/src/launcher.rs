//! The workers of `train`: processes of their own, which do not outlive it.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use lockstep_model::device::DeviceChoice;
use tokio::process::Child;
use tokio::task::JoinSet;

use crate::child::{self, ATTEMPTS, Watched};

/// Exit statuses with which a worker says that it cannot work as it is: no such device, no memory for the model, refused.
const CANNOT_WORK: [i32; 2] = [1, 2];
/// Pause before a worker is started again.
const PAUSE: Duration = Duration::from_millis(500);
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
/// when a worker cannot be started.
pub(crate) async fn supervise(launch: Launch, workers: Vec<Watched>) -> anyhow::Error {
    let mut running = JoinSet::new();
    for (number, worker) in (1..).zip(workers) {
        running.spawn(keep_running(launch.clone(), number, worker));
    }
    match running.join_next().await {
        Some(Ok(error)) => error,
        Some(Err(panic)) => anyhow::Error::new(panic).context("the supervisor of a worker failed"),
        None => anyhow::anyhow!("there are no workers to supervise"),
    }
}

/// Starts worker `number`, and starts it again whenever it ends without having been released.
async fn keep_running(launch: Launch, number: u32, mut worker: Watched) -> anyhow::Error {
    let log = launch.log_dir.join(format!("worker-{number}.log"));
    loop {
        worker.started();
        let ended = match start(&launch, number, &log) {
            Ok(mut child) => {
                // Taken out, or waiting would close it and so end the worker.
                let _lifeline = child.stdin.take();
                worker.end(&mut child).await.context("a worker cannot be waited for")
            }
            Err(error) => Err(error),
        };
        let status = match ended {
            // Released: the run is over, and so is this worker.
            Ok(status) if status.success() => std::future::pending().await,
            Ok(status) => status,
            Err(error) => return error,
        };
        if status.code().is_some_and(|code| CANNOT_WORK.contains(&code)) {
            return anyhow::anyhow!("worker {number} cannot work; it said:\n{}", last_lines(&log));
        }
        if worker.ended() {
            let said = last_lines(&log);
            return anyhow::anyhow!("worker {number} ended {ATTEMPTS} times right after its start ({status}):\n{said}");
        }
        tracing::warn!("worker {number} ended ({status}); starting it again");
        tokio::time::sleep(PAUSE).await;
    }
}

fn start(launch: &Launch, number: u32, log: &Path) -> anyhow::Result<Child> {
    let shown = log.display();
    if let Err(error) = fs::create_dir_all(&launch.log_dir) {
        bail!("{}: cannot create the directory of the workers' logs: {error}", launch.log_dir.display());
    }
    let log = File::options().create(true).append(true).open(log);
    let log = log.with_context(|| format!("{shown}: cannot write the worker's log"))?;
    child::command("worker")?
        .args(["--join", &launch.address.to_string(), "--device", &launch.device.to_string()])
        .args(["--threads", &launch.threads.to_string(), "--name", &format!("local-{number}"), "--end-with-stdin"])
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("a worker cannot be started")
}

fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let mut lines = VecDeque::new();
    for line in text.lines() {
        lines.push_back(line);
        if lines.len() > LOG_LINES {
            lines.pop_front();
        }
    }
    Vec::from(lines).join("\n")
}
