//! A replica's own steps between two versions of the parameters: DiLoCo (Douillard et al. 2023, arXiv:2311.08105).
//!
//! A slot is a replica. From the published parameters it takes a step of the optimizer for each part of its rows, and what
//! travels is the way back: the parameters at the start minus those at the end, which takes the place of a gradient. Moments
//! begin at 0, or come with the slot and travel on beside its way: in either case a slot is a function of what is sent, whoever
//! computes it and however often.

use super::{BlockGradient, ComputeError, Computer, SlotGradient, SlotKey, copied_from, leaves};
use crate::batch::{Batch, Sums};
use crate::compression::GradientFormat;
use crate::config::LocalOptimizer;
use crate::optimizer::{self, OptimizerState, Update};

/// What a replica does by itself.
#[derive(Clone, Copy, Debug)]
pub struct LocalSteps<'a> {
    /// How it follows its gradients.
    pub optimizer: &'a LocalOptimizer,
    /// The learning rate of each step, in order; at least one.
    pub learning_rates: &'a [f64],
    /// Of the one replica of a block whose optimizer keeps moments, [as they were](OptimizerState::into_moments); empty: 0.
    pub moments: &'a [f32],
}

impl Computer {
    /// What replicas learn, each from one of `slots` (at least one, in order): of each, the sums over its local steps; and the
    /// sum of their pseudo-gradients along the tree, at whose nodes they are rounded to `format`. Where moments are kept, a block is one slot, and they stand behind its
    /// pseudo-gradient. `go_on` is asked before each local step. The parameters that are loaded stay as they are.
    ///
    /// # Errors
    /// The first of `go_on`; else if a batch cannot be cut into as many parts as there are local steps, or does not fit the
    /// model; if moments are kept of several slots, or are not as many as they should be; or if the device fails.
    pub fn block_pseudo_gradient<'a>(
        &self,
        local: LocalSteps<'_>,
        slots: impl ExactSizeIterator<Item = (&'a Batch, SlotKey)>,
        format: GradientFormat,
        go_on: impl Fn() -> Result<(), ComputeError>,
    ) -> Result<BlockGradient, ComputeError> {
        if local.optimizer.keep_moments && slots.len() > 1 {
            return Err(ComputeError::Input("a block of several slots, whose moments cannot be added up".into()));
        }
        let published = self.parameters()?;
        let mut slot_sums = Vec::with_capacity(slots.len());
        let pseudo_gradients = slots.map(|slot| {
            let SlotGradient { sums, gradient } = self.replica(&published, local, slot, &go_on)?;
            slot_sums.push(sums);
            Ok((slot.1, gradient))
        });
        let gradient = self.sum_rounded(pseudo_gradients, format)?;
        Ok(BlockGradient { slot_sums, gradient })
    }

