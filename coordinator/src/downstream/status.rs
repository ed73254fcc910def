//! What a relay is doing, for whoever asks.

use lockstep_proto::v1;

use super::actor::Actor;
use super::cluster::{Cluster, Stage};
use crate::translate;

impl Actor {
    /// The answer to [`v1::StatusRequest`].
    pub(super) fn status(&self) -> v1::StatusReply {
        let about = v1::StatusReply { relay_of: self.upstream.clone(), ..v1::StatusReply::default() };
        match &self.cluster {
            None => v1::StatusReply { waiting_for: self.waiting_for.clone(), ..about },
            Some(cluster) => {
                let waiting_for = match &cluster.stage {
                    Stage::Invited { .. } => {
                        format!("a worker, to join the coordinator at {} with it", self.upstream)
                    }
                    Stage::Member => cluster.engine.status().waiting_for,
                    Stage::Released(release) => format!("nothing: {}", release.reason),
                };
                v1::StatusReply { waiting_for, ..cluster.status(about) }
            }
        }
    }
}

impl Cluster {
    fn status(&self, about: v1::StatusReply) -> v1::StatusReply {
        let status = self.engine.status();
        let worker = |member| translate::worker_status(member, self.slot_positions as f64);
        let workers: Vec<v1::WorkerStatus> = status.members.iter().map(worker).collect();
        v1::StatusReply {
            run_id: self.served.invitation.run_id.clone(),
            incarnation: self.served.invitation.incarnation,
            step: status.step,
            tokens_per_sec: workers.iter().map(|worker| worker.tokens_per_sec).sum(),
            workers,
            blocks_leased_again: status.counts.blocks_leased_again,
            twins: status.counts.twins,
            evaluating: status.evaluating,
            ..about
        }
    }
}
