//! Random numbers as pure functions of what they are for.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a counter into
//! four random words, without state. The key is the run's seed and the purpose, the counter says which draw: so any
//! worker, in any order, after any restart, draws the same.

/// What numbers are drawn for. Each purpose has its own sequence under one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Initial parameters.
    Initialisation = 1,
    /// Random windows of the corpus for training.
    TrainingWindows = 2,
    /// The fixed windows for validation.
    ValidationWindows = 3,
    /// The order of windows within an epoch.
    EpochOrder = 4,
    /// Dropout masks.
    Dropout = 5,
    /// Tokens drawn while generating text.
    Generation = 6,
    /// Which corpus of a mixture a row comes from.
    Mixture = 7,
    /// Which blocks are computed twice. Drawn from a seed of its own, and of no consequence for what is computed.
    Audit = 8,
    /// Faults done on purpose, which no parameter depends on.
    Faults = 9,
    /// The order in which conversations are split and packed.
    Conversations = 10,
    /// Initial values of adapters.
    Adapters = 11,
    /// Examples that are made up, on which no parameter depends but through what is learned from them.
    Examples = 12,
    /// Answers that people compare.
    Ratings = 13,
    /// Which way gradients are rounded.
    GradientRounding = 14,
}

/// Draws whose words are computed side by side by [`Draws::some_words`].
pub(crate) const SOME: usize = 16;

/// Philox4x32 with 10 rounds.
#[inline]
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_of(counter.map(|word| [word]), key).map(|[word]| word)
}

