//! What was trained on, by digest: rows of a slot, slots of a block.

use sha2::{Digest as _, Sha256};

use crate::batch::{Batch, Values};

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
