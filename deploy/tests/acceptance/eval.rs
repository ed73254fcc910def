//! `lockstep eval`: beside plain loops here and in `transformers`.
//!
//! `peer/perplexity.py` asks `transformers`.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use lockstep_model::batch::{Batch, Column, Values};
use lockstep_model::checkpoint;
use lockstep_model::compute::Computer;
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::cluster::{SMALL, data, fail, lockstep, path, python, succeed, text, workspace};

/// The trained model of the corpora.
const STORIES: &str = "weights-tinystories-656k";
const DOCUMENTS: [&str; 3] = [
    "In the beginning God created the heaven and the earth. And the earth was without form, and void.",
    "x",
    "And God said, Let there be light: and there was light.\nAnd God saw the light, that it was good.",
];

/// `lockstep eval --json` on the CPU.
fn eval(run: &Path, more: &[&str]) -> Value {
    let arguments = [&["eval", path(run), "--device", "cpu", "--json"], more].concat();
    serde_json::from_slice(&succeed(lockstep(&arguments, &[])).stdout).expect("eval prints JSON")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A run of a few steps whose text becomes byte pairs, and its model.
fn trained(run: &Path) -> (Tokenizer, Computer, usize) {
    let few = ["schedule.steps=4", "schedule.warmup_steps=0", "tokenizer.kind=bpe", "tokenizer.vocab_size=300"];
    let arguments = ["train", "quickstart-llama", "--device", "cpu", "--workers", "1", "--run", path(run)];
    succeed(lockstep(&arguments, &[SMALL, &few].concat()));
    let newest = checkpoint::list(&run.join("checkpoints")).unwrap().pop().unwrap();
    let (manifest, parameters) = checkpoint::read_parameters(&newest).unwrap();
    let mut computer = Computer::new(&manifest.model, &ComputeDevice::open(DeviceChoice::Cpu).unwrap());
    computer.load(&parameters).unwrap();
    (manifest.tokenizer.clone().unwrap(), computer, manifest.model.context().unwrap())
}

/// Loss in nats of the last `scored` of `tokens`, computed by themselves.
fn plain_loss(computer: &Computer, tokens: &[u32], scored: usize) -> f64 {
    let shape = [1, tokens.len() - 1];
    let mut weights = vec![0.0; tokens.len() - 1];
    weights[tokens.len() - 1 - scored..].fill(1.0);
    let column = |name: &str, values| Column { name: name.into(), shape, values };
    let columns = vec![
        column("tokens", Values::U32(tokens[..tokens.len() - 1].to_vec())),
        column("targets", Values::U32(tokens[1..].to_vec())),
        column("weights", Values::F32(weights)),
    ];
    computer.loss(&Batch { columns }).unwrap().loss
}

#[test]
fn texts_in_any_form_cost_what_a_plain_loop_over_windows_finds() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let (tokenizer, computer, context) = trained(&run);

    let file = |name: &str| dir.path().join(name);
    let lines = DOCUMENTS.map(|document| json!({ "text": document }).to_string()).join("\n");
    fs::write(file("lines.jsonl"), lines).unwrap();
    fs::write(file("whole.txt"), DOCUMENTS.join("\n<|endoftext|>\n")).unwrap();
    fs::write(file("tokenizer.json"), tokenizer.to_json()).unwrap();
    let (whole, prepared) = (file("whole.txt"), file("prepared"));
    let by = file("tokenizer.json");
    let arguments = ["prepare", path(&whole), "--tokenizer", path(&by), "--out", path(&prepared)];
    succeed(lockstep(&arguments, &[]));

    for stride in [context, 5] {
        let (mut nats, mut scored, mut bytes) = (0.0, 0, 0);
        for document in DOCUMENTS {
            let tokens = tokenizer.encode(document).unwrap();
            bytes += document.len() - tokenizer.decode(&tokens[..1]).len();
            let mut reached = 0;
            for start in (0..tokens.len()).step_by(stride) {
                let end = (tokens.len() - 1).min(start + context);
                if end > reached {
                    nats += plain_loss(&computer, &tokens[start..=end], end - reached);
                    (scored, reached) = (scored + end - reached, end);
                }
            }
        }
        let loss = nats / scored as f64;
        let stride = stride.to_string();
        let all = ["lines.jsonl", "whole.txt", "prepared"].map(|name| {
            let found = eval(&run, &["--data", path(&file(name)), "--stride", &stride]);
            found["texts"].clone()
        });
        assert_eq!(all[1], all[0]);
        assert_eq!(all[2], all[0]);
        let [found, perplexity, bits] = ["loss", "perplexity", "bits_per_byte"].map(|key| number(&all[0][key]));
        assert!((found - loss).abs() < 1e-6 * loss, "{found} is not {loss}");
        assert!((perplexity - found.exp()).abs() < 1e-9 * perplexity);
        assert!((bits - found * scored as f64 / 2f64.ln() / bytes as f64).abs() < 1e-9 * bits);
        assert_eq!([&all[0]["documents"], &all[0]["tokens"], &all[0]["bytes"]], [3, scored, bytes]);
    }

    // Twice the same text is no other text, and threads leave no trace.
    let twice = eval(&run, &["--data", path(&whole), path(&whole), "--threads", "1"]);
    let once = eval(&run, &["--data", path(&whole), "--threads", "1"]);
    assert_eq!(once, eval(&run, &["--data", path(&whole), "--threads", "3"]));
    assert_eq!(number(&twice["texts"]["tokens"]), 2.0 * number(&once["texts"]["tokens"]));
    assert!((number(&twice["texts"]["loss"]) - number(&once["texts"]["loss"])).abs() < 1e-9);
}

