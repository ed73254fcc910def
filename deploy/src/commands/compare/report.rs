//! What one side says at its end.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What one side measured.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub(super) struct Report {
    /// What it computed on.
    pub(super) device: String,
    /// What the model takes by arithmetic.
    pub(super) memory: Memory,
    /// The most memory that its process had before it read the model, and in all; none where the system does not say.
    pub(super) start_rss_bytes: Option<u64>,
    pub(super) peak_rss_bytes: Option<u64>,
    /// Taken of a GPU; none on the CPU.
    pub(super) gpu_memory_bytes: Option<u64>,
    /// Tokens a second, by what is done; medians.
    pub(super) tokens_per_sec: BTreeMap<String, f64>,
    /// From what to what.
    pub(super) direction: Direction,
    /// Whether the same tokens, read twice, came to different results.
    pub(super) dropout_active: bool,
    /// SHA-256 of the parameters in memory, before and after: one optimizer step, or all that was generated.
    pub(super) sha256_before: String,
    pub(super) sha256_after: String,
    pub(super) parameters_changed: bool,
}

/// Memory by arithmetic, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Memory {
    /// Of all copies that stay.
    pub(super) parameters: u64,
    pub(super) gradients: u64,
    /// Of the optimizer.
    pub(super) moments: u64,
    /// Kept for a backward pass.
    pub(super) activations: u64,
    /// Keys and values of all streams.
    pub(super) cache: u64,
}

impl Memory {
    /// All of it.
    pub(super) fn total(&self) -> u64 {
        let Self { parameters, gradients, moments, activations, cache } = self;
        parameters + gradients + moments + activations + cache
    }
}

/// Where numbers go, pass by pass.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Direction {
    pub(super) forward: String,
    pub(super) backward: Option<String>,
    pub(super) update: Option<String>,
    /// What is longer after a step than before.
    pub(super) grows: Option<String>,
}
