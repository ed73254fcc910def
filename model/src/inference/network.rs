//! A Transformer on the CPU, forward only, over the next tokens of some sequences: what their earlier tokens left is in their
//! caches.
//!
//! What a token comes to depends on its sequence alone, to the bit: not on how many tokens are read at once, or which
//! other sequences are read beside it.
//!
//! Shapes beside the buffers: n tokens of all sequences; C width, H heads of queries, K of keys and values, D width of a head, F
//! feed-forward width, V vocabulary.

mod parameters;

use rayon::prelude::*;

use super::cache::HeadCache;
use super::matrix::{Matrix, Part};
use super::rows::{Activation, Norm};
use crate::config::{GptConfig, LlamaConfig, ModelConfig, RopeScaling};
use crate::kernels::rotary_tables;
use crate::kernels::rows::turn;
use crate::layout::Layout;

/// Queries of a sequence that one thread attends to at a time.
const QUERIES: usize = 24;
/// Multiplications of attention below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 15;
/// Elements of queries, keys and values below which they do so where keys and values are cached.
const WORTH_CACHING_TOGETHER: usize = 1 << 12;

/// The parameters of one model, laid out for inference.
#[derive(Debug)]
pub(super) struct Network {
    sizes: Sizes,
    embedding: Vec<f32>,      // [V, C]
    places: Option<Vec<f32>>, // [T, C]
    rotation: Option<Rotation>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Matrix, // [C, V]
    /// Whether the head is a copy of the embedding.
    tied_head: bool,
    buffers: Buffers,
}

/// What a pass computes, in memory that the next one uses again.
#[derive(Debug, Default)]
struct Buffers {
    x: Vec<f32>,         // [n, C]
    normed: Vec<f32>,    // [n, C]
    qkv: Vec<f32>,       // [n, (H + 2K)·D]
    attended: Vec<f32>,  // [n, H·D]
    hidden: Vec<f32>,    // [n, F], or with a gate [n, 2F]
    activated: Vec<f32>, // [n, F]
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// C.
    width: usize,
    /// H.
    heads: usize,
    /// K.
    kv_heads: usize,
    /// D.
    head_width: usize,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Norm,
    qkv: Matrix,                 // [C, (H + 2K)·D]
    qk_norms: Option<[Norm; 2]>, // of D
    attention_output: Matrix,    // [H·D, C]
    feed_forward_norm: Norm,
    hidden: Matrix, // [C, F], or with a gate [C, 2F]
    activation: Activation,
    output: Matrix, // [F, C]
}

/// Angles by which heads are turned, for as many positions as were asked for.
#[derive(Debug)]
struct Rotation {
    theta: f64,
    scaling: Option<RopeScaling>,
    cos: Vec<f32>, // [positions, D/2]
    sin: Vec<f32>,
}

/// What a sequence has cached: `[layer][K]`.
#[derive(Clone, Debug)]
pub(super) struct Cache(Vec<HeadCache>);

/// The next tokens of a sequence, at least one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    /// The sequence's, among the caches.
    pub(super) place: usize,
    pub(super) tokens: &'a [u32],
    /// Position of the first; as many tokens are cached.
    pub(super) start: usize,
    /// Whether logits after the last are asked for.
    pub(super) wants_logits: bool,
}

impl Network {
    /// Of `parameters`, flat in layout order; nothing of a model that gives no logits.
    pub(super) fn new(model: &ModelConfig, parameters: &[f32]) -> Option<Self> {
        if model.has_score_head() {
            return None;
        }
        let layout = Layout::of(model);
        let mut tensors = layout.tensors.iter().map(|tensor| &parameters[tensor.range()]);
        let mut tensors = Tensors(&mut tensors);
        match model {
            ModelConfig::Gpt(gpt) => Some(Self::gpt(gpt, &mut tensors)),
            ModelConfig::Llama(llama) => Some(Self::llama(llama, &mut tensors)),
            ModelConfig::Line(_) => None,
        }
    }

