//! SHA-256 over vectors, the identity of parameters and gradients.

use sha2::{Digest as _, Sha256};

/// Elements converted at a time.
const BLOCK: usize = 4096;

/// SHA-256 of a vector's elements as little-endian f32.
pub fn vector_sha256(vector: &[f32]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    update(&mut hasher, vector);
    hasher.finalize().into()
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

/// Feeds a vector's little-endian bytes to `hasher`.
pub(crate) fn update(hasher: &mut Sha256, vector: &[f32]) {
    let mut bytes = [0u8; BLOCK * 4];
    for values in vector.chunks(BLOCK) {
        for (place, value) in bytes.chunks_exact_mut(4).zip(values) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        hasher.update(&bytes[..values.len() * 4]);
    }
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
    }
}
