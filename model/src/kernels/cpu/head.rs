//! Causal attention of one head, in blocks of 16 queries: what is held of the scores at a time is 16 rows, and what none of
//! them must see, later keys and other segments, is not computed.
//!
//! With `q` scaled by 1 / √D, for a block of queries: `S = k qᵀ`, `P = e^(S - max) / Σ`, `o = Pᵀ v`. Backward computes S
//! and P again, from each query's maximum and sum (Dao et al., arXiv:2205.14135): `dP = v doᵀ`, `dS = P (dP - Σ P dP)`,
//! `dq = dSᵀ k`, `dk = dS q`, `dv = P do`. With dropout, P is multiplied by its factors where it meets v or do, and so is dP.
//! What is computed is laid out with 16 queries, or 16 of D elements, side by side;
//! k and v are read where they are.

use macerator::{Simd, WithSimd};

use crate::dropout::Factors;
use crate::kernels::elementary::exp;
use crate::kernels::lanes::{LANES, Lanes};

/// Keys whose products are accumulated in registers at once.
const TILE: usize = 6;
/// The score of a key that the query must not see.
const MASKED: f32 = -1e30;

/// Of one head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// T: queries, and keys.
    pub(super) length: usize,
    /// D.
    pub(super) width: usize,
}

/// Rows of D elements, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) count: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(&self, index: usize, width: usize) -> &'a [f32] {
        &self.data[index * self.stride..][..width]
    }

    /// Those from `first` on.
    #[inline(always)]
    fn skip(self, first: usize) -> Self {
        Self { data: &self.data[first * self.stride..], count: self.count - first, ..self }
    }

    /// N rows from `first` on; `nothing` after the last.
    #[inline(always)]
    fn some<const N: usize>(&self, first: usize, nothing: &'a [f32]) -> [&'a [f32]; N] {
        let row = |index| if index < self.count { self.row(index, nothing.len()) } else { nothing };
        std::array::from_fn(|index| row(first + index))
    }

    /// 16 elements of a row from `start` on; 0 after the last.
    #[inline(always)]
    fn lanes(&self, index: usize, start: usize, width: usize) -> Lanes {
        let row = &self.data[index * self.stride + start..];
        match row.first_chunk() {
            Some(lanes) if start + LANES <= width => *lanes,
            _ => {
                let mut lanes = [0.0; LANES];
                lanes[..width - start].copy_from_slice(&row[..width - start]);
                lanes
            }
        }
    }
}

impl Sizes {
    /// Keys, filled up to whole tiles.
    pub(super) fn padded_keys(self) -> usize {
        self.length.div_ceil(TILE) * TILE
    }

    /// Groups of 16 of D elements.
    pub(super) fn panels(self) -> usize {
        self.width.div_ceil(LANES)
    }
}

/// 16 queries, or what is upstream of them: as columns for products over D, and as rows for products over queries.
struct Block {
    /// `[D][16 queries]`.
    columns: Vec<Lanes>,
    /// `[panel of D][16 queries][16 of D]`.
    rows: Vec<[Lanes; LANES]>,
}

impl Block {
    fn new(sizes: Sizes) -> Self {
        Self { columns: vec![[0.0; LANES]; sizes.width], rows: vec![[[0.0; LANES]; LANES]; sizes.panels()] }
    }

    /// Takes rows `first` and on, times `scale`; 0 after the last.
    #[inline(always)]
    fn load(&mut self, rows: Rows<'_>, first: usize, scale: f32, nothing: &[f32]) {
        let queries: [&[f32]; LANES] = rows.some(first, nothing);
        let queries = queries.map(|query| &query[..self.columns.len()]);
        for (element, column) in self.columns.iter_mut().enumerate() {
            for lane in 0..LANES {
                column[lane] = queries[lane][element] * scale;
            }
        }
        for (panel, to) in self.rows.iter_mut().enumerate() {
            for (to, query) in to.iter_mut().zip(queries) {
                for (to, x) in to.iter_mut().zip(&query[panel * LANES..]) {
                    *to = x * scale;
                }
            }
        }
    }
}

