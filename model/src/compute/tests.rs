//! Losses and gradients against what they are by definition.

use super::*;
use crate::adapters::{all_targets, initial_adapters};
use crate::batch::{Column, Values};
use crate::config::{AdamwConfig, DpoConfig, Gelu, GptConfig, LineConfig, LlamaConfig, UpdateRule};
use crate::device::DeviceChoice;
use crate::layout::{SCORE_HEAD, initial_parameters};
use crate::optimizer::{self, OptimizerState};
use crate::random::{Stream, normal};
use crate::tree::add_vectors;

pub(super) const KEY: SlotKey = SlotKey { seed: 1, step: 1, slot: 0 };

pub(super) fn gpt(dropout: f64) -> ModelConfig {
    ModelConfig::Gpt(GptConfig {
        vocab_size: 11,
        context: 8,
        layers: 2,
        heads: 2,
        width: 16,
        bias: true,
        tied_head: false,
        score_head: false,
        gelu: Gelu::Exact,
        norm_epsilon: 1e-5,
        dropout,
    })
}

fn llama(dropout: f64) -> ModelConfig {
    ModelConfig::Llama(LlamaConfig {
        vocab_size: 11,
        context: 8,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        width: 16,
        head_width: None,
        ffn_width: 24,
        qk_norm: true,
        tied_head: true,
        score_head: false,
        rope_theta: 100.0,
        rope_scaling: None,
        norm_epsilon: 1e-5,
        dropout,
    })
}

pub(super) fn batch(rows: usize, weights: Option<Vec<f32>>) -> Batch {
    let (shape, count) = ([rows, 8], rows * 8);
    let column = |name: &str, values| Column { name: name.into(), shape, values };
    let tokens = (0..count).map(|i| ((i * 7919 + 13) % 11) as u32).collect();
    let targets = (0..count).map(|i| ((i * 104_729 + 7) % 11) as u32).collect();
    let mut columns = vec![column("tokens", Values::U32(tokens)), column("targets", Values::U32(targets))];
    columns.extend(weights.map(|weights| column("weights", Values::F32(weights))));
    Batch { columns }
}

fn scoring(model: ModelConfig) -> ModelConfig {
    match model {
        ModelConfig::Gpt(gpt) => ModelConfig::Gpt(GptConfig { score_head: true, ..gpt }),
        ModelConfig::Llama(llama) => ModelConfig::Llama(LlamaConfig { score_head: true, ..llama }),
        line => line,
    }
}

/// Two pairs, of which positions count, or one of each row where a score is read.
pub(super) fn pairs(scores: bool) -> Batch {
    let answers = [2..7, 4..6, 0..8, 7..8].into_iter().enumerate();
    let mut weights = vec![0.0; 32];
    for (row, answer) in answers {
        let answer = if scores { answer.end - 1..answer.end } else { answer };
        weights[row * 8..][answer].fill(1.0);
    }
    let mut batch = batch(4, Some(weights));
    let references = Values::F32(vec![-15.0, -5.0, -20.0, -1.0]);
    batch.columns.push(Column { name: "references".into(), shape: [4, 1], values: references });
    batch
}

pub(super) fn computer(model: &ModelConfig, parameters: &[f32]) -> Computer {
    let mut computer = Computer::new(model, &ComputeDevice::open(DeviceChoice::Cpu).unwrap());
    computer.load(parameters).unwrap();
    computer
}

/// Larger than a run's initial values, so that every path carries a gradient worth comparing.
pub(super) fn lively_parameters(model: &ModelConfig) -> Vec<f32> {
    let mut parameters = initial_parameters(model, 3);
    let mut noise = vec![0.0; parameters.len()];
    normal(5, Stream::Initialisation, 0, 0.15, &mut noise);
    parameters.iter_mut().zip(noise).for_each(|(p, n)| *p += n);
    parameters
}