#[test]
fn what_cannot_be_scored_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let (_, _, context) = trained(&run);
    let file = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        file
    };
    let refused = |more: &[&str], status| fail(lockstep(&[&["eval", path(&run)], more].concat(), &[]), status);
    assert!(refused(&[], 2).contains("--data"));
    let good = file("good.txt", "In the beginning");
    for stride in ["0", "17"] {
        let said = refused(&["--data", path(&good), "--stride", stride], 2);
        assert!(said.contains(&format!("must be from 1 to the model's context, {context}")), "{said}");
    }
    assert!(refused(&["--data", path(&file("short.txt", "I"))], 1).contains("there is nothing to score"));
    let said = refused(&["--data", path(&file("bad.jsonl", "{\"text\":\"a\"}\n{\"txt\":\"b\"}\n"))], 1);
    assert!(said.contains("bad.jsonl: line 2") && said.contains("a string under \"text\""), "{said}");
    // A question that is wrong is found before anything is scored.
    let questions = file("q.jsonl", "{\"question\":\"a\",\"choices\":[\"b\",\"c\"],\"answer\":\"E\"}\n");
    let said = refused(&["--data", path(&good), "--choices", path(&questions)], 1);
    assert!(said.contains("q.jsonl: line 1: answer \"E\" is none of 2 choices"), "{said}");
    assert!(!said.contains("scoring"), "{said}");

    fs::remove_dir_all(&run).unwrap();
    succeed(lockstep(&["train", "line", "--device", "cpu", "--run", path(&run)], &["schedule.steps=2"]));
    assert!(refused(&["--data", path(&good)], 1).contains("reads no text"));
}

/// Forty questions: how a story goes on, among how others do.
fn questions(stories: &str) -> Vec<Value> {
    let parts: Vec<Vec<&str>> = stories
        .split(". ")
        .map(|part| part.split_whitespace().collect())
        .filter(|part: &Vec<&str>| part.len() > 9)
        .collect();
    let question = |index: usize| {
        let choices: Vec<String> =
            (0..4).map(|other| parts[index + other * other][5..7 + (index + other) % 4].join(" ")).collect();
        json!({ "question": parts[index][..5].join(" "), "choices": choices, "answer": 0 })
    };
    (0..40).map(question).collect()
}

#[test]
fn a_trained_llama_is_scored_as_transformers_scores_it() {
    const TEST: &str = "a_trained_llama_is_scored_as_transformers_scores_it";
    let (Some(folder), Some(stories)) = (data(TEST, STORIES), data(TEST, "tinystories/tinystories-lower-4MB.txt"))
    else {
        return;
    };
    let Some(python) = python(TEST, &["torch", "transformers", "tokenizers"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (run, file, asked) = (dir.path().join("run"), dir.path().join("some.txt"), dir.path().join("asked.jsonl"));
    succeed(lockstep(&["import", path(&folder), "--out", path(&run)], &[]));
    let stories = fs::read_to_string(stories).unwrap();
    let some = &stories[..20_000];
    let questions = questions(&stories);
    fs::write(&file, some).unwrap();
    fs::write(&asked, questions.iter().map(|question| format!("{question}\n")).collect::<String>()).unwrap();

    for stride in [512, 200] {
        let question = json!({ "text": some, "stride": stride, "questions": questions });
        let theirs = peer(&python, &folder, &question);
        let stride = stride.to_string();
        let ours = eval(&run, &["--data", path(&file), "--stride", &stride, "--choices", path(&asked)]);
        let (found, expected) = (number(&ours["texts"]["loss"]), number(&theirs["loss"]));
        println!("a loss of {found}, and {expected} by transformers");
        assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
        assert_eq!(ours["texts"]["tokens"], theirs["tokens"]);
        for (index, key) in ["acc", "acc_norm"].into_iter().enumerate() {
            let right = theirs["answers"].as_array().unwrap().iter().filter(|chosen| chosen[index] == 0).count();
            assert_eq!(number(&ours["choices"][0][key]), right as f64 / 40.0, "{key} in {ours}");
            assert!((12..40).contains(&right), "more than by chance, and not all: {right}");
        }
    }
}

fn peer(python: &Path, folder: &Path, question: &Value) -> Value {
    let mut command = Command::new(python);
    command.arg(workspace("deploy/tests/peer/perplexity.py")).arg(folder).env("HF_HUB_OFFLINE", "1");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("Python starts");
    child.stdin.take().unwrap().write_all(question.to_string().as_bytes()).expect("the peer reads its input");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("it answers in JSON")
}
