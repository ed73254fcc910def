//! Which rows a slot holds: a pure function of (seed, step, slot), whoever asks and however often.

use sha2::{Digest as _, Sha256};

use crate::batch::{Batch, Column, Values};
use crate::config::{BatchConfig, WindowOrder};
use crate::random::{Draws, Stream};

/// Where the batches of a run come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Windows of a token corpus.
    Tokens(TokenSource),
    /// The straight line's ten points, `x` = 0..9 and `y` = `x` + 1.
    Line(LineSource),
}

/// Windows of `context + 1` tokens: the first `context` are read, the last `context` are to be predicted.
#[derive(Clone, Debug)]
pub struct TokenSource {
    /// Tokens to train on; more than `context` of them.
    pub training: Vec<u32>,
    /// Tokens to validate on; more than `context` of them where there are validation slots.
    pub validation: Vec<u32>,
    /// Tokens of a row.
    pub context: usize,
    /// How windows are drawn.
    pub order: WindowOrder,
    /// Seed of the run.
    pub seed: u64,
    /// How a step is cut.
    pub batch: BatchConfig,
}

/// The ten points of the straight line, dealt to the slots in order; the same every step.
#[derive(Clone, Debug)]
pub struct LineSource {
    /// How a step is cut.
    pub batch: BatchConfig,
}

impl Source {
    /// The rows of training slot `slot` of step `step` (from 1).
    pub fn training_slot(&self, step: u64, slot: u32) -> Batch {
        match self {
            Self::Tokens(tokens) => tokens.batch(&tokens.training, |row| tokens.training_start(step, slot, row)),
            Self::Line(line) => line.rows(slot),
        }
    }

    /// The rows of validation slot `slot`; they do not change over the run.
    pub fn validation_slot(&self, slot: u32) -> Batch {
        match self {
            Self::Tokens(tokens) => tokens.batch(&tokens.validation, |row| tokens.validation_start(slot, row)),
            Self::Line(line) => line.rows(slot),
        }
    }
}

impl Source {
    /// SHA-256 of all that is drawn from: training tokens, then validation tokens, as little-endian u32; nothing for the
    /// line.
    pub fn sha256(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        if let Self::Tokens(tokens) = self {
            for token in tokens.training.iter().chain(&tokens.validation) {
                hasher.update(token.to_le_bytes());
            }
        }
        hasher.finalize().into()
    }
}

impl TokenSource {
    /// First token of row `row` of training slot `slot` of step `step`.
    fn training_start(&self, step: u64, slot: u32, row: u32) -> usize {
        let (slots, rows) = (u64::from(self.batch.slots), u64::from(self.batch.sequences_per_slot));
        let draw = ((step - 1) * slots + u64::from(slot)) * rows + u64::from(row);
        match self.order {
            WindowOrder::Random => {
                let starts = (self.training.len() - self.context) as u64;
                Draws::new(self.seed, Stream::TrainingWindows).below(step, draw, starts) as usize
            }
            WindowOrder::Epoch => {
                let windows = ((self.training.len() - 1) / self.context) as u64;
                let permutation = Permutation::new(self.seed, draw / windows, windows);
                permutation.at(draw % windows) as usize * self.context
            }
        }
    }

    /// First token of row `row` of validation slot `slot`.
    fn validation_start(&self, slot: u32, row: u32) -> usize {
        let starts = (self.validation.len() - self.context) as u64;
        Draws::new(self.seed, Stream::ValidationWindows).below(u64::from(slot), u64::from(row), starts) as usize
    }

    fn batch(&self, tokens: &[u32], start: impl Fn(u32) -> usize) -> Batch {
        let rows = self.batch.sequences_per_slot;
        let shape = [rows as usize, self.context];
        let column = |name: &str, shift: usize| {
            let values = (0..rows).flat_map(|row| {
                let first = start(row) + shift;
                tokens[first..first + self.context].iter().copied()
            });
            Column { name: name.into(), shape, values: Values::U32(values.collect()) }
        };
        Batch { columns: vec![column("tokens", 0), column("targets", 1)] }
    }
}

