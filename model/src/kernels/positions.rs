//! Where tokens stand in their sequences: what attention, rotation and embeddings need to know of it.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use burn::tensor::{Device, Tensor};

use super::key_cache::KeyCache;
use crate::config::RopeScaling;

/// Positions of tokens `[B, T]`. What only the plain forms need is made when they first ask.
#[derive(Debug)]
pub struct Positions {
    pub(super) device: Device,
    /// B and T.
    pub(super) shape: [usize; 2],
    /// The first token of its row that each sees, `[B, T]`; the row's first, where there are none.
    pub(super) starts: Option<Arc<Vec<u32>>>,
    pub(super) mask: OnceLock<Tensor<4>>,
    pub(super) angles: Option<Angles>,
    /// What was read before of the same sequence.
    earlier: Option<Mutex<KeyCache>>,
}

/// Cosines and sines `[T, D/2]` of the angles by which a head's elements are turned, from the first token's position on.
#[derive(Debug)]
pub(super) struct Angles {
    pub(super) cos: Arc<Vec<f32>>,
    pub(super) sin: Arc<Vec<f32>>,
    pub(super) tables: OnceLock<[Tensor<4>; 2]>,
}

impl Positions {
    /// Of `shape`, B and T. Where there are `segments` `[B, T]`, consecutive tokens of a row with the same number are one
    /// segment (a document, a conversation): they are counted from its first, and see no other.
    pub fn new(shape: [usize; 2], segments: Option<&[u32]>, device: &Device) -> Self {
        let starts = segments.map(|segments| Arc::new(segments.chunks_exact(shape[1]).flat_map(starts).collect()));
        Self { device: device.clone(), shape, starts, mask: OnceLock::new(), angles: None, earlier: None }
    }

    /// These, of a sequence (B is 1) whose first tokens are in `cache`.
    #[must_use]
    pub fn after(self, cache: KeyCache) -> Self {
        Self { earlier: Some(Mutex::new(cache)), ..self }
    }

    /// What has been read with these tokens; nothing where no cache was given.
    pub fn into_cache(self) -> KeyCache {
        let mut cache = self.earlier.map(|earlier| earlier.into_inner().unwrap_or_else(PoisonError::into_inner));
        cache.iter_mut().for_each(|cache| cache.advance(self.shape[1]));
        cache.unwrap_or_default()
    }

    /// Whether tokens of the same sequence were read before, or may have been.
    pub(super) fn continues(&self) -> bool {
        self.earlier.is_some()
    }

    /// The position of the first token.
    pub(super) fn first(&self) -> usize {
        self.earlier().map_or(0, |earlier| earlier.len())
    }

    /// Keys and values `[B, K, T, D]` of a layer, after those that were read before.
    pub(super) fn with_earlier(&self, layer: usize, keys: Tensor<4>, values: Tensor<4>) -> [Tensor<4>; 2] {
        match self.earlier() {
            Some(mut earlier) => earlier.extend(layer, keys, values),
            None => [keys, values],
        }
    }

    fn earlier(&self) -> Option<MutexGuard<'_, KeyCache>> {
        self.earlier.as_ref().map(|earlier| earlier.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// These, turning element i of a head's first half, and of its second, by `position · theta^(-2i/D)`, slowed down by
    /// `scaling`. A cache is to be given before.
    #[must_use]
    pub fn rotary(self, head_width: usize, theta: f64, scaling: Option<RopeScaling>) -> Self {
        let first = self.first();
        let [cos, sin] = rotary_tables(first..first + self.shape[1], head_width, theta, scaling).map(Arc::new);
        Self { angles: Some(Angles { cos, sin, tables: OnceLock::new() }), ..self }
    }

    /// B and T.
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The position of each token `[B, T]` in its segment, counted from the first; the same in all rows, and given once,
    /// where there are no segments.
    pub(super) fn places(&self) -> Vec<u32> {
        let length = self.shape[1] as u32;
        match &self.starts {
            None => (0..length).collect(),
            Some(starts) => (0..length).cycle().zip(starts.iter()).map(|(token, start)| token - start).collect(),
        }
    }
}

/// Cosines and sines `[positions, D/2]` of the angles by which a head of `head_width` elements is turned. Angles are computed in
/// f64 by `libm`, so that every machine has the same.
pub(crate) fn rotary_tables(
    positions: Range<usize>,
    head_width: usize,
    theta: f64,
    scaling: Option<RopeScaling>,
) -> [Vec<f32>; 2] {
    let half = head_width / 2;
    let frequency = |i: usize| {
        let frequency = rotary_frequency(i, half, theta);
        scaling.map_or(frequency, |scaling| frequency / scaling.stretch(frequency))
    };
    let frequencies: Vec<f64> = (0..half).map(frequency).collect();
    let angles = || positions.clone().flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
    [libm::cos, libm::sin].map(|function: fn(f64) -> f64| angles().map(|angle| function(angle) as f32).collect())
}

/// Radians a position by which element i of a head's halves, of `half` elements, turns: `theta^(-2i/D)`.
pub(crate) fn rotary_frequency(i: usize, half: usize, theta: f64) -> f64 {
    libm::pow(theta, -(i as f64) / half as f64)
}

/// The first token of each one's segment.
fn starts(segments: &[u32]) -> impl Iterator<Item = u32> {
    let mut start = 0;
    (0..segments.len()).map(move |token| {
        if token > 0 && segments[token] != segments[token - 1] {
            start = token;
        }
        start as u32
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_counted_from_their_first_token() {
        let device = Device::flex();
        let segments = [7, 7, 7, 0, 1, 1, /* and another row */ 1, 2, 2, 7, 7, 7];
        let positions = Positions::new([2, 6], Some(&segments), &device);
        assert_eq!(**positions.starts.as_ref().unwrap(), [0, 0, 0, 3, 4, 4, 0, 1, 1, 3, 3, 3]);
        assert_eq!(positions.places(), [0, 1, 2, 0, 0, 1, 0, 0, 1, 0, 1, 2]);
        assert_eq!(Positions::new([2, 3], None, &device).places(), [0, 1, 2]);
    }
}