#[test]
fn an_untrained_model_knows_nothing() {
    for model in [gpt(0.0), llama(0.0)] {
        let sums = computer(&model, &initial_parameters(&model, 1)).loss(&batch(4, None)).unwrap();
        assert_eq!(sums.weight, 32.0);
        assert!((sums.mean() / 11f64.ln() - 1.0).abs() < 0.02, "{}", sums.mean());
    }
}

/// Central differences along a random direction within each tensor, against the gradient.
fn gradients_are_slopes(layout: &Layout, parameters: &[f32], batch: &Batch, computer: impl Fn(&[f32]) -> Computer) {
    let gradient = computer(parameters).gradient(batch, KEY).unwrap().gradient;
    for (index, tensor) in layout.tensors.iter().enumerate() {
        let mut direction = vec![0.0; tensor.elements()];
        normal(9, Stream::Initialisation, index as u64, 1.0, &mut direction);
        let norm = direction.iter().map(|d| d * d).sum::<f32>().sqrt();
        let at = |distance: f32| {
            let mut moved = parameters.to_vec();
            for (p, d) in moved[tensor.range()].iter_mut().zip(&direction) {
                *p += distance * d / norm;
            }
            // The gradient path, so that dropout is the same.
            computer(&moved).gradient(batch, KEY).unwrap().sums.loss
        };
        let measured = (at(2e-3) - at(-2e-3)) / 4e-3;
        let along = gradient[tensor.range()].iter().zip(&direction);
        let along: f64 = along.map(|(g, d)| f64::from(g * d / norm)).sum();
        let scale = gradient[tensor.range()].iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        assert!((measured - along).abs() < 0.02 * scale + 0.02, "{}: {measured} is not {along}", tensor.name);
    }
}

#[test]
fn gradients_are_finite_differences() {
    let weighted = || batch(3, Some((0..24).map(|i| [1.0, 0.5, 0.0, 2.0][i % 4]).collect()));
    let dpo = Objective::Dpo(DpoConfig { beta: 0.7, label_smoothing: 0.1 });
    for (model, objective, batch) in [
        (gpt(0.0), Objective::NextToken, weighted()),
        (gpt(0.3), Objective::NextToken, batch(3, None)),
        (llama(0.0), Objective::NextToken, weighted()),
        (llama(0.3), Objective::NextToken, batch(3, None)),
        (scoring(gpt(0.3)), Objective::Reward, pairs(true)),
        (scoring(llama(0.0)), Objective::Reward, pairs(true)),
        (gpt(0.3), dpo, pairs(false)),
        (llama(0.0), dpo, pairs(false)),
    ] {
        let parameters = lively_parameters(&model);
        let of = |computer: Computer| computer.with_objective(objective);
        gradients_are_slopes(&Layout::of(&model), &parameters, &batch, |moved| of(computer(&model, moved)));
        let whole: &[&str] = if objective == Objective::Reward { &[SCORE_HEAD] } else { &[] };
        let (config, base) = (adapters(&model, whole), parameters);
        let (layout, trained) = (AdaptedLayout::of(&model, &config), lively_adapters(&model, &config));
        gradients_are_slopes(&layout.trained, &trained, &batch, |moved| of(adapting(&model, &config, &base, moved)));
    }
}

pub(super) fn adapters(model: &ModelConfig, whole: &[&str]) -> AdapterConfig {
    let whole = whole.iter().map(|name| name.to_string()).collect();
    AdapterConfig { rank: 3, alpha: 6.0, targets: all_targets(model), whole }
}

/// A computer with adapters, whose base is all of `parameters` but what is trained whole.
pub(super) fn adapting(model: &ModelConfig, adapters: &AdapterConfig, parameters: &[f32], trained: &[f32]) -> Computer {
    let mut computer = Computer::new(model, &ComputeDevice::open(DeviceChoice::Cpu).unwrap()).with_adapters(adapters);
    let base = AdaptedLayout::of(model, adapters).frozen(model, parameters);
    computer.stand_on(computer.base(&base).unwrap());
    computer.load(trained).unwrap();
    computer
}

