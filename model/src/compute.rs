//! One device's share of a training step: the loss and the gradient of one slot.
//!
//! The gradient is that of the *sum* of weighted losses; the mean is taken once, over the whole step, by the optimizer.

mod local_steps;

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, Device, Tensor, TensorData, Transaction};

pub use self::local_steps::LocalSteps;
use crate::adapters::{AdaptedLayout, AdapterConfig, Origin};
use crate::batch::{Batch, BatchError, Sums};
use crate::compression::{GradientFormat, Rounding};
use crate::config::{ModelConfig, Objective, Precision};
use crate::device::ComputeDevice;
use crate::dropout::Dropout;
use crate::kernels::{self, KeyCache, Positions, logits};
use crate::layout::{Layout, TensorSpec};
use crate::leaves::{Leaf, Part, add_on_device};
use crate::network::{KeptPositions, Network, PendingSums, Text};
use crate::projection::Adapter;
use crate::traffic::{self, upload};
use crate::tree::{Block, sum_leaves};

/// Names one slot of one step of one run: all that dropout depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotKey {
    /// Seed of the run.
    pub seed: u64,
    /// The optimizer step, from 1; of a local step, its number in the run.
    pub step: u64,
    /// The slot within the step.
    pub slot: u32,
}

/// What one slot gives.
#[derive(Clone, Debug)]
pub struct SlotGradient {
    /// Sum of weighted losses, and of weights.
    pub sums: Sums,
    /// Gradient of the loss sum, flat in layout order.
    pub gradient: Vec<f32>,
}

/// Why a slot could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ComputeError {
    /// The batch is not one for this model.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A token or sequence is outside the model.
    #[error("{0}")]
    Input(String),
    /// Parameters of another layout.
    #[error("{found} parameters for a model of {expected}: coordinator and worker disagree on the layout")]
    Parameters {
        /// Elements of the layout.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// The device has no bf16.
    #[error(
        "this device does not multiply bf16; start this worker with --device cpu, or set compute.precision = \"f32\" in the \
         recipe"
    )]
    NoBf16,
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(String),
}

/// What a block of slots gives.
#[derive(Clone, Debug)]
pub struct BlockGradient {
    /// Of each slot, in order.
    pub slot_sums: Vec<Sums>,
    /// Gradient of the sum of all losses, added along the tree over the slots; flat in layout order.
    pub gradient: Vec<f32>,
}

/// A model on a device, ready to compute slots with the parameters loaded last.
#[derive(Debug)]
pub struct Computer {
    model: ModelConfig,
    objective: Objective,
    precision: Precision,
    /// Of what is trained.
    layout: Layout,
    /// All else, where adapters are trained.
    frozen: Option<Frozen>,
    device: Device,
    /// Whether sums may be made on the device, to the bits that they have here.
    adds_exactly: bool,
    on_cpu: bool,
    leaves: Vec<Leaf>,
    /// Positions of the slots computed last, with gradients and without.
    kept: [KeptPositions; 2],
    /// A flat vector that nobody needs any more.
    spare: Mutex<Vec<f32>>,
}

/// What a model with adapters stands on.
#[derive(Debug)]
struct Frozen {
    layout: AdaptedLayout,
    /// Without any until [`Computer::stand_on`].
    base: Base,
}

/// The frozen parameters of a model with adapters, on a device. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Base(Vec<Leaf>);

impl Computer {
    /// A computer for `model`, with all parameters 0 until [`Self::load`].
    pub fn new(model: &ModelConfig, device: &ComputeDevice) -> Self {
        let adds_exactly = device.adds_exactly();
        let place = if adds_exactly { "there" } else { "here: it flushes small numbers to 0" };
        tracing::debug!("{}: gradients of a block's slots are added {place}", device.description);
        Self {
            model: model.clone(),
            objective: Objective::NextToken,
            precision: Precision::F32,
            layout: Layout::of(model),
            frozen: None,
            device: device.handle().clone().autodiff(),
            adds_exactly,
            on_cpu: device.is_cpu(),
            leaves: Vec::new(),
            kept: Default::default(),
            spare: Mutex::default(),
        }
    }

