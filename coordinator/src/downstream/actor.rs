//! The task that owns a relay's workers, from one membership to the next.

use std::sync::{Arc, Mutex};

use tokio::sync::{mpsc, oneshot, watch};

use super::cluster::Cluster;
use super::{Held, Order};
use crate::input::Input;
use crate::observe::Observer;
use crate::run::sleep_until;
use crate::service::Served;

/// All that changes while a relay runs.
pub(super) struct Actor {
    orders: mpsc::UnboundedReceiver<Order>,
    /// What is asked of the relay, member or not.
    questions: mpsc::UnboundedReceiver<Input>,
    served: watch::Sender<Option<Arc<Served>>>,
    workers: watch::Sender<u32>,
    held: Arc<Mutex<Held>>,
    /// Where the coordinator above is.
    pub(super) upstream: String,
    /// What the relay waits for while it is no member.
    pub(super) waiting_for: String,
    observer: Observer,
    /// While workers may join.
    pub(super) cluster: Option<Cluster>,
    /// Who waits for the last worker to go.
    farewell: Option<oneshot::Sender<()>>,
}

impl std::fmt::Debug for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Actor").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

impl Actor {
    pub(super) fn new(
        orders: mpsc::UnboundedReceiver<Order>,
        questions: mpsc::UnboundedReceiver<Input>,
        served: watch::Sender<Option<Arc<Served>>>,
        workers: watch::Sender<u32>,
        held: Arc<Mutex<Held>>,
        upstream: String,
        observer: Observer,
    ) -> Self {
        let waiting_for = format!("the coordinator at {upstream} to answer");
        let (cluster, farewell) = (None, None);
        Self { orders, questions, served, workers, held, upstream, waiting_for, observer, cluster, farewell }
    }

    /// Does what it is asked until nobody is left to ask.
    pub(super) async fn run(&mut self) {
        loop {
            let deadline = self.cluster.as_ref().and_then(Cluster::next_deadline);
            tokio::select! {
                biased;
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => return,
                },
                Some(question) = self.questions.recv() => {
                    if let Input::Status { reply } = question {
                        // Whoever asked may be gone.
                        let _ = reply.send(self.status());
                    }
                }
                Some(input) = next_input(&mut self.cluster) => {
                    if let Some(cluster) = &mut self.cluster {
                        cluster.hear(input);
                    }
                }
                () = sleep_until(deadline) => self.cluster.iter_mut().for_each(Cluster::tick),
            }
            self.take_stock();
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Invite { terms, reply } => {
                match Cluster::invite(*terms, reply, self.held.clone(), self.observer.clone()) {
                    Ok(cluster) => {
                        self.served.send_replace(Some(cluster.served.clone()));
                        self.cluster = Some(cluster);
                    }
                    Err(error) => {
                        tracing::error!("no thread for the sums: {error}; raise the limit on processes (ulimit -u)");
                    }
                }
            }
            Order::Admit => self.cluster.iter_mut().for_each(Cluster::admit),
            Order::Refuse { reason } => {
                self.cluster.iter_mut().for_each(|cluster| cluster.refuse(&reason));
                self.close(format!("the coordinator at {} to answer", self.upstream));
            }
            Order::Part { reason } => {
                self.close(format!("the coordinator at {} to answer, since {reason}", self.upstream));
            }
            Order::Compute { abandoned, .. } if abandoned() => {}
            Order::Compute { loan, reply, .. } => {
                if let Some(cluster) = &mut self.cluster {
                    cluster.lend(*loan, reply);
                }
            }
            Order::Withdraw { lease } => self.cluster.iter_mut().for_each(|cluster| cluster.withdraw(lease)),
            Order::Release { reason, run_goes_on } => {
                self.waiting_for = format!("nothing: {reason}");
                self.cluster.iter_mut().for_each(|cluster| cluster.release(&reason, run_goes_on));
            }
            Order::Farewell { reply } => self.farewell = Some(reply),
        }
    }

    /// Ends what was served: dropping it closes the streams of its workers.
    fn close(&mut self, waiting_for: String) {
        self.waiting_for = waiting_for;
        self.served.send_replace(None);
        self.cluster = None;
    }

    /// Tells who waits for it what has become of the workers.
    fn take_stock(&mut self) {
        let workers = self.cluster.as_ref().map_or(0, Cluster::workers);
        self.workers.send_if_modified(|told| std::mem::replace(told, workers) != workers);
        // Who invited looks at their number next.
        self.cluster.iter_mut().for_each(Cluster::present_first);
        if !self.cluster.as_ref().is_some_and(Cluster::has_company)
            && let Some(farewell) = self.farewell.take()
        {
            let _ = farewell.send(());
        }
    }
}

/// What a worker did, once there are any.
async fn next_input(cluster: &mut Option<Cluster>) -> Option<Input> {
    match cluster {
        Some(cluster) => cluster.next_input().await,
        None => std::future::pending().await,
    }
}
