//! Each operation against its plain form, against finite differences, and with several numbers of threads.

use burn::tensor::{Device, Tensor, TensorData};

use super::*;
use crate::compute::SlotKey;
use crate::config::Precision::{Bf16, F32};
use crate::random::{Stream, normal};

/// What is computed of flat inputs.
type Function<'a> = &'a (dyn Fn(&[Tensor<1>]) -> Tensor<1> + Sync);

fn inputs(lengths: &[usize]) -> Vec<Vec<f32>> {
    let draw = |(index, length): (usize, &usize)| {
        let mut values = vec![0.0; *length];
        normal(7, Stream::Initialisation, index as u64, 1.3, &mut values);
        values
    };
    lengths.iter().enumerate().map(draw).collect()
}

fn read(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().unwrap()
}

/// The result, and the gradients of its product with fixed weights.
fn evaluate(function: Function<'_>, inputs: &[Vec<f32>], device: &Device) -> Vec<Vec<f32>> {
    evaluate_with(function, inputs, None, device)
}

/// The same, without that of the input that is frozen.
fn evaluate_with(function: Function<'_>, inputs: &[Vec<f32>], frozen: Option<usize>, device: &Device) -> Vec<Vec<f32>> {
    let tensor = |values: &Vec<f32>| Tensor::<1>::from_data(TensorData::new(values.clone(), [values.len()]), device);
    let leaf = |(index, values)| tensor(values).set_require_grad(Some(index) != frozen);
    let leaves: Vec<_> = inputs.iter().enumerate().map(leaf).collect();
    let result = function(&leaves);
    let mut weights = vec![0.0; result.dims()[0]];
    normal(8, Stream::Initialisation, 0, 1.0, &mut weights);
    let mut gradients = (result.clone() * tensor(&weights)).sum().backward();
    let gradients = leaves.iter().filter_map(|leaf| leaf.grad_remove(&mut gradients).map(read));
    std::iter::once(read(result.inner())).chain(gradients).collect()
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    let scale = expected.iter().fold(0.0, |scale: f32, x| scale.max(x.abs()));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= 1e-5 * scale, "{what}, element {index}: {found} is not {expected}");
    }
}

/// `fused` is `plain`, forward and backward; its gradient is its slope; and threads leave no trace.
fn check(name: &str, lengths: &[usize], fused: Function<'_>, plain: Function<'_>) {
    let (device, inputs) = (Device::flex().autodiff(), inputs(lengths));
    let found = evaluate(fused, &inputs, &device);
    assert_eq!(found.len(), 1 + inputs.len());
    for (index, (found, expected)) in found.iter().zip(evaluate(plain, &inputs, &device)).enumerate() {
        assert_close(found, &expected, &format!("{name}, {lengths:?}, result {index}"));
    }
    for frozen in (0..inputs.len()).filter(|_| inputs.len() > 1) {
        let mut expected = found.clone();
        expected.remove(1 + frozen);
        let found = evaluate_with(fused, &inputs, Some(frozen), &device);
        assert_eq!(found, expected, "{name}, {lengths:?}: input {frozen} is frozen");
    }

    let inference = |inputs: &[Vec<f32>]| {
        let leaves =
            inputs.iter().map(|x| Tensor::<1>::from_data(TensorData::new(x.clone(), [x.len()]), &Device::flex()));
        read(fused(&leaves.collect::<Vec<_>>()))
    };
    assert_eq!(inference(&inputs), found[0], "{name}: without gradients");
    let mut weights = vec![0.0; found[0].len()];
    normal(8, Stream::Initialisation, 0, 1.0, &mut weights);
    for (index, gradient) in found[1..].iter().enumerate() {
        let mut direction = vec![0.0; gradient.len()];
        normal(9, Stream::Initialisation, index as u64, 1.0, &mut direction);
        let norm = direction.iter().map(|d| d * d).sum::<f32>().sqrt();
        let at = |distance: f32| {
            let mut moved = inputs.clone();
            moved[index].iter_mut().zip(&direction).for_each(|(x, d)| *x += distance * d / norm);
            let values = inference(&moved);
            values.iter().zip(&weights).map(|(value, weight)| f64::from(*value) * f64::from(*weight)).sum::<f64>()
        };
        let measured = (at(5e-3) - at(-5e-3)) / 1e-2;
        let along = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d / norm)).sum::<f64>();
        let scale = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        assert!((measured - along).abs() < 0.01 * scale + 0.01, "{name}, input {index}: slope {measured}, not {along}");
    }

    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let again = pool.install(|| evaluate(fused, &inputs, &device));
        assert_eq!(again, found, "{name}: {threads} threads");
    }
}