/// Lively, too, B included.
pub(super) fn lively_adapters(model: &ModelConfig, adapters: &AdapterConfig) -> Vec<f32> {
    let whole = AdaptedLayout::of(model, adapters).whole(model, &lively_parameters(model));
    let mut trained = initial_adapters(model, adapters, 3, &whole);
    let mut noise = vec![0.0; trained.len()];
    normal(6, Stream::Initialisation, 0, 0.1, &mut noise);
    trained.iter_mut().zip(noise).for_each(|(p, n)| *p += n);
    trained
}

/// Loss and gradient of a model with adapters beside those of the merged model, of which they follow: with W' = W + s A B,
/// dA = s dW' Bᵀ, dB = s Aᵀ dW', and what is trained whole has its own.
#[test]
fn adapters_gradients_follow_from_the_merged_models() {
    for (model, whole) in [
        (gpt(0.3), &["lm_head.weight", "h.1.ln_2.bias", "wpe.weight"][..]),
        (llama(0.3), &["layers.0.input_layernorm.weight"]),
        (gpt(0.0), &[]),
        (llama(0.0), &[]),
    ] {
        let (config, parameters) = (adapters(&model, whole), lively_parameters(&model));
        let (layout, trained) = (AdaptedLayout::of(&model, &config), lively_adapters(&model, &config));
        let with_adapters = adapting(&model, &config, &parameters, &trained);
        let all = Layout::of(&model);
        let merged = computer(&model, &layout.merge(layout.frozen(&model, &parameters), &trained));
        let batch = batch(3, Some((0..24).map(|i| [1.0, 0.5, 0.0, 2.0][i % 4]).collect()));
        let found = with_adapters.gradient(&batch, KEY).unwrap();
        let whole = merged.gradient(&batch, KEY).unwrap();
        assert!((found.sums.loss / whole.sums.loss - 1.0).abs() < 1e-6, "{found:?} {whole:?}");
        assert!((with_adapters.loss(&batch).unwrap().loss / merged.loss(&batch).unwrap().loss - 1.0).abs() < 1e-6);
        let logits = [&with_adapters, &merged].map(|computer| computer.next_token_logits(&[1, 2, 3]).unwrap());
        assert!(logits[0].iter().zip(&logits[1]).all(|(a, b)| (a - b).abs() < 1e-5), "{logits:?}");

        let scale = config.alpha / config.rank as f64;
        let close = |name: &str, found: &[f32], expected: &[f64]| {
            let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let norm = square(&mut expected.iter().copied());
            let difference = square(&mut found.iter().zip(expected).map(|(f, e)| f64::from(*f) - e));
            assert!(norm > 0.0 && difference < 1e-4 * norm, "{name}: off by {}", difference / norm);
        };
        for (tensor, origin) in all.tensors.iter().zip(layout.origins()) {
            let upper = &whole.gradient[tensor.range()];
            let trained_tensor = |index: usize| &layout.trained.tensors[index];
            match *origin {
                Origin::Base(_) => {}
                Origin::Whole(index) => {
                    let expected: Vec<f64> = upper.iter().map(|g| f64::from(*g)).collect();
                    close(&tensor.name, &found.gradient[trained_tensor(index).range()], &expected);
                }
                Origin::Adapted { adapter, .. } => {
                    let (a, b) = (trained_tensor(adapter), trained_tensor(adapter + 1));
                    let (inputs, rank, outputs) = (a.shape[0], a.shape[1], b.shape[1]);
                    let at = |x: &[f32], row: usize, width: usize, column: usize| f64::from(x[row * width + column]);
                    let (of_a, of_b) = (&trained[a.range()], &trained[b.range()]);
                    let product = |i: usize, k: usize| {
                        let sum = (0..outputs).map(|j| at(upper, i, outputs, j) * at(of_b, k, outputs, j));
                        scale * sum.sum::<f64>()
                    };
                    let expected: Vec<f64> =
                        (0..inputs).flat_map(|i| (0..rank).map(move |k| (i, k))).map(|(i, k)| product(i, k)).collect();
                    close(&a.name, &found.gradient[a.range()], &expected);
                    let product = |k: usize, j: usize| {
                        let sum = (0..inputs).map(|i| at(of_a, i, rank, k) * at(upper, i, outputs, j));
                        scale * sum.sum::<f64>()
                    };
                    let expected: Vec<f64> =
                        (0..rank).flat_map(|k| (0..outputs).map(move |j| (k, j))).map(|(k, j)| product(k, j)).collect();
                    close(&b.name, &found.gradient[b.range()], &expected);
                }
            }
        }
    }
}

