//! What the shapes of Transformer share: one interface, and causal attention over heads.
//!
//! Shapes beside the tensors, here and in the shapes' own files: B rows, T positions, C width, H heads, D = C / H,
//! V vocabulary.

use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::dropout::{Dropout, Site};
use crate::gpt::Gpt;
use crate::llama::Llama;

/// Added to the scores of positions that a query must not see. Finite, so that no backend meets an infinity; its
/// exponential is exactly 0.
const MASKED: f32 = -1e30;

/// A decoder-only Transformer.
#[derive(Clone, Debug)]
pub(crate) enum Transformer {
    Gpt(Box<Gpt>),
    Llama(Box<Llama>),
}

impl Transformer {
    /// Logits `[B·T, V]` for `tokens` `[B, T]`.
    pub(crate) fn logits(&self, tokens: Tensor<2, Int>, dropout: Dropout) -> Tensor<2> {
        match self {
            Self::Gpt(gpt) => gpt.logits(tokens, dropout),
            Self::Llama(llama) => llama.logits(tokens, dropout),
        }
    }
}

/// `[B, T, H·D]` as `heads` contiguous slices, `[B, H, T, D]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, t, width] = x.dims();
    x.reshape([b, t, heads, width / heads]).swap_dims(1, 2)
}

/// `[B, H, T, D]` side by side, `[B, T, H·D]`.
pub(crate) fn join_heads(x: Tensor<4>) -> Tensor<3> {
    let [b, heads, t, head_width] = x.dims();
    x.swap_dims(1, 2).reshape([b, t, heads * head_width])
}

/// Scaled dot-product attention (Vaswani et al., arXiv:1706.03762) of layer `layer`: `q`, `k`, `v` and the result are
/// `[B, H, T, D]`, `mask` is [`causal_mask`]'s.
pub(crate) fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    mask: &Tensor<4>,
    dropout: Dropout,
    layer: usize,
) -> Tensor<4> {
    let head_width = q.dims()[3];
    let device = q.device();
    let scores = q.matmul(k.transpose()) * (1.0 / (head_width as f64).sqrt()); // [B, H, T, T]
    let probabilities = softmax(scores + mask.clone(), 3);
    dropout.apply(probabilities, Site::Attention(layer), &device).matmul(v)
}

/// `[1, 1, T, T]`: 0 where the query in the row may see the key in the column, [`MASKED`] where the key comes later.
pub(crate) fn causal_mask(t: usize, device: &Device) -> Tensor<4> {
    let values = (0..t * t).map(|i| if i % t > i / t { MASKED } else { 0.0 }).collect::<Vec<f32>>();
    Tensor::from_data(TensorData::new(values, [1, 1, t, t]), device)
}
