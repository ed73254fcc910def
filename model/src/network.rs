//! A model of any kind, assembled from its tensors: from a batch to its loss.

mod pairs;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Device, Tensor, TensorData};

use crate::batch::{Batch, Sums};
use crate::compute::{ComputeError, SlotKey};
use crate::config::{ModelConfig, Objective, Precision};
use crate::dropout::Dropout;
use crate::gpt::Gpt;
use crate::kernels::{Positions, cross_entropy};
use crate::leaves::{Leaves, Part};
use crate::line::Line;
use crate::llama::Llama;
use crate::preference::PairLoss;
use crate::traffic::upload;
use crate::transformer::Transformer;

/// Positions, whose tables are on the device, for the next slot of the same shape.
pub(crate) type KeptPositions = Mutex<Option<Arc<Positions>>>;

/// A model's tensors in working order.
pub(crate) enum Network<'a> {
    Text(Text<'a>),
    Line(Box<Line>),
}

/// The sums of a slot, of which the loss may still be on the device.
pub(crate) enum PendingSums {
    /// The loss `[1]`, and the sum of weights.
    Device(Box<Tensor<1>>, f64),
    Known(Sums),
}

/// A Transformer and what it takes.
pub(crate) struct Text<'a> {
    pub(crate) transformer: Transformer,
    /// Whether it gives a score, and no logits.
    scores: bool,
    vocab_size: usize,
    context: usize,
    dropout: f64,
    /// Of projections and head.
    precision: Precision,
    kept: &'a KeptPositions,
}

/// The columns of a slot of text, `[B, T]` each.
struct TextColumns<'a> {
    tokens: &'a [u32],
    targets: &'a [u32],
    weights: Option<&'a [f32]>,
    segments: Option<&'a [u32]>,
    shape: [usize; 2],
}

impl TextColumns<'_> {
    /// Of each row, from the first position that counts to the last; empty where none does.
    fn counted(&self) -> impl Iterator<Item = Range<usize>> {
        let [rows, length] = self.shape;
        let counts = |position: &usize| self.weights.is_none_or(|weights| weights[*position] != 0.0);
        (0..rows).map(move |row| {
            let start = row * length;
            let mut counting = (start..start + length).filter(counts);
            match counting.next() {
                Some(first) => first..counting.next_back().unwrap_or(first) + 1,
                None => start..start,
            }
        })
    }

    fn weights(&self, positions: Range<usize>) -> Option<&[f32]> {
        self.weights.map(|weights| &weights[positions])
    }
}

impl Text<'_> {
    /// Checks token numbers `[B, T]` of a column.
    pub(crate) fn check(&self, tokens: &[u32], [_, length]: [usize; 2], column: &str) -> Result<(), ComputeError> {
        self.check_length(length, column)?;
        let vocab_size = self.vocab_size;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(ComputeError::Input(format!("{column}: token {token} in a vocabulary of {vocab_size}")));
        }
        Ok(())
    }

    /// Checks how many tokens a row has, with those before it.
    pub(crate) fn check_length(&self, length: usize, column: &str) -> Result<(), ComputeError> {
        let context = self.context;
        if length == 0 || length > context {
            return Err(ComputeError::Input(format!("{column} of length {length} for a context of {context}")));
        }
        Ok(())
    }

    /// The columns of a slot, checked.
    fn columns<'b>(&self, batch: &'b Batch) -> Result<TextColumns<'b>, ComputeError> {
        let (tokens, shape) = batch.u32("tokens")?;
        let targets = if self.scores { &[] } else { batch.u32("targets")?.0 };
        let weights = batch.optional_f32("weights")?.map(|(weights, _)| weights);
        let segments = batch.optional_u32("segments")?.map(|(segments, _)| segments);
        self.check(tokens, shape, "tokens")?;
        self.check(targets, shape, "targets")?;
        Ok(TextColumns { tokens, targets, weights, segments, shape })
    }

    /// What the head makes logits of, `[B·T, C]`; dropout is active where there is a key.
    fn hidden(&self, columns: &TextColumns<'_>, key: Option<SlotKey>, device: &Device) -> Tensor<2> {
        let dropout = key.map_or(Dropout::inactive(), |key| Dropout::training(self.dropout, key));
        let positions = self.positions(columns.shape, columns.segments, device);
        self.transformer.hidden(columns.tokens, &positions, dropout)
    }

    /// The weighted loss sum `[1]` and the weight sum of each row, dropout inactive.
    pub(crate) fn row_losses(&self, batch: &Batch, device: &Device) -> Result<Vec<(Tensor<1>, f64)>, ComputeError> {
        self.gives_logits()?;
        let columns = self.columns(batch)?;
        let hidden = self.hidden(&columns, None, device);
        let weights = columns.counted().map(|counted| total(columns.weights(counted.clone()), counted.len()));
        Ok(self.losses(&columns, &hidden, self.transformer.head(), device).zip(weights).collect())
    }

    /// The weighted loss sum `[1]` of each row. The head sees no more of it than lies between the first and the last position
    /// that count.
    fn losses(
        &self,
        columns: &TextColumns<'_>,
        hidden: &Tensor<2>,
        head: Tensor<2>,
        device: &Device,
    ) -> impl Iterator<Item = Tensor<1>> {
        columns.counted().map(move |counted| {
            if counted.is_empty() {
                return Tensor::zeros([1], device);
            }
            let (targets, weights) = (&columns.targets[counted.clone()], columns.weights(counted.clone()));
            cross_entropy(hidden.clone().slice(counted), head.clone(), targets, weights, self.precision)
        })
    }

    fn gives_logits(&self) -> Result<(), ComputeError> {
        match self.scores {
            true => Err(ComputeError::Input("the model scores texts, and says nothing of tokens".into())),
            false => Ok(()),
        }
    }

    /// Where the tokens of a slot stand: as those of the last one, or kept for the next, if they have no segments.
    pub(crate) fn positions(&self, shape: [usize; 2], segments: Option<&[u32]>, device: &Device) -> Arc<Positions> {
        let new = || Arc::new(self.transformer.positions(Positions::new(shape, segments, device)));
        if segments.is_some() {
            return new();
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(kept) if kept.shape() == shape => kept.clone(),
            _ => kept.insert(new()).clone(),
        }
    }
}

