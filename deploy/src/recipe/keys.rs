//! Every key of a recipe, in one table: its default, what reads it, and whether it may change while a run is resumed.

use serde::Deserialize;
use toml::Value;

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// `section.key`, or a key of the top level.
    pub(super) path: &'static str,
    fallback: Fallback,
    /// Which recipes read it.
    pub(super) reader: Reader,
    /// Whether it may change on `--resume`.
    pub(super) on_resume: OnResume,
}

/// What stands in for a key that is left out.
#[derive(Clone, Copy, Debug)]
enum Fallback {
    /// This value, as TOML.
    Default(&'static str),
    /// Nothing: it must be given, for example like this.
    Required(&'static str),
}

/// Which recipes read a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// All.
    Every,
    /// Those of a Transformer.
    Text,
    /// Those that learn from text as it stands.
    Pretraining,
    /// Those of a Transformer of GPT-2 shape.
    Gpt,
    /// Those of a Transformer of Llama shape.
    Llama,
    /// Those of the straight line.
    Line,
    /// Those that learn to give the better of two answers.
    Dpo,
    /// Those that use AdamW, for some tensors at least.
    Adamw,
    /// Those whose optimizer has a momentum.
    Momentum,
    /// Those whose slots are replicas that take local steps.
    Local,
    /// Those that train adapters.
    Adapted,
    /// Those that learn a vocabulary.
    Bpe,
    /// Those whose learning rate falls.
    FallingRate,
}

/// Whether a key may change while a run is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnResume {
    /// It may: the parameters do not depend on it. (The text behind `data.input` and the parameters behind `init` are known
    /// by their digests, wherever they lie.)
    Free,
    /// It may not: the run would become another run, or be measured otherwise.
    Fixed,
}

/// The keys that decide which others are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kinds {
    pub(super) stage: Stage,
    pub(super) model: ModelKind,
    /// Whether there are adapters.
    pub(super) adapted: bool,
    pub(super) tokenizer: TokenizerKind,
    pub(super) optimizer: OptimizerKind,
    pub(super) decay: DecayKind,
    /// Whether there are local steps.
    pub(super) local: bool,
}

/// `stage`: what a run learns, and from what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stage {
    /// Text, all of it.
    Pretrain,
    /// Conversations, of which the answers are learned.
    Sft,
    /// Pairs of answers: which of them is better.
    Reward,
    /// The same: to give the better one.
    Dpo,
}

/// `model.kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ModelKind {
    Gpt,
    Llama,
    Line,
}

/// `tokenizer.kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TokenizerKind {
    /// That of the prepared corpus, or of `tokenizer.file`, or else characters.
    Auto,
    /// One token a byte.
    Bytes,
    /// One token a character.
    Chars,
    /// Pieces of words.
    Bpe,
}

/// `optimizer.kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum OptimizerKind {
    Adamw,
    Muon,
    Nesterov,
    Sgd,
}

/// `schedule.decay`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DecayKind {
    Cosine,
    Linear,
    Wsd,
    Constant,
}

/// `cluster.on_dispute`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DisputeKind {
    Wait,
    Halt,
}

use Fallback::{Default, Required};
use OnResume::{Fixed, Free};
use Reader::{Adamw, Adapted, Bpe, Dpo, Every, FallingRate, Gpt, Line, Llama, Local, Momentum, Pretraining, Text};