impl LineSource {
    fn rows(&self, slot: u32) -> Batch {
        let rows = self.batch.sequences_per_slot;
        let x: Vec<f32> = (0..rows).map(|row| ((slot * rows + row) % 10) as f32).collect();
        let y = x.iter().map(|x| x + 1.0).collect();
        let column =
            |name: &str, values| Column { name: name.into(), shape: [rows as usize, 1], values: Values::F32(values) };
        Batch { columns: vec![column("x", x), column("y", y)] }
    }
}

/// A seeded permutation of `0..length` in constant memory: a four-round Feistel network over the next even power of
/// two, walked along its cycles until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    draws: Draws,
    epoch: u64,
    length: u64,
    half_bits: u32,
}

impl Permutation {
    /// The order of epoch `epoch` over `length` elements (at least 1).
    pub fn new(seed: u64, epoch: u64, length: u64) -> Self {
        let bits = 64 - length.max(2).saturating_sub(1).leading_zeros();
        Self { draws: Draws::new(seed, Stream::EpochOrder), epoch, length, half_bits: bits.div_ceil(2) }
    }

    /// What stands at place `index` (below the length).
    pub fn at(self, index: u64) -> u64 {
        let mut value = index;
        loop {
            value = self.encrypt(value);
            if value < self.length {
                return value;
            }
        }
    }

    fn encrypt(self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..4 {
            let [a, b, ..] = self.draws.words(self.epoch, right << 2 | round);
            let mixed = (u64::from(a) | u64::from(b) << 32) & mask;
            (left, right) = (right, left ^ mixed);
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn source(order: WindowOrder, tokens: u32, slots: u32, rows: u32) -> TokenSource {
        TokenSource {
            training: (0..tokens).collect(),
            validation: (0..tokens).collect(),
            context: 4,
            order,
            seed: 5,
            batch: BatchConfig { slots, sequences_per_slot: rows },
        }
    }

    #[test]
    fn targets_are_the_tokens_one_further() {
        let source = Source::Tokens(source(WindowOrder::Random, 50, 2, 3));
        let batch = source.training_slot(1, 1);
        let (tokens, shape) = batch.u32("tokens").unwrap();
        let (targets, _) = batch.u32("targets").unwrap();
        assert_eq!(shape, [3, 4]);
        assert!(tokens.iter().zip(targets).all(|(token, target)| token + 1 == *target));
    }

    #[test]
    fn slots_repeat_exactly_and_differ_from_one_another() {
        let source = Source::Tokens(source(WindowOrder::Random, 5000, 4, 2));
        assert_eq!(source.training_slot(3, 1), source.training_slot(3, 1));
        assert_ne!(source.training_slot(3, 1), source.training_slot(3, 2));
        assert_ne!(source.training_slot(3, 1), source.training_slot(4, 1));
        assert_eq!(source.validation_slot(2), source.validation_slot(2));
    }

    #[test]
    fn an_epoch_visits_every_window_once_and_the_next_in_another_order() {
        // 41 tokens are 10 windows of 4 and the token after the last; 5 steps of 2 slots of 1 row are an epoch.
        let source = source(WindowOrder::Epoch, 41, 2, 1);
        let epoch = |first: u64| -> Vec<usize> {
            (first..first + 5).flat_map(|step| [0, 1].map(|slot| source.training_start(step, slot, 0))).collect()
        };
        let (first, second) = (epoch(1), epoch(6));
        let sorted = |mut starts: Vec<usize>| {
            starts.sort_unstable();
            starts
        };
        assert_ne!(first, second);
        assert_eq!(sorted(first), (0..10).map(|w| w * 4).collect::<Vec<_>>());
        assert_eq!(sorted(second), (0..10).map(|w| w * 4).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn a_permutation_hits_everything_once(seed: u64, epoch: u64, length in 1u64..600) {
            let permutation = Permutation::new(seed, epoch, length);
            let mut seen = vec![false; length as usize];
            for index in 0..length {
                let value = permutation.at(index) as usize;
                prop_assert!(!seen[value]);
                seen[value] = true;
            }
        }
    }
}
