//! Products whose operands are rounded to bf16, the upper half of an f32, and whose sums are f32.
//!
//! Where the processor multiplies pairs of bf16 ([`avx512`]), that is twice as many multiplications a second as of f32.
//! Elsewhere rounded copies are multiplied as f32 are.

#[cfg(target_arch = "x86_64")]
mod avx512;

use rayon::prelude::*;

use super::{Before, Matrix};
use crate::kernels::cpu::buffer::Buffer;

/// Elements that one thread rounds at a time.
const PART: usize = 1 << 14;

/// See [`multiply`](super::multiply).
#[cfg_attr(target_arch = "x86_64", allow(unsafe_code))]
pub(super) fn multiply(destination: &mut [f32], before: Before, left: Matrix<'_>, right: Matrix<'_>) {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_there() {
        // SAFETY: the processor has what this asks for.
        return unsafe { avx512::multiply(destination, before, left, right) };
    }
    multiply_rounded(destination, before, left, right);
}

/// By way of rounded copies.
fn multiply_rounded(destination: &mut [f32], before: Before, left: Matrix<'_>, right: Matrix<'_>) {
    let [left_values, right_values] = [left, right].map(|matrix| {
        let mut copy = Buffer::of(matrix.values);
        let round = |values: &mut [f32]| values.iter_mut().for_each(|x| *x = f32::from_bits(rounded(x.to_bits())));
        copy.par_chunks_mut(PART).for_each(round);
        copy
    });
    let (left, right) = (Matrix { values: &left_values, ..left }, Matrix { values: &right_values, ..right });
    super::multiply_f32(destination, before, left, right);
}

/// The bits of an f32, rounded to the nearest bf16, of two equally near ones to the even one: its lower half is 0. NaN stays
/// NaN.
#[inline(always)]
fn rounded(bits: u32) -> u32 {
    const INFINITY: u32 = 0x7f80_0000;
    const QUIET: u32 = 0x0040_0000;
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let found = if bits & !(1 << 31) > INFINITY { bits | QUIET } else { nearest };
    found & 0xffff_0000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::normals;

    proptest! {
        #[test]
        fn rounding_is_that_of_the_library(bits in any::<u32>()) {
            let expected = half::bf16::from_f32(f32::from_bits(bits)).to_f32();
            let found = f32::from_bits(rounded(bits));
            prop_assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan());
        }
    }

    /// Rows, columns, and what is summed over: whole tiles and parts of them, odd depths, one and nothing.
    const SIZES: [[usize; 3]; 9] = [
        [1, 1, 1],
        [12, 32, 2],
        [13, 33, 3],
        [48, 64, 16],
        [5, 300, 65],
        [100, 7, 129],
        [96, 128, 512],
        [250, 190, 31],
        [3, 4, 0],
    ];

    /// The product, of f64, of what operands are rounded to, and how large its terms are together.
    fn expected(left: &[f32], right: &[f32], [rows, columns, depth]: [usize; 3]) -> Vec<(f64, f64)> {
        let value = |values: &[f32], index: usize| f64::from(f32::from_bits(rounded(values[index].to_bits())));
        let places = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        let terms = places.map(|(row, column)| {
            (0..depth).map(move |k| value(left, row * depth + k) * value(right, k * columns + column))
        });
        terms.map(|terms| (terms.clone().sum(), terms.map(f64::abs).sum())).collect()
    }

    fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
    }

    fn found(before: Before, left: Matrix<'_>, right: Matrix<'_>) -> Vec<f32> {
        let mut destination = vec![1.0; left.rows * right.columns];
        multiply(&mut destination, before, left, right);
        destination
    }

    #[test]
    fn products_are_those_of_rounded_operands_however_these_lie_and_whoever_computes_them() {
        for sizes @ [rows, columns, depth] in SIZES {
            let (left, right) = (normals(3, 0, rows * depth), normals(3, 1, depth * columns));
            let (left_columns, right_columns) = (transposed(&left, depth), transposed(&right, columns));
            let matrix =
                |values, rows, columns| Matrix { values, rows, columns, row_stride: columns, column_stride: 1 };
            let lefts = [matrix(&left, rows, depth), matrix(&left_columns, depth, rows).transposed()];
            let rights = [matrix(&right, depth, columns), matrix(&right_columns, columns, depth).transposed()];
            let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            let product = alone.install(|| found(Before::Replaced, lefts[0], rights[0]));
            for (left, right) in lefts.into_iter().flat_map(|left| rights.map(|right| (left, right))) {
                for threads in [1, 2, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    assert_eq!(pool.install(|| found(Before::Replaced, left, right)), product, "{sizes:?}");
                    let added: Vec<f32> = product.iter().map(|sum| 1.0 + sum).collect();
                    assert_eq!(pool.install(|| found(Before::Kept, left, right)), added, "{sizes:?}");
                }
            }
            let mut elsewhere = vec![f32::NAN; rows * columns];
            multiply_rounded(&mut elsewhere, Before::Replaced, lefts[0], rights[0]);
            for ((sum, terms), found) in expected(&left, &right, sizes).into_iter().zip(product.iter().zip(&elsewhere))
            {
                for found in [found.0, found.1] {
                    let error = (f64::from(*found) - sum).abs();
                    assert!(error <= 1e-6 * terms, "{sizes:?}: {found} is not {sum}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_shows() {
        let (infinite, ones) = ([1.0, f32::INFINITY, f32::NAN, 1.0], [1.0; 4]);
        let product = found(Before::Replaced, Matrix::new(&infinite, 2), Matrix::new(&ones, 2));
        assert_eq!(product[..2], [f32::INFINITY; 2]);
        assert!(product[2..].iter().all(|x| x.is_nan()));
    }
}
