//! What one slot is computed from: named columns of whole rows.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Sums over the positions (or rows) of one or more slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Sum of weighted losses: nats, or squared error.
    pub loss: f64,
    /// Sum of the weights: how many tokens, rows or pairs count.
    pub weight: f64,
    /// Where pairs of answers are learned from: what is logged of them.
    pub pairs: PairSums,
}

impl Sums {
    /// The loss per unit of weight.
    pub fn mean(self) -> f64 {
        self.loss / self.weight
    }
}

impl std::ops::Add for Sums {
    type Output = Self;

    fn add(self, right: Self) -> Self {
        Self { loss: self.loss + right.loss, weight: self.weight + right.weight, pairs: self.pairs + right.pairs }
    }
}

/// Sums over pairs of answers, of which people prefer one: what is logged besides the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PairSums {
    /// Pairs whose preferred answer has the higher reward; half of one where both are equal.
    pub accurate: f64,
    /// Rewards of preferred answers.
    pub chosen_reward: f64,
    /// Rewards of the others.
    pub rejected_reward: f64,
    /// Log-probabilities of preferred answers, in nats; 0 where there is only a score.
    pub chosen_log_prob: f64,
    /// Log-probabilities of the others.
    pub rejected_log_prob: f64,
}

impl PairSums {
    /// How many numbers there are.
    pub const COUNT: usize = 5;

    /// All of them, in order.
    pub fn to_array(self) -> [f64; Self::COUNT] {
        let Self { accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob } = self;
        [accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob]
    }
}

impl From<[f64; Self::COUNT]> for PairSums {
    fn from(numbers: [f64; Self::COUNT]) -> Self {
        let [accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob] = numbers;
        Self { accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob }
    }
}

impl std::ops::Add for PairSums {
    type Output = Self;

    fn add(self, right: Self) -> Self {
        let (left, right) = (self.to_array(), right.to_array());
        Self::from(std::array::from_fn(|i| left[i] + right[i]))
    }
}

/// The rows of one slot, as named columns.
///
/// A Transformer reads `tokens` and `targets`, u32 `[rows, length]`, and where present `weights`, f32 `[rows, length]`,
/// by which each position's loss counts (1 where absent), and `segments`, u32 `[rows, length]`: consecutive positions of a
/// row with one number are a document, or a conversation, of its own (a row is one where absent). Where it learns from
/// [pairs](crate::preference), row 2i is the preferred answer of pair i and row 2i + 1 the other one: `weights` are 1 at
/// the answer's tokens, or, for a score, at the one position of each row where it is read; and `references`, f32
/// `[rows, 1]`, where present, are log-probabilities by the reference (0 where absent). The straight line reads `x` and `y`,
/// f32 `[rows, 1]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The columns, in a fixed order.
    pub columns: Vec<Column>,
}

/// One named, row-major array.
#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    /// What it holds, e.g. `tokens`.
    pub name: String,
    /// `[rows, length]`, or `[rows, 1]` for what belongs to rows.
    pub shape: [usize; 2],
    /// The elements.
    pub values: Values,
}

/// The elements of a column.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Numbers of tokens or segments.
    U32(Vec<u32>),
    /// Weights or measurements.
    F32(Vec<f32>),
}

/// Why a batch cannot be computed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BatchError {
    /// A column is not there, or of another type.
    #[error("the batch has no {element} column {name:?}; coordinator and worker disagree on the model")]
    Missing {
        /// The column.
        name: &'static str,
        /// Its element type.
        element: &'static str,
    },
    /// A column's size is not its shape's, or not that of the others.
    #[error(
        "column {name:?} holds {found} elements in shape {shape:?}, which do not fit together or beside the others"
    )]
    Shape {
        /// The column.
        name: String,
        /// Its shape.
        shape: [usize; 2],
        /// Its element count.
        found: usize,
    },
    /// The rows cannot be cut so.
    #[error(
        "{rows} rows cannot be cut into {count} parts of equally many; coordinator and worker disagree on the step"
    )]
    Parts {
        /// Rows there are.
        rows: usize,
        /// Parts wanted.
        count: usize,
    },
}

impl Column {
    fn misshapen(&self) -> BatchError {
        BatchError::Shape { name: self.name.clone(), shape: self.shape, found: self.values.len() }
    }
}

