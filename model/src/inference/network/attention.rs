//! What queries and keys go through: norms, turns, the caches, and attention.

use rayon::prelude::*;

use super::{Cache, Network, Run, Sizes};
use crate::inference::cache::HeadCache;
use crate::kernels::rows::turn;

/// Queries of a sequence that one thread attends to at a time.
const QUERIES: usize = 24;
/// Multiplications of attention below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 15;
/// Elements of queries, keys and values below which another thread costs more than it brings, where they are turned and where
/// keys and values are cached.
const WORTH_CACHING_TOGETHER: usize = 1 << 12;

/// Some queries of a run, and a head of keys.
#[derive(Clone, Copy)]
struct Part {
    /// The run's, among the caches.
    place: usize,
    /// The first query's, among all tokens.
    row: usize,
    position: usize,
    count: usize,
    head: usize,
    /// The first query's, among those that attend.
    to: usize,
}

impl Network {
    /// Norms and turns queries and keys, each to its position, and caches keys and values.
    pub(super) fn place(&self, layer: usize, qkv: &mut [f32], runs: &[Run<'_>], caches: &mut [Cache]) {
        let Sizes { heads, kv_heads, head_width, .. } = self.sizes;
        let stride = (heads + 2 * kv_heads) * head_width;
        let (qk_norms, rotation) = (&self.layers[layer].qk_norms, &self.rotation);
        if qk_norms.is_some() || rotation.is_some() {
            let positions: Vec<usize> = runs.iter().flat_map(|run| run.start..run.start + run.tokens.len()).collect();
            let rows = qkv.par_chunks_mut(stride).zip(positions);
            rows.with_min_len(WORTH_CACHING_TOGETHER.div_ceil(stride)).for_each(|(row, position)| {
                let (queries, keys) = row[..(heads + kv_heads) * head_width].split_at_mut(heads * head_width);
                if let Some([query_norm, key_norm]) = qk_norms {
                    query_norm.apply(queries);
                    key_norm.apply(keys);
                }
                if let Some(rotation) = rotation {
                    let (cos, sin) = rotation.at(position, head_width / 2);
                    let heads = queries.chunks_exact_mut(head_width).chain(keys.chunks_exact_mut(head_width));
                    heads.for_each(|head| turn(head, cos, sin, 1.0));
                }
            });
        }
        // Each head of a run, with its cache.
        let mut pushes = Vec::with_capacity(runs.len() * kv_heads);
        let mut caches: Vec<Option<&mut [HeadCache]>> =
            caches.iter_mut().map(|cache| Some(&mut cache.0[layer * kv_heads..][..kv_heads])).collect();
        let mut rows = &*qkv;
        for run in runs {
            let (of_run, rest) = rows.split_at(run.tokens.len() * stride);
            let heads = caches[run.place].take().into_iter().flatten();
            pushes.extend(heads.enumerate().map(|(index, head)| (of_run, index, head)));
            rows = rest;
        }
        let push = |(rows, index, head): (&[f32], usize, &mut HeadCache)| {
            for row in rows.chunks_exact(stride) {
                let key = &row[(heads + index) * head_width..][..head_width];
                let value = &row[(heads + kv_heads + index) * head_width..][..head_width];
                head.push(key, value);
            }
        };
        if qkv.len() < WORTH_CACHING_TOGETHER {
            pushes.into_iter().for_each(push);
        } else {
            pushes.into_par_iter().for_each(push);
        }
    }

    /// Causal grouped-query attention (Ainslie et al., arXiv:2305.13245) of rows of `qkv` to what is cached, in `attended`
    /// `[m, H·D]`: of all m = n rows, or in the last layer of those after which logits are asked for.
    pub(super) fn attend(
        &self,
        layer: usize,
        qkv: &[f32],
        runs: &[Run<'_>],
        caches: &[Cache],
        attended: &mut Vec<f32>,
    ) {
        let Sizes { heads, kv_heads, head_width, .. } = self.sizes;
        let (group, stride) = (heads / kv_heads, (heads + 2 * kv_heads) * head_width);
        let mut parts = Vec::new();
        let (mut first_row, mut attending, mut multiplications) = (0, 0, 0);
        for run in runs {
            let tokens = if self.is_last(layer) { run.answered() } else { 0..run.tokens.len() };
            for start in tokens.clone().step_by(QUERIES) {
                let (count, position) = (QUERIES.min(tokens.end - start), run.start + start);
                let part = Part { place: run.place, row: first_row + start, position, count, to: attending, head: 0 };
                parts.extend((0..kv_heads).map(|head| Part { head, ..part }));
                attending += count;
                multiplications += count * position * heads * head_width;
            }
            first_row += run.tokens.len();
        }
        let attend = |part: &Part| {
            let &Part { place, row, position, count, head, .. } = part;
            let mut queries = Vec::with_capacity(count * group * head_width);
            for row in row..row + count {
                queries.extend_from_slice(&qkv[row * stride + head * group * head_width..][..group * head_width]);
            }
            let seen: Vec<usize> = (0..count * group).map(|query| position + query / group + 1).collect();
            caches[place].0[layer * kv_heads + head].attend(&mut queries, &seen);
            queries
        };
        let found: Vec<Vec<f32>> = if multiplications < WORTH_THREADS {
            parts.iter().map(attend).collect()
        } else {
            parts.par_iter().map(attend).collect()
        };
        attended.resize(attending * heads * head_width, 0.0);
        for (part, found) in parts.iter().zip(found) {
            for (row, found) in (part.to..).zip(found.chunks_exact(group * head_width)) {
                let start = (row * heads + part.head * group) * head_width;
                attended[start..start + found.len()].copy_from_slice(found);
            }
        }
    }
}
