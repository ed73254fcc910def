//! Models of others imported, and ours exported: beside `transformers`, and the Python package `gguf`.
//!
//! `peer/hf_models.py` makes models of random parameters, asks `transformers` what it says, and compares files.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lockstep_model::chat_template::{ChatTemplate, Day, Message};
use lockstep_model::checkpoint::{self, Manifest};
use lockstep_model::compute::Computer;
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::inference::{Engine, Limits, Overflow, Request, Sampling, complete};
use lockstep_model::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::cluster::{SMALL, data, fail, inspect, lockstep, metrics, path, python, succeed, text, workspace};

/// Largest difference of a logit.
const LOGIT_TOLERANCE: f64 = 1e-3;
/// The trained model of the corpora.
const STORIES: &str = "weights-tinystories-656k";
const PEER: &[&str] = &["torch", "transformers", "tokenizers", "gguf"];
const TEXTS: &[&str] = &[
    "Once upon a time",
    "It's  1234 o'clock,\n\n and the größe is 学而时习之!",
    " a <|im_end|> and </s> are text\t",
    "x",
];

/// A model as its run holds it, ready to be asked.
struct Model {
    manifest: Manifest,
    parameters: Vec<f32>,
    device: ComputeDevice,
}

impl Model {
    fn of(run: &Path) -> Self {
        let newest = checkpoint::list(&run.join("checkpoints")).unwrap().pop().unwrap();
        let (manifest, parameters) = checkpoint::read_parameters(&newest).unwrap();
        Self { manifest, parameters, device: ComputeDevice::open(DeviceChoice::Cpu).unwrap() }
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.manifest.tokenizer.as_ref().unwrap()
    }

    fn computer(&self) -> Computer {
        let mut computer = Computer::new(&self.manifest.model, &self.device);
        computer.load(&self.parameters).unwrap();
        computer
    }

    /// The prompt and the likeliest continuation, also beyond an end of text.
    fn greedy(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut said = prompt.to_vec();
        let mut engine = Engine::new(&self.manifest.model, &self.parameters, &self.device, Limits::default()).unwrap();
        let request = Request {
            prompt: prompt.to_vec(),
            max_tokens: count,
            sampling: Sampling::greedy(),
            ends: Vec::new(),
            overflow: Overflow::Stop,
        };
        let each = |token| {
            said.push(token);
            true
        };
        complete(&mut engine, request, each).unwrap();
        said
    }

    /// Compares it with what `transformers` says of a folder: ids of texts, logits, and the likeliest continuation.
    fn check(&self, python: &Path, folder: &Path) {
        let tokenizer = self.tokenizer();
        let prompt = tokenizer.encode("The cat sat on the mat").unwrap();
        let (texts, tokens) = (TEXTS.iter().filter(|text| tokenizer.encode(text).is_ok()).collect::<Vec<_>>(), 30);
        let answer = ask(python, folder, &json!({ "texts": texts, "prompt": prompt, "tokens": tokens }));
        for (index, text) in texts.iter().enumerate() {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(json!(ids), answer["ids"][index], "{}: {text:?}", folder.display());
            assert_eq!(json!(tokenizer.decode(&ids)), answer["texts"][index], "{}", folder.display());
        }
        let logits = self.computer().next_token_logits(&prompt).unwrap();
        let worst = difference(&logits, &answer["logits"]);
        assert!(worst <= LOGIT_TOLERANCE, "{}: logits are off by {worst:.1e}", folder.display());
        assert_eq!(json!(self.greedy(&prompt, tokens)), answer["greedy"], "{}", folder.display());
        println!("{}: logits off by at most {worst:.1e}", folder.display());
    }
}

fn difference(ours: &[f32], theirs: &Value) -> f64 {
    let theirs = theirs.as_array().unwrap();
    assert_eq!(ours.len(), theirs.len());
    let pairs = ours.iter().zip(theirs);
    pairs.map(|(ours, theirs)| (f64::from(*ours) - theirs.as_f64().unwrap()).abs()).fold(0.0, f64::max)
}

