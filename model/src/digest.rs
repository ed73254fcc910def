//! SHA-256 over vectors, the identity of parameters and gradients in files and wherever a person may want to compare. Between
//! processes it is BLAKE3, of [`pieces`](crate::pieces), which is several times as fast.

use serde::{Deserialize as _, Deserializer, Serializer};
use sha2::{Digest as _, Sha256};

/// Elements converted at a time.
const BLOCK: usize = 4096;

/// SHA-256 of a vector's elements as little-endian f32.
pub fn vector_sha256(vector: &[f32]) -> [u8; 32] {
    vectors_sha256(&[vector])
}

/// SHA-256 of several vectors, one after the other.
pub fn vectors_sha256(vectors: &[&[f32]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    vectors.iter().for_each(|vector| update(&mut hasher, vector));
    hasher.finalize().into()
}

/// SHA-256 of bytes.
pub fn bytes_sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The digest that 64 hexadecimal digits write.
pub fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let byte = |i: usize| u8::from_str_radix(text.get(i * 2..i * 2 + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..32).filter(|_| digits).map(byte).collect();
    bytes?.try_into().ok()
}

/// Writes a digest as text; for `#[serde(with)]`, whose other half is [`deserialize`].
///
/// # Errors
/// The format's own.
pub fn serialize<S: Serializer>(digest: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex(digest))
}

/// Reads what [`serialize`] wrote.
///
/// # Errors
/// If it is no text of 64 hexadecimal digits.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_hex(&text).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no SHA-256 in hexadecimal digits")))
}

/// Shows a vector's little-endian bytes, in one piece or several.
pub(crate) fn with_bytes(vector: &[f32], mut look: impl FnMut(&[u8])) {
    if cfg!(target_endian = "little") {
        return look(bytemuck::cast_slice(vector));
    }
    let mut bytes = [0u8; BLOCK * 4];
    for values in vector.chunks(BLOCK) {
        for (place, value) in bytes.chunks_exact_mut(4).zip(values) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        look(&bytes[..values.len() * 4]);
    }
}

/// Feeds a vector's little-endian bytes to `hasher`.
pub(crate) fn update(hasher: &mut Sha256, vector: &[f32]) {
    with_bytes(vector, |bytes| hasher.update(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vectors_digest_is_that_of_its_bytes() {
        let vector: Vec<f32> = (0..BLOCK * 2 + 5).map(|i| i as f32 * 0.5).collect();
        let bytes: Vec<u8> = vector.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(vector_sha256(&vector), bytes_sha256(&bytes));
        assert_eq!(vectors_sha256(&[&vector[..7], &vector[7..]]), bytes_sha256(&bytes));
    }

    #[test]
    fn hex_of_the_empty_digest() {
        let known = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(hex(&bytes_sha256(b"")), known);
        assert_eq!(parse_hex(known), Some(bytes_sha256(b"")));
        for wrong in ["", "00", &known[1..], &known.replace('e', "+")] {
            assert_eq!(parse_hex(wrong), None);
        }
    }
}
