//! Domain to wire: what the coordinator says, in the contract's types.

use lockstep_model::adapters::AdapterConfig;
use lockstep_model::batch::{Batch, Column, PairSums, Values};
use lockstep_model::compression::GradientFormat;
use lockstep_model::config::{
    AdamwConfig, DpoConfig, Gelu, LocalOptimizer, ModelConfig, MuonConfig, NesterovConfig, Objective, Precision,
    UpdateRule,
};
use lockstep_model::layout::{Layout, TensorSpec};
use lockstep_model::tree::Block;
use lockstep_proto::v1;

use crate::engine::MemberStatus;
use crate::engine::command::{Lease, Task};
use crate::engine::event::KeptBlock;
use crate::exchange::Published;

/// The model to compute.
pub(crate) fn model(model: &ModelConfig) -> v1::Model {
    let kind = match model {
        ModelConfig::Gpt(gpt) => v1::model::Kind::Gpt(v1::Gpt {
            vocab_size: gpt.vocab_size as u32,
            context: gpt.context as u32,
            layers: gpt.layers as u32,
            heads: gpt.heads as u32,
            width: gpt.width as u32,
            bias: gpt.bias,
            tied_head: gpt.tied_head,
            gelu_tanh: gpt.gelu == Gelu::Tanh,
            norm_epsilon: gpt.norm_epsilon,
            dropout: gpt.dropout,
            score_head: gpt.score_head,
        }),
        ModelConfig::Llama(llama) => v1::model::Kind::Llama(v1::Llama {
            vocab_size: llama.vocab_size as u32,
            context: llama.context as u32,
            layers: llama.layers as u32,
            heads: llama.heads as u32,
            kv_heads: llama.kv_heads as u32,
            width: llama.width as u32,
            ffn_width: llama.ffn_width as u32,
            qk_norm: llama.qk_norm,
            tied_head: llama.tied_head,
            rope_theta: llama.rope_theta,
            norm_epsilon: llama.norm_epsilon,
            dropout: llama.dropout,
            head_width: llama.head_width.unwrap_or(0) as u32,
            rope_scaling: llama.rope_scaling.map(|scaling| v1::RopeScaling {
                factor: scaling.factor,
                low_freq_factor: scaling.low_freq_factor,
                high_freq_factor: scaling.high_freq_factor,
                original_context: scaling.original_context,
            }),
            score_head: llama.score_head,
        }),
        ModelConfig::Line(_) => v1::model::Kind::Line(v1::Line {}),
    };
    v1::Model { kind: Some(kind) }
}

/// What it is trained for.
pub(crate) fn objective(objective: Objective) -> v1::Objective {
    let kind = match objective {
        Objective::NextToken => v1::objective::Kind::NextToken(v1::NextToken {}),
        Objective::Reward => v1::objective::Kind::Reward(v1::Reward {}),
        Objective::Dpo(DpoConfig { beta, label_smoothing }) => {
            v1::objective::Kind::Dpo(v1::Dpo { beta, label_smoothing })
        }
    };
    v1::Objective { kind: Some(kind) }
}

/// How a replica takes its local steps, at the learning rates of its leases.
pub(crate) fn local_optimizer(optimizer: LocalOptimizer) -> v1::LocalOptimizer {
    let LocalOptimizer { rule, grad_clip, keep_moments } = optimizer;
    let adamw = |AdamwConfig { beta1, beta2, epsilon, weight_decay }| v1::Adamw { beta1, beta2, epsilon, weight_decay };
    let rule = match rule {
        UpdateRule::Adamw(config) => v1::local_optimizer::Rule::Adamw(adamw(config)),
        UpdateRule::Muon(MuonConfig { momentum, adamw: others }) => {
            v1::local_optimizer::Rule::Muon(v1::Muon { momentum, others: Some(adamw(others)) })
        }
        UpdateRule::Nesterov(NesterovConfig { momentum }) => {
            v1::local_optimizer::Rule::Nesterov(v1::Nesterov { momentum })
        }
        UpdateRule::Sgd => v1::local_optimizer::Rule::Sgd(v1::Sgd {}),
    };
    v1::LocalOptimizer { rule: Some(rule), grad_clip, keep_moments }
}

/// What gradients are rounded to.
pub(crate) fn gradient_format(format: GradientFormat) -> v1::GradientFormat {
    match format {
        GradientFormat::F32 => v1::GradientFormat::F32,
        GradientFormat::Bf16 => v1::GradientFormat::Bf16,
        GradientFormat::Int8 => v1::GradientFormat::Int8,
    }
}

/// In what products are computed.
pub(crate) fn precision(precision: Precision) -> v1::Precision {
    match precision {
        Precision::F32 => v1::Precision::F32,
        Precision::Bf16 => v1::Precision::Bf16,
    }
}

