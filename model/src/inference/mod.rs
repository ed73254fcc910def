//! Text from fixed parameters: sequences that are continued token by token, several at once, forward only.
//!
//! [`Engine`] admits requests and takes steps; in each, every sequence reads a part of its prompt or gets one token. On the CPU
//! what a sequence has read is cached, and what it gets does not depend on what else runs, to the bit. [`TextStream`] makes
//! text of tokens as they come.

mod awake;
mod backend;
mod cache;
mod engine;
mod matrix;
mod network;
mod panel;
mod rows;
mod sampling;
#[cfg(all(test, feature = "cpu"))]
mod tests;
mod text;

pub use self::engine::{Engine, Event, Finish, Limits, Overflow, Request, RequestError, SequenceId, complete};
pub use self::sampling::{Sampling, SamplingError};
pub use self::text::TextStream;
