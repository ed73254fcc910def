//! What the shapes of Transformer share: one interface, and how a layer adds to the residual stream.
//!
//! Shapes beside the tensors, here and in the shapes' own files: B rows, T positions, C width, H heads, D = C / H,
//! V vocabulary.

use burn::tensor::{Int, Tensor};

use crate::dropout::{Dropout, Site};
use crate::gpt::Gpt;
use crate::kernels;
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
    onto + kernels::dropout(kernels::linear(y, weight, bias, None), dropout, site)
}
