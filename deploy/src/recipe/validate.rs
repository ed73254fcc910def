//! From values to a recipe: each value alone, then those that must fit together.

use std::path::PathBuf;
use std::time::Duration;

use lockstep_coordinator::config::{CheckpointConfig, ClusterConfig, EvaluationConfig, SamplingConfig};
use lockstep_coordinator::engine::OnDispute;
use lockstep_model::adapters::{AdapterConfig, all_targets};
use lockstep_model::bpe::MIN_VOCAB_SIZE;
use lockstep_model::compression::{Compression, GradientFormat};
use lockstep_model::config::{
    AdamwConfig, BatchConfig, Decay, DpoConfig, GptConfig, LineConfig, LlamaConfig, ModelConfig, MuonConfig,
    NesterovConfig, Objective, OptimizerConfig, Precision, RopeScaling, ScheduleConfig, UpdateRule, WindowOrder,
};
use lockstep_model::layout::{Layout, SCORE_HEAD};
use lockstep_model::step_filter::SkipConfig;

use super::error::RecipeError;
use super::keys::{DecayKind, DisputeKind, Kinds, ModelKind, OptimizerKind, Stage, TokenizerKind};
use super::values::Values;
use super::{
    BYTES_PER_TOKEN, DataRecipe, Input, ModelRecipe, Recipe, TokenizerRecipe, WeightedInput, bytes_per_token,
    rows_per_sequence,
};
use crate::builtin;

/// Most elements of a flat vector: 8 GiB of parameters.
const MAX_ELEMENTS: usize = 1 << 31;
/// Most bytes of one slot's batch: a lease is one message.
pub(super) const MAX_SLOT_BYTES: i64 = lockstep_proto::MAX_LEASE_BYTES as i64;
/// Most slots of a step or an evaluation.
const MAX_SLOTS: i64 = 1 << 16;
/// Most local steps of a replica: their learning rates go along with each lease.
const MAX_LOCAL_STEPS: i64 = 1 << 16;
/// Most tokens of a sequence: a slot holds at least one.
const MAX_CONTEXT: i64 = MAX_SLOT_BYTES / BYTES_PER_TOKEN as i64;
/// Most tokens that are learned.
const MAX_VOCAB_SIZE: i64 = 1 << 20;
const MAX_LAYERS: i64 = 1024;
const MAX_WIDTH: i64 = 1 << 16;
/// Longest time between heartbeats.
const MAX_INTERVAL_MS: i64 = 3_600_000;
/// Longest time between checkpoints.
const MAX_SECS: f64 = 1e9;
/// A worker is not given up for fewer heartbeats missed.
const MIN_HEARTBEATS: i64 = 3;

/// The recipe that these values describe.
pub(super) fn recipe(values: Values) -> Result<Recipe, RecipeError> {
    let v = &values;
    let kinds = v.kinds()?;
    let (model, data) = match kinds.model {
        ModelKind::Gpt => (ModelConfig::Gpt(gpt(v, kinds.stage)?), Some(data(v, kinds.stage)?)),
        ModelKind::Llama => (ModelConfig::Llama(llama(v, kinds.stage)?), Some(data(v, kinds.stage)?)),
        ModelKind::Line => (ModelConfig::Line(line(v)?), None),
    };
    let model = ModelRecipe(model);
    check_elements(v, &model, 1)?;
    let init = init(v, kinds)?;
    let adapters = adapters(v, kinds, &model, init.is_some())?;
    let context = model.tokens_per_sequence() * rows_per_sequence(data.as_ref());
    let optimizer = optimizer(v, kinds.optimizer)?;
    let schedule = schedule(v, kinds.decay, optimizer.lr)?;
    let batch = batch(v, context, bytes_per_token(data.as_ref()))?;
    let evaluation = evaluation(v, data.as_ref(), batch)?;
    check_length(v, &schedule, batch, context)?;
    Ok(Recipe {
        name: name(v)?,
        seed: v.integer("seed", 0..=i64::MAX)?,
        objective: objective(v, data.as_ref())?,
        precision: precision(v, kinds)?,
        init,
        sampling: sampling(v, kinds)?,
        checkpoint: checkpoint(v, schedule.steps)?,
        cluster: cluster(v)?,
        compression: compression(v, kinds)?,
        model,
        adapters,
        data,
        optimizer,
        outer: outer(v, kinds)?,
        keep_moments: keep_moments(v, kinds)?,
        skip: skip(v)?,
        schedule,
        batch,
        evaluation,
        values,
    })
}