#[test]
fn a_base_with_new_adapters_is_as_it_was() {
    for model in [gpt(0.0), llama(0.0)] {
        let (config, parameters) = (adapters(&model, &[]), lively_parameters(&model));
        let computer_with = adapting(&model, &config, &parameters, &initial_adapters(&model, &config, 1, &[]));
        let losses = [&computer_with, &computer(&model, &parameters)].map(|c| c.loss(&batch(4, None)).unwrap());
        assert_eq!(losses[0], losses[1]);
        let gradient = computer_with.gradient(&batch(4, None), KEY).unwrap().gradient;
        for tensor in &computer_with.layout().tensors {
            let moves = gradient[tensor.range()].iter().any(|g| *g != 0.0);
            assert_eq!(moves, tensor.name.ends_with("lora_B.weight"), "{}: A's gradient is B's multiple", tensor.name);
        }
        assert!(matches!(computer_with.base(&parameters[1..]), Err(ComputeError::Parameters { .. })));
    }
}

#[test]
fn slots_add_up_to_the_whole_batch() {
    [gpt(0.0), llama(0.0)].iter().for_each(slots_of_a_model_add_up);
}

fn slots_of_a_model_add_up(model: &ModelConfig) {
    let computer = computer(model, &lively_parameters(model));
    let whole = computer.gradient(&batch(4, None), KEY).unwrap();
    let part = |rows: std::ops::Range<usize>| {
        let whole = batch(4, None);
        let columns = whole.columns.into_iter().map(|column| {
            let Values::U32(values) = column.values else { unreachable!("tokens and targets") };
            let values = Values::U32(values[rows.start * 8..rows.end * 8].to_vec());
            Column { shape: [rows.len(), 8], values, ..column }
        });
        computer.gradient(&Batch { columns: columns.collect() }, KEY).unwrap()
    };
    for parts in [vec![0..2, 2..4], vec![0..1, 1..2, 2..3, 3..4]] {
        let parts: Vec<SlotGradient> = parts.into_iter().map(part).collect();
        let loss: f64 = parts.iter().map(|part| part.sums.loss).sum();
        let sum = parts.into_iter().map(|part| part.gradient).reduce(|a, b| add_vectors(a, &b)).unwrap();
        let difference: Vec<f32> = sum.iter().zip(&whole.gradient).map(|(a, b)| a - b).collect();
        assert!((loss / whole.sums.loss - 1.0).abs() < 1e-6);
        assert!(crate::pieces::l2_norm(&difference) < 1e-5 * crate::pieces::l2_norm(&whole.gradient));
    }
}

#[test]
fn a_row_is_worth_what_its_positions_are() {
    for model in [gpt(0.3), llama(0.3)] {
        let computer = computer(&model, &lively_parameters(&model));
        let values = computer.row_values(&pairs(false)).unwrap();
        let losses = computer.row_losses(&pairs(false)).unwrap();
        assert!(
            values.iter().zip(&losses).all(|(value, sums)| f64::from(-value) == sums.loss),
            "{values:?} {losses:?}"
        );
        let dpo = DpoConfig { beta: 0.7, label_smoothing: 0.0 };
        let computer = computer.with_objective(Objective::Dpo(dpo));
        let sums = computer.loss(&pairs(false)).unwrap();
        assert_eq!(sums, crate::preference::dpo_loss(&values, &[-15.0, -5.0, -20.0, -1.0], dpo).sums);
    }
}

