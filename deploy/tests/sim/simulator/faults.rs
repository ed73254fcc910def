//! What goes wrong, and the end of it.

use std::time::Duration;

use lockstep_coordinator::engine::Event;

use super::invariants::Violation;
use super::network::ConnectionId;
use super::scenario::Fault;
use super::world::{Happening, Rank, World};

impl World {
    /// Expects the next fault.
    pub(crate) fn expect_fault(&mut self) {
        if self.scenario.faults.is_empty() {
            return;
        }
        // Exponentially distributed, as if faults knew nothing of one another.
        let wait = -(1.0 - self.chance.unit()).ln() * self.scenario.secs_between_faults;
        self.after(Duration::from_secs_f64(wait), Rank::Message, Happening::Fault);
    }

    /// Something goes wrong.
    pub(crate) fn strike(&mut self) -> Result<(), Violation> {
        if self.now >= self.scenario.faults_end {
            return Ok(());
        }
        let Some(fault) = self.chance.pick(&self.scenario.faults.clone()) else { return Ok(()) };
        let victim = self.chance.between(0, self.workers.len() as u64 - 1) as usize;
        self.note(|| format!("{fault:?}, of worker {victim} if of any"));
        *self.faults.entry(format!("{fault:?}")).or_default() += 1;
        let liveness_secs = self.scenario.engine.liveness_timeout.as_secs_f64();
        match fault {
            Fault::WorkerCrash => self.crash_worker(victim, false),
            Fault::WorkerVanishes => self.crash_worker(victim, true),
            Fault::ManyCrash => {
                for worker in 0..self.workers.len() {
                    if self.chance.happens(0.5) {
                        self.crash_worker(worker, false);
                    }
                }
            }
            Fault::WorkerStall => {
                let stall = self.chance.secs(0.1, 2.0 * liveness_secs);
                self.workers[victim].stalled_until = self.now + stall;
            }
            Fault::Slowdown => self.workers[victim].slow_until = self.now + self.chance.secs(1.0, 30.0),
            Fault::Partition => {
                let until = self.now + self.chance.secs(0.1, 2.0 * liveness_secs);
                self.network.cut(victim, until);
            }
            Fault::Break => {
                if let Some(connection) = self.workers[victim].connection() {
                    self.break_connection(connection, true, true);
                }
            }
            Fault::ComputeFails => self.workers[victim].fails_next = true,
            Fault::Damage => self.workers[victim].damages_next = true,
            Fault::Muddle => self.workers[victim].muddles_next = true,
            Fault::Duplicate => self.workers[victim].repeats_next = true,
            Fault::CoordinatorCrash => self.crash_coordinator(),
            Fault::CoordinatorCrashTorn => {
                if let Some(mut checkpoint) = self.writing.take() {
                    checkpoint.whole = false;
                    checkpoint.params ^= 1;
                    self.disk.write(checkpoint, self.scenario.keep_last);
                }
                self.crash_coordinator();
            }
            Fault::CoordinatorStall => {
                self.coordinator_stalled_until = self.now + self.chance.secs(0.1, 2.0 * liveness_secs);
            }
            Fault::Stop => self.decide(Event::StopRequested { reason: "interrupted".into() }, None)?,
            Fault::DiskFull => self.disk_full = true,
        }
        self.expect_fault();
        Ok(())
    }

    /// A worker dies. Its connection breaks, or nobody says so.
    fn crash_worker(&mut self, worker: usize, in_silence: bool) {
        let connection = self.workers[worker].connection();
        self.end_worker(worker);
        if let Some(connection) = connection {
            self.break_connection(connection, false, !in_silence);
        }
        let wait = self.chance.secs(0.2, 30.0);
        self.after(wait, Rank::Message, Happening::StartWorker(worker));
    }

    /// The coordinator dies, and is started again.
    pub(crate) fn crash_coordinator(&mut self) {
        if self.coordinator.is_none() {
            return;
        }
        self.writing = None;
        self.end_coordinator();
        let wait = self.chance.secs(0.1, 10.0);
        self.after(wait, Rank::Message, Happening::StartCoordinator);
    }

    /// Nothing passes on a connection any more; those who are to learn of it do.
    pub(crate) fn break_connection(&mut self, id: ConnectionId, worker_learns: bool, coordinator_learns: bool) {
        let now = self.now;
        let Some(connection) = self.network.get_mut(id) else { return };
        connection.broken_at.get_or_insert(now);
        if worker_learns {
            let wait = self.network.latency();
            self.after(wait, Rank::Message, Happening::WorkerLoses(id));
        }
        if coordinator_learns {
            let wait = self.network.latency();
            self.after(wait, Rank::Message, Happening::CoordinatorLoses(id));
        }
    }

    /// Nothing goes wrong any more, and everybody who may be trusted is there.
    pub(crate) fn end_faults(&mut self) -> Result<(), Violation> {
        self.note(|| "faults end".into());
        self.network.heal();
        self.disk_full = false;
        self.coordinator_stalled_until = self.now;
        for worker in 0..self.workers.len() {
            let state = &mut self.workers[worker];
            state.stalled_until = Duration::ZERO;
            state.slow_until = Duration::ZERO;
            state.fails_next = false;
            state.damages_next = false;
            state.muddles_next = false;
            if state.traits.nature.is_right() {
                self.start_worker(worker);
            }
        }
        self.start_coordinator()
    }
}
