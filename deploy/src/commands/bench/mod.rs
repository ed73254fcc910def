//! `lockstep bench`.

mod cluster;
mod compute;
mod generate;
mod measured;
mod setting;
pub(super) mod shape;
mod training;
mod wire;

use lockstep_model::config::{AdamwConfig, UpdateRule};

use crate::cli::Bench;

/// The optimizer of runs that are measured.
const ADAMW: UpdateRule = UpdateRule::Adamw(AdamwConfig { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 });

/// The value in the middle; 0 of none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// The most memory that this process has had, as Linux counts it.
pub(super) fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// Measures what the command line names.
pub(crate) fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Compute(args) => compute::run(&args),
        Bench::Cluster(args) => cluster::run(&args.measurement),
        Bench::Wire(args) => wire::run(&args),
        Bench::Generate(args) => generate::run(&args),
    }
}
