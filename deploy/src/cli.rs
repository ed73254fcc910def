//! The command line: what can be asked, and what it says of itself.

mod bench;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use lockstep_model::device::DeviceChoice;
use lockstep_model::inference::Sampling;

pub(crate) use self::bench::{Bench, BenchCompute, BenchGenerate, BenchWire, Measurement};
use crate::chaos::Fault;
use crate::commands::Usage;
use crate::examples::{Kind, Part};

/// Train language models on whatever machines there are: every run is the same run.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = "RUST_LOG filters what is logged, for example RUST_LOG=debug.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train on this machine: a coordinator here, and workers as processes of their own.
    Train(Train),
    /// Coordinate a run that workers join from elsewhere.
    Coordinator(Coordinator),
    /// Compute for a coordinator.
    Worker(Worker),
    /// Stand between a coordinator and workers: one vector comes in, and one sum goes out.
    Relay(Relay),
    /// List what this machine can compute on.
    Devices,
    /// Continue a prompt with a trained model.
    Generate(Generate),
    /// Talk with a trained model.
    Chat(Chat),
    /// Serve a trained model over HTTP, as OpenAI's interface has it, with a page to talk on.
    Serve(Serve),
    /// Ask people which of two answers of a model is better.
    Rate(Rate),
    /// Score a model on texts and on multiple-choice questions.
    Eval(Eval),
    /// Measure training beside inference, on a run's model.
    Compare(Compare),
    /// Validate a recipe and print what it would take.
    Check(Check),
    /// Show what a run or a checkpoint holds.
    Inspect(Inspect),
    /// Make up stories, problems and preferences for a first run through all stages.
    Examples(Examples),
    /// Turn texts into token shards that recipes train on.
    Prepare(Prepare),
    /// Make a run of a model in a Hugging Face folder.
    Import(Import),
    /// Make a plain run of one that trained adapters.
    Merge(Merge),
    /// Write a run's model as others read it.
    Export(Export),
    /// Show what a live run is doing.
    Status(Status),
    /// Check that nothing of a run is damaged, and that it was trained on what its recipe says.
    Verify(Verify),
    /// Measure this machine.
    #[command(subcommand)]
    Bench(Bench),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

/// A recipe and what is changed in it.
#[derive(Args, Debug)]
pub(crate) struct RecipeArgs {
    /// An embedded recipe (quickstart, quickstart-llama, sft, reward, dpo, shakespeare-char-cpu, shakespeare-char, line) or the
    /// path of a TOML file [default: quickstart; with --resume, the run's own].
    pub(crate) recipe: Option<String>,
    /// Override a key of the recipe; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// What a coordinator writes besides its run directory.
#[derive(Args, Debug)]
pub(crate) struct Outputs {
    /// Continue the run in the run directory from its newest checkpoint.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Write the spans of all processes to this file, in Chrome's trace format (open it in ui.perfetto.dev).
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  lockstep train
  lockstep train --workers 4 --set schedule.steps=2000
  lockstep train shakespeare-char-cpu --set data.input=input.txt --run runs/shakespeare
  lockstep train --run runs/shakespeare --resume
  lockstep train --workers 3 --chaos 1")]
pub(crate) struct Train {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Worker processes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) workers: u32,
    /// What workers compute on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// CPU threads of each worker [default: cores / workers, at least 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Directory of the run [default: runs/RECIPE-N, the first N that is free].
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// Kill and stop processes of this cluster at moments drawn from a seed, and say at the end what it cost.
    #[arg(long, value_name = "SEED")]
    pub(crate) chaos: Option<u64>,
    /// Seconds between two faults, on average.
    #[arg(long, value_name = "SECS", default_value_t = 5.0, requires = "chaos", value_parser = positive)]
    pub(crate) chaos_every: f64,
    /// What faults to do.
    #[arg(long, value_enum, value_name = "KIND,…", value_delimiter = ',', requires = "chaos",
        default_values = ["kill-worker", "stop-worker", "kill-coordinator"])]
    pub(crate) chaos_faults: Vec<Fault>,
    #[command(flatten)]
    pub(crate) outputs: Outputs,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "a number above 0, for example 2.5".into())
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  lockstep coordinator quickstart --listen 127.0.0.1:7070 --run runs/shared
  lockstep coordinator my.toml --listen 0.0.0.0:7070 --run runs/lab --insecure")]