/// All keys, in the order in which a recipe is written. `recipes/quickstart.toml` says what each means and in which unit.
/// The optimizer's defaults are PyTorch's.
#[rustfmt::skip]
pub(super) const KEYS: &[Key] = &[
    key("name",                          Required("\"mine\""),        Every,       Free),
    key("seed",                          Default("1"),                Every,       Fixed),
    key("stage",                         Default("\"pretrain\""),     Text,        Fixed),
    key("init",                          Default("\"\""),             Text,        Free),

    key("model.kind",                    Default("\"gpt\""),          Every,       Fixed),
    key("model.layers",                  Required("4"),               Text,        Fixed),
    key("model.heads",                   Required("4"),               Text,        Fixed),
    key("model.kv_heads",                Default("0"),                Llama,       Fixed),
    key("model.width",                   Required("128"),             Text,        Fixed),
    key("model.head_width",              Default("0"),                Llama,       Fixed),
    key("model.ffn_width",               Default("0"),                Llama,       Fixed),
    key("model.context",                 Required("64"),              Text,        Fixed),
    key("model.bias",                    Default("true"),             Gpt,         Fixed),
    key("model.qk_norm",                 Default("false"),            Llama,       Fixed),
    key("model.tied_head",               Default("true"),             Text,        Fixed),
    key("model.gelu",                    Default("\"exact\""),        Gpt,         Fixed),
    key("model.rope_theta",              Default("10000.0"),          Llama,       Fixed),
    key("model.rope_scaling",            Default("[]"),               Llama,       Fixed),
    key("model.norm_epsilon",            Default("1e-5"),             Text,        Fixed),
    key("model.dropout",                 Default("0.0"),              Text,        Fixed),
    key("model.initial_weight",          Default("0.0"),              Line,        Fixed),
    key("model.initial_bias",            Default("0.0"),              Line,        Fixed),

    key("compute.precision",             Default("\"f32\""),          Text,        Fixed),

    key("adapters.rank",                 Default("0"),                Text,        Fixed),
    key("adapters.alpha",                Default("16.0"),             Adapted,     Fixed),
    key("adapters.targets",              Default("[]"),               Adapted,     Fixed),

    key("data.input",                    Required("\"builtin:kjv\""), Text,        Free),
    key("data.weights",                  Default("[]"),               Pretraining, Fixed),
    key("data.order",                    Default("\"random\""),       Text,        Fixed),
    key("data.separate_documents",       Default("false"),            Pretraining, Fixed),
    key("data.train_fraction",           Default("0.9"),              Text,        Fixed),

    key("dpo.beta",                      Default("0.1"),              Dpo,         Fixed),
    key("dpo.label_smoothing",           Default("0.0"),              Dpo,         Fixed),

    key("tokenizer.kind",                Default("\"auto\""),         Text,        Fixed),
    key("tokenizer.file",                Default("\"\""),             Text,        Fixed),
    key("tokenizer.vocab_size",          Default("4096"),             Bpe,         Fixed),

    key("optimizer.kind",                Default("\"adamw\""),        Every,       Fixed),
    key("optimizer.lr",                  Required("0.001"),           Every,       Fixed),
    key("optimizer.momentum",            Default("0.95"),             Momentum,    Fixed),
    key("optimizer.beta1",               Default("0.9"),              Adamw,       Fixed),
    key("optimizer.beta2",               Default("0.999"),            Adamw,       Fixed),
    key("optimizer.epsilon",             Default("1e-8"),             Adamw,       Fixed),
    key("optimizer.weight_decay",        Default("0.01"),             Adamw,       Fixed),
    key("optimizer.grad_clip",           Default("0.0"),              Every,       Fixed),
    key("optimizer.max_bad_steps",       Default("3"),                Every,       Free),
    key("optimizer.skip_above_median",   Default("0.0"),              Every,       Fixed),

    key("schedule.steps",                Required("1000"),            Every,       Fixed),
    key("schedule.warmup_steps",         Default("0"),                Every,       Fixed),
    key("schedule.decay",                Default("\"cosine\""),       Every,       Fixed),
    key("schedule.decay_steps",          Default("0"),                FallingRate, Fixed),
    key("schedule.min_lr",               Default("0.0"),              FallingRate, Fixed),

    key("batch.slots",                   Required("4"),               Every,       Fixed),
    key("batch.sequences_per_slot",      Required("3"),               Every,       Fixed),
    key("batch.local_steps",             Default("0"),                Every,       Fixed),

    key("outer.lr",                      Default("0.7"),              Local,       Fixed),
    key("outer.momentum",                Default("0.9"),              Local,       Fixed),
    key("outer.keep_moments",            Default("false"),            Local,       Fixed),

    key("wire.gradients",                Default("\"f32\""),          Every,       Fixed),
    key("wire.parameters",               Default("\"f32\""),          Every,       Fixed),

    key("evaluation.every_steps",        Default("0"),                Every,       Fixed),
    key("evaluation.slots",              Default("32"),               Every,       Fixed),

    key("sampling.every_steps",          Default("0"),                Every,       Free),
    key("sampling.prompts",              Default("[\"\\n\"]"),        Every,       Free),
    key("sampling.tokens",               Default("200"),              Text,        Free),
    key("sampling.temperature",          Default("0.8"),              Text,        Free),
    key("sampling.top_k",                Default("0"),                Text,        Free),

    key("checkpoint.every_steps",        Default("500"),              Every,       Free),
    key("checkpoint.every_secs",         Default("30.0"),             Every,       Free),
    key("checkpoint.keep_last",          Default("2"),                Every,       Free),
    key("checkpoint.stop_after",         Default("0"),                Every,       Free),

    key("cluster.min_workers",           Default("1"),                Every,       Free),
    key("cluster.exact",                 Default("true"),             Every,       Fixed),
    key("cluster.audit",                 Default("0.0"),              Every,       Free),
    key("cluster.on_dispute",            Default("\"wait\""),         Every,       Free),
    key("cluster.heartbeat_interval_ms", Default("1000"),             Every,       Free),
    key("cluster.liveness_timeout_ms",   Default("10000"),            Every,       Free),
];

