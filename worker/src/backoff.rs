//! How long to wait before the next attempt to connect.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

/// The first wait, at most.
const SHORTEST: Duration = Duration::from_millis(100);

/// Waits never grow beyond this.
const LONGEST: Duration = Duration::from_secs(5);

/// Waits that double from 100 ms to 5 s until one attempt succeeds, each cut by up to half: workers that lost their
/// coordinator in one moment do not all come back in one moment.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    /// Decides the cuts. Each worker should have its own.
    seed: u64,
    failures: u32,
}

impl Backoff {
    /// Before the first attempt.
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, failures: 0 }
    }

    /// An attempt succeeded: the next failure is the first again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// An attempt failed: its number since the last success, from 1, and how long to wait before the next.
    pub(crate) fn failed(&mut self) -> (u32, Duration) {
        let longest = SHORTEST.saturating_mul(2u32.saturating_pow(self.failures)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        (self.failures, longest.mul_f64(0.5 + 0.5 * self.unit()))
    }

    /// A number in [0, 1) for the attempt, from the seed.
    fn unit(&self) -> f64 {
        let mut hasher = DefaultHasher::new();
        (self.seed, self.failures).hash(&mut hasher);
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_seconds_and_start_over_after_a_success() {
        for seed in 0..100 {
            let mut backoff = Backoff::new(seed);
            let first = backoff.failed();
            let mut waits = vec![first];
            waits.extend((1..8).map(|_| backoff.failed()));
            for (&(failures, wait), (number, longest)) in
                waits.iter().zip([(1, 100), (2, 200), (3, 400), (4, 800), (5, 1600), (6, 3200), (7, 5000), (8, 5000)])
            {
                let longest = Duration::from_millis(longest);
                assert_eq!(failures, number);
                assert!(longest / 2 <= wait && wait <= longest, "seed {seed}, attempt {number}: {wait:?}");
            }
            backoff.reset();
            assert_eq!(backoff.failed(), first);
        }
    }

    #[test]
    fn workers_that_lost_their_coordinator_together_come_back_over_the_whole_of_the_time() {
        let mut tenths = [0; 10];
        for seed in 0..1000 {
            let (_, wait) = Backoff::new(seed).failed();
            tenths[(wait.as_secs_f64() * 200.0 - 10.0) as usize] += 1;
        }
        assert!(tenths.iter().all(|&workers| (60..140).contains(&workers)), "{tenths:?}");
    }

    #[test]
    fn a_coordinator_that_never_comes_back_does_not_overflow_the_wait() {
        let mut backoff = Backoff { seed: 1, failures: u32::MAX };
        let (failures, wait) = backoff.failed();
        assert_eq!(failures, u32::MAX);
        assert!((LONGEST / 2..=LONGEST).contains(&wait));
    }
}