    fn gpt(gpt: &GptConfig, tensors: &mut Tensors<'_, '_>) -> Self {
        let GptConfig { width, heads, bias, norm_epsilon: epsilon, .. } = *gpt;
        let (embedding, places) = (tensors.next(), tensors.next());
        let layers = (0..gpt.layers).map(|_| Layer {
            attention_norm: tensors.layer_norm(bias, epsilon),
            qkv: tensors.affine([width, 3 * width], bias),
            qk_norms: None,
            attention_output: tensors.affine([width, width], bias),
            feed_forward_norm: tensors.layer_norm(bias, epsilon),
            hidden: tensors.affine([width, 4 * width], bias),
            activation: Activation::Gelu(gpt.gelu),
            output: tensors.affine([4 * width, width], bias),
        });
        Self {
            sizes: Sizes { width, heads, kv_heads: heads, head_width: width / heads },
            embedding: embedding.to_vec(),
            places: Some(places.to_vec()),
            rotation: None,
            layers: layers.collect(),
            norm: tensors.layer_norm(bias, epsilon),
            head: head(if gpt.tied_head { embedding } else { tensors.next() }, width),
            tied_head: gpt.tied_head,
            buffers: Buffers::default(),
        }
    }

    fn llama(llama: &LlamaConfig, tensors: &mut Tensors<'_, '_>) -> Self {
        let LlamaConfig { width, heads, kv_heads, ffn_width, norm_epsilon: epsilon, .. } = *llama;
        let head_width = llama.head_width();
        let embedding = tensors.next();
        let layers = (0..llama.layers).map(|_| Layer {
            attention_norm: tensors.root_mean_square_norm(epsilon),
            qkv: tensors.side_by_side(width, [heads * head_width, kv_heads * head_width, kv_heads * head_width]),
            qk_norms: llama.qk_norm.then(|| [(); 2].map(|()| tensors.root_mean_square_norm(epsilon))),
            attention_output: tensors.affine([heads * head_width, width], false),
            feed_forward_norm: tensors.root_mean_square_norm(epsilon),
            hidden: tensors.side_by_side(width, [ffn_width, ffn_width]),
            activation: Activation::SwiGlu,
            output: tensors.affine([ffn_width, width], false),
        });
        let (theta, scaling) = (llama.rope_theta, llama.rope_scaling);
        Self {
            sizes: Sizes { width, heads, kv_heads, head_width },
            embedding: embedding.to_vec(),
            places: None,
            rotation: Some(Rotation { theta, scaling, cos: Vec::new(), sin: Vec::new() }),
            layers: layers.collect(),
            norm: tensors.root_mean_square_norm(epsilon),
            head: head(if llama.tied_head { embedding } else { tensors.next() }, width),
            tied_head: llama.tied_head,
            buffers: Buffers::default(),
        }
    }

    /// A cache of no tokens.
    pub(super) fn cache(&self) -> Cache {
        Cache(vec![HeadCache::new(self.sizes.head_width); self.layers.len() * self.sizes.kv_heads])
    }

    /// Bytes that a token takes of a cache.
    pub(super) fn cache_bytes_per_token(&self) -> usize {
        self.layers.len() * self.sizes.kv_heads * HeadCache::bytes_per_token(self.sizes.head_width)
    }

    /// Bytes of weights that are read for each token, or for several at once.
    pub(super) fn weight_bytes(&self) -> usize {
        let matrices = self.layers.iter().flat_map(|l| [&l.qkv, &l.attention_output, &l.hidden, &l.output]);
        matrices.chain([&self.head]).map(Matrix::bytes).sum()
    }

