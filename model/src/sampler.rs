//! Which rows a slot holds: a pure function of (seed, step, slot), whoever asks and however often.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::batch::{Batch, Column, Values};
use crate::config::{BatchConfig, WindowOrder};
use crate::packing::PackedSource;
use crate::pairs::PairSource;
use crate::random::{Draws, Stream};
use crate::tokens::Tokens;

/// Where the batches of a run come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Windows of a token corpus.
    Tokens(TokenSource),
    /// Conversations, packed into rows.
    Packed(PackedSource),
    /// Pairs of answers, of which one is preferred.
    Pairs(PairSource),
    /// The straight line's ten points, `x` = 0..9 and `y` = `x` + 1.
    Line(LineSource),
}

/// Windows of `context + 1` tokens: the first `context` are read, the last `context` are to be predicted.
#[derive(Clone, Debug)]
pub struct TokenSource {
    /// What rows are drawn from; at least one.
    pub corpora: Vec<WeightedCorpus>,
    /// Tokens of a row.
    pub context: usize,
    /// How windows are drawn.
    pub order: WindowOrder,
    /// Seed of the run.
    pub seed: u64,
    /// How a step is cut.
    pub batch: BatchConfig,
    /// The token that ends each document, if those in one row are to be kept apart; else a row is one.
    pub separator: Option<u32>,
}

/// One corpus of a mixture.
#[derive(Clone, Debug)]
pub struct WeightedCorpus {
    /// A row comes from this corpus with a probability of `weight` over the sum of all weights; positive.
    pub weight: f64,
    /// Tokens to train on; more than `context` of them.
    pub training: Tokens,
    /// Tokens to validate on; more than `context` of them where there are validation slots.
    pub validation: Tokens,
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
            Self::Tokens(tokens) => {
                tokens.batch(tokens.batch.sequences_drawn_per_slot(), |row| tokens.training_window(step, slot, row))
            }
            Self::Packed(packed) => packed.training_slot(step, slot),
            Self::Pairs(pairs) => pairs.training_slot(step, slot),
            Self::Line(line) => line.rows(line.batch.sequences_drawn_per_slot(), slot),
        }
    }

    /// The rows of validation slot `slot`; they do not change over the run.
    pub fn validation_slot(&self, slot: u32) -> Batch {
        match self {
            Self::Tokens(tokens) => {
                tokens.batch(tokens.batch.sequences_per_slot, |row| tokens.validation_window(slot, row))
            }
            Self::Packed(packed) => packed.validation_slot(slot),
            Self::Pairs(pairs) => pairs.validation_slot(slot),
            Self::Line(line) => line.rows(line.batch.sequences_per_slot, slot),
        }
    }

    /// How many slots hold all that the model which the run begins with is asked of, before it is trained; 0 where there is no
    /// such.
    pub fn reference_slots(&self) -> u32 {
        match self {
            Self::Pairs(pairs) => pairs.reference_slots(),
            _ => 0,
        }
    }

    /// How many rows slot `slot` of these has.
    pub fn reference_rows(&self, slot: u32) -> usize {
        match self {
            Self::Pairs(pairs) => 2 * pairs.reference_pairs(slot).len(),
            _ => 0,
        }
    }

    /// The rows of slot `slot` of these.
    ///
    /// # Panics
    /// If there are none.
    pub fn reference_slot(&self, slot: u32) -> Batch {
        match self {
            Self::Pairs(pairs) => pairs.reference_slot(slot),
            _ => unreachable!("there are no such slots"),
        }
    }

    /// The same with what was answered, one number for each row of these slots, in order.
    pub fn with_references(&self, references: Arc<[f32]>) -> Self {
        match self {
            Self::Pairs(pairs) => Self::Pairs(PairSource { references: Some(references), ..pairs.clone() }),
            other => other.clone(),
        }
    }

    /// Tokens (or rows of the line) of step `step`, weighted or not.
    pub fn positions(&self, step: u64) -> u64 {
        let (batch, length) = match self {
            Self::Pairs(pairs) => return pairs.positions(step),
            Self::Tokens(tokens) => (tokens.batch, tokens.context),
            Self::Packed(packed) => (packed.batch, packed.training.context()),
            Self::Line(line) => (line.batch, 1),
        };
        batch.sequences_per_step() * length as u64
    }

    /// Bytes of the largest slot.
    pub fn slot_bytes(&self) -> usize {
        match self {
            // Three columns of its longest rows, and a reference for each.
            Self::Pairs(pairs) => 4 * 2 * pairs.batch.sequences_drawn_per_slot() as usize * (3 * pairs.longest() + 1),
            _ => self.training_slot(1, 0).bytes(),
        }
    }
}

