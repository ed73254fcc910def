//! Vectors, in whatever form they travel, cut into bounded, checksummed pieces, and put together again.

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
    /// A chunk is empty, too large, not whole units, or runs past the end.
    #[error(
        "chunk at byte {offset} has {length} bytes: a chunk has 1 to {MAX_CHUNK_BYTES} bytes, a multiple of {unit} but for the last one, and ends within the vector's {total}"
    )]
    Size {
        /// The chunk's offset, bytes.
        offset: u64,
        /// The chunk's length, bytes.
        length: usize,
        /// The vector's length, bytes.
        total: u64,
        /// Bytes that are read by themselves.
        unit: usize,
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

/// Bytes of an f32.
pub const FLOAT_BYTES: usize = 4;

/// Cuts `vector`, whose bytes are read `unit_bytes` at a time, into chunks, without copying it.
pub fn split(vector: Bytes, unit_bytes: usize) -> impl Iterator<Item = Chunk> + Send {
    split_as_read(vector.len(), unit_bytes, move |range| vector.slice(range))
}

/// Cuts a vector of so many `bytes` into chunks, each of which is read when it is its turn.
pub fn split_as_read(
    bytes: usize,
    unit_bytes: usize,
    mut read: impl FnMut(Range<usize>) -> Bytes + Send,
) -> impl Iterator<Item = Chunk> + Send {
    let most = MAX_CHUNK_BYTES / unit_bytes * unit_bytes;
    (0..bytes.div_ceil(most)).map(move |i| {
        let start = i * most;
        let data = read(start..bytes.min(start + most));
        Chunk { offset_bytes: start as u64, crc32: crc32fast::hash(&data), data }
    })
}

/// The elements of a vector as little-endian bytes.
pub fn to_bytes(vector: &[f32]) -> Bytes {
    let mut bytes = Vec::with_capacity(vector.len() * FLOAT_BYTES);
    for value in vector {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes.into()
}

/// Appends the elements that little-endian bytes stand for, the reverse of [`to_bytes`].
pub fn read_floats(bytes: &[u8], vector: &mut Vec<f32>) {
    vector.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
}

/// Checks that chunks, as they arrive, follow one another up to the end of a vector.
#[derive(Debug)]
pub struct Assembler {
    received: u64,
    total: u64,
    unit: usize,
}

impl Assembler {
    /// For a vector of `total_bytes` to come, which are read `unit_bytes` at a time.
    pub fn new(total_bytes: usize, unit_bytes: usize) -> Self {
        Self { received: 0, total: total_bytes as u64, unit: unit_bytes }
    }

    /// The bytes of the next chunk: whole units, or the vector's last bytes.
    ///
    /// # Errors
    /// If its checksum, order or size is wrong; the vector is then unusable.
    pub fn take<'a>(&mut self, chunk: &'a Chunk) -> Result<&'a [u8], ChunkError> {
        let Self { received: expected, total, unit } = *self;
        let (offset, length) = (chunk.offset_bytes, chunk.data.len());
        if offset != expected {
            return Err(ChunkError::Order { expected, found: offset });
        }
        let end = offset + length as u64;
        if length == 0 || length > MAX_CHUNK_BYTES || end > total || length % unit != 0 && end != total {
            return Err(ChunkError::Size { offset, length, total, unit });
        }
        if crc32fast::hash(&chunk.data) != chunk.crc32 {
            return Err(ChunkError::Checksum { offset });
        }
        self.received = end;
        Ok(&chunk.data)
    }

    /// The end of the stream.
    ///
    /// # Errors
    /// If chunks are missing at the end.
    pub fn finish(self) -> Result<(), ChunkError> {
        match self.received == self.total {
            true => Ok(()),
            false => Err(ChunkError::Truncated { expected: self.total, found: self.received }),
        }
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
            let (mut assembler, mut back) = (Assembler::new(4 * vector.len(), FLOAT_BYTES), Vec::new());
            for chunk in split(to_bytes(&vector), FLOAT_BYTES) {
                read_floats(assembler.take(&chunk).unwrap(), &mut back);
            }
            assembler.finish().unwrap();
            let back: Vec<u32> = back.iter().map(|v| v.to_bits()).collect();
            prop_assert_eq!(back, bits);
        }
    }

    fn chunks(bytes: usize, unit: usize) -> Vec<Chunk> {
        let vector: Vec<u8> = (0..bytes).map(|i| (i * 7) as u8).collect();
        split(vector.into(), unit).collect()
    }

    #[test]
    fn chunks_are_bounded_whole_units_and_cover_the_vector() {
        let sizes = |bytes, unit| chunks(bytes, unit).iter().map(|c| c.data.len()).collect::<Vec<_>>();
        assert_eq!(sizes(MAX_CHUNK_BYTES * 2 + 12, 4), [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, 12]);
        // 4,080 units of 257 bytes, then what is left.
        assert_eq!(sizes(MAX_CHUNK_BYTES + 500, 257), [1_048_560, 516]);
        for (bytes, unit) in [(MAX_CHUNK_BYTES * 2 + 12, 4), (MAX_CHUNK_BYTES + 501, 257), (MAX_CHUNK_BYTES + 6, 2)] {
            let (mut assembler, mut back) = (Assembler::new(bytes, unit), Vec::new());
            for chunk in chunks(bytes, unit) {
                back.extend_from_slice(assembler.take(&chunk).unwrap());
            }
            assembler.finish().unwrap();
            assert_eq!(back, (0..bytes).map(|i| (i * 7) as u8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn damage_gaps_and_excess_are_refused() {
        let good = chunks(MAX_CHUNK_BYTES + 4, 4);
        let assembler = || Assembler::new(MAX_CHUNK_BYTES + 4, 4);

        let mut flipped = good[0].clone();
        let mut data = flipped.data.to_vec();
        data[7] ^= 1;
        flipped.data = data.into();
        assert_eq!(assembler().take(&flipped), Err(ChunkError::Checksum { offset: 0 }));

        let gap = assembler().take(&good[1]);
        assert_eq!(gap, Err(ChunkError::Order { expected: 0, found: MAX_CHUNK_BYTES as u64 }));

        let excess = Assembler::new(8, 4).take(&good[0]);
        assert_eq!(excess, Err(ChunkError::Size { offset: 0, length: MAX_CHUNK_BYTES, total: 8, unit: 4 }));
        // Half an element, before the end.
        let part = chunks(6, 4);
        assert_eq!(
            assembler().take(&part[0]),
            Err(ChunkError::Size { offset: 0, length: 6, total: 1_048_580, unit: 4 })
        );

        let mut short = assembler();
        short.take(&good[0]).unwrap();
        let ended = short.finish();
        assert_eq!(ended, Err(ChunkError::Truncated { expected: 1_048_580, found: 1_048_576 }));
    }
}
