//! The operations out of burn's own, differentiated by burn: what those of the parent module are, on any backend.

use burn::tensor::activation::{self, log_softmax, silu, softmax};
use burn::tensor::{DType, Int, Tensor, TensorData, module};

use super::{Positions, split_heads};
use crate::config::{Gelu, Precision};
use crate::dropout::{Dropout, Factors, Site};
use crate::traffic::upload;

/// Added to the scores of positions that a query must not see. Finite, so that no backend meets an infinity; its
/// exponential is exactly 0.
const MASKED: f32 = -1e30;

/// Multiplied by the factors, where there are any. One bit an element goes to the device.
pub fn dropout<const D: usize>(x: Tensor<D>, factors: Option<Factors>) -> Tensor<D> {
    let Some(factors) = factors else { return x };
    let (shape, device) = (x.dims(), x.device());
    let elements: usize = shape.iter().product();
    let kept = factors.kept(elements);
    let words = kept.len();
    let kept = Tensor::<2, Int>::from_data(numbers(&kept, [words, 1]), &device).expand([words, 32]);
    let bits = Tensor::<1, Int>::arange(0..32, &device).unsqueeze::<2>().expand([words, 32]);
    let mask = kept.bitwise_right_shift(bits).bitwise_and_scalar(1).float() * factors.of_kept();
    x * mask.reshape([words * 32]).slice(0..elements).reshape(shape)
}

/// As [`super::embed`].
pub fn embed(tokens: &[u32], table: Tensor<2>, places: Option<Tensor<2>>, positions: &Positions) -> Tensor<3> {
    let Positions { device, shape: [b, t], starts, .. } = positions;
    let x = module::embedding(table, Tensor::from_data(numbers(tokens, [*b, *t]), device));
    match places {
        None => x,
        Some(places) if starts.is_none() => x + places.narrow(0, positions.first(), *t).unsqueeze::<3>(),
        Some(places) => {
            let positions = numbers(&positions.places(), [*b, *t]);
            x + module::embedding(places, Tensor::from_data(positions, device))
        }
    }
}

/// As [`super::gelu`].
pub fn gelu(x: Tensor<3>, gelu: Gelu) -> Tensor<3> {
    match gelu {
        Gelu::Exact => activation::gelu(x),
        Gelu::Tanh => activation::gelu_approximate(x),
    }
}

/// As [`super::linear`].
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    residual: Option<Tensor<D>>,
    precision: Precision,
) -> Tensor<D> {
    // As one product of all rows: backward, burn makes one of each index of the first axis, and then sums them.
    let (mut shape, [inputs, outputs]) = (x.dims(), weight.dims());
    let rows = shape[..D - 1].iter().product();
    let mut y = product(x.reshape([rows, inputs]), weight, precision);
    if let Some(bias) = bias {
        y = y + bias.unsqueeze::<2>();
    }
    shape[D - 1] = outputs;
    let y = y.reshape(shape);
    match residual {
        Some(residual) => residual + y,
        None => y,
    }
}

/// Rounded to bf16, a product is rounded, too, as burn gives it in the type of its operands.
fn product(x: Tensor<2>, weight: Tensor<2>, precision: Precision) -> Tensor<2> {
    match precision {
        Precision::F32 => x.matmul(weight),
        Precision::Bf16 => x.cast(DType::BF16).matmul(weight.cast(DType::BF16)).cast(DType::F32),
    }
}

/// As [`super::logits`].
pub fn logits(x: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
    x.matmul(table.transpose())
}

/// As [`super::layer_norm`].
pub fn layer_norm(x: Tensor<3>, weight: Tensor<1>, bias: Option<Tensor<1>>, epsilon: f64) -> Tensor<3> {
    module::layer_norm(x, weight, bias, epsilon)
}

/// As [`super::rms_norm`].
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let mean_square = (x.clone() * x.clone()).mean_dim(D - 1);
    x / (mean_square + epsilon).sqrt() * weight.unsqueeze::<D>()
}

