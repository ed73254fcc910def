//! Our numbers beside PyTorch's: the gradient of a step, and what optimizers make of it.
//!
//! `peer/torch_gradients.py` and `peer/torch_optim.py` wrote the golden files and say how their inputs are made.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use lockstep_model::adapters::{AdapterConfig, trained_layout};
use lockstep_model::batch::{Batch, Column, Values};
use lockstep_model::compute::{Computer, SlotGradient, SlotKey};
use lockstep_model::config::{LlamaConfig, ModelConfig, OptimizerConfig, ScheduleConfig};
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::inference::{Engine, Limits, Overflow, Request, Sampling, complete};
use lockstep_model::layout::{Layout, TensorSpec};
use lockstep_model::optimizer::{self, OptimizerState, Update};
use lockstep_model::schedule::learning_rate;
use serde_json::{Value, json};

use crate::cluster::{data, lockstep, path, python, succeed, text, workspace};

/// Largest error of a gradient, ‖g − g′‖ ÷ ‖g′‖.
const GRADIENT_TOLERANCE: f64 = 1e-4;
const LOSS_TOLERANCE: f64 = 1e-5;

/// Element `index` of a vector that both sides make for themselves: uniform in ±scale/2, without a generator's state.
fn hashed(index: u64, scale: f64) -> f32 {
    ((((index * 2_654_435_761) % (1 << 32)) as f64 / 4_294_967_296.0 - 0.5) * scale) as f32
}

pub(crate) fn hashed_vector(start: u64, length: usize, scale: f64) -> Vec<f32> {
    (start..start + length as u64).map(|index| hashed(index, scale)).collect()
}

