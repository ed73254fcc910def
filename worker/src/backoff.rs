//! How long to wait before the next attempt to connect.

use std::time::Duration;

/// The first wait.
const SHORTEST: Duration = Duration::from_millis(100);

/// Waits never grow beyond this.
const LONGEST: Duration = Duration::from_secs(5);

/// Waits that double from 100 ms to 5 s until one attempt succeeds.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Before the first attempt.
    pub(crate) fn new() -> Self {
        Self { failures: 0 }
    }

    /// An attempt succeeded: the next failure is the first again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// An attempt failed: its number since the last success, from 1, and how long to wait before the next.
    pub(crate) fn failed(&mut self) -> (u32, Duration) {
        let wait = SHORTEST.saturating_mul(2u32.saturating_pow(self.failures)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        (self.failures, wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_seconds_and_start_over_after_a_success() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = (0..8).map(|_| backoff.failed()).map(|(n, wait)| (n, wait.as_millis())).collect();
        let doubling = [(1, 100), (2, 200), (3, 400), (4, 800), (5, 1600), (6, 3200), (7, 5000), (8, 5000)];
        assert_eq!(waits, doubling);
        backoff.reset();
        assert_eq!(backoff.failed(), (1, SHORTEST));
    }

    #[test]
    fn a_coordinator_that_never_comes_back_does_not_overflow_the_wait() {
        let mut backoff = Backoff { failures: u32::MAX };
        assert_eq!(backoff.failed(), (u32::MAX, LONGEST));
    }
}
