//! Causal attention in blocks of 16 queries: what is held of the scores at a time is 16 of a head's rows, and the half
//! that a query must not see is not computed.
//!
//! Of a head, with `q` scaled by 1 / √D, for a block of queries: `S = k qᵀ`, `P = e^(S - max) / Σ`, `o = Pᵀ v`. Backward
//! computes S and P again, from each query's maximum and sum (Dao et al., arXiv:2205.14135): `dP = v doᵀ`,
//! `dS = P (dP - Σ P dP)`, `dq = dSᵀ k`, `dk = dS q`, `dv = P do`. Everything is laid out with 16 queries, or 16
//! of a head's D elements, side by side.

use macerator::{AutoArch, Simd, WithSimd};
use rayon::prelude::*;

use super::cpu::{CpuTensor, Operation, row_major, shape, tensor};
use super::elementary::exp;
use super::lanes::{LANES, Lanes};

/// Rows of a product that are accumulated in registers at once.
const TILE: usize = 6;
/// The score of a key that the query must not see.
const MASKED: f32 = -1e30;

/// Attention of `heads` heads out of `qkv` `[B, T, 3·H·D]`, which holds queries, keys and values side by side, to
/// `[B, T, H·D]`.
#[derive(Debug)]
pub(super) struct PackedAttention {
    pub(super) heads: usize,
}

/// Attention of q `[B, H, T, D]` to k and v `[B, K, T, D]`, each of whose heads serves H / K of q's in turn, to
/// `[B, T, H·D]`.
#[derive(Debug)]
pub(super) struct GroupedAttention;

/// What backward needs: the inputs, and maximum and inverse sum of each query, `[B, H, T]`.
#[derive(Clone, Debug)]
pub(super) struct Saved<const N: usize> {
    inputs: [CpuTensor; N],
    sizes: Sizes,
    statistics: Vec<[f32; 2]>,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    length: usize,
    /// D.
    head_width: usize,
}

/// Where one of q, k and v lies in a buffer.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    start: usize,
    batch_stride: usize,
    head_stride: usize,
    row_stride: usize,
}

impl Operation<1> for PackedAttention {
    type Saved = Saved<1>;

    fn forward(self, [qkv]: [CpuTensor; 1]) -> (CpuTensor, Saved<1>) {
        let qkv = row_major(qkv);
        let (heads, shape) = (self.heads, shape(&qkv));
        let (batch, length, head_width) = (shape[0], shape[1], shape[2] / 3 / heads);
        let sizes = Sizes { batch, heads, kv_heads: heads, length, head_width };
        let (output, statistics) = forward(sizes, packed_views(sizes, &qkv));
        (output, Saved { inputs: [qkv], sizes, statistics })
    }

    fn backward(saved: Saved<1>, gradient: CpuTensor) -> [CpuTensor; 1] {
        let (sizes, [qkv]) = (saved.sizes, &saved.inputs);
        let parts = backward(sizes, packed_views(sizes, qkv), &saved.statistics, gradient);
        let (length, width) = (sizes.length, sizes.heads * sizes.head_width);
        let mut packed = vec![0.0; sizes.batch * length * 3 * width];
        packed.par_chunks_mut(length * 3 * width).enumerate().for_each(|(batch, rows)| {
            for (part, values) in parts.iter().enumerate() {
                let values = &values[batch * length * width..][..length * width];
                interleave(sizes, sizes.heads, values, rows, 3 * width, part * width);
            }
        });
        [tensor(packed, &[sizes.batch, length, 3 * width])]
    }
}

impl Operation<3> for GroupedAttention {
    type Saved = Saved<3>;

    fn forward(self, inputs: [CpuTensor; 3]) -> (CpuTensor, Saved<3>) {
        let inputs = inputs.map(row_major);
        let (queries, keys) = (shape(&inputs[0]), shape(&inputs[1]));
        let (batch, heads, length, head_width) = (queries[0], queries[1], queries[2], queries[3]);
        let sizes = Sizes { batch, heads, kv_heads: keys[1], length, head_width };
        let (output, statistics) = forward(sizes, inputs.each_ref().map(|input| head_view(sizes, input)));
        (output, Saved { inputs, sizes, statistics })
    }

    fn backward(saved: Saved<3>, gradient: CpuTensor) -> [CpuTensor; 3] {
        let Sizes { batch, heads, kv_heads, length, head_width } = saved.sizes;
        let views = saved.inputs.each_ref().map(|input| head_view(saved.sizes, input));
        let [q, k, v] = backward(saved.sizes, views, &saved.statistics, gradient);
        let keys = [batch, kv_heads, length, head_width];
        [tensor(q, &[batch, heads, length, head_width]), tensor(k, &keys), tensor(v, &keys)]
    }
}

/// q, k and v in `[B, T, 3·H·D]`.
fn packed_views(sizes: Sizes, qkv: &CpuTensor) -> [View<'_>; 3] {
    let (data, width) = (qkv.storage::<f32>(), sizes.heads * sizes.head_width);
    let (row_stride, head_stride) = (3 * width, sizes.head_width);
    [0, width, 2 * width].map(|start| View {
        data,
        start,
        batch_stride: sizes.length * row_stride,
        head_stride,
        row_stride,
    })
}

