//! Gradients that the device computed and that nobody has said to be counted.
//!
//! Results are not acknowledged. Whether one counted shows only in the steps that follow, and a coordinator that starts
//! again goes back to its last checkpoint and asks for the steps after it once more. So the newest results stay here, beyond
//! the end of a membership, and are offered when the worker joins the same run again.

use std::collections::VecDeque;

use crate::device::Outcome;
use crate::lease::GradientName;

/// Most gradients kept. The memory of the next one is that of the one that goes.
const MAX_GRADIENTS: usize = 16;

/// Most bytes kept. The newest gradient is kept whatever its size.
const MAX_BYTES: usize = 256 * 1024 * 1024;

/// A gradient of a block, with all that is reported about it.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptGradient {
    /// By which a lease asks for it.
    pub name: GradientName,
    /// What was computed.
    pub outcome: Outcome,
}

/// The newest gradients of one run, within bounds.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    run_id: String,
    /// From the oldest to the newest.
    gradients: VecDeque<KeptGradient>,
}

impl Kept {
    /// What is kept of a run, from the oldest to the newest. What belongs to another run is forgotten.
    pub(crate) fn enter(&mut self, run_id: &str) -> Vec<KeptGradient> {
        if self.run_id != run_id {
            self.run_id = run_id.to_owned();
            self.gradients.clear();
        }
        self.gradients.iter().cloned().collect()
    }

    /// Keeps a gradient of the run entered last, in place of one of the same name, and forgets the oldest beyond the bounds;
    /// these.
    pub(crate) fn insert(&mut self, gradient: KeptGradient) -> Vec<KeptGradient> {
        self.gradients.retain(|kept| kept.name != gradient.name);
        self.gradients.push_back(gradient);
        let mut forgotten = Vec::new();
        while self.gradients.len() > MAX_GRADIENTS || self.gradients.len() > 1 && self.bytes() > MAX_BYTES {
            forgotten.extend(self.gradients.pop_front());
        }
        forgotten
    }

    fn bytes(&self) -> usize {
        self.gradients.iter().filter_map(|kept| kept.outcome.gradient.as_ref()).map(|gradient| 4 * gradient.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lockstep_model::batch::Sums;
    use lockstep_model::tree::Block;

    use super::*;
    use crate::device::Gradient;

    fn gradient(step: u64, bytes: usize) -> KeptGradient {
        let name = GradientName { step, version: step - 1, parameters_blake3: [1; 32], block: Block::leaf(0), seed: 1 };
        let gradient = Gradient::from(vec![0.0; bytes / 4]);
        let (sums, batch_sha256) = (Sums::default(), [3; 32]);
        let compute_time = Duration::ZERO;
        KeptGradient {
            name,
            outcome: Outcome {
                sums,
                slot_sums: Vec::new(),
                gradient: Some(gradient),
                row_values: Vec::new(),
                batch_sha256,
                compute_time,
            },
        }
    }

    fn steps(kept: &mut Kept) -> Vec<u64> {
        kept.enter("a").iter().map(|kept| kept.name.step).collect()
    }

    #[test]
    fn the_oldest_go_beyond_their_number() {
        let mut kept = Kept::default();
        assert_eq!(kept.enter("a"), []);
        let forgotten: Vec<u64> =
            (1..=20).flat_map(|step| kept.insert(gradient(step, 4))).map(|g| g.name.step).collect();
        assert_eq!(forgotten, [1, 2, 3, 4]);
        assert_eq!(steps(&mut kept), (5..=20).collect::<Vec<_>>());
    }

    #[test]
    fn the_oldest_go_beyond_the_bytes_and_the_newest_stays_whatever_its_size() {
        let mut kept = Kept::default();
        kept.enter("a");
        kept.insert(gradient(1, MAX_BYTES / 2));
        kept.insert(gradient(2, MAX_BYTES / 2));
        assert_eq!(steps(&mut kept), [1, 2]);
        kept.insert(gradient(3, 4));
        assert_eq!(steps(&mut kept), [2, 3]);
        kept.insert(gradient(4, MAX_BYTES + 4));
        assert_eq!(steps(&mut kept), [4]);
        kept.insert(gradient(5, 4));
        assert_eq!(steps(&mut kept), [5]);
    }

    #[test]
    fn a_gradient_computed_anew_replaces_the_one_before_and_is_the_newest() {
        let mut kept = Kept::default();
        kept.enter("a");
        [gradient(1, 4), gradient(2, 4), gradient(1, 8)].into_iter().for_each(|gradient| drop(kept.insert(gradient)));
        assert_eq!(kept.enter("a"), [gradient(2, 4), gradient(1, 8)]);
    }

    #[test]
    fn parameters_of_another_digest_make_another_gradient() {
        let mut kept = Kept::default();
        kept.enter("a");
        let mut other = gradient(1, 4);
        other.name.parameters_blake3 = [9; 32];
        kept.insert(gradient(1, 4));
        kept.insert(other.clone());
        assert_eq!(kept.enter("a"), [gradient(1, 4), other]);
    }

    #[test]
    fn what_belongs_to_another_run_is_forgotten() {
        let mut kept = Kept::default();
        kept.enter("a");
        kept.insert(gradient(1, 4));
        assert_eq!(kept.enter("b"), []);
        assert_eq!(kept.enter("a"), []);
    }
}
