//! A cluster in virtual time: the real engine and real sessions, with everything around them simulated and drawn from one
//! seed. Two phases: first things go wrong, and what must hold is checked after every event; then nothing does any more,
//! and the run must finish.
//!
//! `scenario` draws a cluster, `faults` breaks it, `world` lets time pass. `worker` and `coordinator` are processes,
//! `network` and `disk` what lies between and beneath them, `numbers` what they compute. `history` is the run as it looks
//! from outside, `invariants` what must hold in it, `mutation` ways to break a rule on purpose.

pub(crate) mod chance;
mod coordinator;
mod disk;
mod faults;
mod history;
mod invariants;
mod mutation;
mod network;
pub(crate) mod numbers;
mod scenario;
mod trace;
mod worker;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub(crate) use self::mutation::{MUTATIONS, Mutation};
pub(crate) use self::scenario::{FAULTS, Scenario};

use self::invariants::Violation;
use self::world::World;

/// How a simulated run went.
#[derive(Debug)]
pub(crate) struct Course {
    /// Of all events and commands.
    pub(crate) hash: u64,
    /// How many of them there were.
    pub(crate) entries: u64,
    /// How much virtual time passed.
    pub(crate) secs: f64,
    /// What went wrong, and how often.
    pub(crate) faults: BTreeMap<String, u64>,
}

/// A run in which something does not hold.
#[derive(Debug)]
pub(crate) struct Failure {
    scenario: Scenario,
    mutation: Mutation,
    violation: Violation,
    recent: String,
}

impl Failure {
    /// In which seed.
    pub(crate) fn seed(&self) -> u64 {
        self.scenario.seed
    }

    /// What does not hold.
    pub(crate) fn invariant(&self) -> &'static str {
        self.violation.invariant
    }

    /// How it does not.
    pub(crate) fn what(&self) -> &str {
        &self.violation.what
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scenario, mutation, violation: Violation { invariant, what }, recent } = self;
        let seed = scenario.seed;
        writeln!(f, "seed {seed}: {invariant} does not hold: {what}")?;
        writeln!(f, "{} workers, {:?}, faults {:?}", scenario.workers.len(), scenario.engine, scenario.faults)?;
        writeln!(f, "the last events, at their seconds:\n{recent}")?;
        let mutation = match mutation {
            Mutation::None => String::new(),
            mutation => format!(" --mutation {mutation:?}"),
        };
        write!(f, "replay: cargo run --release --example simulate -- --seed {seed} --verbose{mutation}")
    }
}

/// Runs the scenario of a seed.
///
/// # Errors
/// The first invariant that does not hold.
pub(crate) fn run(seed: u64, mutation: Mutation, verbose: bool) -> Result<Course, Box<Failure>> {
    run_scenario(Scenario::draw(seed), mutation, verbose)
}

/// Runs a scenario.
///
/// # Errors
/// The first invariant that does not hold.
pub(crate) fn run_scenario(scenario: Scenario, mutation: Mutation, verbose: bool) -> Result<Course, Box<Failure>> {
    let mut world = World::new(scenario, mutation, verbose);
    // A panic leaves the world as it was, to be looked at and nothing else.
    let ran = catch_unwind(AssertUnwindSafe(|| world.run()));
    let panicked = |_| Err(Violation { invariant: "nothing_panics", what: "see above for where it did".into() });
    match ran.unwrap_or_else(panicked) {
        Ok(()) => Ok(Course {
            hash: world.trace.hash(),
            entries: world.trace.entries(),
            secs: world.now.as_secs_f64(),
            faults: world.faults,
        }),
        Err(violation) => {
            let recent = world.trace.recent();
            Err(Box::new(Failure { scenario: world.scenario, mutation, violation, recent }))
        }
    }
}

/// Runs a seed twice.
///
/// # Errors
/// The first invariant that does not hold; that the two runs are the same is one of them.
pub(crate) fn run_twice(seed: u64, mutation: Mutation) -> Result<Course, Box<Failure>> {
    let first = run(seed, mutation, false)?;
    let second = run(seed, mutation, false)?;
    if first.hash != second.hash {
        let what = format!("{} events and commands, then {}", first.entries, second.entries);
        let violation = Violation { invariant: "the_same_seed_gives_the_same_run", what };
        return Err(Box::new(Failure { scenario: Scenario::draw(seed), mutation, violation, recent: String::new() }));
    }
    Ok(first)
}
