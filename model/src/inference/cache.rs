//! Keys and values of the tokens that a sequence has read so far, and attention to them.

use macerator::{AutoArch, Simd, WithSimd};

use super::panel::{GROUPS, Group, Panel, Products, Rows, multiply_panel};
use crate::kernels::elementary::exp;
use crate::kernels::lanes::{LANES, reduce, sum};

/// Keys of a panel.
const PANEL_KEYS: usize = GROUPS * LANES;

/// What one head of one layer has cached.
#[derive(Clone, Debug)]
pub(super) struct HeadCache {
    /// D.
    width: usize,
    /// `[panel][D]` groups of a panel's keys.
    keys: Vec<Group>,
    /// `[token]` groups of the value's elements.
    values: Vec<Group>,
}

impl HeadCache {
    /// Of a head of `width` elements.
    pub(super) fn new(width: usize) -> Self {
        Self { width, keys: Vec::new(), values: Vec::new() }
    }

    /// Bytes that a token takes, of a head of `width` elements.
    pub(super) fn bytes_per_token(width: usize) -> usize {
        (width + width.next_multiple_of(LANES)) * size_of::<f32>()
    }

    /// Makes room for so many tokens in all.
    pub(super) fn reserve(&mut self, tokens: usize) {
        let [keys, values] = self.lengths(tokens);
        self.keys.reserve_exact(keys.saturating_sub(self.keys.len()));
        self.values.reserve_exact(values.saturating_sub(self.values.len()));
    }

    /// A copy of the first `tokens`.
    pub(super) fn beginning(&self, tokens: usize) -> Self {
        let [keys, values] = self.lengths(tokens);
        Self { width: self.width, keys: self.keys[..keys].to_vec(), values: self.values[..values].to_vec() }
    }

    /// Forgets all but the first `tokens`.
    pub(super) fn truncate(&mut self, tokens: usize) {
        let [keys, values] = self.lengths(tokens);
        self.keys.truncate(keys);
        self.values.truncate(values);
    }

    /// Groups of keys and of values, of so many tokens.
    fn lengths(&self, tokens: usize) -> [usize; 2] {
        [tokens.div_ceil(PANEL_KEYS) * self.width * GROUPS, tokens * self.groups()]
    }

    /// Takes the key and the value `[D]` of the next token.
    pub(super) fn push(&mut self, key: &[f32], value: &[f32]) {
        let token = self.values.len() / self.groups();
        let (panel, within) = (token / PANEL_KEYS, token % PANEL_KEYS);
        let start = panel * self.width * GROUPS;
        if self.keys.len() == start {
            self.keys.resize(start + self.width * GROUPS, Group::default());
        }
        for (element, groups) in key.iter().zip(self.keys[start..].chunks_exact_mut(GROUPS)) {
            groups[within / LANES].0[within % LANES] = *element;
        }
        self.values.extend(value.chunks(LANES).map(|elements| {
            let mut group = Group::default();
            group.0[..elements.len()].copy_from_slice(elements);
            group
        }));
    }

    /// Groups of a value.
    fn groups(&self) -> usize {
        self.width.div_ceil(LANES)
    }

    /// Has queries `[rows, D]` become what they find: each sees the first tokens, as many as `seen` says. With q scaled by
    /// 1 / √D: the sum over tokens of `e^(q k - max) v`, divided by the sum of these powers.
    ///
    /// `seen` rises from row to row and ends at most at the number of cached tokens.
    pub(super) fn attend(&self, queries: &mut [f32], seen: &[usize]) {
        AutoArch::new().dispatch(Attend { cache: self, queries, seen });
    }
}

