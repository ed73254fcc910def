//! Products of rows with columns that stand in a panel, row by row, so that it is read in order.
//!
//! Each element of a product is one chain of fused multiplications and additions, from the first row of the panel to the last:
//! it does not depend on how many rows are multiplied at once.

use bytemuck::{Pod, Zeroable};
use macerator::{Scalar as _, Simd, Vector};

use crate::kernels::lanes::LANES;

/// Groups of columns that stand together in a panel of weights, and of cached keys.
pub(super) const GROUPS: usize = 4;
/// Rows of the largest tile: as many as have room in registers for their sums with 4 groups.
const MOST_TILE_ROWS: usize = 6;
/// Groups of a panel that stay in a core's second cache, 128 KiB, beside the rows' share.
const NEAR_GROUPS: usize = 2048;

/// 16 columns of a row, or fewer and zeros.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Group(pub(super) [f32; LANES]);

/// Rows to be multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a> {
    pub(super) values: &'a [f32],
    /// Elements from one row's first to the next one's.
    pub(super) stride: usize,
    /// Elements of a row.
    pub(super) depth: usize,
}

impl<'a> Rows<'a> {
    /// Of `depth` elements, one after the other.
    pub(super) fn of(values: &'a [f32], depth: usize) -> Self {
        Self { values, stride: depth, depth }
    }

    pub(super) fn count(&self) -> usize {
        self.values.len() / self.stride
    }
}

/// Columns side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel<'a> {
    /// `[depth][width]`, or more than so many.
    pub(super) groups: &'a [Group],
    /// Groups of a row.
    pub(super) width: usize,
    /// How many of the columns are asked for, from the first on; products with a few more may be given.
    pub(super) columns: usize,
}

/// Where products go.
pub(super) trait Products {
    /// Takes a row's products with the panel's columns, from the first on.
    fn take(&mut self, row: usize, products: &[f32]);
}

/// Multiplies `rows` with the columns of a panel. `scratch` may hold anything.
///
/// Where there are several tiles of rows, they take a part of a deep panel at a time, which stays near meanwhile, and go on from
/// the sums that they had: the chain of additions is the same.
#[inline(always)]
pub(super) fn multiply_panel<S: Simd>(
    rows: Rows<'_>,
    panel: Panel<'_>,
    scratch: &mut Vec<Vector<S, f32>>,
    products: &mut impl Products,
) {
    let (count, depth, vectors) = (rows.count(), rows.depth, LANES / f32::lanes::<S>());
    let stride = panel.width * vectors;
    let used = panel.columns.div_ceil(f32::lanes::<S>()).min(stride);
    let columns: &[Vector<S, f32>] = bytemuck::cast_slice(&panel.groups[..depth * panel.width]);
    let part = if count > MOST_TILE_ROWS { (NEAR_GROUPS / panel.width).max(1) } else { depth.max(1) };
    let has_parts = part < depth;
    scratch.resize(if has_parts { count } else { MOST_TILE_ROWS } * stride, 0f32.splat::<S>());
    for start in (0..depth).step_by(part) {
        let end = depth.min(start + part);
        let mut first = 0;
        while first < count {
            let tile_rows = tile_rows(count - first);
            let sums = &mut scratch[if has_parts { first * stride } else { 0 }..][..tile_rows * stride];
            let tile = Tile {
                values: &rows.values[first * rows.stride + start..],
                row_stride: rows.stride,
                depth: end - start,
                columns: &columns[start * stride..end * stride],
                stride,
                used,
                sums,
                is_first: start == 0,
            };
            match tile_rows {
                MOST_TILE_ROWS => multiply_tile::<S, MOST_TILE_ROWS>(tile),
                4 => multiply_tile::<S, 4>(tile),
                2 => multiply_tile::<S, 2>(tile),
                _ => multiply_tile::<S, 1>(tile),
            }
            if end == depth {
                for (row, sums) in (first..).zip(sums.chunks(stride)) {
                    products.take(row, bytemuck::cast_slice(&sums[..used]));
                }
            }
            first += tile_rows;
        }
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

/// Some rows' share of a part of a panel.
struct Tile<'a, S: Simd> {
    /// From the first element on that is multiplied.
    values: &'a [f32],
    row_stride: usize,
    depth: usize,
    /// `[depth][stride]`.
    columns: &'a [Vector<S, f32>],
    stride: usize,
    /// Vectors of a row of `columns` that are asked for.
    used: usize,
    /// Sums so far, `[rows][stride]`; of the first part they hold anything.
    sums: &'a mut [Vector<S, f32>],
    is_first: bool,
}

/// Products of R rows, as many columns at a time as registers hold.
#[inline(always)]
fn multiply_tile<S: Simd, const R: usize>(mut tile: Tile<'_, S>) {
    let widest = match (R, f32::lanes::<S>()) {
        (1, _) => 8,
        (4.., 8) => 2,
        _ => 4,
    };
    let mut vector = 0;
    while vector < tile.used {
        vector += match widest.min(tile.used - vector) {
            8.. => multiply_columns::<S, R, 8>(&mut tile, vector),
            4.. => multiply_columns::<S, R, 4>(&mut tile, vector),
            2.. => multiply_columns::<S, R, 2>(&mut tile, vector),
            _ => multiply_columns::<S, R, 1>(&mut tile, vector),
        };
    }
}

/// Those with V vectors of columns, from `vector` on. V.
#[inline(always)]
fn multiply_columns<S: Simd, const R: usize, const V: usize>(tile: &mut Tile<'_, S>, vector: usize) -> usize {
    let mut sums = [[0f32.splat::<S>(); V]; R];
    if !tile.is_first {
        for (row, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&tile.sums[row * tile.stride + vector..][..V]);
        }
    }
    let rows = std::array::from_fn(|row| &tile.values[row * tile.row_stride..]);
    let columns = tile.columns.chunks_exact(tile.stride).map(|columns| &columns[vector..]);
    let sums = add_products::<S, R, V>(sums, rows, tile.depth, columns);
    for (row, sums) in sums.iter().enumerate() {
        tile.sums[row * tile.stride + vector..][..V].copy_from_slice(sums);
    }
    V
}

/// Adds to sums of R rows the products of their first `depth` elements with V vectors of `columns`, whose rows come one by one.
#[inline(always)]
fn add_products<'a, S: Simd, const R: usize, const V: usize>(
    mut sums: [[Vector<S, f32>; V]; R],
    rows: [&[f32]; R],
    depth: usize,
    columns: impl Iterator<Item = &'a [Vector<S, f32>]>,
) -> [[Vector<S, f32>; V]; R] {
    // Slices of one length, so that no bounds are checked in the loop over it; its own loops have ends that the compiler knows,
    // so that sums stay in registers.
    let rows: [&[f32]; R] = std::array::from_fn(|row| &rows[row][..depth]);
    for (index, columns) in (0..depth).zip(columns) {
        let Some(columns) = columns.first_chunk::<V>() else { break };
        for row in 0..R {
            let value = rows[row][index].splat::<S>();
            for vector in 0..V {
                sums[row][vector] = columns[vector].fma(value, sums[row][vector]);
            }
        }
    }
    sums
}
