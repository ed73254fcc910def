//! Products by AVX512-BF16: `vdpbf16ps` multiplies 16 pairs of bf16 by 16 others, and adds both products of each to an f32.
//!
//! Operands are rounded as they are packed: pairs of neighbours along what is summed over, for as many rows or columns side
//! by side as a tile has. So a tile reads both from beginning to end. An element of the product is one chain over all pairs,
//! whatever tile it is in, and whichever thread has that.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_setzero_ps,
};
use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::cpu::buffer::Buffer;
use crate::kernels::cpu::product::{Before, Matrix, WORTH_THREADS};

/// Elements of a register.
const LANES: usize = 16;
/// Rows of a tile, whose sums are in 24 of 32 registers: that leaves room for two of columns and one of a row.
const ROWS: usize = 12;
/// Registers of a row of a tile.
const VECTORS: usize = 2;
/// Columns of a tile.
const COLUMNS: usize = VECTORS * LANES;
/// Tiles, one below the other, that one thread takes at most: so often columns are read from a near cache.
const TILES: usize = 4;
/// Panels that one thread packs at a time, at most.
const PANELS: usize = 16;
/// Elements that are rounded at a time.
const PART: usize = 2 * LANES;

/// Whether the processor has it.
pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// See [`multiply`](crate::kernels::cpu::product::multiply).
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn multiply(destination: &mut [f32], before: Before, left: Matrix<'_>, right: Matrix<'_>) {
    let (rows, columns, pairs) = (left.rows, right.columns, left.columns.div_ceil(2).max(1));
    let threads = if rows * columns * left.columns < WORTH_THREADS { 1 } else { rayon::current_num_threads() };
    let (left, right) = (pack::<ROWS>(left, threads), pack::<COLUMNS>(right.transposed(), threads));
    let [left, right] = [&left, &right].map(|packed| bytemuck::cast_slice::<f32, u32>(packed));
    let tiles = rows.div_ceil(ROWS).div_ceil(4 * threads).clamp(1, TILES);
    let fill = |(part, destination): (usize, &mut [f32])| {
        let left = left.chunks_exact(pairs * ROWS).skip(part * tiles);
        for (panel, right) in right.chunks_exact(pairs * COLUMNS).enumerate() {
            for (left, destination) in left.clone().zip(destination.chunks_mut(ROWS * columns)) {
                let sums = tile(left, right);
                for (sums, row) in sums.iter().zip(destination.chunks_exact_mut(columns)) {
                    let found = row[panel * COLUMNS..].iter_mut().zip(sums);
                    match before {
                        Before::Replaced => found.for_each(|(found, sum)| *found = *sum),
                        Before::Kept => found.for_each(|(found, sum)| *found += sum),
                    }
                }
            }
        }
    };
    by_parts(destination, (tiles * ROWS * columns).max(1), threads, fill);
}

/// Has `fill` write all parts of so many elements, each of which it is given with its number.
fn by_parts(values: &mut [f32], part: usize, threads: usize, fill: impl Fn((usize, &mut [f32])) + Send + Sync) {
    match threads {
        1 => values.chunks_mut(part).enumerate().for_each(fill),
        _ => values.par_chunks_mut(part).enumerate().for_each(fill),
    }
}

/// The sums, row by row, over all pairs of a panel of rows and a panel of columns.
#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(unsafe_code)]
fn tile(left: &[u32], right: &[u32]) -> [[f32; COLUMNS]; ROWS] {
    // SAFETY: as many bytes, any of which are a value.
    let vector = |pairs: &[u32; LANES]| unsafe { std::mem::transmute::<[u32; LANES], __m512bh>(*pairs) };
    // SAFETY: likewise.
    let everywhere = |pair: u32| unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair as i32)) };
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (rows, columns) in left.as_chunks::<ROWS>().0.iter().zip(right.as_chunks::<COLUMNS>().0) {
        let (columns, _) = columns.as_chunks::<LANES>();
        let columns: [_; VECTORS] = [vector(&columns[0]), vector(&columns[1])];
        for (sums, &pair) in sums.iter_mut().zip(rows) {
            let row = everywhere(pair);
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, row, column);
            }
        }
    }
    // SAFETY: likewise.
    unsafe { std::mem::transmute::<[[__m512; VECTORS]; ROWS], [[f32; COLUMNS]; ROWS]>(sums) }
}