/// As [`super::cross_entropy`].
pub fn cross_entropy(
    x: Tensor<2>,
    table: Tensor<2>,
    targets: &[u32],
    weights: Option<&[f32]>,
    precision: Precision,
) -> Tensor<1> {
    let (rows, device) = (targets.len(), x.device());
    let targets = Tensor::<2, Int>::from_data(numbers(targets, [rows, 1]), &device);
    let losses = -log_softmax(product(x, table.transpose(), precision), 1).gather(1, targets).reshape([rows]);
    match weights {
        None => losses.sum(),
        Some(weights) => (losses * Tensor::from_data(upload(TensorData::new(weights.to_vec(), [rows])), &device)).sum(),
    }
}

/// As [`super::packed_attention`].
pub fn packed_attention(
    qkv: Tensor<3>,
    heads: usize,
    positions: &Positions,
    dropout: Dropout,
    layer: usize,
) -> Tensor<3> {
    let width = qkv.dims()[2] / 3;
    let part = |index: usize| split_heads(qkv.clone().narrow(2, index * width, width), heads);
    attention(part(0), part(1), part(2), positions, dropout, layer)
}

/// As [`super::attention`].
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    positions: &Positions,
    dropout: Dropout,
    layer: usize,
) -> Tensor<3> {
    let [b, heads, t, head_width] = q.dims();
    let mask = positions.causal_mask(); // [B, 1, T, T]; below, keys come after those that were read before
    let [k, v] = positions.with_earlier(layer, k, v).map(|x| repeat_heads(x, heads)); // [B, H, T, D]
    let scores = q.matmul(k.transpose()) * (1.0 / (head_width as f64).sqrt()); // [B, H, T, T]
    let probabilities = softmax(scores + mask, 3);
    let y = self::dropout(probabilities, dropout.factors(Site::Attention(layer))).matmul(v); // [B, H, T, D]
    y.swap_dims(1, 2).reshape([b, t, heads * head_width])
}

/// As [`super::swiglu`].
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    silu(gate) * up
}

/// As [`super::rotate`].
pub fn rotate(x: Tensor<4>, positions: &Positions) -> Tensor<4> {
    let Some(angles) = &positions.angles else { return x };
    let t = positions.shape[1];
    let half = x.dims()[3] / 2;
    let table = |values: &[f32]| {
        let places = positions.places();
        let turned = places.iter().flat_map(|&place| &values[place as usize * half..][..half]);
        let values = TensorData::new(turned.copied().collect(), [places.len() / t, 1, t, half]);
        Tensor::<4>::from_data(upload(values), &positions.device)
    };
    let [cos, sin] = angles.tables.get_or_init(|| [table(&angles.cos), table(&angles.sin)]).clone();
    let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let turned_second = second * cos + first * sin;
    Tensor::cat(vec![turned_first, turned_second], 3)
}

/// Each of K heads for `heads / K` consecutive ones: `[B, K, T, D]` to `[B, H, T, D]`.
fn repeat_heads(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [b, kv_heads, t, head_width] = x.dims();
    if kv_heads == heads {
        return x;
    }
    let x = x.unsqueeze_dim::<5>(2).expand([b, kv_heads, heads / kv_heads, t, head_width]);
    x.reshape([b, heads, t, head_width])
}

/// Token numbers, positions, or targets.
fn numbers(values: &[u32], shape: [usize; 2]) -> TensorData {
    upload(TensorData::new(values.iter().map(|&value| value as i32).collect(), shape))
}

impl Positions {
    /// `[B, 1, T, keys]`, or with 1 for B where rows do not differ: 0 where the query in the row may see the key in the column,
    /// [`MASKED`] elsewhere. Keys are T, and those that were read before.
    fn causal_mask(&self) -> Tensor<4> {
        let mask = || {
            let (t, first) = (self.shape[1], self.first());
            let nothing = vec![0; t];
            let starts = self.starts.as_ref().map_or(&nothing, |starts| &**starts);
            let mut values = Vec::with_capacity(starts.len() * (first + t));
            for (query, &start) in (first..first + t).cycle().zip(starts) {
                let seen = start as usize..=query;
                values.extend((0..first + t).map(|key| if seen.contains(&key) { 0.0 } else { MASKED }));
            }
            Tensor::from_data(upload(TensorData::new(values, [starts.len() / t, 1, t, first + t])), &self.device)
        };
        self.mask.get_or_init(mask).clone()
    }
}