impl Source {
    /// How many windows (packed rows, pairs) an epoch has; `None` unless they are drawn in epoch order.
    pub fn windows_per_epoch(&self) -> Option<u64> {
        match self {
            Self::Tokens(tokens) if tokens.order == WindowOrder::Epoch => {
                Some(tokens.windows(&tokens.corpora[0].training))
            }
            Self::Packed(packed) if packed.order == WindowOrder::Epoch => Some(packed.training.rows() as u64),
            Self::Pairs(pairs) if pairs.order == WindowOrder::Epoch => Some(pairs.training.len() as u64),
            _ => None,
        }
    }

    /// In epoch order the windows of the rows of training slot `slot` of step `step`, numbered in the order of the text; none
    /// in another order.
    pub fn training_windows(&self, step: u64, slot: u32) -> Vec<u64> {
        match self {
            Self::Tokens(tokens) if tokens.order == WindowOrder::Epoch => {
                let start = |row| tokens.training_window(step, slot, row).1;
                (0..tokens.batch.sequences_drawn_per_slot()).map(|row| (start(row) / tokens.context) as u64).collect()
            }
            Self::Packed(packed) if packed.order == WindowOrder::Epoch => {
                packed.training_rows(step, slot).into_iter().map(|row| row as u64).collect()
            }
            Self::Pairs(pairs) if pairs.order == WindowOrder::Epoch => {
                pairs.training_pairs(step, slot).into_iter().map(|pair| pair as u64).collect()
            }
            _ => Vec::new(),
        }
    }

    /// SHA-256 of all that is drawn from: of each corpus training tokens, then validation tokens, as little-endian u32; of
    /// packed rows the columns of each, in order, those to train on first; of pairs the rows' length (u64), tokens, targets and
    /// whether each is learned (a byte); nothing for the line.
    pub fn sha256(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        match self {
            Self::Tokens(tokens) => {
                for part in tokens.corpora.iter().flat_map(|corpus| [&corpus.training, &corpus.validation]) {
                    let mut bytes = Vec::new();
                    part.for_each_block(|block| {
                        bytes.clear();
                        bytes.extend(block.iter().flat_map(|token| token.to_le_bytes()));
                        hasher.update(&bytes);
                    });
                }
            }
            Self::Packed(packed) => {
                packed.training.digest(&mut hasher);
                packed.validation.digest(&mut hasher);
            }
            Self::Pairs(pairs) => pairs.digest(&mut hasher),
            Self::Line(_) => {}
        }
        hasher.finalize().into()
    }
}

/// The numbers of the rows of training slot `slot` of step `step` (from 1), out of `there_are`.
pub(crate) fn drawn(
    order: WindowOrder,
    seed: u64,
    batch: BatchConfig,
    there_are: usize,
    step: u64,
    slot: u32,
) -> Vec<usize> {
    let there_are = there_are as u64;
    let (slots, rows) = (u64::from(batch.slots), u64::from(batch.sequences_drawn_per_slot()));
    let first = ((step - 1) * slots + u64::from(slot)) * rows;
    let row = |draw: u64| match order {
        WindowOrder::Random => Draws::new(seed, Stream::TrainingWindows).below(step, draw, there_are),
        WindowOrder::Epoch => Permutation::new(seed, draw / there_are, there_are).at(draw % there_are),
    };
    (first..first + rows).map(|draw| row(draw) as usize).collect()
}

/// `context + 1` tokens of a corpus.
type Window<'a> = (&'a Tokens, usize);

impl TokenSource {
    /// How many windows of an epoch there are in `tokens`.
    fn windows(&self, tokens: &Tokens) -> u64 {
        ((tokens.len() - 1) / self.context) as u64
    }

