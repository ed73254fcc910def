//! Products of rows with matrices that are laid out for them once: weights, and what attention has cached.
//!
//! A matrix stands in panels of columns, each row by row, so that a product reads it once and in order. Each element of
//! a product is one chain of fused multiplications and additions, from the first row of the matrix to the last: it does not depend
//! on how many rows are multiplied at once, or by how many threads.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use macerator::{AutoArch, Scalar as _, Simd, Vector, WithSimd};
use rayon::prelude::*;

use crate::kernels::lanes::LANES;

/// Groups of columns that stand together in a panel of weights, and of cached keys.
pub(super) const GROUPS: usize = 4;
/// Columns of a panel of weights.
const PANEL_COLUMNS: usize = GROUPS * LANES;
/// Rows of the largest tile.
const MOST_TILE_ROWS: usize = 6;
/// Groups of a panel that stay in the nearest cache, 24 KiB, beside a tile and its sums.
const NEAR_GROUPS: usize = 384;
/// From so many rows a thread on, each takes some of the rows.
const MANY_ROWS: usize = 32;
/// Rows that one thread takes at a time, at most.
const MOST_ROWS: usize = 96;
/// Multiplications below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 17;

/// 16 columns of a row, or fewer and zeros.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Group(pub(super) [f32; LANES]);

/// Rows to be multiplied, in tiles of up to 6: of each tile, the first elements of its rows, then the second ones, and so on.
#[derive(Debug)]
pub(super) struct Tiles {
    values: Vec<f32>,
    depth: usize,
}

impl Tiles {
    /// Of rows of `depth` elements, `stride` apart, each element times `scale`.
    pub(super) fn new(rows: &[f32], stride: usize, depth: usize, scale: f32) -> Self {
        let count = rows.len() / stride;
        let mut values = vec![0.0; count * depth];
        let mut first = 0;
        while first < count {
            let tile = tile_rows(count - first);
            let (rows, values) = (&rows[first * stride..], &mut values[first * depth..]);
            match tile {
                MOST_TILE_ROWS => interleave::<6>(rows, stride, scale, &mut values[..6 * depth]),
                4 => interleave::<4>(rows, stride, scale, &mut values[..4 * depth]),
                2 => interleave::<2>(rows, stride, scale, &mut values[..2 * depth]),
                _ => interleave::<1>(rows, stride, scale, &mut values[..depth]),
            }
            first += tile;
        }
        Self { values, depth }
    }

    /// Of rows one after the other.
    fn of(rows: &[f32], depth: usize) -> Self {
        Self::new(rows, depth, depth, 1.0)
    }

    fn rows(&self) -> usize {
        self.values.len() / self.depth
    }
}

/// A tile of the first R rows.
fn interleave<const R: usize>(rows: &[f32], stride: usize, scale: f32, tile: &mut [f32]) {
    let tile = tile.as_chunks_mut::<R>().0;
    for row in 0..R {
        let elements = &rows[row * stride..][..tile.len()];
        tile.iter_mut().zip(elements).for_each(|(values, element)| values[row] = element * scale);
    }
}

/// Rows of the next tile, of those that are left.
#[inline(always)]
fn tile_rows(left: usize) -> usize {
    match left {
        0 | 1 => 1,
        2 | 3 => 2,
        4 | 5 => 4,
        _ => MOST_TILE_ROWS,
    }
}