pub(crate) struct Coordinator {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: SocketAddr,
    /// Directory of the run.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: PathBuf,
    /// Listen beyond this machine although traffic is neither encrypted nor authenticated.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Run under `train`: announce address and step on standard output, take requests to stop from standard input, and end
    /// with it.
    #[arg(long, hide = true)]
    pub(crate) child: bool,
    #[command(flatten)]
    pub(crate) outputs: Outputs,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  lockstep worker --join 127.0.0.1:7070
  lockstep worker --join 10.0.0.5:7070 --device wgpu:0")]
pub(crate) struct Worker {
    /// The coordinator, or a relay, as HOST:PORT.
    #[arg(long, value_name = "ADDR")]
    pub(crate) join: String,
    /// What to compute on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// CPU threads [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// A name, by which workers are told apart and trusted [default: HOST, or HOST:DEVICE where --device is given].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Let vectors take the network even where the coordinator is on this machine.
    #[arg(long)]
    pub(crate) no_shared_memory: bool,
    /// End when standard input does: how `train` takes its workers with it.
    #[arg(long, hide = true)]
    pub(crate) end_with_stdin: bool,
    /// Print a line on standard output for each membership: how `train` knows that a worker of its own works.
    #[arg(long, hide = true)]
    pub(crate) announce: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "To the coordinator a relay is one worker, to its workers a coordinator: they need its address and nothing else. A relay may
join another one.

Examples:
  lockstep relay --join 127.0.0.1:7070 --listen 127.0.0.1:7071
  lockstep relay --join 10.0.0.5:7070 --listen 192.168.1.1:7070 --insecure"
)]
pub(crate) struct Relay {
    /// The coordinator, or the next relay on the way to it, as HOST:PORT.
    #[arg(long, value_name = "ADDR")]
    pub(crate) join: String,
    /// Address to listen on for workers; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: SocketAddr,
    /// Listen beyond this machine although traffic is neither encrypted nor authenticated.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// A name, by which it is told apart and trusted with all its workers [default: HOST:relay].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Let vectors to and from the coordinator take the network even where it is on this machine.
    #[arg(long)]
    pub(crate) no_shared_memory: bool,
}

/// A model that answers, and on what.
#[derive(Args, Debug)]
pub(crate) struct ModelArgs {
    /// Directory of a run (its newest checkpoint is taken) or of a checkpoint.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: PathBuf,
    /// What to compute on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// CPU threads [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
}

/// How tokens are chosen.
#[derive(Args, Debug)]
pub(crate) struct SamplingArgs {
    /// 0 takes the likeliest token; higher is more varied.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw among the K likeliest tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw among the fewest likeliest tokens whose probabilities reach P.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Draw among tokens at least P times as likely as the likeliest.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// Above 1, what has been said is less likely to be said again.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    repetition_penalty: f64,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl SamplingArgs {
    /// Checked.
    pub(crate) fn sampling(&self) -> Result<Sampling, Usage> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, seed } = *self;
        let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed, ..Sampling::default() };
        sampling.validate().map_err(|error| Usage(error.to_string()))?;
        Ok(sampling)
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  lockstep generate --run runs/quickstart-1 --prompt \"And God said\"
  lockstep generate --run runs/quickstart-1 --prompt \"In the\" --samples 3 --top-p 0.9 --stop \".\"
  lockstep generate --run runs/quickstart-1/checkpoints/step-000000400 --prompt \"In the\" --temperature 0")]
