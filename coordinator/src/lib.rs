//! The run: who is here, who does what; gradients are added, the optimizer applied, parameters published and kept.
//!
//! The [`engine`] decides, as a pure state machine. The runtime ([`run()`]) is one loop: the gRPC service and the threads
//! that work for it send inputs, the loop turns them into the engine's events and carries out its commands. Vectors go
//! around both, through the data plane.
//!
//! A relay ([`downstream`]) serves workers by the same means, and computes what another coordinator lends it.

mod archive;
mod background;
pub mod config;
mod dataplane;
pub mod downstream;
pub mod engine;
mod exchange;
mod input;
pub mod journal;
pub mod ledger;
pub mod metrics;
pub mod observe;
mod pair_means;
mod plot;
pub mod references;
mod replicas;
mod report;
mod roster;
mod run;
pub mod run_dir;
mod runtime;
mod sampler;
mod sent;
mod service;
mod start;
mod step_times;
mod trace;
mod translate;

pub use config::RunConfig;
pub use pair_means::PairMeans;
pub use run::{Summary, run};
pub use trace::trace_id;
