//! Low-rank adapters (Hu et al., arXiv:2106.09685): a model's own parameters stay as they are, and beside chosen projections
//! small ones are trained.
//!
//! With rank r, a projection `y = x W` becomes `y = x W + (α / r) x A B`, of A `[in, r]` and B `[r, out]`. A begins uniform
//! within ±1/√in and B at 0, as in the library `peft`, so that a run begins as the model is. What is trained is a flat vector
//! of its own, which travels, is added up, optimised and saved; the frozen *base* is another one.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::layout::{Layout, TensorSpec};
use crate::random::{Stream, uniform};

/// Which adapters a model is trained with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// r, at least 1.
    pub rank: usize,
    /// α: what adapters add is multiplied by α / r.
    pub alpha: f64,
    /// The projections that have one, by the ends of their names: `c_proj` means those of attention and feed-forward layers
    /// of each block, `attn.c_proj` the first alone.
    pub targets: Vec<String>,
    /// Tensors of the model that the base does not hold, such as a new head: they are trained whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub whole: Vec<String>,
}

/// A name that means no tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no {kind} of this model; there are {there}")]
pub struct UnknownTensor {
    /// What was named.
    pub name: String,
    /// What it should have been.
    pub kind: &'static str,
    /// Those that could be named.
    pub there: String,
}

impl AdapterConfig {
    /// Whether each of the names means a tensor of `model`.
    ///
    /// # Errors
    /// Names the first that means none.
    pub fn check(&self, model: &ModelConfig) -> Result<(), UnknownTensor> {
        let layout = Layout::of(model);
        let projections: Vec<&str> = layout.tensors.iter().filter_map(projection).collect();
        if let Some(target) = self.targets.iter().find(|target| !projections.iter().any(|name| means(target, name))) {
            let there = all_targets(model).join(", ");
            return Err(UnknownTensor { name: target.clone(), kind: "projection", there });
        }
        let names: Vec<&str> = layout.tensors.iter().map(|tensor| &*tensor.name).collect();
        match self.whole.iter().find(|whole| !names.contains(&whole.as_str())) {
            Some(whole) => Err(UnknownTensor { name: whole.clone(), kind: "tensor", there: names.join(", ") }),
            None => Ok(()),
        }
    }

    /// Whether a tensor has an adapter.
    fn adapts(&self, tensor: &TensorSpec) -> bool {
        projection(tensor).is_some_and(|name| self.targets.iter().any(|target| means(target, name)))
    }
}

/// The projections of a model's blocks by the last part of their names, each once, in the order of the layout.
pub fn all_targets(model: &ModelConfig) -> Vec<String> {
    let layout = Layout::of(model);
    let names = layout.tensors.iter().filter_map(projection).filter_map(|name| name.rsplit('.').next());
    let mut seen = BTreeSet::new();
    names.filter(|name| seen.insert(*name)).map(str::to_owned).collect()
}

/// The name of a projection within a block, without `.weight`; `None` of any other tensor.
fn projection(tensor: &TensorSpec) -> Option<&str> {
    let in_block = ["h.", "layers."].iter().any(|blocks| tensor.name.starts_with(blocks));
    tensor.name.strip_suffix(".weight").filter(|_| in_block && tensor.shape.len() == 2)
}

/// Whether a target means the projection of this name: it is its end, from a dot on.
fn means(target: &str, name: &str) -> bool {
    name.strip_suffix(target).is_some_and(|before| before.is_empty() || before.ends_with('.')) && !target.is_empty()
}

/// What is trained of a model: all of it, or its adapters.
pub fn trained_layout(model: &ModelConfig, adapters: Option<&AdapterConfig>) -> Layout {
    match adapters {
        None => Layout::of(model),
        Some(adapters) => AdaptedLayout::of(model, adapters).trained,
    }
}