/// Products of `tiles` with the columns of one panel, whose rows have `groups` groups each. `each` is given a row's number, a
/// column's, and products from that column on. `scratch` may hold anything.
///
/// Several tiles take a part of the panel at a time, which stays in the nearest cache meanwhile, and go on from the sums
/// that they had: the chain of additions is the same.
#[inline(always)]
pub(super) fn multiply_panel<S: Simd>(
    tiles: &Tiles,
    panel: &[Group],
    groups: usize,
    scratch: &mut Vec<Vector<S, f32>>,
    each: &mut impl FnMut(usize, usize, &[f32]),
) {
    let depth = tiles.depth;
    let panel: &[Vector<S, f32>] = bytemuck::cast_slice(&panel[..depth * groups]);
    let stride = groups * (LANES / f32::lanes::<S>());
    let part = if tiles.rows() > MOST_TILE_ROWS { (NEAR_GROUPS / groups).max(1) } else { depth };
    scratch.resize(if part < depth { tiles.rows() * stride } else { 0 }, 0f32.splat::<S>());
    for start in (0..depth).step_by(part) {
        let depths = start..depth.min(start + part);
        let is_last = depths.end == depth;
        let panel = &panel[depths.start * stride..depths.end * stride];
        let (rows, mut first) = (tiles.rows(), 0);
        while first < rows {
            let count = tile_rows(rows - first);
            let values = &tiles.values[first * depth..][depths.start * count..depths.end * count];
            let partial = if part < depth { &mut scratch[first * stride..(first + count) * stride] } else { &mut [] };
            let tile = Tile { values, first_row: first, panel, stride, partial, is_first: start == 0, is_last };
            match count {
                MOST_TILE_ROWS => multiply_tile::<S, 6>(tile, each),
                4 => multiply_tile::<S, 4>(tile, each),
                2 => multiply_tile::<S, 2>(tile, each),
                _ => multiply_tile::<S, 1>(tile, each),
            }
            first += count;
        }
    }
}

/// A tile's share of a part of a panel.
struct Tile<'a, S: Simd> {
    /// `[depth][rows]`.
    values: &'a [f32],
    first_row: usize,
    /// `[depth][stride]`.
    panel: &'a [Vector<S, f32>],
    stride: usize,
    /// Sums so far, `[rows][stride]`; empty where there is one part.
    partial: &'a mut [Vector<S, f32>],
    is_first: bool,
    is_last: bool,
}

/// Products of R rows, as many columns at a time as registers hold.
#[inline(always)]
fn multiply_tile<S: Simd, const R: usize>(mut tile: Tile<'_, S>, each: &mut impl FnMut(usize, usize, &[f32])) {
    let lanes = f32::lanes::<S>();
    let widest = match (R, lanes) {
        (1, _) => 8,
        (4.., 8) => 2,
        _ => 4,
    };
    let mut vector = 0;
    while vector < tile.stride {
        vector += match widest.min(tile.stride - vector) {
            8.. => multiply_columns::<S, R, 8>(&mut tile, vector, each),
            4.. => multiply_columns::<S, R, 4>(&mut tile, vector, each),
            2.. => multiply_columns::<S, R, 2>(&mut tile, vector, each),
            _ => multiply_columns::<S, R, 1>(&mut tile, vector, each),
        };
    }
}

/// Those with V vectors of columns, from `vector` on. V.
#[inline(always)]
fn multiply_columns<S: Simd, const R: usize, const V: usize>(
    tile: &mut Tile<'_, S>,
    vector: usize,
    each: &mut impl FnMut(usize, usize, &[f32]),
) -> usize {
    let mut sums = [[0f32.splat::<S>(); V]; R];
    if !tile.is_first {
        for (sums, partial) in sums.iter_mut().zip(tile.partial.chunks(tile.stride)) {
            sums.copy_from_slice(&partial[vector..vector + V]);
        }
    }
    let sums = add_products(sums, tile.values.as_chunks::<R>().0, &tile.panel[vector..], tile.stride);
    if tile.is_last {
        give(tile.first_row, vector * f32::lanes::<S>(), &sums, each);
    } else {
        for (sums, partial) in sums.iter().zip(tile.partial.chunks_mut(tile.stride)) {
            partial[vector..vector + V].copy_from_slice(sums);
        }
    }
    V
}

