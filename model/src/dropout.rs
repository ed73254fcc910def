//! Dropout masks as pure functions of where they are applied, equal on every backend.
//!
//! The draw for a tensor is keyed by (seed, step, slot, site). Element `e` (row-major) takes 16 bits of Philox block
//! `e / 8`: half `e % 2` of word `(e % 8) / 2`, low half first. It is zeroed where these bits, as a number, are below
//! `round(rate · 65536)`, and multiplied by `1 / (1 - rate)`, rounded to f32, otherwise.

use burn::tensor::{Device, Tensor, TensorData};

use crate::compute::SlotKey;
use crate::random::{Draws, Stream};

/// Where in the Transformer a mask is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
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
pub(crate) struct Dropout {
    /// Rate and key, where active.
    active: Option<(f64, SlotKey)>,
}

impl Dropout {
    /// Dropout of `rate` for the slot `key`.
    pub(crate) fn training(rate: f64, key: SlotKey) -> Self {
        Self { active: (rate > 0.0).then_some((rate, key)) }
    }

    /// No dropout.
    pub(crate) fn inactive() -> Self {
        Self { active: None }
    }

    /// Whether it changes anything.
    pub(crate) fn is_active(self) -> bool {
        self.active.is_some()
    }

    /// `x` with the mask of `site` applied; same shape.
    pub(crate) fn apply<const D: usize>(self, x: Tensor<D>, site: Site, device: &Device) -> Tensor<D> {
        let Some((rate, key)) = self.active else { return x };
        let shape = x.dims();
        let mask = mask(rate, key, site, shape.iter().product());
        x * Tensor::from_data(TensorData::new(mask, shape), device)
    }
}

/// The factors of `elements` elements: 0 or `1 / (1 - rate)`.
fn mask(rate: f64, key: SlotKey, site: Site, elements: usize) -> Vec<f32> {
    let draws = Draws::new(key.seed, Stream::Dropout).derive(key.step, u64::from(key.slot) << 32 | site.number());
    let threshold = (rate * 65536.0).round() as u32;
    let kept = (1.0 / (1.0 - rate)) as f32;
    let mut mask = Vec::with_capacity(elements + 7);
    for block in 0..elements.div_ceil(8) {
        for word in draws.words(0, block as u64) {
            mask.push(if word & 0xFFFF < threshold { 0.0 } else { kept });
            mask.push(if word >> 16 < threshold { 0.0 } else { kept });
        }
    }
    mask.truncate(elements);
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SlotKey = SlotKey { seed: 1, step: 2, slot: 3 };

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
