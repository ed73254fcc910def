//! A cluster and its run, drawn from a seed: who takes part, what is to be computed, and what will go wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use lockstep_coordinator::engine::{EngineConfig, OnDispute, Start};
use lockstep_worker::session::Timing;

use super::chance::Chance;
use super::numbers::Numbers;

/// One run in so many has a thousand workers.
const LARGE_EVERY: u64 = 250;

/// What a worker is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Nature {
    /// Computes right.
    Honest,
    /// Computes right but for one flipped bit, in its block of this number.
    Flips { block: u32 },
    /// Computes wrong, in this share of its blocks.
    Lies { share: f64 },
    /// As [`Self::Lies`], but what comes out is no number.
    Breaks { share: f64 },
    /// From this block on its device never answers, though the worker goes on living.
    Hangs { block: u32 },
}

impl Nature {
    /// Whether all that it answers is right.
    pub(crate) fn is_right(self) -> bool {
        matches!(self, Self::Honest | Self::Hangs { .. })
    }
}

/// A worker to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traits {
    pub(crate) secs_per_slot: f64,
    pub(crate) nature: Nature,
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A worker dies, and its connection with it.
    WorkerCrash,
    /// A worker vanishes without a word.
    WorkerVanishes,
    /// Many workers die at once.
    ManyCrash,
    /// A worker's process stands still for a while.
    WorkerStall,
    /// A worker takes many times as long for a while.
    Slowdown,
    /// Nothing passes between a worker and the coordinator for a while.
    Partition,
    /// A connection breaks.
    Break,
    /// A worker's next computation fails.
    ComputeFails,
    /// A vector arrives damaged.
    Damage,
    /// A result names another block than its lease.
    Muddle,
    /// A result arrives twice.
    Duplicate,
    /// The coordinator dies.
    CoordinatorCrash,
    /// The coordinator dies while a checkpoint is half written.
    CoordinatorCrashTorn,
    /// The coordinator's process stands still for a while.
    CoordinatorStall,
    /// Somebody asks the run to stop; later it is resumed.
    Stop,
    /// The next checkpoint cannot be written.
    DiskFull,
}

/// All of them.
pub(crate) const FAULTS: [Fault; 16] = [
    Fault::WorkerCrash,
    Fault::WorkerVanishes,
    Fault::ManyCrash,
    Fault::WorkerStall,
    Fault::Slowdown,
    Fault::Partition,
    Fault::Break,
    Fault::ComputeFails,
    Fault::Damage,
    Fault::Muddle,
    Fault::Duplicate,
    Fault::CoordinatorCrash,
    Fault::CoordinatorCrashTorn,
    Fault::CoordinatorStall,
    Fault::Stop,
    Fault::DiskFull,
];

/// A cluster and its run.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) workers: Vec<Traits>,
    /// The run, at its start.
    pub(crate) engine: EngineConfig,
    pub(crate) numbers: Numbers,
    pub(crate) timing: Timing,
    /// Seconds that a message travels, at least and at most.
    pub(crate) latency_secs: (f64, f64),
    /// Seconds that an apply, and that writing a checkpoint takes, at most.
    pub(crate) apply_secs: f64,
    pub(crate) checkpoint_secs: f64,
    /// Checkpoints that stay on disk.
    pub(crate) keep_last: usize,
    /// What goes wrong, and how often: seconds between two faults on average. None of it in a quiet run.
    pub(crate) faults: Vec<Fault>,
    pub(crate) secs_between_faults: f64,
    /// Until when things go wrong.
    pub(crate) faults_end: Duration,
    /// Until when the run must be finished.
    pub(crate) must_end: Duration,
}

impl Scenario {
    /// One worker, nothing fails.
    pub(crate) fn quiet(seed: u64) -> Self {
        let mut scenario = Self::draw(seed);
        scenario.workers = vec![Traits { secs_per_slot: 0.1, nature: Nature::Honest }];
        scenario.engine.min_workers = 1;
        scenario.engine.audit = 0.0;
        scenario.faults.clear();
        scenario.faults_end = Duration::ZERO;
        scenario.must_end = Duration::from_secs(100_000);
        scenario
    }

