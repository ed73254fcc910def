//! Recipes: all that makes a run what it is, as TOML.
//!
//! A text and overrides become [`values`] of the keys in the table of [`keys`], complete and without strangers; these
//! become a [`Recipe`] of [validated](validate) types, once, before anything starts.

mod error;
mod keys;
pub(crate) mod resume;
mod validate;
mod values;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use lockstep_coordinator::config::{CheckpointConfig, ClusterConfig, EvaluationConfig, SamplingConfig};
use lockstep_model::adapters::AdapterConfig;
use lockstep_model::compression::Compression;
use lockstep_model::config::{
    BatchConfig, GptConfig, LlamaConfig, ModelConfig, Objective, OptimizerConfig, Precision, ScheduleConfig,
    WindowOrder,
};
use lockstep_model::step_filter::SkipConfig;

pub(crate) use self::error::RecipeError;
pub(crate) use self::keys::{Stage, TokenizerKind};
use self::values::Values;
use crate::builtin;

/// The recipes that come with the program, by name.
const EMBEDDED: [(&str, &str); 8] = [
    ("quickstart", include_str!("../../recipes/quickstart.toml")),
    ("quickstart-llama", include_str!("../../recipes/quickstart-llama.toml")),
    ("sft", include_str!("../../recipes/sft.toml")),
    ("reward", include_str!("../../recipes/reward.toml")),
    ("dpo", include_str!("../../recipes/dpo.toml")),
    ("shakespeare-char-cpu", include_str!("../../recipes/shakespeare-char-cpu.toml")),
    ("shakespeare-char", include_str!("../../recipes/shakespeare-char.toml")),
    ("line", include_str!("../../recipes/line.toml")),
];

/// Bytes that a position (or the line's row) takes in a batch: what is read and what is to be predicted, 4 each.
const BYTES_PER_TOKEN: u64 = 8;
/// Besides, where documents are kept apart: the number of its document.
const BYTES_PER_SEGMENT: u64 = 4;
/// And in rows of conversations: the number of its conversation, and whether it is learned.
const BYTES_PER_LEARNED: u64 = 8;
/// And in rows of answers: whether it is compared.
const BYTES_PER_COMPARED: u64 = 4;

/// A whole recipe, validated. To change one, load it with overrides.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Recipe {
    /// For people, and for the name of the run's directory.
    pub(crate) name: String,
    /// Seed of everything drawn at random.
    pub(crate) seed: u64,
    /// Where the initial parameters come from: a run, a checkpoint or a Hugging Face folder; `None`: drawn from the seed.
    pub(crate) init: Option<PathBuf>,
    /// The model, as far as it is known without its corpus.
    pub(crate) model: ModelRecipe,
    /// What it is trained for.
    pub(crate) objective: Objective,
    /// In what its products are computed.
    pub(crate) precision: Precision,
    /// The adapters that are trained alone; `None`: all of the model is trained.
    pub(crate) adapters: Option<AdapterConfig>,
    /// The corpus; `None` where the model reads no text.
    pub(crate) data: Option<DataRecipe>,
    /// The update rule: of versions, or of each replica's local steps where there is an `outer` one.
    pub(crate) optimizer: OptimizerConfig,
    /// How versions follow what replicas learned in their local steps; `None`: slots are no replicas, and have gradients.
    pub(crate) outer: Option<OptimizerConfig>,
    /// Whether a replica's moments stay with it from step to step.
    pub(crate) keep_moments: bool,
    /// What becomes of steps whose gradient is of no use.
    pub(crate) skip: SkipConfig,
    /// The learning rate over time.
    pub(crate) schedule: ScheduleConfig,
    /// How a step is cut into slots.
    pub(crate) batch: BatchConfig,
    /// In which form vectors travel.
    pub(crate) compression: Compression,
    /// Validation; no slots where there is none.
    pub(crate) evaluation: EvaluationConfig,
    /// Text sampled while training.
    pub(crate) sampling: SamplingConfig,
    /// What is kept on disk.
    pub(crate) checkpoint: CheckpointConfig,
    /// Who may take part.
    pub(crate) cluster: ClusterConfig,
    values: Values,
}

/// A model whose vocabulary is not known yet: it has 0 entries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelRecipe(ModelConfig);

