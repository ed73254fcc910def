//! Learning from pairs of answers: rewards and DPO with PyTorch's losses and gradients, the same run whoever takes part, and a
//! model that prefers what people prefer.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lockstep_model::batch::{Batch, Column, Values};
use lockstep_model::compute::{Computer, SlotKey};
use lockstep_model::config::{DpoConfig, ModelConfig, Objective};
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::layout::Layout;
use serde_json::{Value, json};

use crate::cluster::{
    coordinator, fail, fingerprint, inspect, lockstep, metrics, path, python, succeed, text, worker, workspace,
};
use crate::parity::hashed_vector;

/// A small model that learns to answer, and then what people prefer, in some seconds each.
pub(crate) const SMALL: &[&str] = &[
    "data.train_fraction=0.75",
    "schedule.warmup_steps=2",
    "batch.slots=5",
    "evaluation.slots=3",
    "cluster.heartbeat_interval_ms=200",
    "cluster.liveness_timeout_ms=5000",
];
const ANSWERING: &[&str] = &[
    "model.layers=2",
    "model.heads=2",
    "model.width=48",
    "model.context=64",
    "tokenizer.kind=bytes",
    "optimizer.lr=5e-3",
    "schedule.steps=80",
    "batch.sequences_per_slot=4",
    "evaluation.every_steps=80",
    "sampling.every_steps=0",
];
const PREFERRING: &[&str] = &["optimizer.lr=5e-4", "schedule.steps=24", "evaluation.every_steps=12"];

/// Polite answers and rude ones, given equally often.
fn answers(number: usize) -> [String; 2] {
    let thing = ["bread", "milk", "tea", "soup"][number % 4];
    [format!("Here is {thing}, please."), format!("Take the {thing} yourself.")]
}

