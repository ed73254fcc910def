//! One file for each command.

mod assemble;
mod bench;
mod chat;
mod check;
mod compare;
mod coordinator;
mod devices;
mod eval;
mod examples;
mod export;
mod generate;
mod import;
mod initial;
mod inspect;
mod merge;
mod new_run;
mod open_model;
mod prepare;
mod rate;
mod relay;
mod serve;
mod status;
mod train;
mod verify;
mod worker;

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::cli::{Cli, Command};

/// A command that was asked for something it cannot mean.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// A failure that another process has put in words already; left is the exit status.
#[derive(Debug, thiserror::Error)]
#[error("exit status {0}")]
pub(crate) struct Said(pub(crate) u8);

/// Exit status of a worker without which the run goes on: others computed something else, or it declined all it was lent.
pub(crate) const DISMISSED: u8 = 3;

/// Does what the command line asks.
pub(crate) fn dispatch(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Train(args) => train::run(args),
        Command::Coordinator(args) => coordinator::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Relay(args) => relay::run(args),
        Command::Devices => devices::run(),
        Command::Generate(args) => generate::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Rate(args) => rate::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Examples(args) => examples::run(&args),
        Command::Prepare(args) => prepare::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Status(args) => status::run(args),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(bench) => bench::run(bench),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "lockstep", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// CPU threads of each of `workers` on this machine, where nothing else is asked for.
pub(crate) fn threads_each(asked: Option<u32>, workers: u32) -> u32 {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u32;
    asked.unwrap_or_else(|| (cores() / workers).max(1))
}

/// What the thread that starts others does itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    /// Is one of those among which work is split, so that it need not wake one and wait.
    Computes,
    /// Has another thread ask for work.
    Waits,
}

/// Has work on the CPU use so many threads; all cores, where nothing else is asked for.
fn use_threads(asked: Option<u32>, caller: Caller) -> anyhow::Result<()> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(threads_each(asked, 1) as usize);
    let threads = if caller == Caller::Computes { threads.use_current_thread() } else { threads };
    threads.build_global().context("CPU threads cannot be started")
}

/// Runs a command's asynchronous part.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(future)
}
