//! Bounds on how fast things can be made: what a training step would take if it were matrix products alone, and a token if
//! it were reading weights alone.

use macerator::{AutoArch, Scalar as _, Simd, WithSimd};
use rayon::prelude::*;

use crate::config::ModelConfig;
#[cfg(feature = "cpu")]
use crate::config::Precision;
#[cfg(feature = "cpu")]
use crate::kernels::cpu::product::{Before, Matrix, multiply};
use crate::layout::Layout;

/// Layers of one size, each of which multiplies three times in a training step: rows by weights, and backward for the
/// gradient of either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// Rows of input: tokens of a slot.
    pub rows: usize,
    /// Elements of a row of input.
    pub inputs: usize,
    /// Elements of a row of output.
    pub outputs: usize,
    /// How many there are.
    pub count: usize,
}

/// The matrix products of a training step on `rows` sequences of `length` tokens. Attention multiplies six times, twice
/// forward and four times backward, and half of each product is masked: it counts as two layers from D to T / 2 for each
/// head of each row. Empty for the straight line.
pub fn layers(model: &ModelConfig, rows: usize, length: usize) -> Vec<Layers> {
    let (blocks, heads, head_width, tied_head) = match model {
        ModelConfig::Gpt(gpt) => (gpt.layers, gpt.heads, gpt.width / gpt.heads, gpt.tied_head),
        ModelConfig::Llama(llama) => (llama.layers, llama.heads, llama.head_width(), llama.tied_head),
        ModelConfig::Line(_) => return Vec::new(),
    };
    let layout = Layout::of(model);
    let multiplies = |name: &str| match name {
        "wpe.weight" => false,
        "wte.weight" | "embed_tokens.weight" => tied_head && !model.has_score_head(),
        _ => true,
    };
    let attention = Layers { rows: length, inputs: head_width, outputs: length.div_ceil(2), count: 2 };
    let mut all = vec![Layers { count: 2 * blocks * heads * rows, ..attention }];
    for tensor in layout.tensors.iter().filter(|tensor| multiplies(&tensor.name)) {
        let [inputs, outputs] = tensor.shape[..] else { continue };
        let layer = Layers { rows: rows * length, inputs, outputs, count: 1 };
        match all.iter_mut().find(|known| Layers { count: 1, ..**known } == layer) {
            Some(known) => known.count += 1,
            None => all.push(layer),
        }
    }
    all
}

/// Multiplications and additions of `layers`.
pub fn operations(layers: &[Layers]) -> f64 {
    layers.iter().map(|layer| 6.0 * (layer.rows * layer.inputs * layer.outputs * layer.count) as f64).sum()
}

/// What one of some layers multiplies.
#[cfg(feature = "cpu")]
#[derive(Debug)]
pub struct Operands {
    layers: Layers,
    /// Input, weights, and the gradient of the output.
    given: [Vec<f32>; 3],
    /// Gradients of input and weights, and output.
    found: [Vec<f32>; 3],
}

#[cfg(feature = "cpu")]
impl Operands {
    /// Of any value.
    pub fn new(layers: Layers) -> Self {
        let Layers { rows, inputs, outputs, .. } = layers;
        let given = [rows * inputs, inputs * outputs, rows * outputs].map(|elements| vec![0.5; elements]);
        Self { layers, found: given.clone(), given }
    }

    /// Does the layer's three products in `precision`, on the CPU, with the threads that training uses.
    pub fn multiply(&mut self, precision: Precision) {
        let ([x, weight, upper], [of_x, of_weight, y]) = (&self.given, &mut self.found);
        let Layers { inputs, outputs, .. } = self.layers;
        let [x, weight, upper] = [Matrix::new(x, inputs), Matrix::new(weight, outputs), Matrix::new(upper, outputs)];
        rayon::scope(|_| {
            multiply(y, Before::Replaced, x, weight, precision);
            multiply(of_x, Before::Replaced, upper, weight.transposed(), precision);
            multiply(of_weight, Before::Replaced, x.transposed(), upper, precision);
        });
    }
}

/// Memory as large as a model's weights, to be read as they are for each token.
#[derive(Debug)]
pub struct Weights(Vec<f32>);

impl Weights {
    /// So many bytes, of any value.
    pub fn new(bytes: usize) -> Self {
        Self((0..bytes / size_of::<f32>()).map(|i| (i % 7) as f32).collect())
    }

    /// Reads all of it once, with the threads that inference uses; the sum of what is there.
    pub fn read(&self) -> f32 {
        rayon::scope(|_| {
            let part = self.0.len().div_ceil(rayon::current_num_threads()).max(1);
            self.0.par_chunks(part).map(|part| AutoArch::new().dispatch(Read(part))).sum()
        })
    }
}

struct Read<'a>(&'a [f32]);

impl WithSimd for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self) -> f32 {
        let mut sums = [0f32.splat::<S>(); 8];
        for block in f32::align_to::<S>(self.0).1.as_chunks::<8>().0 {
            for (sum, vector) in sums.iter_mut().zip(block) {
                *sum += *vector;
            }
        }
        bytemuck::cast_slice::<_, f32>(&sums).iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Gelu, GptConfig, LineConfig};

    #[test]
    fn a_steps_products_are_its_linear_layers_its_head_and_half_of_its_attention() {
        let gpt = GptConfig {
            vocab_size: 65,
            context: 64,
            layers: 4,
            heads: 4,
            width: 128,
            bias: true,
            tied_head: false,
            score_head: false,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        let layer = |inputs, outputs, count| Layers { rows: 12 * 64, inputs, outputs, count };
        let attention = Layers { rows: 64, inputs: 32, outputs: 32, count: 2 * 4 * 4 * 12 };
        let linear = [layer(128, 384, 4), layer(128, 128, 4), layer(128, 512, 4), layer(512, 128, 4)];
        let head = layer(65, 128, 1);
        let expected: Vec<Layers> = [attention].into_iter().chain(linear).chain([head]).collect();
        for tied_head in [false, true] {
            let model = ModelConfig::Gpt(GptConfig { tied_head, ..gpt.clone() });
            let mut found = layers(&model, 12, 64);
            found.sort_by_key(|layer| expected.iter().position(|expected| expected == layer));
            assert_eq!(found, expected, "tied head: {tied_head}");
        }
        let multiplied = 6.0 * (768 * (4 * 12 * 128 * 128 + 65 * 128) + 64 * 32 * 32 * 384) as f64;
        assert_eq!(operations(&expected), multiplied);
        assert_eq!(layers(&ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 }), 1, 1), []);
    }
}