fn write(dir: &Path, name: &str, lines: impl Iterator<Item = Value>) -> PathBuf {
    let file = dir.join(name);
    fs::write(&file, lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    file
}

/// A model that has learned to answer, both ways.
pub(crate) fn answering(dir: &Path) -> PathBuf {
    answering_with(dir, &[])
}

fn answering_with(dir: &Path, overrides: &[&str]) -> PathBuf {
    let lines = (0..32).map(|number| {
        let answer = answers(number / 2)[number % 2].clone();
        json!({ "question": format!("May I have {}?", number / 2 % 4), "answer": answer })
    });
    let input = format!("data.input={}", path(&write(dir, "chats.jsonl", lines)));
    let run = dir.join("sft");
    let arguments = ["train", "sft", "--device", "cpu", "--workers", "1", "--run", path(&run)];
    succeed(lockstep(&arguments, &[SMALL, ANSWERING, &[&input], overrides].concat()));
    run
}

/// Preferences for politeness, of several forms.
pub(crate) fn preferences(dir: &Path, name: &str, count: usize) -> PathBuf {
    let lines = (0..count).map(|number| {
        let [chosen, rejected] = answers(number);
        let prompt = format!("May I have {}?", number % 4);
        let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
        match number % 3 {
            0 => json!({ "prompt": prompt, "chosen": chosen, "rejected": rejected }),
            1 => json!({
                "chosen": [turn("user", &prompt), turn("assistant", &chosen)],
                "rejected": [turn("user", &prompt), turn("assistant", &rejected)],
            }),
            _ => json!({
                "prompt": [turn("user", &prompt)], "chosen": chosen, "rejected": rejected, "choice": "first", "id": "1",
            }),
        }
    });
    write(dir, name, lines.chain([json!({ "prompt": "a", "choice": "tie" })]))
}

/// The same run of `stage` by one, two and three workers, with one of them killed, and stopped and resumed. Returns it.
fn runs_are_the_same(dir: &Path, stage: &str, sets: &[&str]) -> PathBuf {
    let run = |name: &str| dir.join(format!("{stage}-{name}"));
    let train = |run: &Path, more: &[&str], overrides: &[&str]| {
        let arguments = [&["train", stage, "--device", "cpu", "--run", path(run)], more].concat();
        succeed(lockstep(&arguments, &[sets, overrides].concat()));
    };
    let quiet = run("1");
    train(&quiet, &["--workers", "1", "--threads", "1"], &[]);
    for workers in ["2", "3"] {
        train(&run(workers), &["--workers", workers], &[]);
        assert_eq!(fingerprint(&run(workers)), fingerprint(&quiet), "{stage}: {workers} workers");
    }
    let killed = run("killed");
    let (mut coordinator, address) = coordinator(stage, &killed, &[], &[sets, &["cluster.min_workers=2"]].concat());
    assert!(coordinator.said.contains("1 prefer neither answer"), "{}", coordinator.said);
    let mut first = worker(&address, "first");
    coordinator.wait_for("worker 1 joined");
    let mut second = worker(&address, "second");
    coordinator.wait_for("step 3/24");
    first.kill();
    coordinator.wait_for("worker 1 left");
    let mut third = worker(&address, "third");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!([second.wait(), third.wait()], [Some(0); 2], "{}{}", second.said, third.said);
    assert_eq!(fingerprint(&killed), fingerprint(&quiet), "{stage}: a worker was killed");

    let stopped = run("stopped");
    train(&stopped, &["--workers", "2"], &["checkpoint.stop_after=7"]);
    train(&stopped, &["--workers", "1", "--resume"], &[]);
    assert_eq!(fingerprint(&stopped), fingerprint(&quiet), "{stage}: stopped and resumed");
    let said = text(&succeed(lockstep(&["verify", path(&quiet)], &[])).stdout);
    assert!(said.contains("draws different   0") && said.contains("0 repeated within an epoch"), "{said}");
    quiet
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"))
}

/// Checks what the metrics say of a run that learns what the preferences of this file's are.
fn metrics_tell_of_learning(run: &Path) {
    let lines = metrics(run);
    let validations: Vec<&Value> = lines.iter().filter(|line| line.get("val_loss").is_some()).collect();
    let (first, last) = (validations[0], validations[validations.len() - 1]);
    assert!((number(first, "val_loss") - std::f64::consts::LN_2).abs() < 1e-4, "{first}");
    assert!(number(first, "rewards/margins").abs() < 1e-3, "{first}");
    assert!(number(last, "val_loss") < 0.5 && number(last, "rewards/accuracies") == 1.0, "{last}");
    for line in &lines {
        let margin = number(line, "rewards/chosen") - number(line, "rewards/rejected");
        assert!((margin - number(line, "rewards/margins")).abs() < 1e-9, "{line}");
    }
    let step = lines.iter().find(|line| line["step"] == 1).unwrap();
    assert!((number(step, "loss") - std::f64::consts::LN_2).abs() < 1e-4, "{step}");
}

fn score(run: &Path, more: &[&str]) -> Value {
    let arguments = [&["eval", path(run), "--device", "cpu", "--json"], more].concat();
    let summary: Value = serde_json::from_slice(&succeed(lockstep(&arguments, &[])).stdout).unwrap();
    summary["preferences"][0].clone()
}

#[test]
fn a_reward_model_learns_what_people_prefer() {
    let dir = tempfile::tempdir().unwrap();
    let answering = answering(dir.path());
    let held_out = preferences(dir.path(), "held-out.jsonl", 8);
    let [init, input] = [("init", &answering), ("data.input", &preferences(dir.path(), "pairs.jsonl", 40))]
        .map(|(key, value)| format!("{key}={}", path(value)));
    let run = runs_are_the_same(dir.path(), "reward", &[SMALL, PREFERRING, &[&init, &input]].concat());
    metrics_tell_of_learning(&run);
    assert!(metrics(&run)[0].get("logps/chosen").is_none(), "a score is no probability");

    let scored = score(&run, &["--preferences", path(&held_out)]);
    assert_eq!((scored["pairs"].as_u64(), scored["rewards/accuracies"].as_f64()), (Some(8), Some(1.0)), "{scored}");
    let said = fail(lockstep(&["generate", "--run", path(&run), "--prompt", "May"], &[]), 1);
    assert!(said.contains("scores answers, and writes none"), "{said}");
    let story = dir.path().join("story.txt");
    fs::write(&story, "Here is bread.").unwrap();
    let said = fail(lockstep(&["eval", path(&run), "--data", path(&story)], &[]), 1);
    assert!(said.contains("scores texts"), "{said}");
}

#[test]
fn dpo_learns_to_give_the_answers_that_people_prefer() {
    let dir = tempfile::tempdir().unwrap();
    let answering = answering(dir.path());
    let held_out = preferences(dir.path(), "held-out.jsonl", 8);
    let [init, input] = [("init", &answering), ("data.input", &preferences(dir.path(), "pairs.jsonl", 40))]
        .map(|(key, value)| format!("{key}={}", path(value)));
    let sets =
        [SMALL, PREFERRING, &["optimizer.lr=2e-4", "sampling.every_steps=0", "dpo.beta=0.2", &init, &input]].concat();
    let run = runs_are_the_same(dir.path(), "dpo", &sets);
    metrics_tell_of_learning(&run);
    let lines = metrics(&run);
    assert!(number(&lines[0], "logps/chosen") < 0.0 && number(&lines[0], "logps/rejected") < 0.0);

    let reference = ["--preferences", path(&held_out), "--reference", path(&answering), "--beta", "0.2"];
    let before = score(&answering, &reference);
    assert_eq!((before["rewards/accuracies"].as_f64(), before["rewards/margins"].as_f64()), (Some(0.5), Some(0.0)));
    let after = score(&run, &reference);
    assert_eq!(after["rewards/accuracies"].as_f64(), Some(1.0), "{after}");
    let generate =
        ["generate", "--run", path(&run), "--prompt", "User: May I have 2?\n\nAssistant:", "--temperature", "0"];
    let said = text(&succeed(lockstep(&[&generate[..], &["--tokens", "12"]].concat(), &[])).stdout);
    assert!(said.contains("Assistant: Here is"), "{said}");

    // The numbers that it was compared with are part of the run.
    let manifest = inspect(&run);
    assert_eq!(manifest["initial_sha256"], inspect(&answering)["params_sha256"]);
    assert!(manifest["references_sha256"].is_string(), "{manifest}");
    let file = run.join("references.json");
    let mut saved: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    saved["log_probs"][3] = (-1.25).into();
    fs::write(&file, saved.to_string()).unwrap();
    let said = fail(lockstep(&["verify", path(&run)], &[]), 1);
    assert!(said.contains("not verified"), "{said}");
    let resume = ["train", "dpo", "--device", "cpu", "--run", path(&run), "--resume"];
    let said = fail(lockstep(&resume, &sets), 1);
    assert!(said.contains("references.json") && said.contains("is not what the run was trained with"), "{said}");
}

/// By adapters, beside a model that is not there any more when the run goes on; a score's head is trained whole.
#[test]
fn adapters_learn_what_people_prefer() {
    let dir = tempfile::tempdir().unwrap();
    let answering = answering(dir.path());
    let held_out = preferences(dir.path(), "held-out.jsonl", 8);
    let [init, input] = [("init", &answering), ("data.input", &preferences(dir.path(), "pairs.jsonl", 40))]
        .map(|(key, value)| format!("{key}={}", path(value)));
    let sets = [SMALL, PREFERRING, &["sampling.every_steps=0", "adapters.rank=8", "optimizer.lr=5e-3", &init, &input]];
    let sets = sets.concat();
    let [mut whole, mut resumed] = [Vec::new(), Vec::new()];
    for stage in ["reward", "dpo"] {
        let [one, two] = ["whole", "resumed"].map(|name| dir.path().join(format!("{stage}-{name}")));
        let train = |run: &Path, workers: &str, more: &[&str]| {
            let arguments = ["train", stage, "--device", "cpu", "--workers", workers, "--run", path(run)];
            succeed(lockstep(&arguments, &[&sets[..], more].concat()));
        };
        train(&one, "1", &[]);
        train(&two, "2", &["checkpoint.stop_after=7"]);
        let scored = score(&one, &["--preferences", path(&held_out)]);
        assert_eq!(scored["rewards/accuracies"].as_f64(), Some(1.0), "{stage}: {scored}");
        metrics_tell_of_learning(&one);
        let shown = inspect(&one);
        assert_eq!(shown["adapters"]["whole"].as_array().map(Vec::len), (stage == "reward").then_some(1), "{shown}");
        whole.push(one);
        resumed.push(two);
    }
    fs::remove_dir_all(&answering).unwrap();
    for (whole, resumed) in whole.iter().zip(&resumed) {
        let arguments = ["train", "--resume", "--device", "cpu", "--workers", "1", "--run", path(resumed)];
        succeed(lockstep(&arguments, &["checkpoint.stop_after=0"]));
        assert_eq!(fingerprint(resumed), fingerprint(whole));
        succeed(lockstep(&["verify", path(resumed)], &[]));
    }
}

/// The coordinator dies once references are computed, and before there is a checkpoint.
#[test]
fn references_are_computed_once() {
    let dir = tempfile::tempdir().unwrap();
    let answering = answering(dir.path());
    let [init, input] = [("init", &answering), ("data.input", &preferences(dir.path(), "pairs.jsonl", 40))]
        .map(|(key, value)| format!("{key}={}", path(value)));
    let sets = [SMALL, PREFERRING, &["sampling.every_steps=0", "checkpoint.every_steps=0", &init, &input]].concat();
    let quiet = dir.path().join("quiet");
    succeed(lockstep(&["train", "dpo", "--device", "cpu", "--workers", "1", "--run", path(&quiet)], &sets));

    let run = dir.path().join("run");
    let (mut first, address) = coordinator("dpo", &run, &[], &sets);
    let mut before = worker(&address, "before");
    first.wait_for("step 2/24");
    first.kill();
    before.kill();
    let references = fs::read(run.join("references.json")).unwrap();
    // Computed again, they would take the place of this text, which means the same.
    let spaced = [&references[..], b"\n"].concat();
    fs::write(run.join("references.json"), &spaced).unwrap();
    let (mut second, address) = coordinator("dpo", &run, &["--resume"], &sets);
    let mut after = worker(&address, "after");
    assert_eq!((second.wait(), after.wait()), (Some(0), Some(0)), "{}", second.said);
    assert_eq!(fs::read(run.join("references.json")).unwrap(), spaced);
    assert_eq!(fingerprint(&run), fingerprint(&quiet));
}

#[test]
fn what_cannot_be_learned_from_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.jsonl");
    fs::write(&bad, "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}\n{\"prompt\":\"a\",\"chosen\":\"b\"}\n")
        .unwrap();
    let input = format!("data.input={}", path(&bad));
    let train = |stage: &str, sets: &[&str]| lockstep(&["train", stage, "--run", path(&dir.path().join("none"))], sets);
    let said = fail(train("dpo", &[&input]), 2);
    assert!(said.contains("nothing says which model is to learn"), "{said}");
    let model = ["model.layers=1", "model.heads=2", "model.width=16", "model.context=64", "tokenizer.kind=bytes"];
    let said = fail(train("dpo", &[&model[..], &[&input]].concat()), 2);
    assert!(said.contains("init = \"\"") && said.contains("how to differ from what it was"), "{said}");
    let said = fail(train("reward", &[&model[..], &[&input]].concat()), 1);
    assert!(said.contains("bad.jsonl: line 2: there is no rejected; expected prompt, chosen and rejected"), "{said}");
    let said = fail(train("reward", &[&model[..], &[&input, "sampling.every_steps=3"]].concat()), 2);
    assert!(said.contains("a model that scores answers writes none"), "{said}");
}

