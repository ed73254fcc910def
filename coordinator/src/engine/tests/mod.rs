//! Each rule by the exact commands it leads to; then any course of events at all.

mod leasing;
mod membership;
mod pace;
mod property;
mod relay;
mod step;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_model::batch::Sums;
use lockstep_model::tree::Block;

use super::command::{Lease, Task};
use super::event::BlockDone;
use super::{Command, DeviceClass, Engine, EngineConfig, Event, LeaseId, OnDispute, Start, Ticket, Time, WorkerId};

/// Two steps of four slots; no evaluation, no samples, a checkpoint at the end alone.
fn config() -> EngineConfig {
    EngineConfig { max_bad_steps: 3, ..EngineConfig::plain(2, 4) }
}

/// Slot `i` has loss `i + 1` and weight 1.
fn sums_of(slots: std::ops::Range<u32>) -> Sums {
    Sums { loss: slots.clone().map(|slot| f64::from(slot + 1)).sum(), weight: slots.len() as f64, ..Sums::default() }
}

/// A right answer to a lease in a run of `config`.
fn answer(config: &EngineConfig, worker: WorkerId, lease: &Lease) -> BlockDone {
    let Lease { id, step, version, task, block } = *lease;
    let (slots, digest) = match task {
        Task::Gradient => (block.slots(config.slots), Some([0; 32])),
        Task::Evaluate => (block.slots(config.eval_slots), None),
        Task::Reference => (block.slots(config.reference_slots), Some([0; 32])),
    };
    let slot_sums = match task {
        Task::Gradient => Vec::new(),
        Task::Evaluate | Task::Reference => slots.clone().map(|slot| sums_of(slot..slot + 1)).collect(),
    };
    let (norm, sums) = ((task == Task::Gradient).then_some(1.0), sums_of(slots));
    let compute = Duration::from_secs(1);
    BlockDone { worker, lease: id, step, version, task, block, digest, norm, sums, slot_sums, compute }
}

/// An engine under test. Whatever it commands comes back as text, one command a line.
struct Run {
    engine: Engine,
    now: Time,
    joined: u64,
    /// The newest lease of each worker.
    leases: BTreeMap<WorkerId, Lease>,
}

impl Run {
    fn new(config: EngineConfig) -> Self {
        let now = Time::default();
        Self { engine: Engine::new(config, now), now, joined: 0, leases: BTreeMap::new() }
    }

    fn send(&mut self, event: Event) -> String {
        let commands = self.engine.handle(event, self.now);
        for command in &commands {
            if let Command::Lease { worker, lease } = command {
                self.leases.insert(*worker, *lease);
            }
        }
        commands.iter().map(|command| format!("{command}\n")).collect()
    }

    /// A worker of class `class` asks to join.
    fn ask(&mut self, class: u8) -> String {
        self.joined += 1;
        let name = format!("host-{}", self.joined);
        let device = "cpu".to_string();
        self.send(Event::JoinRequested {
            ticket: Ticket(self.joined),
            name,
            device,
            class: DeviceClass([class; 32]),
            workers: 1,
        })
    }

    fn open(&mut self, worker: u64) -> String {
        self.send(Event::ControlOpened { worker: WorkerId(worker) })
    }

    fn close(&mut self, worker: u64) -> String {
        self.send(Event::ControlClosed { worker: WorkerId(worker) })
    }

    /// A worker joins and opens its control stream.
    fn join(&mut self) -> String {
        let asked = self.ask(7);
        asked + &self.open(self.joined)
    }

    /// The right answer to the newest lease of `worker`.
    fn answer_of(&self, worker: u64) -> BlockDone {
        let worker = WorkerId(worker);
        answer(&self.engine.config, worker, &self.leases[&worker])
    }

    /// `worker` begins to push the gradient of its newest lease.
    fn push(&mut self, worker: u64) -> String {
        let worker = WorkerId(worker);
        let lease = self.leases[&worker].id;
        self.send(Event::PushBegun { worker, lease })
    }

    /// `worker` answers its newest lease.
    fn done(&mut self, worker: u64) -> String {
        let done = self.answer_of(worker);
        self.send(Event::BlockDone(done))
    }

    /// `worker` answers its newest lease after computing for `secs`.
    fn done_in(&mut self, worker: u64, secs: u64) -> String {
        let compute = Duration::from_secs(secs);
        let done = BlockDone { compute, ..self.answer_of(worker) };
        self.send(Event::BlockDone(done))
    }

    /// `worker` answers its newest lease wrongly.
    fn lie(&mut self, worker: u64) -> String {
        let done = BlockDone { digest: Some([9; 32]), ..self.answer_of(worker) };
        self.send(Event::BlockDone(done))
    }

    /// `worker` answers its newest lease with a gradient of this norm.
    fn done_with_norm(&mut self, worker: u64, norm: f64) -> String {
        let done = BlockDone { norm: Some(norm), ..self.answer_of(worker) };
        self.send(Event::BlockDone(done))
    }

    /// The first worker that holds a lease.
    fn holder(&self) -> u64 {
        let status = self.engine.status();
        let holder = status.members.iter().find(|member| !member.leases.is_empty());
        holder.expect("somebody holds a lease").worker.0
    }

    /// Everybody says that it lives.
    fn hear_all(&mut self) -> String {
        let members = self.engine.status().members.into_iter();
        members.map(|member| self.send(Event::Heartbeat { worker: member.worker })).collect()
    }

    fn decline(&mut self, worker: u64) -> String {
        let worker = WorkerId(worker);
        let lease = self.leases[&worker].id;
        self.send(Event::Declined { worker, lease, reason: "out of memory".into() })
    }

    fn applied(&mut self, step: u64) -> String {
        self.send(Event::StepApplied { step, skipped: false })
    }

    fn written(&mut self, step: u64) -> String {
        self.send(Event::CheckpointWritten { step })
    }

    fn stop(&mut self) -> String {
        self.send(Event::StopRequested { reason: "interrupted".into() })
    }

    fn tick(&mut self) -> String {
        self.send(Event::Tick)
    }

    fn pass(&mut self, secs: u64) {
        self.now = self.now + Duration::from_secs(secs);
    }

    /// Time passes, in which everybody says that it lives.
    fn pass_and_tick(&mut self, secs: u64) -> String {
        self.pass(secs);
        self.hear_all() + &self.tick()
    }

    fn waiting_for(&self) -> String {
        self.engine.status().waiting_for
    }
}
