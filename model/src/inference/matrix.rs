//! Products of rows with matrices that are laid out for them once: weights, and what attention has cached.
//!
//! A matrix stands in panels of columns, each row by row, so that a product reads it once and in order. Each element of
//! a product is one chain of fused multiplications and additions, from the first row of the matrix to the last: it does not depend
//! on how many rows are multiplied at once, or by how many threads.

use bytemuck::{Pod, Zeroable};
use macerator::{AutoArch, Scalar as _, Simd, Vector, WithSimd};
use rayon::prelude::*;

use crate::kernels::lanes::LANES;

/// Groups of columns that stand together in a panel of weights, and of cached keys.
pub(super) const GROUPS: usize = 4;
/// Rows that one thread takes at a time, where there are many.
const ROWS: usize = 64;
/// Multiplications below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 17;

/// 16 columns of a row, or fewer and zeros.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Group(pub(super) [f32; LANES]);

/// Rows to be multiplied, in tiles of up to 6: of each tile, the first elements of its rows, then the second ones, and so on.
pub(super) struct Tiles {
    values: Vec<f32>,
    depth: usize,
}

impl Tiles {
    /// Of `rows`, each of `depth` elements of which `element` tells one.
    pub(super) fn new(rows: usize, depth: usize, element: impl Fn(usize, usize) -> f32) -> Self {
        let mut values = Vec::with_capacity(rows * depth);
        let mut first = 0;
        while first < rows {
            let tile = tile_rows(rows - first);
            for index in 0..depth {
                values.extend((first..first + tile).map(|row| element(row, index)));
            }
            first += tile;
        }
        Self { values, depth }
    }

    /// Of rows one after the other.
    pub(super) fn of(rows: &[f32], depth: usize) -> Self {
        match rows.len() / depth {
            1 => Self { values: rows.to_vec(), depth },
            count => Self::new(count, depth, |row, index| rows[row * depth + index]),
        }
    }

    fn rows(&self) -> usize {
        self.values.len() / self.depth
    }
}

/// Rows of the next tile, of those that are left.
#[inline(always)]
fn tile_rows(left: usize) -> usize {
    match left {
        0 | 1 => 1,
        2 | 3 => 2,
        4 | 5 => 4,
        _ => 6,
    }
}

/// Products of `tiles` with the columns of one panel, whose rows have `groups` groups each. `each` is given a row's number, a
/// column's, and products from that column on.
#[inline(always)]
pub(super) fn multiply_panel<S: Simd>(
    tiles: &Tiles,
    panel: &[Group],
    groups: usize,
    each: &mut impl FnMut(usize, usize, &[f32]),
) {
    let panel: &[Vector<S, f32>] = bytemuck::cast_slice(&panel[..tiles.depth * groups]);
    let stride = groups * (LANES / f32::lanes::<S>());
    let (rows, mut first) = (tiles.rows(), 0);
    while first < rows {
        let count = tile_rows(rows - first);
        let values = &tiles.values[first * tiles.depth..][..count * tiles.depth];
        match count {
            6 => multiply_tile::<S, 6>(values, first, panel, stride, each),
            4 => multiply_tile::<S, 4>(values, first, panel, stride, each),
            2 => multiply_tile::<S, 2>(values, first, panel, stride, each),
            _ => multiply_tile::<S, 1>(values, first, panel, stride, each),
        }
        first += count;
    }
}

