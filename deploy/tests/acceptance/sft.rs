//! Learning from conversations: the same loss as PyTorch's, the same run whoever takes part, and answers that end.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lockstep_model::batch::{Batch, Column, Sums, Values};
use lockstep_model::compute::Computer;
use lockstep_model::config::{BatchConfig, WindowOrder};
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::layout::initial_parameters;
use lockstep_model::packing::{Example, PackedRows, PackedSource};
use lockstep_model::sampler::Source;
use serde_json::{Value, json};

use crate::cluster::{
    coordinator, data, fail, fingerprint, inspect, lockstep, metrics, path, python, succeed, text, worker, workspace,
};

const STORIES: &str = "weights-tinystories-656k";
/// Largest error of a loss beside PyTorch's.
const LOSS_TOLERANCE: f64 = 1e-4;

/// A small model that learns to answer in some seconds.
pub(crate) const SMALL: &[&str] = &[
    "model.layers=2",
    "model.heads=2",
    "model.width=48",
    "model.context=64",
    "tokenizer.kind=bpe",
    "tokenizer.vocab_size=320",
    "data.train_fraction=0.75",
    "optimizer.lr=1e-2",
    "schedule.steps=60",
    "batch.slots=5",
    "batch.sequences_per_slot=4",
    "evaluation.every_steps=20",
    "evaluation.slots=2",
    "sampling.every_steps=30",
    "sampling.prompts=['Which is it?']",
    "sampling.tokens=24",
    "cluster.heartbeat_interval_ms=200",
    "cluster.liveness_timeout_ms=5000",
];

/// Conversations of several forms in which a question is always answered alike.
pub(crate) fn conversations(dir: &Path) -> PathBuf {
    let lines = (0..24).map(|number| {
        let (asked, answer) = [("Which is it?", "The red one."), ("How many?", "Just two."), ("学什么?", "学而时习之。")][number % 3];
        let line = match number % 4 {
            0 => json!({ "messages": [{ "role": "user", "content": asked }, { "role": "assistant", "content": answer }] }),
            1 => json!({ "conversations": [{ "from": "human", "value": asked }, { "from": "gpt", "value": answer }] }),
            2 => json!({ "instruction": asked, "input": "", "output": answer }),
            _ => json!({ "question": asked, "answer": answer }),
        };
        format!("{line}\n")
    });
    let file = dir.join("chats.jsonl");
    fs::write(&file, lines.collect::<String>()).unwrap();
    file
}

fn train(run: &Path, input: &Path, more: &[&str], overrides: &[&str]) {
    let arguments = [&["train", "sft", "--device", "cpu", "--run", path(run)], more].concat();
    let input = format!("data.input={}", path(input));
    succeed(lockstep(&arguments, &[SMALL, &[&input], overrides].concat()));
}

#[test]
fn whoever_takes_part_the_run_is_the_same_and_its_answers_end() {
    let dir = tempfile::tempdir().unwrap();
    let input = conversations(dir.path());
    let run = |name: &str| dir.path().join(name);
    let quiet = run("1");
    train(&quiet, &input, &["--workers", "1", "--threads", "1"], &[]);
    for workers in ["2", "3"] {
        train(&run(workers), &input, &["--workers", workers], &[]);
        assert_eq!(fingerprint(&run(workers)), fingerprint(&quiet), "{workers} workers");
    }

    let killed = run("killed");
    let input_key = format!("data.input={}", path(&input));
    let sets = [SMALL, &[&input_key, "cluster.min_workers=2"]].concat();
    let (mut coordinator, address) = coordinator("sft", &killed, &[], &sets);
    assert!(coordinator.said.contains("24 conversations found"), "{}", coordinator.said);
    assert!(coordinator.said.contains("⟦ The red one.<|endoftext|>⟧"), "{}", coordinator.said);
    let mut first = worker(&address, "first");
    coordinator.wait_for("worker 1 joined");
    let mut second = worker(&address, "second");
    coordinator.wait_for("step 3/60");
    first.kill();
    coordinator.wait_for("worker 1 left");
    let mut third = worker(&address, "third");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!([second.wait(), third.wait()], [Some(0); 2], "{}{}", second.said, third.said);
    assert_eq!(fingerprint(&killed), fingerprint(&quiet), "a worker was killed");

    let stopped = run("stopped");
    train(&stopped, &input, &["--workers", "2"], &["checkpoint.stop_after=25"]);
    train(&stopped, &input, &["--workers", "1", "--resume"], &[]);
    assert_eq!(fingerprint(&stopped), fingerprint(&quiet), "stopped and resumed");

    let losses: Vec<f64> = metrics(&quiet).iter().filter_map(|line| line["val_loss"].as_f64()).collect();
    assert!(losses[0] > 5.0 && losses[losses.len() - 1] < 0.1, "{losses:?}");
    let said = text(&succeed(lockstep(&["verify", path(&quiet)], &[])).stdout);
    assert!(said.contains("0 repeated within an epoch"), "{said}");
    let samples = fs::read_to_string(quiet.join("samples.txt")).unwrap();
    assert!(samples.trim_end().ends_with("Which is it?\nThe red one."), "the sample is an answer that ends: {samples}");

    // Here, too: more tokens than the answer has would be shown.
    let prompt = "User: How many?\n\nAssistant:";
    let generate = ["generate", "--run", path(&quiet), "--prompt", prompt, "--tokens", "40", "--temperature", "0"];
    assert_eq!(text(&succeed(lockstep(&generate, &[])).stdout).trim_end(), format!("{prompt} Just two."));
    let mut chat = lockstep(&["chat", "--run", path(&quiet), "--tokens", "30", "--temperature", "0"], &[]);
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    chat.stdin.take().unwrap().write_all("学什么?\n".as_bytes()).unwrap();
    let output = chat.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout).trim(), "学而时习之。");
    assert!(text(&output.stderr).contains("as the model learned them"), "{}", text(&output.stderr));
}