/// Scores here, in `transformers`, and here again after the way there and back.
#[test]
fn a_reward_model_scores_elsewhere_as_it_does_here() {
    let Some(python) = python("a_reward_model_scores_elsewhere_as_it_does_here", &["torch", "transformers"]) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let answering =
        answering_with(dir.path(), &["tokenizer.kind=bpe", "tokenizer.vocab_size=300", "schedule.steps=30"]);
    let pairs = preferences(dir.path(), "pairs.jsonl", 40);
    let [init, input] =
        [("init", &answering), ("data.input", &pairs)].map(|(key, value)| format!("{key}={}", path(value)));
    let [run, folder, back] = ["run", "folder", "back"].map(|name| dir.path().join(name));
    let train = ["train", "reward", "--device", "cpu", "--workers", "1", "--run", path(&run)];
    succeed(lockstep(&train, &[SMALL, PREFERRING, &[&init, &input]].concat()));
    succeed(lockstep(&["export", path(&run), "--format", "hf", "--out", path(&folder)], &[]));
    succeed(lockstep(&["import", path(&folder), "--out", path(&back)], &[]));

    let [chosen, rejected] = answers(0);
    let pair = json!({ "prompt": "May I have 0?", "chosen": chosen, "rejected": rejected });
    let one = write(dir.path(), "one.jsonl", [pair].into_iter());
    let text_of = |answer: &str| Value::from(format!("User: May I have 0?\n\nAssistant: {answer}<|endoftext|>"));
    let texts = write(dir.path(), "texts.jsonl", [text_of(&chosen), text_of(&rejected)].into_iter());
    let mut peer = Command::new(python);
    peer.arg(workspace("deploy/tests/peer/torch_reward.py")).args([&folder, &texts]);
    let theirs: Vec<f64> = serde_json::from_slice(&succeed(peer).stdout).unwrap();
    for run in [run, back] {
        let ours = score(&run, &["--preferences", path(&one)]);
        for (ours, theirs) in ["rewards/chosen", "rewards/rejected"].map(|key| number(&ours, key)).iter().zip(&theirs) {
            assert!((ours - theirs).abs() < 1e-5 && theirs.abs() > 0.01, "{ours} here, {theirs} there");
        }
    }
}

