//! Causal attention, split into heads, each of which [`head`](super::head) computes.

use std::sync::Arc;

use macerator::AutoArch;
use rayon::prelude::*;

use super::buffer::Buffer;
use super::head::{self, Backward, Dropout, Forward, Rows};
use super::{CpuTensor, Operation, row_major, shape, tensor};
use crate::dropout::Factors;
use crate::kernels::Positions;
use crate::kernels::lanes::LANES;

/// What happens to the probabilities `[B, H, T, T]`.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// The first key that each query sees, `[B, T]`; the first of its row, where there are none.
    starts: Option<Arc<Vec<u32>>>,
    dropout: Option<Factors>,
}

/// Attention of `heads` heads out of `qkv` `[B, T, 3·H·D]`, which holds queries, keys and values side by side, to
/// `[B, T, H·D]`.
#[derive(Debug)]
pub(crate) struct PackedAttention {
    pub(crate) heads: usize,
    pub(crate) rules: Rules,
}

/// Attention of q `[B, H, T, D]` to k and v `[B, K, T, D]`, each of whose heads serves H / K of q's in turn, to
/// `[B, T, H·D]`.
#[derive(Debug)]
pub(crate) struct GroupedAttention {
    pub(crate) rules: Rules,
}

/// What backward needs: the inputs, and maximum and inverse sum of each query, `[B, H, T]`.
#[derive(Clone, Debug)]
pub(crate) struct Saved<const N: usize> {
    inputs: [CpuTensor; N],
    sizes: Sizes,
    rules: Rules,
    statistics: Vec<[f32; 2]>,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    length: usize,
    /// D.
    head_width: usize,
}

/// Where one of q, k and v lies in a buffer.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    length: usize,
    start: usize,
    batch_stride: usize,
    head_stride: usize,
    row_stride: usize,
}

impl Operation<1> for PackedAttention {
    type Saved = Saved<1>;

    fn forward(self, [qkv]: [CpuTensor; 1], _wanted: [bool; 1]) -> (CpuTensor, Saved<1>) {
        let qkv = row_major(qkv);
        let (heads, shape) = (self.heads, shape(&qkv));
        let (batch, length, head_width) = (shape[0], shape[1], shape[2] / 3 / heads);
        let sizes = Sizes { batch, heads, kv_heads: heads, length, head_width };
        let (output, statistics) = forward(sizes, &self.rules, packed_views(sizes, &qkv));
        (output, Saved { inputs: [qkv], sizes, rules: self.rules, statistics })
    }

    fn backward(saved: Saved<1>, gradient: CpuTensor, _wanted: [bool; 1]) -> [Option<CpuTensor>; 1] {
        let (sizes, [qkv]) = (saved.sizes, &saved.inputs);
        let parts = backward(sizes, &saved.rules, packed_views(sizes, qkv), &saved.statistics, gradient);
        let (length, width) = (sizes.length, sizes.heads * sizes.head_width);
        let mut packed = Buffer::of_any(sizes.batch * length * 3 * width);
        packed.par_chunks_mut(length * 3 * width).enumerate().for_each(|(batch, rows)| {
            for (part, values) in parts.iter().enumerate() {
                let values = &values[batch * length * width..][..length * width];
                interleave(sizes, sizes.heads, values, rows, 3 * width, part * width);
            }
        });
        [Some(tensor(packed, &[sizes.batch, length, 3 * width]))]
    }
}

impl Operation<3> for GroupedAttention {
    type Saved = Saved<3>;

    fn forward(self, inputs: [CpuTensor; 3], _wanted: [bool; 3]) -> (CpuTensor, Saved<3>) {
        let inputs = inputs.map(row_major);
        let (queries, keys) = (shape(&inputs[0]), shape(&inputs[1]));
        let (batch, heads, length, head_width) = (queries[0], queries[1], queries[2], queries[3]);
        let sizes = Sizes { batch, heads, kv_heads: keys[1], length, head_width };
        let views = inputs.each_ref().map(|input| head_view(sizes, input));
        let (output, statistics) = forward(sizes, &self.rules, views);
        (output, Saved { inputs, sizes, rules: self.rules, statistics })
    }

    fn backward(saved: Saved<3>, gradient: CpuTensor, _wanted: [bool; 3]) -> [Option<CpuTensor>; 3] {
        let Sizes { batch, heads, kv_heads, length, head_width } = saved.sizes;
        let views = saved.inputs.each_ref().map(|input| head_view(saved.sizes, input));
        let [q, k, v] = backward(saved.sizes, &saved.rules, views, &saved.statistics, gradient);
        let keys = [batch, kv_heads, length, head_width];
        [tensor(q, &[batch, heads, length, head_width]), tensor(k, &keys), tensor(v, &keys)].map(Some)
    }
}

/// q, k and v in `[B, T, 3·H·D]`.
fn packed_views(sizes: Sizes, qkv: &CpuTensor) -> [View<'_>; 3] {
    let (data, width) = (qkv.storage::<f32>(), sizes.heads * sizes.head_width);
    let (row_stride, head_stride) = (3 * width, sizes.head_width);
    [0, width, 2 * width].map(|start| View {
        data,
        length: sizes.length,
        start,
        batch_stride: sizes.length * row_stride,
        head_stride,
        row_stride,
    })
}

/// `[B, heads, T, D]`.
fn head_view(sizes: Sizes, x: &CpuTensor) -> View<'_> {
    let (heads, head_stride) = (shape(x)[1], sizes.length * sizes.head_width);
    let (data, batch_stride) = (x.storage::<f32>(), heads * head_stride);
    View { data, length: sizes.length, start: 0, batch_stride, head_stride, row_stride: sizes.head_width }
}

