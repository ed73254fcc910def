//! `lockstep relay`.

use std::sync::Arc;

use lockstep_coordinator::downstream::Downstream;
use lockstep_coordinator::observe::{Observer, RunEvent};
use lockstep_worker::{Ended, WorkerConfig};
use tokio::task::JoinSet;
use tracing::info;

use super::{DISMISSED, Said, block_on, coordinator, worker};
use crate::cli::Relay;
use crate::relay::Workers;
use crate::stop::Requests;
use crate::telemetry;

/// What is said when the process ends in the middle of its work.
const AT_ONCE: &str = "stopped at once; what this relay held goes to others";

/// Joins a coordinator with workers of its own until it is released.
pub(crate) fn run(args: Relay) -> anyhow::Result<()> {
    coordinator::check_reach(args.listen, args.insecure)?;
    let recorder = telemetry::init("info", true);
    block_on(async {
        let requests = Requests::by_signal()?;
        let listener = coordinator::bind(args.listen).await?;
        let address = listener.local_addr()?;
        eprintln!("listening on {address}; workers join with: lockstep worker --join {address}");
        let (downstream, server) = Downstream::new(listener, args.join.clone(), observer());
        // Ends when dropped.
        let mut serving = JoinSet::new();
        serving.spawn(server.run());
        let theirs = downstream.clone();
        let config = WorkerConfig {
            address: args.join,
            name: args.name.unwrap_or_else(|| format!("{}:relay", worker::host_name())),
            shared_memory: !args.no_shared_memory,
            spans: Arc::new(move || [recorder.take(), theirs.take_spans()].concat()),
            joined: Arc::new(|| {}),
        };
        let shutdown = async { drop(requests.first(AT_ONCE).await) };
        let ended = lockstep_worker::run_with(config, Workers(downstream.clone()), shutdown).await?;
        let (reason, run_goes_on) = match ended {
            Ended::Shutdown => {
                info!("shut down");
                return Ok(());
            }
            Ended::Released(reason) => {
                info!("released: {reason}");
                (reason, false)
            }
            Ended::Dismissed(reason) => {
                eprintln!("released, and the run goes on without this relay: {reason}");
                (reason, true)
            }
        };
        downstream.release(reason, run_goes_on).await;
        serving.join_next().await;
        if run_goes_on { Err(Said(DISMISSED).into()) } else { Ok(()) }
    })
}

/// Tells of workers that come and go.
fn observer() -> Observer {
    Arc::new(|event| match event {
        RunEvent::WorkerJoined { worker, name, device, workers } => {
            info!("worker {worker} joined this relay: {name}, {device}; {workers} in all");
        }
        RunEvent::WorkerLeft { worker, reason, workers } => {
            info!("worker {worker} left this relay: {reason}; {workers} in all");
        }
        // Said where it is decided.
        _ => {}
    })
}
