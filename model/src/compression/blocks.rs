//! Blocks of whole numbers of one byte, with one power of two for all of a block.
//!
//! A block's scale is the least power of two that 127 times which reaches its largest element, from 2^-110 to 2^121. So what
//! was rounded once is a multiple of any scale that it may get later, and is left as it is by rounding again.

/// Elements of a block; the last one of a vector has what is left.
pub(super) const BLOCK: usize = 256;
/// Bytes of a whole block: the exponent of its scale, and its numbers.
pub(super) const BLOCK_BYTES: usize = 1 + BLOCK;

/// The exponent of a block whose elements are NaN. Others are biased by 127, as in an f32.
const NAN_EXPONENT: u8 = 255;
/// Between these, a scale, and 2^16 divided by it, are normal numbers, and 127 times a scale is finite.
const LEAST_EXPONENT: u32 = 17;
const MOST_EXPONENT: u32 = 248;
/// Fixed point: bits behind it. The random bits that decide are as many.
const FRACTION_BITS: u32 = 16;
/// Infinity's bits: those of any number of larger magnitude are NaN's.
const INFINITY_BITS: u32 = 0x7F80_0000;

/// The biased exponent of the scale that fits a block; [`NAN_EXPONENT`] if an element is not finite.
#[inline(always)]
fn exponent(block: &[f32]) -> u8 {
    // Magnitudes are ordered as their bits are.
    let most = block.iter().fold(0, |most: u32, value| most.max(value.to_bits() & 0x7FFF_FFFF));
    if most >= INFINITY_BITS {
        return NAN_EXPONENT;
    }
    // 127 = 2^6 · (1 + 63/64): one more, where the largest element's fraction is beyond 63/64.
    let above_six = (most + 0x1_FFFF) >> 23;
    above_six.saturating_sub(6).clamp(LEAST_EXPONENT, MOST_EXPONENT) as u8
}

fn power_of_two(biased_exponent: u32) -> f32 {
    f32::from_bits(biased_exponent << 23)
}

/// 2^16 divided by the scale.
#[inline(always)]
fn to_fixed(exponent: u8) -> f32 {
    power_of_two(127 + FRACTION_BITS + 127 - u32::from(exponent))
}

/// Rounds the elements of a block to whole multiples of its scale, each up or down as the 16 bits say that stand for it in
/// `bits`, so that on average over all bits it is what it was, but for less than 2^-16 of the scale. If one is not finite, all
/// become NaN.
#[inline(always)]
pub(super) fn round<const N: usize>(block: &mut [f32], mut bits: impl FnMut() -> [u32; N]) {
    let exponent = exponent(block);
    if exponent == NAN_EXPONENT {
        block.fill(f32::NAN);
        return;
    }
    let (to_fixed, scale) = (to_fixed(exponent), power_of_two(u32::from(exponent)));
    for values in block.chunks_mut(N) {
        for (value, bits) in values.iter_mut().zip(bits()) {
            let fixed = *value * to_fixed;
            let nearest = (fixed + 0.5f32.copysign(fixed)) as i32;
            let whole = (nearest + bits as i32) >> FRACTION_BITS;
            // Beyond it where the largest scale is too small for the largest numbers.
            *value = whole.clamp(-127, 127) as f32 * scale;
        }
    }
}

/// Writes a block that was [rounded](round).
pub(super) fn encode(block: &[f32], bytes: &mut Vec<u8>) {
    let exponent = exponent(block);
    bytes.push(exponent);
    if exponent == NAN_EXPONENT {
        bytes.resize(bytes.len() + block.len(), 0);
        return;
    }
    let to_fixed = to_fixed(exponent);
    bytes.extend(block.iter().map(|value| ((value * to_fixed) as i32 >> FRACTION_BITS) as u8));
}

/// The elements of a block that was [written](encode).
pub(super) fn decode(bytes: &[u8], values: &mut Vec<f32>) {
    let Some((&exponent, numbers)) = bytes.split_first() else { return };
    if exponent == NAN_EXPONENT {
        values.resize(values.len() + numbers.len(), f32::NAN);
        return;
    }
    let scale = power_of_two(u32::from(exponent));
    values.extend(numbers.iter().map(|&number| f32::from(number as i8) * scale));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_is_the_least_that_reaches_the_largest_element() {
        let exponents: [(f32, i32); 9] = [
            (127.0, 0),
            (127.0f32.next_up(), 1),
            (-64.0, 0),
            (63.5, -1),
            (1.0, -6),
            (0.0, -110),
            (f32::from_bits(1), -110),
            (f32::MAX, 121),
            (127.0 * 2f32.powi(-110), -110),
        ];
        for (largest, expected) in exponents {
            assert_eq!(i32::from(exponent(&[0.0, largest, largest / 3.0])) - 127, expected, "{largest:e}");
        }
        for wrong in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(exponent(&[1.0, wrong]), NAN_EXPONENT);
        }
    }

    #[test]
    fn numbers_go_up_where_the_bits_reach_and_down_where_not() {
        let rounded = |bits: u32| {
            // The scale is 1, and 0.25 is 16,384 of 65,536.
            let mut block = [100.0, 0.25, -0.25, 2.0, -0.0];
            round(&mut block, || [bits; 8]);
            block.map(f32::to_bits)
        };
        let bits = |values: [f32; 5]| values.map(f32::to_bits);
        assert_eq!(rounded(0), bits([100.0, 0.0, -1.0, 2.0, 0.0]));
        assert_eq!(rounded(16_383), bits([100.0, 0.0, -1.0, 2.0, 0.0]));
        assert_eq!(rounded(16_384), bits([100.0, 0.0, 0.0, 2.0, 0.0]));
        assert_eq!(rounded(49_151), bits([100.0, 0.0, 0.0, 2.0, 0.0]));
        assert_eq!(rounded(49_152), bits([100.0, 1.0, 0.0, 2.0, 0.0]));
        assert_eq!(rounded(65_535), bits([100.0, 1.0, 0.0, 2.0, 0.0]));
    }

    #[test]
    fn the_largest_numbers_stay_finite() {
        for bits in [0, 65_535] {
            let mut block = [f32::MAX, -f32::MAX, 1.0];
            round(&mut block, || [bits; 8]);
            let scale = power_of_two(MOST_EXPONENT);
            assert_eq!(block[..2], [127.0 * scale, -127.0 * scale]);
        }
    }
}