const fn key(path: &'static str, fallback: Fallback, reader: Reader, on_resume: OnResume) -> Key {
    Key { path, fallback, reader, on_resume }
}

impl Key {
    /// The key of this path.
    pub(super) fn find(path: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.path == path)
    }

    /// Its section; empty for a key of the top level.
    pub(super) fn section(&self) -> &'static str {
        split(self.path).0
    }

    /// Its name within the section.
    pub(super) fn leaf(&self) -> &'static str {
        split(self.path).1
    }

    /// What stands in for it where it is left out, if anything does.
    pub(super) fn default(&self) -> Option<Value> {
        matches!(self.fallback, Default(_)).then(|| self.example())
    }

    /// A value that would do.
    pub(super) fn example(&self) -> Value {
        let (Default(text) | Required(text)) = self.fallback;
        parse_value(text).expect("the table holds TOML values")
    }
}

impl Reader {
    /// Whether a recipe of these kinds is among them.
    pub(super) fn includes(self, kinds: Kinds) -> bool {
        match self {
            Every => true,
            Text => kinds.model != ModelKind::Line,
            Pretraining => kinds.model != ModelKind::Line && kinds.stage == Stage::Pretrain,
            Dpo => kinds.model != ModelKind::Line && kinds.stage == Stage::Dpo,
            Gpt => kinds.model == ModelKind::Gpt,
            Llama => kinds.model == ModelKind::Llama,
            Line => kinds.model == ModelKind::Line,
            Adapted => kinds.model != ModelKind::Line && kinds.adapted,
            Bpe => kinds.model != ModelKind::Line && kinds.tokenizer == TokenizerKind::Bpe,
            Adamw => matches!(kinds.optimizer, OptimizerKind::Adamw | OptimizerKind::Muon),
            Momentum => matches!(kinds.optimizer, OptimizerKind::Muon | OptimizerKind::Nesterov),
            Local => kinds.local,
            FallingRate => kinds.decay != DecayKind::Constant,
        }
    }