/// The corpus, how it is cut and how it becomes tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DataRecipe {
    /// What is learned from it.
    pub(crate) stage: Stage,
    /// Where the text or the conversations are, at least one place; several texts are a mixture.
    pub(crate) inputs: Vec<WeightedInput>,
    /// In which order windows are drawn.
    pub(crate) order: WindowOrder,
    /// Whether documents in one row see nothing of one another.
    pub(crate) separate_documents: bool,
    /// The share of the text, from its beginning, or of the conversations that is trained on, in `(0, 1]`; the rest is
    /// validated on.
    pub(crate) train_fraction: f64,
    /// How text becomes tokens.
    pub(crate) tokenizer: TokenizerRecipe,
}

/// One part of a mixture.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WeightedInput {
    /// Where the text is.
    pub(crate) input: Input,
    /// Rows come from this part in proportion to its weight; positive.
    pub(crate) weight: f64,
}

/// How text becomes tokens, as far as it is known without the text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenizerRecipe {
    /// Which kind, which a prepared corpus or a file must agree with.
    pub(crate) kind: TokenizerKind,
    /// A tokenizer made before.
    pub(crate) file: Option<PathBuf>,
    /// Tokens to learn, where they are learned.
    pub(crate) vocab_size: usize,
}

/// Where a corpus is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    /// Within the program: the King James text.
    KingJames,
    /// A text file, a directory of such, or a prepared corpus, relative to the current directory.
    Path(PathBuf),
}

impl Recipe {
    /// The embedded recipe of this name, or else the file at this path, changed by overrides of the form `key=value`.
    ///
    /// # Errors
    /// If there is neither, or it is refused.
    pub(crate) fn load(name_or_path: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        let (name, text) = Self::text(name_or_path)?;
        Self::from_toml(&name, &text, overrides)
    }

    /// Name and text of an embedded recipe, or of a file's.
    fn text(name_or_path: &str) -> Result<(String, String), RecipeError> {
        if let Some((name, text)) = EMBEDDED.iter().find(|(name, _)| *name == name_or_path) {
            return Ok((name.to_string(), text.to_string()));
        }
        let path = Path::new(name_or_path);
        let text = fs::read_to_string(path).map_err(|problem| {
            let embedded = EMBEDDED.map(|(name, _)| name).join(", ");
            let looks_like_a_name = path.extension().is_none() && path.components().count() <= 1;
            if problem.kind() == ErrorKind::NotFound && looks_like_a_name {
                RecipeError::NoSuchRecipe { name: name_or_path.into(), hint: nearest_embedded(name_or_path), embedded }
            } else {
                RecipeError::Unreadable { path: path.into(), problem, embedded }
            }
        })?;
        let name = path.file_stem().map_or("recipe".into(), |stem| stem.to_string_lossy().into_owned());
        Ok((name, text))
    }

    /// The recipe of a TOML text, called `name` unless it names itself, changed by overrides of the form `key=value`.
    ///
    /// # Errors
    /// If the text is no TOML, an override is none, or a key or value is refused.
    pub(crate) fn from_toml(name: &str, text: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        validate::recipe(Values::complete(name, text, overrides)?)
    }

    /// Where the parameters of a recipe come from that leaves its model to them: it names `init`, and no key of `[model]`
    /// but such as say how it is trained.
    ///
    /// # Errors
    /// As [`Self::load`]'s, as far as the text alone tells.
    pub(crate) fn init_of_unnamed_model(
        name_or_path: &str,
        overrides: &[String],
    ) -> Result<Option<PathBuf>, RecipeError> {
        let (name, text) = Self::text(name_or_path)?;
        Values::init_of_unnamed_model(&name, &text, overrides)
    }

    /// The recipe in full, overrides applied and defaults filled in, as TOML that [`Self::from_toml`] reads back to an
    /// equal recipe.
    pub(crate) fn to_toml(&self) -> String {
        self.values.to_toml()
    }

    /// Refuses a vocabulary that makes the model too large.
    ///
    /// # Errors
    /// Names the key.
    pub(crate) fn check_vocabulary(&self, vocab_size: usize) -> Result<(), RecipeError> {
        validate::check_elements(&self.values, &self.model, vocab_size)
    }

