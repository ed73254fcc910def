//! What computes a worker's leases: a device of this machine, or the workers of a relay.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::Span;

use crate::device::{Answer, DeviceFailure, Outcome, Stop};
use crate::kept::KeptGradient;
use crate::lease::{Parameters, Work};
use crate::session::Departure;
use crate::shared::SharedVersion;
use crate::translate::{BaseName, Invitation};

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// SHA-256 of what it computed, see the contract.
    pub probe_sha256: [u8; 32],
    /// The device in words.
    pub device: String,
}

/// Parameters that came by the network.
#[derive(Debug)]
pub struct Pulled {
    /// Their name.
    pub name: Parameters,
    /// All elements, in layout order.
    pub vector: Vec<f32>,
    /// By what they differ from those before, a bf16 for each element, where they came so and [`Compute::passes_on`] says that
    /// this is wanted.
    pub difference: Option<Vec<u8>>,
}

/// What computes leases, one membership after another. Handles that are cloned share it.
pub trait Compute: Clone + Send + Sync + 'static {
    /// How many leases of a step are computed at once.
    fn places(&self) -> usize;

    /// For how many workers it stands, as that changes. The membership ends when there are none.
    fn workers(&self) -> watch::Receiver<u32>;

    /// What it is, in words.
    fn description(&self) -> String;

    /// Whether the difference by which parameters came is wanted, too.
    fn passes_on(&self) -> bool;

    /// Says what is computed from now on, and computes the probe.
    fn prove(&self, invitation: Invitation) -> impl Future<Output = Result<Proof, DeviceFailure>> + Send;

    /// Says which run is computed for from now on, and gives the gradients of it that were computed before.
    fn enter(&self, run_id: String) -> impl Future<Output = Result<Vec<KeptGradient>, DeviceFailure>> + Send;

    /// The coordinator takes this worker in.
    fn admitted(&self);

    /// The coordinator refuses this worker. Whether it may try again, because it will be another one then.
    fn refused(&self, reason: &str) -> bool;

    /// The membership is over, or could not begin.
    fn parted(&self, departure: &Departure);

    /// Whether it holds what adapters stand on.
    fn holds(&self, base: BaseName) -> impl Future<Output = Result<bool, DeviceFailure>> + Send;

    /// Takes what adapters stand on.
    fn load_base(&self, base: BaseName, parameters: Vec<f32>)
    -> impl Future<Output = Result<(), DeviceFailure>> + Send;

    /// Takes parameters, and gives the vector back: a difference to the next ones may be added to it.
    fn load(&self, pulled: Pulled) -> impl Future<Output = Result<Vec<f32>, DeviceFailure>> + Send;

    /// Takes parameters out of shared memory; `false` if they were not there to the end: others must be loaded then. If they were,
    /// the lease that is `next`, if there is one, may be computed with them at once, as [`compute`](Self::compute) does: then
    /// what comes of it is the second answer.
    fn load_shared(
        &self,
        name: Parameters,
        version: SharedVersion,
        next: Option<(Arc<Work>, Stop, Span)>,
    ) -> (impl Future<Output = Result<bool, DeviceFailure>> + Send, Option<Answer<Outcome>>);

    /// Computes a lease with the parameters loaded last, and with these `moments` where its replica has kept such, within `span`.
    /// It begins at once; the future waits for what comes of it.
    ///
    /// # Errors
    /// If it fails: parameters must be loaded again. If `stop` is set before the end: they need not.
    fn compute(
        &self,
        work: Arc<Work>,
        moments: Vec<f32>,
        stop: Stop,
        span: Span,
    ) -> impl Future<Output = Result<Outcome, DeviceFailure>> + Send + use<Self>;

    /// A lease that is computed is no longer wanted: its `stop` was set.
    fn abandon(&self, lease: u64);
}
