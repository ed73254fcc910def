//! Pairs of answers to one prompt, of which people prefer one, as rows to compute: pair i's preferred answer is row 2i, the
//! other one row 2i + 1.

use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::batch::{Batch, Column, Values};
use crate::config::{BatchConfig, WindowOrder};
use crate::packing::Example;
use crate::sampler::drawn;

/// Rows have a length that is a multiple of this, in tokens, so that devices meet few shapes.
const LENGTH_STEP: usize = 16;

/// Two answers, each after the prompt: the preferred one, then the other. What counts of a row is what is learned.
pub type Pair = [Example; 2];

/// What is read off a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The log-probability of its answer.
    LogProbability,
    /// A score, after its last token.
    Score,
}

impl Reading {
    /// How long a row of an answer is, in tokens. For a score, the end of the answer is read, too.
    pub fn length(self, example: &Example) -> usize {
        match self {
            Self::LogProbability => example.tokens.len(),
            Self::Score => example.tokens.len() + 1,
        }
    }
}

/// Pairs to train and validate on.
#[derive(Clone, Debug)]
pub struct PairSource {
    /// Pairs to train on; at least one.
    pub training: Arc<[Pair]>,
    /// Pairs to validate on; at least one where there are validation slots.
    pub validation: Arc<[Pair]>,
    /// What is read off a row.
    pub reading: Reading,
    /// The longest row that the model can read, in tokens.
    pub context: usize,
    /// How pairs are drawn.
    pub order: WindowOrder,
    /// Seed of the run.
    pub seed: u64,
    /// How a step is cut; a sequence is a pair.
    pub batch: BatchConfig,
    /// Whether rows are compared with log-probabilities by the model that the run begins with.
    pub has_reference: bool,
    /// These, once they are known: of each row of the pairs to train on, then of those to validate on.
    pub references: Option<Arc<[f32]>>,
}

impl PairSource {
    /// The numbers of the pairs of training slot `slot` of step `step` (from 1).
    pub(crate) fn training_pairs(&self, step: u64, slot: u32) -> Vec<usize> {
        drawn(self.order, self.seed, self.batch, self.training.len(), step, slot)
    }

    pub(crate) fn training_slot(&self, step: u64, slot: u32) -> Batch {
        self.rows(&self.training_pairs(step, slot))
    }

    /// Pairs in their order, and from the first again after the last.
    pub(crate) fn validation_slot(&self, slot: u32) -> Batch {
        let first = slot as usize * self.pairs_per_slot();
        let pairs = (first..first + self.pairs_per_slot()).map(|pair| pair % self.validation.len());
        self.rows(&pairs.map(|pair| self.training.len() + pair).collect::<Vec<_>>())
    }

    /// How many slots all pairs fill, those to train on first, in their order; 0 where there is no reference.
    pub(crate) fn reference_slots(&self) -> u32 {
        match self.has_reference {
            true => self.pairs().div_ceil(self.pairs_per_slot()) as u32,
            false => 0,
        }
    }

    /// The pairs of slot `slot` of these.
    pub(crate) fn reference_pairs(&self, slot: u32) -> Range<usize> {
        let first = slot as usize * self.pairs_per_slot();
        first..self.pairs().min(first + self.pairs_per_slot())
    }

    pub(crate) fn reference_slot(&self, slot: u32) -> Batch {
        self.batch(&self.reference_pairs(slot).collect::<Vec<_>>())
    }

    /// Tokens of all rows of step `step`, what fills them up included.
    pub(crate) fn positions(&self, step: u64) -> u64 {
        let slot = |slot| {
            let pairs = self.training_pairs(step, slot);
            (2 * pairs.len() * self.length(&pairs)) as u64
        };
        (0..self.batch.slots).map(slot).sum()
    }

    /// The longest rows that a slot can have.
    pub(crate) fn longest(&self) -> usize {
        let pairs: Vec<usize> = (0..self.pairs()).collect();
        self.length(&pairs)
    }

    fn pairs(&self) -> usize {
        self.training.len() + self.validation.len()
    }

    fn pairs_per_slot(&self) -> usize {
        self.batch.sequences_per_slot as usize
    }

    /// Pair `pair`, counting those to train on first.
    fn pair(&self, pair: usize) -> &Pair {
        pair.checked_sub(self.training.len()).map_or_else(|| &self.training[pair], |pair| &self.validation[pair])
    }

    /// The length of the rows of some pairs.
    fn length(&self, pairs: &[usize]) -> usize {
        let lengths = pairs.iter().flat_map(|&pair| self.pair(pair)).map(|example| self.reading.length(example));
        lengths.max().unwrap_or(0).next_multiple_of(LENGTH_STEP).min(self.context)
    }

    /// Rows of pairs with what the reference says of them, if that is known.
    fn rows(&self, pairs: &[usize]) -> Batch {
        let mut batch = self.batch(pairs);
        if let Some(references) = &self.references {
            let values = pairs.iter().flat_map(|pair| &references[2 * pair..2 * pair + 2]).copied().collect();
            let shape = [2 * pairs.len(), 1];
            batch.columns.push(Column { name: "references".into(), shape, values: Values::F32(values) });
        }
        batch
    }