pub(crate) struct Generate {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to continue.
    #[arg(long)]
    pub(crate) prompt: String,
    /// Tokens to generate, at most.
    #[arg(long, default_value_t = 300)]
    pub(crate) tokens: usize,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// End before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Continue so many times, with seeds from --seed on.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) samples: u32,
    /// Print a JSON object a line for each, once it has ended.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "At a terminal, /help lists what else can be asked for. Lines from a pipe are answered one by one.

Examples:
  lockstep chat --run runs/smollm
  lockstep chat --run runs/smollm --system \"Answer in one sentence.\" --temperature 0
  echo \"What is a tree?\" | lockstep chat --run runs/smollm"
)]
pub(crate) struct Chat {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// What the model is told before all else.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tokens of an answer, at most [default: 512, or half the model's context].
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Clients of OpenAI's interface take http://ADDR/v1 as their base URL; a browser opens http://ADDR.

Examples:
  lockstep serve --run runs/smollm
  lockstep serve --run runs/smollm --listen 0.0.0.0:8080 --api-key-file key.txt --sequences 16"
)]
pub(crate) struct Serve {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,
    /// A file with the key that clients must send; the variable LOCKSTEP_API_KEY may hold it instead.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Answer whoever reaches the address although no key is asked for.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// What clients call the model [default: the name of the run's directory].
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Sequences that are computed at once.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) sequences: u32,
    /// Sequences that may wait; more are refused.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) queue: u32,
    /// Tokens of an answer, at most [default: as many as the model's context has].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// Seconds that answers under way may take when the server is asked to stop.
    #[arg(long, value_name = "SECS", default_value_t = 30)]
    pub(crate) grace_secs: u64,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Prompts are a .jsonl file of {\"prompt\": TEXT or MESSAGES} or {\"messages\": MESSAGES}, whose answers at the end are dropped,
or a .txt file with one on each line. Each rater goes through them in an order of their own, and goes on where they were
when the command is started again.

Examples:
  lockstep rate --run runs/chatty --prompts prompts.txt
  lockstep rate --run runs/chatty --prompts prompts.jsonl --listen 0.0.0.0:8081 --rater ann=TOKEN --rater bob=TOKEN
  lockstep train dpo --set init=runs/chatty --set data.input=runs/chatty/preferences.jsonl"
)]
pub(crate) struct Rate {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// What the model is asked [default: what raters write on the page].
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts: Option<PathBuf>,
    /// How often each rater is asked about each prompt, with other answers each time.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "prompts", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// The file that judgements are appended to [default: preferences.jsonl in the run's directory].
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8081")]
    pub(crate) listen: SocketAddr,
    /// Somebody who rates, and the secret in their link; may be given several times.
    #[arg(long, value_name = "NAME=TOKEN", conflicts_with = "raters")]
    pub(crate) rater: Vec<String>,
    /// A file with a line NAME=TOKEN for each of them.
    #[arg(long, value_name = "FILE")]
    pub(crate) raters: Option<PathBuf>,
    /// Let whoever reaches the address rate, although nobody is asked for a token.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// How varied answers are; above 0, as two are to differ.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub(crate) temperature: f64,
    /// Draw among the fewest likeliest tokens whose probabilities reach P.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Tokens of an answer, at most [default: 512, or half the model's context].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// From which all is drawn; another one asks everything anew.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Texts are .txt (one document a file, or several with a line <|endoftext|> between them), .jsonl and .parquet (one
document a row, in the column \"text\"), directories of these, or prepared corpora. Each token that has another before
it in its document is scored once.

Questions are lines of JSON:
  {\"question\": \"The sky is\", \"choices\": [\"blue\", \"a fish\"], \"answer\": 0}
\"prompt\" may stand for \"question\", and the answer may be a letter, from A. A choice's score is the log-probability of its
tokens after the question's: acc takes the highest sum, acc_norm the highest sum for each byte of the choice.

Examples:
  lockstep eval runs/quickstart-1 --data held-out.txt
  lockstep eval runs/smollm --data held-out.jsonl --stride 512 --choices questions.jsonl --json
  lockstep eval runs/dpo-1 --preferences held-out-pairs.jsonl --reference runs/sft-1"
)]
pub(crate) struct Eval {
    /// Directory of a run (its newest checkpoint is taken) or of a checkpoint.
    pub(crate) run: PathBuf,
    /// Texts to score, all of them as one.
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present_any = ["choices", "problems", "preferences"])]
    pub(crate) data: Vec<PathBuf>,
    /// Questions to answer, each file by itself.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) choices: Vec<PathBuf>,
    /// Conversations that end with an answer to compare with, each file by itself: whether the model's own answer has the same
    /// last number, and ends by itself.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) problems: Vec<PathBuf>,
    /// Tokens after which an answer to a problem is cut.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) answer_tokens: u32,
    /// Pairs of answers to compare, each file by itself: by their scores, or by their log-probabilities.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) preferences: Vec<PathBuf>,
    /// The run or checkpoint with which log-probabilities of answers are compared: that which a run of stage dpo began with
    /// [default: none, so that the likelier answer is the better one].
    #[arg(long, value_name = "RUN", requires = "preferences")]
    pub(crate) reference: Option<PathBuf>,
    /// By what a log-probability, compared so, is multiplied to be a reward.
    #[arg(long, default_value_t = 0.1, value_parser = positive, requires = "preferences")]
    pub(crate) beta: f64,
    /// How far each window of a long document begins after the one before, in tokens; what they share is read again and scored
    /// once [default: the model's context, so that they share nothing].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) stride: Option<usize>,
    /// What to compute on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// CPU threads [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Memory, speed, direction of data, dropout, and whether parameters change. A training step is of the size that the run's