    /// The same, to compute the losses of `objective`; else of the next token.
    pub fn with_objective(self, objective: Objective) -> Self {
        Self { objective, ..self }
    }

    /// The same, whose products are computed in `precision`; else in f32.
    ///
    /// # Errors
    /// If the device does not have it.
    pub fn with_precision(self, precision: Precision) -> Result<Self, ComputeError> {
        match precision {
            Precision::Bf16 if !self.on_cpu && !self.device.supports_dtype(DType::BF16) => Err(ComputeError::NoBf16),
            _ => Ok(Self { precision, ..self }),
        }
    }

    /// The same where `adapters`, whose names are the model's, are trained alone: gradients, and the parameters to load, are
    /// theirs. Nothing is computed before there is a base to [stand on](Self::stand_on).
    #[must_use]
    pub fn with_adapters(self, adapters: &AdapterConfig) -> Self {
        let layout = AdaptedLayout::of(&self.model, adapters);
        Self { layout: layout.trained.clone(), frozen: Some(Frozen { layout, base: Base::default() }), ..self }
    }

    /// The layout of the flat vector that is trained.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The layout of what adapters stand on; `None` where all is trained.
    pub fn base_layout(&self) -> Option<&Layout> {
        self.frozen.as_ref().map(|frozen| &frozen.layout.base)
    }

    /// Takes the frozen parameters of a model with adapters to the device, flat in the layout of the base.
    ///
    /// # Errors
    /// If their number is not that layout's.
    pub fn base(&self, parameters: &[f32]) -> Result<Base, ComputeError> {
        let nothing = Layout { tensors: Vec::new() };
        let layout = self.base_layout().unwrap_or(&nothing);
        if parameters.len() != layout.len() {
            return Err(ComputeError::Parameters { expected: layout.len(), found: parameters.len() });
        }
        let Ok(leaves) = leaves(layout, &self.device, false, copied_from(parameters));
        Ok(Base(leaves))
    }

    /// Computes with this base from now on, which is one of a model and adapters like these.
    pub fn stand_on(&mut self, base: Base) {
        if let Some(frozen) = &mut self.frozen {
            frozen.base = base;
        }
    }

    /// Takes `parameters`, flat in layout order, to the device.
    ///
    /// # Errors
    /// If their number is not the layout's.
    pub fn load(&mut self, parameters: &[f32]) -> Result<(), ComputeError> {
        if parameters.len() != self.layout.len() {
            return Err(ComputeError::Parameters { expected: self.layout.len(), found: parameters.len() });
        }
        let Ok(()) = self.load_from(copied_from(parameters));
        Ok(())
    }

    /// Takes parameters to the device, a tensor at a time: `fill` writes the elements of the flat vector from the one that it
    /// is told on.
    ///
    /// # Errors
    /// Those of `fill`; no parameters are loaded then.
    pub fn load_from<E>(&mut self, fill: impl FnMut(usize, &mut [f32]) -> Result<(), E>) -> Result<(), E> {
        self.leaves.clear();
        self.leaves = leaves(&self.layout, &self.device, true, fill)?;
        Ok(())
    }

    /// The parameters on the device, flat in layout order, read back once.
    ///
    /// # Errors
    /// If the device fails.
    pub fn parameters(&self) -> Result<Vec<f32>, ComputeError> {
        let (_, data) = read(Vec::new(), self.leaves.iter().map(Leaf::untracked).collect())?;
        let mut parameters = Vec::with_capacity(self.layout.len());
        data.iter().try_for_each(|tensor| floats(tensor).map(|values| parameters.extend_from_slice(values)))?;
        Ok(parameters)
    }

