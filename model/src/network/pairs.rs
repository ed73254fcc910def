//! Pairs of answers: each row is read to a number, and their loss follows from these.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{Text, TextColumns};
use crate::batch::Batch;
use crate::compute::{ComputeError, SlotKey, floats};
use crate::config::Objective;
use crate::kernels::cross_entropy;
use crate::preference::{PairLoss, dpo_loss, reward_loss};
use crate::traffic::{self, upload};

/// Rows that were read, and a number for each, from which the loss of their pairs follows.
pub(super) struct ReadRows<'a> {
    columns: TextColumns<'a>,
    /// `[B·T, C]`, with its graph if there is to be a gradient.
    hidden: Tensor<2>,
    /// Log-probability of what counts in a row, or its score.
    values: Vec<f32>,
}

impl Text<'_> {
    /// Reads rows, and of each a number: its score, if the model gives such, else the log-probability of what counts in it. With
    /// `key`, dropout is active, and the graph is kept.
    pub(super) fn read_rows<'b>(
        &self,
        batch: &'b Batch,
        key: Option<SlotKey>,
        device: &Device,
    ) -> Result<ReadRows<'b>, ComputeError> {
        let columns = self.columns(batch)?;
        let hidden = self.hidden(&columns, key, device);
        let untracked = |tensor: Tensor<2>| if key.is_some() { tensor.inner() } else { tensor };
        let (inner, head) = (untracked(hidden.clone()), untracked(self.transformer.head()));
        let values = match self.scores {
            true => scores(&columns, inner, head)?,
            false => {
                let device = inner.device();
                let losses = self.losses(&columns, &inner, head, &device).collect();
                -Tensor::cat(losses, 0)
            }
        };
        let values = values.try_into_data().map_err(|error| ComputeError::Device(error.to_string()))?;
        traffic::read(&values);
        let values = floats(&values)?.to_vec();
        Ok(ReadRows { columns, hidden, values })
    }

    /// `[1]`: the sum of the rows' numbers, each times its slope.
    pub(super) fn along(
        &self,
        rows: &ReadRows<'_>,
        slopes: &[f32],
        device: &Device,
    ) -> Result<Tensor<1>, ComputeError> {
        let ReadRows { columns, hidden, .. } = rows;
        let head = self.transformer.head();
        if self.scores {
            let slopes = Tensor::<1>::from_data(upload(TensorData::new(slopes.to_vec(), [slopes.len()])), device);
            return Ok((scores(columns, hidden.clone(), head)? * slopes).sum());
        }
        // A row's log-probability is its loss, negated.
        let [_, length] = columns.shape;
        let weights: Vec<f32> = match columns.weights {
            Some(weights) => {
                let rows = weights.chunks(length).zip(slopes);
                rows.flat_map(|(row, slope)| row.iter().map(move |weight| -slope * weight)).collect()
            }
            None => slopes.iter().flat_map(|slope| std::iter::repeat_n(-slope, length)).collect(),
        };
        Ok(cross_entropy(hidden.clone(), head, columns.targets, Some(&weights), self.precision))
    }

    /// Of each row of a slot its score, if the model gives such, else the log-probability of what counts in it; dropout
    /// inactive.
    pub(crate) fn row_values(&self, batch: &Batch, device: &Device) -> Result<Vec<f32>, ComputeError> {
        Ok(self.read_rows(batch, None, device)?.values)
    }
}

impl ReadRows<'_> {
    /// The loss of the pairs that they are.
    pub(super) fn pair_loss(
        &self,
        batch: &Batch,
        objective: Objective,
        scores: bool,
    ) -> Result<PairLoss, ComputeError> {
        let rows = self.values.len();
        if !rows.is_multiple_of(2) {
            return Err(ComputeError::Input(format!("{rows} rows are no pairs of answers")));
        }
        match (objective, scores) {
            (Objective::Reward, true) => Ok(reward_loss(&self.values)),
            (Objective::Dpo(config), false) => {
                let references = batch.optional_f32("references")?.map(|(references, _)| references);
                let zeros = vec![0.0; rows];
                Ok(dpo_loss(&self.values, references.unwrap_or(&zeros), config))
            }
            (_, true) => Err(ComputeError::Input(format!("a model that scores texts cannot learn {objective:?}"))),
            (_, false) => Err(ComputeError::Input(format!("a model that predicts tokens cannot learn {objective:?}"))),
        }
    }
}

/// The scores `[B]` of rows: of `hidden` `[B·T, C]` the one position of each row that counts, by the head `[1, C]`.
fn scores(columns: &TextColumns<'_>, hidden: Tensor<2>, head: Tensor<2>) -> Result<Tensor<1>, ComputeError> {
    let rows = columns.shape[0];
    let place = |range: Range<usize>| (range.len() == 1).then_some(range.start as i32);
    let places: Option<Vec<i32>> = columns.counted().map(place).collect();
    let places = places.ok_or_else(|| ComputeError::Input("a score is read at one position of each row".into()))?;
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [rows]), &hidden.device());
    Ok((hidden.select(0, places) * head).sum_dim(1).reshape([rows]))
}