/// Runs the peer with `input` and expects success; what it printed.
fn peer(python: &Path, arguments: &[&str], input: &str) -> String {
    let mut command = Command::new(python);
    command.arg(workspace("deploy/tests/peer/hf_models.py")).args(arguments);
    command.env("HF_HUB_OFFLINE", "1").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("Python starts");
    child.stdin.take().unwrap().write_all(input.as_bytes()).expect("the peer reads its input");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{arguments:?}\n{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn ask(python: &Path, folder: &Path, question: &Value) -> Value {
    serde_json::from_str(&peer(python, &["ask", path(folder)], &question.to_string())).expect("it answers in JSON")
}

fn import(folder: &Path, run: &Path) {
    succeed(lockstep(&["import", path(folder), "--out", path(run)], &[]));
}

fn export(run: &Path, out: &Path, format: &str, more: &[&str]) -> PathBuf {
    let arguments = ["export", path(run), "--format", format, "--out", path(out)];
    succeed(lockstep(&[&arguments[..], more].concat(), &[]));
    if format == "gguf" { out.join("model.gguf") } else { out.into() }
}

/// What one draws from a seed it draws in company, too; and a text ends before a stop.
#[test]
fn samples_are_the_same_alone_and_together() {
    let Some(folder) = data("samples_are_the_same_alone_and_together", STORIES) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    import(&folder, &run);
    let generate = |more: &[&str]| -> Vec<Value> {
        let arguments = ["generate", "--run", path(&run), "--prompt", "Once upon a time", "--json", "--top-k", "50"];
        let said = text(&succeed(lockstep(&[&arguments[..], more].concat(), &[])).stdout);
        said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let together = generate(&["--samples", "20", "--tokens", "60"]);
    assert_eq!(together.len(), 20);
    for (sample, seed) in together.iter().zip(1..).step_by(6) {
        let alone = generate(&["--tokens", "60", "--seed", &format!("{seed}"), "--threads", "1"]);
        assert_eq!((sample, &sample["seed"]), (&alone[0], &json!(seed)));
    }
    let whole = together[0]["text"].as_str().unwrap();
    let (sentence, _) = whole.split_once('.').unwrap();
    let stopped = &generate(&["--tokens", "60", "--stop", ".", "--stop", "no such words"])[0];
    assert_eq!((&stopped["text"], &stopped["finish_reason"]), (&json!(sentence), &json!("stop")));
    assert_eq!(together[0]["finish_reason"], "length");
}

/// The model that `transformers` was asked about once, so that this needs no Python.
#[test]
fn an_imported_model_says_what_its_golden_answers_say() {
    let Some(folder) = data("an_imported_model_says_what_its_golden_answers_say", STORIES) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    import(&folder, &run);
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
    let ids = |key: &str| -> Vec<u32> { serde_json::from_value(golden[key].clone()).unwrap() };
    let (prompt, greedy) = (ids("prompt_ids"), ids("greedy_ids_60"));

    let model = Model::of(&run);
    let asked = golden["prompt_text"].as_str().unwrap();
    assert_eq!(model.tokenizer().encode(asked).unwrap(), prompt);
    let logits = model.computer().next_token_logits(&prompt).unwrap();
    let worst = difference(&logits[..16], &golden["last_logits_first16"]);
    assert!(worst <= LOGIT_TOLERANCE, "logits are off by {worst:.1e}");
    assert_eq!(model.greedy(&prompt, greedy.len() - prompt.len()), greedy);

    let count = (greedy.len() - prompt.len()).to_string();
    let arguments = ["generate", "--run", path(&run), "--prompt", asked, "--tokens", &count, "--temperature", "0"];
    let said = text(&succeed(lockstep(&arguments, &[])).stdout);
    assert_eq!(said.trim_end_matches('\n'), model.tokenizer().decode(&greedy));

    let shown = inspect(&run);
    assert_eq!((&shown["step"], &shown["parameters"]), (&json!(0), &json!(model.computer().layout().len())));
    succeed(lockstep(&["verify", path(&run)], &[]));
    // The same folder is the same run, and nothing is written over.
    let again = dir.path().join("again");
    import(&folder, &again);
    for key in ["run_id", "params_sha256"] {
        assert_eq!(inspect(&again)[key], shown[key]);
    }
    let said = fail(lockstep(&["import", path(&folder), "--out", path(&run)], &[]), 1);
    assert!(said.contains("is there already"), "{said}");
}

#[test]
fn a_trained_llama_goes_round_unchanged() {
    const TEST: &str = "a_trained_llama_goes_round_unchanged";
    let (Some(folder), Some(python)) = (data(TEST, STORIES), python(TEST, PEER)) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    import(&folder, &run);
    let exported = export(&run, &dir.path().join("hf"), "hf", &[]);
    peer(&python, &["same", path(&folder), path(&exported)], "");
    Model::of(&run).check(&python, &exported);
    for dtype in ["f32", "bf16", "f16"] {
        let file = export(&run, &dir.path().join(format!("gguf-{dtype}")), "gguf", &["--dtype", dtype]);
        peer(&python, &["gguf", path(&file), path(&folder)], "");
    }
}

#[test]
fn models_of_any_numbers_go_round_unchanged() {
    let Some(python) = python("models_of_any_numbers_go_round_unchanged", PEER) else { return };
    let dir = tempfile::tempdir().unwrap();
    peer(&python, &["make", path(dir.path())], "");
    for (name, dtype) in [("gpt2", "f32"), ("gpt2-bf16", "bf16"), ("llama3", "f32")] {
        let (folder, run) = (dir.path().join(name), dir.path().join(format!("{name}-run")));
        import(&folder, &run);
        Model::of(&run).check(&python, &folder);
        let more = ["--dtype", dtype, "--max-shard-mb", "1"];
        let exported = export(&run, &dir.path().join(format!("{name}-hf")), "hf", &more);
        let in_several = exported.join("model.safetensors.index.json").exists();
        assert_eq!(in_several, name != "llama3", "GPT-2 has 2.8 MB of parameters, or half of that");
        peer(&python, &["same", path(&folder), path(&exported)], "");
        let file = export(&run, &dir.path().join(format!("{name}-gguf")), "gguf", &["--dtype", dtype]);
        peer(&python, &["gguf", path(&file), path(&folder)], "");
        // What was exported is imported to the same.
        let again = dir.path().join(format!("{name}-again"));
        import(&exported, &again);
        assert_eq!(inspect(&again)["params_sha256"], inspect(&run)["params_sha256"], "{name}");
    }
    chats_are_written_as_transformers_writes_them(&python, &dir.path().join("llama3"), &dir.path().join("llama3-run"));
}

/// Our own templates and the model's, over conversations of several kinds.
fn chats_are_written_as_transformers_writes_them(python: &Path, folder: &Path, run: &Path) {
    let turn = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let chats = [
        vec![turn("user", "  Hi <there> & \"you\"\n")],
        vec![
            turn("system", " Be brief. "),
            turn("user", "学而?"),
            turn("assistant", "hm</think> Yes."),
            turn("user", "ok"),
        ],
    ];
    let answer = ask(python, folder, &json!({ "chats": chats }));
    let special = [("bos_token", "<|begin|>"), ("eos_token", "<|im_end|>"), ("pad_token", "<|pad|>")];
    let special = special.map(|(part, name)| (part.to_string(), name.to_string())).into();
    let today = Day { year: 2026, month: 1, day: 31 };
    let templates = answer["templates"].as_array().unwrap();
    assert_eq!(templates.len(), 2);
    for asked in templates {
        let template = ChatTemplate::new(asked["template"].as_str().unwrap()).unwrap();
        let rendered = chats.iter().flat_map(|chat| {
            [false, true]
                .map(|add| template.render(chat, &special, add, today).unwrap_or_else(|error| panic!("{error}")))
        });
        assert_eq!(json!(rendered.collect::<Vec<_>>()), asked["rendered"]);
    }
    let model = Model::of(run);
    let Tokenizer::Hf(hf) = model.tokenizer() else { panic!("{:?}", model.tokenizer()) };
    let template = ChatTemplate::new(hf.files().chat_template.as_ref().unwrap()).unwrap();
    for (chat, ids) in chats.iter().zip(answer["chat_ids"].as_array().unwrap()) {
        let text = template.render(chat, &special, true, today).unwrap();
        assert_eq!(json!(model.tokenizer().encode_rendered(&text).unwrap()), *ids);
    }
}

/// Models that were trained here, with each kind of tokenizer, without biases and with the exact GELU.
#[test]
fn what_is_trained_here_is_read_elsewhere() {
    let Some(python) = python("what_is_trained_here_is_read_elsewhere", PEER) else { return };
    let dir = tempfile::tempdir().unwrap();
    for (recipe, tokenizer) in [("quickstart", "chars"), ("quickstart", "bytes"), ("quickstart-llama", "bpe")] {
        let run = dir.path().join(format!("{recipe}-{tokenizer}"));
        let arguments = ["train", recipe, "--device", "cpu", "--workers", "1", "--run", path(&run)];
        let kind = format!("tokenizer.kind={tokenizer}");
        let mut sets =
            vec!["schedule.steps=4", "schedule.warmup_steps=0", "model.dropout=0", "model.context=64", kind.as_str()];
        if tokenizer == "bpe" {
            sets.push("tokenizer.vocab_size=300");
        }
        succeed(lockstep(&arguments, &[SMALL, &sets].concat()));
        let exported = export(&run, &run.join("hf"), "hf", &[]);
        Model::of(&run).check(&python, &exported);
        // llama.cpp has no words for characters beyond ASCII, and another GELU than these GPTs.
        if recipe == "quickstart-llama" {
            let file = export(&run, &run.join("gguf"), "gguf", &[]);
            peer(&python, &["gguf", path(&file), path(&exported)], "");
        }
    }
}

#[test]
fn an_imported_model_is_trained_further() {
    const TEST: &str = "an_imported_model_is_trained_further";
    let Some(folder) = data(TEST, STORIES) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (imported, story) = (dir.path().join("imported"), dir.path().join("story.txt"));
    import(&folder, &imported);
    std::fs::write(
        &story,
        "Once upon a time there was a little girl named Lily. She liked to play in the park. ".repeat(60),
    )
    .unwrap();
    let input = format!("data.input={}", path(&story));
    let sets = [
        input.as_str(),
        "model.context=32",
        "schedule.steps=6",
        "schedule.warmup_steps=0",
        "optimizer.lr=1e-3",
        "batch.slots=2",
        "evaluation.every_steps=6",
        "evaluation.slots=4",
    ];
    let recipe = imported.join("recipe.toml");
    let train = |run: &Path, more: &[&str], sets: &[&str]| {
        let arguments = ["train", path(&recipe), "--device", "cpu", "--workers", "1", "--run", path(run)];
        lockstep(&[&arguments[..], more].concat(), sets)
    };
    let run = dir.path().join("run");
    succeed(train(&run, &[], &[&sets[..], &["checkpoint.stop_after=3"]].concat()));
    succeed(train(&run, &["--resume"], &sets));
    let losses: Vec<f64> = metrics(&run).iter().filter_map(|line| line["val_loss"].as_f64()).collect();
    // It knows such stories, and learns this one: a model that begins anew has a loss of ln 2048 = 7.6.
    assert!(losses[0] < 6.5 && losses[losses.len() - 1] < losses[0], "{losses:?}");
    succeed(lockstep(&["verify", path(&run)], &[]));

    // From the folder itself, in one go: the same run.
    let whole = dir.path().join("whole");
    succeed(train(&whole, &[], &[&sets[..], &[&format!("init={}", path(&folder))]].concat()));
    assert_eq!(inspect(&whole)["params_sha256"], inspect(&run)["params_sha256"]);

    // Other parameters are another run, and another model is none.
    let other = format!("init={}", path(&whole));
    let said = fail(train(&run, &["--resume"], &[&sets[..], &[&other]].concat()), 1);
    assert!(said.contains("began with other parameters than init holds now"), "{said}");
    let said = fail(train(&dir.path().join("none"), &[], &[&sets[..], &["model.rope_theta=5.0"]].concat()), 1);
    assert!(
        said.contains("its model has rope_theta = 10000.0, and the one that the recipe describes has 5.0"),
        "{said}"
    );
    let said = fail(lockstep(&["train", "--run", path(&imported), "--resume"], &[]), 1);
    assert!(said.contains("was imported, and trained on nothing yet"), "{said}");
}

/// What `transformers` says of an exported model that has adapters merged into it.
#[test]
fn a_model_with_adapters_is_exported_as_one() {
    const TEST: &str = "a_model_with_adapters_is_exported_as_one";
    let (Some(folder), Some(python)) = (data(TEST, STORIES), python(TEST, PEER)) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (imported, story, run) = (dir.path().join("imported"), dir.path().join("story.txt"), dir.path().join("run"));
    import(&folder, &imported);
    std::fs::write(&story, "Once upon a time a girl named Lily liked to play in the park. ".repeat(60)).unwrap();
    let input = format!("data.input={}", path(&story));
    let sets =
        ["model.context=64", "schedule.steps=8", "schedule.warmup_steps=0", "optimizer.lr=1e-2", "adapters.rank=4"];
    let recipe = imported.join("recipe.toml");
    let arguments = ["train", path(&recipe), "--device", "cpu", "--workers", "1", "--run"];
    succeed(lockstep(&[&arguments[..], &[path(&run)]].concat(), &[&sets[..], &[&input]].concat()));
    let exported = export(&run, &dir.path().join("hf"), "hf", &[]);
    let model = Model::of(&run);
    assert_ne!(model.parameters, Model::of(&imported).parameters);
    model.check(&python, &exported);
    let file = export(&run, &dir.path().join("gguf"), "gguf", &[]);
    peer(&python, &["gguf", path(&file), path(&exported)], "");
}

/// Nothing is left behind where an import or an export fails.
#[test]
fn what_cannot_be_read_or_written_is_named_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, out) = (dir.path().join("folder"), dir.path().join("out"));
    std::fs::create_dir(&folder).unwrap();
    let config = json!({ "architectures": ["LlamaForCausalLM"], "attention_bias": true });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let said = fail(lockstep(&["import", path(&folder), "--out", path(&out)], &[]), 1);
    assert!(said.contains("config.json: attention_bias = true: only false can be imported"), "{said}");

    let run = dir.path().join("run");
    let line = ["train", "line", "--device", "cpu", "--workers", "1", "--run", path(&run)];
    succeed(lockstep(&line, &["schedule.steps=2"]));
    let said = fail(lockstep(&["export", path(&run), "--format", "hf", "--out", path(&out)], &[]), 1);
    assert!(said.contains("the run's model reads no text"), "{said}");
    let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["folder", "run"]);
}
