//! Adapters trained beside a model that stays as it is: the same run whoever takes part, at a share of the traffic, and one
//! model with its base for whoever reads the run.

use std::fs;
use std::path::Path;

use lockstep_model::adapters::{AdaptedLayout, initial_adapters};
use lockstep_model::checkpoint::{self, BaseFile, Checkpoint};
use lockstep_model::compute::Computer;
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::digest::{hex, vector_sha256};
use serde_json::{Value, json};

use crate::cluster::{
    SMALL, coordinator, fail, fingerprint, inspect, lockstep, logged_steps, metrics, outlive_a_worker, path, succeed,
    text, worker,
};
use crate::running::output;
use crate::sft;

/// Of all projections, in steps that change something.
const ADAPTERS: &[&str] = &["adapters.rank=4", "adapters.alpha=8", "optimizer.lr=1e-2", "optimizer.weight_decay=0"];

/// A run whose model has learned something.
fn base(dir: &Path, recipe: &str) -> String {
    let run = dir.join("base");
    let arguments = ["train", recipe, "--device", "cpu", "--workers", "2", "--run", path(&run)];
    succeed(lockstep(&arguments, SMALL));
    format!("init={}", path(&run))
}

fn train(run: &Path, recipe: &str, more: &[&str], overrides: &[&str]) {
    let arguments = ["train", recipe, "--device", "cpu", "--run", path(run)];
    succeed(lockstep(&[&arguments[..], more].concat(), &[SMALL, ADAPTERS, overrides].concat()));
}

fn validation_losses(run: &Path) -> Vec<f64> {
    metrics(run).iter().filter_map(|line| line["val_loss"].as_f64()).collect()
}

#[test]
fn whoever_takes_part_the_run_is_the_same() {
    for recipe in ["quickstart", "quickstart-llama"] {
        let dir = tempfile::tempdir().unwrap();
        let init = base(dir.path(), recipe);
        let run = |name: &str| dir.path().join(name);
        let quiet = run("quiet");
        train(&quiet, recipe, &["--workers", "1", "--threads", "1"], &[&init]);
        for (workers, threads) in [("2", "1"), ("3", "2")] {
            train(&run(workers), recipe, &["--workers", workers, "--threads", threads], &[&init]);
            assert_eq!(fingerprint(&run(workers)), fingerprint(&quiet), "{recipe}: {workers} workers");
        }

        // They begin as the model is, to the bit, and learn.
        let (before, losses) = (validation_losses(&run("base")), validation_losses(&quiet));
        assert_eq!(losses[0], before[before.len() - 1]);
        assert!(losses.is_sorted_by(|earlier, later| later < earlier), "{losses:?}");

        let killed = run("killed");
        let sets = [SMALL, ADAPTERS, &[&init]].concat();
        outlive_a_worker(recipe, &killed, 24, &sets);
        assert_eq!(fingerprint(&killed), fingerprint(&quiet), "{recipe}: a worker was killed");

        // Where the model came from is not asked for once the run has it.
        let stopped = run("stopped");
        train(&stopped, recipe, &["--workers", "2"], &[&init, "checkpoint.stop_after=9"]);
        fs::rename(run("base"), run("moved")).unwrap();
        train(&stopped, recipe, &["--workers", "3", "--resume"], &[&init, "checkpoint.stop_after=17"]);
        let own = ["train", "--resume", "--run", path(&stopped), "--device", "cpu", "--workers", "1"];
        succeed(lockstep(&own, &["checkpoint.stop_after=0"]));
        assert_eq!(
            fingerprint(&stopped),
            fingerprint(&quiet),
            "{recipe}: stopped, and resumed without the first model"
        );
        assert_eq!(logged_steps(&stopped), (1..=24).collect::<Vec<u64>>());
        succeed(lockstep(&["verify", path(&stopped)], &[]));
    }
}

