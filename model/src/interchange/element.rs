//! Numbers as files of models hold them.

use half::{bf16, f16};
use safetensors::Dtype;

/// The form of a tensor's elements, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// Single precision.
    F32,
    /// The upper half of single precision.
    Bf16,
    /// Half precision.
    F16,
}

impl ElementType {
    /// The form of a safetensors file; `None` of one that is not read.
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Its name in a safetensors file.
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// Its name in PyTorch.
    pub(super) fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Bytes of an element.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Element `index` of `bytes`.
    pub(super) fn read(self, bytes: &[u8], index: usize) -> f32 {
        let at = index * self.bytes();
        match self {
            Self::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
            Self::Bf16 => bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
            Self::F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        }
    }

    /// Appends `value`, rounded to the nearest, of two equally near ones the even.
    pub(super) fn write(self, value: f32, bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => bytes.extend(value.to_le_bytes()),
            Self::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Self::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
        }
    }

    /// Whether a finite value stays finite.
    pub(super) fn holds(self, value: f32) -> bool {
        !value.is_finite()
            || match self {
                Self::F32 => true,
                Self::Bf16 => bf16::from_f32(value).is_finite(),
                Self::F16 => f16::from_f32(value).is_finite(),
            }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn through(element: ElementType, value: f32) -> f32 {
        let mut bytes = Vec::new();
        element.write(value, &mut bytes);
        assert_eq!(bytes.len(), element.bytes());
        element.read(&bytes, 0)
    }

    proptest! {
        #[test]
        fn single_precision_keeps_its_bits(bits: u32) {
            let value = f32::from_bits(bits);
            let mut bytes = Vec::new();
            ElementType::F32.write(value, &mut bytes);
            prop_assert_eq!(bytes, bits.to_le_bytes());
        }

        #[test]
        fn what_a_short_form_holds_it_keeps(bits: u16) {
            for (element, value) in [
                (ElementType::Bf16, bf16::from_bits(bits).to_f32()),
                (ElementType::F16, f16::from_bits(bits).to_f32()),
            ] {
                prop_assume!(!value.is_nan());
                prop_assert_eq!(through(element, value).to_bits(), value.to_bits());
            }
        }

        #[test]
        fn bf16_is_the_nearest_and_of_two_the_even(value in -1e30f32..1e30) {
            let rounded = through(ElementType::Bf16, value);
            // Neighbours of the value among what bf16 holds: its upper half, and that plus one.
            let below = f32::from_bits(value.to_bits() & 0xFFFF_0000);
            let above = f32::from_bits((value.to_bits() & 0xFFFF_0000).wrapping_add(0x1_0000));
            let distance = |other: f32| (f64::from(other) - f64::from(value)).abs();
            let expected = match distance(below).total_cmp(&distance(above)) {
                std::cmp::Ordering::Less => below,
                std::cmp::Ordering::Greater => above,
                std::cmp::Ordering::Equal if (below.to_bits() >> 16).is_multiple_of(2) => below,
                std::cmp::Ordering::Equal => above,
            };
            prop_assert_eq!(rounded.to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn what_is_too_large_is_known() {
        assert!(!ElementType::F16.holds(70_000.0) && !ElementType::Bf16.holds(f32::MAX));
        assert!(
            ElementType::F16.holds(65_504.0)
                && ElementType::F16.holds(f32::INFINITY)
                && ElementType::F32.holds(f32::MAX)
        );
    }
}