struct Attend<'a> {
    cache: &'a HeadCache,
    queries: &'a mut [f32],
    seen: &'a [usize],
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let Self { cache, queries, seen } = self;
        let (rows, width, most) = (seen.len(), cache.width, seen.iter().copied().max().unwrap_or(0));
        let scale = 1.0 / (width as f32).sqrt();
        queries.iter_mut().for_each(|element| *element *= scale);

        let (stride, mut scratch) = (most.next_multiple_of(LANES), Vec::new());
        let mut scores = vec![0.0; rows * stride];
        for (index, groups) in cache.keys.chunks_exact(width * GROUPS).take(most.div_ceil(PANEL_KEYS)).enumerate() {
            let first = index * PANEL_KEYS;
            let panel = Panel { groups, width: GROUPS, columns: PANEL_KEYS.min(stride - first) };
            let mut part = Scores { values: &mut scores, stride, first };
            multiply_panel::<S>(Rows::of(queries, width), panel, &mut scratch, &mut part);
        }
        let mut sums = vec![0.0; rows];
        for ((scores, sum_of_powers), &seen) in scores.chunks_exact_mut(stride).zip(&mut sums).zip(seen) {
            let (scores, unseen) = scores.split_at_mut(seen);
            let largest = largest(scores);
            scores.iter_mut().for_each(|score| *score = exp(*score - largest));
            *sum_of_powers = sum(scores, scores, |power, _| power);
            unseen.fill(0.0);
        }
        let powers = Rows { values: &scores, stride, depth: most };
        let panel = Panel { groups: &cache.values, width: cache.groups(), columns: width };
        multiply_panel::<S>(powers, panel, &mut scratch, &mut Found { values: queries, width, sums: &sums });
    }
}

/// Scores of a panel's keys, of which row by row there are `stride`, from the one numbered `first` on.
struct Scores<'a> {
    values: &'a mut [f32],
    stride: usize,
    first: usize,
}

impl Products for Scores<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, products: &[f32]) {
        let scores = &mut self.values[row * self.stride..][..self.stride][self.first..];
        scores.iter_mut().zip(products).for_each(|(score, product)| *score = *product);
    }
}

/// What queries find, `[rows, width]`, once it is divided by the sums of their powers.
struct Found<'a> {
    values: &'a mut [f32],
    width: usize,
    sums: &'a [f32],
}

impl Products for Found<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, products: &[f32]) {
        let (found, sum) = (&mut self.values[row * self.width..][..self.width], self.sums[row]);
        found.iter_mut().zip(products).for_each(|(found, product)| *found = product / sum);
    }
}

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = lanes[lane].max(chunk[lane]);
        }
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, value)| *lane = lane.max(*value));
    reduce(lanes, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normals;

    #[test]
    fn attention_is_the_mean_of_values_by_the_powers_of_scores() {
        for width in [8, 16, 40, 64] {
            let (keys, values, queries) =
                (normals(9, 1, 150 * width), normals(9, 2, 150 * width), normals(9, 3, 9 * width));
            let mut cache = HeadCache::new(width);
            let tokens = keys.chunks_exact(width).zip(values.chunks_exact(width));
            tokens.for_each(|(key, value)| cache.push(key, value));
            let seen = [1, 2, 16, 63, 64, 65, 128, 149, 150];
            let mut found = queries.clone();
            cache.attend(&mut found, &seen);
            for ((query, found), seen) in queries.chunks(width).zip(found.chunks(width)).zip(seen) {
                let dot = |key: &[f32]| key.iter().zip(query).map(|(&k, &q)| f64::from(k) * f64::from(q)).sum::<f64>();
                let powers: Vec<f64> =
                    keys.chunks(width).take(seen).map(|key| (dot(key) / (width as f64).sqrt()).exp()).collect();
                for (element, found) in found.iter().enumerate() {
                    let sum: f64 = powers
                        .iter()
                        .enumerate()
                        .map(|(token, p)| p * f64::from(values[token * width + element]))
                        .sum();
                    let expected = sum / powers.iter().sum::<f64>();
                    assert!((f64::from(*found) - expected).abs() < 2e-5, "{width}, {seen}: {found} is not {expected}");
                }
            }
        }
    }

    #[test]
    fn a_query_finds_the_same_alone_and_after_what_was_forgotten() {
        let width = 24;
        let (keys, values, queries) =
            (normals(9, 1, 200 * width), normals(9, 2, 200 * width), normals(9, 3, 7 * width));
        let fill = |cache: &mut HeadCache, tokens: std::ops::Range<usize>| {
            tokens.for_each(|t| cache.push(&keys[t * width..][..width], &values[t * width..][..width]));
        };
        let mut cache = HeadCache::new(width);
        cache.reserve(200);
        fill(&mut cache, 0..200);
        let mut together = queries.clone();
        cache.attend(&mut together, &[70, 80, 90, 100, 101, 102, 103]);
        cache.truncate(65);
        fill(&mut cache, 65..103);
        for (row, seen) in [(0, 70), (3, 100), (6, 103)] {
            let mut alone = queries[row * width..][..width].to_vec();
            cache.attend(&mut alone, &[seen]);
            assert_eq!(alone, together[row * width..][..width], "{seen}");
        }
    }
}