#[test]
fn what_may_not_change_is_refused_and_damage_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let init = base(dir.path(), "quickstart");
    let (run, other) = (dir.path().join("run"), dir.path().join("other"));
    train(&run, "quickstart", &["--workers", "1"], &[&init, "checkpoint.stop_after=8"]);
    train(&other, "quickstart", &["--workers", "1"], &[&init, "schedule.steps=4"]);
    let resume = |sets: &[&str]| {
        let arguments = ["train", "--device", "cpu", "--run", path(&run), "--resume"];
        lockstep(&arguments, &[&["checkpoint.stop_after=0"], sets].concat())
    };
    for (set, named) in [("adapters.rank=2", "adapters.rank"), ("adapters.targets=['c_fc']", "adapters.targets")] {
        let said = fail(resume(&[set]), 2);
        assert!(said.contains(named) && said.contains("may not change"), "{said}");
    }
    let said = fail(resume(&[&format!("init={}", path(&other))]), 1);
    assert!(said.contains("belong to another model than init holds now"), "{said}");
    let said = fail(lockstep(&["train", "quickstart", "--run", path(&dir.path().join("none"))], ADAPTERS), 2);
    assert!(said.contains("init names none"), "{said}");

    let file = run.join("base/model.safetensors");
    let whole = fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    fs::write(&file, &damaged).unwrap();
    let said = text(&output(&mut lockstep(&["verify", path(&run)], &[])).stdout);
    assert!(said.contains("base/model.safetensors"), "{said}");
    let said = fail(lockstep(&["generate", "--prompt", "a", "--run", path(&run)], &[]), 1);
    assert!(said.contains("base/model.safetensors: the checkpoint is damaged"), "{said}");
    let said = fail(resume(&[]), 1);
    assert!(said.contains("base/model.safetensors: the checkpoint is damaged"), "{said}");
    fs::write(&file, &whole).unwrap();
    succeed(resume(&[]));
    succeed(lockstep(&["verify", path(&run)], &[]));

    // A checkpoint by itself has no model.
    let alone = dir.path().join("alone/step-000000024");
    fs::create_dir_all(&alone).unwrap();
    for entry in fs::read_dir(run.join("checkpoints/step-000000024")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), alone.join(entry.file_name())).unwrap();
    }
    let said = fail(lockstep(&["generate", "--prompt", "a", "--run", path(&alone)], &[]), 1);
    assert!(said.contains("lockstep merge"), "{said}");
}

#[test]
fn a_run_with_adapters_is_read_as_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let init = base(dir.path(), "quickstart");
    let (run, merged) = (dir.path().join("run"), dir.path().join("merged"));
    train(&run, "quickstart", &["--workers", "2"], &[&init]);
    let shown = inspect(&run);
    let targets = ["c_attn", "c_proj", "c_fc"];
    assert_eq!(shown["adapters"], json!({ "rank": 4, "alpha": 8.0, "targets": targets }));
    assert_eq!(shown["initial_sha256"], inspect(&dir.path().join("base"))["params_sha256"]);
    assert_eq!(shown["initial_sha256"], inspect(&run.join("base"))["params_sha256"]);
    let (parameters, trained) = (shown["parameters"].as_u64().unwrap(), shown["trained"].as_u64().unwrap());
    assert_eq!(trained, 2 * 4 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32));
    let checkpoint = run.join("checkpoints/step-000000024/model.safetensors");
    assert!(fs::metadata(checkpoint).unwrap().len() < trained * 4 + 4096, "adapters alone are in a checkpoint");

    let said = text(&succeed(lockstep(&["merge", path(&run), "--out", path(&merged)], &[])).stdout);
    let plain = inspect(&merged);
    assert_eq!((&plain["adapters"], &plain["parameters"]), (&Value::Null, &json!(parameters)));
    assert!(said.contains(plain["params_sha256"].as_str().unwrap()), "{said}");
    assert!(!merged.join("base").exists());
    let answer = |run: &Path, command: &[&str]| {
        let output = succeed(lockstep(&[command, &[path(run)]].concat(), &[]));
        text(&output.stdout).replace(path(run), "RUN")
    };
    let prompt = ["generate", "--prompt", "And God said", "--tokens", "50", "--seed", "3", "--run"];
    let text_of_base = answer(&dir.path().join("base"), &prompt);
    assert_eq!(answer(&run, &prompt), answer(&merged, &prompt));
    assert_ne!(answer(&run, &prompt), text_of_base, "the adapters say something");
    let held_out = dir.path().join("held-out.txt");
    fs::write(&held_out, "And the king said unto them, Go ye and search diligently.").unwrap();
    let loss = |run: &Path| {
        let output = succeed(lockstep(&["eval", path(run), "--data", path(&held_out), "--json"], &[]));
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["texts"]["loss"].as_f64().unwrap_or_else(|| panic!("{answer}"))
    };
    assert_eq!(loss(&run), loss(&merged));
    succeed(lockstep(&["compare", path(&run), "--rounds", "1", "--json"], &[]));
    let said = fail(lockstep(&["merge", path(&merged), "--out", path(&dir.path().join("again"))], &[]), 2);
    assert!(said.contains("a plain run already"), "{said}");

    // A further stage begins with both, and so does one that trains all of it by the recipe that merging left.
    let last = *validation_losses(&run).last().unwrap();
    let whole = ["adapters.rank=0", "schedule.steps=1", "schedule.warmup_steps=0", "checkpoint.every_steps=0"];
    let (from_run, from_merged) = (dir.path().join("from-run"), dir.path().join("from-merged"));
    let arguments = |recipe: &str, run: &Path| {
        lockstep(&["train", recipe, "--device", "cpu", "--workers", "1", "--run", path(run)], &[SMALL, &whole].concat())
    };
    let mut command = arguments("quickstart", &from_run);
    succeed({
        command.args(["--set", &format!("init={}", path(&run))]);
        command
    });
    succeed(arguments(path(&merged.join("recipe.toml")), &from_merged));
    for run in [&from_run, &from_merged] {
        let first = validation_losses(run)[0];
        assert!((first - last).abs() < 1e-5, "{first} after merging, {last} before");
        assert_eq!(inspect(run)["initial_sha256"], plain["params_sha256"]);
    }
}

