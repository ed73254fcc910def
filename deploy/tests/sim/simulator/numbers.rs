//! What a simulated run computes. Parameters are one word, gradients one number each; but a step's new parameters depend
//! on every bit of its tree sum, and a slot's gradient on every bit of the parameters: whatever is added twice, left out,
//! computed with other parameters or added in another order shows in all that follows.

use std::ops::Add;

use lockstep_coordinator::engine::command::Task;
use lockstep_model::batch::Sums;
use lockstep_model::tree::Block;

use super::chance::{mix, unit};

/// The parameters.
pub(crate) type Params = u64;

/// Tokens of a slot.
const SLOT_WEIGHT: f64 = 16.0;

/// The function that a run computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers {
    pub(crate) seed: u64,
    pub(crate) slots: u32,
    pub(crate) eval_slots: u32,
    pub(crate) reference_slots: u32,
    /// Share of slots whose gradient is far longer than usual.
    pub(crate) outliers: f64,
    /// Share of slots whose gradient is no number.
    pub(crate) not_finite: f64,
}

/// A gradient, with what it was computed from for those who check: a digest covers the value alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vector {
    pub(crate) value: f64,
    pub(crate) made_with: Params,
    pub(crate) step: u64,
    pub(crate) block: Block,
}

/// What a worker computed for a block.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) vector: Option<Vector>,
    pub(crate) sums: Sums,
    pub(crate) slot_sums: Vec<Sums>,
}

impl Numbers {
    pub(crate) fn initial(&self) -> Params {
        mix(self.seed)
    }

    /// The slots of a task.
    pub(crate) fn slots_of(&self, task: Task) -> u32 {
        match task {
            Task::Gradient => self.slots,
            Task::Evaluate => self.eval_slots,
            Task::Reference => self.reference_slots,
        }
    }

    fn draw(&self, params: Params, step: u64, slot: u32, purpose: u64) -> u64 {
        mix(params ^ mix(step << 24 | u64::from(slot) << 4 | purpose))
    }

    fn gradient(&self, params: Params, step: u64, slot: u32) -> f64 {
        let kind = unit(self.draw(params, step, slot, 1));
        if kind < self.not_finite {
            return f64::NAN;
        }
        let factor = if kind < self.not_finite + self.outliers { 4096.0 } else { 1.0 };
        irregular(self.draw(params, step, slot, 2)) * factor
    }

    fn loss(&self, params: Params, step: u64, slot: u32, task: Task) -> Sums {
        let purpose = match task {
            Task::Gradient => 3,
            Task::Evaluate => 4,
            Task::Reference => 5,
        };
        Sums { loss: irregular(self.draw(params, step, slot, purpose)).abs(), weight: SLOT_WEIGHT, ..Sums::default() }
    }

    /// What is right for a block.
    pub(crate) fn compute(&self, params: Params, step: u64, task: Task, block: Block) -> Outcome {
        let slots = self.slots_of(task);
        let sums = tree(block, slots, &|slot| self.loss(params, step, slot, task));
        match task {
            Task::Gradient => {
                let value = tree(block, slots, &|slot| self.gradient(params, step, slot));
                Outcome { vector: Some(Vector { value, made_with: params, step, block }), sums, slot_sums: Vec::new() }
            }
            Task::Evaluate | Task::Reference => {
                let slot_sums = block.slots(slots).map(|slot| self.loss(params, step, slot, task)).collect();
                Outcome { vector: None, sums, slot_sums }
            }
        }
    }

    /// The parameters after a step, and whether it was skipped.
    pub(crate) fn apply(&self, params: Params, step: u64, gradient: f64, sums: Sums) -> (Params, bool) {
        match gradient.is_finite() && sums.loss.is_finite() {
            true => (mix(params ^ mix(gradient.to_bits() ^ mix(sums.loss.to_bits() ^ mix(step)))), false),
            false => (params, true),
        }
    }

    /// The sums of an evaluation: in slot order.
    pub(crate) fn validation(&self, params: Params, step: u64) -> Sums {
        let slots = (0..self.eval_slots).map(|slot| self.loss(params, step, slot, Task::Evaluate));
        slots.reduce(Add::add).unwrap_or_default()
    }
}

/// A number whose sums round: some 53 random bits, its magnitude from 1/4 to 8.
fn irregular(random: u64) -> f64 {
    let sign = if random & 1 == 0 { 1.0 } else { -1.0 };
    sign * (1.0 + unit(random)) * f64::powi(2.0, (mix(random) % 5) as i32 - 2)
}

/// The sum of a block, by recursion over the tree's definition.
fn tree<T: Add<Output = T>>(block: Block, slots: u32, leaf: &impl Fn(u32) -> T) -> T {
    match block.children() {
        None => leaf(block.index),
        Some([left, right]) if right.exists(slots) => tree(left, slots, leaf) + tree(right, slots, leaf),
        Some([left, _]) => tree(left, slots, leaf),
    }
}

/// SHA-256 in a real run: here any function of every bit.
pub(crate) fn digest(bits: u64) -> [u8; 32] {
    let mut digest = [0; 32];
    for (place, part) in digest.chunks_exact_mut(8).zip(1..) {
        place.copy_from_slice(&mix(bits ^ mix(part)).to_le_bytes());
    }
    digest
}

/// The quiet run: one worker, nothing fails. A plain loop.
#[derive(Clone, Debug)]
pub(crate) struct Quiet {
    /// The parameters of each version.
    pub(crate) versions: Vec<Params>,
    /// Whether a step left the parameters as they were; of step 0, `false`.
    pub(crate) skipped: Vec<bool>,
    /// The step at which the run halts because too many in a row were skipped.
    pub(crate) halts_at: Option<u64>,
}

impl Quiet {
    pub(crate) fn run(numbers: &Numbers, total_steps: u64, max_bad_steps: u32) -> Self {
        let mut quiet = Self { versions: vec![numbers.initial()], skipped: vec![false], halts_at: None };
        let mut in_a_row = 0;
        for step in 1..=total_steps {
            let params = quiet.versions[step as usize - 1];
            let Outcome { vector, sums, .. } =
                numbers.compute(params, step, Task::Gradient, Block::root(numbers.slots));
            let gradient = vector.map_or(f64::NAN, |vector| vector.value);
            let (params, skipped) = numbers.apply(params, step, gradient, sums);
            quiet.versions.push(params);
            quiet.skipped.push(skipped);
            in_a_row = if skipped { in_a_row + 1 } else { 0 };
            if max_bad_steps > 0 && in_a_row >= max_bad_steps {
                quiet.halts_at = Some(step);
                break;
            }
        }
        quiet
    }

    /// The last version.
    pub(crate) fn last(&self) -> u64 {
        self.versions.len() as u64 - 1
    }
}
