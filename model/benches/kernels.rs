//! Each kernel of the CPU, forward and backward, beside its plain form, on the sizes of `lockstep bench compute --shape small`.
//! `RAYON_NUM_THREADS` sets the threads.
//!
//! `cargo bench --workspace --bench kernels -- [FILTER]`

use burn::tensor::{Device, Tensor, TensorData};
use criterion::{Criterion, criterion_group, criterion_main};
use lockstep_model::compute::SlotKey;
use lockstep_model::config::{Gelu, Precision};
use lockstep_model::dropout::{Dropout, Site};
use lockstep_model::kernels::{self, Positions, plain};
use lockstep_model::random::{Stream, normal};

/// Rows, positions, width, heads of queries, and of keys and values, feed-forward width.
const B: usize = 4;
const T: usize = 256;
const C: usize = 384;
const H: usize = 6;
const K: usize = 2;
const F: usize = 1536;
/// Width of a head.
const D: usize = C / H;
const VOCAB_SIZE: usize = 8192;

fn leaf<const N: usize>(shape: [usize; N], index: u64) -> Tensor<N> {
    let mut values = vec![0.0; shape.iter().product()];
    normal(1, Stream::Initialisation, index, 1.0, &mut values);
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff()).require_grad()
}

/// Measures both, from inputs to their gradients.
fn compare<const N: usize>(c: &mut Criterion, name: &str, own: impl Fn() -> Tensor<N>, plain: impl Fn() -> Tensor<N>) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    group.bench_function("own", |b| b.iter(|| own().sum().backward()));
    group.bench_function("plain", |b| b.iter(|| plain().sum().backward()));
    group.finish();
}

fn elementwise(c: &mut Criterion) {
    let (hidden, up) = (leaf([B, T, F], 0), leaf([B, T, F], 1));
    for (name, kind) in [("gelu", Gelu::Exact), ("gelu by tanh", Gelu::Tanh)] {
        compare(c, name, || kernels::gelu(hidden.clone(), kind), || plain::gelu(hidden.clone(), kind));
    }
    let swiglu = || plain::swiglu(hidden.clone(), up.clone());
    compare(c, "swiglu", || kernels::swiglu(hidden.clone(), up.clone()), swiglu);
}

fn dropout(c: &mut Criterion) {
    let (x, onto) = (leaf([B, T, C], 0), leaf([B, T, C], 1));
    let active = Dropout::training(0.1, SlotKey { seed: 1, step: 1, slot: 0 });
    let own = || kernels::dropout(x.clone(), Some(onto.clone()), active, Site::Embedding);
    compare(c, "dropout", own, || onto.clone() + plain::dropout(x.clone(), active.factors(Site::Embedding)));
}

fn norms(c: &mut Criterion) {
    let (x, weight, bias): (_, Tensor<1>, Tensor<1>) = (leaf([B, T, C], 0), leaf([C], 1), leaf([C], 2));
    let own = || kernels::layer_norm(x.clone(), weight.clone(), Some(bias.clone()), 1e-5);
    let plain = || plain::layer_norm(x.clone(), weight.clone(), Some(bias.clone()), 1e-5);
    compare(c, "layer norm", own, plain);
    let own = || kernels::rms_norm(x.clone(), weight.clone(), 1e-5);
    compare(c, "root-mean-square norm", own, || plain::rms_norm(x.clone(), weight.clone(), 1e-5));
}

fn layers(c: &mut Criterion) {
    let (x, weight, bias, residual) = (leaf([B, T, C], 0), leaf([C, C], 1), leaf([C], 2), leaf([B, T, C], 3));
    let own = || kernels::linear(x.clone(), weight.clone(), Some(bias.clone()), Some(residual.clone()), Precision::F32);
    let plain = || plain::linear(x.clone(), weight.clone(), Some(bias.clone()), Some(residual.clone()), Precision::F32);
    compare(c, "linear layer", own, plain);
    let (x, table) = (leaf([B * T, C], 0), leaf([VOCAB_SIZE, C], 1));
    let plain = || plain::logits(x.clone(), table.clone());
    compare(c, "logits", || kernels::logits(x.clone(), table.clone()), plain);
    let targets: Vec<u32> = (0..B * T).map(|row| (row * 31 % VOCAB_SIZE) as u32).collect();
    let own = || kernels::cross_entropy(x.clone(), table.clone(), &targets, None, Precision::F32);
    compare(c, "head and cross-entropy", own, || {
        plain::cross_entropy(x.clone(), table.clone(), &targets, None, Precision::F32)
    });
    let (positions, places) = (Positions::new([B, T], None, &Device::flex().autodiff()), leaf([T, C], 2));
    let own = || kernels::embed(&targets, table.clone(), Some(places.clone()), &positions);
    compare(c, "embedding", own, || plain::embed(&targets, table.clone(), Some(places.clone()), &positions));
}

fn attention(c: &mut Criterion) {
    let device = Device::flex().autodiff();
    let positions = Positions::new([B, T], None, &device).rotary(D, 10_000.0, None);
    let (qkv, q, k, v) = (leaf([B, T, 3 * C], 0), leaf([B, H, T, D], 1), leaf([B, K, T, D], 2), leaf([B, K, T, D], 3));
    let active = Dropout::training(0.1, SlotKey { seed: 1, step: 1, slot: 0 });
    for (name, dropout) in [("attention", Dropout::inactive()), ("attention with dropout", active)] {
        let own = || kernels::packed_attention(qkv.clone(), H, &positions, dropout, 0);
        compare(c, name, own, || plain::packed_attention(qkv.clone(), H, &positions, dropout, 0));
    }
    let none = Dropout::inactive();
    let own = || kernels::attention(q.clone(), k.clone(), v.clone(), &positions, none, 0);
    let plain = || plain::attention(q.clone(), k.clone(), v.clone(), &positions, none, 0);
    compare(c, "grouped attention", own, plain);
    compare(c, "rotation", || kernels::rotate(q.clone(), &positions), || plain::rotate(q.clone(), &positions));
}

criterion_group!(kernels_beside_plain, elementwise, dropout, norms, layers, attention);
criterion_main!(kernels_beside_plain);
