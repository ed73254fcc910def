//! Between the wire and the domain: every message is checked and translated once, here.

use std::time::Duration;

use bytes::Bytes;
use lockstep_model::adapters::{AdaptedLayout, AdapterConfig, trained_layout};
use lockstep_model::batch::{Batch, Column, PairSums, Sums, Values};
use lockstep_model::compression::GradientFormat;
use lockstep_model::config::{
    AdamwConfig, DpoConfig, Gelu, GptConfig, LineConfig, LlamaConfig, LocalOptimizer, ModelConfig, MuonConfig,
    NesterovConfig, Objective, Precision, RopeScaling, UpdateRule,
};
use lockstep_model::layout::{Layout, TensorSpec};
use lockstep_model::tree::Block;
use lockstep_proto::v1;

use crate::device::Outcome;
use crate::lease::{GradientName, Lease, Parameters, Slot, Task, Work};
use crate::session::Timing;

/// A message that makes no sense: what is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WireError(String);

/// Names one start of one run; what is meant for another is fenced off by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// 32 hexadecimal digits.
    pub id: String,
    /// Of its coordinator, or relay.
    pub incarnation: u64,
}

/// What there is to train, and how to show that this worker can take part.
#[derive(Clone, Debug, PartialEq)]
pub struct Invitation {
    /// Which start of which run.
    pub run: Run,
    /// The model.
    pub model: ModelConfig,
    /// What it is trained for.
    pub objective: Objective,
    /// What is trained alone, if not all of it.
    pub adapters: Option<Adapters>,
    /// How replicas take their local steps, if slots are such.
    pub local_optimizer: Option<LocalOptimizer>,
    /// What gradients are rounded to.
    pub format: GradientFormat,
    /// In what products are computed.
    pub precision: Precision,
    /// Elements of the parameters that are pulled.
    pub elements: usize,
    /// Of the moments that are pulled and pushed beside them.
    pub kept_elements: usize,
    /// What is computed to show the device class.
    pub probe: Vec<Work>,
    /// Heartbeats, and when either side is given up.
    pub timing: Timing,
    /// All of this as it came, for whoever passes it on.
    pub wire: v1::Invitation,
}

/// Adapters, and what they stand on.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapters {
    /// Which, and of what size.
    pub config: AdapterConfig,
    /// What they stand on.
    pub base: BaseName,
}

/// Names a base by what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseName {
    /// BLAKE3 of its bytes.
    pub blake3: [u8; 32],
    /// How many there are.
    pub elements: usize,
}

/// What the coordinator says on the control stream.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Instruction {
    Lease(Work),
    /// A lease that makes no sense.
    Unreadable {
        lease: u64,
        reason: String,
    },
    Revoke {
        lease: u64,
    },
    HeartbeatAck {
        sent_unix_nanos: u64,
        received_unix_nanos: u64,
    },
    Release {
        reason: String,
        run_goes_on: bool,
    },
}

/// Checks an invitation, above all that this build knows the model and lays its parameters out alike.
pub(crate) fn invitation(invitation: v1::Invitation) -> Result<Invitation, WireError> {
    let wire = invitation.clone();
    let model = model(&required(invitation.model, || "the model".into())?)?;
    let adapters = invitation.adapters.map(|adapters| self::adapters(adapters, &model)).transpose()?;
    let expected = trained_layout(&model, adapters.as_ref().map(|adapters| &adapters.config));
    same_layout(&expected, &required(invitation.layout, || "the layout".into())?)?;
    let interval = |name: &str, milliseconds: u32| match milliseconds {
        0 => Err(WireError(format!("{name} is 0 ms"))),
        _ => Ok(Duration::from_millis(milliseconds.into())),
    };
    let local_optimizer = invitation.local_optimizer.map(local_optimizer).transpose()?;
    let kept_moments = local_optimizer.as_ref().map_or(0, LocalOptimizer::kept_moments);
    Ok(Invitation {
        run: Run { id: invitation.run_id, incarnation: invitation.incarnation },
        elements: expected.len(),
        kept_elements: kept_moments * expected.len(),
        format: gradient_format(invitation.gradient_format)?,
        precision: precision(invitation.precision)?,
        objective: objective(invitation.objective.as_ref(), &model)?,
        model,
        adapters,
        local_optimizer,
        probe: invitation.probe.into_iter().map(work).collect::<Result<_, _>>()?,
        timing: Timing {
            heartbeat_interval: interval("the heartbeat interval", invitation.heartbeat_interval_ms)?,
            liveness_timeout: interval("the liveness timeout", invitation.liveness_timeout_ms)?,
        },
        wire,
    })
}

