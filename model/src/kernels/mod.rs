//! Operations of a training step that are worth a pass of their own, forward and backward. On the CPU backend they are
//! loops that vectorise, over blocks of fixed size, so that the number of threads does not show in a result; elsewhere,
//! the plain form out of burn's operations, which is their definition, too.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
pub(crate) mod elementary;
mod key_cache;
pub(crate) mod lanes;
pub mod plain;
mod positions;
pub(crate) mod rows;
#[cfg(all(test, feature = "cpu"))]
mod tests;

use burn::tensor::{Tensor, TensorData};

pub use self::key_cache::KeyCache;
pub use self::positions::Positions;
pub(crate) use self::positions::{rotary_frequency, rotary_tables};
use crate::config::{Gelu, Precision};
use crate::dropout::{Dropout, Site};

/// Elements of a tensor, which `fill` writes, in memory that is used again where there is such.
///
/// # Errors
/// Those of `fill`.
pub(crate) fn filled<E>(shape: &[usize], fill: impl FnOnce(&mut [f32]) -> Result<(), E>) -> Result<TensorData, E> {
    #[cfg(feature = "cpu")]
    return cpu::filled(shape, fill);
    #[cfg(not(feature = "cpu"))]
    {
        let mut values = vec![0f32; shape.iter().product()];
        fill(&mut values)?;
        Ok(TensorData::new(values, shape.to_vec()))
    }
}

/// `x`, multiplied by the factors of `dropout` at `site` where it is active, plus `onto` where there is one.
pub fn dropout<const D: usize>(x: Tensor<D>, onto: Option<Tensor<D>>, dropout: Dropout, site: Site) -> Tensor<D> {
    let factors = dropout.factors(site);
    #[cfg(feature = "cpu")]
    if let Some(factors) = factors
        && cpu::holds(&x)
    {
        let operation = cpu::dropout::ApplyDropout { factors };
        return match onto {
            None => cpu::run(operation, [x.into_dispatch()]),
            Some(onto) => cpu::run(operation, [x.into_dispatch(), onto.into_dispatch()]),
        };
    }
    let x = plain::dropout(x, factors);
    match onto {
        None => x,
        Some(onto) => onto + x,
    }
}

/// Rows of `table` `[V, C]` for `tokens` `[B, T]`, each below V, and where there are `places` `[T or more, C]`, plus their row
/// for its position: `[B, T, C]`.
pub fn embed(tokens: &[u32], table: Tensor<2>, places: Option<Tensor<2>>, positions: &Positions) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&table) && !positions.continues() {
        let embed = cpu::embed::Embed::new(tokens, positions);
        return match places {
            None => cpu::run(embed, [table.into_dispatch()]),
            Some(places) => cpu::run(embed, [table.into_dispatch(), places.into_dispatch()]),
        };
    }
    plain::embed(tokens, table, places, positions)
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
/// they are. The product is computed in `precision`, and so are those of its gradients.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    residual: Option<Tensor<D>>,
    precision: Precision,
) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let (has_bias, has_residual) = (bias.is_some(), residual.is_some());
        let linear = cpu::linear::Linear { transposed: false, has_bias, has_residual, precision };
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        let (bias, residual) = (bias.map(Tensor::into_dispatch), residual.map(Tensor::into_dispatch));
        return match (bias, residual) {
            (None, None) => cpu::run(linear, [x, weight]),
            (Some(added), None) | (None, Some(added)) => cpu::run(linear, [x, weight, added]),
            (Some(bias), Some(residual)) => cpu::run(linear, [x, weight, bias, residual]),
        };
    }
    plain::linear(x, weight, bias, residual, precision)
}

/// Logits `[rows, V]`: the product of each row of `x` `[rows, C]` with each of `table` `[V, C]`.
pub fn logits(x: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let precision = Precision::F32;
        let linear = cpu::linear::Linear { transposed: true, has_bias: false, has_residual: false, precision };
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

/// The sum, `[1]`, of weighted cross-entropies of the [`logits`] of `x` `[rows, C]` and `table` `[V, C]`. `targets` are below
/// V, one for each row, and so are `weights`; 1 where there are none. Products with the table are computed in `precision`.
pub fn cross_entropy(
    x: Tensor<2>,
    table: Tensor<2>,
    targets: &[u32],
    weights: Option<&[f32]>,
    precision: Precision,
) -> Tensor<1> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&x) {
        let (targets, weights) = (targets.to_vec(), weights.map(<[f32]>::to_vec));
        let operation = cpu::cross_entropy::CrossEntropy { targets, weights, precision };
        return cpu::run(operation, [x.into_dispatch(), table.into_dispatch()]);
    }
    plain::cross_entropy(x, table, targets, weights, precision)
}

/// The gate of SwiGLU (Shazeer, arXiv:2002.05202): `silu(gate) · up`.
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&gate) {
        return cpu::run(cpu::swiglu::SwiGlu, [gate.into_dispatch(), up.into_dispatch()]);
    }
    plain::swiglu(gate, up)
}

/// Causal attention (Vaswani et al., arXiv:1706.03762) of `heads` heads out of `qkv` `[B, T, 3·C]`, which holds queries,
/// keys and values side by side, to `[B, T, C]`, each within its segment, and to what was read before; with `dropout` of layer `layer` on the
/// probabilities.
pub fn packed_attention(
    qkv: Tensor<3>,
    heads: usize,
    positions: &Positions,
    dropout: Dropout,
    layer: usize,
) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&qkv) && !positions.continues() {
        let rules = cpu::attention::Rules::new(positions, dropout.factors(Site::Attention(layer)));
        return cpu::run(cpu::attention::PackedAttention { heads, rules }, [qkv.into_dispatch()]);
    }
    plain::packed_attention(qkv, heads, positions, dropout, layer)
}

/// Causal grouped-query attention (Ainslie et al., arXiv:2305.13245) of q `[B, H, T, D]` to k and v `[B, K, T, D]`, each of
/// whose heads serves H / K consecutive ones of q, to `[B, T, H·D]`, each within its segment; with `dropout` of layer
/// `layer` on the probabilities.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    positions: &Positions,
    dropout: Dropout,
    layer: usize,
) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::holds(&q) && !positions.continues() {
        let rules = cpu::attention::Rules::new(positions, dropout.factors(Site::Attention(layer)));
        let inputs = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
        return cpu::run(cpu::attention::GroupedAttention { rules }, inputs);
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
        let (cos, sin, starts) = (angles.cos.clone(), angles.sin.clone(), positions.starts.clone());
        return cpu::run(cpu::rotate::Rotate { cos, sin, starts }, [x.into_dispatch()]);
    }
    plain::rotate(x, positions)
}

/// `[B, T, H·D]` as `heads` slices, `[B, H, T, D]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, t, width] = x.dims();
    x.reshape([b, t, heads, width / heads]).swap_dims(1, 2)
}
