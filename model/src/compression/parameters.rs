//! Parameters published as rounded differences.
//!
//! The optimizer goes on from master parameters M, in f32; everybody else knows the published ones, P. They begin as M is. A
//! step makes of them P + bf16(M − P), with the M that it made: since the difference is taken from what is published, what
//! one rounding left over is in the next difference (error feedback: Seide et al., "1-bit stochastic gradient descent",
//! Interspeech 2014). Who holds P gets there by the difference alone, and by the same sum.

use half::bf16;
use rayon::prelude::*;

use crate::pieces::PIECE_ELEMENTS;

/// Bytes of an element's difference.
pub const DIFFERENCE_BYTES: usize = 2;

/// Takes the `published` parameters towards the `master` ones, and gives the differences, as bytes for [`add_difference`].
/// Each piece of what is published is shown to `finished` with its place once it is as it will be, and what that gives comes
/// back in order.
pub fn advance<T: Send>(
    published: &mut [f32],
    master: &[f32],
    finished: impl Fn(usize, &[f32]) -> T + Sync,
) -> (Vec<T>, Vec<u8>) {
    let mut differences = vec![0; DIFFERENCE_BYTES * published.len()];
    let pieces = published.par_chunks_mut(PIECE_ELEMENTS).zip(master.par_chunks(PIECE_ELEMENTS));
    let pieces = pieces.zip(differences.par_chunks_mut(DIFFERENCE_BYTES * PIECE_ELEMENTS)).enumerate();
    let shown = pieces.map(|(index, ((published, master), differences))| {
        for ((value, master), bytes) in published.iter().zip(master).zip(differences.as_chunks_mut().0) {
            *bytes = nearest_bf16(master - value).to_le_bytes();
        }
        add_difference(differences, published);
        finished(index * PIECE_ELEMENTS, published)
    });
    (shown.collect(), differences)
}

/// Adds differences to what is held of the elements that they are of: bf16, little-endian.
pub fn add_difference(differences: &[u8], held: &mut [f32]) {
    for (value, bytes) in held.iter_mut().zip(differences.as_chunks().0) {
        *value += bf16::from_le_bytes(*bytes).to_f32();
    }
}

/// What is nearest to `value`, of two as near the even one; of all that are no numbers the same.
#[inline(always)]
fn nearest_bf16(value: f32) -> bf16 {
    if value.is_nan() { bf16::NAN } else { bf16::from_f32(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_the_nearest_bf16_and_all_nans_are_one() {
        let bits = [0x3F80_8000, 0x3F81_8000, 0x7F7F_FFFF, 0xFF80_0000, 0x7F80_0001, 0xFFFF_FFFF];
        let nearest = bits.map(|bits| nearest_bf16(f32::from_bits(bits)).to_bits());
        assert_eq!(nearest, [0x3F80, 0x3F82, 0x7F80, 0xFF80, 0x7FC0, 0x7FC0]);
    }

    /// A random walk of master parameters, with steps much smaller than a bf16 of the parameters could hold.
    #[test]
    fn whoever_adds_the_differences_holds_what_is_published_close_to_the_master() {
        let elements = PIECE_ELEMENTS + 77;
        let mut master = crate::probe::parameters(elements);
        let mut published = master.clone();
        let mut held = master.clone();
        let (mut without_feedback, mut worst, mut worst_without) = (master.clone(), 0f32, 0f32);
        for step in 1..=40u32 {
            for (i, value) in (0u32..).zip(&mut master) {
                *value += 1e-5 * ((i.wrapping_mul(2_654_435_761).wrapping_add(step * 97) % 1000) as f32 / 500.0 - 0.9);
            }
            let before = published.clone();
            let (seen, differences) = advance(&mut published, &master, |start, piece| (start, piece.to_vec()));
            assert_eq!(seen.iter().map(|(start, _)| *start).collect::<Vec<_>>(), [0, PIECE_ELEMENTS]);
            assert_eq!(seen.into_iter().flat_map(|(_, piece)| piece).collect::<Vec<_>>(), published);
            // In parts, as they arrive.
            for (differences, held) in differences.chunks(2 * 1000).zip(held.chunks_mut(1000)) {
                add_difference(differences, held);
            }
            assert_eq!(held, published, "step {step}");
            for ((value, without), (master, before)) in
                published.iter().zip(&mut without_feedback).zip(master.iter().zip(&before))
            {
                // Half a unit in the last place of the difference, and as much of the sum.
                let bound = (master - before).abs() * 2f32.powi(-8) + value.abs() * f32::EPSILON;
                assert!((master - value).abs() <= bound, "{master} is published as {value}");
                worst = worst.max((master - value).abs());
                *without = bf16::from_f32(*master).to_f32();
                worst_without = worst_without.max((master - *without).abs());
            }
        }
        assert!(worst * 100.0 < worst_without, "{worst:e}, and {worst_without:e} as bf16 without differences");
    }

    #[test]
    fn what_rounding_left_over_is_in_the_next_difference() {
        let (mut published, master) = (vec![0.0], [1.0 + 2f32.powi(-9)]);
        advance(&mut published, &master, |_, _| ());
        assert_eq!(published, [1.0]);
        advance(&mut published, &master, |_, _| ());
        assert_eq!(published, master, "the master stood still, and the rest was published");
    }
}
