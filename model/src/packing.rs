//! Conversations in rows of one length: several share a row, as segments that see nothing of one another.

use sha2::{Digest as _, Sha256};

use crate::batch::{Batch, Column, Values};
use crate::config::{BatchConfig, WindowOrder};
use crate::sampler::drawn;

/// A conversation beside what is to be predicted after each of its tokens, all of one length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// What is read.
    pub tokens: Vec<u32>,
    /// What is to come after each of them: the next one, or the end of an answer where the conversation goes on without it.
    pub targets: Vec<u32>,
    /// Whether that is learned: it is, where the model would have to say it.
    pub learned: Vec<bool>,
}

/// Rows of `context` tokens, filled with examples one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedRows {
    context: usize,
    /// Each `[rows, context]`.
    tokens: Vec<u32>,
    targets: Vec<u32>,
    /// 1 where the target is learned, else 0.
    weights: Vec<f32>,
    /// The number of its example within the row; what fills the row up has a number of its own.
    segments: Vec<u32>,
}

/// Rows that are looked through for room, newest last. A bound keeps packing linear; rows before these are nearly full.
const OPEN_ROWS: usize = 64;

impl PackedRows {
    /// Packs examples in this order: each goes to the first open row that has room, or begins a new one. The rest of a row
    /// holds token 0, of weight 0.
    ///
    /// # Panics
    /// If an example is empty or longer than `context`.
    pub fn pack<'a>(examples: impl IntoIterator<Item = &'a Example>, context: usize) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        for example in examples {
            let length = example.tokens.len();
            assert!((1..=context).contains(&length), "{length} tokens for rows of {context}");
            let open = rows.len().saturating_sub(OPEN_ROWS)..;
            match rows[open].iter_mut().find(|row| row.used + length <= context) {
                Some(row) => row.add(example),
                None => {
                    let mut row = Row::default();
                    row.add(example);
                    rows.push(row);
                }
            }
        }
        let mut packed = Self {
            context,
            tokens: Vec::with_capacity(rows.len() * context),
            targets: Vec::with_capacity(rows.len() * context),
            weights: Vec::with_capacity(rows.len() * context),
            segments: Vec::with_capacity(rows.len() * context),
        };
        for (index, row) in rows.iter().enumerate() {
            for (segment, example) in (0..).zip(&row.examples) {
                packed.tokens.extend(&example.tokens);
                packed.targets.extend(&example.targets);
                packed.weights.extend(example.learned.iter().map(|&learned| f32::from(u8::from(learned))));
                packed.segments.extend(std::iter::repeat_n(segment, example.tokens.len()));
            }
            let end = (index + 1) * context;
            packed.tokens.resize(end, 0);
            packed.targets.resize(end, 0);
            packed.weights.resize(end, 0.0);
            packed.segments.resize(end, row.examples.len() as u32);
        }
        packed
    }

    /// Tokens of a row.
    pub fn context(&self) -> usize {
        self.context
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.tokens.len() / self.context
    }

    /// Tokens that are learned.
    pub fn learned(&self) -> usize {
        self.weights.iter().filter(|&&weight| weight > 0.0).count()
    }

    /// The rows of these numbers, as columns `tokens`, `targets`, `weights` and `segments` `[rows, context]`.
    fn batch(&self, rows: &[usize]) -> Batch {
        fn gather<T: Copy>(column: &[T], rows: &[usize], width: usize) -> Vec<T> {
            rows.iter().flat_map(|row| &column[row * width..][..width]).copied().collect()
        }
        let shape = [rows.len(), self.context];
        let whole = |column: &[u32]| Values::U32(gather(column, rows, self.context));
        let column = |name: &str, values| Column { name: name.into(), shape, values };
        Batch {
            columns: vec![
                column("tokens", whole(&self.tokens)),
                column("targets", whole(&self.targets)),
                column("weights", Values::F32(gather(&self.weights, rows, self.context))),
                column("segments", whole(&self.segments)),
            ],
        }
    }

    /// Adds tokens, targets, weights and segments of all rows, little-endian.
    pub(crate) fn digest(&self, hasher: &mut Sha256) {
        for row in 0..self.rows() {
            for column in self.batch(&[row]).columns {
                let bytes: Vec<u8> = match column.values {
                    Values::U32(values) => values.into_iter().flat_map(u32::to_le_bytes).collect(),
                    Values::F32(values) => values.into_iter().flat_map(f32::to_le_bytes).collect(),
                };
                hasher.update(bytes);
            }
        }
    }
}

/// A row that is being filled.
#[derive(Default)]
struct Row<'a> {
    examples: Vec<&'a Example>,
    used: usize,
}

impl<'a> Row<'a> {
    fn add(&mut self, example: &'a Example) {
        self.used += example.tokens.len();
        self.examples.push(example);
    }
}

/// Packed rows to train and validate on.
#[derive(Clone, Debug)]
pub struct PackedSource {
    /// Rows to train on; at least one.
    pub training: PackedRows,
    /// Rows to validate on; at least one where there are validation slots.
    pub validation: PackedRows,
    /// How rows are drawn.
    pub order: WindowOrder,
    /// Seed of the run.
    pub seed: u64,
    /// How a step is cut.
    pub batch: BatchConfig,
}

