//! How long a training step takes with any number of workers, and where the coordinator's link becomes the limit: the real
//! engine and real sessions in virtual time, over links of given bandwidth (`tests/sim/scale`).
//!
//! ```sh
//! cargo run --release --example scale -- --workers 1000
//! cargo run --release --example scale -- --sweep
//! ```

#[path = "../tests/sim/scale/mod.rs"]
mod scale;
#[allow(dead_code, unused_imports)] // all that fails
#[path = "../tests/sim/simulator/mod.rs"]
mod simulator;

use std::time::Duration;

use clap::Parser;
use serde::Serialize;

use scale::cluster::{Course, Shape, Step, numbers, run};
use scale::relays::Tree;
use simulator::numbers::Quiet;

/// How many workers a sweep tries.
const SWEEP: [u32; 5] = [1, 10, 100, 1_000, 10_000];
/// Fan-outs that a sweep tries.
const FAN_OUTS: [u32; 6] = [4, 8, 16, 32, 64, 128];
/// The link sets the time of a step once workers compute for less than this share of it.
const SATURATED: f64 = 0.5;

/// A training step of a simulated cluster: how long it takes, and what the coordinator has to do in it.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many workers compute
    #[arg(long, default_value_t = 100)]
    workers: u32,
    /// Simulate 1, 10, 100, 1,000 and 10,000 workers, find the number at which the coordinator's link sets the time of a
    /// step, and the relays that bring it back
    #[arg(long)]
    sweep: bool,
    /// Floats of the vector that travels
    #[arg(long, default_value_t = 10e6)]
    parameters: f64,
    /// Bytes of each float of a gradient on its way to the coordinator
    #[arg(long, default_value_t = 4.0)]
    up_bytes: f64,
    /// Bytes of each parameter on its way to a worker
    #[arg(long, default_value_t = 4.0)]
    down_bytes: f64,
    /// The coordinator's link, each way, in Gbit/s
    #[arg(long, default_value_t = 10.0)]
    link_gbit: f64,
    /// A worker's link, each way, in Gbit/s
    #[arg(long, default_value_t = 1.0)]
    worker_gbit: f64,
    /// A relay's link, each way, in Gbit/s; by default as the coordinator's
    #[arg(long)]
    relay_gbit: Option<f64>,
    /// From one machine to another, one way, in milliseconds
    #[arg(long, default_value_t = 1.0)]
    latency_ms: f64,
    /// What a slot takes a worker, in seconds, on average
    #[arg(long, default_value_t = 10.0)]
    slot_secs: f64,
    /// By how much of it workers differ, at most
    #[arg(long, default_value_t = 0.1)]
    spread: f64,
    /// Slots of a step, for each worker
    #[arg(long, default_value_t = 1)]
    slots_per_worker: u32,
    /// Steps to simulate; what is printed is the mean of all but the first
    #[arg(long, default_value_t = 3)]
    steps: u64,
    /// Gradients that a coordinator or relay adds, in GB/s of f32
    #[arg(long, default_value_t = 4.0)]
    add_gbytes: f64,
    /// What the optimizer and publishing take, in seconds a step
    #[arg(long, default_value_t = 0.1)]
    apply_secs: f64,
    /// Between two heartbeats of a worker, in seconds
    #[arg(long, default_value_t = 10.0)]
    heartbeat_secs: f64,
    /// Workers or relays that each relay serves, in as many levels as it takes; 0: no relays
    #[arg(long, default_value_t = 0)]
    relays: u32,
    /// From which the workers' speeds are drawn
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// As JSON, with each step
    #[arg(long)]
    json: bool,
}

impl Arguments {
    fn shape(&self) -> Shape {
        Shape {
            workers: self.workers,
            slots_per_worker: self.slots_per_worker,
            steps: self.steps,
            parameters: self.parameters,
            up_bytes: self.up_bytes,
            down_bytes: self.down_bytes,
            bits_per_sec: self.link_gbit * 1e9,
            worker_bits_per_sec: self.worker_gbit * 1e9,
            latency: Duration::from_secs_f64(self.latency_ms / 1e3),
            secs_per_slot: self.slot_secs,
            spread: self.spread,
            added_bytes_per_sec: self.add_gbytes * 1e9,
            apply_secs: self.apply_secs,
            heartbeat_interval: Duration::from_secs_f64(self.heartbeat_secs),
            seed: self.seed,
        }
    }