    /// Where row `row` of training slot `slot` of step `step` begins.
    fn training_window(&self, step: u64, slot: u32, row: u32) -> Window<'_> {
        let (slots, rows) = (u64::from(self.batch.slots), u64::from(self.batch.sequences_drawn_per_slot()));
        let draw = ((step - 1) * slots + u64::from(slot)) * rows + u64::from(row);
        let training = &self.corpus(step, draw).training;
        let start = match self.order {
            WindowOrder::Random => {
                let starts = (training.len() - self.context) as u64;
                Draws::new(self.seed, Stream::TrainingWindows).below(step, draw, starts) as usize
            }
            WindowOrder::Epoch => {
                let windows = self.windows(training);
                let permutation = Permutation::new(self.seed, draw / windows, windows);
                permutation.at(draw % windows) as usize * self.context
            }
        };
        (training, start)
    }

    /// Where row `row` of validation slot `slot` begins.
    fn validation_window(&self, slot: u32, row: u32) -> Window<'_> {
        let draw = u64::from(slot) * u64::from(self.batch.sequences_per_slot) + u64::from(row);
        let validation = &self.corpus(0, draw).validation;
        let starts = (validation.len() - self.context) as u64;
        let draws = Draws::new(self.seed, Stream::ValidationWindows);
        (validation, draws.below(u64::from(slot), u64::from(row), starts) as usize)
    }

    /// The corpus that row `draw` of step `step` comes from; step 0 stands for validation.
    fn corpus(&self, step: u64, draw: u64) -> &WeightedCorpus {
        let [single] = &self.corpora[..] else {
            let total: f64 = self.corpora.iter().map(|corpus| corpus.weight).sum();
            let target = Draws::new(self.seed, Stream::Mixture).unit(step, draw) * total;
            let mut passed = 0.0;
            let drawn = self.corpora.iter().position(|corpus| {
                passed += corpus.weight;
                target < passed
            });
            return &self.corpora[drawn.unwrap_or(self.corpora.len() - 1)];
        };
        single
    }

    fn batch<'a>(&self, rows: u32, window: impl Fn(u32) -> Window<'a>) -> Batch {
        let shape = [rows as usize, self.context];
        let column = |name: &str, shift: usize| {
            let mut values = Vec::with_capacity(rows as usize * self.context);
            for row in 0..rows {
                let (tokens, start) = window(row);
                tokens.copy(start + shift, self.context, &mut values);
            }
            Column { name: name.into(), shape, values: Values::U32(values) }
        };
        let mut columns = vec![column("tokens", 0), column("targets", 1)];
        if let (Some(separator), Values::U32(tokens)) = (self.separator, &columns[0].values) {
            let values = Values::U32(tokens.chunks(self.context).flat_map(|row| segments(row, separator)).collect());
            columns.push(Column { name: "segments".into(), shape, values });
        }
        Batch { columns }
    }
}

/// Of each token, how many documents of its row end before it.
fn segments(row: &[u32], separator: u32) -> impl Iterator<Item = u32> {
    row.iter().scan(0, move |ended, &token| {
        let segment = *ended;
        *ended += u32::from(token == separator);
        Some(segment)
    })
}

impl LineSource {
    fn rows(&self, rows: u32, slot: u32) -> Batch {
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
        Self::of(Draws::new(seed, Stream::EpochOrder), epoch, length)
    }

    /// The order in which a number of conversations (at least 1) is split and packed.
    pub fn of_conversations(seed: u64, length: u64) -> Self {
        Self::of(Draws::new(seed, Stream::Conversations), 0, length)
    }