/// In what products are computed; the straight line has none.
fn precision(v: &Values, kinds: Kinds) -> Result<Precision, RecipeError> {
    match kinds.model {
        ModelKind::Line => Ok(Precision::F32),
        _ => v.choice("compute.precision"),
    }
}

/// What the model is trained for.
fn objective(v: &Values, data: Option<&DataRecipe>) -> Result<Objective, RecipeError> {
    Ok(match data.map(|data| data.stage) {
        None | Some(Stage::Pretrain | Stage::Sft) => Objective::NextToken,
        Some(Stage::Reward) => Objective::Reward,
        Some(Stage::Dpo) => {
            let beta = v.number("dpo.beta", "above 0", |beta| beta > 0.0)?;
            let smoothing = |x| (0.0..0.5).contains(&x);
            let label_smoothing = v.number("dpo.label_smoothing", "of at least 0 and below 0.5", smoothing)?;
            Objective::Dpo(DpoConfig { beta, label_smoothing })
        }
    })
}

/// Where the initial parameters come from.
fn init(v: &Values, kinds: Kinds) -> Result<Option<PathBuf>, RecipeError> {
    if kinds.model == ModelKind::Line {
        return Ok(None);
    }
    let init = v.text_or_none("init")?.map(PathBuf::from);
    if init.is_none() && kinds.stage == Stage::Dpo {
        let reason = "a model learns by this how to differ from what it was, so it must have been something";
        return Err(v.refuse_for("init", reason, "init = \"runs/sft-1\""));
    }
    Ok(init)
}

/// Refuses a model whose flat vector would be too long with a vocabulary of `vocab_size`.
pub(super) fn check_elements(v: &Values, model: &ModelRecipe, vocab_size: usize) -> Result<(), RecipeError> {
    let elements = Layout::of(&model.with_vocabulary(vocab_size)).len();
    if elements > MAX_ELEMENTS {
        let reason = format!("the model would have {elements} parameters, more than the {MAX_ELEMENTS} there may be");
        return Err(v.refuse("model.width", reason));
    }
    Ok(())
}

fn adapters(
    v: &Values,
    kinds: Kinds,
    model: &ModelRecipe,
    has_init: bool,
) -> Result<Option<AdapterConfig>, RecipeError> {
    let rank: usize = v.integer("adapters.rank", 0..=MAX_WIDTH)?;
    if !kinds.adapted {
        return Ok(None);
    }
    if !has_init {
        let reason = "adapters are trained beside a model that has learned something, and init names none";
        return Err(v.refuse_for("adapters.rank", reason, "init = \"runs/quickstart-1\", or adapters.rank = 0"));
    }
    let there = all_targets(&model.0);
    let mut targets = v.texts("adapters.targets")?;
    if targets.is_empty() {
        targets.clone_from(&there);
    }
    let alpha = v.number("adapters.alpha", "above 0", |alpha| alpha > 0.0)?;
    // No model that writes has a score's head.
    let whole = if kinds.stage == Stage::Reward { vec![SCORE_HEAD.into()] } else { Vec::new() };
    let adapters = AdapterConfig { rank, alpha, targets, whole };
    adapters.check(&model.0).map_err(|error| {
        v.refuse_for("adapters.targets", error, format!("adapters.targets = [\"{}\"]", there.join("\", \"")))
    })?;
    Ok(Some(adapters))
}

/// It becomes part of a directory's name.
fn name(v: &Values) -> Result<String, RecipeError> {
    let name = v.text("name")?;
    let unfit = |c: char| c.is_control() || matches!(c, '/' | '\\');
    if name.len() > 64 || name.starts_with('.') || name.contains(unfit) {
        return Err(v.refuse("name", "must be fit for a directory's name, of at most 64 bytes"));
    }
    Ok(name)
}