/// `[B, heads, T, D]`.
fn head_view(sizes: Sizes, x: &CpuTensor) -> View<'_> {
    let (heads, head_stride) = (shape(x)[1], sizes.length * sizes.head_width);
    let (data, batch_stride) = (x.storage::<f32>(), heads * head_stride);
    View { data, start: 0, batch_stride, head_stride, row_stride: sizes.head_width }
}

/// Heads `[heads, T, D]` into rows of `stride` elements, side by side from element `start` on.
fn interleave(sizes: Sizes, heads: usize, values: &[f32], rows: &mut [f32], stride: usize, start: usize) {
    let (length, width) = (sizes.length, sizes.head_width);
    for head in 0..heads {
        let values = values[head * length * width..][..length * width].chunks_exact(width);
        for (row, values) in rows.chunks_exact_mut(stride).zip(values) {
            row[start + head * width..][..width].copy_from_slice(values);
        }
    }
}

/// The output `[B, T, H·D]`, and the statistics of each query.
fn forward(sizes: Sizes, [q, k, v]: [View<'_>; 3]) -> (CpuTensor, Vec<[f32; 2]>) {
    let Sizes { batch, heads, kv_heads, length, head_width } = sizes;
    let (group, width) = (heads / kv_heads, heads * head_width);
    let mut by_head = vec![0.0; batch * length * width];
    let mut statistics = vec![[0.0; 2]; batch * heads * length];
    let groups = by_head.par_chunks_mut(group * length * head_width).zip(statistics.par_chunks_mut(group * length));
    groups.enumerate().for_each(|(index, (output, statistics))| {
        let (k, v) = (k.head(index / kv_heads, index % kv_heads), v.head(index / kv_heads, index % kv_heads));
        let outputs = output.chunks_exact_mut(length * head_width).zip(statistics.chunks_exact_mut(length));
        let (k_by_key, v_by_element) = (tiles_by_key(k, sizes), tiles_by_element(v, sizes));
        for (member, (output, statistics)) in outputs.enumerate() {
            let q = q.head(index / kv_heads, index % kv_heads * group + member);
            AutoArch::new().dispatch(Forward {
                sizes,
                q,
                k_by_key: &k_by_key,
                v_by_element: &v_by_element,
                output,
                statistics,
            });
        }
    });
    let mut output = vec![0.0; batch * length * width];
    let rows = output.par_chunks_mut(length * width).zip(by_head.par_chunks(length * width));
    rows.for_each(|(rows, values)| interleave(sizes, heads, values, rows, width, 0));
    (tensor(output, &[batch, length, width]), statistics)
}

/// The gradients of q, `[B, H, T, D]`, and of k and v, `[B, K, T, D]`.
fn backward(sizes: Sizes, [q, k, v]: [View<'_>; 3], statistics: &[[f32; 2]], gradient: CpuTensor) -> [Vec<f32>; 3] {
    let Sizes { batch, heads, kv_heads, length, head_width } = sizes;
    let (group, head) = (heads / kv_heads, length * head_width);
    let gradient = row_major(gradient);
    let (data, row_stride) = (gradient.storage::<f32>(), heads * head_width);
    let upper = View { data, start: 0, batch_stride: length * row_stride, head_stride: head_width, row_stride };
    let mut dq = vec![0.0; batch * heads * head];
    let (mut dk, mut dv) = (vec![0.0; batch * kv_heads * head], vec![0.0; batch * kv_heads * head]);
    let groups = dq.par_chunks_mut(group * head).zip(dk.par_chunks_mut(head).zip(dv.par_chunks_mut(head)));
    groups.enumerate().for_each(|(index, (dq, (dk, dv)))| {
        let (batch, kv_head) = (index / kv_heads, index % kv_heads);
        let (k, v) = (k.head(batch, kv_head), v.head(batch, kv_head));
        let (k_by_key, k_by_element) = (tiles_by_key(k, sizes), tiles_by_element(k, sizes));
        let v_by_key = tiles_by_key(v, sizes);
        let (k_by_key, k_by_element, v_by_key) = (&*k_by_key, &*k_by_element, &*v_by_key);
        let mut sums = [vec![[0.0; LANES]; sizes.panels() * sizes.padded_keys()], Vec::new()];
        sums[1] = sums[0].clone();
        for (member, dq) in dq.chunks_exact_mut(head).enumerate() {
            let head = kv_head * group + member;
            let statistics = &statistics[(batch * heads + head) * length..][..length];
            let (q, upper) = (q.head(batch, head), upper.head(batch, head));
            AutoArch::new().dispatch(Backward {
                sizes,
                q,
                upper,
                k_by_key,
                k_by_element,
                v_by_key,
                statistics,
                dq,
                sums: &mut sums,
            });
        }
        for (sum, gradient) in sums.iter().zip([dk, dv]) {
            for (panel, lanes) in sum.chunks_exact(sizes.padded_keys()).enumerate() {
                let (start, end) = (panel * LANES, head_width.min((panel + 1) * LANES));
                for (row, lanes) in gradient.chunks_exact_mut(head_width).zip(lanes) {
                    row[start..end].copy_from_slice(&lanes[..end - start]);
                }
            }
        }
    });
    [dq, dk, dv]
}

/// One head of a [`View`]: rows of D elements, `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> View<'a> {
    fn head(&self, batch: usize, head: usize) -> Rows<'a> {
        let start = self.start + batch * self.batch_stride + head * self.head_stride;
        Rows { data: &self.data[start..], stride: self.row_stride }
    }
}

