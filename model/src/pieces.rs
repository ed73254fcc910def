//! Long vectors, piece by piece and on all cores: a piece stays in a core's cache while several things are done with it.

use blake3::hazmat::{self, HasherExt as _, Mode};
use rayon::prelude::*;

use crate::digest::with_bytes;

/// Elements of one piece; of the last one, what is left.
pub const PIECE_ELEMENTS: usize = 1 << 16;

/// What `look` makes of each piece of a vector, of which it is told the first element, in order.
pub fn in_pieces<T: Send>(vector: &[f32], look: impl Fn(usize, &[f32]) -> T + Sync) -> Vec<T> {
    let pieces = vector.par_chunks(PIECE_ELEMENTS).enumerate();
    pieces.map(|(index, piece)| look(index * PIECE_ELEMENTS, piece)).collect()
}

/// [`in_pieces`], where `look` may change each piece.
pub fn in_pieces_mut<T: Send>(vector: &mut [f32], look: impl Fn(usize, &mut [f32]) -> T + Sync) -> Vec<T> {
    let pieces = vector.par_chunks_mut(PIECE_ELEMENTS).enumerate();
    pieces.map(|(index, piece)| look(index * PIECE_ELEMENTS, piece)).collect()
}

/// Elements of one partial sum of the squared norm.
const NORM_BLOCK: usize = 4096;
/// Interleaved partial sums within a block.
const NORM_LANES: usize = 8;

/// A piece's part of a vector's BLAKE3: a subtree's chaining value (the BLAKE3 paper, section 2.4), or the digest itself
/// where there is but one piece.
#[derive(Clone, Copy, Debug)]
pub struct PieceDigest([u8; 32]);

impl PieceDigest {
    /// Of the piece from element `start`, a multiple of [`PIECE_ELEMENTS`], of a vector of `elements`.
    pub fn of(piece: &[f32], start: usize, elements: usize) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(4 * start as u64);
        with_bytes(piece, |bytes| {
            hasher.update(bytes);
        });
        match elements > PIECE_ELEMENTS {
            true => Self(hasher.finalize_non_root()),
            false => Self(hasher.finalize().into()),
        }
    }

    /// BLAKE3 of a vector of `elements`, as little-endian f32, from all its pieces in order.
    pub fn join(pieces: &[Self], elements: usize) -> [u8; 32] {
        match pieces {
            [] => blake3::hash(&[]).into(),
            [Self(whole)] => *whole,
            _ => {
                let (left, right) = subtrees(pieces, elements);
                hazmat::merge_subtrees_root(&left, &right, Mode::Hash).into()
            }
        }
    }
}

/// The chaining values of the two halves of a tree over `pieces`, at least two.
fn subtrees(pieces: &[PieceDigest], elements: usize) -> ([u8; 32], [u8; 32]) {
    let left_elements = (hazmat::left_subtree_len(4 * elements as u64) / 4) as usize;
    let (left, right) = pieces.split_at(left_elements / PIECE_ELEMENTS);
    (subtree(left, left_elements), subtree(right, elements - left_elements))
}

fn subtree(pieces: &[PieceDigest], elements: usize) -> [u8; 32] {
    if let [PieceDigest(value)] = pieces {
        return *value;
    }
    let (left, right) = subtrees(pieces, elements);
    hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash)
}

/// BLAKE3 of a vector's elements as little-endian f32.
pub fn vector_blake3(vector: &[f32]) -> [u8; 32] {
    let digests = in_pieces(vector, |start, piece| PieceDigest::of(piece, start, vector.len()));
    PieceDigest::join(&digests, vector.len())
}

/// The sums of a piece's squares, block by block.
#[derive(Clone, Copy, Debug)]
pub struct PieceSquares([f64; PIECE_ELEMENTS / NORM_BLOCK]);

impl PieceSquares {
    /// Of one piece.
    pub fn of(piece: &[f32]) -> Self {
        let mut sums = [0.0; _];
        sums.iter_mut().zip(piece.chunks(NORM_BLOCK)).for_each(|(sum, block)| *sum = sum_of_squares(block));
        Self(sums)
    }

    /// The L2 norm of a vector, from all its pieces in order.
    pub fn norm(pieces: &[Self]) -> f64 {
        pieces.iter().flat_map(|Self(blocks)| blocks).sum::<f64>().sqrt()
    }
}

/// Of one block.
fn sum_of_squares(block: &[f32]) -> f64 {
    let mut lanes = [0f64; NORM_LANES];
    let mut groups = block.chunks_exact(NORM_LANES);
    for group in groups.by_ref() {
        for (lane, &value) in lanes.iter_mut().zip(group) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(groups.remainder()) {
        *lane += f64::from(value) * f64::from(value);
    }
    lanes.iter().sum()
}

/// The L2 norm, summed in `f64` in one fixed order: eight interleaved lanes in blocks of 4,096, blocks in order.
pub fn l2_norm(vector: &[f32]) -> f64 {
    PieceSquares::norm(&in_pieces(vector, |_, piece| PieceSquares::of(piece)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_give_the_digest_of_the_whole() {
        let lengths = [0, 1, 255, 256, 257, PIECE_ELEMENTS - 1, PIECE_ELEMENTS, PIECE_ELEMENTS + 1];
        let longer = [2, 3, 4, 5, 7, 8, 13].map(|pieces| [pieces * PIECE_ELEMENTS, pieces * PIECE_ELEMENTS + 77]);
        for length in lengths.into_iter().chain(longer.into_iter().flatten()) {
            let vector: Vec<f32> = (0..length).map(|i| (i as f32).sin()).collect();
            let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(vector_blake3(&vector), *blake3::hash(&bytes).as_bytes(), "{length} elements");
        }
    }

    #[test]
    fn a_norm_is_summed_block_by_block() {
        let vector: Vec<f32> = (0..PIECE_ELEMENTS + 4096 + 5).map(|i| (i as f32 * 0.37).sin()).collect();
        let plain: f64 = vector.chunks(4096).map(sum_of_squares).fold(0.0, |sum, block| sum + block);
        assert_eq!(l2_norm(&vector).to_bits(), plain.sqrt().to_bits());
        assert!(l2_norm(&[1.0, f32::NAN]).is_nan());
        assert_eq!(l2_norm(&[3.0, 4.0]), 5.0);
    }
}