    /// Sums over one replica's local steps, and its pseudo-gradient.
    fn replica(
        &self,
        published: &[f32],
        LocalSteps { optimizer, learning_rates, moments }: LocalSteps<'_>,
        (batch, key): (&Batch, SlotKey),
        go_on: &impl Fn() -> Result<(), ComputeError>,
    ) -> Result<SlotGradient, ComputeError> {
        let LocalOptimizer { rule, grad_clip, .. } = optimizer;
        let steps = learning_rates.len() as u64;
        let before = (key.step - 1) * steps;
        let mut parameters = published.to_vec();
        let (elements, kept) = (moments.len(), optimizer.kept_moments() * parameters.len());
        let mut state = match elements {
            0 => OptimizerState::new(rule, parameters.len()),
            _ if elements == kept => OptimizerState::with_moments(moments.to_vec(), parameters.len()),
            _ => return Err(ComputeError::Input(format!("{elements} moments of a replica, which should be {kept}"))),
        };
        let mut on_device = self.leaves.clone();
        let mut sums = Sums::default();
        for ((step, part), &lr) in (1..).zip(batch.parts(learning_rates.len())?).zip(learning_rates) {
            go_on()?;
            let key = SlotKey { step: before + step, ..key };
            let SlotGradient { sums: of_part, gradient } = self.gradient_at(&on_device, (&part, key))?;
            let (gradient_sum, weight_sum, grad_clip) = (&gradient[..], of_part.weight, *grad_clip);
            // By which moments that began at 0 are corrected.
            let step_of_moments = if optimizer.keep_moments { before + step } else { step };
            let update = Update { gradient_sum, weight_sum, grad_clip, lr, step: step_of_moments };
            optimizer::step(rule, &self.layout, &mut parameters, &mut state, update);
            self.reuse(gradient);
            sums = sums + of_part;
            if step < steps {
                let Ok(moved) = leaves(&self.layout, &self.device, true, copied_from(&parameters));
                on_device = moved;
            }
        }
        parameters.iter_mut().zip(published).for_each(|(end, start)| *end = start - *end);
        if optimizer.keep_moments {
            parameters.extend(state.into_moments());
        }
        Ok(SlotGradient { sums, gradient: parameters })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::tests::{
        KEY, adapters, adapting, batch, computer, gpt, lively_adapters, lively_parameters, pairs,
    };
    use super::*;
    use crate::batch::Values;
    use crate::config::{AdamwConfig, DpoConfig, MuonConfig, NesterovConfig, Objective, UpdateRule};
    use crate::layout::Layout;
    use crate::tree::add_vectors;

    const ADAMW: AdamwConfig = AdamwConfig { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
    const RATES: [f64; 3] = [1e-3, 2e-3, 1.5e-3];

    fn optimizer(rule: UpdateRule) -> LocalOptimizer {
        LocalOptimizer { rule, grad_clip: Some(1.0), keep_moments: false }
    }

    fn no_end() -> Result<(), ComputeError> {
        Ok(())
    }

    /// The definition: load, compute, take a step, and so on.
    fn plain_loop(
        computer: &mut Computer,
        start: &[f32],
        local: LocalSteps<'_>,
        slot: &Batch,
        key: SlotKey,
    ) -> Vec<f32> {
        let (mut parameters, layout) = (start.to_vec(), computer.layout().clone());
        let LocalSteps { optimizer: LocalOptimizer { rule, grad_clip, .. }, learning_rates, .. } = local;
        let mut state = OptimizerState::new(rule, parameters.len());
        let before = (key.step - 1) * learning_rates.len() as u64;
        for ((step, part), &lr) in (1..).zip(slot.parts(learning_rates.len()).unwrap()).zip(learning_rates) {
            computer.load(&parameters).unwrap();
            let key = SlotKey { step: before + step, ..key };
            let SlotGradient { sums: Sums { weight: weight_sum, .. }, gradient } =
                computer.gradient(&part, key).unwrap();
            let update = Update { gradient_sum: &gradient, weight_sum, grad_clip: *grad_clip, lr, step };
            optimizer::step(rule, &layout, &mut parameters, &mut state, update);
        }
        computer.load(start).unwrap();
        start.iter().zip(parameters).map(|(start, end)| start - end).collect()
    }

    #[test]
    fn replicas_take_the_steps_of_a_plain_loop_and_are_added_along_the_tree() {
        let (model, slot) = (gpt(0.2), batch(6, Some((0..48).map(|i| [1.0, 0.5, 0.0, 2.0][i % 4]).collect())));
        let parameters = lively_parameters(&model);
        let rules = [
            UpdateRule::Adamw(ADAMW),
            UpdateRule::Muon(MuonConfig { momentum: 0.95, adamw: ADAMW }),
            UpdateRule::Nesterov(NesterovConfig { momentum: 0.9 }),
            UpdateRule::Sgd,
        ];
        for rule in rules {
            let optimizer = optimizer(rule);
            let local = LocalSteps { optimizer: &optimizer, learning_rates: &RATES, moments: &[] };
            let mut computer = computer(&model, &parameters);
            let loss = computer.loss(&slot).unwrap();
            let keys = [0, 1, 2].map(|number| SlotKey { step: 5, slot: number, ..KEY });
            let slots = keys.iter().map(|key| (&slot, *key));
            let block = computer.block_pseudo_gradient(local, slots, GradientFormat::F32, no_end).unwrap();
            assert_eq!(computer.loss(&slot).unwrap(), loss, "the loaded parameters stay");
            assert!(block.slot_sums.iter().all(|sums| sums.weight == 42.0));
            let [first, second, third] = keys.map(|key| plain_loop(&mut computer, &parameters, local, &slot, key));
            assert_ne!(first, second, "dropout tells slots apart");
            assert_eq!(block.gradient, add_vectors(add_vectors(first, &second), &third));
        }
    }

    /// Masks of one local step are those of no other.
    #[test]
    fn dropout_differs_from_step_to_step() {
        let model = gpt(0.4);
        let optimizer = optimizer(UpdateRule::Sgd);
        let mut rows = batch(1, None);
        for column in &mut rows.columns {
            column.shape[0] = 2;
            if let Values::U32(values) = &mut column.values {
                values.extend_from_within(..);
            }
        }
        let learned = |learning_rates: &[f64]| {
            let local = LocalSteps { optimizer: &optimizer, learning_rates, moments: &[] };
            let computer = computer(&model, &lively_parameters(&model));
            computer
                .block_pseudo_gradient(local, [(&rows, KEY)].into_iter(), GradientFormat::F32, no_end)
                .unwrap()
                .gradient
        };
        // A step that hardly moves, then one that does: of the second part's gradient, which has the rows of the first.
        let (second, first) = (learned(&[1e-30, 1e-2]), learned(&[1e-2, 1e-30]));
        let distance = second.iter().zip(&first).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(distance > 1e-5, "{distance}");
    }

    /// One replica, one step, an outer rate of 1 without momentum.
    #[test]
    fn the_smallest_case_is_a_plain_step() {
        let model = gpt(0.1);
        let (start, slot, layout) = (lively_parameters(&model), batch(3, None), Layout::of(&model));
        let inner = optimizer(UpdateRule::Adamw(ADAMW));
        let computer = computer(&model, &start);
        let SlotGradient { sums, gradient } = computer.gradient(&slot, KEY).unwrap();
        let mut plain = start.clone();
        let update =
            Update { gradient_sum: &gradient, weight_sum: sums.weight, grad_clip: Some(1.0), lr: 1e-2, step: 1 };
        optimizer::step(&inner.rule, &layout, &mut plain, &mut OptimizerState::new(&inner.rule, start.len()), update);

        let local = LocalSteps { optimizer: &inner, learning_rates: &[1e-2], moments: &[] };
        let block =
            computer.block_pseudo_gradient(local, [(&slot, KEY)].into_iter(), GradientFormat::F32, no_end).unwrap();
        assert_eq!(block.slot_sums, [sums]);
        let outer = UpdateRule::Nesterov(NesterovConfig { momentum: 0.0 });
        let (mut parameters, mut state) = (start.clone(), OptimizerState::new(&outer, start.len()));
        let update = Update { gradient_sum: &block.gradient, weight_sum: 1.0, grad_clip: None, lr: 1.0, step: 1 };
        optimizer::step(&outer, &layout, &mut parameters, &mut state, update);
        assert_ne!(parameters, start);
        for (ours, plain) in parameters.iter().zip(plain) {
            assert!((ours - plain).abs() <= f32::EPSILON * plain.abs().max(1e-2), "{ours} is not {plain}");
        }
    }

    #[test]
    fn adapters_and_pairs_take_local_steps_too() {
        let optimizer = optimizer(UpdateRule::Adamw(ADAMW));
        let local = LocalSteps { optimizer: &optimizer, learning_rates: &RATES[..2], moments: &[] };
        let model = gpt(0.0);
        let config = adapters(&model, &["wpe.weight"]);
        let start = lively_adapters(&model, &config);
        let mut with_adapters = adapting(&model, &config, &lively_parameters(&model), &start);
        let slot = batch(4, None);
        let block = with_adapters
            .block_pseudo_gradient(local, [(&slot, KEY)].into_iter(), GradientFormat::F32, no_end)
            .unwrap();
        assert_eq!(block.gradient, plain_loop(&mut with_adapters, &start, local, &slot, KEY));

        let start = lively_parameters(&model);
        let dpo = Objective::Dpo(DpoConfig { beta: 0.7, label_smoothing: 0.1 });
        let mut computer = computer(&model, &start).with_objective(dpo);
        let slot = pairs(false);
        let block =
            computer.block_pseudo_gradient(local, [(&slot, KEY)].into_iter(), GradientFormat::F32, no_end).unwrap();
        assert_eq!(block.slot_sums[0].weight, 2.0, "two pairs, one in each step");
        assert_eq!(block.gradient, plain_loop(&mut computer, &start, local, &slot, KEY));
    }

    /// Two rounds from one another's parameters and moments are one long round.
    #[test]
    fn moments_that_are_kept_go_on_where_they_were() {
        let model = gpt(0.2);
        let (start, slot, layout) = (lively_parameters(&model), batch(6, None), Layout::of(&model));
        for rule in [UpdateRule::Adamw(ADAMW), UpdateRule::Nesterov(NesterovConfig { momentum: 0.9 }), UpdateRule::Sgd]
        {
            let kept = LocalOptimizer { keep_moments: true, ..optimizer(rule) };
            let round = |step, parameters: &[f32], rows, learning_rates: &[f64], moments: &[f32]| {
                let (computer, rows) = (computer(&model, parameters), slot.rows(rows).unwrap());
                let local = LocalSteps { optimizer: &kept, learning_rates, moments };
                let slot = (&rows, SlotKey { step, ..KEY });
                let mut vector = computer
                    .block_pseudo_gradient(local, [slot].into_iter(), GradientFormat::F32, no_end)
                    .unwrap()
                    .gradient;
                let moments = vector.split_off(layout.len());
                assert_eq!(moments.len(), kept.rule.moments() * layout.len());
                let end: Vec<f32> = parameters.iter().zip(vector).map(|(start, way)| start - way).collect();
                (end, moments)
            };
            let (half, moments) = round(1, &start, 0..3, &RATES, &[]);
            let (end, last) = round(2, &half, 3..6, &RATES, &moments);
            let (whole, expected) = round(1, &start, 0..6, &[RATES, RATES].concat(), &[]);
            let distance =
                |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
            let off = |end: &[f32]| distance(end, &whole) / distance(&whole, &start);
            // There and back again rounds, and AdamW makes much of gradients that are rounding alone.
            assert!(off(&end) < 0.01, "{:?}: {} of the way off", kept.rule, off(&end));
            let moments_off = distance(&last, &expected) / distance(&expected, &vec![0.0; expected.len()]);
            assert!(last.is_empty() || moments_off < 0.01, "{:?}: {moments_off}", kept.rule);
            let forgetful = off(&round(2, &half, 3..6, &RATES, &[]).0);
            assert!(kept.rule.moments() == 0 || forgetful > 0.05, "{:?}: {forgetful}: they matter", kept.rule);
        }
    }

    #[test]
    fn kept_moments_are_of_one_slot() {
        let model = gpt(0.0);
        let kept = LocalOptimizer { keep_moments: true, ..optimizer(UpdateRule::Adamw(ADAMW)) };
        let (computer, slot) = (computer(&model, &lively_parameters(&model)), batch(3, None));
        let refused = |moments: &[f32], slots: usize| {
            let local = LocalSteps { optimizer: &kept, learning_rates: &RATES, moments };
            let slots = vec![(&slot, KEY); slots];
            computer
                .block_pseudo_gradient(local, slots.into_iter(), GradientFormat::F32, no_end)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(refused(&[], 2), "a block of several slots, whose moments cannot be added up");
        let elements = 2 * computer.layout().len();
        assert_eq!(refused(&[0.0], 1), format!("1 moments of a replica, which should be {elements}"));
    }

    #[test]
    fn what_is_not_wanted_ends_between_two_local_steps() {
        let model = gpt(0.0);
        let optimizer = optimizer(UpdateRule::Sgd);
        let local = LocalSteps { optimizer: &optimizer, learning_rates: &RATES, moments: &[] };
        let (computer, slot, asked) = (computer(&model, &lively_parameters(&model)), batch(3, None), Cell::new(0));
        let go_on = || {
            asked.set(asked.get() + 1);
            if asked.get() == 3 { Err(ComputeError::Input("enough".into())) } else { Ok(()) }
        };
        let said =
            computer.block_pseudo_gradient(local, [(&slot, KEY)].into_iter(), GradientFormat::F32, go_on).unwrap_err();
        assert_eq!((said.to_string().as_str(), asked.get()), ("enough", 3));

        let said = computer
            .block_pseudo_gradient(local, [(&batch(4, None), KEY)].into_iter(), GradientFormat::F32, no_end)
            .unwrap_err();
        assert_eq!(
            said.to_string(),
            "4 rows cannot be cut into 3 parts of equally many; coordinator and worker disagree on the step"
        );
    }
}
