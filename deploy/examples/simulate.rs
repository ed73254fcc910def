//! Runs the simulator of `tests/sim` on any number of seeds: `cargo run --release --example simulate -- --seeds 10000`.
//!
//! `--first N` begins at another seed than 0, `--seed N` runs one alone, `--verbose` prints all that happens in it,
//! `--mutation NAME` breaks a rule on purpose, `--threads N` uses so many cores. It stops at the first seed in which
//! something does not hold, prints what led to it, and exits with 1; with `--all` it goes on, and prints a line for each.
//! `--quiet` runs one worker, and nothing fails.

#[path = "../tests/sim/simulator/mod.rs"]
mod simulator;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use simulator::{Course, Failure, Mutation, Scenario};

struct Arguments {
    first: u64,
    seeds: u64,
    threads: usize,
    verbose: bool,
    all: bool,
    quiet: bool,
    mutation: Mutation,
}

fn arguments() -> Result<Arguments, String> {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let mut parsed = Arguments {
        first: 0,
        seeds: 1000,
        threads,
        verbose: false,
        all: false,
        quiet: false,
        mutation: Mutation::None,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let mut value = || given.next().ok_or(format!("{name} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
        match name.as_str() {
            "--seeds" => parsed.seeds = number(value()?)?,
            "--first" => parsed.first = number(value()?)?,
            "--seed" => (parsed.first, parsed.seeds) = (number(value()?)?, 1),
            "--threads" => parsed.threads = number(value()?)?.max(1) as usize,
            "--verbose" => parsed.verbose = true,
            "--all" => parsed.all = true,
            "--quiet" => parsed.quiet = true,
            "--mutation" => {
                let name = value()?;
                let known = || format!("no mutation is called {name:?}; there are {:?}", simulator::MUTATIONS);
                parsed.mutation = Mutation::named(&name).ok_or_else(known)?;
            }
            _ => {
                return Err(format!(
                    "{name}: there are --seeds, --first, --seed, --threads, --verbose, --all, --quiet, --mutation"
                ));
            }
        }
    }
    Ok(parsed)
}

/// Runs all seeds: how they went, and by seed what does not hold.
fn simulate(arguments: &Arguments) -> (Vec<Course>, BTreeMap<u64, Box<Failure>>) {
    let next = AtomicU64::new(arguments.first);
    let end = arguments.first + arguments.seeds;
    let results = Mutex::new((Vec::new(), BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let ran = match arguments.mutation {
                        Mutation::OutsideChance => simulator::run_twice(seed, arguments.mutation),
                        mutation => {
                            let scenario = if arguments.quiet { Scenario::quiet(seed) } else { Scenario::draw(seed) };
                            simulator::run_scenario(scenario, mutation, arguments.verbose)
                        }
                    };
                    let mut results = results.lock().expect("a thread that panics ends the program");
                    match ran {
                        Ok(course) => results.0.push(course),
                        Err(failure) => {
                            if arguments.all {
                                println!("seed {}: {}: {}", failure.seed(), failure.invariant(), failure.what());
                            } else {
                                next.store(end, Ordering::Relaxed);
                            }
                            results.1.insert(seed, failure);
                        }
                    }
                }
            });
        }
    });
    results.into_inner().expect("no thread panicked")
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let began = Instant::now();
    let (courses, failures) = simulate(&arguments);
    if let (false, Some(failure)) = (arguments.all, failures.values().next()) {
        println!("{failure}");
    }
    let secs: f64 = courses.iter().map(|course| course.secs).sum();
    let entries: u64 = courses.iter().map(|course| course.entries).sum();
    let mut faults: BTreeMap<String, u64> = simulator::FAULTS.iter().map(|fault| (format!("{fault:?}"), 0)).collect();
    for (name, number) in courses.iter().flat_map(|course| &course.faults) {
        *faults.entry(name.clone()).or_default() += number;
    }
    let (seeds, took) = (courses.len(), began.elapsed().as_secs_f64());
    println!("{seeds} seeds clean: {secs:.0} virtual seconds, {entries} events and commands, in {took:.1} s");
    println!("faults: {faults:?}");
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