    /// The assignment that makes a recipe one of them, as TOML.
    pub(super) fn condition(self) -> &'static str {
        match self {
            Every | Text | Gpt => "model.kind = \"gpt\"",
            Pretraining => "stage = \"pretrain\"",
            Dpo => "stage = \"dpo\"",
            Llama => "model.kind = \"llama\"",
            Line => "model.kind = \"line\"",
            Adapted => "adapters.rank = 8",
            Bpe => "tokenizer.kind = \"bpe\"",
            Adamw => "optimizer.kind = \"adamw\"",
            Momentum => "optimizer.kind = \"muon\"",
            Local => "batch.local_steps = 50",
            FallingRate => "schedule.decay = \"cosine\"",
        }
    }
}

/// A single TOML value; `None` if the text is none.
pub(super) fn parse_value(text: &str) -> Option<Value> {
    let mut table: toml::Table = format!("value = {text}").parse().ok()?;
    let value = table.remove("value")?;
    table.is_empty().then_some(value)
}

/// Whether there is a section of this name.
pub(super) fn is_section(name: &str) -> bool {
    !name.is_empty() && KEYS.iter().any(|key| key.section() == name)
}

/// What to say of a path that is no key: the nearest one, and those there are.
pub(super) fn hint(path: &str) -> String {
    let suggestion = nearest(path).map_or(String::new(), |near| format!(" (did you mean {near}?)"));
    let leaves = |section: &str| {
        let leaves: Vec<&str> = KEYS.iter().filter(|key| key.section() == section).map(Key::leaf).collect();
        leaves.join(", ")
    };
    match [path, split(path).0].into_iter().find(|name| is_section(name)) {
        Some(section) => format!("{suggestion}; the keys of [{section}] are {}", leaves(section)),
        None => {
            let mut sections: Vec<&str> = KEYS.iter().map(Key::section).filter(|name| is_section(name)).collect();
            sections.dedup();
            let (sections, others) = (sections.join(", "), leaves(""));
            format!("{suggestion}; the sections are {sections}; outside of them there are {others}")
        }
    }
}

/// The key whose path is fewest edits away, if they are few; else one of the same name in another section.
fn nearest(path: &str) -> Option<&'static str> {
    const MAX_EDITS: usize = 3;
    let leaf = split(path).1;
    let edits = |key: &&Key| edit_distance(path, key.path);
    let near = KEYS.iter().min_by_key(edits).filter(|key| edits(key) <= MAX_EDITS.min(leaf.len().saturating_sub(1)));
    near.or_else(|| KEYS.iter().find(|key| key.leaf() == leaf)).map(|key| key.path)
}

/// Section and name of a dotted path.
fn split(path: &str) -> (&str, &str) {
    path.split_once('.').unwrap_or(("", path))
}

/// How many characters must be inserted, removed or replaced to turn one text into the other (Levenshtein 1966).
pub(super) fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_counted_in_edits() {
        for (from, to, distance) in [("", "", 0), ("", "abc", 3), ("heads", "heads", 0), ("kitten", "sitting", 3)] {
            assert_eq!(edit_distance(from, to), distance);
            assert_eq!(edit_distance(to, from), distance);
        }
    }

    #[test]
    fn near_misses_are_recognised() {
        for (path, meant) in [
            ("model.head", Some("model.heads")),
            ("model.n_layer", Some("model.layers")),
            ("optimiser.lr", Some("optimizer.lr")),
            ("lr", Some("optimizer.lr")),
            ("train.steps", Some("schedule.steps")),
            ("model.q", None),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(path), meant, "{path}");
        }
    }

    #[test]
    fn the_table_is_sound() {
        for (index, key) in KEYS.iter().enumerate() {
            key.example();
            assert!(KEYS[..index].iter().all(|other| other.path != key.path), "{}", key.path);
            let first = KEYS.iter().position(|other| other.section() == key.section()).unwrap();
            assert!(KEYS[first..=index].iter().all(|other| other.section() == key.section()), "{}", key.path);
        }
    }
}