/// Reads one message of the control stream; `None` for a kind that this build does not know.
pub(crate) fn instruction(message: v1::CoordinatorMessage) -> Option<Instruction> {
    use v1::coordinator_message::Kind;
    Some(match message.kind? {
        Kind::Lease(lease) => {
            let id = lease.lease_id;
            work(lease).map_or_else(
                |error| Instruction::Unreadable { lease: id, reason: error.to_string() },
                Instruction::Lease,
            )
        }
        Kind::Revoke(v1::Revoke { lease_id }) => Instruction::Revoke { lease: lease_id },
        Kind::HeartbeatAck(v1::HeartbeatAck { sent_unix_nanos, received_unix_nanos }) => {
            Instruction::HeartbeatAck { sent_unix_nanos, received_unix_nanos }
        }
        Kind::Release(v1::Release { reason, run_goes_on }) => Instruction::Release { reason, run_goes_on },
    })
}

/// Writes the report of a finished lease, whose gradient, if it is one, was received with that digest.
pub(crate) fn block_result(
    run: &Run,
    lease: &Lease,
    outcome: &Outcome,
    vector_blake3: Option<[u8; 32]>,
    upload_time: Duration,
    spans: Vec<v1::SpanTiming>,
) -> v1::BlockResult {
    let slot_sums = match lease.task {
        Task::Gradient => &[],
        Task::Evaluate | Task::Reference => outcome.slot_sums.as_slice(),
    };
    let of_pairs = |sums: &Sums| (sums.pairs != PairSums::default()).then(|| pair_sums(sums.pairs));
    let has_pairs = slot_sums.iter().any(|sums| of_pairs(sums).is_some());
    let slot_pairs = slot_sums.iter().filter(|_| has_pairs).map(|sums| pair_sums(sums.pairs)).collect();
    v1::BlockResult {
        run_id: run.id.clone(),
        incarnation: run.incarnation,
        lease_id: lease.id,
        step: lease.step,
        version: lease.parameters.version,
        block: Some(wire_block(lease.block)),
        loss_sum: outcome.sums.loss,
        weight_sum: outcome.sums.weight,
        vector_blake3: vector_blake3.map_or_else(Vec::new, Vec::from),
        slot_loss_sums: slot_sums.iter().map(|sums| sums.loss).collect(),
        slot_weight_sums: slot_sums.iter().map(|sums| sums.weight).collect(),
        spans,
        compute_nanos: nanos(outcome.compute_time),
        upload_nanos: nanos(upload_time),
        batch_sha256: outcome.batch_sha256.to_vec(),
        row_values: outcome.row_values.clone(),
        pairs: of_pairs(&outcome.sums),
        slot_pairs,
    }
}

fn pair_sums(sums: PairSums) -> v1::PairSums {
    let PairSums { accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob } = sums;
    v1::PairSums { accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob }
}

/// Writes what is offered from memory.
pub(crate) fn kept(gradients: &[GradientName]) -> v1::Kept {
    let block = |name: &GradientName| v1::KeptBlock {
        step: name.step,
        version: name.version,
        block: Some(wire_block(name.block)),
    };
    v1::Kept { blocks: gradients.iter().map(block).collect() }
}

fn wire_block(Block { level, index }: Block) -> v1::Block {
    v1::Block { level, index }
}

/// The text, cut where needed to the `limit` in bytes that the contract sets.
pub(crate) fn shortened(text: &str, limit: usize) -> String {
    text[..text.floor_char_boundary(limit)].to_owned()
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}

fn required<T>(field: Option<T>, name: impl FnOnce() -> String) -> Result<T, WireError> {
    field.ok_or_else(|| WireError(format!("{} is missing, or of a kind that this build does not know", name())))
}

fn model(model: &v1::Model) -> Result<ModelConfig, WireError> {
    match required(model.kind.as_ref(), || "the kind of model".into())? {
        v1::model::Kind::Gpt(gpt) => self::gpt(gpt).map(ModelConfig::Gpt),
        v1::model::Kind::Llama(llama) => self::llama(llama).map(ModelConfig::Llama),
        // Where the line starts is the coordinator's affair; a worker never sees it but as parameters.
        v1::model::Kind::Line(v1::Line {}) => Ok(ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 })),
    }
}

