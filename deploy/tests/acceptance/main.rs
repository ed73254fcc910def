//! What the program promises, seen from outside: the real binary, real processes, real files.
//!
//! Tests that need a corpus take it from the directory named by `LOCKSTEP_DATA`, and those that need Python from the
//! interpreter named by `LOCKSTEP_PYTHON` (or `python3`); without them they say why they skip.

mod adapters;
mod bad_input;
mod bench;
mod cluster;
mod compare;
mod compression;
mod distrust;
mod equal_runs;
mod eval;
#[cfg(unix)]
mod farewell;
#[cfg(unix)]
mod faults;
mod gpu;
mod interchange;
mod line;
mod local_steps;
mod parity;
mod precision;
mod preferences;
mod prepare;
#[cfg(unix)]
mod proxy;
mod quickstart;
#[cfg(unix)]
mod rate;
mod relay;
mod running;
mod scale_out;
#[cfg(unix)]
mod serve;
#[cfg(unix)]
mod server;
mod sft;
mod tidy;
mod tracing;
mod verify;