fn gpt(v: &Values, stage: Stage) -> Result<GptConfig, RecipeError> {
    let heads: usize = v.integer("model.heads", 1..=MAX_WIDTH)?;
    let width: usize = v.integer("model.width", 1..=MAX_WIDTH)?;
    check_heads(v, "model.heads", heads, "model.width", width, |heads| width.is_multiple_of(heads))?;
    Ok(GptConfig {
        vocab_size: 0,
        context: v.integer("model.context", 1..=MAX_CONTEXT)?,
        layers: v.integer("model.layers", 1..=MAX_LAYERS)?,
        heads,
        width,
        bias: v.boolean("model.bias")?,
        tied_head: v.boolean("model.tied_head")?,
        score_head: stage == Stage::Reward,
        gelu: v.choice("model.gelu")?,
        norm_epsilon: v.number("model.norm_epsilon", "above 0", |epsilon| epsilon > 0.0)?,
        dropout: v.number("model.dropout", "of at least 0 and below 1", is_below_one)?,
    })
}

fn llama(v: &Values, stage: Stage) -> Result<LlamaConfig, RecipeError> {
    let heads: usize = v.integer("model.heads", 1..=MAX_WIDTH)?;
    let width: usize = v.integer("model.width", 2..=MAX_WIDTH)?;
    if !width.is_multiple_of(2) {
        let reason = "rotary positions turn pairs of numbers: it must be even";
        return Err(v.refuse_for("model.width", reason, format!("model.width = {}", width + 1)));
    }
    let head_width = match v.integer("model.head_width", 0..=MAX_WIDTH)? {
        0 => {
            let divides = |heads| width.is_multiple_of(2 * heads);
            check_heads(v, "model.heads", heads, "half of model.width", width / 2, divides)?;
            None
        }
        odd if odd % 2 == 1 => {
            let reason = "rotary positions turn pairs of numbers: it must be even";
            return Err(v.refuse_for("model.head_width", reason, format!("model.head_width = {}", odd + 1)));
        }
        head_width => Some(head_width),
    };
    let kv_heads = match v.integer("model.kv_heads", 0..=MAX_WIDTH)? {
        0 => heads,
        kv_heads => kv_heads,
    };
    check_heads(v, "model.kv_heads", kv_heads, "model.heads", heads, |kv_heads| heads.is_multiple_of(kv_heads))?;
    let ffn_width = match v.integer("model.ffn_width", 0..=4 * MAX_WIDTH)? {
        0 => (8 * width).div_ceil(3).next_multiple_of(32),
        ffn_width => ffn_width,
    };
    Ok(LlamaConfig {
        vocab_size: 0,
        context: v.integer("model.context", 1..=MAX_CONTEXT)?,
        layers: v.integer("model.layers", 1..=MAX_LAYERS)?,
        heads,
        kv_heads,
        width,
        head_width,
        ffn_width,
        qk_norm: v.boolean("model.qk_norm")?,
        tied_head: v.boolean("model.tied_head")?,
        score_head: stage == Stage::Reward,
        rope_theta: v.number("model.rope_theta", "above 1", |theta| theta > 1.0)?,
        rope_scaling: rope_scaling(v)?,
        norm_epsilon: v.number("model.norm_epsilon", "above 0", |epsilon| epsilon > 0.0)?,
        dropout: v.number("model.dropout", "of at least 0 and below 1", is_below_one)?,
    })
}

fn rope_scaling(v: &Values) -> Result<Option<RopeScaling>, RecipeError> {
    match v.positive_numbers("model.rope_scaling")?[..] {
        [] => Ok(None),
        [factor, low_freq_factor, high_freq_factor, original_context]
            if factor >= 1.0 && high_freq_factor > low_freq_factor =>
        {
            Ok(Some(RopeScaling { factor, low_freq_factor, high_freq_factor, original_context }))
        }
        _ => {
            let reason = "must be empty, or factor (at least 1), low_freq_factor, high_freq_factor (above the second) and \
                          original context";
            Err(v.refuse_for("model.rope_scaling", reason, "model.rope_scaling = [8.0, 1.0, 4.0, 8192.0]"))
        }
    }
}

/// Refuses a number of heads that does not divide `whole`, called `of`, as `divides` says.
fn check_heads(
    v: &Values,
    path: &str,
    heads: usize,
    of: &str,
    whole: usize,
    divides: impl Fn(usize) -> bool,
) -> Result<(), RecipeError> {
    if divides(heads) {
        return Ok(());
    }
    let fitting = (1..heads.min(whole + 1)).rev().find(|heads| divides(*heads)).unwrap_or(1);
    Err(v.refuse_for(path, format!("heads must divide {of} = {whole}"), format!("{path} = {fitting}")))
}

