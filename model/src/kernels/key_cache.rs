//! Keys and values of tokens that a sequence has read before, on a device.

use burn::tensor::Tensor;

/// Of each layer, `[B, K, T, D]` each. Clones share memory.
#[derive(Clone, Debug, Default)]
pub struct KeyCache {
    length: usize,
    layers: Vec<[Tensor<4>; 2]>,
}

impl KeyCache {
    /// T: how many tokens there are.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Forgets all but the first `length` tokens.
    pub fn truncate(&mut self, length: usize) {
        if length == 0 {
            *self = Self::default();
        } else if length < self.length {
            for part in self.layers.iter_mut().flatten() {
                *part = part.clone().narrow(2, 0, length);
            }
            self.length = length;
        }
    }

    /// Takes keys and values of the next tokens into a layer, the first that lacks them, and returns all of its own.
    pub(super) fn extend(&mut self, layer: usize, keys: Tensor<4>, values: Tensor<4>) -> [Tensor<4>; 2] {
        let new = [keys, values];
        match self.layers.get_mut(layer) {
            Some(parts) => {
                for (part, new) in parts.iter_mut().zip(new) {
                    *part = Tensor::cat(vec![part.clone(), new], 2);
                }
                parts.clone()
            }
            None => {
                self.layers.push(new.clone());
                new
            }
        }
    }

    /// Counts tokens that all layers have taken.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.length += tokens;
    }
}
