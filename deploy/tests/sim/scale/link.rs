//! One direction of a coordinator's link, shared fairly: all transfers under way go at the same rate, at most that of a
//! worker's own link.
//!
//! So do TCP connections from one host, about: the coordinator sends a version to all who ask at once. (One after the other
//! would be faster, since the first could compute while the others wait; it is not what happens.)

use std::collections::BTreeMap;
use std::time::Duration;

/// Transfers that lack less than this, in bytes, are done: what is left is rounding.
const NOTHING: f64 = 1e-3;

/// One direction of a link.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    /// Of the link.
    bytes_per_sec: f64,
    /// Of one worker's.
    most_per_transfer: f64,
    /// Until when the rest is up to date.
    now: Duration,
    /// What a transfer that is under way from the beginning has got, in bytes.
    served: f64,
    /// Transfers by how much is served, as the bits of a number that is not negative, when they are done; and whose they are.
    ends: BTreeMap<(u64, u64), usize>,
    begun: u64,
    carried: f64,
}

impl Link {
    /// A link of so many bits a second, to workers whose own links carry so many.
    pub(crate) fn new(bits_per_sec: f64, worker_bits_per_sec: f64) -> Self {
        let (bytes_per_sec, most_per_transfer) = (bits_per_sec / 8.0, worker_bits_per_sec / 8.0);
        let (now, ends) = (Duration::ZERO, BTreeMap::new());
        Self { bytes_per_sec, most_per_transfer, now, served: 0.0, ends, begun: 0, carried: 0.0 }
    }

    /// Begins a transfer of `bytes` bytes from or to a worker.
    pub(crate) fn begin(&mut self, worker: usize, bytes: f64, now: Duration) {
        self.advance(now);
        self.begun += 1;
        self.ends.insert(((self.served + bytes).to_bits(), self.begun), worker);
    }

    /// Ends a worker's transfers before they are done.
    pub(crate) fn cancel(&mut self, worker: usize, now: Duration) {
        self.advance(now);
        self.ends.retain(|_, whose| *whose != worker);
    }

    /// Whose transfers are done by now.
    pub(crate) fn done(&mut self, now: Duration) -> Vec<usize> {
        self.advance(now);
        let mut done = Vec::new();
        while let Some(entry) = self.ends.first_entry()
            && f64::from_bits(entry.key().0) < self.served + NOTHING
        {
            done.push(entry.remove());
        }
        done
    }

    /// When the next transfer is done, if no other begins.
    pub(crate) fn next_done(&self) -> Option<Duration> {
        let ((end, _), _) = self.ends.first_key_value()?;
        let left = (f64::from_bits(*end) - self.served).max(0.0);
        // Not a moment too early.
        Some(self.now + Duration::from_secs_f64(left / self.rate()) + Duration::from_nanos(1))
    }

    /// Bytes that passed so far.
    pub(crate) fn carried(&self) -> f64 {
        self.carried
    }

    /// Of each transfer, in bytes a second.
    fn rate(&self) -> f64 {
        self.most_per_transfer.min(self.bytes_per_sec / self.ends.len().max(1) as f64)
    }

    fn advance(&mut self, now: Duration) {
        let served = self.rate() * now.saturating_sub(self.now).as_secs_f64();
        self.now = now;
        self.served += served;
        self.carried += served * self.ends.len() as f64;
    }
}