/// What the model is trained for, which must be something that it can be.
fn objective(objective: Option<&v1::Objective>, model: &ModelConfig) -> Result<Objective, WireError> {
    let Some(objective) = objective else { return Ok(Objective::NextToken) };
    let objective = match *required(objective.kind.as_ref(), || "the kind of objective".into())? {
        v1::objective::Kind::NextToken(v1::NextToken {}) => Objective::NextToken,
        v1::objective::Kind::Reward(v1::Reward {}) => Objective::Reward,
        v1::objective::Kind::Dpo(v1::Dpo { beta, label_smoothing }) => {
            if !(beta > 0.0 && (0.0..0.5).contains(&label_smoothing)) {
                let text = format!("beta {beta} is not above 0, or label_smoothing {label_smoothing} not in [0, 0.5)");
                return Err(WireError(text));
            }
            Objective::Dpo(DpoConfig { beta, label_smoothing })
        }
    };
    match (objective == Objective::Reward) == model.has_score_head() {
        true => Ok(objective),
        false => Err(WireError(format!("a model cannot be trained for {objective:?} with the head that it has"))),
    }
}

/// What gradients are rounded to.
fn gradient_format(format: i32) -> Result<GradientFormat, WireError> {
    match v1::GradientFormat::try_from(format) {
        Ok(v1::GradientFormat::F32) => Ok(GradientFormat::F32),
        Ok(v1::GradientFormat::Bf16) => Ok(GradientFormat::Bf16),
        Ok(v1::GradientFormat::Int8) => Ok(GradientFormat::Int8),
        Err(_) => Err(WireError(format!("gradients are rounded to format {format}, which this build does not know"))),
    }
}

/// In what products are computed.
fn precision(precision: i32) -> Result<Precision, WireError> {
    match v1::Precision::try_from(precision) {
        Ok(v1::Precision::F32) => Ok(Precision::F32),
        Ok(v1::Precision::Bf16) => Ok(Precision::Bf16),
        Err(_) => {
            Err(WireError(format!("products are computed in precision {precision}, which this build does not know")))
        }
    }
}

fn gpt(gpt: &v1::Gpt) -> Result<GptConfig, WireError> {
    let &v1::Gpt { vocab_size, context, layers, heads, width, bias, tied_head, gelu_tanh, .. } = gpt;
    let &v1::Gpt { norm_epsilon, dropout, score_head, .. } = gpt;
    check_sizes(&[
        ("vocab_size", vocab_size),
        ("context", context),
        ("layers", layers),
        ("heads", heads),
        ("width", width),
    ])?;
    check_divides("heads", heads, "width", width)?;
    check_dropout(dropout)?;
    Ok(GptConfig {
        vocab_size: vocab_size as usize,
        context: context as usize,
        layers: layers as usize,
        heads: heads as usize,
        width: width as usize,
        bias,
        tied_head,
        score_head,
        gelu: if gelu_tanh { Gelu::Tanh } else { Gelu::Exact },
        norm_epsilon,
        dropout,
    })
}

fn llama(llama: &v1::Llama) -> Result<LlamaConfig, WireError> {
    let &v1::Llama { vocab_size, context, layers, heads, kv_heads, width, ffn_width, .. } = llama;
    check_sizes(&[
        ("vocab_size", vocab_size),
        ("context", context),
        ("layers", layers),
        ("heads", heads),
        ("kv_heads", kv_heads),
        ("width", width),
        ("ffn_width", ffn_width),
    ])?;
    check_divides("kv_heads", kv_heads, "heads", heads)?;
    let head_width = match llama.head_width {
        0 => {
            check_divides("heads", heads, "width", width)?;
            width / heads
        }
        given => given,
    };
    if !head_width.is_multiple_of(2) {
        return Err(WireError(format!("the model's head width {head_width} is odd, and its halves are rotated")));
    }
    let scaling = |scaling: &v1::RopeScaling| RopeScaling {
        factor: scaling.factor,
        low_freq_factor: scaling.low_freq_factor,
        high_freq_factor: scaling.high_freq_factor,
        original_context: scaling.original_context,
    };
    check_dropout(llama.dropout)?;
    Ok(LlamaConfig {
        vocab_size: vocab_size as usize,
        context: context as usize,
        layers: layers as usize,
        heads: heads as usize,
        kv_heads: kv_heads as usize,
        width: width as usize,
        head_width: (llama.head_width > 0).then_some(llama.head_width as usize),
        ffn_width: ffn_width as usize,
        qk_norm: llama.qk_norm,
        tied_head: llama.tied_head,
        score_head: llama.score_head,
        rope_theta: llama.rope_theta,
        rope_scaling: llama.rope_scaling.as_ref().map(scaling),
        norm_epsilon: llama.norm_epsilon,
        dropout: llama.dropout,
    })
}