#[test]
fn an_objective_needs_the_head_that_it_is_about() {
    let refused = |model: ModelConfig, objective| {
        let parameters = lively_parameters(&model);
        let computer = computer(&model, &parameters).with_objective(objective);
        computer.gradient(&pairs(objective == Objective::Reward), KEY).unwrap_err().to_string()
    };
    assert!(refused(scoring(gpt(0.0)), Objective::NextToken).contains("scores texts"));
    assert!(refused(gpt(0.0), Objective::Reward).contains("predicts tokens"));
}

#[test]
fn documents_in_one_row_are_as_those_in_rows_of_their_own() {
    for model in [gpt(0.0), llama(0.0)] {
        let computer = computer(&model, &lively_parameters(&model));
        let whole = batch(1, None);
        let part = |range: std::ops::Range<usize>| {
            let columns = whole.columns.iter().map(|column| {
                let Values::U32(values) = &column.values else { unreachable!("tokens and targets") };
                Column {
                    name: column.name.clone(),
                    shape: [1, range.len()],
                    values: Values::U32(values[range.clone()].to_vec()),
                }
            });
            computer.gradient(&Batch { columns: columns.collect() }, KEY).unwrap()
        };
        let mut packed = whole.clone();
        let segments = Values::U32([4, 4, 4, 4, 4, 1, 1, 1].into());
        packed.columns.push(Column { name: "segments".into(), shape: [1, 8], values: segments });
        let packed = computer.gradient(&packed, KEY).unwrap();
        let (first, second) = (part(0..5), part(5..8));
        assert!((packed.sums.loss / (first.sums.loss + second.sums.loss) - 1.0).abs() < 1e-6);
        let apart = add_vectors(first.gradient, &second.gradient);
        let difference: Vec<f32> = apart.iter().zip(&packed.gradient).map(|(a, b)| a - b).collect();
        assert!(crate::pieces::l2_norm(&difference) < 1e-5 * crate::pieces::l2_norm(&apart));
        assert_ne!(packed.sums, computer.gradient(&whole, KEY).unwrap().sums);
    }
}

#[test]
fn a_block_is_the_same_added_on_the_device_or_here() {
    let model = gpt(0.2);
    let mut computer = computer(&model, &lively_parameters(&model));
    assert!(computer.adds_exactly, "a CPU adds as a CPU does");
    let slots: Vec<(Batch, SlotKey)> = (0..5).map(|slot| (batch(1, None), SlotKey { slot, ..KEY })).collect();
    let block = |computer: &Computer| {
        let slots = slots.iter().map(|(batch, key)| Ok((batch, *key)));
        computer.block_gradient(slots, GradientFormat::F32).unwrap()
    };
    let there = block(&computer);
    computer.adds_exactly = false;
    let here = block(&computer);
    assert_eq!((there.slot_sums, &there.gradient), (here.slot_sums, &here.gradient));
    let single = |slot: usize| computer.gradient(&slots[slot].0, slots[slot].1).unwrap().gradient;
    let pair = |slot| add_vectors(single(slot), &single(slot + 1));
    assert_eq!(here.gradient, add_vectors(add_vectors(pair(0), &pair(2)), &single(4)));
    assert!(computer.block_gradient(std::iter::empty(), GradientFormat::F32).is_err());
}

