//! Dropout masks as pure functions of where they are applied, equal on every backend.
//!
//! The draw for a tensor is keyed by (seed, step, slot, site). Element `e` (row-major) takes 16 bits of Philox block
//! `e / 8`: half `e % 2` of word `(e % 8) / 2`, low half first. It is zeroed where these bits, as a number, are below
//! `round(rate · 65536)`, and multiplied by `1 / (1 - rate)`, rounded to f32, otherwise.

use rayon::prelude::*;

use crate::compute::SlotKey;
use crate::random::{Draws, Stream};

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
    pub(crate) fn fill(self, first: u64, factors: &mut [f32]) {
        let factor = |bits: u32| if bits < self.threshold { 0.0 } else { self.kept };
        let mut filled = 0;
        while filled < factors.len() {
            let element = first + filled as u64;
            let words = self.draws.words(0, element / 8);
            let of_block: [f32; 8] = std::array::from_fn(|i| factor(words[i / 2] >> (16 * (i % 2)) & 0xFFFF));
            let of_block = &of_block[(element % 8) as usize..];
            let count = of_block.len().min(factors.len() - filled);
            factors[filled..][..count].copy_from_slice(&of_block[..count]);
            filled += count;
        }
    }

    /// Those of the first `elements`.
    pub(crate) fn mask(self, elements: usize) -> Vec<f32> {
        let mut mask = vec![0.0; elements];
        let parts = mask.par_chunks_mut(PART).enumerate();
        parts.for_each(|(index, part)| self.fill((index * PART) as u64, part));
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SlotKey = SlotKey { seed: 1, step: 2, slot: 3 };

    fn mask(rate: f64, key: SlotKey, site: Site, elements: usize) -> Vec<f32> {
        Dropout::training(rate, key).factors(site).unwrap().mask(elements)
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