    /// Loss and gradient of one slot, dropout active.
    ///
    /// # Errors
    /// If the batch does not fit the model, or the device fails.
    pub fn gradient(&self, batch: &Batch, key: SlotKey) -> Result<SlotGradient, ComputeError> {
        self.gradient_at(&self.leaves, (batch, key))
    }

    /// Losses and the summed gradient of a block's slots (at least one), in order, dropout active. Slots are computed one
    /// by one, and their gradients added along the tree, at whose nodes they are rounded to `format`: on the device, and read
    /// back once at the end, if nothing is rounded and the device adds as a CPU does; else each is read back and added here.
    ///
    /// # Errors
    /// The first among `slots`; else if a batch does not fit the model, or the device fails.
    pub fn block_gradient<'a>(
        &self,
        slots: impl ExactSizeIterator<Item = Result<(&'a Batch, SlotKey), ComputeError>>,
        format: GradientFormat,
    ) -> Result<BlockGradient, ComputeError> {
        if self.adds_exactly && format == GradientFormat::F32 {
            let mut losses = Vec::with_capacity(slots.len());
            let gradients = slots.map(|slot| -> Result<_, ComputeError> {
                let (loss, gradient) = self.backward(&self.leaves, slot?)?;
                losses.push(loss);
                Ok(gradient)
            });
            let gradient = sum_leaves(gradients, |left, right, _| add_on_device(left, right))?.ok_or_else(no_slots)?;
            let (slot_sums, gradient) = read(losses, gradient)?;
            return Ok(BlockGradient { slot_sums, gradient: self.flat(gradient)? });
        }
        let mut slot_sums = Vec::with_capacity(slots.len());
        let gradients = slots.map(|slot| -> Result<_, ComputeError> {
            let (batch, key) = slot?;
            let SlotGradient { sums, gradient } = self.gradient_at(&self.leaves, (batch, key))?;
            slot_sums.push(sums);
            Ok((key, gradient))
        });
        let gradient = self.sum_rounded(gradients, format)?;
        Ok(BlockGradient { slot_sums, gradient })
    }

    /// The sum of what slots of a block give, in order, along the tree, at whose nodes it is rounded to `format`.
    fn sum_rounded(
        &self,
        leaves: impl ExactSizeIterator<Item = Result<(SlotKey, Vec<f32>), ComputeError>>,
        format: GradientFormat,
    ) -> Result<Vec<f32>, ComputeError> {
        let rounded = leaves.map(|leaf| -> Result<_, ComputeError> {
            let (SlotKey { seed, step, slot }, mut gradient) = leaf?;
            let rounding = Rounding { format, seed, step };
            rounding.round(Block::leaf(slot), &mut gradient);
            Ok((slot, rounding, gradient))
        });
        let sum = sum_leaves(rounded, |(slot, rounding, left), (_, _, right), node| {
            let sum = rounding.add(left, &right, Block::above(slot, node.level));
            self.reuse(right);
            (slot, rounding, sum)
        })?;
        sum.map(|(_, _, gradient)| gradient).ok_or_else(no_slots)
    }

    /// Loss and gradient of one slot with the parameters in `leaves`, read back.
    fn gradient_at(&self, leaves: &[Leaf], slot: (&Batch, SlotKey)) -> Result<SlotGradient, ComputeError> {
        let (loss, gradient) = self.backward(leaves, slot)?;
        let (sums, gradient) = read(vec![loss], gradient)?;
        Ok(SlotGradient { sums: sums[0], gradient: self.flat(gradient)? })
    }

    /// Takes a gradient back, so that the next one need not ask the system for memory.
    pub fn reuse(&self, gradient: Vec<f32>) {
        *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = gradient;
    }