impl<'a> Network<'a> {
    /// Takes its tensors from `parts`, which are in layout order; its projections and head multiply in `precision`.
    pub(crate) fn assemble(model: &ModelConfig, parts: &[Part], precision: Precision, kept: &'a KeptPositions) -> Self {
        let mut leaves = Leaves::new(parts, precision);
        let (transformer, vocab_size, context, dropout) = match model {
            ModelConfig::Gpt(gpt) => {
                (Transformer::Gpt(Box::new(Gpt::assemble(gpt, &mut leaves))), gpt.vocab_size, gpt.context, gpt.dropout)
            }
            ModelConfig::Llama(llama) => {
                let transformer = Transformer::Llama(Box::new(Llama::assemble(llama, &mut leaves)));
                (transformer, llama.vocab_size, llama.context, llama.dropout)
            }
            ModelConfig::Line(_) => return Self::Line(Box::new(Line::assemble(&mut leaves))),
        };
        Self::Text(Text { transformer, scores: model.has_score_head(), vocab_size, context, dropout, precision, kept })
    }

    /// A slot's sums, and a tensor `[1]` whose gradient is the loss's; dropout is active.
    pub(crate) fn loss(
        &self,
        batch: &Batch,
        key: SlotKey,
        objective: Objective,
        device: &Device,
    ) -> Result<(Tensor<1>, PendingSums), ComputeError> {
        let on_device =
            |(loss, weight): (Tensor<1>, f64)| (loss.clone(), PendingSums::Device(Box::new(loss.inner()), weight));
        match self {
            Self::Text(text) if objective == Objective::NextToken => {
                text.next_token_loss(batch, Some(key), device).map(on_device)
            }
            Self::Text(text) => {
                let rows = text.read_rows(batch, Some(key), device)?;
                let PairLoss { sums, slopes } = rows.pair_loss(batch, objective, text.scores)?;
                Ok((text.along(&rows, &slopes, device)?, PendingSums::Known(sums)))
            }
            Self::Line(line) => line_loss(line, batch, device).map(on_device),
        }
    }

    /// A slot's sums, dropout inactive.
    pub(crate) fn sums(
        &self,
        batch: &Batch,
        objective: Objective,
        device: &Device,
    ) -> Result<PendingSums, ComputeError> {
        let on_device = |(loss, weight)| PendingSums::Device(Box::new(loss), weight);
        match self {
            Self::Text(text) if objective == Objective::NextToken => {
                text.next_token_loss(batch, None, device).map(on_device)
            }
            Self::Text(text) => {
                let rows = text.read_rows(batch, None, device)?;
                Ok(PendingSums::Known(rows.pair_loss(batch, objective, text.scores)?.sums))
            }
            Self::Line(line) => line_loss(line, batch, device).map(on_device),
        }
    }
}

impl Text<'_> {
    /// The weighted loss sum `[1]` and the weight sum; dropout is active where there is a key.
    fn next_token_loss(
        &self,
        batch: &Batch,
        key: Option<SlotKey>,
        device: &Device,
    ) -> Result<(Tensor<1>, f64), ComputeError> {
        self.gives_logits()?;
        let columns = self.columns(batch)?;
        let hidden = self.hidden(&columns, key, device);
        let loss = cross_entropy(hidden, self.transformer.head(), columns.targets, columns.weights, self.precision);
        Ok((loss, total(columns.weights, columns.tokens.len())))
    }
}

/// The sum of squared errors `[1]`, and the number of rows.
fn line_loss(line: &Line, batch: &Batch, device: &Device) -> Result<(Tensor<1>, f64), ComputeError> {
    let ((x, shape), (y, _)) = (batch.f32("x")?, batch.f32("y")?);
    let column = |values: &[f32]| Tensor::from_data(upload(TensorData::new(values.to_vec(), shape)), device);
    let (x, y) = (column(x), column(y)); // [rows, 1]
    let error = line.predict(x) - y;
    Ok(((error.clone() * error).sum(), shape[0] as f64))
}

/// The sum of the weights of so many positions, 1 each where none are given.
fn total(weights: Option<&[f32]>, positions: usize) -> f64 {
    weights.map_or(positions as f64, |weights| weights.iter().map(|&weight| f64::from(weight)).sum())
}
