//! A Transformer on the CPU, forward only, over the next tokens of some sequences: what their earlier tokens left is in their
//! caches.
//!
//! What a token comes to depends on its sequence alone, to the bit: not on how many tokens are read at once, or which
//! other sequences are read beside it.
//!
//! Shapes beside the buffers: n tokens of all sequences; C width, H heads of queries, K of keys and values, D width of a head, F
//! feed-forward width, V vocabulary.

mod attention;
mod parameters;

use std::ops::Range;

use super::cache::HeadCache;
use super::matrix::{Matrix, Part};
use super::rows::{Activation, Norm};
use crate::config::{GptConfig, LlamaConfig, ModelConfig, RopeScaling};
use crate::kernels::rotary_tables;
use crate::layout::Layout;

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

impl Run<'_> {
    /// The tokens after which logits are asked for: the last, or none.
    fn answered(&self) -> Range<usize> {
        let end = self.tokens.len();
        if self.wants_logits { end - 1..end } else { end..end }
    }
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
    ///
    /// Of the last layer, tokens after which none are asked for need their keys and values alone.
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
            if self.is_last(index) {
                self.leave_answers(runs, x);
            }
            self.attend(index, qkv, runs, caches, attended);
            layer.attention_output.multiply_onto(attended, x);
            layer.feed_forward_norm.of(x, normed);
            layer.hidden.multiply(normed, hidden);
            layer.activation.of(hidden, layer.hidden.columns(), activated);
            layer.output.multiply_onto(activated, x);
        }
        self.norm.of(x, normed);
        let mut logits = Vec::new();
        self.head.multiply(normed, &mut logits);
        self.buffers = buffers;
        logits.chunks_exact(self.head.columns()).map(<[f32]>::to_vec).collect()
    }

    /// Leaves of all tokens' `x` `[n, C]` those of tokens after which logits are asked for.
    fn leave_answers(&self, runs: &[Run<'_>], x: &mut Vec<f32>) {
        let width = self.sizes.width;
        let (mut first, mut kept) = (0, 0);
        for run in runs {
            for token in run.answered() {
                let row = (first + token) * width;
                x.copy_within(row..row + width, kept);
                kept += width;
            }
            first += run.tokens.len();
        }
        x.truncate(kept);
    }

    fn is_last(&self, layer: usize) -> bool {
        layer + 1 == self.layers.len()
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
