//! A model of any kind, assembled from its tensors: from a batch to its loss.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Device, Tensor, TensorData};

use crate::batch::Batch;
use crate::compute::{ComputeError, SlotKey};
use crate::config::ModelConfig;
use crate::dropout::Dropout;
use crate::gpt::Gpt;
use crate::kernels::{Positions, cross_entropy};
use crate::leaves::{Leaf, Leaves};
use crate::line::Line;
use crate::llama::Llama;
use crate::traffic::upload;
use crate::transformer::Transformer;

/// Positions, whose tables are on the device, for the next slot of the same shape.
pub(crate) type KeptPositions = Mutex<Option<Arc<Positions>>>;

/// A model's tensors in working order.
pub(crate) enum Network<'a> {
    Text(Text<'a>),
    Line(Box<Line>),
}

/// A Transformer and what it takes.
pub(crate) struct Text<'a> {
    pub(crate) transformer: Transformer,
    vocab_size: usize,
    context: usize,
    dropout: f64,
    kept: &'a KeptPositions,
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
    /// Takes its tensors from `leaves`, which are in layout order.
    pub(crate) fn assemble(model: &ModelConfig, leaves: &[Leaf], kept: &'a KeptPositions) -> Self {
        let mut leaves = Leaves::new(leaves);
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
        Self::Text(Text { transformer, vocab_size, context, dropout, kept })
    }

    /// The weighted loss sum `[1]` and the weight sum; dropout is active where there is a key.
    pub(crate) fn loss(
        &self,
        batch: &Batch,
        key: Option<SlotKey>,
        device: &Device,
    ) -> Result<(Tensor<1>, f64), ComputeError> {
        match self {
            Self::Text(text) => {
                let (tokens, shape) = batch.u32("tokens")?;
                let (targets, _) = batch.u32("targets")?;
                let weights = batch.optional_f32("weights")?.map(|(weights, _)| weights);
                let segments = batch.optional_u32("segments")?.map(|(segments, _)| segments);
                text.check(tokens, shape, "tokens")?;
                text.check(targets, shape, "targets")?;
                let dropout = key.map_or(Dropout::inactive(), |key| Dropout::training(text.dropout, key));
                let weight =
                    weights.map_or((shape[0] * shape[1]) as f64, |weights| weights.iter().map(|&w| f64::from(w)).sum());
                let positions = text.positions(shape, segments, device);
                let hidden = text.transformer.hidden(tokens, &positions, dropout);
                Ok((cross_entropy(hidden, text.transformer.head(), targets, weights), weight))
            }
            Self::Line(line) => {
                let ((x, shape), (y, _)) = (batch.f32("x")?, batch.f32("y")?);
                let column =
                    |values: &[f32]| Tensor::from_data(upload(TensorData::new(values.to_vec(), shape)), device);
                let (x, y) = (column(x), column(y)); // [rows, 1]
                let error = line.predict(x) - y;
                Ok(((error.clone() * error).sum(), shape[0] as f64))
            }
        }
    }
}