    fn of(draws: Draws, epoch: u64, length: u64) -> Self {
        let bits = 64 - length.max(2).saturating_sub(1).leading_zeros();
        Self { draws, epoch, length, half_bits: bits.div_ceil(2) }
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

    /// Tokens from `first` on, the same for training and validation.
    fn corpus(weight: f64, first: u32, tokens: u32) -> WeightedCorpus {
        let tokens = Tokens::from((first..first + tokens).collect::<Vec<_>>());
        WeightedCorpus { weight, training: tokens.clone(), validation: tokens }
    }

    fn source(order: WindowOrder, tokens: u32, slots: u32, rows: u32) -> TokenSource {
        TokenSource {
            corpora: vec![corpus(1.0, 0, tokens)],
            context: 4,
            order,
            seed: 5,
            batch: BatchConfig { slots, sequences_per_slot: rows, local_steps: 1 },
            separator: None,
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
    fn documents_are_told_apart_by_what_ends_them() {
        let source = |separator| Source::Tokens(TokenSource { separator, ..source(WindowOrder::Epoch, 5, 1, 1) });
        assert!(source(None).training_slot(1, 0).optional_u32("segments").unwrap().is_none());
        let batch = source(Some(1)).training_slot(1, 0);
        assert_eq!(batch.u32("tokens").unwrap(), (&[0, 1, 2, 3][..], [1, 4]));
        assert_eq!(batch.u32("segments").unwrap(), (&[0, 0, 1, 1][..], [1, 4]));
    }

    #[test]
    fn slots_repeat_exactly_and_differ_from_one_another() {
        let source = Source::Tokens(source(WindowOrder::Random, 5000, 4, 2));
        assert_eq!(source.training_slot(3, 1), source.training_slot(3, 1));
        assert_ne!(source.training_slot(3, 1), source.training_slot(3, 2));
        assert_ne!(source.training_slot(3, 1), source.training_slot(4, 1));
        assert_eq!(source.validation_slot(2), source.validation_slot(2));
    }

    /// The examples in ARCHITECTURE.md, section "Draws".
    #[test]
    fn rows_are_drawn_as_it_is_described_however_they_are_cut_into_slots() {
        let source =
            |starts: u32, slots, rows| TokenSource { seed: 1, ..source(WindowOrder::Random, starts + 4, slots, rows) };
        assert_eq!(source(1_003_790, 1, 6).training_window(3, 0, 5).1, 132_868);
        assert_eq!(source(1_003_790, 3, 2).training_window(3, 2, 1).1, 132_868);
        assert_eq!(source(111_476, 3, 2).validation_window(2, 1).1, 58_656);
    }

    #[test]
    fn an_epoch_visits_every_window_once_and_the_next_in_another_order() {
        // 41 tokens are 10 windows of 4 and the token after the last; 5 steps of 2 slots of 1 row are an epoch.
        let source = source(WindowOrder::Epoch, 41, 2, 1);
        let epoch = |first: u64| -> Vec<usize> {
            (first..first + 5).flat_map(|step| [0, 1].map(|slot| source.training_window(step, slot, 0).1)).collect()
        };
        let (first, second) = (epoch(1), epoch(6));
        let sorted = |mut starts: Vec<usize>| {
            starts.sort_unstable();
            starts
        };
        assert_ne!(first, second);
        assert_eq!(sorted(first), (0..10).map(|w| w * 4).collect::<Vec<_>>());
        assert_eq!(sorted(second), (0..10).map(|w| w * 4).collect::<Vec<_>>());

        let starts = [0, 1].map(|slot| source.training_window(3, slot, 0).1 as u64);
        let source = Source::Tokens(source);
        assert_eq!(source.windows_per_epoch(), Some(10));
        assert_eq!([0, 1].map(|slot| source.training_windows(3, slot)[0] * 4), starts);
    }

    #[test]
    fn a_mixture_is_drawn_from_by_weight_and_by_nothing_else() {
        let mixture = Source::Tokens(TokenSource {
            corpora: vec![corpus(3.0, 0, 100), corpus(1.0, 1000, 100)],
            ..source(WindowOrder::Random, 10, 8, 4)
        });
        let share = |slots: &dyn Fn(u32) -> Batch, count: u32| {
            let batches: Vec<Batch> = (0..count).map(slots).collect();
            let firsts = batches.iter().flat_map(|batch| {
                let (tokens, [_, length]) = batch.u32("tokens").unwrap();
                tokens.chunks(length).map(|row| row[0])
            });
            let firsts: Vec<u32> = firsts.collect();
            firsts.iter().filter(|&&token| token >= 1000).count() as f64 / firsts.len() as f64
        };
        let training = share(&|i| mixture.training_slot(u64::from(i / 8) + 1, i % 8), 2000);
        assert!((training - 0.25).abs() < 0.02, "{training}");
        let validation = share(&|i| mixture.validation_slot(i), 2000);
        assert!((validation - 0.25).abs() < 0.02, "{validation}");
        assert_eq!(mixture.training_slot(3, 1), mixture.training_slot(3, 1));
    }

    #[test]
    fn the_digest_of_what_is_drawn_from_is_that_of_its_tokens() {
        let tokens: Vec<u8> = (0..50u32).chain(0..50).flat_map(u32::to_le_bytes).collect();
        let source = Source::Tokens(source(WindowOrder::Random, 50, 2, 3));
        assert_eq!(source.sha256(), crate::digest::bytes_sha256(&tokens));
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
