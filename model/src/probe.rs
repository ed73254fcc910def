//! What a worker computes on joining to show its device class: workers with equal digests do equal arithmetic.

use sha2::{Digest as _, Sha256};

use crate::batch::Sums;
use crate::digest::update;

/// Parameters for the probe: element `i` is `((i · 2654435761 mod 2³²) / 2³² - 0.5) · 0.1`, computed in f64 and rounded
/// once, so that any language gives the same bits.
pub fn parameters(count: usize) -> Vec<f32> {
    let element = |i: usize| {
        let hash = (i as u32).wrapping_mul(2_654_435_761);
        ((f64::from(hash) / 4_294_967_296.0 - 0.5) * 0.1) as f32
    };
    (0..count).map(element).collect()
}

/// The running digest of a probe: for each lease its sums, and for a gradient its vector.
#[derive(Clone, Debug, Default)]
pub struct Digest(Sha256);

impl Digest {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a lease's loss and weight sums.
    pub fn add_sums(&mut self, sums: Sums) {
        self.0.update(sums.loss.to_le_bytes());
        self.0.update(sums.weight.to_le_bytes());
    }

    /// Adds a lease's gradient.
    pub fn add_vector(&mut self, vector: &[f32]) {
        update(&mut self.0, vector);
    }

    /// SHA-256 of all that was added.
    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_parameters_are_the_documented_formula() {
        assert_eq!(parameters(3), [-0.05, 0.011_803_399, -0.026_393_203]);
        assert!(parameters(1000).iter().all(|p| p.abs() <= 0.05));
    }
}