impl Rows<'_> {
    #[inline(always)]
    fn row(&self, index: usize, width: usize) -> &[f32] {
        &self.data[index * self.stride..][..width]
    }
}

impl Sizes {
    /// Keys, filled up to whole tiles.
    fn padded_keys(self) -> usize {
        self.length.div_ceil(TILE) * TILE
    }

    /// Groups of 16 of a head's elements.
    fn panels(self) -> usize {
        self.head_width.div_ceil(LANES)
    }
}

/// k or v of one head as `[tile of keys][D][TILE]`, for products over D; 0 where a tile is not full.
fn tiles_by_key(rows: Rows<'_>, sizes: Sizes) -> Vec<[f32; TILE]> {
    let width = sizes.head_width;
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
fn tiles_by_element(rows: Rows<'_>, sizes: Sizes) -> Vec<[f32; TILE]> {
    let (length, width) = (sizes.length, sizes.head_width);
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
        Self { columns: vec![[0.0; LANES]; sizes.head_width], rows: vec![[[0.0; LANES]; LANES]; sizes.panels()] }
    }

    /// Takes rows `first` and on, times `scale`; 0 after the last.
    #[inline(always)]
    fn load(&mut self, rows: Rows<'_>, first: usize, scale: f32, sizes: Sizes) {
        for lane in 0..LANES {
            if first + lane < sizes.length {
                let row = rows.row(first + lane, sizes.head_width);
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
fn product(a: &[[f32; TILE]], b: &[Lanes]) -> [Lanes; TILE] {
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
fn score(scores: &mut [Lanes], k_by_key: &[[f32; TILE]], columns: &[Lanes], first: usize) {
    let width = columns.len();
    for (tile, scores) in scores.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        *scores = product(&k_by_key[tile * width..][..width], columns);
    }
    for (key, scores) in scores.iter_mut().enumerate().skip(first) {
        for lane in 0..LANES {
            if key > first + lane {
                scores[lane] = MASKED;
            }
        }
    }
}

/// `Σ over keys of tiles[key] · lanes[key]`, times `scale`, as rows of the queries from `first` on.
#[inline(always)]
fn gather(rows: &mut [f32], tiles: &[[f32; TILE]], lanes: &[Lanes], first: usize, scale: &Lanes, sizes: Sizes) {
    let (length, width) = (sizes.length, sizes.head_width);
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

struct Forward<'a> {
    sizes: Sizes,
    q: Rows<'a>,
    k_by_key: &'a [[f32; TILE]],
    v_by_element: &'a [[f32; TILE]],
    /// `[T, D]`.
    output: &'a mut [f32],
    statistics: &'a mut [[f32; 2]],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let sizes = self.sizes;
        let scale = 1.0 / (sizes.head_width as f32).sqrt();
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
            gather(self.output, &self.v_by_element, &scores[..keys], first, &inverse, sizes);
            for (lane, statistics) in self.statistics[first..].iter_mut().take(LANES).enumerate() {
                *statistics = [largest[lane], inverse[lane]];
            }
        }
    }
}

struct Backward<'a> {
    sizes: Sizes,
    q: Rows<'a>,
    /// Of the output's gradient.
    upper: Rows<'a>,
    k_by_key: &'a [[f32; TILE]],
    k_by_element: &'a [[f32; TILE]],
    v_by_key: &'a [[f32; TILE]],
    statistics: &'a [[f32; 2]],
    /// `[T, D]`.
    dq: &'a mut [f32],
    /// Of k and v: `[panel of D][key][16 of D]`.
    sums: &'a mut [Vec<Lanes>; 2],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let sizes = self.sizes;
        let scale = 1.0 / (sizes.head_width as f32).sqrt();
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
            let width = sizes.head_width;
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
            gather(self.dq, &self.k_by_element, &slopes[..keys], first, &[scale; LANES], sizes);
            for (sum, (factors, block)) in self.sums.iter_mut().zip([(&*slopes, &q), (&*scores, &upper)]) {
                for (sum, rows) in sum.chunks_exact_mut(sizes.padded_keys()).zip(&block.rows) {
                    let tiles = sum.as_chunks_mut::<TILE>().0.iter_mut().zip(factors.as_chunks::<TILE>().0);
                    tiles.for_each(|(sum, factors)| add_product(sum, factors, rows));
                }
            }
        }
    }
}