/// Products over D of a tile of keys, or values, with 16 columns.
#[inline(always)]
fn products([a, b, c, d, e, f]: [&[f32]; TILE], columns: &[Lanes]) -> [Lanes; TILE] {
    let mut sums = [[0.0; LANES]; TILE];
    // Side by side, so that nobody asks at each element whether there is one.
    let elements = a.iter().zip(b).zip(c.iter().zip(d)).zip(e.iter().zip(f));
    for (column, (((a, b), (c, d)), (e, f))) in columns.iter().zip(elements) {
        let (column, keys) = (*column, [a, b, c, d, e, f]);
        for key in 0..TILE {
            for lane in 0..LANES {
                sums[key][lane] = keys[key].mul_add(column[lane], sums[key][lane]);
            }
        }
    }
    sums
}

/// `sums += a b`, for a tile of rows of a, 16 long, and 16 rows of b.
#[inline(always)]
fn add_product(sums: &mut [Lanes; TILE], a: &[Lanes; TILE], b: &[Lanes; LANES]) {
    let mut local = *sums;
    for i in 0..LANES {
        for row in 0..TILE {
            for lane in 0..LANES {
                local[row][lane] = a[row][i].mul_add(b[i][lane], local[row][lane]);
            }
        }
    }
    *sums = local;
}

/// Products of the first keys, or values, in whole tiles, with 16 columns: `[key][query]`.
#[inline(always)]
fn all_products(found: &mut [Lanes], rows: Rows<'_>, columns: &[Lanes], nothing: &[f32]) {
    for (tile, found) in found.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        *found = products(rows.some(tile * TILE, nothing), columns);
    }
}

/// Which keys a query sees, and what becomes of its probabilities.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    /// The first key that each query sees; 0, where there are none.
    pub(super) starts: Option<&'a [u32]>,
    pub(super) dropout: Option<Dropout>,
}

impl Rules<'_> {
    /// The first keys that the 16 queries from `first` on see.
    #[inline(always)]
    fn starts(&self, first: usize) -> &[u32] {
        self.starts.map_or(&[], |starts| &starts[first..starts.len().min(first + LANES)])
    }

    /// The first key that any of them sees, or a little before, at the beginning of a tile.
    #[inline(always)]
    fn first_key(&self, first: usize) -> usize {
        self.starts(first).iter().min().map_or(0, |&key| key as usize / TILE * TILE)
    }

    /// Masks, of the scores of keys from `first_key` on, what the 16 queries from `first` on must not see: keys after
    /// them, and before the first that they see.
    #[inline(always)]
    fn mask(&self, scores: &mut [Lanes], first_key: usize, first: usize) {
        for (key, scores) in scores.iter_mut().enumerate().skip(first - first_key) {
            for (lane, score) in scores.iter_mut().enumerate() {
                if first_key + key > first + lane {
                    *score = MASKED;
                }
            }
        }
        for (lane, &start) in self.starts(first).iter().enumerate() {
            for scores in &mut scores[..start as usize - first_key] {
                scores[lane] = MASKED;
            }
        }
    }
}

/// Dropout on the probabilities `[T, T]` of one head.
#[derive(Clone, Copy)]
pub(super) struct Dropout {
    pub(super) factors: Factors,
    /// The number of the head's first probability.
    pub(super) first: u64,
}

/// Factors `[key][query]` of 16 queries.
struct Masks {
    dropout: Dropout,
    factors: Vec<Lanes>,
    /// Those of one query.
    row: Vec<f32>,
}

impl Masks {
    fn new(dropout: Dropout, sizes: Sizes) -> Self {
        Self { dropout, factors: vec![[0.0; LANES]; sizes.padded_keys()], row: vec![0.0; sizes.length] }
    }

