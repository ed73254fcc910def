//! Gradients rounded at the nodes of the slot tree, and written in as few bytes as that allows.
//!
//! Rounding is stochastic: up or down with probabilities that leave the mean where it was (Gupta et al., "Deep learning with
//! limited numerical precision", ICML 2015). Which way, is a function of (seed, step, node, element), as dropout's masks are:
//! element e takes 16 bits of a draw, see [`Draws::some_halves`].

use half::bf16;
use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::GradientFormat;
use super::blocks::{self, BLOCK, BLOCK_BYTES};
use crate::pieces::PIECE_ELEMENTS;
use crate::random::{Draws, SOME, Stream};
use crate::tree::{Block, add_vectors};

/// Elements whose bits are drawn at once.
const DRAWN: usize = 8 * SOME;
/// Where a bf16's bits are in an f32.
const UPPER: u32 = 0xFFFF_0000;
/// The bits of an exponent.
const EXPONENT: u32 = 0x7F80_0000;

/// What the gradients of one step are rounded by.
#[derive(Clone, Copy, Debug)]
pub struct Rounding {
    /// What to.
    pub format: GradientFormat,
    /// Seed of the run.
    pub seed: u64,
    /// The optimizer step, from 1.
    pub step: u64,
}

impl Rounding {
    /// Rounds the gradient of `node`, flat in layout order. It is then what it would be if it had been written and read, and
    /// rounding it once more changes nothing. An element that is not finite stays so: as NaN, or infinity in bf16; in int8 its
    /// whole block becomes NaN.
    pub fn round(self, node: Block, gradient: &mut [f32]) {
        if let Some(draws) = self.draws(node) {
            let pieces = gradient.par_chunks_mut(PIECE_ELEMENTS).enumerate();
            pieces.for_each(|(index, piece)| draws.round(index, piece));
        }
    }

    /// The gradient of `node`: its left child's plus its right one's, element by element, rounded.
    ///
    /// # Panics
    /// If the vectors differ in length, which the layout rules out.
    pub fn add(self, mut left: Vec<f32>, right: &[f32], node: Block) -> Vec<f32> {
        let Some(draws) = self.draws(node) else { return add_vectors(left, right) };
        assert_eq!(left.len(), right.len(), "gradient vectors of one layout have one length");
        let pieces = left.par_chunks_mut(PIECE_ELEMENTS).zip(right.par_chunks(PIECE_ELEMENTS)).enumerate();
        pieces.for_each(|(index, (left, right))| {
            left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
            draws.round(index, left);
        });
        left
    }

    fn draws(self, node: Block) -> Option<NodeDraws> {
        let draws = Draws::new(self.seed, Stream::GradientRounding);
        let draws = draws.derive(self.step, u64::from(node.level) << 32 | u64::from(node.index));
        (self.format != GradientFormat::F32).then_some(NodeDraws { format: self.format, draws })
    }
}

/// The random bits of one node.
#[derive(Clone, Copy)]
struct NodeDraws {
    format: GradientFormat,
    draws: Draws,
}

impl NodeDraws {
    /// Rounds the piece of this number.
    fn round(self, index: usize, piece: &mut [f32]) {
        AutoArch::new().dispatch(RoundPiece { of: self, first: index * PIECE_ELEMENTS, piece });
    }
}

/// A piece to be rounded, whose first element has the number `first`, with the vector registers that there are.
struct RoundPiece<'a> {
    of: NodeDraws,
    first: usize,
    piece: &'a mut [f32],
}

impl WithSimd for RoundPiece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let NodeDraws { format, draws } = self.of;
        let mut group = (self.first / 8) as u64;
        let mut bits = || {
            let bits = draws.some_halves(group);
            group += SOME as u64;
            bits
        };
        match format {
            GradientFormat::F32 => {}
            GradientFormat::Bf16 => self.piece.chunks_mut(DRAWN).for_each(|values| {
                values.iter_mut().zip(bits()).for_each(|(value, bits)| *value = to_bf16(*value, bits));
            }),
            GradientFormat::Int8 => {
                self.piece.chunks_mut(BLOCK).for_each(|block| blocks::round::<DRAWN>(block, &mut bits));
            }
        }
    }
}

/// A bf16 next to `value`: the one farther from 0 for `bits` out of 65,536, where that many are to be cut off. Only what is not
/// finite becomes so.
#[inline(always)]
fn to_bf16(value: f32, bits: u32) -> f32 {
    let whole = value.to_bits();
    let rounded = whole.wrapping_add(bits) & UPPER;
    let rounded = if rounded & EXPONENT == EXPONENT { whole & UPPER } else { rounded };
    if value.is_nan() { f32::NAN } else { f32::from_bits(rounded) }
}

impl GradientFormat {
    /// Bytes that are read by themselves; the last ones of a vector may be fewer.
    pub fn unit_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => BLOCK_BYTES,
        }
    }

    /// Bytes of so many elements.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => 4 * elements,
            Self::Bf16 => 2 * elements,
            Self::Int8 => elements + elements.div_ceil(BLOCK),
        }
    }

    /// A vector that was [rounded](Rounding::round) in this format, as bytes: f32 and bf16 as they are, little-endian; of int8
    /// each block of 256 elements as the exponent of its scale, biased by 127, and its numbers, in two's complement; the
    /// exponent is 255, and the numbers 0, where the elements are NaN.
    pub fn encode(self, vector: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes(vector.len()));
        match self {
            Self::F32 => vector.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
            Self::Bf16 => {
                vector.iter().for_each(|value| bytes.extend_from_slice(&bf16::from_f32(*value).to_le_bytes()));
            }
            Self::Int8 => vector.chunks(BLOCK).for_each(|block| blocks::encode(block, &mut bytes)),
        }
        bytes
    }

    /// Appends to `vector` the elements that whole units of bytes stand for, or the last ones.
    pub fn decode(self, bytes: &[u8], vector: &mut Vec<f32>) {
        match self {
            Self::F32 => vector.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))),
            Self::Bf16 => {
                vector.extend(bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()));
            }
            Self::Int8 => bytes.chunks(BLOCK_BYTES).for_each(|bytes| blocks::decode(bytes, vector)),
        }
    }
}

#[cfg(test)]
mod tests;
