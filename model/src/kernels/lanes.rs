//! Sums in a fixed order that suits vector registers of any width.

/// Numbers that are worked on side by side: one AVX-512 register, two of AVX2, four of NEON.
pub(crate) const LANES: usize = 16;

/// [`LANES`] numbers.
pub(crate) type Lanes = [f32; LANES];

/// The sum of `term` over two slices of one length: element i goes to lane i mod 16, and the lanes are added as a tree.
#[inline(always)]
pub(crate) fn sum(left: &[f32], right: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (left, left_rest) = left.as_chunks::<LANES>();
    let (right, right_rest) = right.as_chunks::<LANES>();
    for (left, right) in left.iter().zip(right) {
        for lane in 0..LANES {
            lanes[lane] += term(left[lane], right[lane]);
        }
    }
    for ((lane, left), right) in lanes.iter_mut().zip(left_rest).zip(right_rest) {
        *lane += term(*left, *right);
    }
    reduce(lanes, |left, right| left + right)
}

/// The lanes, paired as a tree.
#[inline(always)]
pub(crate) fn reduce(mut lanes: Lanes, pair: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] = pair(lanes[lane], lanes[lane + half]);
        }
    }
    lanes[0]
}
