//! What the shapes of Transformer share: one interface.
//!
//! Shapes beside the tensors, here and in the shapes' own files: B rows, T positions, C width, H heads, D = C / H,
//! V vocabulary.

use burn::tensor::{Int, Tensor};

use crate::dropout::Dropout;
use crate::gpt::Gpt;
use crate::llama::Llama;

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
