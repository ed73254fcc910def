//! `train --chaos`: faults done on purpose to the processes of a local cluster, for anyone to watch.
//!
//! A seed draws when and what: a worker killed, a worker that stands still for a while, the coordinator killed; each once
//! in three faults, in drawn order, or such of these as are wanted. What happens in between is as in any run: `train` starts again what died.

mod tally;

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use lockstep_model::random::{Draws, Stream};
use lockstep_proto::v1::lockstep_client::LockstepClient;
use lockstep_proto::v1::{StatusReply, StatusRequest, WorkerStatus};
use tokio::sync::{mpsc, watch};
use tonic::transport::{Channel, Endpoint};

pub(crate) use self::tally::Tally;
use crate::child::Blow;
use crate::progress::say;
use crate::supervisor::{self, Announcement};

/// How often the run is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a coordinator may take to answer.
const ANSWER: Duration = Duration::from_secs(1);
/// A worker stands still for 1 to 3 seconds.
const STANDSTILL_SECS: std::ops::Range<f64> = 1.0..3.0;
/// Faults come after half to one and a half times the mean time between them.
const SPREAD: std::ops::Range<f64> = 0.5..1.5;

/// What can be struck.
#[derive(Debug)]
pub(crate) struct Targets {
    /// The coordinator.
    pub(crate) coordinator: mpsc::UnboundedSender<Blow>,
    /// The workers `local-1`, `local-2` and so on.
    pub(crate) workers: Vec<mpsc::UnboundedSender<Blow>>,
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Fault {
    /// `kill -9` of a worker.
    KillWorker,
    /// SIGSTOP to a worker, and SIGCONT a while later.
    StopWorker,
    /// `kill -9` of the coordinator.
    KillCoordinator,
}

/// What each number of a fault is drawn for.
#[derive(Clone, Copy)]
enum Draw {
    Order,
    Pause,
    Victim,
    Standstill,
}

/// Does faults to a cluster, and counts them.
#[derive(Debug)]
pub(crate) struct Chaos {
    draws: Draws,
    kinds: Vec<Fault>,
    every_secs: f64,
    targets: Targets,
    announcements: watch::Receiver<Option<Announcement>>,
    /// Workers that stand still, by index, and until when.
    still: Vec<(Instant, usize)>,
    tally: Tally,
}

impl Chaos {
    /// Faults of these kinds (at least one), drawn from `seed`, one in `every_secs` seconds on average.
    pub(crate) fn new(
        seed: u64,
        kinds: Vec<Fault>,
        every_secs: f64,
        targets: Targets,
        announcements: watch::Receiver<Option<Announcement>>,
    ) -> Self {
        let draws = Draws::new(seed, Stream::Faults);
        Self { draws, kinds, every_secs, targets, announcements, still: Vec::new(), tally: Tally::new(seed) }
    }

    /// What was done, and what came of it.
    pub(crate) fn into_tally(self) -> Tally {
        self.tally
    }

    /// Does faults until dropped. Completes only with an error.
    pub(crate) async fn reign(&mut self) -> anyhow::Error {
        match self.strike_on().await {
            Ok(()) => std::future::pending().await,
            Err(error) => error.context("no more faults can be done"),
        }
    }

    async fn strike_on(&mut self) -> anyhow::Result<()> {
        let Some(Announcement { address, .. }) = supervisor::next(&mut self.announcements).await else { return Ok(()) };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).context("the coordinator has no address")?;
        let channel = endpoint.connect_timeout(ANSWER).timeout(ANSWER).connect_lazy();
        let mut run = LockstepClient::new(channel);
        for number in 0.. {
            let pause = Duration::from_secs_f64(self.every_secs * self.within(number, Draw::Pause, SPREAD));
            let due = Instant::now() + pause;
            let status = loop {
                let status = self.look(&mut run).await;
                if let Some(status) = status.filter(|status| Instant::now() >= due && is_under_way(status)) {
                    break status;
                }
                tokio::time::sleep(LOOK).await;
            };
            self.strike(number, &status).await;
        }
        Ok(())
    }

    /// Looks at the run, if its coordinator answers, and wakes who stood still long enough.
    async fn look(&mut self, run: &mut LockstepClient<Channel>) -> Option<StatusReply> {
        let now = Instant::now();
        for (_, worker) in self.still.extract_if(.., |(until, _)| *until <= now) {
            let _ = self.targets.workers[worker].send(Blow::Continue);
        }
        let status = run.status(StatusRequest {}).await.ok()?.into_inner();
        self.tally.look(&status);
        Some(status)
    }

