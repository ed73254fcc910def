//! What a recipe takes, before it runs: parameters, memory, traffic, and how many workers are worth having.

use std::fmt;

use indicatif::{DecimalBytes, HumanCount};
use lockstep_model::adapters::{AdapterConfig, trained_layout};
use lockstep_model::compression::{Compression, DIFFERENCE_BYTES, ParameterFormat};
use lockstep_model::config::{BatchConfig, ModelConfig, UpdateRule};
use lockstep_model::layout::Layout;

use crate::recipe::Recipe;

/// A further worker is worth having if it makes the step shorter by this share.
const WORTHWHILE: f64 = 0.05;
/// Bytes of an f32.
const FLOAT_BYTES: u64 = 4;

/// What a recipe takes, for workers of equal speed that share the coordinator's one link.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// The recipe's name.
    pub(crate) recipe: String,
    /// The model in words.
    pub(crate) model: String,
    /// Elements of the model.
    pub(crate) parameters: u64,
    /// Elements of the flat vector that is trained: the model's, or its adapters'.
    pub(crate) trained: u64,
    /// The adapters in words, where they are trained alone.
    pub(crate) adapters: Option<String>,
    /// In which form vectors travel.
    pub(crate) compression: Compression,
    /// Steps of the run, each of which makes a version of the parameters; rounds, where there are local steps.
    pub(crate) steps: u64,
    /// Slots a step.
    pub(crate) slots: u32,
    /// Of each slot in a step, where slots are replicas.
    pub(crate) local_steps: Option<u32>,
    /// Numbers that a replica remembers of each parameter that is trained, where its moments stay with it.
    pub(crate) kept_moments: u64,
    /// Sequences (rows) in each slot, or local step of one.
    pub(crate) sequences_per_slot: u32,
    /// Tokens of a sequence, of both answers where it is a pair; 1 for a row of the straight line.
    pub(crate) tokens_per_sequence: u64,
    /// Of a token in a batch.
    pub(crate) bytes_per_token: u64,
    /// Memory of a worker.
    pub(crate) worker: WorkerMemory,
    /// Memory of the coordinator, beside the corpus.
    pub(crate) coordinator: CoordinatorMemory,
    /// Of the coordinator's link, in bits a second.
    pub(crate) bandwidth_bits_per_sec: f64,
    /// Of one worker, in training.
    pub(crate) worker_tokens_per_sec: f64,
    /// The step with 1, 2, 4, … workers.
    pub(crate) outlook: Vec<Step>,
    /// The most workers of whom the last still makes the step shorter by at least 5 %, compared to any fewer.
    pub(crate) useful_workers: u32,
}

/// What a worker holds at most. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkerMemory {
    /// What is trained as it came, and as the device's tensors; and the base of adapters, as these alone.
    pub(crate) parameters: u64,
    /// The device's gradient, the same as a flat vector, and sums of earlier slots that wait for their sibling in the tree.
    pub(crate) gradients: u64,
    /// Activations of one slot, kept for the backward pass.
    pub(crate) activations: u64,
    /// Where slots are replicas: the parameters that they begin with, their own, here and on the device, and their moments.
    pub(crate) replica: u64,
}

/// What the coordinator holds. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CoordinatorMemory {
    /// Master parameters and the vector that is published; where it is apart, that as it is computed, too, and the difference.
    pub(crate) parameters: u64,
    /// The optimizer's moments.
    pub(crate) moments: u64,
    /// Each block that waits to be added.
    pub(crate) block: u64,
    /// A copy of parameters and moments, while a checkpoint is written.
    pub(crate) checkpoint: u64,
}

/// One step with a number of workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    /// How many there are.
    pub(crate) workers: u32,
    /// Leases of the step, each answered with one vector.
    pub(crate) blocks: u32,
    /// Bytes from the coordinator: parameters to each worker, which holds the version before, and the tokens of all slots.
    pub(crate) down_bytes: u64,
    /// Bytes to the coordinator: a gradient for each block.
    pub(crate) up_bytes: u64,
    /// Until the busiest worker has computed.
    pub(crate) compute_secs: f64,
    /// Until the link has carried everything.
    pub(crate) transfer_secs: f64,
}