/// Checks adapters for a model, above all that this build takes the same base.
fn adapters(adapters: v1::Adapters, model: &ModelConfig) -> Result<Adapters, WireError> {
    let v1::Adapters { rank, alpha, targets, whole, base, base_blake3 } = adapters;
    let config = AdapterConfig { rank: rank as usize, alpha, targets, whole };
    if rank == 0 || !alpha.is_finite() {
        return Err(WireError(format!("adapters of rank {rank} and alpha {alpha}")));
    }
    config.check(model).map_err(|error| WireError(format!("adapters: {error}")))?;
    let layout = AdaptedLayout::of(model, &config).base;
    same_layout(&layout, &required(base, || "the base's layout".into())?)?;
    let bytes = base_blake3.len();
    let blake3 = base_blake3.try_into().map_err(|_| WireError(format!("base_blake3 has {bytes} bytes, not 32")))?;
    Ok(Adapters { config, base: BaseName { blake3, elements: layout.len() } })
}

/// How a replica takes its local steps.
fn local_optimizer(optimizer: v1::LocalOptimizer) -> Result<LocalOptimizer, WireError> {
    let v1::LocalOptimizer { rule, grad_clip, keep_moments } = optimizer;
    let adamw = |v1::Adamw { beta1, beta2, epsilon, weight_decay }| {
        let known = [beta1, beta2].iter().all(|beta| (0.0..1.0).contains(beta)) && epsilon > 0.0 && weight_decay >= 0.0;
        let config = AdamwConfig { beta1, beta2, epsilon, weight_decay };
        if known { Ok(config) } else { Err(WireError(format!("the local optimizer's {config:?} cannot be"))) }
    };
    let momentum = |momentum| match (0.0..1.0).contains(&momentum) {
        true => Ok(momentum),
        false => Err(WireError(format!("the local optimizer's momentum {momentum} is not in [0, 1)"))),
    };
    let rule = match required(rule, || "the local optimizer's rule".into())? {
        v1::local_optimizer::Rule::Adamw(config) => UpdateRule::Adamw(adamw(config)?),
        v1::local_optimizer::Rule::Muon(muon) => UpdateRule::Muon(MuonConfig {
            momentum: momentum(muon.momentum)?,
            adamw: adamw(required(muon.others, || "what Muon does not rule".into())?)?,
        }),
        v1::local_optimizer::Rule::Nesterov(nesterov) => {
            UpdateRule::Nesterov(NesterovConfig { momentum: momentum(nesterov.momentum)? })
        }
        v1::local_optimizer::Rule::Sgd(v1::Sgd {}) => UpdateRule::Sgd,
    };
    if grad_clip.is_some_and(|limit| !(limit > 0.0 && limit.is_finite())) {
        return Err(WireError(format!("the local optimizer's grad_clip {grad_clip:?} is not above 0")));
    }
    Ok(LocalOptimizer { rule, grad_clip, keep_moments })
}

fn check_sizes(sizes: &[(&str, u32)]) -> Result<(), WireError> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        Some((name, _)) => Err(WireError(format!("the model's {name} is 0"))),
        None => Ok(()),
    }
}

fn check_divides(parts: &str, part: u32, wholes: &str, whole: u32) -> Result<(), WireError> {
    match whole.is_multiple_of(part) {
        true => Ok(()),
        false => Err(WireError(format!("the model's {part} {parts} do not divide its {wholes} {whole}"))),
    }
}

fn check_dropout(dropout: f64) -> Result<(), WireError> {
    match (0.0..1.0).contains(&dropout) {
        true => Ok(()),
        false => Err(WireError(format!("the model's dropout {dropout} is not in [0, 1)"))),
    }
}

/// Compares the coordinator's layout with this build's, and names the first difference.
fn same_layout(expected: &Layout, wire: &v1::Layout) -> Result<(), WireError> {
    let found: Vec<TensorSpec> = wire.tensors.iter().map(tensor).collect();
    if let Some((ours, theirs)) = expected.tensors.iter().zip(&found).find(|(ours, theirs)| ours != theirs) {
        return Err(WireError(format!("the layout has {theirs:?} where this build has {ours:?}")));
    }
    let (ours, theirs) = (expected.tensors.len(), found.len());
    if ours != theirs || expected.len() as u64 != wire.total_elements {
        return Err(WireError(format!(
            "the layout has {theirs} tensors of {} elements in all where this build has {ours} of {}",
            wire.total_elements,
            expected.len()
        )));
    }
    Ok(())
}

fn tensor(tensor: &v1::TensorSpec) -> TensorSpec {
    TensorSpec {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|&size| size as usize).collect(),
        offset: tensor.offset_elements as usize,
        decay: tensor.decay,
        trainable: tensor.trainable,
    }
}