fn golden(name: &str) -> Value {
    let file = workspace("deploy/tests/golden").join(name);
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

fn cases(file: &Value) -> &[Value] {
    let cases = file["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    cases
}

fn floats(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

fn model_of(case: &Value) -> ModelConfig {
    serde_json::from_value(case["config"].clone()).unwrap()
}

fn adapters_of(case: &Value) -> Option<AdapterConfig> {
    serde_json::from_value(case["adapters"].clone()).unwrap()
}

/// Loss and gradient of a case, as a worker computes them.
fn compute(case: &Value) -> SlotGradient {
    let count = |key: &str| case[key].as_u64().unwrap() as usize;
    let (rows, length) = (count("rows"), count("length"));
    let vocab_size = case["config"]["vocab_size"].as_u64().unwrap();
    let tokens = |factor: u64, offset: u64| {
        Values::U32((0..(rows * length) as u64).map(|i| ((i * factor + offset) % vocab_size) as u32).collect())
    };
    let column = |name: &str, values| Column { name: name.into(), shape: [rows, length], values };
    let mut columns = vec![column("tokens", tokens(7919, 13)), column("targets", tokens(104_729, 7))];
    if case["weighted"].as_bool().unwrap() {
        columns.push(column(
            "weights",
            Values::F32([1.0, 0.5, 0.0, 2.0].into_iter().cycle().take(rows * length).collect()),
        ));
    }
    let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
    let mut computer = Computer::new(&model_of(case), &device);
    let scale = case["parameter_scale"].as_f64().unwrap();
    let mut first = 0;
    if let Some(adapters) = adapters_of(case) {
        first = computer.layout().len();
        computer = computer.with_adapters(&adapters);
        computer.stand_on(computer.base(&hashed_vector(0, first, scale)).unwrap());
    }
    computer.load(&hashed_vector(first as u64, computer.layout().len(), scale)).unwrap();
    computer.gradient(&Batch { columns }, SlotKey { seed: 0, step: 1, slot: 0 }).unwrap()
}

/// ‖ours − reference‖ ÷ ‖reference‖; where the reference is zero, 0 if ours is too, else infinity.
fn relative_error(ours: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(ours.len(), reference.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(reference).map(|(&a, b)| f64::from(a) - b));
    if difference == 0.0 { 0.0 } else { difference / norm(&mut reference.iter().copied()) }
}

#[test]
fn loss_and_gradients_are_pytorchs() {
    let golden = golden("gradients.json");
    for case in cases(&golden) {
        let ours = compute(case);
        let loss = case["loss_sum"].as_f64().unwrap();
        assert_eq!(ours.sums.weight, case["weight_sum"].as_f64().unwrap(), "{}", case["name"]);
        let loss_error = (ours.sums.loss / loss - 1.0).abs();
        assert!(loss_error <= LOSS_TOLERANCE, "{}: loss {} is not {loss}", case["name"], ours.sums.loss);

        let tensors = case["tensors"].as_array().unwrap();
        let layout = trained_layout(&model_of(case), adapters_of(case).as_ref());
        assert_eq!(layout.tensors.len(), tensors.len());
        let mut worst = (0.0, "");
        for (ours_spec, tensor) in layout.tensors.iter().zip(tensors) {
            assert_eq!(
                (json!(ours_spec.name), json!(ours_spec.shape)),
                (tensor["name"].clone(), tensor["shape"].clone())
            );
            let error = relative_error(&ours.gradient[ours_spec.range()], &floats(&tensor["gradient"]));
            assert!(error <= GRADIENT_TOLERANCE, "{}: {} is off by {error:.1e}", case["name"], ours_spec.name);
            if error > worst.0 {
                worst = (error, &ours_spec.name);
            }
        }
        println!("{}: loss off by {loss_error:.1e}, gradients by at most {:.1e} ({})", case["name"], worst.0, worst.1);
    }
}

/// The same comparison made by PyTorch where it is, with a case too large for a golden file.
#[test]
fn pytorch_agrees_on_the_spot() {
    let Some(python) = python("pytorch_agrees_on_the_spot", &["torch"]) else { return };
    let larger = json!({
        "name": "larger",
        "config": {
            "kind": "gpt", "vocab_size": 97, "context": 32, "layers": 4, "heads": 4, "width": 64, "bias": true,
            "tied_head": true, "gelu": "exact", "norm_epsilon": 1e-5, "dropout": 0.0
        },
        "parameter_scale": 1.0, "rows": 2, "length": 32, "weighted": true
    });
    let larger_llama = json!({
        "name": "larger_llama",
        "config": {
            "kind": "llama", "vocab_size": 97, "context": 32, "layers": 4, "heads": 8, "kv_heads": 2, "width": 64,
            "ffn_width": 160, "qk_norm": false, "tied_head": true, "rope_theta": 1e4, "norm_epsilon": 1e-6, "dropout": 0.0
        },
        "parameter_scale": 0.5, "rows": 2, "length": 32, "weighted": true
    });
    let mut adapted = larger_llama.clone();
    adapted["name"] = "larger_llama_with_adapters".into();
    adapted["adapters"] =
        json!({ "rank": 8, "alpha": 16.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"] });
    let golden = golden("gradients.json");
    let with_ours = cases(&golden).iter().chain([&larger, &larger_llama, &adapted]).map(|case| {
        let ours = compute(case);
        let layout = trained_layout(&model_of(case), adapters_of(case).as_ref());
        let tensors = layout.tensors.iter();
        let tensors: Vec<Value> =
            tensors.map(|t| json!({ "name": t.name, "gradient": ours.gradient[t.range()] })).collect();
        let mut case = case.clone();
        case["loss_sum"] = ours.sums.loss.into();
        case["weight_sum"] = ours.sums.weight.into();
        case["tensors"] = tensors.into();
        case
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ours.json");
    std::fs::write(&file, json!({ "cases": with_ours.collect::<Vec<_>>() }).to_string()).unwrap();
    let script = workspace("deploy/tests/peer/torch_gradients.py");
    let output = Command::new(python).args([path(&script), "--check", path(&file)]).output().expect("Python starts");
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    println!("{}", said.lines().last().unwrap_or_default());
}

/// 200 steps of the whole cluster beside 200 of PyTorch's, from the same weights over the same windows.
#[test]
fn pytorch_trains_to_the_same_losses() {
    let Some(python) = python("pytorch_trains_to_the_same_losses", &["torch", "numpy"]) else { return };
    const SMALL: &[&str] = &[
        "tokenizer.kind=auto",
        "model.layers=3",
        "model.width=48",
        "model.heads=4",
        "model.context=32",
        "batch.slots=3",
        "batch.sequences_per_slot=2",
        "schedule.steps=200",
        "schedule.warmup_steps=20",
        "evaluation.every_steps=100",
        "evaluation.slots=20",
        "sampling.every_steps=0",
        "checkpoint.every_steps=0",
    ];
    let dir = tempfile::tempdir().unwrap();
    let corpus = dir.path().join("corpus");
    let texts = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"].map(|file| {
        let text = dir.path().join(file).with_extension("txt");
        std::fs::copy(workspace(file), &text).unwrap();
        text
    });
    let mut prepare = lockstep(&["prepare", "--tokenizer", "bpe", "--vocab-size", "400", "--out", path(&corpus)], &[]);
    prepare.args(&texts);
    succeed(prepare);
    let input = format!("data.input={}", path(&corpus));
    let init = format!("init={}", path(&dir.path().join("quickstart")));
    let adapted = [init.as_str(), "adapters.rank=4", "optimizer.lr=1e-2"];
    for (name, recipe, more) in [
        ("quickstart", "quickstart", &[][..]),
        ("quickstart-llama", "quickstart-llama", &[]),
        ("adapters", "quickstart", &adapted),
    ] {
        let run = dir.path().join(name);
        let arguments = ["train", recipe, "--device", "cpu", "--workers", "2", "--run", path(&run)];
        succeed(lockstep(&arguments, &[SMALL, &[&input], more].concat()));
        let script = workspace("deploy/tests/peer/torch_curve.py");
        let output = Command::new(&python).args([path(&script), path(&run)]).output().expect("Python starts");
        let said = text(&output.stdout);
        assert!(output.status.success(), "{name}: {said}{}", text(&output.stderr));
        println!("{name}: {}", said.lines().last().unwrap_or_default());
    }
}

/// A Llama that others trained, beside the logits and the text that `transformers` gets from it.
#[test]
fn a_trained_llama_says_what_transformers_says() {
    const LOGIT_TOLERANCE: f64 = 1e-3;
    let Some(dir) = data("a_trained_llama_says_what_transformers_says", "weights-tinystories-656k") else { return };
    let tensors = safetensors(&dir.join("model.safetensors"));
    let model = ModelConfig::Llama(LlamaConfig {
        vocab_size: 2048,
        context: 512,
        layers: 2,
        heads: 8,
        kv_heads: 4,
        width: 128,
        head_width: None,
        ffn_width: 384,
        qk_norm: false,
        tied_head: true,
        score_head: false,
        rope_theta: 1e4,
        rope_scaling: None,
        norm_epsilon: 1e-6,
        dropout: 0.0,
    });
    let layout = Layout::of(&model);
    let mut parameters = vec![0.0; layout.len()];
    for tensor in &layout.tensors {
        // The file has the shared matrix as its head, and matrices of linear layers as [out, in].
        let shared = tensor.name == "embed_tokens.weight";
        let theirs = &tensors[&if shared { "lm_head.weight".into() } else { format!("model.{}", tensor.name) }];
        let ours = &mut parameters[tensor.range()];
        match tensor.shape[..] {
            [rows, columns] if !shared => {
                (0..rows * columns).for_each(|i| ours[i] = theirs[i % columns * rows + i / columns]);
            }
            _ => ours.copy_from_slice(theirs),
        }
    }
    let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
    let mut computer = Computer::new(&model, &device);
    computer.load(&parameters).unwrap();

    let golden: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    let ids = |key: &str| -> Vec<u32> { floats(&golden[key]).iter().map(|&id| id as u32).collect() };
    let (prompt, greedy) = (ids("prompt_ids"), ids("greedy_ids_60"));
    let logits = computer.next_token_logits(&prompt).unwrap();
    let pairs = logits.iter().zip(floats(&golden["last_logits_first16"]));
    let worst = pairs.map(|(&ours, theirs)| (f64::from(ours) - theirs).abs()).fold(0.0, f64::max);
    assert!(worst <= LOGIT_TOLERANCE, "logits are off by {worst:.1e}");

    let rows =
        |tokens: &[u32]| Column { name: String::new(), shape: [1, tokens.len()], values: Values::U32(tokens.to_vec()) };
    let (read, predicted) = (rows(&prompt[..prompt.len() - 1]), rows(&prompt[1..]));
    let columns = vec![Column { name: "tokens".into(), ..read }, Column { name: "targets".into(), ..predicted }];
    let loss = computer.loss(&Batch { columns }).unwrap().mean();
    let reference = golden["mean_nll_prompt"].as_f64().unwrap();
    assert!((loss - reference).abs() <= LOGIT_TOLERANCE, "loss {loss} is not {reference}");

    let mut said = prompt.clone();
    let request = Request {
        prompt: prompt.clone(),
        max_tokens: greedy.len() - prompt.len(),
        sampling: Sampling::greedy(),
        ends: Vec::new(),
        overflow: Overflow::Stop,
    };
    let mut engine = Engine::new(&model, &parameters, &device, Limits::default()).unwrap();
    complete(&mut engine, request, |token| {
        said.push(token);
        true
    })
    .unwrap();
    assert_eq!(said, greedy);
    println!("logits off by at most {worst:.1e}, loss by {:.1e}", (loss - reference).abs());
}

/// The f32 tensors of a safetensors file: 8 bytes of header length, a JSON header of places, the bytes.
fn safetensors(file: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(file).unwrap();
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: HashMap<String, Value> = serde_json::from_slice(header).unwrap();
    let tensors = header.into_iter().filter(|(_, tensor)| tensor["dtype"] == "F32").map(|(name, tensor)| {
        let place = floats(&tensor["data_offsets"]);
        let (values, _) = data[place[0] as usize..place[1] as usize].as_chunks();
        (name, values.iter().map(|value| f32::from_le_bytes(*value)).collect())
    });
    tensors.collect()
}

#[test]
fn optimizers_and_schedules_are_pytorchs() {
    let golden = golden("optim.json");
    let mut layout = Layout { tensors: Vec::new() };
    for tensor in golden["tensors"].as_array().unwrap() {
        let shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).unwrap();
        let (name, decay) = (tensor["name"].as_str().unwrap().into(), shape.len() == 2);
        layout.tensors.push(TensorSpec { name, shape, offset: layout.len(), decay, trainable: true });
    }
    let gradient_scale = golden["gradient_scale"].as_f64().unwrap();
    for case in cases(&golden) {
        let config: OptimizerConfig = serde_json::from_value(case["optimizer"].clone()).unwrap();
        let schedule: ScheduleConfig = serde_json::from_value(case["schedule"].clone()).unwrap();
        let mut parameters = hashed_vector(0, layout.len(), golden["parameter_scale"].as_f64().unwrap());
        let mut state = OptimizerState::new(&config.rule, layout.len());
        let mut recorded = case["after"].as_array().unwrap().iter().peekable();
        for (step, rate) in (1u64..).zip(floats(&case["learning_rates"])) {
            let lr = learning_rate(&schedule, config.lr, step);
            assert!((lr - rate).abs() <= 1e-9 * config.lr, "{}, step {step}: rate {lr} is not {rate}", case["name"]);
            // Four times the mean, with a weight of four, is exact.
            let mean = hashed_vector(step * 1_000_003, layout.len(), (step % 8 + 1) as f64 * gradient_scale);
            let gradient_sum: Vec<f32> = mean.iter().map(|g| 4.0 * g).collect();
            let grad_clip = config.grad_clip;
            let update = Update { gradient_sum: &gradient_sum, weight_sum: 4.0, grad_clip, lr, step };
            let report = optimizer::step(&config.rule, &layout, &mut parameters, &mut state, update);
            let Some(after) = recorded.next_if(|after| after["step"] == step) else { continue };
            let norm = after["grad_norm"].as_f64().unwrap();
            assert!((report.grad_norm / norm - 1.0).abs() <= 1e-6, "{}, step {step}: norm", case["name"]);
            for (ours, theirs) in parameters.iter().zip(floats(&after["parameters"])) {
                let difference = (f64::from(*ours) - theirs).abs();
                assert!(difference <= 1e-6, "{}, step {step}: {ours} is not {theirs}", case["name"]);
            }
        }
        assert!(recorded.next().is_none(), "{}: not all recorded steps were reached", case["name"]);
    }
}
