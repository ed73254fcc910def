//! The `lockstep` program.

mod builtin;
mod chaos;
mod chat;
mod child;
mod cli;
mod commands;
mod data;
mod examples;
mod interrupt;
mod launcher;
mod lifeline;
mod plan;
mod progress;
mod rate;
mod recipe;
mod relay;
mod serve;
mod stop;
mod supervisor;
mod telemetry;
mod trace;
mod web;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::Cli;
use crate::recipe::RecipeError;

/// Exit status of a command that was asked for something impossible.
const BAD_USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(commands::Said(status)) = error.downcast_ref() {
                return ExitCode::from(*status);
            }
            eprintln!("error: {error:#}");
            let usage = error.is::<RecipeError>() || error.is::<commands::Usage>();
            if usage { ExitCode::from(BAD_USAGE) } else { ExitCode::FAILURE }
        }
    }
}