    /// Refuses what does not fit the corpus: a vocabulary that makes the model too large, and a context that is longer
    /// than the text. Training, and validation where there is any, need a window of `context + 1` tokens each.
    ///
    /// # Errors
    /// Names the key, and the part that is too short.
    pub(crate) fn check_corpus(
        &self,
        vocab_size: usize,
        training_tokens: usize,
        validation_tokens: usize,
    ) -> Result<(), RecipeError> {
        self.check_vocabulary(vocab_size)?;
        let Some(context) = self.model.context() else { return Ok(()) };
        let evaluated = (self.evaluation.slots > 0).then_some(("validate", validation_tokens));
        let parts = [Some(("train", training_tokens)), evaluated];
        let Some((purpose, tokens)) = parts.into_iter().flatten().min_by_key(|(_, tokens)| *tokens) else {
            return Ok(());
        };
        if tokens > context {
            return Ok(());
        }
        let reason = format!(
            "the corpus has {tokens} tokens to {purpose} on, fewer than the context and the token after it ({} tokens)",
            context + 1
        );
        let example = match tokens.saturating_sub(1) {
            0 => format!("data.input = \"{}\"", builtin::KJV),
            longest => format!("model.context = {longest}, or a longer text in data.input"),
        };
        Err(self.values.refuse_for("model.context", reason, example))
    }

    /// What one step of the optimizer learns from: all slots, or one of a replica's batches.
    pub(crate) fn batch_of_optimizer(&self) -> BatchConfig {
        match self.outer {
            Some(_) => BatchConfig { slots: 1, local_steps: 1, ..self.batch },
            None => self.batch,
        }
    }

    /// Bytes that a position (or the line's row) takes in a batch.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        bytes_per_token(self.data.as_ref())
    }

    /// Rows that a sequence stands for: a pair of answers has two.
    pub(crate) fn rows_per_sequence(&self) -> usize {
        rows_per_sequence(self.data.as_ref())
    }

    /// What keeps documents apart, where they are to be, in a corpus whose documents end with `end_of_text`.
    ///
    /// # Errors
    /// If the corpus marks no ends.
    pub(crate) fn separator(&self, end_of_text: Option<u32>) -> Result<Option<u32>, RecipeError> {
        if !self.data.as_ref().is_some_and(|data| data.separate_documents) {
            return Ok(None);
        }
        end_of_text.map(Some).ok_or_else(|| {
            let reason = "nothing in this corpus says where a document ends: its tokenizer has no end of text";
            self.values.refuse_for("data.separate_documents", reason, "tokenizer.kind = \"bpe\"")
        })
    }
}

/// Bytes that a position takes in a batch of `data`, or of the straight line's rows.
fn bytes_per_token(data: Option<&DataRecipe>) -> u64 {
    match data {
        Some(DataRecipe { stage: Stage::Sft, .. }) => BYTES_PER_TOKEN + BYTES_PER_LEARNED,
        Some(DataRecipe { stage: Stage::Reward | Stage::Dpo, .. }) => BYTES_PER_TOKEN + BYTES_PER_COMPARED,
        Some(DataRecipe { separate_documents: true, .. }) => BYTES_PER_TOKEN + BYTES_PER_SEGMENT,
        _ => BYTES_PER_TOKEN,
    }
}

/// Rows that a sequence of `batch.sequences_per_slot` stands for: a pair of answers has two.
fn rows_per_sequence(data: Option<&DataRecipe>) -> usize {
    match data {
        Some(DataRecipe { stage: Stage::Reward | Stage::Dpo, .. }) => 2,
        _ => 1,
    }
}

impl ModelRecipe {
    /// The whole model; the straight line has no vocabulary.
    pub(crate) fn with_vocabulary(&self, vocab_size: usize) -> ModelConfig {
        match self.0.clone() {
            ModelConfig::Gpt(gpt) => ModelConfig::Gpt(GptConfig { vocab_size, ..gpt }),
            ModelConfig::Llama(llama) => ModelConfig::Llama(LlamaConfig { vocab_size, ..llama }),
            ModelConfig::Line(line) => ModelConfig::Line(line),
        }
    }

    /// Longest sequence, in tokens; `None` of the straight line.
    pub(crate) fn context(&self) -> Option<usize> {
        self.0.context()
    }

    /// Tokens of a sequence; a row of the straight line counts as one.
    pub(crate) fn tokens_per_sequence(&self) -> usize {
        self.context().unwrap_or(1)
    }
}

/// The embedded recipe that a misspelt name may have meant, as a question.
fn nearest_embedded(name: &str) -> String {
    const MAX_EDITS: usize = 3;
    let near = EMBEDDED.iter().map(|(known, _)| (keys::edit_distance(name, known), known)).min();
    match near {
        Some((edits, known)) if edits <= MAX_EDITS => format!(" (did you mean {known}?)"),
        _ => String::new(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