/// What a worker sums up of pairs.
pub(crate) fn pair_sums(sums: &v1::PairSums) -> PairSums {
    let v1::PairSums { accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob } = *sums;
    PairSums { accurate, chosen_reward, rejected_reward, chosen_log_prob, rejected_log_prob }
}

/// The parameters' names and places.
pub(crate) fn layout(layout: &Layout) -> v1::Layout {
    let tensor = |tensor: &TensorSpec| v1::TensorSpec {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|&size| size as u32).collect(),
        offset_elements: tensor.offset as u64,
        decay: tensor.decay,
        trainable: tensor.trainable,
    };
    v1::Layout { tensors: layout.tensors.iter().map(tensor).collect(), total_elements: layout.len() as u64 }
}

/// What is trained alone, and what it stands on.
pub(crate) fn adapters(adapters: &AdapterConfig, base: &Layout, base_blake3: [u8; 32]) -> v1::Adapters {
    v1::Adapters {
        rank: adapters.rank as u32,
        alpha: adapters.alpha,
        targets: adapters.targets.clone(),
        whole: adapters.whole.clone(),
        base: Some(layout(base)),
        base_blake3: base_blake3.to_vec(),
    }
}

/// One slot's rows, and the moments that it begins with if they are not 0.
pub(crate) fn slot(number: u32, batch: &Batch, moments_blake3: Option<[u8; 32]>) -> v1::Slot {
    v1::Slot {
        slot: number,
        columns: batch.columns.iter().map(column).collect(),
        moments_blake3: moments_blake3.map_or_else(Vec::new, Vec::from),
    }
}

fn column(column: &Column) -> v1::Column {
    let (element_type, data) = match &column.values {
        Values::U32(values) => (v1::ElementType::U32, little_endian(values, |value| value.to_le_bytes())),
        Values::F32(values) => (v1::ElementType::F32, little_endian(values, |value| value.to_le_bytes())),
    };
    let shape = column.shape.iter().map(|&size| size as u32).collect();
    v1::Column { name: column.name.clone(), element_type: element_type.into(), shape, data: data.into() }
}

fn little_endian<T: Copy>(values: &[T], bytes: impl Fn(T) -> [u8; 4]) -> Vec<u8> {
    values.iter().flat_map(|&value| bytes(value)).collect()
}

/// A lease of a task, to be computed with what is published; of a gradient, at these learning rates if it takes local steps. Its rows, and
/// what all leases of a step have in common, are the caller's to add.
pub(crate) fn lease(lease: &Lease, learning_rates: Vec<f64>, published: Published) -> v1::Lease {
    let task = match lease.task {
        Task::Gradient => v1::lease::Task::Gradient(v1::GradientTask { learning_rates }),
        Task::Evaluate => v1::lease::Task::Evaluate(v1::EvaluateTask {}),
        Task::Reference => v1::lease::Task::Reference(v1::ReferenceTask {}),
    };
    v1::Lease {
        lease_id: lease.id.0,
        step: lease.step,
        version: lease.version,
        block: Some(block(lease.block)),
        task: Some(task),
        parameters_blake3: published.digest.to_vec(),
        difference_from_blake3: published.difference.map_or_else(Vec::new, |difference| difference.from.to_vec()),
        ..v1::Lease::default()
    }
}

/// A member, whose slots have so many positions.
pub(crate) fn worker_status(member: &MemberStatus, slot_positions: f64) -> v1::WorkerStatus {
    v1::WorkerStatus {
        worker_id: member.worker.0,
        name: member.name.clone(),
        device: member.device.clone(),
        device_class: member.class.to_string(),
        tokens_per_sec: member.slots_per_sec.unwrap_or(0.0) * slot_positions,
        leases: member.leases.len() as u32,
        blocks_accepted: member.blocks_accepted,
        workers: member.workers,
    }
}

/// What a worker has kept; `None` where it names no block.
pub(crate) fn kept_block(kept: &v1::KeptBlock) -> Option<KeptBlock> {
    let v1::Block { level, index } = kept.block?;
    (level < 32).then_some(KeptBlock { step: kept.step, version: kept.version, block: Block { level, index } })
}

/// A node of the slot tree.
pub(crate) fn block(block: Block) -> v1::Block {
    v1::Block { level: block.level, index: block.index }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_little_endian_and_row_major() {
        let batch = Batch {
            columns: vec![Column { name: "tokens".into(), shape: [1, 2], values: Values::U32(vec![1, 0x0203]) }],
        };
        let slot = slot(4, &batch, None);
        assert_eq!(slot.slot, 4);
        assert_eq!(slot.columns[0].shape, [1, 2]);
        assert_eq!(slot.columns[0].data.as_ref(), [1, 0, 0, 0, 3, 2, 0, 0]);
    }
}