    /// Does fault `number` to the run that was just looked at.
    async fn strike(&mut self, number: u64, status: &StatusReply) {
        let fault = self.fault(number);
        let moment = match fault {
            Fault::KillCoordinator => {
                let at_work = status.workers.iter().any(|worker| worker.leases > 0);
                let moment = Moment::of(status, at_work);
                say(&format!("chaos: kill -9 of the coordinator {moment}"));
                let _ = self.targets.coordinator.send(Blow::Kill);
                // The fault is over when another one listens.
                let resumed = supervisor::next(&mut self.announcements).await;
                self.tally.restarted(status.step, resumed.map(|resumed| resumed.step));
                moment
            }
            Fault::KillWorker | Fault::StopWorker => {
                let Some((worker, at_work)) = self.victim(number, status) else { return };
                let (blow, what) = match fault {
                    Fault::StopWorker => {
                        let secs = self.within(number, Draw::Standstill, STANDSTILL_SECS);
                        self.still.push((Instant::now() + Duration::from_secs_f64(secs), worker));
                        (Blow::Stop, format!("SIGSTOP for {secs:.1} s of"))
                    }
                    _ => (Blow::Kill, "kill -9 of".into()),
                };
                let moment = Moment::of(status, at_work);
                say(&format!("chaos: {what} worker {} {moment}", worker + 1));
                let _ = self.targets.workers[worker].send(blow);
                moment
            }
        };
        self.tally.struck(fault, matches!(moment, Moment::InStep(_)));
    }

    /// The kind of fault `number`: in each so many faults as there are kinds, each comes once.
    fn fault(&self, number: u64) -> Fault {
        let mut left = self.kinds.clone();
        let kinds = left.len() as u64;
        let (round, place) = (number / kinds, number % kinds);
        let mut draw = |place: u64| {
            let drawn = self.draws.below(round * kinds + place, Draw::Order as u64, kinds - place);
            left.remove(drawn as usize)
        };
        for earlier in 0..place {
            draw(earlier);
        }
        draw(place)
    }

    /// A worker that is at work, or else one that could be; its index, and whether it holds a lease.
    fn victim(&self, number: u64, status: &StatusReply) -> Option<(usize, bool)> {
        let index = |worker: &WorkerStatus| worker.name.strip_prefix("local-")?.parse::<usize>().ok()?.checked_sub(1);
        let of = |at_work: bool| -> Vec<usize> {
            let members = status.workers.iter().filter(|worker| !at_work || worker.leases > 0).filter_map(index);
            members.filter(|worker| *worker < self.targets.workers.len()).collect()
        };
        let drawn =
            |of: &[usize]| of.get(self.draws.below(number, Draw::Victim as u64, of.len() as u64) as usize).copied();
        drawn(&of(true)).map(|worker| (worker, true)).or_else(|| drawn(&of(false)).map(|worker| (worker, false)))
    }

    fn within(&self, number: u64, draw: Draw, range: std::ops::Range<f64>) -> f64 {
        range.start + self.draws.unit(number, draw as u64) * (range.end - range.start)
    }
}

fn is_under_way(status: &StatusReply) -> bool {
    status.step < status.total_steps && !status.workers.is_empty()
}

/// When a fault was done.
enum Moment {
    /// Who was struck held a lease of this step.
    InStep(u64),
    /// Who was struck held a lease of the evaluation at this step.
    InEvaluation(u64),
    /// Who was struck held no lease, after this step.
    After(u64),
}

impl Moment {
    fn of(status: &StatusReply, at_work: bool) -> Self {
        match at_work {
            true if status.waiting_for.contains("the evaluation") => Self::InEvaluation(status.step),
            true => Self::InStep(status.step + 1),
            false => Self::After(status.step),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InStep(step) => write!(f, "in step {step}"),
            Self::InEvaluation(step) => write!(f, "in the evaluation at step {step}"),
            Self::After(step) => write!(f, "after step {step}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chaos(seed: u64) -> Chaos {
        let (coordinator, _) = mpsc::unbounded_channel();
        let workers = (0..3).map(|_| mpsc::unbounded_channel().0).collect();
        let (_, announcements) = watch::channel(None);
        let kinds = vec![Fault::KillWorker, Fault::StopWorker, Fault::KillCoordinator];
        Chaos::new(seed, kinds, 2.0, Targets { coordinator, workers }, announcements)
    }

    #[test]
    fn a_seed_names_its_faults_and_three_in_a_row_are_all_kinds() {
        let faults = |seed| -> Vec<Fault> { (0..30).map(|number| chaos(seed).fault(number)).collect() };
        assert_eq!(faults(1), faults(1));
        assert_ne!(faults(1), faults(2));
        for three in faults(1).chunks(3) {
            let mut sorted = three.to_vec();
            sorted.sort();
            assert_eq!(sorted, [Fault::KillWorker, Fault::StopWorker, Fault::KillCoordinator]);
        }
    }

    #[test]
    fn victims_are_at_work_if_anybody_is() {
        let worker = |name: &str, leases| WorkerStatus { name: name.into(), leases, ..WorkerStatus::default() };
        let status = |workers| StatusReply { workers, ..StatusReply::default() };
        let busy = status(vec![worker("local-1", 0), worker("local-3", 1), worker("elsewhere", 1)]);
        assert!((0..20).all(|number| chaos(1).victim(number, &busy) == Some((2, true))));
        let idle = status(vec![worker("local-1", 0), worker("local-2", 0)]);
        assert!((0..20).all(|number| matches!(chaos(1).victim(number, &idle), Some((0 | 1, false)))));
        assert_eq!(chaos(1).victim(0, &status(vec![worker("local-9", 1)])), None);
    }
}
