//! Products of matrices in an order that is fixed: every element is a sum over the inner axis from its first index to its
//! last, rounded after each product and each sum. So they have the same bits on every machine, which a library's kernels,
//! chosen by what the processor offers, do not promise.
//!
//! Matrices are row-major vectors.

/// Columns that are summed side by side.
const LANES: usize = 8;
/// Rows that are summed side by side.
const ROWS: usize = 4;

/// `a b` `[rows, columns]`, for `a` `[rows, inner]` and `b` `[inner, columns]`.
pub(super) fn product(a: &[f32], b: &[f32], [rows, inner, columns]: [usize; 3]) -> Vec<f32> {
    assert_eq!((a.len(), b.len()), (rows * inner, inner * columns));
    let mut result = vec![0.0; rows * columns];
    let mut panel = vec![[0.0; LANES]; inner]; // columns of b, side by side
    for column in (0..columns).step_by(LANES) {
        let width = LANES.min(columns - column);
        for (lanes, row) in panel.iter_mut().zip(b.chunks_exact(columns)) {
            lanes[..width].copy_from_slice(&row[column..column + width]);
        }
        let mut put = |row: usize, sums: &[[f32; LANES]]| {
            for (row, sums) in (row..).zip(sums) {
                result[row * columns + column..][..width].copy_from_slice(&sums[..width]);
            }
        };
        let (blocks, rest) = (rows / ROWS, rows % ROWS);
        for row in (0..blocks).map(|block| block * ROWS) {
            put(row, &sums::<ROWS>(&a[row * inner..], &panel));
        }
        for row in rows - rest..rows {
            put(row, &sums::<1>(&a[row * inner..], &panel));
        }
    }
    result
}

/// The first `R` rows of `a`, each as long as `panel`, times `panel`.
fn sums<const R: usize>(a: &[f32], panel: &[[f32; LANES]]) -> [[f32; LANES]; R] {
    let rows: [&[f32]; R] = std::array::from_fn(|row| &a[row * panel.len()..][..panel.len()]);
    let mut sums = [[0.0; LANES]; R];
    for (index, lanes) in panel.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, lane) in sums.iter_mut().zip(lanes) {
                *sum += row[index] * lane;
            }
        }
    }
    sums
}

/// `[columns, rows]` of a matrix `[rows, columns]`.
pub(super) fn transposed(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against three plain loops, to the bit, in sizes that fill no block.
        #[test]
        fn products_have_the_bits_of_plain_loops([rows, inner, columns] in [1usize..11, 1usize..20, 1usize..20]) {
            let values = |count: usize, seed: usize| -> Vec<f32> {
                (0..count).map(|i| ((i * 7919 + seed) % 1013) as f32 / 97.0 - 5.0).collect()
            };
            let (a, b) = (values(rows * inner, 3), values(inner * columns, 5));
            let mut plain = vec![0.0f32; rows * columns];
            for row in 0..rows {
                for column in 0..columns {
                    for index in 0..inner {
                        plain[row * columns + column] += a[row * inner + index] * b[index * columns + column];
                    }
                }
            }
            prop_assert_eq!(product(&a, &b, [rows, inner, columns]), plain);
            prop_assert_eq!(transposed(&transposed(&a, rows, inner), inner, rows), a);
        }
    }
}
