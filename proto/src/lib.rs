//! The wire contract between a Lockstep coordinator and its workers: generated types and services, the bounded,
//! checksummed chunks in which vectors travel, and the memory by which they do on one machine.
//!
//! `lockstep.proto` is the specification; its comments are complete.

pub mod chunk;
pub mod region;

/// Types and services generated from `lockstep.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("lockstep.v1");
}

/// The version of the contract that this build speaks.
pub const PROTOCOL_VERSION: u32 = 5;

/// Most bytes in one message that is not a [`v1::Chunk`].
pub const MAX_MESSAGE_BYTES: usize = 32 * 1024 * 1024;

/// Most bytes of batches in one lease; the rest of its message has ample room beside them.
pub const MAX_LEASE_BYTES: usize = MAX_MESSAGE_BYTES / 4;

/// Metadata key that names the worker on its control stream: its id in decimal.
pub const WORKER_ID_KEY: &str = "lockstep-worker-id";

/// Metadata of a control stream: which run it is for.
pub const RUN_ID_KEY: &str = "lockstep-run-id";

/// Metadata of a control stream: which start of the run's coordinator it is for, in decimal.
pub const INCARNATION_KEY: &str = "lockstep-incarnation";

/// Most bytes in one HTTP/2 frame: a chunk and what is around it, rather than many small frames.
pub const MAX_FRAME_BYTES: u32 = 2 * 1024 * 1024;

/// Metadata key of the W3C trace context.
pub const TRACEPARENT_KEY: &str = "traceparent";

/// HTTP/2 flow-control window of one stream, bytes: a few chunks in flight, so that bulk transfers are not paced by
/// acknowledgements.
pub const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;

/// HTTP/2 flow-control window of one connection, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
