//! A decoder-only Transformer of Llama shape (Touvron et al., arXiv:2302.13971), from tokens to what its head makes logits
//! of: root-mean-square norms, rotary positions, grouped-query attention, gated feed-forward layers, no biases.
//!
//! Shapes as in [`transformer`](crate::transformer); besides: K heads of keys and values, F feed-forward width.

use burn::tensor::Tensor;

use crate::config::LlamaConfig;
use crate::dropout::{Dropout, Site};
use crate::kernels::{self, Positions, split_heads};
use crate::leaves::Leaves;
use crate::projection::Projection;

/// The parameters of one model, as tensors on a device.
#[derive(Clone, Debug)]
pub(crate) struct Llama {
    config: LlamaConfig,
    embed_tokens: Tensor<2>, // [V, C]
    blocks: Vec<Block>,
    norm: Tensor<1>, // [C]
    head: Tensor<2>, // [V, C]; of a score [1, C]
}

#[derive(Clone, Debug)]
struct Block {
    input_norm: Tensor<1>,                    // [C]
    q_proj: Projection,                       // [C, H·D]
    k_proj: Projection,                       // [C, K·D]
    v_proj: Projection,                       // [C, K·D]
    qk_norms: Option<(Tensor<1>, Tensor<1>)>, // [D] each
    o_proj: Projection,                       // [H·D, C]
    post_attention_norm: Tensor<1>,           // [C]
    gate_proj: Projection,                    // [C, F]
    up_proj: Projection,                      // [C, F]
    down_proj: Projection,                    // [F, C]
}

impl Llama {
    /// Takes the tensors from `leaves` in layout order.
    pub(crate) fn assemble(config: &LlamaConfig, leaves: &mut Leaves<'_>) -> Self {
        let embed_tokens = leaves.matrix();
        let blocks = (0..config.layers).map(|_| Block {
            input_norm: leaves.vector(),
            q_proj: leaves.projection(),
            k_proj: leaves.projection(),
            v_proj: leaves.projection(),
            qk_norms: config.qk_norm.then(|| (leaves.vector(), leaves.vector())),
            o_proj: leaves.projection(),
            post_attention_norm: leaves.vector(),
            gate_proj: leaves.projection(),
            up_proj: leaves.projection(),
            down_proj: leaves.projection(),
        });
        let blocks = blocks.collect();
        let norm = leaves.vector();
        let head = if config.tied_head && !config.score_head { embed_tokens.clone() } else { leaves.matrix() };
        Self { config: config.clone(), embed_tokens, blocks, norm, head }
    }

    /// The last layer's normalised output, `[B·T, C]`, for `tokens` `[B, T]`.
    pub(crate) fn hidden(&self, tokens: &[u32], positions: &Positions, dropout: Dropout) -> Tensor<2> {
        let mut x = kernels::embed(tokens, self.embed_tokens.clone(), None, positions); // [B, T, C]
        x = kernels::dropout(x, None, dropout, Site::Embedding);
        for (layer, block) in self.blocks.iter().enumerate() {
            let attended = self.attention(block, layer, self.norm(x.clone(), &block.input_norm), positions, dropout);
            x = block.o_proj.project(attended, None, x, dropout, Site::AttentionOutput(layer));
            let hidden = gated(block, self.norm(x.clone(), &block.post_attention_norm));
            x = block.down_proj.project(hidden, None, x, dropout, Site::FeedForwardOutput(layer));
        }
        self.norm(x, &self.norm).reshape([tokens.len(), self.config.width])
    }

    /// What makes logits of it, `[V, C]`, or a score, `[1, C]`.
    pub(crate) fn head(&self) -> Tensor<2> {
        self.head.clone()
    }

    /// These positions, so that they turn this model's heads.
    pub(crate) fn turning(&self, positions: Positions) -> Positions {
        let LlamaConfig { rope_theta, rope_scaling, .. } = self.config;
        positions.rotary(self.config.head_width(), rope_theta, rope_scaling)
    }

    /// Causal grouped-query attention (Ainslie et al., arXiv:2305.13245): `[B, T, C]` to `[B, T, H·D]`.
    fn attention(
        &self,
        block: &Block,
        layer: usize,
        x: Tensor<3>,
        positions: &Positions,
        dropout: Dropout,
    ) -> Tensor<3> {
        let LlamaConfig { heads, kv_heads, .. } = self.config;
        let mut q = split_heads(linear(&x, &block.q_proj), heads); // [B, H, T, D]
        let mut k = split_heads(linear(&x, &block.k_proj), kv_heads); // [B, K, T, D]
        let v = split_heads(linear(&x, &block.v_proj), kv_heads); // [B, K, T, D]
        if let Some((q_norm, k_norm)) = &block.qk_norms {
            (q, k) = (self.norm(q, q_norm), self.norm(k, k_norm));
        }
        let (q, k) = (kernels::rotate(q, positions), kernels::rotate(k, positions));
        kernels::attention(q, k, v, positions, dropout, layer)
    }

    /// The root-mean-square norm over the last axis.
    fn norm<const N: usize>(&self, x: Tensor<N>, weight: &Tensor<1>) -> Tensor<N> {
        kernels::rms_norm(x, weight.clone(), self.config.norm_epsilon)
    }
}

/// A linear layer gated by another (SwiGLU: Shazeer, arXiv:2002.05202): `[B, T, C]` to `[B, T, F]`.
fn gated(block: &Block, x: Tensor<3>) -> Tensor<3> {
    kernels::swiglu(linear(&x, &block.gate_proj), linear(&x, &block.up_proj))
}

/// `x W` over the last axis.
fn linear(x: &Tensor<3>, weight: &Projection) -> Tensor<3> {
    weight.forward(x.clone(), None, None)
}
