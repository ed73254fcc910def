//! A run from beginning to end: the server, and one loop around the runtime.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use lockstep_model::checkpoint::Validation;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use crate::config::RunConfig;
use crate::engine::Event;
use crate::engine::command::Outcome;
use crate::exchange::Staging;
use crate::observe::Observer;
use crate::runtime::Runtime;
use crate::service::{Base, Served, Service};
use crate::start;

/// How long members may take to close their streams once the run is over.
pub(crate) const FAREWELL: Duration = Duration::from_secs(3);

/// What a run ends with.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps committed.
    pub step: u64,
    /// Mean loss of the last step.
    pub train_loss: Option<f64>,
    /// The last validation.
    pub validation: Option<Validation>,
}

/// Coordinates one run over `listener` until it ends, or until `stop` gives a reason to stop: then the step under way is
/// finished and a checkpoint written.
///
/// # Errors
/// If the run cannot start, or the system refuses on the way. What the engine decides, a failed run included, is a
/// [`Summary`].
pub async fn run(
    mut config: RunConfig,
    listener: TcpListener,
    stop: impl Future<Output = String>,
    observer: Observer,
) -> anyhow::Result<Summary> {
    let start = start::prepare(&mut config)?;
    let base = start.base.clone();
    let invitation = start::invitation(&config, start.run_dir.identity(), base.as_deref())?;
    let format = config.compression.gradients;
    let (inputs, mut queue) = mpsc::unbounded_channel();
    let staging = Arc::new(Staging::default());
    let elements = invitation.layout.as_ref().map_or(0, |layout| layout.total_elements as usize);
    let pushed_elements = elements * (1 + config.kept_moments());
    let mut runtime = Runtime::new(config, start, staging.clone(), inputs.clone(), observer)?;
    let served = Served {
        invitation,
        pushed_elements,
        inputs: inputs.clone(),
        staging,
        publication: runtime.publication(),
        replicas: runtime.replicas(),
        format,
        base: base.map_or_else(OnceLock::new, |base| OnceLock::from(Base::File(base))),
    };
    let (_serving, served) = watch::channel(Some(Arc::new(served)));
    // Ends when dropped, whatever happens below.
    let calls = Service::new(served, inputs).listen(listener);

    runtime.begin()?;
    tokio::pin!(stop);
    let mut stopping = false;
    while !runtime.is_over() {
        let deadline = runtime.next_deadline();
        tokio::select! {
            biased;
            Some(input) = queue.recv() => runtime.hear(input)?,
            reason = &mut stop, if !stopping => {
                stopping = true;
                runtime.decide(Event::StopRequested { reason })?;
            }
            () = sleep_until(deadline) => runtime.decide(Event::Tick)?,
        }
    }

    // Members got their release, or get it when they open their stream; give them a moment to go, so that it arrives.
    let give_up = Instant::now() + FAREWELL;
    loop {
        runtime.hang_up();
        if !runtime.has_company() {
            break;
        }
        tokio::select! {
            biased;
            Some(input) = queue.recv() => runtime.hear(input)?,
            () = sleep_until(Some(give_up)) => {
                tracing::warn!("some workers did not close their connection within {FAREWELL:?}; leaving them");
                break;
            }
        }
    }
    // Whoever asks to join meanwhile is told, too.
    let finished = calls.finish(give_up);
    tokio::pin!(finished);
    loop {
        tokio::select! {
            biased;
            Some(input) = queue.recv() => runtime.hear(input)?,
            () = &mut finished => break,
        }
    }
    runtime.finish(&mut queue)
}

pub(crate) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