recipe says; tokens are drawn at random. Each side is a process of its own, and nothing in the run's directory is written.

Examples:
  lockstep compare runs/quickstart-1
  lockstep compare runs/smollm --threads 2 --rounds 3 --json"
)]
pub(crate) struct Compare {
    /// Directory of a run (its newest checkpoint is taken) or of a checkpoint.
    pub(crate) run: PathBuf,
    /// What to compute on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// CPU threads of either side [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,
    /// How often each speed is measured; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Be one of the sides: a report on standard output.
    #[arg(long, hide = true, value_enum)]
    pub(crate) child: Option<Side>,
}

/// What is measured by a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    Training,
    Inference,
}

impl Side {
    /// As the command line has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Inference => "inference",
        }
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  lockstep check shakespeare-char --set data.input=input.txt --bandwidth-mbit 100")]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Bandwidth of the coordinator's link, in megabits a second.
    #[arg(long, value_name = "MBIT", default_value_t = 1000.0)]
    pub(crate) bandwidth_mbit: f64,
    /// Tokens a second of one worker [default: measured here, on one slot].
    #[arg(long, value_name = "RATE")]
    pub(crate) worker_tokens_per_sec: Option<f64>,
    /// What to measure on: auto, cpu, wgpu or wgpu:INDEX.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
}

#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// Directory of a run or of a checkpoint.
    pub(crate) dir: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Lines are a function of kind, part, seed and number. What is in the test part of problems and manners is in no training part,
whatever the seeds.

