//! `lockstep bench`.

mod cluster;
mod compute;
mod generate;
mod measured;
mod setting;
pub(super) mod shape;

use crate::cli::Bench;

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
        Bench::Generate(args) => generate::run(&args),
    }
}
