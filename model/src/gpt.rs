//! A decoder-only Transformer of GPT-2 shape (Radford et al. 2019), from tokens to what its head makes logits of.
//!
//! Shapes as in [`transformer`](crate::transformer).

use burn::tensor::Tensor;

use crate::config::GptConfig;
use crate::dropout::{Dropout, Site};
use crate::kernels::{self, Positions};
use crate::leaves::Leaves;
use crate::projection::Projection;

/// The parameters of one model, as tensors on a device.
#[derive(Clone, Debug)]
pub(crate) struct Gpt {
    config: GptConfig,
    wte: Tensor<2>, // [V, C]
    wpe: Tensor<2>, // [T, C]
    blocks: Vec<Block>,
    ln_f: Norm,
    head: Tensor<2>, // [V, C]; of a score [1, C]
}

#[derive(Clone, Debug)]
struct Block {
    ln_1: Norm,
    c_attn: Affine,    // [C, 3C]
    attn_proj: Affine, // [C, C]
    ln_2: Norm,
    c_fc: Affine,     // [C, 4C]
    mlp_proj: Affine, // [4C, C]
}

#[derive(Clone, Debug)]
struct Affine {
    weight: Projection, // [in, out]
    bias: Option<Tensor<1>>,
}

#[derive(Clone, Debug)]
struct Norm {
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
}

impl Gpt {
    /// Takes the tensors from `leaves` in layout order.
    pub(crate) fn assemble(config: &GptConfig, leaves: &mut Leaves<'_>) -> Self {
        let bias = config.bias;
        let wte = leaves.matrix();
        let wpe = leaves.matrix();
        let blocks = (0..config.layers).map(|_| Block {
            ln_1: Norm::assemble(leaves, bias),
            c_attn: Affine::assemble(leaves, bias),
            attn_proj: Affine::assemble(leaves, bias),
            ln_2: Norm::assemble(leaves, bias),
            c_fc: Affine::assemble(leaves, bias),
            mlp_proj: Affine::assemble(leaves, bias),
        });
        let blocks = blocks.collect();
        let ln_f = Norm::assemble(leaves, bias);
        let head = if config.tied_head && !config.score_head { wte.clone() } else { leaves.matrix() };
        Self { config: config.clone(), wte, wpe, blocks, ln_f, head }
    }

    /// The last layer's normalised output, `[B·T, C]`, for `tokens` `[B, T]`.
    pub(crate) fn hidden(&self, tokens: &[u32], positions: &Positions, dropout: Dropout) -> Tensor<2> {
        let mut x = kernels::embed(tokens, self.wte.clone(), Some(self.wpe.clone()), positions); // [B, T, C]
        x = kernels::dropout(x, None, dropout, Site::Embedding);
        for (layer, block) in self.blocks.iter().enumerate() {
            let qkv = block.c_attn.forward(block.ln_1.forward(x.clone(), &self.config)); // [B, T, 3C]
            let attended = kernels::packed_attention(qkv, self.config.heads, positions, dropout, layer); // [B, T, C]
            x = block.attn_proj.project(attended, x, dropout, Site::AttentionOutput(layer));
            let hidden = block.c_fc.forward(block.ln_2.forward(x.clone(), &self.config)); // [B, T, 4C]
            x = block.mlp_proj.project(
                kernels::gelu(hidden, self.config.gelu),
                x,
                dropout,
                Site::FeedForwardOutput(layer),
            );
        }
        self.ln_f.forward(x, &self.config).reshape([tokens.len(), self.config.width])
    }

    /// What makes logits of it, `[V, C]`, or a score, `[1, C]`.
    pub(crate) fn head(&self) -> Tensor<2> {
        self.head.clone()
    }
}

impl Affine {
    fn assemble(leaves: &mut Leaves<'_>, bias: bool) -> Self {
        Self { weight: leaves.projection(), bias: bias.then(|| leaves.vector()) }
    }

    /// `x W + b` over the last axis.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.weight.forward(x, self.bias.as_ref(), None)
    }

    /// `onto + dropout(y W + b)`.
    fn project(&self, y: Tensor<3>, onto: Tensor<3>, dropout: Dropout, site: Site) -> Tensor<3> {
        self.weight.project(y, self.bias.as_ref(), onto, dropout, site)
    }
}

impl Norm {
    fn assemble(leaves: &mut Leaves<'_>, bias: bool) -> Self {
        Self { weight: leaves.vector(), bias: bias.then(|| leaves.vector()) }
    }

    /// Layer normalisation over the last axis (Ba et al., arXiv:1607.06450).
    fn forward(&self, x: Tensor<3>, config: &GptConfig) -> Tensor<3> {
        kernels::layer_norm(x, self.weight.clone(), self.bias.clone(), config.norm_epsilon)
    }
}