    /// Starts forward and backward of one slot with the parameters in `leaves`: its loss, and the gradient of each trainable
    /// tensor, on the device. On the CPU backend it runs as one of the threads that operations are split among, so that none of these has to wake
    /// another; a GPU is better asked by one thread, as each has memory of its own there.
    fn backward(&self, leaves: &[Leaf], slot: (&Batch, SlotKey)) -> Result<(PendingSums, Vec<Leaf>), ComputeError> {
        if !self.on_cpu {
            return self.backward_here(leaves, slot);
        }
        let span = tracing::Span::current();
        rayon::scope(|_| span.in_scope(|| self.backward_here(leaves, slot)))
    }

    fn backward_here(
        &self,
        leaves: &[Leaf],
        (batch, key): (&Batch, SlotKey),
    ) -> Result<(PendingSums, Vec<Leaf>), ComputeError> {
        let forward = tracing::info_span!(target: "lockstep", "forward", slot = key.slot).entered();
        let network = self.network(&self.parts(leaves), &self.kept[0]);
        let (loss, sums) = network.loss(batch, key, self.objective, &self.device)?;
        drop(forward);
        let _backward = tracing::info_span!(target: "lockstep", "backward", slot = key.slot).entered();
        let mut gradients = loss.backward();
        let trainable = leaves.iter().filter(|leaf| leaf.is_trainable());
        let gradient = trainable.map(|leaf| leaf.gradient(&mut gradients)).collect();
        Ok((sums, gradient))
    }

    /// The flat vector of the trainable tensors' gradients. Frozen tensors have gradient 0.
    fn flat(&self, gradient: Vec<TensorData>) -> Result<Vec<f32>, ComputeError> {
        let mut gradient = gradient.into_iter();
        let mut vector = std::mem::take(&mut *self.spare.lock().unwrap_or_else(PoisonError::into_inner));
        vector.clear();
        vector.reserve_exact(self.layout.len());
        for tensor in &self.layout.tensors {
            if tensor.trainable {
                let of_tensor = gradient.next();
                vector.extend_from_slice(of_tensor.as_ref().map_or(Ok(&[][..]), floats)?);
            } else {
                vector.resize(tensor.range().end, 0.0);
            }
        }
        if vector.len() != self.layout.len() {
            let found = vector.len();
            return Err(ComputeError::Device(format!("{found} gradient elements came back of {}", self.layout.len())));
        }
        Ok(vector)
    }