/// The model with adapters beside it, and the one they are merged into.
#[test]
fn merged_or_not_the_model_says_the_same() {
    for recipe in ["quickstart", "quickstart-llama"] {
        let dir = tempfile::tempdir().unwrap();
        let (init, run) = (base(dir.path(), recipe), dir.path().join("run"));
        train(&run, recipe, &["--workers", "1"], &[&init]);
        let newest = checkpoint::list(&run.join("checkpoints")).unwrap().pop().unwrap();
        let Checkpoint { manifest, parameters: trained, .. } = checkpoint::read(&newest).unwrap();
        let (_, merged) = checkpoint::read_parameters(&newest).unwrap();
        let adapters = manifest.adapters.as_ref().unwrap();
        let layout = AdaptedLayout::of(&manifest.model, adapters);
        let base = BaseFile::of_checkpoint(&newest, &manifest, &layout.base).unwrap().parameters();
        assert_eq!(Some(hex(&vector_sha256(&base))), manifest.initial_sha256);
        assert_ne!(trained, initial_adapters(&manifest.model, adapters, 1, &[]));

        let device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
        let mut one = Computer::new(&manifest.model, &device);
        one.load(&merged).unwrap();
        let mut apart = Computer::new(&manifest.model, &device).with_adapters(adapters);
        apart.stand_on(apart.base(&base).unwrap());
        apart.load(&trained).unwrap();
        let prompt: Vec<u32> = (0..16).map(|token| token * 3 % 50).collect();
        let [one, apart] = [one, apart].map(|computer| computer.next_token_logits(&prompt).unwrap());
        let worst = one.iter().zip(&apart).map(|(one, apart)| (one - apart).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-5, "{recipe}: logits are off by {worst:.1e}");
        println!("{recipe}: logits off by at most {worst:.1e}");
    }
}