    /// The scenario of a seed.
    pub(crate) fn draw(seed: u64) -> Self {
        let mut chance = Chance::new(seed, 1);
        let large = seed % LARGE_EVERY == LARGE_EVERY - 1;
        let count = if large { 1000 } else { chance.scale(1.0, 65.0) as usize };
        let slowest = chance.scale(0.02, 1.0);
        let spread = chance.scale(1.0, 20.0);
        let speeds: Vec<f64> = (0..count).map(|_| slowest / chance.scale(1.0, spread)).collect();
        let natures = natures(&mut chance, count);
        let wrong = natures.iter().any(|nature| matches!(nature, Nature::Flips { .. } | Nature::Lies { .. }));
        let broken = natures.iter().any(|nature| matches!(nature, Nature::Breaks { .. }));
        let hanging = natures.iter().any(|nature| matches!(nature, Nature::Hangs { .. }));
        let checkable = count >= if hanging { 3 } else { 2 };
        let audit = match chance.between(0, 9) {
            _ if wrong => 1.0,
            0..=1 if checkable => 1.0,
            2..=4 if checkable => chance.unit(),
            5..=8 if broken => chance.unit(),
            _ => 0.0,
        };
        let slots = if large { chance.between(1, 1500) } else { chance.scale(1.0, 64.0) as u64 } as u32;
        let total_steps = if large { chance.between(1, 2) } else { chance.scale(1.0, 16.0) as u64 };
        let eval_slots = if chance.happens(0.6) { chance.between(1, 9) as u32 } else { 0 };
        let mut beginning = Chance::new(seed, 5);
        let reference_slots = if beginning.happens(0.2) { beginning.between(1, 40) as u32 } else { 0 };
        // Two who see what a broken worker sends, at least: one who is alone checks itself.
        let least = if broken { 2 } else { 1 };
        let min_workers = match chance.between(0, 3) {
            0 => chance.between(least, least.max(count as u64 / 2)) as u32,
            _ => least as u32,
        };
        let hanging_devices = natures.iter().filter(|nature| matches!(nature, Nature::Hangs { .. })).count() as u32;
        let engine = EngineConfig {
            total_steps,
            slots,
            eval_slots,
            reference_slots,
            evaluate_every_steps: chance.between(0, 4),
            sample_every_steps: chance.between(0, 3),
            checkpoint_every_steps: chance.between(0, 4),
            checkpoint_interval: chance.happens(0.5).then(|| chance.secs(0.5, 30.0)),
            stop_after: None,
            min_workers: min_workers.min(count as u32 - hanging_devices),
            exact: true,
            audit,
            audit_seed: chance.number(),
            quarantined: BTreeSet::new(),
            on_dispute: OnDispute::Wait,
            max_bad_steps: 3,
            liveness_timeout: chance.secs(4.0, 15.0),
            max_slots_per_lease: 1 << chance.between(0, 6),
            start: Start::Fresh,
        };
        let numbers = Numbers {
            seed,
            slots,
            eval_slots,
            reference_slots,
            outliers: if chance.happens(0.3) { 0.03 } else { 0.0 },
            not_finite: if chance.happens(0.15) { chance.scale(0.05, 0.5) / f64::from(slots) } else { 0.0 },
        };
        let latency = chance.scale(0.0005, 0.1);
        let timing = Timing {
            heartbeat_interval: engine.liveness_timeout / chance.between(3, 6) as u32,
            liveness_timeout: engine.liveness_timeout,
        };
        let work = f64::from(slots) * total_steps as f64 * (1.0 + audit)
            + f64::from(reference_slots) * (1.0 + audit.ceil())
            + f64::from(eval_slots) * (1.0 + total_steps as f64 / engine.evaluate_every_steps.max(1) as f64);
        let power: f64 = speeds.iter().map(|secs| secs.recip()).sum();
        let quiet_secs = work / power + total_steps as f64 * (6.0 * latency + 0.1);
        let faults: Vec<Fault> = match chance.happens(0.05) {
            true => Vec::new(),
            false => FAULTS.into_iter().filter(|_| chance.happens(0.5)).collect(),
        };
        let secs_between_faults = (quiet_secs / chance.scale(1.0, 40.0)).max(0.05);
        let faults_secs = (quiet_secs * chance.scale(1.0, 5.0)).clamp(1.0, 400.0);
        let alone_secs = slowest * f64::from(slots + eval_slots + reference_slots);
        // Where nothing is known of how long a task takes, a lease is late after minutes.
        let unknown_secs = if hanging { 3000.0 } else { 0.0 };
        let recovery_secs = 40.0 + 6.0 * engine.liveness_timeout.as_secs_f64() + unknown_secs;
        let must_end_secs = faults_secs + recovery_secs + (total_steps + 1) as f64 * (20.0 + 12.0 * alone_secs);
        Self {
            seed,
            workers: speeds
                .into_iter()
                .zip(natures)
                .map(|(secs, nature)| Traits { secs_per_slot: secs, nature })
                .collect(),
            engine,
            numbers,
            timing,
            latency_secs: (latency, latency * chance.scale(1.0, 20.0)),
            apply_secs: chance.scale(0.001, 0.3),
            checkpoint_secs: chance.scale(0.01, 3.0),
            keep_last: chance.between(1, 3) as usize,
            faults,
            secs_between_faults,
            faults_end: Duration::from_secs_f64(faults_secs),
            must_end: Duration::from_secs_f64(must_end_secs),
        }
    }
}

/// Most clusters are honest. Those who are not are few enough that three others can tell.
fn natures(chance: &mut Chance, count: usize) -> Vec<Nature> {
    let mut natures = vec![Nature::Honest; count];
    let spare = count.saturating_sub(3);
    if spare == 0 {
        return natures;
    }
    let kind = chance.between(0, 9);
    let wrong = chance.between(1, spare.min(4) as u64) as usize;
    for nature in natures.iter_mut().take(wrong) {
        *nature = match kind {
            0 => Nature::Flips { block: chance.between(1, 6) as u32 },
            1 => Nature::Lies { share: chance.scale(0.05, 1.0) },
            2 | 3 => Nature::Breaks { share: chance.scale(0.05, 1.0) },
            4 => Nature::Hangs { block: chance.between(1, 6) as u32 },
            _ => Nature::Honest,
        };
    }
    natures
}
