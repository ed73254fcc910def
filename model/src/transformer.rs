//! What the shapes of Transformer share: one interface.
//!
//! Shapes beside the tensors, here and in the shapes' own files: B rows, T positions, C width, H heads, D width of a head (C / H),
//! V vocabulary.

use burn::tensor::Tensor;

use crate::dropout::Dropout;
use crate::gpt::Gpt;
use crate::kernels::Positions;
use crate::llama::Llama;

/// A decoder-only Transformer.
#[derive(Clone, Debug)]
pub(crate) enum Transformer {
    Gpt(Box<Gpt>),
    Llama(Box<Llama>),
}

impl Transformer {
    /// The last layer's normalised output, `[B·T, C]`, for `tokens` `[B, T]` that stand at `positions`, which are
    /// [`Self::positions`].
    pub(crate) fn hidden(&self, tokens: &[u32], positions: &Positions, dropout: Dropout) -> Tensor<2> {
        match self {
            Self::Gpt(gpt) => gpt.hidden(tokens, positions, dropout),
            Self::Llama(llama) => llama.hidden(tokens, positions, dropout),
        }
    }

    /// The head, `[V, C]`: a product of the output with each row is a logit; or `[1, C]`: it is a score.
    pub(crate) fn head(&self) -> Tensor<2> {
        match self {
            Self::Gpt(gpt) => gpt.head(),
            Self::Llama(llama) => llama.head(),
        }
    }

    /// Positions as this model needs them.
    pub(crate) fn positions(&self, positions: Positions) -> Positions {
        match self {
            Self::Gpt(_) => positions,
            Self::Llama(llama) => llama.turning(positions),
        }
    }
}
