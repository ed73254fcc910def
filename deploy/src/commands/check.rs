//! `lockstep check`: what a recipe would take.

use std::time::Instant;

use anyhow::Context as _;
use lockstep_model::adapters::{AdaptedLayout, initial_adapters};
use lockstep_model::compression::GradientFormat;
use lockstep_model::compute::{Computer, LocalSteps, SlotKey};
use lockstep_model::config::{LocalOptimizer, OptimizerConfig};
use lockstep_model::device::ComputeDevice;
use lockstep_model::layout::initial_parameters;

use super::{Usage, assemble};
use crate::cli::Check;
use crate::plan::Plan;
use crate::recipe::Recipe;
use crate::telemetry;

/// Slots measured; the fastest counts.
const MEASURED_SLOTS: u32 = 3;

/// Validates a recipe and prints its plan.
pub(crate) fn run(args: &Check) -> anyhow::Result<()> {
    telemetry::init("warn", false);
    let positive = |value: f64| value.is_finite() && value > 0.0;
    if !positive(args.bandwidth_mbit) || args.worker_tokens_per_sec.is_some_and(|rate| !positive(rate)) {
        let text = "--bandwidth-mbit and --worker-tokens-per-sec must be positive; for example --bandwidth-mbit 1000";
        return Err(Usage(text.into()).into());
    }
    let recipe = assemble::recipe(&args.recipe, None)?;
    let data = assemble::data(&recipe)?;
    let (rate, origin) = match args.worker_tokens_per_sec {
        Some(rate) => (rate, "given".to_string()),
        None => {
            let device = ComputeDevice::open(args.device)?;
            let rate = measure(&recipe, &data, &device)?;
            (rate, format!("measured on {} with all cores", device.description))
        }
    };
    if let Some(report) = &data.report {
        eprintln!("{report}");
    }
    println!("{}", Plan::of(&recipe, data.vocab_size(), args.bandwidth_mbit * 1e6, rate));
    println!("worker speed      {rate:.0} tokens/s, {origin}");
    Ok(())
}

/// Tokens a second of this machine, on the recipe's own first slot, or on a replica's first local step.
fn measure(recipe: &Recipe, data: &assemble::Data, device: &ComputeDevice) -> anyhow::Result<f64> {
    let model = recipe.model.with_vocabulary(data.vocab_size());
    let mut computer =
        Computer::new(&model, device).with_objective(recipe.objective).with_precision(recipe.precision)?;
    let parameters = initial_parameters(&model, recipe.seed);
    if let Some(adapters) = &recipe.adapters {
        let layout = AdaptedLayout::of(&model, adapters);
        computer = computer.with_adapters(adapters);
        computer.stand_on(computer.base(&layout.frozen(&model, &parameters))?);
        computer.load(&initial_adapters(&model, adapters, recipe.seed, &layout.whole(&model, &parameters)))?;
    } else {
        computer.load(&parameters)?;
    }
    let mut parts = data.source.training_slot(1, 0).parts(recipe.batch.local_steps as usize)?;
    let batch = parts.swap_remove(0);
    let OptimizerConfig { rule, grad_clip, lr } = recipe.optimizer.clone();
    let optimizer = LocalOptimizer { rule, grad_clip, keep_moments: recipe.keep_moments };
    let local = LocalSteps { optimizer: &optimizer, learning_rates: &[lr], moments: &[] };
    let mut fastest = f64::INFINITY;
    for slot in 0..MEASURED_SLOTS {
        let slot = (&batch, SlotKey { seed: recipe.seed, step: 1, slot });
        let start = Instant::now();
        let computed = match recipe.outer {
            Some(_) => computer.block_pseudo_gradient(local, [slot].into_iter(), GradientFormat::F32, || Ok(())),
            None => computer.block_gradient([Ok(slot)].into_iter(), GradientFormat::F32),
        };
        computed.context("the slot cannot be computed here")?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Ok(batch.positions() as f64 / fastest)
}