impl Values {
    fn len(&self) -> usize {
        match self {
            Self::U32(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }
}

/// The elements of a column and its shape.
pub type Shaped<'a, T> = (&'a [T], [usize; 2]);

impl Batch {
    /// A column of whole numbers and its shape, if there is one.
    ///
    /// # Errors
    /// If it is of another type, or its size is not its shape's.
    pub fn optional_u32(&self, name: &'static str) -> Result<Option<Shaped<'_, u32>>, BatchError> {
        match self.column(name)? {
            Some((Values::U32(values), shape)) => Ok(Some((values, shape))),
            Some(_) => Err(BatchError::Missing { name, element: "u32" }),
            None => Ok(None),
        }
    }

    /// A column of whole numbers and its shape.
    ///
    /// # Errors
    /// If there is none of that name and type, or its size is not its shape's.
    pub fn u32(&self, name: &'static str) -> Result<Shaped<'_, u32>, BatchError> {
        self.optional_u32(name)?.ok_or(BatchError::Missing { name, element: "u32" })
    }

    /// A column of floats and its shape, if there is one.
    ///
    /// # Errors
    /// If it is of another type, or its size is not its shape's.
    pub fn optional_f32(&self, name: &'static str) -> Result<Option<Shaped<'_, f32>>, BatchError> {
        match self.column(name)? {
            Some((Values::F32(values), shape)) => Ok(Some((values, shape))),
            Some(_) => Err(BatchError::Missing { name, element: "f32" }),
            None => Ok(None),
        }
    }

    /// A column of floats and its shape.
    ///
    /// # Errors
    /// If there is none of that name and type, or its size is not its shape's.
    pub fn f32(&self, name: &'static str) -> Result<Shaped<'_, f32>, BatchError> {
        self.optional_f32(name)?.ok_or(BatchError::Missing { name, element: "f32" })
    }

    /// Cuts the rows into `count` parts of consecutive rows, equally many.
    ///
    /// # Errors
    /// If the rows cannot be cut so, or a column's size is not its shape's.
    pub fn parts(&self, count: usize) -> Result<Vec<Self>, BatchError> {
        let rows = self.columns.first().map_or(0, |column| column.shape[0]);
        if count == 0 || rows == 0 || !rows.is_multiple_of(count) {
            return Err(BatchError::Parts { rows, count });
        }
        let length = rows / count;
        (0..count).map(|part| self.rows(part * length..(part + 1) * length)).collect()
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// If a column has not as many, or its size is not its shape's.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self, BatchError> {
        let of_column = |column: &Column| {
            let [_, length] = column.shape;
            let range = rows.start * length..rows.end * length;
            let values = match &column.values {
                Values::U32(values) => values.get(range).map(|values| Values::U32(values.to_vec())),
                Values::F32(values) => values.get(range).map(|values| Values::F32(values.to_vec())),
            };
            let values = values.ok_or_else(|| column.misshapen())?;
            Ok(Column { name: column.name.clone(), shape: [rows.len(), length], values })
        };
        Ok(Self { columns: self.columns.iter().map(of_column).collect::<Result<_, _>>()? })
    }

    /// How many positions (or rows) there are, weighted or not.
    pub fn positions(&self) -> usize {
        self.columns.first().map_or(0, |column| column.shape.iter().product())
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.columns.iter().map(|column| 4 * column.shape.iter().product::<usize>()).sum()
    }

    fn column(&self, name: &'static str) -> Result<Option<(&Values, [usize; 2])>, BatchError> {
        let Some(column) = self.columns.iter().find(|column| column.name == name) else { return Ok(None) };
        let [rows, length] = column.shape;
        let [all_rows, full_length] = self.columns[0].shape;
        let fits = rows == all_rows && (length == full_length || length == 1);
        if rows.checked_mul(length) != Some(column.values.len()) || !fits {
            return Err(column.misshapen());
        }
        Ok(Some((&column.values, column.shape)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_consecutive_rows_of_every_column() {
        let column = |name: &str, shape, values| Column { name: name.into(), shape, values };
        let batch = Batch {
            columns: vec![
                column("tokens", [4, 2], Values::U32((0..8).collect())),
                column("references", [4, 1], Values::F32(vec![0.0, 1.0, 2.0, 3.0])),
            ],
        };
        let parts = batch.parts(2).unwrap();
        assert_eq!(parts[0].u32("tokens").unwrap(), (&[0, 1, 2, 3][..], [2, 2]));
        assert_eq!(parts[1].u32("tokens").unwrap(), (&[4, 5, 6, 7][..], [2, 2]));
        assert_eq!(parts[1].f32("references").unwrap(), (&[2.0, 3.0][..], [2, 1]));
        assert_eq!(batch.parts(1).unwrap(), std::slice::from_ref(&batch));
        for count in [0, 3, 8] {
            assert_eq!(batch.parts(count), Err(BatchError::Parts { rows: 4, count }));
        }
        let mut short = batch;
        short.columns[1].values = Values::F32(vec![0.0; 3]);
        assert!(matches!(short.parts(2), Err(BatchError::Shape { found: 3, .. })));
    }
}