/// The rows of a matrix, rounded, in panels of `W`: each pair by pair, and each pair of the panel's rows side by side. What is
/// missing to a whole panel or pair is 0.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pack<const W: usize>(matrix: Matrix<'_>, threads: usize) -> Buffer {
    let (panels, pairs) = (matrix.rows.div_ceil(W), matrix.columns.div_ceil(2).max(1));
    let mut packed = Buffer::of_any(panels * pairs * W);
    let panels_at_once = panels.div_ceil(threads).clamp(1, PANELS);
    let fill = |(group, panels): (usize, &mut [f32])| {
        let (panels, _) = bytemuck::cast_slice_mut::<f32, u32>(panels).as_chunks_mut::<W>();
        let first = group * panels_at_once * W;
        let whole = match matrix.row_stride {
            1 => panels.len() / pairs - usize::from(matrix.rows < first + panels.len() / pairs * W),
            _ => 0,
        };
        pack_columns(matrix, first, pairs, &mut panels[..whole * pairs]);
        for (index, panel) in panels.chunks_exact_mut(pairs).enumerate().skip(whole) {
            let start = first + index * W;
            pack_rows(matrix, start..matrix.rows.min(start + W), panel);
        }
    };
    by_parts(&mut packed, panels_at_once * pairs * W, threads, fill);
    packed
}

/// Whole panels, of `pairs` pairs each, of rows from `first` on, which lie side by side: pair by pair, so that memory is read
/// in long runs.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pack_columns<const W: usize>(matrix: Matrix<'_>, first: usize, pairs: usize, panels: &mut [[u32; W]]) {
    let (rows, nothing) = (panels.len() / pairs * W, [0.0; W]);
    let column = |column: usize| match column < matrix.columns {
        true => &matrix.values[column * matrix.column_stride + first..][..rows],
        false => &[],
    };
    for index in 0..pairs {
        let [lower, upper] = [column(2 * index), column(2 * index + 1)].map(|column| column.as_chunks::<W>().0);
        for (number, panel) in panels.chunks_exact_mut(pairs).enumerate() {
            let [lower, upper] = [lower, upper].map(|panels| panels.get(number).unwrap_or(&nothing));
            let lines = panel[index].chunks_mut(LANES).zip(lower.chunks(LANES)).zip(upper.chunks(LANES));
            for ((pairs, lower), upper) in lines {
                let rounded: [u16; PART] = bytemuck::cast(rounded(&lanes(lower), &lanes(upper)));
                for (lane, pair) in pairs.iter_mut().enumerate() {
                    *pair = u32::from(rounded[lane]) | u32::from(rounded[LANES + lane]) << 16;
                }
            }
        }
    }
}

/// A panel of rows, each of which is read from its beginning to its end.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pack_rows<const W: usize>(matrix: Matrix<'_>, rows: Range<usize>, panel: &mut [[u32; W]]) {
    if rows.len() < W {
        panel.fill([0; W]);
    }
    for (place, row) in rows.enumerate() {
        let value = |column: usize| matrix.values[row * matrix.row_stride + column * matrix.column_stride];
        for (part, pairs) in panel.chunks_mut(PART / 2).enumerate() {
            let columns = part * PART..matrix.columns.min((part + 1) * PART);
            let rounded = if matrix.column_stride == 1 {
                let start = row * matrix.row_stride;
                let values = &matrix.values[start + columns.start..start + columns.end];
                let (lower, upper) = values.split_at(values.len().min(LANES));
                rounded(&lanes(lower), &lanes(upper))
            } else {
                let mut values = [0.0; PART];
                values.iter_mut().zip(columns).for_each(|(found, column)| *found = value(column));
                rounded(&lanes(&values[..LANES]), &lanes(&values[LANES..]))
            };
            pairs.iter_mut().zip(rounded).for_each(|(pairs, pair)| pairs[place] = pair);
        }
    }
}

/// As many values as a register has; what is missing is 0.
#[inline(always)]
fn lanes(values: &[f32]) -> [f32; LANES] {
    values.first_chunk().copied().unwrap_or_else(|| {
        let mut lanes = [0.0; LANES];
        lanes[..values.len()].copy_from_slice(values);
        lanes
    })
}

/// All values rounded to the nearest bf16, ties to even, two in each number, the first in its lower half. Subnormal ones become
/// 0, as they would in the product.
#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(unsafe_code)]
fn rounded(lower: &[f32; LANES], upper: &[f32; LANES]) -> [u32; LANES] {
    // SAFETY: as many bytes, any of which are a value.
    let vector = |values: &[f32; LANES]| unsafe { std::mem::transmute::<[f32; LANES], __m512>(*values) };
    let rounded = _mm512_cvtne2ps_pbh(vector(upper), vector(lower));
    // SAFETY: likewise.
    unsafe { std::mem::transmute::<__m512bh, [u32; LANES]>(rounded) }
}