fn line(v: &Values) -> Result<LineConfig, RecipeError> {
    let single = |path| v.number(path, "that single precision can hold", |x| (x as f32).is_finite()).map(|x| x as f32);
    Ok(LineConfig { weight: single("model.initial_weight")?, bias: single("model.initial_bias")? })
}

fn data(v: &Values, stage: Stage) -> Result<DataRecipe, RecipeError> {
    let inputs = v.text_or_texts("data.input")?;
    // Conversations of all inputs are learned together.
    let is_mixture = stage == Stage::Pretrain && inputs.len() > 1;
    let mut weights = if stage == Stage::Pretrain { v.positive_numbers("data.weights")? } else { Vec::new() };
    if weights.is_empty() {
        weights = vec![1.0; inputs.len()];
    }
    if weights.len() != inputs.len() {
        let (weights, inputs) = (weights.len(), inputs.len());
        let reason =
            format!("there must be one weight for each of the inputs, which are {inputs}, or none, and not {weights}");
        return Err(v.refuse("data.weights", reason));
    }
    let weighted = |(text, weight): (&String, f64)| Ok(WeightedInput { input: input(v, text)?, weight });
    let inputs = inputs.iter().zip(weights).map(weighted).collect::<Result<Vec<_>, _>>()?;
    let order = v.choice("data.order")?;
    if order == WindowOrder::Epoch && is_mixture {
        let reason = "a mixture is drawn from at random: its parts are not through at the same time";
        return Err(v.refuse_for("data.order", reason, "data.order = \"random\", or a single data.input"));
    }
    Ok(DataRecipe {
        stage,
        inputs,
        order,
        separate_documents: stage == Stage::Pretrain && v.boolean("data.separate_documents")?,
        train_fraction: v.number("data.train_fraction", "above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?,
        tokenizer: tokenizer(v)?,
    })
}

fn input(v: &Values, text: &str) -> Result<Input, RecipeError> {
    match text {
        builtin::KJV => Ok(Input::KingJames),
        other if other.starts_with("builtin:") => {
            Err(v.refuse("data.input", format!("the only built-in text is {}", builtin::KJV)))
        }
        path => Ok(Input::Path(PathBuf::from(path))),
    }
}

fn tokenizer(v: &Values) -> Result<TokenizerRecipe, RecipeError> {
    let kind = v.choice("tokenizer.kind")?;
    let vocab_size = match kind {
        TokenizerKind::Bpe => v.integer("tokenizer.vocab_size", MIN_VOCAB_SIZE as i64..=MAX_VOCAB_SIZE)?,
        _ => 0,
    };
    Ok(TokenizerRecipe { kind, file: v.text_or_none("tokenizer.file")?.map(PathBuf::from), vocab_size })
}

fn optimizer(v: &Values, kind: OptimizerKind) -> Result<OptimizerConfig, RecipeError> {
    let rule = match kind {
        OptimizerKind::Adamw => UpdateRule::Adamw(adamw(v)?),
        OptimizerKind::Muon => {
            let momentum = v.number("optimizer.momentum", "of at least 0 and below 1", is_below_one)?;
            UpdateRule::Muon(MuonConfig { momentum, adamw: adamw(v)? })
        }
        OptimizerKind::Nesterov => {
            let momentum = v.number("optimizer.momentum", "of at least 0 and below 1", is_below_one)?;
            UpdateRule::Nesterov(NesterovConfig { momentum })
        }
        OptimizerKind::Sgd => UpdateRule::Sgd,
    };
    let grad_clip = v.number("optimizer.grad_clip", "of at least 0 (0: never clip)", |clip| clip >= 0.0)?;
    Ok(OptimizerConfig {
        rule,
        lr: v.number("optimizer.lr", "above 0", |lr| lr > 0.0)?,
        grad_clip: (grad_clip > 0.0).then_some(grad_clip),
    })
}

/// How versions follow what replicas learned in their local steps.
fn outer(v: &Values, kinds: Kinds) -> Result<Option<OptimizerConfig>, RecipeError> {
    if !kinds.local {
        return Ok(None);
    }
    let momentum = v.number("outer.momentum", "of at least 0 and below 1", is_below_one)?;
    let rule = UpdateRule::Nesterov(NesterovConfig { momentum });
    Ok(Some(OptimizerConfig { rule, lr: v.number("outer.lr", "above 0", |lr| lr > 0.0)?, grad_clip: None }))
}

/// Whether a replica's moments stay with it.
fn keep_moments(v: &Values, kinds: Kinds) -> Result<bool, RecipeError> {
    let keep = kinds.local && v.boolean("outer.keep_moments")?;
    if keep && kinds.optimizer == OptimizerKind::Sgd {
        let reason = "plain descent has no moments to keep";
        return Err(v.refuse_for("outer.keep_moments", reason, "outer.keep_moments = false"));
    }
    Ok(keep)
}

fn adamw(v: &Values) -> Result<AdamwConfig, RecipeError> {
    Ok(AdamwConfig {
        beta1: v.number("optimizer.beta1", "of at least 0 and below 1", is_below_one)?,
        beta2: v.number("optimizer.beta2", "of at least 0 and below 1", is_below_one)?,
        epsilon: v.number("optimizer.epsilon", "above 0", |epsilon| epsilon > 0.0)?,
        weight_decay: v.number("optimizer.weight_decay", "of at least 0", |decay| decay >= 0.0)?,
    })
}

fn skip(v: &Values) -> Result<SkipConfig, RecipeError> {
    let above_median = v.number("optimizer.skip_above_median", "above 1, or 0 (never)", |x| x == 0.0 || x > 1.0)?;
    Ok(SkipConfig {
        max_in_a_row: v.integer("optimizer.max_bad_steps", 0..=i64::from(u32::MAX))?,
        above_median: (above_median > 0.0).then_some(above_median),
    })
}

fn schedule(v: &Values, kind: DecayKind, lr: f64) -> Result<ScheduleConfig, RecipeError> {
    let steps: u64 = v.integer("schedule.steps", 1..=i64::MAX)?;
    let warmup_steps: u64 = v.integer("schedule.warmup_steps", 0..=i64::MAX)?;
    if warmup_steps > steps {
        let reason = format!("the warm-up is longer than the run, which has schedule.steps = {steps}");
        return Err(v.refuse_for("schedule.warmup_steps", reason, format!("schedule.warmup_steps = {}", steps / 10)));
    }
    let decay = match kind {
        DecayKind::Constant => Decay::Constant,
        DecayKind::Cosine => Decay::Cosine { steps: end_of_decay(v, steps, warmup_steps)? },
        DecayKind::Linear => Decay::Linear { steps: end_of_decay(v, steps, warmup_steps)? },
        DecayKind::Wsd => Decay::Wsd { steps: length_of_decay(v, steps, warmup_steps)? },
    };
    let min_lr = match decay {
        Decay::Constant => 0.0,
        _ => v.number("schedule.min_lr", "of at least 0", |min| min >= 0.0)?,
    };
    if min_lr > lr {
        let reason = format!("the rate would rise from its peak, optimizer.lr = {lr:?}");
        return Err(v.refuse_for("schedule.min_lr", reason, format!("schedule.min_lr = {:?}", lr / 10.0)));
    }
    Ok(ScheduleConfig { steps, warmup_steps, decay, min_lr })
}

/// The step at which a cosine or a straight line reaches the minimum.
fn end_of_decay(v: &Values, steps: u64, warmup_steps: u64) -> Result<u64, RecipeError> {
    match v.integer("schedule.decay_steps", 0..=i64::MAX)? {
        0 => Ok(steps),
        end if end < warmup_steps => {
            let reason = format!("the decay ends before schedule.warmup_steps = {warmup_steps}");
            Err(v.refuse_for("schedule.decay_steps", reason, format!("schedule.decay_steps = {steps}")))
        }
        end => Ok(end),
    }
}

/// The length of a final decay.
fn length_of_decay(v: &Values, steps: u64, warmup_steps: u64) -> Result<u64, RecipeError> {
    let most = steps - warmup_steps;
    if most == 0 {
        let reason = format!("leaves no step to the final decay, as schedule.steps = {steps}");
        return Err(v.refuse_for("schedule.warmup_steps", reason, "schedule.warmup_steps = 0"));
    }
    match v.integer("schedule.decay_steps", 0..=i64::MAX)? {
        0 => Ok((steps / 5).clamp(1, most)),
        length if length > most => {
            let reason = format!("the run has only {most} steps after its warm-up");
            Err(v.refuse_for("schedule.decay_steps", reason, format!("schedule.decay_steps = {most}")))
        }
        length => Ok(length),
    }
}

fn batch(v: &Values, context: usize, bytes_per_token: u64) -> Result<BatchConfig, RecipeError> {
    let slots: u32 = v.integer("batch.slots", 1..=MAX_SLOTS)?;
    let sequences_per_slot: u32 = v.integer("batch.sequences_per_slot", 1..=i64::from(u32::MAX))?;
    let local_steps: u32 = v.integer("batch.local_steps", 0..=MAX_LOCAL_STEPS)?;
    let row_bytes = context as u64 * bytes_per_token;
    let slot_bytes = u64::from(sequences_per_slot) * row_bytes;
    if slot_bytes > MAX_SLOT_BYTES as u64 {
        let reason = format!(
            "a slot's batch would have {slot_bytes} bytes ({context} tokens a sequence, {bytes_per_token} bytes each), and \
             one message carries at most {MAX_SLOT_BYTES}"
        );
        let example = match MAX_SLOT_BYTES as u64 / row_bytes {
            0 => format!("model.context = {}", MAX_SLOT_BYTES as u64 / bytes_per_token),
            most => format!("batch.sequences_per_slot = {most}"),
        };
        return Err(v.refuse_for("batch.sequences_per_slot", reason, example));
    }
    let most_steps = MAX_SLOT_BYTES as u64 / slot_bytes;
    if u64::from(local_steps) > most_steps {
        let reason = format!(
            "a slot's batches would have {} bytes ({slot_bytes} for each local step), and one message carries at most \
             {MAX_SLOT_BYTES}",
            u64::from(local_steps) * slot_bytes
        );
        return Err(v.refuse_for("batch.local_steps", reason, format!("batch.local_steps = {most_steps}")));
    }
    let local_steps = local_steps.max(1);
    check_sequences(v, "batch.slots", slots, sequences_per_slot.saturating_mul(local_steps))?;
    Ok(BatchConfig { slots, sequences_per_slot, local_steps })
}

fn compression(v: &Values, kinds: Kinds) -> Result<Compression, RecipeError> {
    let compression = Compression { gradients: v.choice("wire.gradients")?, parameters: v.choice("wire.parameters")? };
    if compression.gradients != GradientFormat::F32 && keep_moments(v, kinds)? {
        let reason = "moments travel with a replica's way, and cannot be rounded";
        return Err(v.refuse_for("wire.gradients", reason, "wire.gradients = \"f32\", or outer.keep_moments = false"));
    }
    Ok(compression)
}

fn evaluation(v: &Values, data: Option<&DataRecipe>, batch: BatchConfig) -> Result<EvaluationConfig, RecipeError> {
    let every_steps: u64 = v.integer("evaluation.every_steps", 0..=i64::MAX)?;
    let slots: u32 = v.integer("evaluation.slots", 1..=MAX_SLOTS)?;
    if every_steps == 0 {
        return Ok(EvaluationConfig { every_steps, slots: 0 });
    }
    if data.is_some_and(|data| data.train_fraction == 1.0) {
        let reason = "leaves no text to evaluate on; lower it, or set evaluation.every_steps = 0";
        return Err(v.refuse("data.train_fraction", reason));
    }
    check_sequences(v, "evaluation.slots", slots, batch.sequences_per_slot)?;
    Ok(EvaluationConfig { every_steps, slots })
}

fn sampling(v: &Values, kinds: Kinds) -> Result<SamplingConfig, RecipeError> {
    let every_steps: u64 = v.integer("sampling.every_steps", 0..=i64::MAX)?;
    let prompts = v.texts("sampling.prompts")?;
    if every_steps > 0 && prompts.is_empty() {
        return Err(
            v.refuse("sampling.prompts", "there is nothing to continue; set sampling.every_steps = 0 for no samples")
        );
    }
    let text = kinds.model != ModelKind::Line;
    if text && kinds.stage == Stage::Reward && every_steps > 0 {
        let reason = "a model that scores answers writes none";
        return Err(v.refuse_for("sampling.every_steps", reason, "sampling.every_steps = 0"));
    }
    if !text {
        return Ok(SamplingConfig { every_steps, prompts, tokens: 0, temperature: 0.0, top_k: 0 });
    }
    Ok(SamplingConfig {
        every_steps,
        prompts,
        tokens: v.integer("sampling.tokens", 1..=1_000_000)?,
        temperature: v.number("sampling.temperature", "of at least 0", |temperature| temperature >= 0.0)?,
        top_k: v.integer("sampling.top_k", 0..=i64::MAX)?,
    })
}

fn checkpoint(v: &Values, steps: u64) -> Result<CheckpointConfig, RecipeError> {
    let stop_after: u64 = v.integer("checkpoint.stop_after", 0..=i64::MAX)?;
    if stop_after > steps {
        let reason = format!("the run ends before, at schedule.steps = {steps}; 0 goes on to the end");
        return Err(v.refuse("checkpoint.stop_after", reason));
    }
    let secs =
        v.number("checkpoint.every_secs", "of at least 0 (0: never)", |secs| (0.0..=MAX_SECS).contains(&secs))?;
    Ok(CheckpointConfig {
        every_steps: v.integer("checkpoint.every_steps", 0..=i64::MAX)?,
        interval: (secs > 0.0).then(|| Duration::from_secs_f64(secs)),
        keep_last: v.integer("checkpoint.keep_last", 1..=1_000_000)?,
        stop_after: (stop_after > 0).then_some(stop_after),
    })
}

fn cluster(v: &Values) -> Result<ClusterConfig, RecipeError> {
    let interval_ms: i64 = v.integer("cluster.heartbeat_interval_ms", 1..=MAX_INTERVAL_MS)?;
    let timeout_ms: i64 = v.integer("cluster.liveness_timeout_ms", 1..=MAX_INTERVAL_MS * 100)?;
    let least_ms = interval_ms * MIN_HEARTBEATS;
    if timeout_ms < least_ms {
        let reason = format!(
            "a worker must be given time for {MIN_HEARTBEATS} heartbeats, one every \
             cluster.heartbeat_interval_ms = {interval_ms}"
        );
        let example = format!("cluster.liveness_timeout_ms = {least_ms}");
        return Err(v.refuse_for("cluster.liveness_timeout_ms", reason, example));
    }
    let min_workers: u32 = v.integer("cluster.min_workers", 1..=i64::from(u32::MAX))?;
    let audit = v.number("cluster.audit", "from 0 to 1", |share| (0.0..=1.0).contains(&share))?;
    if audit > 0.0 && min_workers < 2 {
        let reason = "an audit needs a second worker, and a third where two disagree";
        return Err(v.refuse_for("cluster.min_workers", reason, "cluster.min_workers = 2"));
    }
    let exact = v.boolean("cluster.exact")?;
    if audit > 0.0 && !exact {
        let reason = "workers of several device classes compute different bits, and cannot confirm one another";
        return Err(v.refuse_for("cluster.audit", reason, "cluster.audit = 0.0, or cluster.exact = true"));
    }
    Ok(ClusterConfig {
        min_workers,
        audit,
        on_dispute: match v.choice("cluster.on_dispute")? {
            DisputeKind::Wait => OnDispute::Wait,
            DisputeKind::Halt => OnDispute::Halt,
        },
        exact,
        heartbeat_interval: Duration::from_millis(interval_ms.unsigned_abs()),
        liveness_timeout: Duration::from_millis(timeout_ms.unsigned_abs()),
    })
}

/// Refuses more sequences at once than can be numbered.
fn check_sequences(v: &Values, path: &str, slots: u32, sequences_per_slot: u32) -> Result<(), RecipeError> {
    if slots.checked_mul(sequences_per_slot).is_none() {
        let reason =
            format!("with {sequences_per_slot} sequences each, there would be more than {} sequences", u32::MAX);
        return Err(v.refuse(path, reason));
    }
    Ok(())
}

/// Refuses a run of more tokens than can be numbered.
fn check_length(v: &Values, schedule: &ScheduleConfig, batch: BatchConfig, context: usize) -> Result<(), RecipeError> {
    let sequences = u128::from(schedule.steps) * u128::from(batch.sequences_per_step());
    if sequences * context as u128 > i64::MAX as u128 {
        return Err(v.refuse("schedule.steps", format!("the run would read more than {} tokens", i64::MAX)));
    }
    Ok(())
}

fn is_below_one(x: f64) -> bool {
    (0.0..1.0).contains(&x)
}