#[test]
fn what_a_recipe_takes_is_told_beforehand() {
    let dir = tempfile::tempdir().unwrap();
    let input = format!("data.input={}", path(&conversations(dir.path())));
    let check = lockstep(&["check", "sft", "--worker-tokens-per-sec", "1000"], &[SMALL, &[&input]].concat());
    let output = succeed(check);
    let (said, found) = (text(&output.stdout), text(&output.stderr));
    // 20 rows of 64 tokens, 16 bytes each.
    assert!(said.contains("tokens          20.48 kB down in all"), "{said}");
    assert!(found.contains("0 have no answer, 0 an empty turn, 0 are too long"), "{found}");

    let bad = dir.path().join("bad.jsonl");
    fs::write(&bad, "{\"question\":\"a\",\"answer\":\"b\"}\n{\"question\":\"c\"}\n").unwrap();
    let train = |sets: &[&str]| lockstep(&["train", "sft", "--run", path(&dir.path().join("none"))], sets);
    let said = fail(train(&[SMALL, &[&format!("data.input={}", path(&bad))]].concat()), 1);
    assert!(
        said.contains("bad.jsonl: line 2: there is no answer; expected") && said.contains("{\"question\":\"c\"}"),
        "{said}"
    );
    fs::write(&bad, "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}\n").unwrap();
    let said = fail(train(&[SMALL, &[&format!("data.input={}", path(&bad))]].concat()), 1);
    assert!(said.contains("no token of any conversation is learned") && said.contains("1 have no answer"), "{said}");
    let said = fail(train(&[&input]), 2);
    assert!(said.contains("nothing says which model is to learn"), "{said}");
}

