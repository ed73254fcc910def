//! What replicas remember from round to round, for whoever computes them next.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use lockstep_model::pieces::vector_blake3;
use lockstep_proto::chunk;

/// The moments of all replicas, as of the version that is published. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replicas(Arc<RwLock<Vec<Moments>>>);

/// Those of one.
#[derive(Clone, Debug)]
struct Moments {
    blake3: [u8; 32],
    /// Little-endian f32.
    bytes: Bytes,
}

impl Replicas {
    /// Publishes the moments of each replica, in order, instead of those before; none: they are 0.
    pub(crate) fn set(&self, moments: &[Vec<f32>]) {
        let of_replica =
            |moments: &Vec<f32>| Moments { blake3: vector_blake3(moments), bytes: chunk::to_bytes(moments) };
        let published = moments.iter().map(of_replica).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = published;
    }

    /// Publishes moments of one replica besides, until they are [forgotten](Self::forget).
    pub(crate) fn keep(&self, moments: &[f32]) -> [u8; 32] {
        let blake3 = vector_blake3(moments);
        let moments = Moments { blake3, bytes: chunk::to_bytes(moments) };
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(moments);
        blake3
    }

    /// Takes back what was [kept](Self::keep), once.
    pub(crate) fn forget(&self, blake3: [u8; 32]) {
        let mut published = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = published.iter().position(|moments| moments.blake3 == blake3) {
            published.remove(place);
        }
    }

    /// The digest of a replica's moments, if they are not 0.
    pub(crate) fn blake3(&self, replica: u32) -> Option<[u8; 32]> {
        let published = self.0.read().unwrap_or_else(PoisonError::into_inner);
        published.get(replica as usize).map(|moments| moments.blake3)
    }

    /// The moments of this digest; `None` if they are not published any more.
    pub(crate) fn bytes(&self, blake3: [u8; 32]) -> Option<Bytes> {
        let published = self.0.read().unwrap_or_else(PoisonError::into_inner);
        published.iter().find(|moments| moments.blake3 == blake3).map(|moments| moments.bytes.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_found_by_their_digest_until_others_take_their_place() {
        let replicas = Replicas::default();
        assert_eq!(replicas.blake3(0), None);
        replicas.set(&[vec![1.0, 2.0], vec![3.0, 4.0]]);
        let second = replicas.blake3(1).unwrap();
        assert_eq!((second, replicas.blake3(2)), (vector_blake3(&[3.0, 4.0]), None));
        assert_eq!(replicas.clone().bytes(second), Some(chunk::to_bytes(&[3.0, 4.0])));
        let kept = [replicas.keep(&[7.0, 8.0]), replicas.keep(&[7.0, 8.0])];
        assert_eq!(kept, [vector_blake3(&[7.0, 8.0]); 2]);
        replicas.forget(kept[0]);
        assert_eq!(replicas.bytes(kept[1]), Some(chunk::to_bytes(&[7.0, 8.0])));
        replicas.forget(kept[1]);
        assert_eq!(replicas.bytes(kept[1]), None);
        replicas.set(&[vec![5.0, 6.0]]);
        assert_eq!((replicas.bytes(second), replicas.blake3(1)), (None, None));
    }
}
