//! A relay: to a coordinator a worker, whose device are workers of its own, to whom it is the coordinator.
//!
//! Either side is what it is elsewhere: `lockstep_worker` joins, pulls, pushes and joins again, and `lockstep_coordinator` lends
//! blocks out and adds what comes back. Here one is told of the other.

use std::sync::Arc;

use lockstep_coordinator::downstream::{Downstream, Loan, LoanedSlot, Terms};
use lockstep_coordinator::engine::Lent;
use lockstep_coordinator::engine::command::Task;
use lockstep_worker::lease::{self, Parameters, Work};
use lockstep_worker::session::Departure;
use lockstep_worker::{
    Answer, BaseName, Compute, DeviceFailure, Gradient, Invitation, KeptGradient, Outcome, Proof, Pulled,
    SharedVersion, Stop,
};
use tokio::sync::watch;
use tracing::Span;

/// The workers behind a relay, as what computes its leases.
#[derive(Clone, Debug)]
pub(crate) struct Workers(pub(crate) Downstream);

impl Compute for Workers {
    fn places(&self) -> usize {
        usize::MAX
    }

    fn workers(&self) -> watch::Receiver<u32> {
        self.0.workers()
    }

    fn description(&self) -> String {
        "relay".into()
    }

    fn passes_on(&self) -> bool {
        true
    }

    async fn prove(&self, invitation: Invitation) -> Result<Proof, DeviceFailure> {
        let Invitation { elements, kept_elements, format, wire, .. } = invitation;
        let terms = Terms { invitation: wire, elements, pushed_elements: elements + kept_elements, format };
        let first = self.0.invite(terms).await;
        let first =
            first.ok_or_else(|| DeviceFailure("the relay serves no workers any more; start it again".into()))?;
        Ok(Proof { probe_sha256: first.class.0, device: format!("relay: {}", first.device) })
    }

    async fn enter(&self, _: String) -> Result<Vec<KeptGradient>, DeviceFailure> {
        Ok(Vec::new()) // its workers keep what they computed
    }

    fn admitted(&self) {
        self.0.admit();
    }

    fn refused(&self, reason: &str) -> bool {
        self.0.refuse(reason.into());
        true
    }

    fn parted(&self, departure: &Departure) {
        match departure {
            Departure::Lost(reason) => self.0.part(reason.clone()),
            Departure::Deserted => self.0.part("there was no worker left".into()),
            // Workers are told before the relay ends.
            Departure::Released(_) | Departure::Dismissed(_) => {}
        }
    }

    async fn holds(&self, base: BaseName) -> Result<bool, DeviceFailure> {
        Ok(self.0.holds_base(base.blake3))
    }

    async fn load_base(&self, base: BaseName, parameters: Vec<f32>) -> Result<(), DeviceFailure> {
        self.0.keep_base(base.blake3, parameters).await.map_err(DeviceFailure)
    }

    async fn load(&self, Pulled { name, vector, difference }: Pulled) -> Result<Vec<f32>, DeviceFailure> {
        let loaded = self.publish(name, vector, difference).await?;
        loaded.ok_or_else(|| DeviceFailure(format!("version {} was damaged in the relay's memory", name.version)))
    }

    fn load_shared(
        &self,
        name: Parameters,
        version: SharedVersion,
        _: Option<(Arc<Work>, Stop, Span)>,
    ) -> (impl Future<Output = Result<bool, DeviceFailure>> + Send, Option<Answer<Outcome>>) {
        let loaded = async move {
            let read = tokio::task::spawn_blocking(move || version.read_all()).await;
            let Ok(Ok(Some(vector))) = read else { return Ok(false) };
            Ok(self.publish(name, vector, None).await?.is_some())
        };
        (loaded, None)
    }

    fn compute(
        &self,
        work: Arc<Work>,
        moments: Vec<f32>,
        stop: Stop,
        _: Span,
    ) -> impl Future<Output = Result<Outcome, DeviceFailure>> + Send + use<> {
        let sum = loan(&work, moments).map(|loan| self.0.compute(loan, Box::new(move || stop.is_set())));
        async move {
            let sum = sum?.await.map_err(DeviceFailure)?;
            Ok(Outcome {
                sums: sum.sums,
                slot_sums: sum.slot_sums,
                gradient: sum.gradient.map(Gradient::from),
                row_values: sum.row_values,
                batch_sha256: sum.batch_sha256,
                compute_time: sum.compute,
            })
        }
    }

    fn abandon(&self, lease: u64) {
        self.0.withdraw(lease);
    }
}

impl Workers {
    /// Publishes a version; `None` if it has not its digest.
    async fn publish(
        &self,
        Parameters { version, digest }: Parameters,
        vector: Vec<f32>,
        difference: Option<Vec<u8>>,
    ) -> Result<Option<Vec<f32>>, DeviceFailure> {
        let unnamed =
            || DeviceFailure("the lease does not name its parameters by digest, as a relay must know them".into());
        let digest = digest.ok_or_else(unnamed)?;
        self.0.publish(version, digest, vector, difference).await.map_err(DeviceFailure)
    }
}

/// What is lent on.
fn loan(work: &Work, moments: Vec<f32>) -> Result<Loan, DeviceFailure> {
    let Work { lease, slots, learning_rates, traceparent, step_slots, .. } = work;
    let older = || {
        DeviceFailure(
            "the coordinator does not say how many slots the step has, as a relay must know; run the same release of lockstep \
             on both"
                .into(),
        )
    };
    let task = match lease.task {
        lease::Task::Gradient => Task::Gradient,
        lease::Task::Evaluate => Task::Evaluate,
        lease::Task::Reference => Task::Reference,
    };
    let (step, version, block) = (lease.step, lease.parameters.version, lease.block);
    Ok(Loan {
        lease: lease.id,
        work: Lent { step, version, task, step_slots: step_slots.ok_or_else(older)?, block },
        seed: lease.seed,
        traceparent: traceparent.clone(),
        learning_rates: learning_rates.clone(),
        slots: slots.iter().map(|slot| LoanedSlot::new(slot.number, &slot.batch, slot.moments_blake3)).collect(),
        moments,
    })
}