#[test]
fn a_block_is_rounded_at_each_of_its_nodes() {
    let model = gpt(0.2);
    let computer = computer(&model, &lively_parameters(&model));
    // Slots 4 to 6 are what exists of block 2/1.
    let slots: Vec<(Batch, SlotKey)> = (4..7).map(|slot| (batch(1, None), SlotKey { slot, ..KEY })).collect();
    for format in [GradientFormat::Bf16, GradientFormat::Int8] {
        let rounding = Rounding { format, seed: KEY.seed, step: KEY.step };
        let leaf = |slot: usize| {
            let mut gradient = computer.gradient(&slots[slot].0, slots[slot].1).unwrap().gradient;
            rounding.round(Block::leaf(4 + slot as u32), &mut gradient);
            gradient
        };
        let pair = rounding.add(leaf(0), &leaf(1), Block { level: 1, index: 2 });
        let expected = rounding.add(pair, &leaf(2), Block { level: 2, index: 1 });
        let block = computer.block_gradient(slots.iter().map(|(batch, key)| Ok((batch, *key))), format).unwrap();
        assert_eq!(block.gradient, expected);
        assert_eq!(block.slot_sums[0], computer.gradient(&slots[0].0, slots[0].1).unwrap().sums);
    }
}

#[test]
fn dropout_depends_on_its_key_alone() {
    let model = gpt(0.2);
    let computer = computer(&model, &lively_parameters(&model));
    let batch = batch(2, None);
    let first = computer.gradient(&batch, KEY).unwrap();
    let again = computer.gradient(&batch, KEY).unwrap();
    let other = computer.gradient(&batch, SlotKey { slot: 1, ..KEY }).unwrap();
    assert_eq!(first.gradient, again.gradient);
    assert_ne!(first.sums, other.sums);
    assert_eq!(computer.loss(&batch).unwrap(), computer.loss(&batch).unwrap());
}

#[test]
fn one_batch_can_be_learnt_by_heart() {
    let model = gpt(0.0);
    let rule = UpdateRule::Adamw(AdamwConfig { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 });
    let mut parameters = initial_parameters(&model, 1);
    let mut state = OptimizerState::new(&rule, parameters.len());
    let (mut computer, batch, mut loss) = (computer(&model, &parameters), batch(2, None), f64::MAX);
    for step in 1..=150 {
        let slot = computer.gradient(&batch, KEY).unwrap();
        loss = slot.sums.mean();
        let (gradient_sum, weight_sum) = (slot.gradient.as_slice(), slot.sums.weight);
        let update = optimizer::Update { gradient_sum, weight_sum, grad_clip: Some(1.0), lr: 1e-2, step };
        optimizer::step(&rule, computer.layout(), &mut parameters, &mut state, update);
        computer.load(&parameters).unwrap();
    }
    assert!(loss < 0.05, "{loss}");
}

#[test]
fn the_lines_gradient_is_plain_arithmetic() {
    let model = ModelConfig::Line(LineConfig { weight: 0.35, bias: 0.01 });
    let computer = computer(&model, &[0.35, 0.01]);
    let x: Vec<f32> = (0..5).map(|x| x as f32).collect();
    let column =
        |name: &str, values: Vec<f32>| Column { name: name.into(), shape: [5, 1], values: Values::F32(values) };
    let y = x.iter().map(|x| x + 1.0).collect();
    let slot = computer.gradient(&Batch { columns: vec![column("x", x.clone()), column("y", y)] }, KEY).unwrap();
    let (mut loss, mut weight, mut bias) = (0f32, 0f32, 0f32);
    for x in x {
        let error = x * 0.35f32 + 0.01 - (x + 1.0);
        loss += error * error;
        weight += x * (error + error);
        bias += error + error;
    }
    assert_eq!(slot.gradient, [weight, bias]);
    assert_eq!(slot.sums, Sums { loss: f64::from(loss), weight: 5.0, ..Sums::default() });
}

#[test]
fn input_outside_the_model_is_refused_in_words() {
    let model = gpt(0.0);
    let computer = computer(&model, &initial_parameters(&model, 1));
    let mut wrong = batch(1, None);
    wrong.columns[0].values = Values::U32(vec![11; 8]);
    let error = computer.loss(&wrong).unwrap_err().to_string();
    assert_eq!(error, "tokens: token 11 in a vocabulary of 11");
    wrong.columns.remove(1);
    assert!(matches!(computer.loss(&wrong), Err(ComputeError::Batch(_))));
}
