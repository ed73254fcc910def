//! `lockstep bench`.

mod compute;
mod measured;
mod shape;

use crate::cli::Bench;

/// Measures what the command line names.
pub(crate) fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Compute(args) => compute::run(args),
    }
}
