//! What the shapes of Transformer share: one interface, and how a layer adds to the residual stream.
//!
//! Shapes beside the tensors, here and in the shapes' own files: B rows, T positions, C width, H heads, D width of a head (C / H),
//! V vocabulary.

use burn::tensor::Tensor;

use crate::dropout::{Dropout, Site};
use crate::gpt::Gpt;
use crate::kernels::{self, Positions};
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

/// A layer's last step, `onto + dropout(y W + b)`: of y `[B, T, F]`, W `[F, C]`, b `[C]` and `onto` `[B, T, C]`.
pub(crate) fn project(
    y: Tensor<3>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    onto: Tensor<3>,
    dropout: Dropout,
    site: Site,
) -> Tensor<3> {
    let (weight, bias) = (weight.clone(), bias.cloned());
    if !dropout.is_active() {
        return kernels::linear(y, weight, bias, Some(onto));
    }
    kernels::dropout(kernels::linear(y, weight, bias, None), Some(onto), dropout, site)
}
