//! Operations of a training step that are worth a pass of their own, forward and backward. On the CPU backend they are
//! loops that vectorise, over blocks of fixed size, so that the number of threads does not show in a result; elsewhere,
//! the plain form out of burn's operations, which is their definition, too.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
pub mod plain;
#[cfg(all(test, feature = "cpu"))]
mod tests;

use std::cell::OnceCell;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use crate::config::Gelu;
use crate::dropout::{Dropout, Site};

/// Dropout at `site`, where it is active; by the plain form everywhere, which draws the mask once and holds it.
pub fn dropout<const D: usize>(x: Tensor<D>, dropout: Dropout, site: Site) -> Tensor<D> {
    plain::dropout(x, dropout.factors(site))
}

/// GELU (Hendrycks and Gimpel, arXiv:1606.08415) of each element.
pub fn gelu(x: Tensor<3>, gelu: Gelu) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        return cpu::run(cpu::gelu::Gelu(gelu), [x.into_dispatch()]);
    }
    plain::gelu(x, gelu)
}

/// `x W + b + residual` over the last axis of `x` `[.., in]`, with W `[in, out]`, and b `[out]` and residual `[.., out]` where
/// they are.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    residual: Option<Tensor<D>>,
) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let linear =
            cpu::linear::Linear { transposed: false, has_bias: bias.is_some(), has_residual: residual.is_some() };
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        let (bias, residual) = (bias.map(Tensor::into_dispatch), residual.map(Tensor::into_dispatch));
        return match (bias, residual) {
            (None, None) => cpu::run(linear, [x, weight]),
            (Some(added), None) | (None, Some(added)) => cpu::run(linear, [x, weight, added]),
            (Some(bias), Some(residual)) => cpu::run(linear, [x, weight, bias, residual]),
        };
    }
    plain::linear(x, weight, bias, residual)
}

/// Logits `[rows, V]`: the product of each row of `x` `[rows, C]` with each of `table` `[V, C]`.
pub fn logits(x: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let linear = cpu::linear::Linear { transposed: true, has_bias: false, has_residual: false };
        return cpu::run(linear, [x.into_dispatch(), table.into_dispatch()]);
    }
    plain::logits(x, table)
}

/// Layer normalisation over the last axis (Ba et al., arXiv:1607.06450).
pub fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Option<Tensor<1>>, epsilon: f64) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let norm = cpu::norm::Norm { centred: true, epsilon: epsilon as f32 };
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        return match bias {
            Some(bias) => cpu::run(norm, [x, weight, bias.into_dispatch()]),
            None => cpu::run(norm, [x, weight]),
        };
    }
    plain::layer_norm(x, weight, bias, epsilon)
}

/// Root-mean-square normalisation over the last axis (Zhang and Sennrich, arXiv:1910.07467).
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let norm = cpu::norm::Norm { centred: false, epsilon: epsilon as f32 };
        return cpu::run(norm, [x.into_dispatch(), weight.into_dispatch()]);
    }
    plain::rms_norm(x, weight, epsilon)
}

/// The sum, `[1]`, of weighted cross-entropies of `logits` `[rows, V]`. `targets` are below V, one for each row, and so are
/// `weights`; 1 where there are none.
pub fn cross_entropy(logits: Tensor<2>, targets: &[u32], weights: Option<&[f32]>) -> Tensor<1> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&logits) {
        let operation =
            cpu::cross_entropy::CrossEntropy { targets: targets.to_vec(), weights: weights.map(<[f32]>::to_vec) };
        return cpu::run(operation, [logits.into_dispatch()]);
    }
    plain::cross_entropy(logits, targets, weights)
}

/// The gate of SwiGLU (Shazeer, arXiv:2002.05202): `silu(gate) · up`.
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&gate) {
        return cpu::run(cpu::swiglu::SwiGlu, [gate.into_dispatch(), up.into_dispatch()]);
    }
    plain::swiglu(gate, up)
}

/// What attention and rotation need to know of positions. What only the plain forms need is made when they first ask.
#[derive(Debug)]
pub struct Positions {
    device: Device,
    /// T.
    length: usize,
    mask: OnceCell<Tensor<4>>,
    angles: Option<Angles>,
}

/// Cosines and sines `[T, D/2]` of the angles by which a head's elements are turned.
#[derive(Debug)]
struct Angles {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    tables: OnceCell<[Tensor<4>; 2]>,
}

impl Positions {
    /// Positions 0 to `length - 1`.
    pub fn new(length: usize, device: &Device) -> Self {
        Self { device: device.clone(), length, mask: OnceCell::new(), angles: None }
    }

    /// Positions 0 to `length - 1` that turn element i of a head's first half, and of its second, by `position · theta^(-2i/D)`.
    /// Angles are computed in f64 by `libm`, so that every machine has the same.
    pub fn rotary(length: usize, head_width: usize, theta: f64, device: &Device) -> Self {
        let half = head_width / 2;
        let angle = |i: usize| (i / half) as f64 * libm::pow(theta, -((i % half) as f64) / half as f64);
        let table =
            |function: fn(f64) -> f64| Arc::new((0..length * half).map(|i| function(angle(i)) as f32).collect());
        let angles = Angles { cos: table(libm::cos), sin: table(libm::sin), tables: OnceCell::new() };
        Self { angles: Some(angles), ..Self::new(length, device) }
    }
}

/// Causal attention (Vaswani et al., arXiv:1706.03762) of `heads` heads out of `qkv` `[B, T, 3·C]`, which holds queries,
/// keys and values side by side, to `[B, T, C]`; with `dropout` of layer `layer` on the probabilities.
pub fn packed_attention(
    qkv: Tensor<3>,
    heads: usize,
    positions: &Positions,
    dropout: Dropout,
    layer: usize,
) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&qkv) {
        let dropout = dropout.factors(Site::Attention(layer));
        return cpu::run(cpu::attention::PackedAttention { heads, dropout }, [qkv.into_dispatch()]);
    }
    plain::packed_attention(qkv, heads, positions, dropout, layer)
}

/// Causal grouped-query attention (Ainslie et al., arXiv:2305.13245) of q `[B, H, T, D]` to k and v `[B, K, T, D]`, each of
/// whose heads serves H / K consecutive ones of q, to `[B, T, H·D]`; with `dropout` of layer `layer` on the
/// probabilities.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    positions: &Positions,
    dropout: Dropout,
    layer: usize,
) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&q) {
        let dropout = dropout.factors(Site::Attention(layer));
        let inputs = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
        return cpu::run(cpu::attention::GroupedAttention { dropout }, inputs);
    }
    plain::attention(q, k, v, positions, dropout, layer)
}

/// Rotary positions (Su et al., arXiv:2104.09864): element i of the first half of each head of `x` `[B, H, T, D]` and
/// element i of its second are turned, as a point of the plane. As it is, where positions have no angles.
pub fn rotate(x: Tensor<4>, positions: &Positions) -> Tensor<4> {
    #[cfg(feature = "cpu")]
    if let Some(angles) = &positions.angles
        && cpu::holds(&x)
    {
        let rotate = cpu::rotate::Rotate { cos: angles.cos.clone(), sin: angles.sin.clone() };
        return cpu::run(rotate, [x.into_dispatch()]);
    }
    plain::rotate(x, positions)
}

/// `[B, T, H·D]` as `heads` slices, `[B, H, T, D]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, t, width] = x.dims();
    x.reshape([b, t, heads, width / heads]).swap_dims(1, 2)
}