/// Heads `[heads, T, D]` into rows of `stride` elements, side by side from element `start` on.
fn interleave(sizes: Sizes, heads: usize, values: &[f32], rows: &mut [f32], stride: usize, start: usize) {
    let (length, width) = (sizes.length, sizes.head_width);
    for head in 0..heads {
        let values = values[head * length * width..][..length * width].chunks_exact(width);
        for (row, values) in rows.chunks_exact_mut(stride).zip(values) {
            row[start + head * width..][..width].copy_from_slice(values);
        }
    }
}

/// The output `[B, T, H·D]`, and the statistics of each query.
fn forward(sizes: Sizes, rules: &Rules, [q, k, v]: [View<'_>; 3]) -> (CpuTensor, Vec<[f32; 2]>) {
    let Sizes { batch, heads, kv_heads, length, head_width } = sizes;
    let (group, width) = (heads / kv_heads, heads * head_width);
    let of_head = head::Sizes { length, width: head_width };
    let mut by_head = Buffer::of_any(batch * length * width);
    let mut statistics = vec![[0.0; 2]; batch * heads * length];
    let groups = by_head.par_chunks_mut(group * length * head_width).zip(statistics.par_chunks_mut(group * length));
    groups.enumerate().for_each(|(index, (output, statistics))| {
        let (k, v) = (k.head(index / kv_heads, index % kv_heads), v.head(index / kv_heads, index % kv_heads));
        let outputs = output.chunks_exact_mut(length * head_width).zip(statistics.chunks_exact_mut(length));
        for (member, (output, statistics)) in outputs.enumerate() {
            let (batch, head) = (index / kv_heads, index % kv_heads * group + member);
            let (q, rules) = (q.head(batch, head), rules.of_head(sizes, batch, head));
            AutoArch::new().dispatch(Forward { sizes: of_head, q, k, v, rules, output, statistics });
        }
    });
    let mut output = Buffer::of_any(batch * length * width);
    let rows = output.par_chunks_mut(length * width).zip(by_head.par_chunks(length * width));
    rows.for_each(|(rows, values)| interleave(sizes, heads, values, rows, width, 0));
    (tensor(output, &[batch, length, width]), statistics)
}

/// The gradients of q, `[B, H, T, D]`, and of k and v, `[B, K, T, D]`.
fn backward(
    sizes: Sizes,
    rules: &Rules,
    [q, k, v]: [View<'_>; 3],
    statistics: &[[f32; 2]],
    gradient: CpuTensor,
) -> [Buffer; 3] {
    let Sizes { batch, heads, kv_heads, length, head_width } = sizes;
    let (group, head) = (heads / kv_heads, length * head_width);
    let (of_head, gradient) = (head::Sizes { length, width: head_width }, row_major(gradient));
    let (data, row_stride) = (gradient.storage::<f32>(), heads * head_width);
    let upper = View { data, length, start: 0, batch_stride: length * row_stride, head_stride: head_width, row_stride };
    let [mut dq, mut dk, mut dv] = [heads, kv_heads, kv_heads].map(|heads| Buffer::of_any(batch * heads * head));
    let groups = dq.par_chunks_mut(group * head).zip(dk.par_chunks_mut(head).zip(dv.par_chunks_mut(head)));
    groups.enumerate().for_each(|(index, (dq, (dk, dv)))| {
        let (batch, kv_head) = (index / kv_heads, index % kv_heads);
        let (k, v) = (k.head(batch, kv_head), v.head(batch, kv_head));
        let mut sums = [vec![[0.0; LANES]; of_head.panels() * of_head.padded_keys()], Vec::new()];
        sums[1] = sums[0].clone();
        for (member, dq) in dq.chunks_exact_mut(head).enumerate() {
            let head = kv_head * group + member;
            let statistics = &statistics[(batch * heads + head) * length..][..length];
            let (q, upper) = (q.head(batch, head), upper.head(batch, head));
            let (rules, sums) = (rules.of_head(sizes, batch, head), &mut sums);
            AutoArch::new().dispatch(Backward { sizes: of_head, q, upper, k, v, rules, statistics, dq, sums });
        }
        for (sum, gradient) in sums.iter().zip([dk, dv]) {
            for (panel, lanes) in sum.chunks_exact(of_head.padded_keys()).enumerate() {
                let (start, end) = (panel * LANES, head_width.min((panel + 1) * LANES));
                for (row, lanes) in gradient.chunks_exact_mut(head_width).zip(lanes) {
                    row[start..end].copy_from_slice(&lanes[..end - start]);
                }
            }
        }
    });
    [dq, dk, dv]
}

impl Rules {
    pub(crate) fn new(positions: &Positions, dropout: Option<Factors>) -> Self {
        Self { starts: positions.starts.clone(), dropout }
    }

    /// Those for one head's probabilities.
    fn of_head(&self, sizes: Sizes, batch: usize, head: usize) -> head::Rules<'_> {
        let Sizes { heads, length, .. } = sizes;
        let first = ((batch * heads + head) * length * length) as u64;
        head::Rules {
            starts: self.starts.as_ref().map(|starts| &starts[batch * length..][..length]),
            dropout: self.dropout.map(|factors| Dropout { factors, first }),
        }
    }
}

impl<'a> View<'a> {
    fn head(&self, batch: usize, head: usize) -> Rows<'a> {
        let start = self.start + batch * self.batch_stride + head * self.head_stride;
        Rows { data: &self.data[start..], stride: self.row_stride, count: self.length }
    }
}
