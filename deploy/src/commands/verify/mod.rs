//! `lockstep verify`: whether a run is what it says.

mod draws;
mod files;
mod report;

use std::time::Instant;

use self::report::{Report, Windows};
use crate::cli::Verify;
use crate::data::progress::Progress;
use crate::telemetry;

/// Damage that is printed; the rest is counted.
const PRINTED: usize = 40;

/// Checks a run and prints what was found; damage is an error.
pub(crate) fn run(args: &Verify) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let began = Instant::now();
    let mut progress = Progress::new();
    let report = report::verify(&args.run, &args.set, &mut progress);
    progress.finish();
    let report = report?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_text(&report);
    }
    match report.damage.len() {
        0 if args.json => Ok(()),
        0 => {
            println!("\nverified in {:.1} s", began.elapsed().as_secs_f64());
            Ok(())
        }
        count => anyhow::bail!(
            "{}: not verified: {count} {}",
            args.run.display(),
            if count == 1 { "damage" } else { "damages" }
        ),
    }
}

fn print_text(report: &Report) {
    let Report { steps, draws, checkpoints, ledger_lines, metrics_lines, .. } = report;
    println!("steps committed   {steps}");
    println!("draws committed   {}", draws.committed);
    println!("draws lost        {}", draws.lost);
    println!("draws repeated    {}", draws.repeated);
    println!("draws different   {}", draws.different);
    match report.windows {
        Some(Windows { complete_epochs, repeated, left_out }) => println!(
            "windows           {repeated} repeated within an epoch, {left_out} left out of {complete_epochs} complete epochs"
        ),
        None => println!("windows           drawn at random, as the recipe says"),
    }
    println!("checkpoints       {} whole, {} damaged", checkpoints.whole, checkpoints.damaged);
    println!("ledger lines      {} whole, {} damaged", ledger_lines.whole, ledger_lines.damaged);
    println!("metrics lines     {} whole, {} damaged", metrics_lines.whole, metrics_lines.damaged);
    if !report.damage.is_empty() {
        println!();
    }
    for damage in report.damage.iter().take(PRINTED) {
        println!("{}: {}", damage.place, damage.problem);
    }
    if let Some(more) = report.damage.len().checked_sub(PRINTED + 1) {
        println!("and {} more; --json lists all", more + 1);
    }
}
