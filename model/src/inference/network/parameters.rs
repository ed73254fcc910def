//! Parameters back out of the form in which a network computes with them.

use super::{Layer, Network, Sizes};
use crate::compute::ComputeError;
use crate::inference::matrix::Matrix;
use crate::inference::rows::{Activation, Norm};

impl Network {
    /// All parameters as they are now, flat in layout order.
    ///
    /// # Errors
    /// If a tied head, of which there are two copies, is no longer the embedding.
    pub(in crate::inference) fn parameters(&self) -> Result<Vec<f32>, ComputeError> {
        let mut flat = self.embedding.clone();
        flat.extend(self.places.iter().flatten());
        self.layers.iter().for_each(|layer| layer.extend(&mut flat, self.sizes));
        self.norm.extend(&mut flat);
        let head = self.head.transposed_tensor();
        if !self.tied_head {
            flat.extend(head);
        } else if !head.eq(self.embedding.iter().copied()) {
            return Err(ComputeError::Device(
                "the head in memory is no longer the embedding that it was copied from".into(),
            ));
        }
        Ok(flat)
    }
}

impl Layer {
    fn extend(&self, flat: &mut Vec<f32>, sizes: Sizes) {
        let Sizes { heads, kv_heads, head_width, .. } = sizes;
        self.attention_norm.extend(flat);
        match self.activation {
            Activation::Gelu(_) => self.qkv.extend(flat, &[self.qkv.columns()]),
            Activation::SwiGlu => self.qkv.extend(flat, &[heads, kv_heads, kv_heads].map(|heads| heads * head_width)),
        }
        self.qk_norms.iter().flatten().for_each(|norm| norm.extend(flat));
        self.attention_output.extend(flat, &[self.attention_output.columns()]);
        self.feed_forward_norm.extend(flat);
        match self.activation {
            Activation::Gelu(_) => self.hidden.extend(flat, &[self.hidden.columns()]),
            Activation::SwiGlu => self.hidden.extend(flat, &[self.hidden.columns() / 2; 2]),
        }
        self.output.extend(flat, &[self.output.columns()]);
    }
}

impl Norm {
    fn extend(&self, flat: &mut Vec<f32>) {
        flat.extend(&self.weight);
        flat.extend(self.bias.iter().flatten());
    }
}

impl Matrix {
    /// Appends the tensors `[in, columns]` that stand side by side in it, and its bias.
    fn extend(&self, flat: &mut Vec<f32>, columns: &[usize]) {
        let mut first = 0;
        for &columns in columns {
            let row = |row| (first..first + columns).map(move |column| self.at(row, column));
            flat.extend((0..self.depth).flat_map(row));
            first += columns;
        }
        flat.extend(self.bias.iter().flatten());
    }

    /// It as a tensor `[out, in]`.
    fn transposed_tensor(&self) -> impl Iterator<Item = f32> {
        (0..self.columns).flat_map(move |column| (0..self.depth).map(move |row| self.at(row, column)))
    }
}