    /// Losses of slots, in order, dropout inactive, read back once.
    ///
    /// # Errors
    /// The first among `batches`; else if a batch does not fit the model, or the device fails.
    pub fn losses<'a>(
        &self,
        batches: impl Iterator<Item = Result<&'a Batch, ComputeError>>,
    ) -> Result<Vec<Sums>, ComputeError> {
        let (device, leaves) = self.inference();
        let network = self.network(&leaves, &self.kept[1]);
        let loss = |batch: Result<&Batch, ComputeError>| {
            let _forward = tracing::info_span!(target: "lockstep", "forward").entered();
            network.sums(batch?, self.objective, &device)
        };
        let losses = batches.map(loss).collect::<Result<_, ComputeError>>()?;
        Ok(read(losses, Vec::new())?.0)
    }

    /// Loss of one slot, dropout inactive.
    ///
    /// # Errors
    /// If the batch does not fit the model, or the device fails.
    pub fn loss(&self, batch: &Batch) -> Result<Sums, ComputeError> {
        Ok(self.losses([Ok(batch)].into_iter())?[0])
    }

    /// Loss of each row of a slot of text, dropout inactive, read back once.
    ///
    /// # Errors
    /// If the model is no Transformer, the batch does not fit it, or the device fails.
    pub fn row_losses(&self, batch: &Batch) -> Result<Vec<Sums>, ComputeError> {
        let (device, text) = self.reader()?;
        let losses = text.row_losses(batch, &device)?;
        let losses = losses.into_iter().map(|(loss, weight)| PendingSums::Device(Box::new(loss), weight)).collect();
        Ok(read(losses, Vec::new())?.0)
    }

    /// Of each row of a slot of text the log-probability of what counts in it, or its score if the model gives such; dropout
    /// inactive.
    ///
    /// # Errors
    /// If the model is no Transformer, the batch does not fit it, or the device fails.
    pub fn row_values(&self, batch: &Batch) -> Result<Vec<f32>, ComputeError> {
        let (device, text) = self.reader()?;
        let _forward = tracing::info_span!(target: "lockstep", "forward").entered();
        text.row_values(batch, &device)
    }

    /// The logits after the last of `tokens` (1 to `context` of them), one for each vocabulary entry.
    ///
    /// # Errors
    /// If the model is no Transformer, the tokens do not fit it, or the device fails.
    pub fn next_token_logits(&self, tokens: &[u32]) -> Result<Vec<f32>, ComputeError> {
        self.forward(tokens, None)
    }

    /// The same after the tokens that are in `cache`, where `tokens` are then, too. It works on any device, and is not made for
    /// the CPU: [`inference`](crate::inference) is faster there.
    ///
    /// # Errors
    /// If the model is no Transformer, the tokens do not fit it, or the device fails; nothing is cached then.
    pub fn next_token_logits_after(&self, cache: &mut KeyCache, tokens: &[u32]) -> Result<Vec<f32>, ComputeError> {
        self.forward(tokens, Some(cache))
    }

    fn forward(&self, tokens: &[u32], cache: Option<&mut KeyCache>) -> Result<Vec<f32>, ComputeError> {
        let (device, leaves) = self.inference();
        let Network::Text(text) = self.network(&leaves, &self.kept[1]) else {
            return Err(ComputeError::Input("the straight line generates no text; choose a Transformer's run".into()));
        };
        let shape = [1, tokens.len()];
        text.check(tokens, shape, "tokens")?;
        let hidden = match cache {
            None => {
                let positions = text.positions(shape, None, &device);
                text.transformer.hidden(tokens, &positions, Dropout::inactive())
            }
            Some(cache) => {
                let earlier = std::mem::take(cache);
                text.check_length(earlier.len() + tokens.len(), "tokens")?;
                let positions = text.transformer.positions(Positions::new(shape, None, &device).after(earlier));
                let hidden = text.transformer.hidden(tokens, &positions, Dropout::inactive());
                *cache = positions.into_cache();
                hidden
            }
        }; // [T, C]
        let last = logits(hidden.slice(tokens.len() - 1..tokens.len()), text.transformer.head()); // [1, V]
        let last = last.try_into_data().map_err(|error| ComputeError::Device(error.to_string()))?;
        Ok(floats(&last)?.to_vec())
    }

    /// The line's prediction for `x`.
    ///
    /// # Errors
    /// If the model is no line, or the device fails.
    pub fn predict(&self, x: f32) -> Result<f32, ComputeError> {
        let (device, leaves) = self.inference();
        let Network::Line(line) = self.network(&leaves, &self.kept[1]) else {
            return Err(ComputeError::Input("a Transformer predicts tokens, not numbers".into()));
        };
        let y = line.predict(Tensor::from_data([[x]], &device));
        y.try_into_scalar::<f32>().map_err(|error| ComputeError::Device(error.to_string()))
    }

    /// Device and Transformer without gradient tracking.
    fn reader(&self) -> Result<(Device, Text<'_>), ComputeError> {
        let (device, parts) = self.inference();
        match self.network(&parts, &self.kept[1]) {
            Network::Text(text) => Ok((device, text)),
            Network::Line(_) => {
                Err(ComputeError::Input("the straight line reads no text; choose a Transformer's run".into()))
            }
        }
    }

    /// Device and model without gradient tracking.
    fn inference(&self) -> (Device, Vec<Part>) {
        (self.device.clone().inner(), self.parts(&self.leaves).into_iter().map(Part::untracked).collect())
    }

    /// The model's tensors, in its layout's order, with `leaves` as what is trained.
    fn parts(&self, leaves: &[Leaf]) -> Vec<Part> {
        let Some(Frozen { layout, base: Base(base) }) = &self.frozen else {
            return leaves.iter().cloned().map(Part::from).collect();
        };
        let matrix = |index: usize| match &leaves[index] {
            Leaf::Matrix(matrix) => matrix.clone(),
            Leaf::Vector(_) => unreachable!("adapters are matrices"),
        };
        let part = |origin: &Origin| match *origin {
            Origin::Base(index) => base[index].clone().into(),
            Origin::Whole(index) => leaves[index].clone().into(),
            Origin::Adapted { base: index, adapter } => {
                let (a, b, scale) = (matrix(adapter), matrix(adapter + 1), layout.scale());
                Part { leaf: base[index].clone(), adapter: Some(Adapter { a, b, scale }) }
            }
        };
        layout.origins().iter().map(part).collect()
    }

    fn network<'a>(&'a self, parts: &[Part], kept: &'a KeptPositions) -> Network<'a> {
        Network::assemble(&self.model, parts, self.precision, kept)
    }
}