impl WorkerMemory {
    /// Of a worker that computes all slots of a step, with so many rows for each sequence. One that has several blocks of a step
    /// has fewer sums that wait, and what it sends in their place.
    pub(crate) fn of(
        model: &ModelConfig,
        adapters: Option<&AdapterConfig>,
        batch: BatchConfig,
        rows_per_sequence: usize,
    ) -> Self {
        let vector = trained_layout(model, adapters).len() as u64 * FLOAT_BYTES;
        let base = adapters.map_or(0, |_| Layout::of(model).len() as u64 * FLOAT_BYTES);
        let waiting_sums = u64::from(batch.slots.next_power_of_two().ilog2());
        Self {
            parameters: 2 * vector + base,
            gradients: (2 + waiting_sums) * vector,
            activations: activation_bytes(model, u64::from(batch.sequences_per_slot) * rows_per_sequence as u64),
            replica: 0,
        }
    }

    /// The same where slots are replicas that follow this rule.
    fn with_replicas(self, rule: &UpdateRule, trained: u64, kept_moments: u64) -> Self {
        // Moments that are kept are here as they came and as they go, too.
        let vectors = 3 + 2 * kept_moments;
        Self { replica: vectors * trained * FLOAT_BYTES + moment_bytes(rule, trained as usize), ..self }
    }

    fn total(&self) -> u64 {
        self.parameters + self.gradients + self.activations + self.replica
    }
}

impl CoordinatorMemory {
    fn total(&self, blocks: u32) -> u64 {
        self.parameters + self.moments + self.block * u64::from(blocks)
    }
}

impl Step {
    /// Computing, then transferring.
    pub(crate) fn secs(&self) -> f64 {
        self.compute_secs + self.transfer_secs
    }
}

impl Plan {
    /// The plan of a recipe whose corpus has `vocab_size` distinct tokens. Both rates are above 0.
    pub(crate) fn of(
        recipe: &Recipe,
        vocab_size: usize,
        bandwidth_bits_per_sec: f64,
        worker_tokens_per_sec: f64,
    ) -> Self {
        let model = recipe.model.with_vocabulary(vocab_size);
        let parameters = Layout::of(&model).len() as u64;
        let adapters = recipe.adapters.as_ref();
        let trained = trained_layout(&model, adapters).len() as u64;
        let vector = trained * FLOAT_BYTES;
        let (published, master) = match recipe.compression.parameters {
            ParameterFormat::F32 => (vector, 0),
            ParameterFormat::Bf16 => (2 * vector + trained * DIFFERENCE_BYTES as u64, vector),
        };
        let rule = &recipe.optimizer.rule;
        let moments = moment_bytes(recipe.outer.as_ref().map_or(rule, |outer| &outer.rule), trained as usize);
        let kept_moments = if recipe.keep_moments { rule.moments() as u64 } else { 0 };
        // As the optimizer's state, and as they are published.
        let kept_by_all = u64::from(recipe.batch.slots) * kept_moments * vector;
        let worker = WorkerMemory::of(&model, adapters, recipe.batch, recipe.rows_per_sequence());
        let worker = if recipe.outer.is_some() { worker.with_replicas(rule, trained, kept_moments) } else { worker };
        let mut plan = Self {
            recipe: recipe.name.clone(),
            model: in_words(&model),
            parameters,
            trained,
            adapters: adapters.map(|AdapterConfig { rank, targets, .. }| {
                format!("adapters of rank {rank} beside {}", targets.join(", "))
            }),
            compression: recipe.compression,
            steps: recipe.schedule.steps,
            slots: recipe.batch.slots,
            local_steps: recipe.outer.as_ref().map(|_| recipe.batch.local_steps),
            kept_moments,
            sequences_per_slot: recipe.batch.sequences_per_slot,
            tokens_per_sequence: (recipe.rows_per_sequence() * recipe.model.tokens_per_sequence()) as u64,
            bytes_per_token: recipe.bytes_per_token(),
            worker,
            coordinator: CoordinatorMemory {
                parameters: vector + published,
                moments: moments + 2 * kept_by_all,
                block: (1 + kept_moments) * vector,
                checkpoint: vector + master + moments + kept_by_all,
            },
            bandwidth_bits_per_sec,
            worker_tokens_per_sec,
            outlook: Vec::new(),
            useful_workers: 1,
        };
        plan.outlook = (0..=plan.slots.next_power_of_two().ilog2()).map(|exponent| plan.step(1 << exponent)).collect();
        plan.useful_workers = plan.count_useful_workers();
        plan
    }