/// All stages one after the other, with few examples and steps.
#[cfg(unix)]
#[test]
fn a_model_goes_its_whole_way_by_script() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("speedrun");
    let mut script = Command::new(workspace("deploy/runs/speedrun.sh"));
    script.args(["--quick", "--seed", "3", "--out", path(&out)]).env("LOCKSTEP", env!("CARGO_BIN_EXE_lockstep"));
    let said = text(&succeed(script).stdout);
    assert_eq!(said.matches("| `lockstep ").count(), 6, "{said}");
    assert_eq!(said.matches(" s |").count(), 8, "{said}");
    assert!(!said.contains("nan") && !said.contains("|  |"), "{said}");
    for run in ["pretrain", "sft", "reward", "dpo"] {
        assert_eq!(inspect(&out.join(run))["step"], 6, "{run}");
    }
    assert_eq!(inspect(&out.join("dpo"))["initial_sha256"], inspect(&out.join("sft"))["params_sha256"]);
}

/// Losses, rewards and gradients of both objectives, for both shapes of Transformer.
#[test]
fn losses_and_gradients_of_pairs_are_pytorchs() {
    let Some(python) = python("losses_and_gradients_of_pairs_are_pytorchs", &["torch"]) else { return };
    let gpt = json!({
        "kind": "gpt", "vocab_size": 61, "context": 12, "layers": 2, "heads": 2, "width": 32, "bias": true,
        "tied_head": true, "gelu": "exact", "norm_epsilon": 1e-5, "dropout": 0.0
    });
    let llama = json!({
        "kind": "llama", "vocab_size": 61, "context": 12, "layers": 2, "heads": 4, "kv_heads": 2, "width": 32,
        "ffn_width": 80, "qk_norm": true, "tied_head": false, "rope_theta": 1e4, "norm_epsilon": 1e-6, "dropout": 0.0
    });
    let smoothed = |smoothing: f64| json!({ "kind": "dpo", "beta": 0.3, "label_smoothing": smoothing });
    let mut cases = Vec::new();
    for config in [gpt, llama] {
        for objective in [json!({ "kind": "reward" }), smoothed(0.0), smoothed(0.2)] {
            let mut config = config.clone();
            let scores = objective["kind"] == "reward";
            config["score_head"] = scores.into();
            let kind = config["kind"].as_str().unwrap();
            let name = format!("{kind} {}", objective.to_string().replace('"', ""));
            cases.push(with_ours(json!({
                "name": name, "config": config, "objective": objective, "parameter_scale": 1.0, "rows": 4, "length": 11,
                "answers": [[3, 11], [5, 7], [0, 1], [9, 11]], "references": [-30.0, -7.5, -4.25, -9.0],
            })));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ours.json");
    fs::write(&file, json!({ "cases": cases }).to_string()).unwrap();
    let script = workspace("deploy/tests/peer/torch_pairs.py");
    let output = Command::new(python).args([path(&script), "--check", path(&file)]).output().expect("Python starts");
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    println!("{}", said.lines().last().unwrap_or_default());
}

/// A case with what a worker computes of it.
fn with_ours(mut case: Value) -> Value {
    let model: ModelConfig = serde_json::from_value(case["config"].clone()).unwrap();
    let setting = |key: &str| case["objective"][key].as_f64().unwrap();
    let scores = model.has_score_head();
    let objective = match scores {
        true => Objective::Reward,
        false => Objective::Dpo(DpoConfig { beta: setting("beta"), label_smoothing: setting("label_smoothing") }),
    };
    let count = |key: &str| case[key].as_u64().unwrap() as usize;
    let (rows, length, vocab_size) = (count("rows"), count("length"), model.vocab_size() as u64);
    let mut weights = vec![0.0; rows * length];
    for (row, answer) in weights.chunks_mut(length).zip(case["answers"].as_array().unwrap()) {
        let [start, end] = [0, 1].map(|side| answer[side].as_u64().unwrap() as usize);
        row[if scores { end - 1 } else { start }..end].fill(1.0);
    }
    let tokens = |factor: u64, offset: u64| {
        Values::U32((0..(rows * length) as u64).map(|i| ((i * factor + offset) % vocab_size) as u32).collect())
    };
    let column = |name: &str, length, values| Column { name: name.into(), shape: [rows, length], values };
    let mut columns = vec![column("tokens", length, tokens(7919, 13)), column("weights", length, Values::F32(weights))];
    if !scores {
        let references = case["references"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32);
        columns.push(column("targets", length, tokens(104_729, 7)));
        columns.push(column("references", 1, Values::F32(references.collect())));
    }
    let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
    let mut computer = Computer::new(&model, &device).with_objective(objective);
    let scale = case["parameter_scale"].as_f64().unwrap();
    computer.load(&hashed_vector(0, computer.layout().len(), scale)).unwrap();
    let ours = computer.gradient(&Batch { columns }, SlotKey { seed: 0, step: 1, slot: 0 }).unwrap();
    let tensors = Layout::of(&model).tensors;
    let tensors =
        tensors.iter().map(|tensor| json!({ "name": tensor.name, "gradient": ours.gradient[tensor.range()] }));
    case["tensors"] = tensors.collect();
    case["sums"] = serde_json::to_value(ours.sums.pairs).unwrap();
    case["sums"]["loss"] = ours.sums.loss.into();
    case
}