    /// Takes the factors of the queries from `first` on, for the keys up to them.
    #[inline(always)]
    fn draw(&mut self, first: usize, sizes: Sizes) {
        for query in first..sizes.length.min(first + LANES) {
            let row = &mut self.row[..=query];
            self.dropout.factors.fill(self.dropout.first + (query * sizes.length) as u64, row);
            for (factors, factor) in self.factors.iter_mut().zip(row) {
                factors[query - first] = *factor;
            }
        }
    }

    /// Multiplies `values` `[key][query]`, of keys from `first_key` on.
    #[inline(always)]
    fn apply(&self, values: &mut [Lanes], first_key: usize) {
        for (values, factors) in values.iter_mut().zip(&self.factors[first_key..]) {
            for lane in 0..LANES {
                values[lane] *= factors[lane];
            }
        }
    }
}

/// `Σ over keys of factors[key] · rows[key]`, times `scale`, as rows of the queries from `first` on.
#[inline(always)]
fn gather(output: &mut [f32], rows: Rows<'_>, factors: &[Lanes], first: usize, scale: &Lanes, sizes: Sizes) {
    let width = sizes.width;
    let output = &mut output[first * width..];
    for start in (0..width).step_by(LANES) {
        // As many queries as registers hold on any machine, in three parts.
        gather_some::<0, 6>(output, rows, factors, start, scale, width);
        gather_some::<6, 5>(output, rows, factors, start, scale, width);
        gather_some::<11, 5>(output, rows, factors, start, scale, width);
    }
}

/// N queries of 16 from the FROMth on, and 16 of D elements from `start` on.
#[inline(always)]
fn gather_some<const FROM: usize, const N: usize>(
    output: &mut [f32],
    rows: Rows<'_>,
    factors: &[Lanes],
    start: usize,
    scale: &Lanes,
    width: usize,
) {
    let mut sums = [[0.0; LANES]; N];
    for (key, factors) in factors.iter().enumerate() {
        let row = rows.lanes(key, start, width);
        for query in 0..N {
            for lane in 0..LANES {
                sums[query][lane] = factors[FROM + query].mul_add(row[lane], sums[query][lane]);
            }
        }
    }
    let queries = output.chunks_exact_mut(width).skip(FROM);
    for ((query, sums), scale) in queries.zip(&sums).zip(&scale[FROM..]) {
        for (to, sum) in query[start..].iter_mut().zip(sums) {
            *to = sum * scale;
        }
    }
}

/// Computes the output, and maximum and inverse sum of each query.
pub(super) struct Forward<'a> {
    pub(super) sizes: Sizes,
    pub(super) q: Rows<'a>,
    pub(super) k: Rows<'a>,
    pub(super) v: Rows<'a>,
    pub(super) rules: Rules<'a>,
    /// `[T, D]`.
    pub(super) output: &'a mut [f32],
    pub(super) statistics: &'a mut [[f32; 2]],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let sizes = self.sizes;
        let scale = 1.0 / (sizes.width as f32).sqrt();
        let nothing = vec![0.0; sizes.width];
        let mut q = Block::new(sizes);
        let mut masks = self.rules.dropout.map(|dropout| Masks::new(dropout, sizes));
        let mut scores = vec![[0.0; LANES]; sizes.padded_keys()];
        for first in (0..sizes.length).step_by(LANES) {
            let first_key = self.rules.first_key(first);
            let keys = sizes.length.min(first + LANES) - first_key;
            let (k, v) = (self.k.skip(first_key), self.v.skip(first_key));
            let scores = &mut scores[..keys.div_ceil(TILE) * TILE];
            q.load(self.q, first, scale, &nothing);
            all_products(scores, k, &q.columns, &nothing);
            self.rules.mask(scores, first_key, first);
            let mut largest = [MASKED; LANES];
            for scores in &*scores {
                for lane in 0..LANES {
                    largest[lane] = if scores[lane] > largest[lane] { scores[lane] } else { largest[lane] };
                }
            }
            let mut total = [0.0; LANES];
            for scores in scores.iter_mut() {
                for lane in 0..LANES {
                    scores[lane] = exp(scores[lane] - largest[lane]);
                    total[lane] += scores[lane];
                }
            }
            if let Some(masks) = &mut masks {
                masks.draw(first, sizes);
                masks.apply(scores, first_key);
            }
            let inverse = total.map(|total| 1.0 / total);
            gather(self.output, v, &scores[..keys], first, &inverse, sizes);
            for (lane, statistics) in self.statistics[first..].iter_mut().take(LANES).enumerate() {
                *statistics = [largest[lane], inverse[lane]];
            }
        }
    }
}