/// What a frozen weight saves: its gradient is not computed, and its layer's input not kept for it.
#[test]
fn a_frozen_weight_has_no_gradient() {
    use super::cpu::{CpuTensor, Operation, cross_entropy::CrossEntropy, linear::Linear};

    let tensor = |shape: [usize; 2]| CpuTensor::from_data(TensorData::new(vec![0.5f32; shape[0] * shape[1]], shape));
    let linear = Linear { transposed: false, has_bias: false, has_residual: false, precision: F32 };
    for wanted in [[true, false], [false, true]] {
        let (y, saved) = linear.forward([tensor([3, 4]), tensor([4, 5])], wanted);
        let gradients = <Linear as Operation<2>>::backward(saved, y, wanted);
        assert_eq!(gradients.map(|gradient| gradient.is_some()), wanted);
        let loss = CrossEntropy { targets: vec![0, 1, 2], weights: None, precision: F32 };
        let (sum, saved) = loss.forward([tensor([3, 4]), tensor([5, 4])], wanted);
        let gradients = CrossEntropy::backward(saved, sum, wanted);
        assert_eq!(gradients.map(|gradient| gradient.is_some()), wanted);
    }
}

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let elements: usize = x.dims().iter().product();
    x.reshape([elements])
}

#[test]
fn activations_are_their_plain_forms() {
    for shape in [[1, 1, 1], [2, 3, 7], [3, 50, 130]] {
        let count = shape.iter().product();
        let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape(shape);
        for kind in [Gelu::Exact, Gelu::Tanh] {
            let plain = |leaves: &[Tensor<1>]| flat(plain::gelu(x(leaves), kind));
            check("gelu", &[count], &|leaves| flat(gelu(x(leaves), kind)), &plain);
        }
        let up = |leaves: &[Tensor<1>]| leaves[1].clone().reshape(shape);
        let plain = |leaves: &[Tensor<1>]| flat(plain::swiglu(x(leaves), up(leaves)));
        check("swiglu", &[count; 2], &|leaves| flat(swiglu(x(leaves), up(leaves))), &plain);
    }
}

#[test]
fn linear_layers_are_their_plain_forms() {
    for [batch, t, from, to] in [[1, 1, 1, 1], [2, 3, 5, 7], [3, 32, 40, 300], [2, 64, 250, 250]] {
        let (x, weight) = (batch * t * from, from * to);
        for added in [vec![], vec![to], vec![batch * t * to], vec![to, batch * t * to]] {
            let lengths: Vec<usize> = [x, weight].into_iter().chain(added).collect();
            let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([batch, t, from]);
            let weight = |leaves: &[Tensor<1>]| leaves[1].clone().reshape([from, to]);
            let bias = |leaves: &[Tensor<1>]| leaves.get(2).filter(|_| lengths[2] == to).cloned();
            let residual = |leaves: &[Tensor<1>]| {
                let last = leaves[2..].last().filter(|_| lengths[lengths.len() - 1] == batch * t * to);
                last.map(|residual| residual.clone().reshape([batch, t, to]))
            };
            let fused = |l: &[Tensor<1>]| flat(linear(x(l), weight(l), bias(l), residual(l), F32));
            let plain = |l: &[Tensor<1>]| flat(plain::linear(x(l), weight(l), bias(l), residual(l), F32));
            check("linear layer", &lengths, &fused, &plain);
        }
        let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([batch * t, from]);
        let table = |leaves: &[Tensor<1>]| leaves[1].clone().reshape([to, from]);
        let fused = |leaves: &[Tensor<1>]| flat(logits(x(leaves), table(leaves)));
        let plain = |leaves: &[Tensor<1>]| flat(plain::logits(x(leaves), table(leaves)));
        check("logits", &[batch * t * from, to * from], &fused, &plain);
    }
}

#[test]
fn norms_are_their_plain_forms() {
    for (rows, width) in [(1, 3), (5, 16), (67, 20), (130, 37)] {
        let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([1, rows, width]);
        let weight = |leaves: &[Tensor<1>]| leaves[1].clone();
        let bias = |leaves: &[Tensor<1>]| leaves.get(2).cloned();
        for lengths in [vec![rows * width, width, width], vec![rows * width, width]] {
            let fused = |leaves: &[Tensor<1>]| flat(layer_norm(x(leaves), weight(leaves), bias(leaves), 1e-2));
            let plain = |leaves: &[Tensor<1>]| flat(plain::layer_norm(x(leaves), weight(leaves), bias(leaves), 1e-2));
            check("layer norm", &lengths, &fused, &plain);
        }
        let fused = |leaves: &[Tensor<1>]| flat(rms_norm(x(leaves), weight(leaves), 1e-2));
        let plain = |leaves: &[Tensor<1>]| flat(plain::rms_norm(x(leaves), weight(leaves), 1e-2));
        check("root-mean-square norm", &[rows * width, width], &fused, &plain);
    }
}

