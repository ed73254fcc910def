//! The step under way, as it is measured.

use std::time::{Duration, Instant};

use tracing::Span;

use crate::trace::span_id;

/// A step's times, from its first lease.
pub(crate) struct StepTimes {
    /// 0 where none is under way.
    pub(crate) number: u64,
    pub(crate) since: Instant,
    /// Spent in forward and backward, summed over workers.
    pub(crate) compute: Duration,
    /// In which gradients travelled, summed over workers.
    pub(crate) upload: Duration,
    /// Ends when this is replaced.
    pub(crate) span: Span,
}

impl StepTimes {
    /// No step is under way.
    pub(crate) fn none() -> Self {
        Self { number: 0, since: Instant::now(), compute: Duration::ZERO, upload: Duration::ZERO, span: Span::none() }
    }

    /// The first lease of step `number` goes out.
    pub(crate) fn begin(run_id: &str, number: u64) -> Self {
        let span_id = span_id(run_id, number);
        let span = tracing::info_span!(target: "lockstep", parent: None, "step", step = number, span_id);
        Self { number, span, ..Self::none() }
    }
}