    fn tree(&self, workers: u32, fan_out: u32) -> Tree {
        let relay_bits_per_sec = self.relay_gbit.unwrap_or(self.link_gbit) * 1e9;
        Tree { star: Shape { workers, ..self.shape() }, relay_bits_per_sec, fan_out }
    }

    fn check(&self) -> Result<(), String> {
        let positive = [
            ("--parameters", self.parameters),
            ("--up-bytes", self.up_bytes),
            ("--down-bytes", self.down_bytes),
            ("--link-gbit", self.link_gbit),
            ("--worker-gbit", self.worker_gbit),
            ("--relay-gbit", self.relay_gbit.unwrap_or(1.0)),
            ("--slot-secs", self.slot_secs),
            ("--add-gbytes", self.add_gbytes),
            ("--heartbeat-secs", self.heartbeat_secs),
        ];
        if let Some((name, value)) = positive.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            return Err(format!("{name} {value}: must be above 0"));
        }
        let not_negative = [("--latency-ms", self.latency_ms), ("--apply-secs", self.apply_secs)];
        if let Some((name, value)) = not_negative.into_iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            return Err(format!("{name} {value}: must be 0 or more"));
        }
        match self {
            _ if !(0.0..1.0).contains(&self.spread) => Err(format!("--spread {}: must be in [0, 1)", self.spread)),
            _ if self.workers == 0 || self.slots_per_worker == 0 => {
                Err("--workers and --slots-per-worker must be at least 1".into())
            }
            _ if self.steps < 2 => Err("--steps must be at least 2: the first is not counted".into()),
            _ if self.relays == 1 => Err("--relays 1: a relay serves at least 2".into()),
            _ => Ok(()),
        }
    }
}

/// What a cluster's steps took, on average over all but the first.
#[derive(Debug, Serialize)]
struct Row {
    workers: u32,
    fan_out: u32,
    relay_levels: u32,
    /// Share of the step in which a worker computes.
    compute_share: f64,
    mean: Step,
    engine_events_per_sec: f64,
    steps: Vec<Step>,
}

/// A star of so many workers.
///
/// # Panics
/// If the cluster does not end with the parameters that a plain loop ends with.
fn star(shape: &Shape, workers: u32) -> Row {
    let shape = Shape { workers, ..shape.clone() };
    let Course { steps, params } = run(&shape);
    let quiet = Quiet::run(&numbers(&shape), shape.steps, 0);
    assert_eq!(Some(&params), quiet.versions.last(), "{workers} workers computed something else than one would");
    row(workers, 0, 0, steps)
}

/// The same workers behind relays.
fn tree(tree: &Tree) -> Row {
    let (star, workers) = (&tree.star, f64::from(tree.star.workers));
    let mut steps = tree.run().steps;
    let compute_secs = workers * f64::from(star.slots_per_worker) * star.secs_per_slot;
    steps.iter_mut().for_each(|step| step.compute_secs = compute_secs);
    row(star.workers, tree.fan_out, tree.levels(), steps)
}

fn row(workers: u32, fan_out: u32, relay_levels: u32, steps: Vec<Step>) -> Row {
    let later = &steps[1..];
    let mean_of = |of: fn(&Step) -> f64| later.iter().map(of).sum::<f64>() / later.len() as f64;
    let count_of = |of: fn(&Step) -> u64| later.iter().map(of).sum::<u64>() / later.len() as u64;
    let mean = Step {
        secs: mean_of(|step| step.secs),
        compute_secs: mean_of(|step| step.compute_secs),
        down_bytes: mean_of(|step| step.down_bytes),
        up_bytes: mean_of(|step| step.up_bytes),
        down_use: mean_of(|step| step.down_use),
        up_use: mean_of(|step| step.up_use),
        blocks: count_of(|step| step.blocks),
        added_bytes: mean_of(|step| step.added_bytes),
        engine_events: count_of(|step| step.engine_events),
        engine_secs: mean_of(|step| step.engine_secs),
    };
    Row {
        workers,
        fan_out,
        relay_levels,
        compute_share: mean.compute_secs / (f64::from(workers) * mean.secs),
        mean,
        engine_events_per_sec: mean.engine_events as f64 / mean.engine_secs,
        steps,
    }
}

