//! Operations of a training step that are worth a pass of their own, forward and backward. On the CPU backend they are
//! loops that vectorise, over blocks of fixed size, so that the number of threads does not show in a result; elsewhere,
//! the plain form out of burn's operations, which is their definition, too.

#[cfg(feature = "cpu")]
mod attention;
#[cfg(feature = "cpu")]
mod cpu;
#[cfg(feature = "cpu")]
mod cross_entropy;
#[cfg(feature = "cpu")]
mod elementary;
#[cfg(feature = "cpu")]
mod gelu;
#[cfg(feature = "cpu")]
mod lanes;
#[cfg(feature = "cpu")]
mod norm;
mod plain;
#[cfg(feature = "cpu")]
mod rotate;
#[cfg(feature = "cpu")]
mod swiglu;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::dropout::Dropout;

/// Exact GELU (Hendrycks and Gimpel, arXiv:1606.08415) of each element.
pub(crate) fn gelu(x: Tensor<3>) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        return cpu::run(gelu::Gelu, [x.into_dispatch()]);
    }
    plain::gelu(x)
}

/// Layer normalisation over the last axis (Ba et al., arXiv:1607.06450).
pub(crate) fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Option<Tensor<1>>, epsilon: f64) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let norm = norm::Norm { centred: true, epsilon: epsilon as f32 };
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        return match bias {
            Some(bias) => cpu::run(norm, [x, weight, bias.into_dispatch()]),
            None => cpu::run(norm, [x, weight]),
        };
    }
    plain::layer_norm(x, weight, bias, epsilon)
}

/// Root-mean-square normalisation over the last axis (Zhang and Sennrich, arXiv:1910.07467).
pub(crate) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let norm = norm::Norm { centred: false, epsilon: epsilon as f32 };
        return cpu::run(norm, [x.into_dispatch(), weight.into_dispatch()]);
    }
    plain::rms_norm(x, weight, epsilon)
}

/// The sum, `[1]`, of weighted cross-entropies of `logits` `[rows, V]`. `targets` are below V, one for each row, and so are
/// `weights`; 1 where there are none.
pub(crate) fn cross_entropy(logits: Tensor<2>, targets: &[u32], weights: Option<&[f32]>) -> Tensor<1> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&logits) {
        let operation =
            cross_entropy::CrossEntropy { targets: targets.to_vec(), weights: weights.map(<[f32]>::to_vec) };
        return cpu::run(operation, [logits.into_dispatch()]);
    }
    plain::cross_entropy(logits, targets, weights)
}

/// Causal attention (Vaswani et al., arXiv:1706.03762) of `heads` heads out of `qkv` `[B, T, 3·C]`, which holds queries,
/// keys and values side by side, to `[B, T, C]`; with `dropout` of layer `layer` on the probabilities.
pub(crate) fn packed_attention(qkv: Tensor<3>, heads: usize, dropout: Dropout, layer: usize) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if !dropout.is_active() && cpu::holds(&qkv) {
        return cpu::run(attention::PackedAttention { heads }, [qkv.into_dispatch()]);
    }
    let width = qkv.dims()[2] / 3;
    let part = |index: usize| split_heads(qkv.clone().narrow(2, index * width, width), heads);
    plain::attention(part(0), part(1), part(2), dropout, layer)
}

/// Causal grouped-query attention (Ainslie et al., arXiv:2305.13245) of q `[B, H, T, D]` to k and v `[B, K, T, D]`, each of
/// whose heads serves H / K consecutive ones of q, to `[B, T, H·D]`; with `dropout` of layer `layer` on the
/// probabilities.
pub(crate) fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, dropout: Dropout, layer: usize) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if !dropout.is_active() && cpu::holds(&q) {
        let inputs = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
        return cpu::run(attention::GroupedAttention, inputs);
    }
    plain::attention(q, k, v, dropout, layer)
}

/// The gate of SwiGLU (Shazeer, arXiv:2002.05202): `silu(gate) · up`.
pub(crate) fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&gate) {
        return cpu::run(swiglu::SwiGlu, [gate.into_dispatch(), up.into_dispatch()]);
    }
    plain::swiglu(gate, up)
}

/// Cosines and sines `[T, D/2]` of the angles by which a head's elements are turned.
#[derive(Clone, Debug)]
pub(crate) struct Angles {
    pub(crate) cos: Arc<Vec<f32>>,
    pub(crate) sin: Arc<Vec<f32>>,
}

/// Rotary positions (Su et al., arXiv:2104.09864): element i of the first half of each head of `x` `[B, H, T, D]` and
/// element i of its second are turned, as a point of the plane, by angle `[t, i]`.
pub(crate) fn rotate(x: Tensor<4>, angles: &Angles) -> Tensor<4> {
    let Angles { cos, sin } = angles.clone();
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        return cpu::run(rotate::Rotate { cos, sin }, [x.into_dispatch()]);
    }
    plain::rotate(x, &cos, &sin)
}

/// `[B, T, H·D]` as `heads` slices, `[B, H, T, D]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, t, width] = x.dims();
    x.reshape([b, t, heads, width / heads]).swap_dims(1, 2)
}
