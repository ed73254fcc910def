//! A cluster that does as it is told, in virtual time: all that its engine hears, to be played to another engine again.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use lockstep_coordinator::engine::command::{Lease, Task};
use lockstep_coordinator::engine::event::BlockDone;
use lockstep_coordinator::engine::{Command, DeviceClass, Engine, EngineConfig, Event, Ticket, Time, WorkerId};
use lockstep_model::batch::Sums;
use lockstep_model::random::{Draws, Stream};

/// Between two workers that join.
const JOIN_INTERVAL: Duration = Duration::from_millis(1);
/// Between two heartbeats of a worker.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// What the optimizer takes.
const APPLY: Duration = Duration::from_millis(100);

/// A cluster and its run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cluster {
    pub(crate) workers: u32,
    pub(crate) slots_per_worker: u32,
    /// Seconds a slot, of the fastest worker and of the slowest; those of the others lie evenly between.
    pub(crate) secs_per_slot: (f64, f64),
    /// Share of the blocks that another worker computes, too.
    pub(crate) audit: f64,
    pub(crate) steps: u64,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Join(u32),
    Heartbeat(WorkerId),
    Computed(WorkerId, u64),
    Applied(u64),
}

impl Cluster {
    /// Its engine, before anything happened.
    pub(crate) fn engine(&self) -> Engine {
        let config = EngineConfig {
            min_workers: self.workers,
            audit: self.audit,
            max_bad_steps: 3,
            ..EngineConfig::plain(self.steps, self.workers * self.slots_per_worker)
        };
        Engine::new(config, Time::default())
    }

    /// All that its engine hears until the last step is applied, and when.
    pub(crate) fn events(&self) -> Vec<(Event, Time)> {
        let mut engine = self.engine();
        let mut heard = Vec::new();
        let mut leases: Vec<Option<Lease>> = vec![None; self.workers as usize + 1];
        let mut queue: BinaryHeap<Reverse<(Time, Happening)>> =
            (0..self.workers).map(|number| Reverse((Time(JOIN_INTERVAL * number), Happening::Join(number)))).collect();
        let mut over = false;
        while !over {
            let Reverse((now, happening)) = queue.pop().expect("the run ends before everybody rests");
            let tick = engine.next_deadline().filter(|deadline| *deadline < now);
            let events = match (tick, happening) {
                (Some(deadline), _) => {
                    queue.push(Reverse((now, happening)));
                    vec![(Event::Tick, deadline)]
                }
                (None, Happening::Join(number)) => {
                    let worker = WorkerId(u64::from(number) + 1);
                    queue.push(Reverse((now + HEARTBEAT_INTERVAL, Happening::Heartbeat(worker))));
                    let (name, device) = (format!("host-{number}"), "cpu".to_string());
                    let (ticket, class) = (Ticket(worker.0), DeviceClass([1; 32]));
                    let join = Event::JoinRequested { ticket, name, device, class, workers: 1 };
                    vec![(join, now), (Event::ControlOpened { worker }, now)]
                }
                (None, Happening::Heartbeat(worker)) => {
                    queue.push(Reverse((now + HEARTBEAT_INTERVAL, happening)));
                    vec![(Event::Heartbeat { worker }, now)]
                }
                (None, Happening::Computed(worker, id)) => {
                    let lease = leases[worker.0 as usize].take_if(|lease| lease.id.0 == id);
                    lease.map(|lease| (Event::BlockDone(self.answer(worker, &lease)), now)).into_iter().collect()
                }
                (None, Happening::Applied(step)) => {
                    over = step == self.steps;
                    vec![(Event::StepApplied { step, skipped: false }, now)]
                }
            };
            for (event, now) in events {
                heard.push((event.clone(), now));
                for command in engine.handle(event, now) {
                    match command {
                        Command::Lease { worker, lease } => {
                            leases[worker.0 as usize] = Some(lease);
                            let takes = self.takes(worker, &lease);
                            queue.push(Reverse((now + takes, Happening::Computed(worker, lease.id.0))));
                        }
                        // Whoever was overtaken stops at once.
                        Command::Discard { worker, lease, .. } => {
                            leases[worker.0 as usize].take_if(|held| held.id == lease);
                        }
                        Command::ApplyStep { step, .. } => {
                            queue.push(Reverse((now + APPLY, Happening::Applied(step))));
                        }
                        _ => {}
                    }
                }
            }
        }
        heard
    }

    fn takes(&self, worker: WorkerId, lease: &Lease) -> Duration {
        let (fastest, slowest) = self.secs_per_slot;
        let draws = Draws::new(1, Stream::Faults);
        let secs = fastest + (slowest - fastest) * draws.unit(0, worker.0);
        let noise = 0.95 + 0.1 * draws.unit(1, lease.id.0);
        let slots = lease.block.slots(self.workers * self.slots_per_worker).len();
        Duration::from_secs_f64(secs * noise * slots as f64)
    }

    /// What a worker answers: all compute the same, whatever it is.
    fn answer(&self, worker: WorkerId, lease: &Lease) -> BlockDone {
        let Lease { id, step, version, block, .. } = *lease;
        let slots = block.slots(self.workers * self.slots_per_worker).len();
        let sums = Sums { loss: 1.0, weight: slots as f64, ..Sums::default() };
        let norm = 1.0 + Draws::new(1, Stream::Faults).unit(step, u64::from(block.index));
        BlockDone {
            worker,
            lease: id,
            step,
            version,
            task: Task::Gradient,
            block,
            digest: Some([1; 32]),
            norm: Some(norm),
            sums,
            slot_sums: Vec::new(),
            compute: self.takes(worker, lease),
        }
    }
}
