//! One computing device of a cluster: it joins a coordinator, computes the blocks it is lent and sends them back.
//!
//! Decisions and deeds are apart. [`session`] decides, as a pure state machine over the names of leases and versions;
//! `membership` carries its commands out: vectors and batches pass through there, between `client` (gRPC) and `device`
//! (one thread that owns the model). [`run`] joins, and joins again whenever the connection is lost.
//!
//! ```text
//! coordinator ⇄ client ⇄ membership ⇄ device ⇄ lockstep_model::compute
//!                            ⇅
//!                         session
//! ```

mod backoff;
mod client;
mod clock_offset;
mod device;
mod kept;
pub mod lease;
mod membership;
mod runtime;
pub mod session;
mod shared;
mod translate;

pub use runtime::{Ended, JoinedHook, SpanSource, WorkerConfig, WorkerError, run};