Examples:
  lockstep examples stories --count 3000 --out stories.jsonl
  lockstep examples problems --part test --count 500 --out problems-test.jsonl"
)]
pub(crate) struct Examples {
    /// What to make up.
    pub(crate) kind: Kind,
    /// Lines.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) count: u32,
    /// What it is for.
    #[arg(long, default_value = "train")]
    pub(crate) part: Part,
    /// Seed of all that is drawn.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// The file to write [default: standard output].
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Inputs are .txt (one document a file, or several with a line <|endoftext|> between them), .jsonl and
.parquet (one document a row, in the column \"text\"), directories of these, or .bin token shards of llm.c and nanoGPT.

Examples:
  lockstep prepare stories.txt --tokenizer bpe --vocab-size 4096 --out data/stories
  lockstep prepare more/*.jsonl --tokenizer data/stories/tokenizer.json --out data/more
  lockstep train my.toml --set data.input=data/stories"
)]
pub(crate) struct Prepare {
    /// Files and directories, in the order in which they are to be read; a directory's files by their paths.
    #[arg(required = true, value_name = "INPUT")]
    pub(crate) inputs: Vec<PathBuf>,
    /// How text becomes tokens: bytes, chars, bpe (learned from the inputs), or the FILE of a tokenizer.
    #[arg(long, value_name = "bytes|chars|bpe|FILE")]
    pub(crate) tokenizer: String,
    /// Tokens to learn with --tokenizer bpe [default: 4096].
    #[arg(long, value_name = "N")]
    pub(crate) vocab_size: Option<usize>,
    /// Directory to write, which must not exist yet.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Models of Llama shape (LlamaForCausalLM) and GPT-2 shape (GPT2LMHeadModel) are read, as transformers saves them, in
f32, bf16 or f16. The run has not trained yet; its recipe.toml is one to train it further with.

Examples:
  lockstep import SmolLM2-135M --out runs/smollm
  lockstep generate --run runs/smollm --prompt \"Gravity is\"
  lockstep train runs/smollm/recipe.toml --set data.input=mine.txt --run runs/mine"
)]
pub(crate) struct Import {
    /// A folder with config.json, model.safetensors (or numbered files and an index) and tokenizer.json.
    pub(crate) folder: PathBuf,
    /// Directory of the run to make, which must not exist yet.
    #[arg(long, value_name = "RUN")]
    pub(crate) out: PathBuf,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Whatever reads a run with adapters merges them as it reads; nothing needs this but who wants one model by itself.

Examples:
  lockstep merge runs/sft-1 --out runs/answering"
)]
pub(crate) struct Merge {
    /// Directory of a run with adapters (its newest checkpoint is taken), or of a checkpoint of one.
    pub(crate) run: PathBuf,
    /// Directory of the run to make, which must not exist yet.
    #[arg(long, value_name = "RUN")]
    pub(crate) out: PathBuf,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  lockstep export runs/quickstart-1 --format hf --out exported
  lockstep export runs/smollm --format gguf --dtype bf16 --out smollm-gguf")]
pub(crate) struct Export {
    /// Directory of a run (its newest checkpoint is taken) or of a checkpoint.
    pub(crate) run: PathBuf,
    /// hf: a folder for transformers; gguf: a file for llama.cpp.
    #[arg(long, value_enum)]
    pub(crate) format: ExportFormat,
    /// How numbers are written.
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) dtype: Dtype,
    /// Largest file of tensors of a folder, in megabytes: beyond, there are several.
    #[arg(long, value_name = "MB", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) max_shard_mb: u64,
    /// Directory to write, which must not exist yet.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// Who is to read a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    Hf,
    Gguf,
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    F16,
}

#[derive(Args, Debug)]
pub(crate) struct Status {
    /// The coordinator, or a relay, as HOST:PORT.
    pub(crate) address: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Nothing is trained: the sampler is replayed over all committed steps and compared with the run's ledger, and
checkpoints, metrics and corpus with their digests. Exit status 1 if anything differs.

Examples:
  lockstep verify runs/quickstart-1
  lockstep verify runs/lab --set data.input=/mnt/corpus"
)]
pub(crate) struct Verify {
    /// Directory of the run.
    pub(crate) run: PathBuf,
    /// Override a key of the run's recipe, such as data.input where the corpus lies elsewhere now; may be given several
    /// times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