/// Conversations, too, whose tokenizer is the first model's.
#[test]
fn a_model_learns_to_answer_by_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let conversations = |name: &str, answers: [&str; 3]| {
        let asked = ["Which is it?", "How many?", "学什么?"];
        let lines = (0..24).map(|n| json!({ "prompt": asked[n % 3], "completion": answers[n % 3] }).to_string() + "\n");
        let file = dir.path().join(name);
        fs::write(&file, lines.collect::<String>()).unwrap();
        format!("data.input={}", path(&file))
    };
    // What it knows answers to; and to what, it is to learn.
    let before = conversations("before.jsonl", ["Just two.", "学而时习之。", "The red one."]);
    let input = conversations("input.jsonl", ["The red one.", "Just two.", "学而时习之。"]);
    let (first, run) = (dir.path().join("first"), dir.path().join("run"));
    let shorter = ["schedule.steps=40", "sampling.every_steps=0"];
    let arguments = ["train", "sft", "--device", "cpu", "--workers", "2", "--run"];
    succeed(lockstep(&[&arguments[..], &[path(&first)]].concat(), &[sft::SMALL, &[&before], &shorter].concat()));
    let init = format!("init={}", path(&first));
    let is_model = |set: &&&str| set.starts_with("model.") || set.starts_with("tokenizer.");
    let settings: Vec<&str> = sft::SMALL.iter().filter(|set| !is_model(set)).copied().collect();
    let sets = [&settings[..], &[&input, &init, "adapters.rank=8", "checkpoint.stop_after=25"]].concat();
    succeed(lockstep(&[&arguments[..], &[path(&run)]].concat(), &sets));
    fs::remove_dir_all(&first).unwrap();
    let resumed = ["train", "--resume", "--run", path(&run), "--device", "cpu", "--workers", "1"];
    succeed(lockstep(&resumed, &["checkpoint.stop_after=0"]));
    let losses = validation_losses(&run);
    assert!(losses[0] > 0.5 && losses[losses.len() - 1] < 0.2, "{losses:?}");
    succeed(lockstep(&["verify", path(&run)], &[]));
    let samples = fs::read_to_string(run.join("samples.txt")).unwrap();
    assert!(samples.trim_end().ends_with("Which is it?\nThe red one."), "{samples}");
    let merged = dir.path().join("merged");
    succeed(lockstep(&["merge", path(&run), "--out", path(&merged)], &[]));
    for run in [&run, &merged] {
        let prompt = ["--prompt", "User: How many?\n\nAssistant:", "--tokens", "40", "--temperature", "0"];
        let said = succeed(lockstep(&[&["generate", "--run", path(run)], &prompt[..]].concat(), &[]));
        assert!(text(&said.stdout).trim_end().ends_with("Assistant: Just two."), "{}", text(&said.stdout));
    }
}

/// The base comes once, to each worker, whatever becomes of the coordinator.
#[cfg(unix)]
#[test]
fn only_adapters_travel() {
    use crate::cluster::{Running, worker_with};
    use crate::proxy::Proxy;

    const STEPS: u64 = 24;
    let dir = tempfile::tempdir().unwrap();
    let init = base(dir.path(), "quickstart");
    let wider = ["evaluation.every_steps=0", "checkpoint.every_steps=4", &init];
    let travelled = |name: &str, more: &[&str]| {
        let run = dir.path().join(name);
        let (mut coordinator, address) = coordinator("quickstart", &run, &[], &[SMALL, &wider, more].concat());
        let proxy = Proxy::before(&address);
        let mut only = worker_with(&proxy.address, "only", &["--no-shared-memory"]);
        assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
        assert_eq!(only.wait(), Some(0), "{}", only.said);
        (proxy.passed_bytes().iter().sum::<u64>(), only.said.matches("fetched the base").count(), inspect(&run))
    };
    let (all_bytes, fetched, _) = travelled("all", &[]);
    assert_eq!(fetched, 0);
    let (bytes, fetched, shown) = travelled("adapters", ADAPTERS);
    assert_eq!(fetched, 1);
    // Each step a version is pulled and a gradient pushed, by the one worker; the base is pulled once.
    let [all, trained] = ["parameters", "trained"].map(|key| 4 * shown[key].as_u64().unwrap());
    let (least_all, least) = (2 * STEPS * all, 2 * STEPS * trained + all);
    println!("{STEPS} steps: {all_bytes} bytes, with adapters {bytes}, of vectors of {all} and {trained}");
    // Besides, tokens, the invitation, and what a busy machine has sent again.
    assert!(all_bytes >= least_all && (least..least + 2 * all).contains(&bytes), "at least {least_all} and {least}");

    let run = dir.path().join("restarted");
    let sets = [SMALL, ADAPTERS, &wider, &["schedule.steps=120"]].concat();
    let (mut first, address) = coordinator("quickstart", &run, &[], &sets);
    let mut only = worker(&address, "only");
    first.wait_for("step 12/120");
    first.kill();
    let again = ["coordinator", "--listen", &address, "--run", path(&run), "--resume"];
    let mut second = Running::start(lockstep(&again, &[]));
    assert_eq!(second.wait(), Some(0), "{}", second.said);
    assert_eq!(only.wait(), Some(0), "{}", only.said);
    assert_eq!(only.said.matches("vectors by").count(), 2, "two memberships: {}", only.said);
    assert_eq!(only.said.matches("fetched the base").count(), 1, "{}", only.said);
    let quiet = dir.path().join("quiet");
    train(&quiet, "quickstart", &["--workers", "2"], &[&wider[..], &["schedule.steps=120"]].concat());
    assert_eq!(fingerprint(&run), fingerprint(&quiet));
}