    /// Tokens (or rows) that a step learns from.
    pub(crate) fn tokens_per_step(&self) -> u64 {
        u64::from(self.slots) * self.tokens_per_slot()
    }

    fn tokens_per_slot(&self) -> u64 {
        u64::from(self.local_steps.unwrap_or(1)) * u64::from(self.sequences_per_slot) * self.tokens_per_sequence
    }

    /// Of a version of the parameters, to a worker that holds the one before.
    fn pulled_bytes(&self) -> u64 {
        match self.compression.parameters {
            ParameterFormat::F32 => self.trained * FLOAT_BYTES,
            ParameterFormat::Bf16 => self.trained * DIFFERENCE_BYTES as u64,
        }
    }

    /// Of a block's gradient.
    fn pushed_bytes(&self) -> u64 {
        self.compression.gradients.bytes(self.trained as usize) as u64
    }

    /// One step with `workers` workers.
    ///
    /// Each leases the largest block of the tree, a power of two of slots, that is within its share and fits into a
    /// message, then another until all are done.
    fn step(&self, workers: u32) -> Step {
        let share = (self.slots / workers).max(1);
        let slot_bytes = self.tokens_per_slot() * self.bytes_per_token;
        let fitting = (lockstep_proto::MAX_LEASE_BYTES as u64 / slot_bytes).max(1);
        // Moments cannot be added up, so that each replica is a lease of its own.
        let fitting = if self.kept_moments > 0 { 1 } else { 1u64 << fitting.ilog2() };
        let largest = if workers == 1 { share.next_power_of_two() } else { 1 << share.ilog2() };
        let block_slots = u64::from(largest).min(fitting) as u32;
        let blocks = self.slots.div_ceil(block_slots);
        let busiest_slots = (blocks.div_ceil(workers) * block_slots).min(self.slots);

        let moments = self.kept_moments * self.trained * FLOAT_BYTES;
        let pulled = u64::from(workers) * self.pulled_bytes() + u64::from(blocks) * moments;
        let down_bytes = pulled + self.tokens_per_step() * self.bytes_per_token;
        let up_bytes = u64::from(blocks) * (self.pushed_bytes() + moments);
        let wire_bytes = down_bytes + up_bytes;
        Step {
            workers,
            blocks,
            down_bytes,
            up_bytes,
            compute_secs: (u64::from(busiest_slots) * self.tokens_per_slot()) as f64 / self.worker_tokens_per_sec,
            transfer_secs: wire_bytes as f64 * 8.0 / self.bandwidth_bits_per_sec,
        }
    }

    fn count_useful_workers(&self) -> u32 {
        let (mut useful, mut shortest) = (1, self.step(1).secs());
        for workers in 2..=self.slots {
            let secs = self.step(workers).secs();
            if secs <= shortest * (1.0 - WORTHWHILE) {
                useful = workers;
            }
            shortest = shortest.min(secs);
        }
        useful
    }
}

/// Bytes of the moments that an optimizer keeps of so many parameters.
pub(crate) fn moment_bytes(rule: &UpdateRule, parameters: usize) -> u64 {
    (rule.moments() * parameters) as u64 * FLOAT_BYTES
}

