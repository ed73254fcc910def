//! Dropout masks as pure functions of where they are applied, equal on every backend.
//!
//! The draw for a tensor is keyed by (seed, step, slot, site). Element `e` (row-major) takes 16 bits of Philox block
//! `e / 8`: half `e % 2` of word `(e % 8) / 2`, low half first. It is zeroed where these bits, as a number, are below
//! `round(rate · 65536)`, and multiplied by `1 / (1 - rate)`, rounded to f32, otherwise.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use crate::compute::SlotKey;
use crate::random::{Draws, SOME, Stream};

/// Elements that one thread draws factors for at a time.
const PART: usize = 1 << 14;

/// Where in the Transformer a mask is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// After token and position embeddings.
    Embedding,
    /// Attention probabilities of a layer.
    Attention(usize),
    /// A layer's attention output.
    AttentionOutput(usize),
    /// A layer's feed-forward output.
    FeedForwardOutput(usize),
}

impl Site {
    fn number(self) -> u64 {
        match self {
            Self::Embedding => 0,
            Self::Attention(layer) => 1 + 3 * layer as u64,
            Self::AttentionOutput(layer) => 2 + 3 * layer as u64,
            Self::FeedForwardOutput(layer) => 3 + 3 * layer as u64,
        }
    }
}

/// Dropout for one slot; inactive in evaluation and generation.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Rate and key, where active.
    active: Option<(f64, SlotKey)>,
}

impl Dropout {
    /// Dropout of `rate` for the slot `key`.
    pub fn training(rate: f64, key: SlotKey) -> Self {
        Self { active: (rate > 0.0).then_some((rate, key)) }
    }

    /// No dropout.
    pub fn inactive() -> Self {
        Self { active: None }
    }

    /// Whether it changes anything.
    pub(crate) fn is_active(self) -> bool {
        self.active.is_some()
    }

    /// What the elements of a tensor at `site` are multiplied by, where dropout is active.
    pub fn factors(self, site: Site) -> Option<Factors> {
        let (rate, SlotKey { seed, step, slot }) = self.active?;
        let draws = Draws::new(seed, Stream::Dropout).derive(step, u64::from(slot) << 32 | site.number());
        Some(Factors { draws, threshold: (rate * 65536.0).round() as u32, kept: (1.0 / (1.0 - rate)) as f32 })
    }
}

/// Factors of a tensor's elements, row-major: 0 or `1 / (1 - rate)`.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    draws: Draws,
    threshold: u32,
    kept: f32,
}

impl Factors {
    /// Those of the elements from `first` on.
    #[inline(always)]
    pub(crate) fn fill(self, first: u64, factors: &mut [f32]) {
        let factor = |bits: u32| if bits < self.threshold { 0.0 } else { self.kept };
        let mut element = first;
        let mut factors = factors;
        while !factors.is_empty() {
            let mut drawn = [0.0; 8 * SOME];
            let bits = self.draws.some_halves(element / 8);
            drawn.iter_mut().zip(bits).for_each(|(drawn, bits)| *drawn = factor(bits));
            let drawn = &drawn[(element % 8) as usize..];
            let count = drawn.len().min(factors.len());
            let (now, later) = factors.split_at_mut(count);
            now.copy_from_slice(&drawn[..count]);
            (element, factors) = (element + count as u64, later);
        }
    }

    /// Those of the first elements, as many as there are.
    pub(crate) fn fill_all(self, factors: &mut [f32]) {
        let parts = factors.par_chunks_mut(PART).enumerate();
        parts.for_each(|(index, part)| AutoArch::new().dispatch(Fill { of: self, first: (index * PART) as u64, part }));
    }

    /// Which of the first `elements` are kept: bit `e % 32` of number `e / 32`.
    pub(crate) fn kept(self, elements: usize) -> Vec<u32> {
        let mut factors = vec![0.0; elements];
        self.fill_all(&mut factors);
        let bits = |factors: &[f32]| (0..).zip(factors).map(|(bit, factor)| u32::from(*factor != 0.0) << bit).sum();
        factors.chunks(32).map(bits).collect()
    }

    /// The factor of an element that is kept.
    pub(crate) fn of_kept(self) -> f32 {
        self.kept
    }
}

/// [`Factors::fill`] with the vector registers that there are.
struct Fill<'a> {
    of: Factors,
    first: u64,
    part: &'a mut [f32],
}

impl WithSimd for Fill<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        self.of.fill(self.first, self.part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SlotKey = SlotKey { seed: 1, step: 2, slot: 3 };

    fn mask(rate: f64, key: SlotKey, site: Site, elements: usize) -> Vec<f32> {
        let factors = Dropout::training(rate, key).factors(site).unwrap();
        let mut mask = vec![9.0; elements];
        factors.fill_all(&mut mask);
        let bits = factors.kept(elements);
        assert!((0..elements).all(|e| mask[e] == f32::from((bits[e / 32] >> (e % 32) & 1) as u8) * factors.of_kept()));
        mask
    }

    #[test]
    fn factors_from_any_element_on_are_those_of_the_whole() {
        let whole = mask(0.3, KEY, Site::Embedding, PART + 100);
        let factors = Dropout::training(0.3, KEY).factors(Site::Embedding).unwrap();
        for (first, count) in [(0, 0), (0, 5), (3, 30), (8, 8), (PART - 3, 50)] {
            let mut some = vec![9.0; count];
            factors.fill(first as u64, &mut some);
            assert_eq!(some, whole[first..first + count]);
        }
        assert!(Dropout::inactive().factors(Site::Embedding).is_none());
    }

    #[test]
    fn a_mask_keeps_its_share_and_the_mean() {
        let mask = mask(0.2, KEY, Site::Embedding, 100_003);
        let zeros = mask.iter().filter(|&&m| m == 0.0).count() as f64 / mask.len() as f64;
        let mean = mask.iter().map(|&m| f64::from(m)).sum::<f64>() / mask.len() as f64;
        assert_eq!(mask.len(), 100_003);
        assert!((zeros - 0.2).abs() < 0.005, "{zeros}");
        assert!((mean - 1.0).abs() < 0.005, "{mean}");
    }

    /// The example of ARCHITECTURE.md, computed by another implementation of the description there.
    #[test]
    fn the_mask_is_the_documented_one() {
        let kept = 1.25;
        assert_eq!(mask(0.2, KEY, Site::Embedding, 8), [0.0, kept, 0.0, kept, kept, kept, kept, kept]);
    }

    #[test]
    fn every_part_of_the_key_matters_and_nothing_else_does() {
        let reference = mask(0.5, KEY, Site::Attention(1), 64);
        assert_eq!(mask(0.5, KEY, Site::Attention(1), 40), reference[..40]);
        let others = [
            mask(0.5, SlotKey { seed: 9, ..KEY }, Site::Attention(1), 64),
            mask(0.5, SlotKey { step: 9, ..KEY }, Site::Attention(1), 64),
            mask(0.5, SlotKey { slot: 9, ..KEY }, Site::Attention(1), 64),
            mask(0.5, KEY, Site::AttentionOutput(1), 64),
            mask(0.5, KEY, Site::Attention(0), 64),
        ];
        assert!(others.iter().all(|other| *other != reference));
    }
}