/// Sums of R rows in V vectors of columns, the first ones of each row of `panel`.
#[inline(always)]
fn add_products<S: Simd, const R: usize, const V: usize>(
    mut sums: [[Vector<S, f32>; V]; R],
    values: &[[f32; R]],
    panel: &[Vector<S, f32>],
    stride: usize,
) -> [[Vector<S, f32>; V]; R] {
    for (values, columns) in values.iter().zip(panel.chunks(stride)) {
        let Some(columns) = columns.first_chunk::<V>() else { break };
        for row in 0..R {
            let value = values[row].splat::<S>();
            for vector in 0..V {
                sums[row][vector] = columns[vector].fma(value, sums[row][vector]);
            }
        }
    }
    sums
}

#[inline(always)]
fn give<S: Simd, const R: usize, const V: usize>(
    first_row: usize,
    column: usize,
    sums: &[[Vector<S, f32>; V]; R],
    each: &mut impl FnMut(usize, usize, &[f32]),
) {
    for (row, sums) in sums.iter().enumerate() {
        each(first_row + row, column, bytemuck::cast_slice(sums));
    }
}

/// Weights `[in, out]`, and a bias where there is one.
#[derive(Debug)]
pub(super) struct Matrix {
    /// `[panel][in][GROUPS]`.
    panels: Vec<Group>,
    /// in.
    pub(super) depth: usize,
    /// out.
    pub(super) columns: usize,
    pub(super) bias: Option<Vec<f32>>,
}

/// What a product is added to.
#[derive(Clone, Copy, Debug)]
enum Onto {
    Nothing,
    /// What is there.
    Itself,
}

/// Some columns of a matrix, as a tensor holds them.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) values: &'a [f32],
    pub(super) columns: usize,
    /// Whether the tensor is `[columns, in]`.
    pub(super) transposed: bool,
}

impl Matrix {
    /// Of parts with `depth` rows, side by side.
    pub(super) fn new(depth: usize, parts: &[Part<'_>], bias: Option<&[f32]>) -> Self {
        let columns = parts.iter().map(|part| part.columns).sum::<usize>();
        let mut panels = vec![Group::default(); columns.div_ceil(PANEL_COLUMNS) * depth * GROUPS];
        panels.par_chunks_mut(depth * GROUPS).enumerate().for_each(|(panel, groups)| {
            for column in panel * PANEL_COLUMNS..columns.min((panel + 1) * PANEL_COLUMNS) {
                let (part, within) = part_of(parts, column);
                let (group, lane) = (column % PANEL_COLUMNS / LANES, column % LANES);
                for row in 0..depth {
                    let place = if part.transposed { within * depth + row } else { row * part.columns + within };
                    groups[row * GROUPS + group].0[lane] = part.values[place];
                }
            }
        });
        Self { panels, depth, columns, bias: bias.map(<[f32]>::to_vec) }
    }

    /// out.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// One element.
    pub(super) fn at(&self, row: usize, column: usize) -> f32 {
        let (panel, within) = (column / (GROUPS * LANES), column % (GROUPS * LANES));
        self.panels[(panel * self.depth + row) * GROUPS + within / LANES].0[within % LANES]
    }

    /// Bytes that a product reads.
    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[Group]>(&self.panels)
    }

    /// `x W + b` in `y` `[rows, out]`, of rows `x` `[rows, in]`.
    pub(super) fn multiply(&self, x: &[f32], y: &mut Vec<f32>) {
        y.resize(x.len() / self.depth * self.columns, 0.0);
        self.multiply_to(x, y, Onto::Nothing);
    }

    /// Adds `x W + b` to `y` `[rows, out]`.
    pub(super) fn multiply_onto(&self, x: &[f32], y: &mut [f32]) {
        self.multiply_to(x, y, Onto::Itself);
    }

