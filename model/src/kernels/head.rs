//! Causal attention of one head, in blocks of 16 queries: what is held of the scores at a time is 16 rows, and the half that
//! a query must not see is not computed.
//!
//! With `q` scaled by 1 / √D, for a block of queries: `S = k qᵀ`, `P = e^(S - max) / Σ`, `o = Pᵀ v`. Backward computes S
//! and P again, from each query's maximum and sum (Dao et al., arXiv:2205.14135): `dP = v doᵀ`, `dS = P (dP - Σ P dP)`,
//! `dq = dSᵀ k`, `dk = dS q`, `dv = P do`. Everything is laid out with 16 queries, or 16 of D elements, side by side.

use macerator::{Simd, WithSimd};

use super::elementary::exp;
use super::lanes::{LANES, Lanes};

/// Rows of a product that are accumulated in registers at once.
const TILE: usize = 6;
/// Numbers of as many rows, side by side.
pub(super) type Tile = [f32; TILE];
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
}

impl Rows<'_> {
    #[inline(always)]
    fn row(&self, index: usize, width: usize) -> &[f32] {
        &self.data[index * self.stride..][..width]
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

/// k or v of one head as `[tile of keys][D][TILE]`, for products over D; 0 where a tile is not full.
pub(super) fn tiles_by_key(rows: Rows<'_>, sizes: Sizes) -> Vec<Tile> {
    let width = sizes.width;
    let mut tiles = vec![[0.0; TILE]; sizes.length.div_ceil(TILE) * width];
    for (tile, tiles) in tiles.chunks_exact_mut(width).enumerate() {
        for key in 0..TILE.min(sizes.length - tile * TILE) {
            for (tile, x) in tiles.iter_mut().zip(rows.row(tile * TILE + key, width)) {
                tile[key] = *x;
            }
        }
    }
    tiles
}

/// k or v of one head as `[tile of D][T][TILE]`, for products over keys; 0 where a tile is not full.
pub(super) fn tiles_by_element(rows: Rows<'_>, sizes: Sizes) -> Vec<Tile> {
    let (length, width) = (sizes.length, sizes.width);
    let mut tiles = vec![[0.0; TILE]; width.div_ceil(TILE) * length];
    for (tile, tiles) in tiles.chunks_exact_mut(length).enumerate() {
        let (start, end) = (tile * TILE, width.min((tile + 1) * TILE));
        for (key, tile) in tiles.iter_mut().enumerate() {
            let row = &rows.row(key, width)[start..end];
            match <&[f32; TILE]>::try_from(row) {
                Ok(row) => *tile = *row,
                Err(_) => tile[..row.len()].copy_from_slice(row),
            }
        }
    }
    tiles
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
    fn load(&mut self, rows: Rows<'_>, first: usize, scale: f32, sizes: Sizes) {
        for lane in 0..LANES {
            if first + lane < sizes.length {
                let row = rows.row(first + lane, sizes.width);
                for (column, x) in self.columns.iter_mut().zip(row) {
                    column[lane] = x * scale;
                }
                for (panel, x) in self.rows.iter_mut().zip(row.chunks(LANES)) {
                    for (to, x) in panel[lane].iter_mut().zip(x) {
                        *to = x * scale;
                    }
                }
            } else {
                self.columns.iter_mut().for_each(|column| column[lane] = 0.0);
                self.rows.iter_mut().for_each(|panel| panel[lane] = [0.0; LANES]);
            }
        }
    }
}

/// `Σ a[i] b[i]ᵀ`: a tile of rows by 16 columns, added in the order of i.
#[inline(always)]
fn product(a: &[Tile], b: &[Lanes]) -> [Lanes; TILE] {
    let mut sums = [[0.0; LANES]; TILE];
    for (a, b) in a.iter().zip(b) {
        for row in 0..TILE {
            for lane in 0..LANES {
                sums[row][lane] = a[row].mul_add(b[lane], sums[row][lane]);
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

/// Scores of 16 queries from `first` on with the first `keys` keys, filled up to whole tiles, masked: `[key][query]`.
#[inline(always)]
fn score(scores: &mut [Lanes], k_by_key: &[Tile], columns: &[Lanes], first: usize) {
    let width = columns.len();
    for (tile, scores) in scores.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        *scores = product(&k_by_key[tile * width..][..width], columns);
    }
    for (key, scores) in scores.iter_mut().enumerate().skip(first) {
        for (lane, score) in scores.iter_mut().enumerate() {
            if key > first + lane {
                *score = MASKED;
            }
        }
    }
}

/// `Σ over keys of tiles[key] · lanes[key]`, times `scale`, as rows of the queries from `first` on.
#[inline(always)]
fn gather(rows: &mut [f32], tiles: &[Tile], lanes: &[Lanes], first: usize, scale: &Lanes, sizes: Sizes) {
    let (length, width) = (sizes.length, sizes.width);
    let queries = LANES.min(length - first);
    for (tile, tiles) in tiles.chunks_exact(length).enumerate() {
        let sums = product(tiles, lanes);
        let elements = TILE.min(width - tile * TILE);
        for query in 0..queries {
            let row = &mut rows[(first + query) * width + tile * TILE..][..elements];
            for element in 0..elements {
                row[element] = sums[element][query] * scale[query];
            }
        }
    }
}

/// Computes the output, and maximum and inverse sum of each query.
pub(super) struct Forward<'a> {
    pub(super) sizes: Sizes,
    pub(super) q: Rows<'a>,
    pub(super) k_by_key: &'a [Tile],
    pub(super) v_by_element: &'a [Tile],
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
        let mut q = Block::new(sizes);
        let mut scores = vec![[0.0; LANES]; sizes.padded_keys()];
        for first in (0..sizes.length).step_by(LANES) {
            let keys = sizes.length.min(first + LANES);
            let scores = &mut scores[..keys.div_ceil(TILE) * TILE];
            q.load(self.q, first, scale, sizes);
            score(scores, self.k_by_key, &q.columns, first);
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
            let inverse = total.map(|total| 1.0 / total);
            gather(self.output, self.v_by_element, &scores[..keys], first, &inverse, sizes);
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
    pub(super) k_by_key: &'a [Tile],
    pub(super) k_by_element: &'a [Tile],
    pub(super) v_by_key: &'a [Tile],
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
        let (mut q, mut upper) = (Block::new(sizes), Block::new(sizes));
        let mut scores = vec![[0.0; LANES]; sizes.padded_keys()];
        let mut slopes = scores.clone();
        for first in (0..sizes.length).step_by(LANES) {
            let keys = sizes.length.min(first + LANES);
            let padded = keys.div_ceil(TILE) * TILE;
            let (scores, slopes) = (&mut scores[..padded], &mut slopes[..padded]);
            q.load(self.q, first, scale, sizes);
            upper.load(self.upper, first, 1.0, sizes);

            score(scores, self.k_by_key, &q.columns, first);
            let (mut largest, mut inverse) = ([0.0; LANES], [0.0; LANES]);
            for (lane, statistics) in self.statistics[first..].iter().take(LANES).enumerate() {
                [largest[lane], inverse[lane]] = *statistics;
            }
            let width = sizes.width;
            for (tile, slopes) in slopes.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                *slopes = product(&self.v_by_key[tile * width..][..width], &upper.columns);
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
            gather(self.dq, self.k_by_element, &slopes[..keys], first, &[scale; LANES], sizes);
            for (sum, (factors, block)) in self.sums.iter_mut().zip([(&*slopes, &q), (&*scores, &upper)]) {
                for (sum, rows) in sum.chunks_exact_mut(sizes.padded_keys()).zip(&block.rows) {
                    let tiles = sum.as_chunks_mut::<TILE>().0.iter_mut().zip(factors.as_chunks::<TILE>().0);
                    tiles.for_each(|(sum, factors)| add_product(sum, factors, rows));
                }
            }
        }
    }
}