/// Computes the gradient of q, and adds to those of k and v.
pub(super) struct Backward<'a> {
    pub(super) sizes: Sizes,
    pub(super) q: Rows<'a>,
    /// Of the output's gradient.
    pub(super) upper: Rows<'a>,
    pub(super) k: Rows<'a>,
    pub(super) v: Rows<'a>,
    pub(super) rules: Rules<'a>,
    pub(super) statistics: &'a [[f32; 2]],
    /// `[T, D]`.
    pub(super) dq: &'a mut [f32],
    /// Of k and v: `[panel of D][key][16 of D]`.
    pub(super) sums: &'a mut [Vec<Lanes>; 2],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let sizes = self.sizes;
        let scale = 1.0 / (sizes.width as f32).sqrt();
        let nothing = vec![0.0; sizes.width];
        let (mut q, mut upper) = (Block::new(sizes), Block::new(sizes));
        let mut masks = self.rules.dropout.map(|dropout| Masks::new(dropout, sizes));
        let mut scores = vec![[0.0; LANES]; sizes.padded_keys()];
        let mut slopes = scores.clone();
        for first in (0..sizes.length).step_by(LANES) {
            let first_key = self.rules.first_key(first);
            let keys = sizes.length.min(first + LANES) - first_key;
            let (k, v) = (self.k.skip(first_key), self.v.skip(first_key));
            let padded = keys.div_ceil(TILE) * TILE;
            let (scores, slopes) = (&mut scores[..padded], &mut slopes[..padded]);
            q.load(self.q, first, scale, &nothing);
            upper.load(self.upper, first, 1.0, &nothing);

            all_products(scores, k, &q.columns, &nothing);
            self.rules.mask(scores, first_key, first);
            all_products(slopes, v, &upper.columns, &nothing);
            if let Some(masks) = &mut masks {
                masks.draw(first, sizes);
                masks.apply(slopes, first_key);
            }
            let (mut largest, mut inverse) = ([0.0; LANES], [0.0; LANES]);
            for (lane, statistics) in self.statistics[first..].iter().take(LANES).enumerate() {
                [largest[lane], inverse[lane]] = *statistics;
            }
            let mut along = [0.0; LANES];
            for (scores, slopes) in scores.iter_mut().zip(&*slopes) {
                for lane in 0..LANES {
                    scores[lane] = exp(scores[lane] - largest[lane]) * inverse[lane];
                    along[lane] = scores[lane].mul_add(slopes[lane], along[lane]);
                }
            }
            for (scores, slopes) in scores.iter().zip(slopes.iter_mut()) {
                for lane in 0..LANES {
                    slopes[lane] = scores[lane] * (slopes[lane] - along[lane]);
                }
            }
            if let Some(masks) = &masks {
                masks.apply(scores, first_key);
            }
            gather(self.dq, k, &slopes[..keys], first, &[scale; LANES], sizes);
            for (sum, (factors, block)) in self.sums.iter_mut().zip([(&*slopes, &q), (&*scores, &upper)]) {
                for (sum, rows) in sum.chunks_exact_mut(sizes.padded_keys()).zip(&block.rows) {
                    let sums = sum[first_key..].as_chunks_mut::<TILE>().0;
                    let tiles = sums.iter_mut().zip(factors.as_chunks::<TILE>().0);
                    tiles.for_each(|(sum, factors)| add_product(sum, factors, rows));
                }
            }
        }
    }
}