    fn multiply_to(&self, x: &[f32], y: &mut [f32], onto: Onto) {
        let (rows, threads) = (x.len() / self.depth, rayon::current_num_threads());
        let all = 0..self.panels.len() / (self.depth * GROUPS);
        if threads == 1 || rows * self.panels.len() * LANES < WORTH_THREADS {
            return self.multiply_panels(&Tiles::of(x, self.depth), all, y, self.columns, onto);
        }
        if rows >= MANY_ROWS * threads {
            let block = rows.div_ceil(threads * rows.div_ceil(threads * MOST_ROWS)).next_multiple_of(MOST_TILE_ROWS);
            let blocks = y.par_chunks_mut(block * self.columns).zip(x.par_chunks(block * self.depth));
            return blocks.for_each(|(y, x)| {
                self.multiply_panels(&Tiles::of(x, self.depth), all.clone(), y, self.columns, onto);
            });
        }
        // Few rows: each thread takes some of the columns.
        let tiles = Tiles::of(x, self.depth);
        let panels = all.len().div_ceil(2 * threads);
        let parts = all.clone().into_par_iter().step_by(panels).map(|first| {
            let last = all.end.min(first + panels);
            let columns = self.columns.min(last * PANEL_COLUMNS) - first * PANEL_COLUMNS;
            let mut part = vec![0.0; rows * columns];
            self.multiply_panels(&tiles, first..last, &mut part, columns, Onto::Nothing);
            (first * PANEL_COLUMNS, columns, part)
        });
        for (start, columns, part) in parts.collect::<Vec<_>>() {
            for (y, part) in y.chunks_exact_mut(self.columns).zip(part.chunks_exact(columns)) {
                let y = &mut y[start..start + columns];
                match onto {
                    Onto::Nothing => y.copy_from_slice(part),
                    Onto::Itself => y.iter_mut().zip(part).for_each(|(element, sum)| *element += sum),
                }
            }
        }
    }

    /// Products with some panels, and biases, in rows `y` of `columns` elements.
    fn multiply_panels(&self, tiles: &Tiles, panels: Range<usize>, y: &mut [f32], columns: usize, onto: Onto) {
        AutoArch::new().dispatch(MultiplyPanels { matrix: self, tiles, panels, y, columns, onto });
    }
}

/// The part that a column is in, and the column's number there.
fn part_of<'a>(parts: &'a [Part<'a>], mut column: usize) -> (&'a Part<'a>, usize) {
    for part in parts {
        if column < part.columns {
            return (part, column);
        }
        column -= part.columns;
    }
    unreachable!("a column of one of the parts")
}

struct MultiplyPanels<'a> {
    matrix: &'a Matrix,
    tiles: &'a Tiles,
    panels: Range<usize>,
    y: &'a mut [f32],
    columns: usize,
    onto: Onto,
}

impl WithSimd for MultiplyPanels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let Self { matrix, tiles, panels, y, columns, onto } = self;
        let (panel_len, first, mut scratch) = (matrix.depth * GROUPS, panels.start, Vec::new());
        for panel in panels {
            let groups = &matrix.panels[panel * panel_len..][..panel_len];
            let start = (panel - first) * PANEL_COLUMNS;
            multiply_panel::<S>(tiles, groups, GROUPS, &mut scratch, &mut |row, column, sums| {
                let column = start + column;
                let end = columns.min(column + sums.len());
                if column >= end {
                    return;
                }
                let y = &mut y[row * columns..][column..end];
                let bias = matrix.bias.as_ref().map(|bias| &bias[first * PANEL_COLUMNS + column..]);
                match (onto, bias) {
                    (Onto::Nothing, None) => y.copy_from_slice(&sums[..end - column]),
                    (Onto::Nothing, Some(bias)) => {
                        y.iter_mut().zip(sums).zip(bias).for_each(|((y, sum), bias)| *y = sum + bias);
                    }
                    (Onto::Itself, None) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
                    (Onto::Itself, Some(bias)) => {
                        y.iter_mut().zip(sums).zip(bias).for_each(|((y, sum), bias)| *y += sum + bias);
                    }
                }
            });
        }
    }
}