    fn batch(&self, pairs: &[usize]) -> Batch {
        let length = self.length(pairs);
        let shape = [2 * pairs.len(), length];
        let examples = || pairs.iter().flat_map(|&pair| self.pair(pair));
        let filled = |row: Vec<u32>| row.into_iter().chain(std::iter::repeat(0)).take(length);
        let column = |name: &str, values| Column { name: name.into(), shape, values };
        let tokens = examples().flat_map(|example| {
            let end = example.targets.last().filter(|_| self.reading == Reading::Score);
            filled(example.tokens.iter().chain(end).copied().collect())
        });
        let mut columns = vec![column("tokens", Values::U32(tokens.collect()))];
        let mut weights = vec![0.0; 2 * pairs.len() * length];
        for (row, example) in weights.chunks_mut(length).zip(examples()) {
            match self.reading {
                Reading::Score => row[example.tokens.len()] = 1.0,
                Reading::LogProbability => {
                    row.iter_mut().zip(&example.learned).for_each(|(weight, learned)| *weight = f32::from(*learned));
                }
            }
        }
        if self.reading == Reading::LogProbability {
            let targets = examples().flat_map(|example| filled(example.targets.clone())).collect();
            columns.push(column("targets", Values::U32(targets)));
        }
        columns.push(column("weights", Values::F32(weights)));
        Batch { columns }
    }

    /// Adds tokens, targets and what is learned of all rows, little-endian.
    pub(crate) fn digest(&self, hasher: &mut Sha256) {
        for Example { tokens, targets, learned } in (0..self.pairs()).flat_map(|pair| self.pair(pair)) {
            hasher.update((tokens.len() as u64).to_le_bytes());
            tokens.iter().chain(targets).for_each(|token| hasher.update(token.to_le_bytes()));
            learned.iter().for_each(|&learned| hasher.update([u8::from(learned)]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `length` tokens, the last two of which are learned.
    fn example(token: u32, length: usize) -> Example {
        let learned = (1..=length).map(|place| place + 2 > length).collect();
        Example { tokens: vec![token; length], targets: vec![token + 1; length], learned }
    }

    fn source(reading: Reading) -> PairSource {
        let pairs: Vec<Pair> =
            (0..5).map(|pair| [example(10 * pair, 3 + pair as usize), example(10 * pair + 5, 4)]).collect();
        let (training, validation) = pairs.split_at(3);
        PairSource {
            training: training.into(),
            validation: validation.into(),
            reading,
            context: 20,
            order: WindowOrder::Epoch,
            seed: 1,
            batch: BatchConfig { slots: 2, sequences_per_slot: 2, local_steps: 1 },
            has_reference: true,
            references: None,
        }
    }

    fn row<T: Copy>((values, [rows, length]): (&[T], [usize; 2]), row: usize) -> Vec<T> {
        assert!(row < rows);
        values[row * length..][..length].to_vec()
    }

    #[test]
    fn what_counts_of_a_row_is_its_answer_or_the_place_of_its_score() {
        let batch = source(Reading::LogProbability).reference_slot(0);
        assert_eq!(batch.u32("tokens").unwrap().1, [4, 16]);
        assert_eq!(row(batch.u32("tokens").unwrap(), 1), [vec![5; 4], vec![0; 12]].concat());
        assert_eq!(row(batch.u32("targets").unwrap(), 1), [vec![6; 4], vec![0; 12]].concat());
        assert_eq!(row(batch.f32("weights").unwrap(), 1), [vec![0.0; 2], vec![1.0; 2], vec![0.0; 12]].concat());

        let batch = source(Reading::Score).reference_slot(0);
        assert!(batch.optional_u32("targets").unwrap().is_none());
        assert_eq!(row(batch.u32("tokens").unwrap(), 1), [vec![5; 4], vec![6], vec![0; 11]].concat());
        assert_eq!(row(batch.f32("weights").unwrap(), 1), [vec![0.0; 4], vec![1.0], vec![0.0; 11]].concat());
    }

    #[test]
    fn every_pair_has_its_references_wherever_it_is_drawn() {
        let mut source = source(Reading::LogProbability);
        assert_eq!(source.reference_slots(), 3);
        let mut firsts = Vec::new();
        for slot in 0..3 {
            let batch = source.reference_slot(slot);
            assert!(batch.optional_f32("references").unwrap().is_none(), "they are to be computed");
            let (tokens, [rows, length]) = batch.u32("tokens").unwrap();
            firsts.extend((0..rows).map(|row| tokens[row * length]));
        }
        assert_eq!(firsts, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]);
        // As if each row's reference were its token.
        source.references = Some(firsts.iter().map(|&token| token as f32).collect());
        let batches = (1..9).flat_map(|step| [0, 1].map(|slot| source.training_slot(step, slot)));
        for batch in batches.chain([0, 1].map(|slot| source.validation_slot(slot))) {
            let (tokens, [_, length]) = batch.u32("tokens").unwrap();
            let (references, shape) = batch.f32("references").unwrap();
            assert_eq!(shape, [4, 1]);
            assert!(tokens.iter().step_by(length).map(|&token| token as f32).eq(references.iter().copied()));
        }
        assert!(source.training_slot(1, 0).u32("tokens").unwrap().0.iter().all(|&token| token < 30));
        assert!(source.validation_slot(1).u32("tokens").unwrap().0.contains(&30));
    }

    #[test]
    fn rows_are_as_long_as_their_slot_needs() {
        let mut source = source(Reading::LogProbability);
        source.training = [[example(1, 17), example(2, 3)], [example(3, 4), example(4, 3)]].into();
        source.batch.sequences_per_slot = 1;
        let lengths = [0, 1].map(|slot| source.training_slot(1, slot).u32("tokens").unwrap().1[1]);
        assert!(lengths == [20, 16] || lengths == [16, 20], "{lengths:?}: at most the context");
        assert_eq!((source.positions(1), source.longest()), (2 * 36, 20));
    }
}
