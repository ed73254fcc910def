//! The side that trains: steps as a cluster of one worker takes them, in a single process.

use std::path::Path;
use std::time::Instant;

use lockstep_model::adapters::AdaptedLayout;
use lockstep_model::batch::Batch;
use lockstep_model::checkpoint::{self, BaseFile, Checkpoint};
use lockstep_model::compute::{BlockGradient, Computer, SlotGradient, SlotKey};
use lockstep_model::device::ComputeDevice;
use lockstep_model::digest::{hex, vector_sha256};
use lockstep_model::optimizer::{self, OptimizerState, Update};

use super::report::{Direction, Memory, Report};
use crate::cli::Compare;
use crate::commands::bench::shape::Shape;
use crate::commands::bench::{median, peak_rss_bytes};
use crate::commands::{Caller, use_threads};
use crate::plan::{WorkerMemory, moment_bytes};
use crate::recipe::Recipe;

/// Takes optimizer steps with a checkpoint's parameters and moments, on tokens drawn at random.
pub(super) fn measure(args: &Compare, path: &Path, recipe: &Recipe) -> anyhow::Result<Report> {
    use_threads(args.threads, Caller::Computes)?;
    let start_rss_bytes = peak_rss_bytes();
    let Checkpoint { manifest, mut parameters, optimizer: mut state } = checkpoint::read(path)?;
    let (rule, grad_clip) = (&recipe.optimizer.rule, recipe.optimizer.grad_clip);
    // A model that was imported has none yet, and replicas begin without any; what is kept is of versions.
    if state == OptimizerState::default() || recipe.outer.is_some() {
        state = OptimizerState::new(rule, parameters.len());
    }
    let shape = Shape::of(manifest.model.clone(), recipe.batch.sequences_per_slot as usize);
    let batch = recipe.batch_of_optimizer();
    let slots: Vec<Batch> = (0..batch.slots).map(|slot| shape.batch(slot)).collect();
    let device = ComputeDevice::open(args.device)?;
    let mut computer = Computer::new(&manifest.model, &device).with_precision(recipe.precision)?;
    if let Some(adapters) = &manifest.adapters {
        computer = computer.with_adapters(adapters);
        let layout = AdaptedLayout::of(&manifest.model, adapters).base;
        computer.stand_on(computer.base(&BaseFile::of_checkpoint(path, &manifest, &layout)?.parameters())?);
    }
    computer.load(&parameters)?;

    let first = manifest.step + 1;
    let key = |step, slot| SlotKey { seed: recipe.seed, step, slot };
    let loss = |slot| -> anyhow::Result<f64> {
        let SlotGradient { sums, gradient } = computer.gradient(&slots[0], key(first, slot))?;
        computer.reuse(gradient);
        Ok(sums.loss)
    };
    let dropout_active = loss(0)? != loss(1)?;

    // At the peak rate: schedules end, and some at 0.
    let lr = recipe.optimizer.lr;
    let mut step = |step: u64, parameters: &mut Vec<f32>| -> anyhow::Result<f64> {
        let start = Instant::now();
        let keyed = slots.iter().enumerate().map(|(slot, batch)| Ok((batch, key(step, slot as u32))));
        let BlockGradient { slot_sums, gradient } = computer.block_gradient(keyed, recipe.compression.gradients)?;
        let weight_sum = slot_sums.iter().map(|sums| sums.weight).sum();
        let update = Update { gradient_sum: &gradient, weight_sum, grad_clip, lr, step };
        optimizer::step(rule, computer.layout(), parameters, &mut state, update);
        computer.reuse(gradient);
        computer.load(parameters)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let sha256_before = hex(&vector_sha256(&parameters));
    step(first, &mut parameters)?;
    let sha256_after = hex(&vector_sha256(&parameters));
    let mut secs = Vec::new();
    for round in 1..=u64::from(args.rounds) {
        secs.push(step(first + round, &mut parameters)?);
    }

    let tokens = slots.len() * shape.tokens();
    let worker = WorkerMemory::of(&manifest.model, manifest.adapters.as_ref(), batch, recipe.rows_per_sequence());
    Ok(Report {
        device: device.description.clone(),
        memory: Memory {
            parameters: worker.parameters,
            gradients: worker.gradients,
            moments: moment_bytes(rule, parameters.len()) + 4 * state.master.len() as u64,
            activations: worker.activations,
            cache: 0,
        },
        start_rss_bytes,
        peak_rss_bytes: peak_rss_bytes(),
        gpu_memory_bytes: device.memory_bytes(),
        tokens_per_sec: [("step".to_string(), tokens as f64 / median(secs))].into(),
        direction: Direction {
            forward: "batch → logits → loss".into(),
            backward: Some("loss → gradients".into()),
            update: Some("gradients → new parameters".into()),
            grows: None,
        },
        dropout_active,
        parameters_changed: sha256_before != sha256_after,
        sha256_before,
        sha256_after,
    })
}