/// Of N counters, word by word, so that a vector register takes several.
#[inline(always)]
fn philox_of<const N: usize>(mut counters: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    for _ in 0..10 {
        let before = counters;
        for i in 0..N {
            let a = u64::from(before[0][i]) * 0xD251_1F53;
            let b = u64::from(before[2][i]) * 0xCD9E_8D57;
            counters[0][i] = (b >> 32) as u32 ^ before[1][i] ^ key[0];
            counters[1][i] = b as u32;
            counters[2][i] = (a >> 32) as u32 ^ before[3][i] ^ key[1];
            counters[3][i] = a as u32;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counters
}

/// One stream under one seed, ready to draw from.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    key: [u32; 2],
}

impl Draws {
    /// The numbers of `stream` under `seed`. The stream is mixed into the seed by one Philox call, so that seeds and
    /// streams do not collide in a sum.
    pub fn new(seed: u64, stream: Stream) -> Self {
        let [a, b, ..] = philox([stream as u32, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
        Self { key: [a, b] }
    }

    /// A sequence of its own for the draw `(high, low)`.
    pub fn derive(self, high: u64, low: u64) -> Self {
        let [a, b, ..] = self.words(high, low);
        Self { key: [a, b] }
    }

    /// Four random words for the draw `(high, low)`.
    #[inline]
    pub fn words(self, high: u64, low: u64) -> [u32; 4] {
        philox([low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32], self.key)
    }

    /// The words of the draws `(high, low)`, `(high, low + 1)`, …: word by word, of all draws.
    #[inline(always)]
    pub(crate) fn some_words(self, high: u64, low: u64) -> [[u32; SOME]; 4] {
        let low: [u64; SOME] = std::array::from_fn(|draw| low.wrapping_add(draw as u64));
        let (low, above) = (low.map(|low| low as u32), low.map(|low| (low >> 32) as u32));
        philox_of([low, above, [high as u32; SOME], [(high >> 32) as u32; SOME]], self.key)
    }

    /// 16 bits for each of `8 * SOME` elements, from element `8 * group` on: those of element e, counted from 0 in all, are a
    /// half of word `(e % 8) / 2` of the draw `(0, e / 8)`, the lower one if e is even.
    #[inline(always)]
    pub(crate) fn some_halves(self, group: u64) -> [u32; 8 * SOME] {
        let words = self.some_words(0, group);
        // Word by word of all draws, then draw by draw.
        let mut in_order = [0; 4 * SOME];
        for draw in 0..SOME {
            for word in 0..4 {
                in_order[4 * draw + word] = words[word][draw];
            }
        }
        let mut halves = [0; 8 * SOME];
        for (pair, word) in halves.as_chunks_mut::<2>().0.iter_mut().zip(in_order) {
            *pair = [word & 0xFFFF, word >> 16];
        }
        halves
    }

    /// A uniform number below `bound` (at least 1) for the draw `(high, low)`, by multiplication of 64 random bits
    /// (bias below `bound / 2^64`).
    pub fn below(self, high: u64, low: u64, bound: u64) -> u64 {
        let [a, b, ..] = self.words(high, low);
        let random = u64::from(a) | u64::from(b) << 32;
        ((u128::from(random) * u128::from(bound)) >> 64) as u64
    }

    /// A uniform number in `[0, 1)` with 53 random bits for the draw `(high, low)`.
    pub fn unit(self, high: u64, low: u64) -> f64 {
        let [a, b, ..] = self.words(high, low);
        unit(a, b)
    }
}

/// Fills `values` from N(0, `std`²) by the Box-Muller transform, element `i` being a pure function of
/// `(seed, stream, index, i)`. Uses `libm`, so that every platform computes the same bits.
pub fn normal(seed: u64, stream: Stream, index: u64, std: f64, values: &mut [f32]) {
    let draws = Draws::new(seed, stream);
    for (pair, chunk) in values.chunks_mut(2).enumerate() {
        let [a, b, c, d] = draws.words(index, pair as u64);
        let uniform = |low: u32, high: u32| {
            let bits = (u64::from(low) | u64::from(high) << 32) >> 11;
            (bits as f64 + 0.5) / (1u64 << 53) as f64
        };
        let radius = (-2.0 * libm::log(uniform(a, b))).sqrt() * std;
        let angle = std::f64::consts::TAU * uniform(c, d);
        let normals = [radius * libm::cos(angle), radius * libm::sin(angle)];
        for (value, normal) in chunk.iter_mut().zip(normals) {
            *value = normal as f32;
        }
    }
}

/// So many numbers from N(0, 1), another sequence for each `seed` and `index`.
#[cfg(test)]
pub(crate) fn normals(seed: u64, index: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    normal(seed, Stream::Initialisation, index, 1.0, &mut values);
    values
}

/// Fills `values` uniformly within ±`bound`, element `i` being a pure function of `(seed, stream, index, i)`: of the draw
/// `(index, i / 2)`, the first two words for an even `i`, and the last two for an odd one.
pub fn uniform(seed: u64, stream: Stream, index: u64, bound: f64, values: &mut [f32]) {
    let draws = Draws::new(seed, stream);
    for (pair, chunk) in values.chunks_mut(2).enumerate() {
        let [a, b, c, d] = draws.words(index, pair as u64);
        for (value, [low, high]) in chunk.iter_mut().zip([[a, b], [c, d]]) {
            *value = ((2.0 * unit(low, high) - 1.0) * bound) as f32;
        }
    }
}

/// A number in `[0, 1)` of 53 of these 64 bits.
fn unit(low: u32, high: u32) -> f64 {
    ((u64::from(low) | u64::from(high) << 32) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the Random123 library.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = u32::MAX;
        assert_eq!(philox([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    /// The examples in ARCHITECTURE.md, section "Draws", which a program in Python gives too.
    #[test]
    fn draws_are_as_they_are_described() {
        let draws = Draws::new(1, Stream::TrainingWindows);
        assert_eq!(draws.key, [0x3f55_b3f0, 0x8e76_cc9d]);
        assert_eq!(draws.words(1, 0), [0x221b_f4e8, 0xaf41_840e, 0xbeef_1c46, 0x1c65_3a3e]);
        assert_eq!(draws.below(1, 0, 1_000_003), 684_595);
        let large = Draws::new((1 << 40) + 5, Stream::TrainingWindows);
        assert_eq!(large.below((1 << 33) + 1, (1 << 34) + 7, 1_000_000_000_000), 932_453_694_349);
        let mut values = [0.0; 3];
        normal(1, Stream::Initialisation, 0, 0.02, &mut values);
        assert_eq!(values.map(|value| (value * 1e8).round()), [-38_320.0, 2_374_531.0, 1_877_129.0]);
        uniform(1, Stream::Adapters, 2, 1.0 / 128f64.sqrt(), &mut values);
        assert_eq!(values, [-0.049_747_862, 0.043_812_76, 0.007_556_589_3]);
    }

    #[test]
    fn draws_side_by_side_are_those_one_by_one() {
        let draws = Draws::new(1, Stream::Dropout);
        for (high, low) in [(0, 0), (1 << 40, 7), (3, u64::from(u32::MAX) - 4)] {
            let words = draws.some_words(high, low);
            for i in 0..SOME {
                assert_eq!(words.map(|word| word[i]), draws.words(high, low + i as u64));
            }
        }
    }

    #[test]
    fn streams_and_seeds_differ() {
        let words = |seed, stream, high, low| Draws::new(seed, stream).words(high, low);
        let all = [
            words(1, Stream::Dropout, 0, 0),
            words(2, Stream::Dropout, 0, 0),
            words(1, Stream::EpochOrder, 0, 0),
            words(1, Stream::Dropout, 1, 0),
            words(1, Stream::Dropout, 0, 1),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn uniform_values_fill_their_range_evenly() {
        let mut values = vec![0.0; 70_001];
        uniform(3, Stream::Adapters, 5, 0.25, &mut values);
        let mut counts = [0u32; 7];
        values.iter().for_each(|value| counts[((value + 0.25) * 14.0) as usize] += 1);
        assert!(counts.iter().all(|&count| (9_600..10_400).contains(&count)), "{counts:?}");
        let mut fewer = vec![0.0; 5];
        uniform(3, Stream::Adapters, 5, 0.25, &mut fewer);
        assert_eq!(fewer, values[..5], "an element does not depend on how many there are");
    }

    #[test]
    fn bounded_draws_cover_their_range_evenly() {
        let draws = Draws::new(3, Stream::TrainingWindows);
        let mut counts = [0u32; 7];
        (0..70_000).for_each(|i| counts[draws.below(0, i, 7) as usize] += 1);
        assert!(counts.iter().all(|&count| (9_600..10_400).contains(&count)), "{counts:?}");
    }
}
