//! The coordinator of `train`: a process of its own, which goes on from its newest checkpoint if it dies.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use lockstep_coordinator::run_dir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::{mpsc, watch};

use crate::child::{self, ATTEMPTS, Watched};
use crate::cli::{Outputs, RecipeArgs};
use crate::commands::Said;
use crate::progress::say;
use crate::stop::{INTERRUPTED, Requests};

/// How long a coordinator may take to end at once.
const AT_ONCE: Duration = Duration::from_secs(2);

/// How the coordinator is started.
#[derive(Debug)]
pub(crate) struct Launch {
    /// The recipe, as it was asked for.
    pub(crate) recipe: RecipeArgs,
    /// The recipe that this is, in full.
    pub(crate) recipe_toml: String,
    /// Directory of the run.
    pub(crate) run: PathBuf,
    /// As they were asked for.
    pub(crate) outputs: Outputs,
}

/// What a coordinator says on standard output once it can be joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Announcement {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// The step it continues after.
    pub(crate) step: u64,
}

impl fmt::Display for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.address, self.step)
    }
}

impl FromStr for Announcement {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> anyhow::Result<Self> {
        let (address, step) = line.trim_end().split_once(' ').context("no address and step")?;
        Ok(Self { address: address.parse()?, step: step.parse()? })
    }
}

/// Keeps a coordinator running until the run is over, telling `listening` of each start. Requests to stop are passed on to
/// it; what it prints goes to standard output.
///
/// # Errors
/// If it cannot be started, or fails; with [`Said`] where it has said why.
pub(crate) async fn supervise(
    launch: Launch,
    mut coordinator: Watched,
    listening: watch::Sender<Option<Announcement>>,
) -> anyhow::Result<()> {
    let mut requests = Requests::by_signal()?;
    let mut address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut stop: Option<String> = None;
    for start in 1u32.. {
        coordinator.started();
        let (mut child, mut input, output) = launch.start(start, address)?;
        if let Some(reason) = &stop {
            ask_to_stop(&mut input, reason).await;
        }
        let (announced, mut announcement) = mpsc::channel(1);
        let output = tokio::spawn(pass_on(output, announced));
        // Before it listens for the first time there is nothing to save.
        let mut saves = start > 1;
        let status = loop {
            tokio::select! {
                status = coordinator.end(&mut child) => break status.context("the coordinator cannot be waited for")?,
                Some(announcement) = announcement.recv() => {
                    (address, saves) = (announcement.address, true);
                    // Nobody may want to know.
                    let _ = listening.send(Some(announcement));
                }
                reason = requests.next() => {
                    if stop.is_some() || !saves {
                        return end_at_once(child, input).await;
                    }
                    ask_to_stop(&mut input, &reason).await;
                    stop = Some(reason);
                }
            }
        };
        output.await.context("what the coordinator says cannot be read")?;
        match status.code().map(u8::try_from) {
            Some(Ok(0)) => return Ok(()),
            Some(Ok(code @ (1 | 2 | INTERRUPTED))) => return Err(Said(code).into()),
            _ => {}
        }
        if coordinator.ended() {
            bail!("the coordinator ended {ATTEMPTS} times right after its start ({status}); what it said is above");
        }
        say(&format!("the coordinator ended ({status}); starting it again"));
    }
    bail!("the coordinator was started too often")
}

/// The next start of a coordinator that is announced; `None` where there will be none.
pub(crate) async fn next(announcements: &mut watch::Receiver<Option<Announcement>>) -> Option<Announcement> {
    announcements.changed().await.ok()?;
    *announcements.borrow_and_update()
}

impl Launch {
    /// Starts the coordinator; the first time as it was asked for, later so that it goes on with the same run.
    fn start(&self, start: u32, address: SocketAddr) -> anyhow::Result<(Child, ChildStdin, ChildStdout)> {
        let Self { recipe, recipe_toml, run, outputs } = self;
        let mut command = child::command("coordinator")?;
        command.arg("--child").arg("--run").arg(run).arg("--listen").arg(address.to_string());
        command.args(recipe.set.iter().flat_map(|set| ["--set", set]));
        // A recipe's file may change meanwhile; the run keeps its own.
        let kept = start > 1 && fs::read_to_string(run_dir::recipe(run)).is_ok_and(|kept| kept == *recipe_toml);
        if let Some(recipe) = recipe.recipe.as_ref().filter(|_| !kept) {
            command.arg(recipe);
        }
        if outputs.resume || (start > 1 && run_dir::holds_run(run)) {
            command.arg("--resume");
        }
        if let Some(trace) = &outputs.trace {
            command.arg("--trace").arg(numbered(trace, start));
        }
        let mut child = command.stdout(Stdio::piped()).spawn().context("the coordinator cannot be started")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (input, output) = input.zip(output).context("the coordinator was started without pipes")?;
        Ok((child, input, output))
    }
}

/// The file of the trace of this start: the first one's is named as asked, the second one's `trace-2.json`, and so on.
fn numbered(trace: &Path, start: u32) -> PathBuf {
    if start == 1 {
        return trace.into();
    }
    let mut name = OsString::from(trace.file_stem().unwrap_or_default());
    name.push(format!("-{start}"));
    if let Some(extension) = trace.extension() {
        name.push(".");
        name.push(extension);
    }
    trace.with_file_name(name)
}

/// Passes on the announcement, and to standard output what follows it.
async fn pass_on(output: ChildStdout, announced: mpsc::Sender<Announcement>) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match line.parse() {
            // A supervisor that ended takes the coordinator with it.
            Ok(announcement) => drop(announced.send(announcement).await),
            Err(_) => println!("{line}"),
        }
    }
}

async fn ask_to_stop(input: &mut ChildStdin, reason: &str) {
    // One that ended meanwhile is asked again after its next start.
    let _ = input.write_all(format!("{reason}\n").as_bytes()).await;
}

/// Asks once more, and insists.
async fn end_at_once(mut child: Child, mut input: ChildStdin) -> anyhow::Result<()> {
    ask_to_stop(&mut input, "at once").await;
    if tokio::time::timeout(AT_ONCE, child.wait()).await.is_err() {
        child.kill().await.context("the coordinator cannot be ended")?;
    }
    Err(Said(INTERRUPTED).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_read_as_it_was_written() {
        let said = Announcement { address: ([127, 0, 0, 1], 7070).into(), step: 40 };
        assert_eq!(said.to_string(), "127.0.0.1:7070 40");
        assert_eq!(format!("{said}\n").parse::<Announcement>().unwrap(), said);
        assert!("the run is complete".parse::<Announcement>().is_err());
    }

    #[test]
    fn no_start_overwrites_the_trace_of_another() {
        let of = |trace: &str, start| numbered(Path::new(trace), start);
        assert_eq!(of("a/trace.json", 1), Path::new("a/trace.json"));
        assert_eq!(of("a/trace.json", 2), Path::new("a/trace-2.json"));
        assert_eq!(of("trace", 12), Path::new("trace-12"));
    }
}
