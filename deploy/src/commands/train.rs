//! `lockstep train`: a whole cluster on this machine, which goes on if any process of it dies.

use std::path::{Path, PathBuf};
use std::pin::pin;

use lockstep_coordinator::metrics::{self, Line};
use lockstep_coordinator::run_dir;
use tokio::sync::{mpsc, watch};

use super::{Usage, assemble, block_on, threads_each};
use crate::chaos::{Chaos, Targets};
use crate::child::Watched;
use crate::cli::Train;
use crate::recipe::Stage;
use crate::{launcher, progress, supervisor, telemetry};

/// Where runs go by default.
const RUNS: &str = "runs";
/// At how many evenly spaced steps the losses are listed in the end.
const LISTED_LOSSES: u64 = 5;

/// Trains with a local coordinator and local workers, all processes of their own.
pub(crate) fn run(args: Train) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let resume = args.outputs.resume;
    if resume && args.run.is_none() {
        return Err(Usage("--resume needs the run to continue: add --run DIR".into()).into());
    }
    if args.chaos.is_some() && !cfg!(unix) {
        return Err(
            Usage("--chaos stops and kills processes by signals, which this system does not have".into()).into()
        );
    }
    let recipe = assemble::recipe(&args.recipe, args.run.as_deref().filter(|_| resume))?;
    let run = args.run.unwrap_or_else(|| free_run_dir(&recipe.name));
    let threads = threads_each(args.threads, args.workers);
    eprintln!(
        "training {} with {} {} of {threads} {}; everything goes to {}",
        recipe.name,
        args.workers,
        if args.workers == 1 { "worker" } else { "workers" },
        if threads == 1 { "thread" } else { "threads" },
        run.display()
    );
    let coordinator = supervisor::Launch {
        recipe: args.recipe,
        recipe_toml: recipe.to_toml(),
        run: run.clone(),
        outputs: args.outputs,
    };
    let (coordinator_watched, coordinator_target) = Watched::new();
    let (workers_watched, worker_targets): (Vec<_>, Vec<_>) = (0..args.workers).map(|_| Watched::new()).unzip();
    let targets = Targets { coordinator: coordinator_target, workers: worker_targets };
    let (listening, announcements) = watch::channel(None);

    let mut first = announcements.clone();
    let workers = async {
        let Some(supervisor::Announcement { address, .. }) = supervisor::next(&mut first).await else {
            return std::future::pending().await;
        };
        let launch = launcher::Launch { address, device: args.device, threads, log_dir: run.join("logs") };
        launcher::supervise(launch, workers_watched).await
    };
    let checkpoints = run_dir::checkpoints(&run);
    let mut chaos = args
        .chaos
        .map(|seed| Chaos::new(seed, args.chaos_faults, args.chaos_every, targets, announcements, checkpoints));
    let faults = async {
        match &mut chaos {
            Some(chaos) => chaos.reign().await,
            None => std::future::pending().await,
        }
    };
    let (ask, asked) = mpsc::channel(1);
    block_on(async {
        let mut training = pin!(supervisor::supervise(coordinator, coordinator_watched, listening, asked));
        // Where one of them is in trouble, the other one goes on until the coordinator has ended.
        let (mut workers, mut faults) = (pin!(workers), pin!(faults));
        let (trouble, reason) = tokio::select! {
            ended = &mut training => return ended,
            trouble = &mut workers => (trouble, "no worker can work"),
            trouble = &mut faults => (trouble, "no more faults can be done"),
        };
        progress::clear_line();
        // What was done so far is kept. A run that ends otherwise meanwhile says so itself.
        let _ = ask.send(reason.into()).await;
        let _ = training.await;
        Err(trouble)
    })?;
    list_losses(&run)?;
    if let Some(tally) = chaos.map(Chaos::into_tally) {
        println!("\n{}", tally.report(&run)?);
    } else if let Some(data) = &recipe.data {
        let run = run.display();
        let hint = match data.stage {
            Stage::Pretrain => format!("generate --run {run} --prompt \"The \""),
            Stage::Sft | Stage::Dpo => format!("chat --run {run}"),
            Stage::Reward => format!("eval {run} --preferences FILE"),
        };
        println!("\nTry it:\n  lockstep {hint}");
    }
    Ok(())
}

/// `runs/NAME-1`, or the first number that is free.
fn free_run_dir(name: &str) -> PathBuf {
    let numbered = |number: u32| Path::new(RUNS).join(format!("{name}-{number}"));
    (1..u32::MAX).map(numbered).find(|dir| !dir.exists()).unwrap_or_else(|| numbered(u32::MAX))
}

/// Prints the training loss at evenly spaced steps.
fn list_losses(run: &Path) -> anyhow::Result<()> {
    let lines = metrics::read(&run_dir::metrics(run))?;
    let steps = lines.iter().filter_map(|line| match line {
        Line::Step(line) => Some((line.step, line.loss)),
        Line::Validation(_) => None,
    });
    let steps: Vec<(u64, f64)> = steps.collect();
    let Some(&(last, _)) = steps.last() else { return Ok(()) };
    println!("\nstep     training loss");
    let every = (last / LISTED_LOSSES).max(1);
    for (step, loss) in steps.iter().filter(|(step, _)| step.is_multiple_of(every)) {
        println!("{step:<8} {loss:.4}");
    }
    Ok(())
}
