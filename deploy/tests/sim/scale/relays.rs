//! Relays: to those whom it serves a relay is a coordinator, to its own coordinator one worker, that computes for as long as a
//! step of the cluster behind it takes.
//!
//! So a tree is simulated from its leaves upwards, each level a star of its own under the real engine. One slot of a relay is the
//! block of all workers behind it: the engine lends it whole, since it knows how many they are.

use super::cluster::{Course, Shape, run};

/// A tree of relays over the workers of a star.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    /// What it is to compute, with the coordinator's own link.
    pub(crate) star: Shape,
    /// Of a relay's link, each way.
    pub(crate) relay_bits_per_sec: f64,
    /// How many workers or relays a relay serves, at least 2. There are so many levels of them that the coordinator serves
    /// no more, either.
    pub(crate) fan_out: u32,
}

impl Tree {
    /// How many relays there are between a worker and the coordinator.
    pub(crate) fn levels(&self) -> u32 {
        let (mut served, mut levels) = (self.star.workers, 0);
        while served > self.fan_out {
            served = served.div_ceil(self.fan_out);
            levels += 1;
        }
        levels
    }

    /// Runs the full groups of each level, and then those whom the coordinator serves itself. Of links, sums and engine the
    /// steps say what the coordinator's are; compute is that of the last level.
    pub(crate) fn run(&self) -> Course {
        // Whom somebody serves, and what those take.
        let mut served = self.star.clone();
        for _ in 0..self.levels() {
            let (bits_per_sec, apply_secs) = (self.relay_bits_per_sec, 0.0);
            let course = run(&Shape { workers: self.fan_out, bits_per_sec, apply_secs, ..served.clone() });
            served = Shape {
                workers: served.workers.div_ceil(self.fan_out),
                slots_per_worker: 1,
                worker_bits_per_sec: self.relay_bits_per_sec,
                secs_per_slot: course.steps.last().map_or(0.0, |step| step.secs),
                spread: 0.0,
                ..served
            };
        }
        run(&served)
    }
}