    /// Reads the tokens of `runs`, each of another cache, into their caches. The logits `[V]` of each run that asks for them.
    pub(super) fn forward(&mut self, runs: &[Run<'_>], caches: &mut [Cache]) -> Vec<Vec<f32>> {
        let end = runs.iter().map(|run| run.start + run.tokens.len()).max().unwrap_or(0);
        if let Some(rotation) = &mut self.rotation {
            rotation.reach(end, self.sizes.head_width);
        }
        let mut buffers = std::mem::take(&mut self.buffers);
        let Buffers { x, normed, qkv, attended, hidden, activated } = &mut buffers;
        self.embed(runs, x);
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attention_norm.of(x, normed);
            layer.qkv.multiply(normed, qkv);
            self.place(index, qkv, runs, caches);
            self.attend(index, qkv, runs, caches, attended);
            layer.attention_output.multiply_onto(attended, x);
            layer.feed_forward_norm.of(x, normed);
            layer.hidden.multiply(normed, hidden);
            layer.activation.of(hidden, layer.hidden.columns(), activated);
            layer.output.multiply_onto(activated, x);
        }
        let logits = self.logits(runs, &buffers.x);
        self.buffers = buffers;
        logits
    }

    /// The logits of the runs that ask for them, of all tokens' `x` `[n, C]`.
    fn logits(&self, runs: &[Run<'_>], x: &[f32]) -> Vec<Vec<f32>> {
        let width = self.sizes.width;
        let mut last = Vec::new();
        let mut row = 0;
        for run in runs {
            row += run.tokens.len();
            if run.wants_logits {
                last.extend_from_slice(&x[(row - 1) * width..row * width]);
            }
        }
        if last.is_empty() {
            return Vec::new();
        }
        let (mut normed, mut logits) = (Vec::new(), Vec::new());
        self.norm.of(&last, &mut normed);
        self.head.multiply(&normed, &mut logits);
        logits.chunks_exact(self.head.columns()).map(<[f32]>::to_vec).collect()
    }

    /// Embeddings of all tokens, in `x` `[n, C]`.
    fn embed(&self, runs: &[Run<'_>], x: &mut Vec<f32>) {
        let width = self.sizes.width;
        x.clear();
        for run in runs {
            for (position, &token) in (run.start..).zip(run.tokens) {
                let start = x.len();
                x.extend_from_slice(&self.embedding[token as usize * width..][..width]);
                if let Some(places) = &self.places {
                    let place = &places[position * width..][..width];
                    x[start..].iter_mut().zip(place).for_each(|(x, place)| *x += place);
                }
            }
        }
    }

    /// Norms and turns queries and keys, each to its position, and caches keys and values.
    fn place(&self, layer: usize, qkv: &mut [f32], runs: &[Run<'_>], caches: &mut [Cache]) {
        let Sizes { heads, kv_heads, head_width, .. } = self.sizes;
        let stride = (heads + 2 * kv_heads) * head_width;
        let positions = runs.iter().flat_map(|run| run.start..run.start + run.tokens.len());
        for (position, row) in positions.zip(qkv.chunks_exact_mut(stride)) {
            let (queries, keys) = row[..(heads + kv_heads) * head_width].split_at_mut(heads * head_width);
            if let Some([query_norm, key_norm]) = &self.layers[layer].qk_norms {
                query_norm.apply(queries);
                key_norm.apply(keys);
            }
            if let Some(rotation) = &self.rotation {
                let (cos, sin) = rotation.at(position, head_width / 2);
                let heads = queries.chunks_exact_mut(head_width).chain(keys.chunks_exact_mut(head_width));
                heads.for_each(|head| turn(head, cos, sin, 1.0));
            }
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

    /// Causal grouped-query attention (Ainslie et al., arXiv:2305.13245) of the rows of `qkv` to what is cached, in
    /// `attended` `[n, H·D]`.
    fn attend(&self, layer: usize, qkv: &[f32], runs: &[Run<'_>], caches: &[Cache], attended: &mut Vec<f32>) {
        let Sizes { heads, kv_heads, head_width, .. } = self.sizes;
        let (group, stride) = (heads / kv_heads, (heads + 2 * kv_heads) * head_width);
        // Some queries of a run, and a head of keys.
        let mut parts = Vec::new();
        let (mut first_row, mut multiplications) = (0, 0);
        for run in runs {
            for start in (0..run.tokens.len()).step_by(QUERIES) {
                let count = QUERIES.min(run.tokens.len() - start);
                parts.extend((0..kv_heads).map(|head| (run, first_row + start, run.start + start, count, head)));
                multiplications += count * (run.start + start) * heads * head_width;
            }
            first_row += run.tokens.len();
        }
        let attend = |&(run, row, position, count, head): &(&Run<'_>, usize, usize, usize, usize)| {
            let mut queries = Vec::with_capacity(count * group * head_width);
            for row in row..row + count {
                queries.extend_from_slice(&qkv[row * stride + head * group * head_width..][..group * head_width]);
            }
            let seen: Vec<usize> = (0..count * group).map(|query| position + query / group + 1).collect();
            caches[run.place].0[layer * kv_heads + head].attend(&queries, &seen)
        };
        let found: Vec<Vec<f32>> = if multiplications < WORTH_THREADS {
            parts.iter().map(attend).collect()
        } else {
            parts.par_iter().map(attend).collect()
        };
        attended.resize(first_row * heads * head_width, 0.0);
        for ((_, row, _, _, head), found) in parts.iter().zip(found) {
            for (row, found) in (*row..).zip(found.chunks_exact(group * head_width)) {
                let place = (row * heads + head * group) * head_width;
                attended[place..place + found.len()].copy_from_slice(found);
            }
        }
    }
}

/// Tensors of the flat vector, in layout order.
struct Tensors<'a, 'b>(&'b mut dyn Iterator<Item = &'a [f32]>);

impl<'a> Tensors<'a, '_> {
    fn next(&mut self) -> &'a [f32] {
        self.0.next().expect("as many tensors as the layout of the model has")
    }

    fn layer_norm(&mut self, bias: bool, epsilon: f64) -> Norm {
        let weight = self.next();
        Norm::layer(weight, bias.then(|| self.next()), epsilon)
    }

    fn root_mean_square_norm(&mut self, epsilon: f64) -> Norm {
        Norm::root_mean_square(self.next(), epsilon)
    }

    /// A weight `[depth, columns]`, and its bias where there is one.
    fn affine(&mut self, [depth, columns]: [usize; 2], bias: bool) -> Matrix {
        let part = Part { values: self.next(), columns, transposed: false };
        Matrix::new(depth, &[part], bias.then(|| self.next()))
    }

    /// Weights with `depth` rows, as one.
    fn side_by_side<const N: usize>(&mut self, depth: usize, columns: [usize; N]) -> Matrix {
        let parts = columns.map(|columns| Part { values: self.next(), columns, transposed: false });
        Matrix::new(depth, &parts, None)
    }
}

/// A head `[V, C]`.
fn head(values: &[f32], width: usize) -> Matrix {
    Matrix::new(width, &[Part { values, columns: values.len() / width, transposed: true }], None)
}

impl Rotation {
    /// Sees to it that there are angles for so many positions.
    fn reach(&mut self, positions: usize, head_width: usize) {
        let known = self.cos.len() / (head_width / 2);
        if known < positions {
            let positions = known..positions.next_power_of_two();
            let [cos, sin] = rotary_tables(positions, head_width, self.theta, self.scaling);
            self.cos.extend(cos);
            self.sin.extend(sin);
        }
    }

    /// Cosines and sines of a position.
    fn at(&self, position: usize, half: usize) -> (&[f32], &[f32]) {
        (&self.cos[position * half..][..half], &self.sin[position * half..][..half])
    }
}

impl Cache {
    /// Makes room for so many tokens in all.
    pub(super) fn reserve(&mut self, tokens: usize) {
        self.0.iter_mut().for_each(|head| head.reserve(tokens));
    }

    /// A copy of the first `length` tokens.
    pub(super) fn beginning(&self, length: usize) -> Self {
        Self(self.0.iter().map(|head| head.beginning(length)).collect())
    }

    /// Forgets all tokens from the one numbered `length` on.
    pub(super) fn truncate(&mut self, length: usize) {
        self.0.iter_mut().for_each(|head| head.truncate(length));
    }
}