fn no_slots() -> ComputeError {
    ComputeError::Input("a block without slots has no gradient".into())
}

/// The tensors of `layout` on a device, whose elements `fill` writes; gradients are kept of those that are trainable, where
/// they are `tracked`.
fn leaves<E>(
    layout: &Layout,
    device: &Device,
    tracked: bool,
    mut fill: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
) -> Result<Vec<Leaf>, E> {
    let leaf = |tensor: &TensorSpec| {
        let values = upload(kernels::filled(&tensor.shape, |values| fill(tensor.range().start, values))?);
        let tracked = tracked && tensor.trainable;
        Ok(match tensor.shape.len() {
            2 => Leaf::Matrix(Tensor::from_data(values, device).set_require_grad(tracked)),
            _ => Leaf::Vector(Tensor::from_data(values, device).set_require_grad(tracked)),
        })
    };
    layout.tensors.iter().map(leaf).collect()
}

/// What writes the elements of `parameters`.
fn copied_from(parameters: &[f32]) -> impl FnMut(usize, &mut [f32]) -> Result<(), Infallible> {
    |start, values| {
        values.copy_from_slice(&parameters[start..start + values.len()]);
        Ok(())
    }
}

/// Reads losses and tensors back, in one go, after all work before it is done.
fn read(pending: Vec<PendingSums>, tensors: Vec<Leaf>) -> Result<(Vec<Sums>, Vec<TensorData>), ComputeError> {
    let _read = tracing::info_span!(target: "lockstep", "read back").entered();
    let losses = pending.iter().filter_map(|pending| match pending {
        PendingSums::Device(loss, _) => Some((**loss).clone()),
        PendingSums::Known(_) => None,
    });
    let read = losses.fold(Transaction::default(), Transaction::register);
    let read = tensors.into_iter().fold(read, |read, tensor| tensor.register(read));
    let data = read.try_execute().map_err(|error| ComputeError::Device(error.to_string()))?;
    data.iter().for_each(traffic::read);
    let mut data = data.into_iter();
    let sums = pending.into_iter().map(|pending| match pending {
        PendingSums::Known(sums) => Ok(sums),
        PendingSums::Device(_, weight) => {
            let loss = data.next();
            let loss = loss.as_ref().map_or(Ok(&[][..]), floats)?.first();
            let loss = *loss.ok_or_else(|| ComputeError::Device("no loss came back".into()))?;
            Ok(Sums { loss: f64::from(loss), weight, ..Sums::default() })
        }
    });
    let sums = sums.collect::<Result<_, ComputeError>>()?;
    Ok((sums, data.collect()))
}

/// Read-back data as f32.
pub(crate) fn floats(data: &TensorData) -> Result<&[f32], ComputeError> {
    data.as_slice().map_err(|error| ComputeError::Device(format!("data came back in another type: {error:?}")))
}

#[cfg(test)]
mod tests;