/// An estimate of what one slot of `rows` sequences keeps for its backward pass, in bytes of f32.
///
/// Per token and layer, with width C, H heads and T tokens of context, after Korthikanti et al. (arXiv:2205.05198,
/// section 4.1, counted in elements): 18 C (both norms' inputs and outputs, query, key, value, the attention's output, the
/// four-fold hidden values before and after GELU, a mask on each residual branch) and 3 H T for materialised attention
/// (probabilities, their mask, and what is left of them). Then 3 V for logits, log-probabilities and their gradient, and
/// 2 C for the embedding and the last norm.
fn activation_bytes(model: &ModelConfig, rows: u64) -> u64 {
    match model {
        ModelConfig::Gpt(gpt) => {
            let sizes = [gpt.layers, gpt.width, gpt.heads, gpt.context, gpt.vocab_size];
            let [layers, c, h, t, v] = sizes.map(|size| size as u64);
            let per_token = layers * (18 * c + 3 * h * t) + 2 * c + 3 * v;
            rows * t * per_token * FLOAT_BYTES
        }
        // As above, with K heads of keys and values and F feed-forward width: both norms' inputs and outputs, query, key and
        // value before and after their rotation, the attention's output, two masks; gate, its activation, up, their product.
        ModelConfig::Llama(llama) => {
            let sizes = [llama.layers, llama.width, llama.heads, llama.context, llama.vocab_size];
            let [layers, c, h, t, v] = sizes.map(|size| size as u64);
            let kv = 3 * (llama.kv_heads * llama.head_width()) as u64;
            let per_token = layers * (9 * c + kv + 4 * llama.ffn_width as u64 + 3 * h * t) + 2 * c + 3 * v;
            rows * t * per_token * FLOAT_BYTES
        }
        // Prediction, residual and its square.
        ModelConfig::Line(_) => rows * 3 * FLOAT_BYTES,
    }
}