/// The loss of the first step, which has all conversations in it, beside `transformers`' on the same ones.
#[test]
fn the_loss_on_packed_answers_is_pytorchs() {
    const TEST: &str = "the_loss_on_packed_answers_is_pytorchs";
    let (Some(folder), Some(python)) = (data(TEST, STORIES), python(TEST, &["torch", "transformers"])) else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        fs::write(model.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    // As chat models have it: names of special tokens are found in the text as it stands.
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(model.join("tokenizer.json")).unwrap()).unwrap();
    for token in tokenizer["added_tokens"].as_array_mut().unwrap() {
        token["normalized"] = false.into();
    }
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start_story|>", "eos_token": "<|end_story|>"
    });
    fs::write(model.join("tokenizer_config.json"), settings.to_string()).unwrap();
    fs::remove_file(model.join("special_tokens_map.json")).unwrap();
    let template = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}";
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    let turn = |role: &str, content: String| json!({ "role": role, "content": content });
    let lines = (0..40).map(|number| {
        let mut messages = Vec::new();
        for more in 0..=number % 3 {
            messages.push(turn("user", format!("Tell me of the {} little dog.", ["red", "big", "sad"][more])));
            messages.push(turn("assistant", format!("Once upon a time a dog ran{}.", " and ran".repeat(number % 7))));
        }
        json!({ "messages": messages }).to_string() + "\n"
    });
    let file = dir.path().join("chats.jsonl");
    fs::write(&file, lines.collect::<String>()).unwrap();

    let sets = [
        format!("init={}", path(&model)),
        format!("data.input={}", path(&file)),
        "data.train_fraction=1.0".into(),
        "model.context=128".into(),
        "evaluation.every_steps=0".into(),
        "sampling.every_steps=0".into(),
        "schedule.steps=1".into(),
        "schedule.warmup_steps=0".into(),
    ];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let check = succeed(lockstep(&["check", "sft", "--worker-tokens-per-sec", "1000"], &sets));
    let found = text(&check.stderr);
    let rows = found.lines().find_map(|line| line.split_once(" rows of 128 tokens")).expect("rows are counted").0;
    let run = dir.path().join("run");
    let cut = format!("batch.slots={rows}");
    let arguments = ["train", "sft", "--device", "cpu", "--workers", "2", "--run", path(&run)];
    succeed(lockstep(&arguments, &[&sets[..], &[&cut]].concat()));
    let ours = metrics(&run)[0]["loss"].as_f64().unwrap();

    let mut peer = Command::new(python);
    peer.arg(workspace("deploy/tests/peer/torch_masked.py")).args([&model, &file]);
    let theirs: Value = serde_json::from_slice(&succeed(peer).stdout).unwrap();
    let learned = theirs["learned"].as_f64().unwrap();
    assert!(found.replace(',', "").contains(&format!("; {learned} tokens are learned")), "{learned}: {found}");
    for way in ["single", "packed"] {
        let theirs = theirs[way].as_f64().unwrap() / learned;
        assert!((ours - theirs).abs() <= LOSS_TOLERANCE, "{way}: {ours} here, {theirs} there");
        println!("{way}: {ours} here, off by {:.1e}, over {learned} tokens in {rows} rows", (ours - theirs).abs());
    }
    assert_eq!(inspect(&run)["step"], 1);
}

/// Examples packed, and each by itself.
#[test]
fn packed_examples_have_the_loss_that_they_have_alone() {
    let examples: Vec<Example> = (0..30u32)
        .map(|number| {
            let length = 3 + (number * 7) % 23;
            let token = |place: u32| (number * 31 + place * place * 7) % 53;
            Example {
                tokens: (0..length).map(token).collect(),
                targets: (1..=length).map(token).collect(),
                learned: (0..length).map(|place| place % 3 == 0 || place + 1 == length).collect(),
            }
        })
        .collect();
    let gpt = json!({
        "kind": "gpt", "vocab_size": 53, "context": 40, "layers": 2, "heads": 2, "width": 32, "bias": true,
        "tied_head": true, "gelu": "exact", "norm_epsilon": 1e-5, "dropout": 0.0
    });
    let llama = json!({
        "kind": "llama", "vocab_size": 53, "context": 40, "layers": 2, "heads": 4, "kv_heads": 2, "width": 32,
        "ffn_width": 80, "qk_norm": true, "tied_head": true, "rope_theta": 1e4, "norm_epsilon": 1e-6, "dropout": 0.0
    });
    let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
    for model in [gpt, llama].map(|model| serde_json::from_value(model).unwrap()) {
        let mut computer = Computer::new(&model, &device);
        let parameters: Vec<f32> = initial_parameters(&model, 3).iter().map(|value| 5.0 * value).collect();
        computer.load(&parameters).unwrap();
        let rows = PackedRows::pack(&examples, 40);
        let batch = BatchConfig { slots: 1, sequences_per_slot: rows.rows() as u32, local_steps: 1 };
        assert!(rows.rows() < 16, "{} rows", rows.rows());
        let source =
            PackedSource { training: rows.clone(), validation: rows, order: WindowOrder::Epoch, seed: 1, batch };
        let packed = computer.loss(&Source::Packed(source).validation_slot(0)).unwrap();
        let alone = |example: &Example| {
            let shape = [1, example.tokens.len()];
            let column = |name: &str, values| Column { name: name.into(), shape, values };
            let weights = example.learned.iter().map(|learned| f32::from(u8::from(*learned))).collect();
            let columns = vec![
                column("tokens", Values::U32(example.tokens.clone())),
                column("targets", Values::U32(example.targets.clone())),
                column("weights", Values::F32(weights)),
            ];
            computer.loss(&Batch { columns }).unwrap()
        };
        let alone = examples.iter().map(alone).fold(Sums::default(), |sum, each| sum + each);
        assert_eq!(packed.weight, alone.weight);
        let difference = (packed.mean() - alone.mean()).abs();
        assert!(difference <= 1e-5, "{} packed, {} alone", packed.mean(), alone.mean());
        println!("{} packed, off by {difference:.1e}", packed.mean());
    }
}
