//! `lockstep worker`.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::Context as _;
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_worker::{Ended, JoinedHook, WorkerConfig};

use super::{DISMISSED, Said, threads_each};
use crate::cli::Worker;
use crate::stop::Requests;
use crate::{lifeline, telemetry};

/// What is said when the process ends in the middle of its work.
const AT_ONCE: &str = "stopped at once; what this worker held goes to others";

/// Joins a coordinator and computes for it until it is released.
pub(crate) fn run(args: Worker) -> anyhow::Result<()> {
    let recorder = telemetry::init("info", true);
    let threads = threads_each(args.threads, 1) as usize;
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("CPU threads cannot be started")?;
    // The machine's, not the process's: who computes wrong, and who can confirm whom, goes by it.
    let own_name = || match args.device {
        DeviceChoice::Auto => host_name(),
        device => format!("{}:{device}", host_name()),
    };
    let name = args.name.unwrap_or_else(own_name);
    let mut device = ComputeDevice::open(args.device)?;
    device.description =
        format!("{}, {threads} {}", device.description, if threads == 1 { "thread" } else { "threads" });
    let config = WorkerConfig {
        address: args.join,
        name,
        shared_memory: !args.no_shared_memory,
        spans: Arc::new(move || recorder.take()),
        joined: if args.announce { announcing() } else { Arc::new(|| {}) },
    };
    // What a worker says and hears is little: one thread for it leaves the others to the device.
    let talk = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = talk.block_on(async {
        let orphaned = args.end_with_stdin.then(lifeline::end).transpose()?;
        let requests = Requests::by_signal()?;
        let shutdown = async move {
            match orphaned {
                Some(orphaned) => tokio::select! {
                    reason = requests.first(AT_ONCE) => drop(reason),
                    _ = orphaned => {}
                },
                None => drop(requests.first(AT_ONCE).await),
            }
        };
        anyhow::Ok(lockstep_worker::run(config, device, shutdown).await?)
    })?;
    match ended {
        Ended::Released(reason) => tracing::info!("released: {reason}"),
        Ended::Shutdown => tracing::info!("shut down"),
        Ended::Dismissed(reason) => {
            eprintln!("released, and the run goes on without this worker: {reason}");
            return Err(Said(DISMISSED).into());
        }
    }
    Ok(())
}

/// Tells the parent of each membership.
fn announcing() -> JoinedHook {
    Arc::new(|| {
        // A parent that is gone takes this process with it.
        let _ = writeln!(std::io::stdout(), "member");
    })
}

/// What this machine is called.
pub(super) fn host_name() -> String {
    let from_file = std::fs::read_to_string("/etc/hostname").ok().map(|name| name.trim().to_string());
    let name = std::env::var("HOSTNAME").ok().or_else(|| std::env::var("COMPUTERNAME").ok()).or(from_file);
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| "worker".into())
}