/// Those of R rows, as many columns at a time as registers hold.
#[inline(always)]
fn multiply_tile<S: Simd, const R: usize>(
    values: &[f32],
    first_row: usize,
    panel: &[Vector<S, f32>],
    stride: usize,
    each: &mut impl FnMut(usize, usize, &[f32]),
) {
    let (values, lanes) = (values.as_chunks::<R>().0, f32::lanes::<S>());
    let widest = match (R, lanes) {
        (1, _) => 8,
        (4.., 8) => 2,
        _ => 4,
    };
    let mut vector = 0;
    while vector < stride {
        let (width, columns) = (widest.min(stride - vector), vector * lanes);
        match width {
            8.. => give(first_row, columns, &sums::<S, R, 8>(values, &panel[vector..], stride), each),
            4.. => give(first_row, columns, &sums::<S, R, 4>(values, &panel[vector..], stride), each),
            2.. => give(first_row, columns, &sums::<S, R, 2>(values, &panel[vector..], stride), each),
            _ => give(first_row, columns, &sums::<S, R, 1>(values, &panel[vector..], stride), each),
        }
        vector += match width {
            8.. => 8,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
    }
}

/// Sums of R rows in V vectors of columns, the first ones of each row of `panel`.
#[inline(always)]
fn sums<S: Simd, const R: usize, const V: usize>(
    values: &[[f32; R]],
    panel: &[Vector<S, f32>],
    stride: usize,
) -> [[Vector<S, f32>; V]; R] {
    let mut sums = [[0f32.splat::<S>(); V]; R];
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
    depth: usize,
    /// out.
    columns: usize,
    bias: Option<Vec<f32>>,
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
        let panel_columns = GROUPS * LANES;
        let mut panels = vec![Group::default(); columns.div_ceil(panel_columns) * depth * GROUPS];
        panels.par_chunks_mut(depth * GROUPS).enumerate().for_each(|(panel, groups)| {
            for column in panel * panel_columns..columns.min((panel + 1) * panel_columns) {
                let (part, within) = part_of(parts, column);
                let (group, lane) = (column % panel_columns / LANES, column % LANES);
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

    /// Bytes that a product reads.
    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[Group]>(&self.panels)
    }

    /// `x W + b`, of rows `x` `[rows, in]`.
    pub(super) fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / self.depth * self.columns];
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(self.columns).for_each(|row| row.copy_from_slice(bias));
        }
        self.add(x, &mut y);
        y
    }

    /// Adds `x W + b` to `onto` `[rows, out]`.
    pub(super) fn multiply_onto(&self, x: &[f32], onto: &mut [f32]) {
        if let Some(bias) = &self.bias {
            for row in onto.chunks_exact_mut(self.columns) {
                row.iter_mut().zip(bias).for_each(|(element, bias)| *element += bias);
            }
        }
        self.add(x, onto);
    }

    /// Adds `x W` to `y`.
    fn add(&self, x: &[f32], y: &mut [f32]) {
        let (rows, all) = (x.len() / self.depth, 0..self.panels.len() / (self.depth * GROUPS));
        if rows * self.panels.len() * LANES < WORTH_THREADS {
            return self.add_panels(&Tiles::of(x, self.depth), all, 0, y);
        }
        if rows >= 2 * ROWS {
            let blocks = y.par_chunks_mut(ROWS * self.columns).zip(x.par_chunks(ROWS * self.depth));
            return blocks.for_each(|(y, x)| self.add_panels(&Tiles::of(x, self.depth), all.clone(), 0, y));
        }
        // Few rows: each thread takes some of the columns.
        let tiles = Tiles::of(x, self.depth);
        let panels = all.len().div_ceil(2 * rayon::current_num_threads());
        let width = panels * GROUPS * LANES;
        let starts: Vec<usize> = all.clone().step_by(panels).collect();
        let parts = starts.into_par_iter().map(|start| {
            let columns = width.min(self.columns - start * GROUPS * LANES);
            let mut part = vec![0.0; rows * columns];
            self.add_panels(&tiles, start..all.end.min(start + panels), columns, &mut part);
            (start * GROUPS * LANES, columns, part)
        });
        for (start, columns, part) in parts.collect::<Vec<_>>() {
            for (y, part) in y.chunks_exact_mut(self.columns).zip(part.chunks_exact(columns)) {
                y[start..start + columns].iter_mut().zip(part).for_each(|(element, sum)| *element += sum);
            }
        }
    }

    /// Adds the products with some panels to `y`, whose rows have `columns` elements, or where that is 0, all.
    fn add_panels(&self, tiles: &Tiles, panels: std::ops::Range<usize>, columns: usize, y: &mut [f32]) {
        let columns = if columns == 0 { self.columns } else { columns };
        AutoArch::new().dispatch(AddPanels { matrix: self, tiles, panels, columns, y });
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

struct AddPanels<'a> {
    matrix: &'a Matrix,
    tiles: &'a Tiles,
    panels: std::ops::Range<usize>,
    columns: usize,
    y: &'a mut [f32],
}

impl WithSimd for AddPanels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self) {
        let panel_len = self.matrix.depth * GROUPS;
        for (index, panel) in self.panels.enumerate() {
            let start = index * GROUPS * LANES;
            multiply_panel::<S>(
                self.tiles,
                &self.matrix.panels[panel * panel_len..][..panel_len],
                GROUPS,
                &mut |row, column, sums| {
                    let column = start + column;
                    let end = self.columns.min(column + sums.len());
                    if column < end {
                        let y = &mut self.y[row * self.columns..][column..end];
                        y.iter_mut().zip(sums).for_each(|(element, sum)| *element += sum);
                    }
                },
            );
        }
    }
}
