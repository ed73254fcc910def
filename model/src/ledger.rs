//! What was trained on, by digest: rows of a slot, slots of a block, steps of a run.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::batch::{Batch, Values};

/// All that a run was trained on so far, in one digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Steps committed.
    pub steps: u64,
    /// Sequences in them.
    pub rows: u64,
    /// 32 zero bytes before the first step; after step `s`, SHA-256 of the digest before, of `s` as u64, little-endian, and
    /// of the digests of the step's slots, in order.
    #[serde(with = "crate::digest")]
    pub sha256: [u8; 32],
}

impl Ledger {
    /// Adds the next step: `rows` sequences, in slots of these digests, in order.
    pub fn commit(&mut self, rows: u64, slots: &[[u8; 32]]) {
        self.steps += 1;
        self.rows += rows;
        let hasher = Sha256::new().chain_update(self.sha256).chain_update(self.steps.to_le_bytes());
        self.sha256 = slots.iter().fold(hasher, |hasher, slot| hasher.chain_update(slot)).finalize().into();
    }
}

/// The digest of one slot's rows: SHA-256 of the slot's number as u32, then of the data of each column in order, all
/// little-endian.
pub fn slot_sha256(slot: u32, batch: &Batch) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(slot.to_le_bytes());
    let mut bytes = Vec::new();
    for column in &batch.columns {
        bytes.clear();
        match &column.values {
            Values::U32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Values::F32(values) => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        }
        hasher.update(&bytes);
    }
    hasher.finalize().into()
}

/// The digest of a block's rows: SHA-256 of the digests of its slots, in order, one after the other.
pub fn block_sha256(slots: impl IntoIterator<Item = [u8; 32]>) -> [u8; 32] {
    slots.into_iter().fold(Sha256::new(), |hasher, slot| hasher.chain_update(slot)).finalize().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::digest::bytes_sha256;

    fn of(steps: &[Vec<[u8; 32]>]) -> Ledger {
        let mut ledger = Ledger::default();
        steps.iter().for_each(|slots| ledger.commit(slots.len() as u64, slots));
        ledger
    }

    #[test]
    fn a_step_is_digested_as_it_is_described() {
        let mut bytes = vec![0; 32];
        bytes.extend(1u64.to_le_bytes());
        bytes.extend([[7; 32], [8; 32]].concat());
        let ledger = of(&[vec![[7; 32], [8; 32]]]);
        assert_eq!(ledger, Ledger { steps: 1, rows: 2, sha256: bytes_sha256(&bytes) });
        let text = serde_json::to_string(&ledger).unwrap();
        assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap(), ledger);
    }

    fn steps() -> impl Strategy<Value = Vec<Vec<[u8; 32]>>> {
        (1usize..5).prop_flat_map(|slots| {
            prop::collection::vec(prop::collection::vec(prop::array::uniform32(any::<u8>()), slots), 1..8)
        })
    }

    proptest! {
        #[test]
        fn the_same_steps_give_the_same_digest_and_others_another(steps in steps(), at: prop::sample::Index, bit in 0u8..8) {
            let whole = of(&steps);
            prop_assert_eq!(of(&steps), whole);
            let step = at.index(steps.len());

            let mut changed = steps.clone();
            let slot = at.index(changed[step].len());
            changed[step][slot][at.index(32)] ^= 1 << bit;
            prop_assert_ne!(of(&changed).sha256, whole.sha256);

            let mut shorter = steps.clone();
            let lost = shorter.remove(step);
            prop_assert_ne!(of(&shorter).sha256, whole.sha256);

            let mut longer = steps.clone();
            longer.insert(step, lost);
            prop_assert_ne!(of(&longer).sha256, whole.sha256);

            let mut swapped = steps.clone();
            swapped.rotate_left(step);
            if swapped != steps {
                prop_assert_ne!(of(&swapped).sha256, whole.sha256);
            }
            let mut reordered = steps.clone();
            reordered[step].reverse();
            if reordered != steps {
                prop_assert_ne!(of(&reordered).sha256, whole.sha256);
            }
        }
    }
}
