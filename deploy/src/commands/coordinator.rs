//! `lockstep coordinator`: coordinating a run and showing it.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use indicatif::HumanCount;
use lockstep_coordinator::engine::command::Outcome;
use lockstep_coordinator::observe::{Observer, RunEvent};
use lockstep_coordinator::{Summary, run_dir};
use lockstep_model::adapters::trained_layout;
use tokio::net::TcpListener;

use super::{Usage, assemble, block_on};
use crate::cli::Coordinator;
use crate::progress::Progress;
use crate::stop::Requests;
use crate::supervisor::Announcement;
use crate::telemetry;
use crate::trace::{Process, Recorder, TraceFile};

/// What is said when the process ends in the middle of a step.
const AT_ONCE: &str = "stopped at once; the newest checkpoint is whole, --resume continues from it";

/// Coordinates a run that others join.
pub(crate) fn run(args: Coordinator) -> anyhow::Result<()> {
    check_reach(args.listen, args.insecure)?;
    let recorder = telemetry::init(if args.child { "warn" } else { "info" }, args.outputs.trace.is_some());
    block_on(async {
        // First of all, so that this process ends with its parent while it reads a corpus, too.
        let parent = args.child.then(Requests::by_parent).transpose()?;
        let recipe = assemble::recipe(&args.recipe, args.outputs.resume.then_some(args.run.as_path()))?;
        let (config, report) = assemble::run_config(&recipe, args.run.clone(), args.outputs.resume)?;
        if let Some(report) = report {
            eprintln!("{report}");
        }
        if let Some(adapters) = &config.adapters {
            let [trained, all] = [Some(adapters), None].map(|part| trained_layout(&config.model, part).len() as u64);
            let (rank, targets, share) =
                (adapters.rank, adapters.targets.join(", "), 100.0 * trained as f64 / all as f64);
            let [trained, all] = [trained, all].map(HumanCount);
            eprintln!(
                "{trained} parameters of adapters are trained, {share:.2} % of the model's {all}: rank {rank}, beside {targets}"
            );
        }
        let listener = bind(args.listen).await?;
        let address = listener.local_addr()?;
        let shown = Shown::new(args.child.then_some(address), recorder, args.outputs.trace);
        let requests = match parent {
            Some(parent) => parent,
            None => {
                eprintln!("listening on {address}; workers join with: lockstep worker --join {address}");
                Requests::by_signal()?
            }
        };
        let summary =
            lockstep_coordinator::run(config, listener, requests.first(AT_ONCE), shown.clone().observer()).await;
        shown.finish()?;
        conclude(&summary?, &args.run)
    })
}

/// Refuses to listen beyond this machine, unless that is what is wanted.
pub(super) fn check_reach(address: SocketAddr, insecure: bool) -> Result<(), Usage> {
    if address.ip().is_loopback() || insecure {
        return Ok(());
    }
    Err(Usage(format!(
        "--listen {address}: whoever reaches this address can join the run, read its data and its model, and change its \
         result, because traffic is neither encrypted nor authenticated. Listen on 127.0.0.1 and let workers come through \
         ssh tunnels, or, on a network you trust, add --insecure"
    )))
}

/// Opens the port.
pub(super) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| {
        format!("{address}: cannot listen; is another program using the port? Port 0 takes a free one")
    })
}

/// What becomes of a run's events.
struct Shown {
    progress: Progress,
    tracing: Tracing,
    /// Where a parent that waits for it is told that the run listens.
    announced: Option<SocketAddr>,
}

impl Shown {
    fn new(announced: Option<SocketAddr>, recorder: Recorder, trace: Option<PathBuf>) -> Arc<Self> {
        let tracing = Tracing { recorder, path: trace, file: Mutex::new(Ok(None)) };
        Arc::new(Self { progress: Progress::new(), tracing, announced })
    }

    fn observer(self: Arc<Self>) -> Observer {
        Arc::new(move |event: &RunEvent| {
            if let (RunEvent::Started { step, .. }, Some(address)) = (event, self.announced) {
                // A parent that is gone takes this process with it.
                let _ = writeln!(std::io::stdout(), "{}", Announcement { address, step: *step });
            }
            self.progress.show(event);
            self.tracing.keep(event);
        })
    }

    fn finish(&self) -> anyhow::Result<()> {
        self.progress.finish();
        self.tracing.finish()
    }
}

/// Says how a run ended and what to do next; a failed run is an error.
fn conclude(summary: &Summary, run: &Path) -> anyhow::Result<()> {
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
    println!("metrics          {}, drawn in {}", run_dir::metrics(run).display(), run.join("loss.svg").display());
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
