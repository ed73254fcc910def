//! `lockstep bench`.

mod compute;
mod measured;
mod shape;

use crate::cli::Bench;

/// The value in the middle; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Measures what the command line names.
pub(crate) fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Compute(args) => compute::run(args),
    }
}