#[test]
fn embeddings_are_their_plain_forms() {
    for ([batch, t, width], vocab_size) in [([1, 1, 1], 1), ([2, 5, 3], 4), ([3, 40, 20], 150)] {
        let tokens: Vec<u32> = (0..batch * t).map(|token| (token * 31 % vocab_size) as u32).collect();
        for segments in [None, Some(segments(batch * t))] {
            let positions = Positions::new([batch, t], segments.as_deref(), &Device::flex().autodiff());
            let table = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([vocab_size, width]);
            // More places than there are positions.
            let places = |leaves: &[Tensor<1>]| leaves.get(1).map(|places| places.clone().reshape([t + 2, width]));
            for lengths in [vec![vocab_size * width], vec![vocab_size * width, (t + 2) * width]] {
                let fused = |l: &[Tensor<1>]| flat(embed(&tokens, table(l), places(l), &positions));
                let plain = |l: &[Tensor<1>]| flat(plain::embed(&tokens, table(l), places(l), &positions));
                check("embedding", &lengths, &fused, &plain);
            }
        }
    }
}

#[test]
fn dropout_is_its_plain_form() {
    let active = Dropout::training(0.3, SlotKey { seed: 1, step: 2, slot: 3 });
    for (elements, has_residual) in [(1, false), (1000, false), (5000, true), (20_000, true)] {
        let shape = [1, elements];
        let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape(shape);
        let onto = |leaves: &[Tensor<1>]| leaves.get(1).map(|onto| onto.clone().reshape(shape));
        let plain = |leaves: &[Tensor<1>]| {
            let x = plain::dropout(x(leaves), active.factors(Site::Embedding));
            flat(onto(leaves).map_or(x.clone(), |onto| onto + x))
        };
        let fused = |leaves: &[Tensor<1>]| flat(dropout(x(leaves), onto(leaves), active, Site::Embedding));
        check("dropout", &vec![elements; 1 + usize::from(has_residual)], &fused, &plain);
    }
}

/// Of some positions, that run on from row to row.
fn segments(positions: usize) -> Vec<u32> {
    (0..positions).map(|position| [0, 1, 1, 1, 3, 3, 9][position / 4 % 7]).collect()
}

#[test]
fn cross_entropy_is_its_plain_form() {
    // The last in two parts.
    for (rows, vocab_size, width) in [(1, 2, 1), (5, 65, 3), (37, 33, 8), (300, 20_000, 2)] {
        let targets: Vec<u32> = (0..rows).map(|row| (row * 31 % vocab_size) as u32).collect();
        let weights: Vec<f32> = (0..rows).map(|row| [1.0, 0.5, 0.0, 2.0][row % 4]).collect();
        let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([rows, width]);
        let table = |leaves: &[Tensor<1>]| leaves[1].clone().reshape([vocab_size, width]);
        for weights in [None, Some(weights.as_slice())] {
            let fused = |leaves: &[Tensor<1>]| cross_entropy(x(leaves), table(leaves), &targets, weights, F32);
            let plain = |leaves: &[Tensor<1>]| plain::cross_entropy(x(leaves), table(leaves), &targets, weights, F32);
            check("cross-entropy", &[rows * width, vocab_size * width], &fused, &plain);
        }
    }
}

/// Beside the plain form, which rounds the product besides; and threads leave no trace.
fn check_bf16(name: &str, lengths: &[usize], fused: Function<'_>, plain: Function<'_>) {
    let (device, inputs) = (Device::flex().autodiff(), inputs(lengths));
    let found = evaluate(fused, &inputs, &device);
    for (index, (found, expected)) in found.iter().zip(evaluate(plain, &inputs, &device)).enumerate() {
        let scale = expected.iter().fold(0.0, |scale: f32, x| scale.max(x.abs()));
        let off = found.iter().zip(&expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max);
        assert!(off <= 0.02 * scale, "{name}, {lengths:?}, result {index}: off by {off} of {scale}");
    }
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| evaluate(fused, &inputs, &device)), found, "{name}, {lengths:?}, {threads} threads");
    }
}