fn in_words(model: &ModelConfig) -> String {
    match model {
        ModelConfig::Gpt(gpt) => format!(
            "Transformer of {} layers, {} heads, {} wide, context {}, vocabulary {}",
            gpt.layers, gpt.heads, gpt.width, gpt.context, gpt.vocab_size
        ),
        ModelConfig::Llama(llama) => format!(
            "Llama of {} layers, {} heads ({} of keys and values), {} wide ({} feed-forward), context {}, vocabulary {}",
            llama.layers, llama.heads, llama.kv_heads, llama.width, llama.ffn_width, llama.context, llama.vocab_size
        ),
        ModelConfig::Line(_) => "straight line".into(),
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { slots, sequences_per_slot, tokens_per_sequence, steps, .. } = self;
        let tokens = self.tokens_per_step();
        let all_tokens = HumanCount(tokens.saturating_mul(*steps));
        let [all, vector] = [self.parameters, self.trained].map(|elements| DecimalBytes(elements * FLOAT_BYTES));
        let (worker, coordinator) = (&self.worker, &self.coordinator);
        let useful = self.step(self.useful_workers);
        let step_word = if self.local_steps.is_some() { "round" } else { "step" };

        writeln!(f, "recipe            {}", self.recipe)?;
        writeln!(f, "model             {}", self.model)?;
        writeln!(f, "parameters        {} ({all})", HumanCount(self.parameters))?;
        if let Some(adapters) = &self.adapters {
            let share = 100.0 * self.trained as f64 / self.parameters as f64;
            writeln!(
                f,
                "trained           {} ({vector}), {share:.2} % of these: {adapters}",
                HumanCount(self.trained)
            )?;
        }
        let sequences = match tokens_per_sequence {
            1 => "rows".into(),
            length => format!("sequences of {length}"),
        };
        let tokens = HumanCount(tokens);
        match self.local_steps {
            None => {
                writeln!(f, "tokens a step     {tokens}: {slots} slots of {sequences_per_slot} {sequences}")?;
                writeln!(f, "the run           {} steps, {all_tokens} tokens", HumanCount(*steps))?;
            }
            Some(local) => {
                let of_replica = format!("{local} local steps of {sequences_per_slot} {sequences}");
                writeln!(f, "tokens a round    {tokens}: {slots} replicas, {of_replica}")?;
                let all_steps = HumanCount(steps.saturating_mul(u64::from(local)));
                let rounds = HumanCount(*steps);
                writeln!(f, "the run           {rounds} rounds, {all_steps} local steps, {all_tokens} tokens")?;
            }
        }
        writeln!(f)?;
        writeln!(f, "on the wire, a {step_word}")?;
        let [pulled, pushed] = [self.pulled_bytes(), self.pushed_bytes()].map(DecimalBytes);
        let first = match self.compression.parameters {
            ParameterFormat::F32 => String::new(),
            ParameterFormat::Bf16 => format!(" that holds the version before; {vector} to others"),
        };
        writeln!(f, "  parameters      {pulled} down to each worker{first}")?;
        writeln!(f, "  gradients       {pushed} up for each block of slots that is leased")?;
        if self.kept_moments > 0 {
            let moments = DecimalBytes(self.kept_moments * self.trained * FLOAT_BYTES);
            writeln!(f, "  moments         {moments} down to each replica, and as much up again")?;
        }
        writeln!(f, "  tokens          {} down in all", DecimalBytes(tokens.0 * self.bytes_per_token))?;
        if self.adapters.is_some() {
            writeln!(f, "  and once        {all} to each worker: the model that adapters stand on")?;
        }
        writeln!(f)?;
        writeln!(f, "memory, about, beside program and corpus")?;
        writeln!(
            f,
            "  a worker        {}: parameters {}, gradients {}, activations of a slot {}",
            DecimalBytes(worker.total()),
            DecimalBytes(worker.parameters),
            DecimalBytes(worker.gradients),
            DecimalBytes(worker.activations)
        )?;
        if self.local_steps.is_some() {
            writeln!(f, "                  replica and moments {}", DecimalBytes(worker.replica))?;
        }
        writeln!(
            f,
            "  the coordinator {}: parameters {}, moments {}, gradients of {} waiting blocks {}",
            DecimalBytes(coordinator.total(useful.blocks)),
            DecimalBytes(coordinator.parameters),
            DecimalBytes(coordinator.moments),
            useful.blocks,
            DecimalBytes(coordinator.block * u64::from(useful.blocks))
        )?;
        writeln!(
            f,
            "                  and {} more while a checkpoint is written",
            DecimalBytes(coordinator.checkpoint)
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "with {:.0} tokens/s a worker and {} Mbit/s at the coordinator",
            self.worker_tokens_per_sec,
            self.bandwidth_bits_per_sec / 1e6
        )?;
        writeln!(f, "  workers  blocks       down         up     compute    transfer  {step_word:>10}    tokens/s")?;
        for step in &self.outlook {
            let tokens_per_sec = (tokens.0 as f64 / step.secs()).round();
            writeln!(
                f,
                "  {:>7}  {:>6}  {:>9}  {:>9}  {:>10}  {:>10}  {:>10}  {:>10}",
                step.workers,
                step.blocks,
                DecimalBytes(step.down_bytes).to_string(),
                DecimalBytes(step.up_bytes).to_string(),
                seconds(step.compute_secs),
                seconds(step.transfer_secs),
                seconds(step.secs()),
                HumanCount(tokens_per_sec as u64).to_string()
            )?;
        }
        write!(
            f,
            "useful workers    {}: more shorten the {step_word} by less than 5 %, or not at all",
            self.useful_workers
        )
    }
}

/// A duration with three or more significant digits and a fitting unit.
fn seconds(secs: f64) -> String {
    match secs {
        secs if secs < 1e-3 => format!("{:.1} µs", secs * 1e6),
        secs if secs < 1.0 => format!("{:.1} ms", secs * 1e3),
        secs => format!("{secs:.2} s"),
    }
}

#[cfg(test)]
mod tests;