/// Checks and translates a lease.
pub(crate) fn work(lease: v1::Lease) -> Result<Work, WireError> {
    let id = lease.lease_id;
    let in_lease = |error: WireError| WireError(format!("lease {id}: {error}"));
    let v1::Block { level, index } = required(lease.block, || format!("lease {id}: its block"))?;
    let (task, learning_rates) = match required(lease.task, || format!("lease {id}: its task"))? {
        v1::lease::Task::Gradient(v1::GradientTask { learning_rates }) => (Task::Gradient, learning_rates),
        v1::lease::Task::Evaluate(v1::EvaluateTask {}) => (Task::Evaluate, Vec::new()),
        v1::lease::Task::Reference(v1::ReferenceTask {}) => (Task::Reference, Vec::new()),
    };
    if let Some(rate) = learning_rates.iter().find(|rate| !rate.is_finite()) {
        return Err(in_lease(WireError(format!("a learning rate is {rate}"))));
    }
    let block = Block { level, index };
    let slots: Vec<Slot> = lease.slots.into_iter().map(slot).collect::<Result<_, _>>().map_err(in_lease)?;
    slots_of_block(block, &slots).map_err(in_lease)?;
    let parameters = Parameters {
        version: lease.version,
        digest: digest("parameters_blake3", &lease.parameters_blake3).map_err(in_lease)?,
    };
    let difference_from = digest("difference_from_blake3", &lease.difference_from_blake3).map_err(in_lease)?;
    let lease_name = Lease { id, step: lease.step, parameters, block, seed: lease.seed, task };
    let (traceparent, step_slots) = (lease.traceparent, Some(lease.step_slots).filter(|slots| *slots > 0));
    Ok(Work { lease: lease_name, slots, learning_rates, difference_from, traceparent, step_slots })
}

/// A digest, if one is given.
fn digest(name: &str, bytes: &[u8]) -> Result<Option<[u8; 32]>, WireError> {
    match bytes {
        [] => Ok(None),
        bytes => match bytes.try_into() {
            Ok(digest) => Ok(Some(digest)),
            Err(_) => Err(WireError(format!("{name} has {} bytes, not 32", bytes.len()))),
        },
    }
}

/// Checks that `slots` are the block's first ones without a gap: what exists of it.
fn slots_of_block(block: Block, slots: &[Slot]) -> Result<(), WireError> {
    let numbers = || slots.iter().map(|slot| slot.number);
    let covered = match block.level {
        0..32 => block.slots(u32::MAX),
        level => return Err(WireError(format!("block level {level} is above 31"))),
    };
    if slots.is_empty() || slots.len() > covered.len() || !numbers().eq(covered.clone().take(slots.len())) {
        let numbers: Vec<u32> = numbers().collect();
        let (first, last) = (covered.start, covered.end.saturating_sub(1));
        return Err(WireError(format!(
            "slots {numbers:?} are not the first of block {block}, slots {first} to {last}"
        )));
    }
    Ok(())
}

fn slot(slot: v1::Slot) -> Result<Slot, WireError> {
    let number = slot.slot;
    let columns = slot.columns.into_iter().map(column).collect::<Result<_, _>>();
    let in_slot = |error| WireError(format!("slot {number}: {error}"));
    let moments_blake3 = digest("moments_blake3", &slot.moments_blake3).map_err(in_slot)?;
    Ok(Slot { number, batch: Batch { columns: columns.map_err(in_slot)? }, moments_blake3 })
}

fn column(column: v1::Column) -> Result<Column, WireError> {
    let v1::Column { name, element_type, shape, data } = column;
    let &[rows, length] = shape.as_slice() else {
        return Err(WireError(format!("column {name:?} has shape {shape:?}, which is not [rows, length]")));
    };
    if data.len() as u64 != u64::from(rows) * u64::from(length) * 4 {
        let bytes = data.len();
        return Err(WireError(format!("column {name:?} of shape {shape:?} has {bytes} bytes, not 4 an element")));
    }
    let values = match v1::ElementType::try_from(element_type) {
        Ok(v1::ElementType::U32) => Values::U32(elements(&data).map(u32::from_le_bytes).collect()),
        Ok(v1::ElementType::F32) => Values::F32(elements(&data).map(f32::from_le_bytes).collect()),
        Ok(v1::ElementType::Unspecified) | Err(_) => {
            return Err(WireError(format!(
                "column {name:?} has element type {element_type}, which this build does not know"
            )));
        }
    };
    Ok(Column { name, shape: [rows as usize, length as usize], values })
}

/// Four bytes at a time.
fn elements(data: &Bytes) -> impl Iterator<Item = [u8; 4]> {
    data.chunks_exact(4).map(|bytes| [bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests;