#[test]
fn what_is_multiplied_in_bf16_is_its_plain_form() {
    for [rows, from, to] in [[1, 1, 1], [15, 7, 5], [96, 300, 40], [128, 250, 250]] {
        let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([rows, from]);
        let weight = |leaves: &[Tensor<1>]| leaves[1].clone().reshape([from, to]);
        let bias = |leaves: &[Tensor<1>]| Some(leaves[2].clone());
        let fused = |l: &[Tensor<1>]| flat(linear(x(l), weight(l), bias(l), None, Bf16));
        let plain = |l: &[Tensor<1>]| flat(plain::linear(x(l), weight(l), bias(l), None, Bf16));
        check_bf16("linear layer", &[rows * from, from * to, to], &fused, &plain);

        let targets: Vec<u32> = (0..rows).map(|row| (row * 31 % to) as u32).collect();
        let table = |leaves: &[Tensor<1>]| leaves[1].clone().reshape([to, from]);
        let fused = |l: &[Tensor<1>]| cross_entropy(x(l) * 0.1, table(l) * 0.1, &targets, None, Bf16);
        let plain = |l: &[Tensor<1>]| plain::cross_entropy(x(l) * 0.1, table(l) * 0.1, &targets, None, Bf16);
        check_bf16("cross-entropy", &[rows * from, to * from], &fused, &plain);
    }
}

#[test]
fn attention_is_its_plain_form() {
    let sizes = [[1, 1, 1, 1, 1], [2, 4, 2, 8, 4], [2, 3, 1, 37, 6], [1, 2, 2, 50, 33]];
    let dropouts = [Dropout::inactive(), Dropout::training(0.3, SlotKey { seed: 1, step: 2, slot: 3 })];
    let cases = sizes.into_iter().flat_map(|sizes| dropouts.map(|dropout| (sizes, dropout)));
    let cases = cases.flat_map(|(sizes, dropout)| [false, true].map(|in_segments| (sizes, dropout, in_segments)));
    for ([batch, heads, kv_heads, t, head_width], dropout, in_segments) in cases {
        let segments = in_segments.then(|| segments(batch * t));
        let positions = || Positions::new([batch, t], segments.as_deref(), &Device::flex().autodiff());
        let (queries, keys) = ([batch, heads, t, head_width], [batch, kv_heads, t, head_width]);
        let parts = |leaves: &[Tensor<1>]| {
            (leaves[0].clone().reshape(queries), leaves[1].clone().reshape(keys), leaves[2].clone().reshape(keys))
        };
        let fused = |leaves: &[Tensor<1>]| {
            let (q, k, v) = parts(leaves);
            flat(attention(q, k, v, &positions(), dropout, 1))
        };
        let plain = |leaves: &[Tensor<1>]| {
            let (q, k, v) = parts(leaves);
            flat(plain::attention(q, k, v, &positions(), dropout, 1))
        };
        let lengths = [queries, keys, keys].map(|shape| shape.iter().product());
        check("attention", &lengths, &fused, &plain);

        let width = heads * head_width;
        let packed = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([batch, t, 3 * width]);
        let fused = |leaves: &[Tensor<1>]| flat(packed_attention(packed(leaves), heads, &positions(), dropout, 1));
        let plain =
            |leaves: &[Tensor<1>]| flat(plain::packed_attention(packed(leaves), heads, &positions(), dropout, 1));
        check("packed attention", &[batch * t * 3 * width], &fused, &plain);
    }
}

#[test]
fn rotation_is_its_plain_form() {
    let cases = [[1, 1, 1, 2], [2, 3, 5, 6], [2, 2, 9, 34]].into_iter();
    for ([batch, heads, t, head_width], in_segments) in cases.flat_map(|sizes| [(sizes, false), (sizes, true)]) {
        let segments = in_segments.then(|| segments(batch * t));
        let positions = || {
            let positions = Positions::new([batch, t], segments.as_deref(), &Device::flex().autodiff());
            positions.rotary(head_width, 100.0, None)
        };
        let x = |leaves: &[Tensor<1>]| leaves[0].clone().reshape([batch, t, heads, head_width]).swap_dims(1, 2);
        let plain = |leaves: &[Tensor<1>]| flat(plain::rotate(x(leaves), &positions()));
        check("rotation", &[batch * heads * t * head_width], &|leaves| flat(rotate(x(leaves), &positions())), &plain);
    }
}
