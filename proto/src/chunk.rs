//! Vectors of `f32` cut into bounded, checksummed pieces, and put together again.

use std::ops::Range;

use bytes::Bytes;

use crate::v1::Chunk;

/// Most bytes of data in one chunk (1 MiB).
pub const MAX_CHUNK_BYTES: usize = 1024 * 1024;

/// Why a sequence of chunks is not the vector it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChunkError {
    /// The chunk's bytes do not match its CRC-32.
    #[error("chunk at byte {offset}: its checksum is wrong; the bytes were damaged on the way, send the vector again")]
    Checksum {
        /// The chunk's offset in the vector, bytes.
        offset: u64,
    },
    /// A chunk is missing, repeated or out of order.
    #[error("chunk at byte {found}, expected byte {expected}: chunks must follow one another in order")]
    Order {
        /// The offset that should have come, bytes.
        expected: u64,
        /// The offset that came, bytes.
        found: u64,
    },
    /// A chunk is empty, too large, not whole elements, or runs past the end.
    #[error(
        "chunk at byte {offset} has {length} bytes: a chunk has 4 to {MAX_CHUNK_BYTES} bytes, a multiple of 4, and ends within the vector's {total}"
    )]
    Size {
        /// The chunk's offset, bytes.
        offset: u64,
        /// The chunk's length, bytes.
        length: usize,
        /// The vector's length, bytes.
        total: u64,
    },
    /// The stream ended early.
    #[error("the vector ended after {found} of {expected} bytes")]
    Truncated {
        /// The vector's length, bytes.
        expected: u64,
        /// What arrived, bytes.
        found: u64,
    },
}

/// Cuts `vector` (little-endian f32, see [`to_bytes`]) into chunks without copying it.
pub fn split(vector: Bytes) -> impl Iterator<Item = Chunk> + Send {
    split_as_read(vector.len(), move |range| vector.slice(range))
}

/// Cuts a vector of so many `bytes` into chunks, each of which is read when it is its turn.
pub fn split_as_read(
    bytes: usize,
    mut read: impl FnMut(Range<usize>) -> Bytes + Send,
) -> impl Iterator<Item = Chunk> + Send {
    (0..bytes.div_ceil(MAX_CHUNK_BYTES)).map(move |i| {
        let start = i * MAX_CHUNK_BYTES;
        let data = read(start..bytes.min(start + MAX_CHUNK_BYTES));
        Chunk { offset_bytes: start as u64, crc32: crc32fast::hash(&data), data }
    })
}

/// The wire form of a vector: its elements as little-endian bytes.
pub fn to_bytes(vector: &[f32]) -> Bytes {
    let mut bytes = Vec::with_capacity(vector.len() * 4);
    for value in vector {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes.into()
}

/// Puts a vector together from chunks that arrive in order.
#[derive(Debug)]
pub struct Assembler {
    vector: Vec<f32>,
    total_elements: usize,
}

impl Assembler {
    /// An empty vector of `total_elements` to come.
    pub fn new(total_elements: usize) -> Self {
        Self::within(Vec::new(), total_elements)
    }

    /// The same, in `memory` that was used before.
    pub fn within(mut memory: Vec<f32>, total_elements: usize) -> Self {
        memory.clear();
        memory.reserve_exact(total_elements);
        Self { vector: memory, total_elements }
    }

    /// Adds the next chunk.
    ///
    /// # Errors
    /// If its checksum, order or size is wrong; the vector is then unusable.
    pub fn push(&mut self, chunk: &Chunk) -> Result<(), ChunkError> {
        let expected = self.vector.len() as u64 * 4;
        let (offset, length, total) = (chunk.offset_bytes, chunk.data.len(), self.total_elements as u64 * 4);
        if offset != expected {
            return Err(ChunkError::Order { expected, found: offset });
        }
        if length == 0 || length > MAX_CHUNK_BYTES || length % 4 != 0 || offset + length as u64 > total {
            return Err(ChunkError::Size { offset, length, total });
        }
        if crc32fast::hash(&chunk.data) != chunk.crc32 {
            return Err(ChunkError::Checksum { offset });
        }
        let elements = chunk.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        self.vector.extend(elements);
        Ok(())
    }

    /// The whole vector.
    ///
    /// # Errors
    /// If chunks are missing at the end.
    pub fn finish(self) -> Result<Vec<f32>, ChunkError> {
        if self.vector.len() == self.total_elements {
            return Ok(self.vector);
        }
        Err(ChunkError::Truncated { expected: self.total_elements as u64 * 4, found: self.vector.len() as u64 * 4 })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_vector_survives_the_wire_bit_for_bit(bits in prop::collection::vec(any::<u32>(), 0..3000)) {
            let vector: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            let mut assembler = Assembler::new(vector.len());
            for chunk in split(to_bytes(&vector)) {
                assembler.push(&chunk).unwrap();
            }
            let back: Vec<u32> = assembler.finish().unwrap().iter().map(|v| v.to_bits()).collect();
            prop_assert_eq!(back, bits);
        }
    }

    fn chunks(elements: usize) -> Vec<Chunk> {
        let vector: Vec<f32> = (0..elements).map(|i| i as f32).collect();
        split(to_bytes(&vector)).collect()
    }

    #[test]
    fn chunks_are_bounded_and_cover_the_vector() {
        let elements = MAX_CHUNK_BYTES / 4 * 2 + 3;
        let sizes: Vec<usize> = chunks(elements).iter().map(|c| c.data.len()).collect();
        assert_eq!(sizes, [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, 12]);
    }

    #[test]
    fn damage_gaps_and_excess_are_refused() {
        let good = chunks(MAX_CHUNK_BYTES / 4 + 1);
        let assembler = || Assembler::new(MAX_CHUNK_BYTES / 4 + 1);

        let mut flipped = good[0].clone();
        let mut data = flipped.data.to_vec();
        data[7] ^= 1;
        flipped.data = data.into();
        assert_eq!(assembler().push(&flipped), Err(ChunkError::Checksum { offset: 0 }));

        let gap = assembler().push(&good[1]);
        assert_eq!(gap, Err(ChunkError::Order { expected: 0, found: MAX_CHUNK_BYTES as u64 }));

        let excess = Assembler::new(2).push(&good[0]);
        assert_eq!(excess, Err(ChunkError::Size { offset: 0, length: MAX_CHUNK_BYTES, total: 8 }));

        let mut short = assembler();
        short.push(&good[0]).unwrap();
        let ended = short.finish();
        assert_eq!(ended, Err(ChunkError::Truncated { expected: 1_048_580, found: 1_048_576 }));
    }
}