const HEADING: &str =
    "workers  relays     step  computing  through the link  use down, up      added  engine events     a second";

fn line(row: &Row) -> String {
    let Step { secs, down_bytes, up_bytes, down_use, up_use, added_bytes, engine_events, .. } = row.mean;
    let relays = if row.relay_levels == 0 { "none".into() } else { format!("{}^{}", row.fan_out, row.relay_levels) };
    format!(
        "{:>7}  {relays:>6}  {secs:>6.1} s  {:>7.0} %  {:>13.2} GB  {:>4.0} %, {:>3.0} %  {:>6.2} GB  {engine_events:>13}  {:>9.2} M",
        row.workers,
        100.0 * row.compute_share,
        (down_bytes + up_bytes) / 1e9,
        100.0 * down_use,
        100.0 * up_use,
        added_bytes / 1e9,
        row.engine_events_per_sec / 1e6,
    )
}

/// The least number of workers with which the link sets the time of a step, if so many as `most` are enough.
fn saturation(shape: &Shape, most: u32) -> Option<u32> {
    let saturated = |workers| star(shape, workers).compute_share < SATURATED;
    let (mut fewer, mut enough) = (0, most);
    if !saturated(most) {
        return None;
    }
    while fewer + 1 < enough {
        let middle = fewer + (enough - fewer) / 2;
        if saturated(middle) { enough = middle } else { fewer = middle }
    }
    Some(enough)
}

/// The steps of a sweep, the number of workers at which the star is saturated, and the best relays for the most workers.
#[derive(Debug, Serialize)]
struct Sweep {
    stars: Vec<Row>,
    saturated_at: Option<u32>,
    trees: Vec<Row>,
}

fn sweep(arguments: &Arguments) -> Sweep {
    let shape = arguments.shape();
    let stars: Vec<Row> = SWEEP.iter().map(|workers| star(&shape, *workers)).collect();
    let first = stars.iter().find(|row| row.compute_share < SATURATED).map(|row| row.workers);
    let saturated_at = first.and_then(|most| saturation(&shape, most));
    let most = SWEEP[SWEEP.len() - 1];
    let trees = match saturated_at {
        Some(_) => FAN_OUTS.map(|fan_out| tree(&arguments.tree(most, fan_out))).into(),
        None => Vec::new(),
    };
    Sweep { stars, saturated_at, trees }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    arguments.check().map_err(anyhow::Error::msg)?;
    if !arguments.sweep {
        let row = match arguments.relays {
            0 => star(&arguments.shape(), arguments.workers),
            fan_out => tree(&arguments.tree(arguments.workers, fan_out)),
        };
        match arguments.json {
            true => println!("{}", serde_json::to_string_pretty(&row)?),
            false => println!("{HEADING}\n{}", line(&row)),
        }
        return Ok(());
    }
    let sweep = sweep(&arguments);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&sweep)?);
        return Ok(());
    }
    println!("{HEADING}");
    sweep.stars.iter().for_each(|row| println!("{}", line(row)));
    match sweep.saturated_at {
        None => println!("the star is not saturated: workers compute for more than half of each step"),
        Some(workers) => println!("the star is saturated at {workers} workers: they wait for half of each step"),
    }
    sweep.trees.iter().for_each(|row| println!("{}", line(row)));
    if let Some(best) = sweep.trees.iter().min_by(|one, other| one.mean.secs.total_cmp(&other.mean.secs)) {
        println!(
            "{} workers: {:.1} s a step with relays that serve {} each, in {} levels",
            best.workers, best.mean.secs, best.fan_out, best.relay_levels
        );
    }
    Ok(())
}