impl PackedSource {
    /// The numbers of the rows of training slot `slot` of step `step` (from 1).
    pub(crate) fn training_rows(&self, step: u64, slot: u32) -> Vec<usize> {
        drawn(self.order, self.seed, self.batch, self.training.rows(), step, slot)
    }

    pub(crate) fn training_slot(&self, step: u64, slot: u32) -> Batch {
        self.training.batch(&self.training_rows(step, slot))
    }

    /// Rows in their order, and from the first again after the last.
    pub(crate) fn validation_slot(&self, slot: u32) -> Batch {
        let rows = self.batch.sequences_per_slot as usize;
        let first = slot as usize * rows;
        let numbers: Vec<usize> = (first..first + rows).map(|row| row % self.validation.rows()).collect();
        self.validation.batch(&numbers)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An example of `length` tokens, all of them `token`, of which the last is learned.
    fn example(token: u32, length: usize) -> Example {
        let learned = (1..=length).map(|place| place == length).collect();
        Example { tokens: vec![token; length], targets: vec![token + 1; length], learned }
    }

    fn source(order: WindowOrder) -> PackedSource {
        let examples: Vec<Example> = (1..=10).map(|token| example(token, 4)).collect();
        let (training, validation) = examples.split_at(7);
        PackedSource {
            training: PackedRows::pack(training, 4),
            validation: PackedRows::pack(validation, 4),
            order,
            seed: 3,
            batch: BatchConfig { slots: 2, sequences_per_slot: 2, local_steps: 1 },
        }
    }

    #[test]
    fn the_first_row_with_room_is_filled() {
        let examples = [(1, 3), (2, 4), (3, 2), (4, 1)].map(|(token, length)| example(token, length));
        let batch = PackedRows::pack(&examples, 5).batch(&[0, 1]);
        assert_eq!(batch.u32("tokens").unwrap(), (&[1, 1, 1, 3, 3, 2, 2, 2, 2, 4][..], [2, 5]));
        assert_eq!(batch.u32("targets").unwrap().0, [2, 2, 2, 4, 4, 3, 3, 3, 3, 5]);
        assert_eq!(batch.f32("weights").unwrap().0, [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(batch.u32("segments").unwrap().0, [0, 0, 0, 1, 1, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn an_epoch_has_every_row_once_and_validation_goes_round() {
        let rows = |source: &PackedSource, steps: std::ops::Range<u64>| -> Vec<usize> {
            steps.flat_map(|step| (0..2).flat_map(move |slot| source.training_rows(step, slot))).collect()
        };
        let epochs = source(WindowOrder::Epoch);
        let drawn = rows(&epochs, 1..8);
        for epoch in drawn.chunks(7) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            assert_eq!(epoch, (0..7).collect::<Vec<_>>());
        }
        assert_ne!(drawn[..7], drawn[7..14]);
        let random = source(WindowOrder::Random);
        let (drawn, again) = (rows(&random, 1..50), rows(&random, 1..50));
        assert!(drawn == again && (0..7).all(|row| drawn.contains(&row)));
        let first =
            |slot| epochs.validation_slot(slot).u32("tokens").unwrap().0.iter().step_by(4).copied().collect::<Vec<_>>();
        assert_eq!([first(0), first(1)], [[8, 9], [10, 8]]);
    }

    proptest! {
        #[test]
        fn each_example_stands_in_one_row_whole(lengths in prop::collection::vec(1usize..20, 1..200), more in 0usize..30) {
            let context = lengths.iter().max().unwrap() + more;
            let examples: Vec<Example> = (0..).zip(&lengths).map(|(token, &length)| example(10 * token, length)).collect();
            let packed = PackedRows::pack(&examples, context);
            prop_assert_eq!(packed.learned(), examples.len());
            let mut found = Vec::new();
            for row in 0..packed.rows() {
                let batch = packed.batch(&[row]);
                let (segments, _) = batch.u32("segments").unwrap();
                prop_assert_eq!(segments.len(), context);
                prop_assert!(segments[0] == 0 && segments.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] + 1));
                let mut start = 0;
                for segment in segments.chunk_by(|a, b| a == b) {
                    let places = start..start + segment.len();
                    start = places.end;
                    let learned = batch.f32("weights").unwrap().0[places.clone()].iter().map(|&weight| weight == 1.0);
                    let one = Example {
                        tokens: batch.u32("tokens").unwrap().0[places.clone()].to_vec(),
                        targets: batch.u32("targets").unwrap().0[places].to_vec(),
                        learned: learned.collect(),
                    };
                    if one.learned.contains(&true) {
                        found.push(one);
                    } else {
                        prop_assert_eq!(start, context, "what fills a row up stands at its end");
                        prop_assert!(one.tokens.iter().chain(&one.targets).all(|&token| token == 0));
                    }
                }
            }
            found.sort_by_key(|example| example.tokens[0]);
            prop_assert_eq!(found, examples);
        }
    }
}