/// A model's tensors, parted into what is frozen and what is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaptedLayout {
    /// The base: the model's tensors in their order, but for those that are trained whole.
    pub base: Layout,
    /// In the order of the model's tensors, for each projection that has an adapter `NAME.lora_A.weight` `[in, r]` and
    /// `NAME.lora_B.weight` `[r, out]`, and each tensor that is trained whole.
    pub trained: Layout,
    /// Of each tensor of the model, in order.
    origins: Vec<Origin>,
    /// α / r.
    scale: f64,
}

/// Where a tensor of the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The tensor of this index in the base.
    Base(usize),
    /// That of `base` in the base, with A, the tensor `adapter` of what is trained, and B after it.
    Adapted { base: usize, adapter: usize },
    /// The tensor of this index of what is trained.
    Whole(usize),
}

impl AdaptedLayout {
    /// The parts of `model`, whose tensors `adapters` name.
    pub fn of(model: &ModelConfig, adapters: &AdapterConfig) -> Self {
        let [mut base, mut trained] = [(); 2].map(|()| Layout { tensors: Vec::new() });
        let mut origins = Vec::new();
        for tensor in Layout::of(model).tensors {
            if adapters.whole.contains(&tensor.name) {
                origins.push(Origin::Whole(trained.tensors.len()));
                trained.push(tensor.name, &tensor.shape);
                continue;
            }
            let index = base.tensors.len();
            let adapted = adapters.adapts(&tensor).then_some(trained.tensors.len());
            origins.push(adapted.map_or(Origin::Base(index), |adapter| Origin::Adapted { base: index, adapter }));
            if let (Some(_), Some(name), &[inputs, outputs]) = (adapted, projection(&tensor), &tensor.shape[..]) {
                trained.push(format!("{name}.lora_A.weight"), &[inputs, adapters.rank]);
                trained.push(format!("{name}.lora_B.weight"), &[adapters.rank, outputs]);
            }
            base.push(tensor.name, &tensor.shape);
        }
        Self { base, trained, origins, scale: adapters.alpha / adapters.rank as f64 }
    }

    /// Of each tensor of the model, in order.
    pub(crate) fn origins(&self) -> &[Origin] {
        &self.origins
    }

    /// α / r.
    pub(crate) fn scale(&self) -> f64 {
        self.scale
    }

    /// Of a model's parameters, the values of the tensors that are trained whole, one after the other.
    pub fn whole(&self, model: &ModelConfig, parameters: &[f32]) -> Vec<f32> {
        self.selected(model, parameters, |origin| matches!(origin, Origin::Whole(_)))
    }

    /// Of a model's parameters, those of the base.
    pub fn frozen(&self, model: &ModelConfig, parameters: &[f32]) -> Vec<f32> {
        self.selected(model, parameters, |origin| !matches!(origin, Origin::Whole(_)))
    }

    fn selected(&self, model: &ModelConfig, parameters: &[f32], wanted: impl Fn(&Origin) -> bool) -> Vec<f32> {
        let tensors = Layout::of(model).tensors;
        let selected = tensors.iter().zip(&self.origins).filter(|(_, origin)| wanted(origin));
        selected.flat_map(|(tensor, _)| &parameters[tensor.range()]).copied().collect()
    }

    /// The model's own parameters, with `W + (α / r) A B` for each W that has an adapter. Each element is computed in `f64`,
    /// the products in the order of the rank, then times α / r and added to W, and rounded once.
    ///
    /// # Panics
    /// If a vector has not as many elements as its layout.
    pub fn merge(&self, mut base: Vec<f32>, trained: &[f32]) -> Vec<f32> {
        assert_eq!((base.len(), trained.len()), (self.base.len(), self.trained.len()), "elements of base and adapters");
        let of_trained = |index: usize| &trained[self.trained.tensors[index].range()];
        for origin in &self.origins {
            if let Origin::Adapted { base: index, adapter } = *origin {
                let weight = &mut base[self.base.tensors[index].range()];
                let rank = self.trained.tensors[adapter].shape[1];
                add_product(weight, of_trained(adapter), of_trained(adapter + 1), rank, self.scale);
            }
        }
        if self.base.tensors.len() == self.origins.len() {
            return base;
        }
        let tensor = |origin: &Origin| match *origin {
            Origin::Base(index) | Origin::Adapted { base: index, .. } => &base[self.base.tensors[index].range()],
            Origin::Whole(index) => of_trained(index),
        };
        self.origins.iter().map(tensor).collect::<Vec<_>>().concat()
    }
}

