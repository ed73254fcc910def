//! Products of matrices, from one buffer to another.

mod bf16;

use gemm::Parallelism;

use crate::config::Precision;

/// Multiplications below which threads cost more than they bring.
const WORTH_THREADS: usize = 192 * 192 * 192;

/// A whole slice, as a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `columns` elements, one after the other.
    ///
    /// # Panics
    /// If the last row is not whole.
    pub(crate) fn new(values: &'a [f32], columns: usize) -> Self {
        let rows = values.len() / columns.max(1);
        assert_eq!(rows * columns, values.len(), "rows of {columns}");
        Self { values, rows, columns, row_stride: columns, column_stride: 1 }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// The same buffer, read with rows as columns.
    pub(crate) fn transposed(self) -> Self {
        let Self { values, rows, columns, row_stride, column_stride } = self;
        Self { values, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }
}

/// What becomes of a destination's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// They are overwritten.
    Replaced,
    /// They are added to.
    Kept,
}

/// The product of `left` and `right`, row-major, in `destination`. How many threads there are does not show in it.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn multiply(
    destination: &mut [f32],
    before: Before,
    left: Matrix<'_>,
    right: Matrix<'_>,
    precision: Precision,
) {
    assert_eq!(left.columns, right.rows, "what is summed over");
    assert_eq!(destination.len(), left.rows * right.columns, "elements of the destination");
    match precision {
        Precision::F32 => multiply_f32(destination, before, left, right),
        Precision::Bf16 => bf16::multiply(destination, before, left, right),
    }
}

#[allow(unsafe_code)]
fn multiply_f32(destination: &mut [f32], before: Before, left: Matrix<'_>, right: Matrix<'_>) {
    let (m, n, k) = (left.rows, right.columns, left.columns);
    let threads = if m * n * k < WORTH_THREADS { Parallelism::None } else { Parallelism::Rayon(0) };
    // SAFETY: a matrix's strides reach its own slice and no farther, see `Matrix::new`; so do n and 1 with m · n elements of
    // the destination, which is borrowed for writing and so overlaps neither. Strides of slices fit isize.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            destination.as_mut_ptr(),
            1,
            n as isize,
            before == Before::Kept,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}
