//! One computing device of a cluster: it joins a coordinator, computes the blocks it is lent and sends them back.
//!
//! Decisions and deeds are apart. [`session`] decides, as a pure state machine over the names of leases and versions;
//! `membership` carries its commands out: vectors and batches pass through there, between `client` (gRPC) and `device`
//! (one thread that owns the model). [`run`] joins, and joins again whenever the connection is lost. In a relay, the place of
//! the device is taken by workers of its own: [`Compute`] says what is asked of either, and [`run_with`] takes any.
//!
//! ```text
//! coordinator ⇄ client ⇄ membership ⇄ device ⇄ lockstep_model::compute
//!                            ⇅
//!                         session
//! ```

mod backoff;
mod client;
mod clock_offset;
mod compute;
mod device;
mod kept;
pub mod lease;
mod membership;
mod runtime;
pub mod session;
mod shared;
mod translate;

pub use compute::{Compute, Proof, Pulled};
pub use device::{Answer, DeviceFailure, Gradient, Outcome, Stop};
pub use kept::KeptGradient;
pub use runtime::{Ended, JoinedHook, SpanSource, WorkerConfig, WorkerError, run, run_with};
pub use shared::SharedVersion;
pub use translate::{Adapters, BaseName, Invitation, Run};