/// Adds `scale · a b` to `weight` `[in, out]`, of a `[in, rank]` and b `[rank, out]`.
fn add_product(weight: &mut [f32], a: &[f32], b: &[f32], rank: usize, scale: f64) {
    let width = b.len() / rank;
    weight.par_chunks_mut(width).zip(a.par_chunks(rank)).for_each(|(row, a)| {
        let mut sums = vec![0f64; width];
        for (a, b) in a.iter().zip(b.chunks_exact(width)) {
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += f64::from(*a) * f64::from(*b));
        }
        row.iter_mut().zip(&sums).for_each(|(w, sum)| *w = (f64::from(*w) + scale * sum) as f32);
    });
}

/// What training begins with, a pure function of model, adapters, seed, and the [`whole`](AdaptedLayout::whole) values of
/// tensors that are trained so: A uniform within ±1/√in, which is what `peft` calls Kaiming uniform with a = √5; B at 0.
pub fn initial_adapters(model: &ModelConfig, adapters: &AdapterConfig, seed: u64, mut whole: &[f32]) -> Vec<f32> {
    let layout = AdaptedLayout::of(model, adapters);
    let mut vector = vec![0.0; layout.trained.len()];
    for origin in &layout.origins {
        match *origin {
            Origin::Base(_) => {}
            Origin::Adapted { adapter, .. } => {
                let a = &layout.trained.tensors[adapter];
                let bound = 1.0 / (a.shape[0] as f64).sqrt();
                uniform(seed, Stream::Adapters, adapter as u64, bound, &mut vector[a.range()]);
            }
            Origin::Whole(index) => {
                let tensor = &layout.trained.tensors[index];
                let (values, others) = whole.split_at(tensor.elements());
                vector[tensor.range()].copy_from_slice(values);
                whole = others;
            }
        }
    }
    vector
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Gelu, GptConfig, LineConfig};
    use crate::layout::initial_parameters;

    fn gpt() -> ModelConfig {
        ModelConfig::Gpt(GptConfig {
            vocab_size: 5,
            context: 3,
            layers: 2,
            heads: 1,
            width: 4,
            bias: true,
            tied_head: false,
            score_head: false,
            gelu: Gelu::Exact,
            norm_epsilon: 1e-5,
            dropout: 0.0,
        })
    }

    fn adapters(targets: &[&str], whole: &[&str]) -> AdapterConfig {
        let owned = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        AdapterConfig { rank: 2, alpha: 3.0, targets: owned(targets), whole: owned(whole) }
    }

    fn names(layout: &Layout) -> Vec<&str> {
        layout.tensors.iter().map(|tensor| &*tensor.name).collect()
    }

    #[test]
    fn targets_are_ends_of_names() {
        assert_eq!(all_targets(&gpt()), ["c_attn", "c_proj", "c_fc"]);
        assert_eq!(all_targets(&ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 })), [""; 0]);
        let of = |targets: &[&str]| AdaptedLayout::of(&gpt(), &adapters(targets, &[])).trained;
        let layout = of(&["attn.c_proj", "c_fc"]);
        let expected = ["attn.c_proj.lora_A", "attn.c_proj.lora_B", "mlp.c_fc.lora_A", "mlp.c_fc.lora_B"];
        let expected = [0, 1].iter().flat_map(|i| expected.map(|name| format!("h.{i}.{name}.weight")));
        assert_eq!(names(&layout), expected.collect::<Vec<_>>());
        assert_eq!((&layout.tensors[2].shape[..], &layout.tensors[3].shape[..]), (&[4, 2][..], &[2, 16][..]));
        assert_eq!(layout.len(), 2 * (2 * (4 + 4) + 2 * (4 + 16)));
        assert_eq!(
            names(&of(&["h.1.attn.c_attn"])),
            ["h.1.attn.c_attn.lora_A.weight", "h.1.attn.c_attn.lora_B.weight"]
        );
        assert_eq!(names(&of(&["c_proj"])).len(), 8);
        for wrong in ["", "proj", "wte", "lm_head", "ln_1", "c_attn.weight"] {
            let said = adapters(&["c_fc", wrong], &[]).check(&gpt()).unwrap_err().to_string();
            assert_eq!(said, format!("{wrong:?} is no projection of this model; there are c_attn, c_proj, c_fc"));
        }
        assert!(
            adapters(&["c_fc"], &["score.weight"]).check(&gpt()).unwrap_err().to_string().contains("lm_head.weight")
        );
        adapters(&["c_fc", "mlp.c_proj"], &["lm_head.weight"]).check(&gpt()).unwrap();
    }

    #[test]
    fn what_is_trained_whole_is_not_in_the_base() {
        let layout = AdaptedLayout::of(&gpt(), &adapters(&["h.0.attn.c_attn"], &["h.1.ln_1.bias", "lm_head.weight"]));
        let expected =
            ["h.0.attn.c_attn.lora_A.weight", "h.0.attn.c_attn.lora_B.weight", "h.1.ln_1.bias", "lm_head.weight"];
        assert_eq!(names(&layout.trained), expected);
        let all = Layout::of(&gpt());
        assert_eq!(layout.base.len() + 4 + 5 * 4, all.len());
        let base: Vec<f32> = (0..layout.base.len()).map(|i| i as f32).collect();
        let trained: Vec<f32> = (0..layout.trained.len()).map(|i| -(i as f32) / 8.0).collect();
        let merged = layout.merge(base.clone(), &trained);
        let of = |layout: &Layout, vector: &[f32], name: &str| {
            let tensor = layout.tensors.iter().find(|tensor| tensor.name == name).unwrap();
            vector[tensor.range()].to_vec()
        };
        for name in ["h.1.ln_1.bias", "lm_head.weight"] {
            assert_eq!(of(&all, &merged, name), of(&layout.trained, &trained, name));
        }
        for name in ["wte.weight", "h.1.attn.c_attn.weight", "ln_f.bias"] {
            assert_eq!(of(&all, &merged, name), of(&layout.base, &base, name));
        }
        let (a, b) = (of(&layout.trained, &trained, expected[0]), of(&layout.trained, &trained, expected[1]));
        let weight = of(&layout.base, &base, "h.0.attn.c_attn.weight");
        for (index, found) in of(&all, &merged, "h.0.attn.c_attn.weight").into_iter().enumerate() {
            let (row, column) = (index / 12, index % 12);
            let product = a[2 * row] * b[column] + a[2 * row + 1] * b[12 + column];
            assert_eq!(found, weight[index] + 1.5 * product, "eighths are exact");
        }
    }

    #[test]
    fn training_begins_as_the_model_is() {
        let config = adapters(&["c_attn", "c_proj", "c_fc"], &["lm_head.weight"]);
        let layout = AdaptedLayout::of(&gpt(), &config);
        let all = initial_parameters(&gpt(), 7);
        let whole = layout.whole(&gpt(), &all);
        let initial = initial_adapters(&gpt(), &config, 7, &whole);
        for tensor in &layout.trained.tensors {
            let values = &initial[tensor.range()];
            if tensor.name.ends_with("lora_A.weight") {
                let bound = 1.0 / (tensor.shape[0] as f32).sqrt();
                assert!(values.iter().all(|value| value.abs() <= bound), "{}", tensor.name);
                assert!(values.iter().any(|value| value.abs() > bound / 2.0), "{}", tensor.name);
            } else if tensor.name.ends_with("lora_B.weight") {
                assert!(values.iter().all(|value| *value == 0.0), "{}", tensor.name);
            }
        }
        assert_eq!(initial[layout.trained.len() - 20..], all[all.len() - 20..], "the head is the model's");
        assert_ne!(initial, initial_adapters(&gpt(), &config, 8, &whole));
        let base = all[..all.len() - 20].to_vec();
        assert_eq!(layout.merge(base, &initial), all);
    }
}
