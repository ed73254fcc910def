//! `lockstep coordinator`, and what it shares with `train`: running a coordinator and showing the run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use lockstep_coordinator::engine::command::Outcome;
use lockstep_coordinator::observe::{Observer, RunEvent};
use lockstep_coordinator::{RunConfig, Summary, run_dir};
use tokio::net::TcpListener;

use super::{Usage, assemble, block_on};
use crate::cli::Coordinator;
use crate::progress::Progress;
use crate::trace::{Process, Recorder, TraceFile};
use crate::{stop, telemetry};

/// Coordinates a run that others join.
pub(crate) fn run(args: Coordinator) -> anyhow::Result<()> {
    if !args.listen.ip().is_loopback() && !args.insecure {
        let address = args.listen;
        return Err(Usage(format!(
            "--listen {address}: whoever reaches this address can join the run, read its data and its model, and change \
             its result, because traffic is neither encrypted nor authenticated. Listen on 127.0.0.1 and let workers come \
             through ssh tunnels, or, on a network you trust, add --insecure"
        ))
        .into());
    }
    let recorder = telemetry::init("info", args.outputs.trace.is_some());
    let recipe = assemble::recipe(&args.recipe, args.outputs.resume.then_some(args.run.as_path()))?;
    let config = assemble::run_config(&recipe, args.run.clone(), args.outputs.resume)?;
    block_on(async {
        let listener = bind(args.listen).await?;
        eprintln!("listening on {}; workers join with: lockstep worker --join {0}", listener.local_addr()?);
        let summary = coordinate(config, listener, recorder, args.outputs.trace, std::future::pending()).await?;
        conclude(&summary, &args.run)
    })
}

/// Opens the port.
pub(crate) async fn bind(address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| {
        format!("{address}: cannot listen; is another program using the port? Port 0 takes a free one")
    })
}

/// Coordinates a run, showing it, until it ends, a stop is requested, or `trouble` completes.
pub(crate) async fn coordinate(
    config: RunConfig,
    listener: TcpListener,
    recorder: Recorder,
    trace: Option<PathBuf>,
    trouble: impl Future<Output = anyhow::Error>,
) -> anyhow::Result<Summary> {
    let progress = Arc::new(Progress::new());
    let tracing = Arc::new(Tracing { recorder, path: trace, file: Mutex::new(Ok(None)) });
    let observer: Observer = {
        let (progress, tracing) = (progress.clone(), tracing.clone());
        Arc::new(move |event: &RunEvent| {
            progress.show(event);
            tracing.keep(event);
        })
    };
    let running = lockstep_coordinator::run(config, listener, stop::requested(), observer);
    let summary = tokio::select! {
        summary = running => summary,
        error = trouble => Err(error),
    };
    progress.finish();
    tracing.finish()?;
    summary
}

/// Says how a run ended and what to do next; a failed run is an error.
pub(crate) fn conclude(summary: &Summary, run: &Path) -> anyhow::Result<()> {
    let shown = run.display();
    match &summary.outcome {
        Outcome::Failed { reason } => anyhow::bail!("{reason}"),
        outcome => println!("\n{outcome} (step {})", summary.step),
    }
    if let Some(loss) = summary.train_loss {
        println!("training loss    {loss:.4}");
    }
    if let Some(validation) = summary.validation {
        println!("validation loss  {:.4} (step {})", validation.loss, validation.step);
        if let Some(bits) = validation.bits_per_byte {
            println!("bits per byte    {bits:.4}");
        }
    }
    println!("checkpoints      {}", run_dir::checkpoints(run).display());
    println!("metrics          {shown}/metrics.jsonl, drawn in {shown}/loss.svg");
    Ok(())
}

/// The trace of a run, if one is wanted.
struct Tracing {
    recorder: Recorder,
    path: Option<PathBuf>,
    /// Opened when the run has its id; an error is kept until the end.
    file: Mutex<anyhow::Result<Option<TraceFile>>>,
}

impl Tracing {
    fn keep(&self, event: &RunEvent) {
        let Some(path) = &self.path else { return };
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = match (event, &mut *file) {
            (RunEvent::Started { run_id, .. }, file) => {
                *file = TraceFile::create(path, run_id).map(Some);
                return;
            }
            (RunEvent::Spans { worker, name, clock_offset_nanos, spans }, Ok(Some(file))) => {
                let name = format!("worker {worker} ({name})");
                file.add(&Process { id: *worker, name, clock_offset_nanos: *clock_offset_nanos }, spans)
            }
            (RunEvent::Step { .. }, Ok(Some(file))) => file.add(&Self::coordinator(), &self.recorder.take()),
            _ => return,
        };
        if let Err(error) = kept {
            *file = Err(error);
        }
    }

    fn coordinator() -> Process {
        Process { id: 0, name: "coordinator".into(), clock_offset_nanos: 0 }
    }

    fn finish(&self) -> anyhow::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut file) = std::mem::replace(&mut *file, Ok(None))? {
            file.add(&Self::coordinator(), &self.recorder.take())?;
            file.finish()?;
        }
        Ok(())
    }
}
