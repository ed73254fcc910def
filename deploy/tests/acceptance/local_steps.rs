//! Replicas that take local steps (DiLoCo): the same run whoever computes them, in rounds, at a share of the traffic.

use std::path::Path;

use serde_json::Value;

use crate::cluster::{
    SMALL, coordinator, fail, fingerprint, inspect, lockstep, logged_steps, metrics, outlive_a_worker, path, succeed,
    text, worker, worker_with,
};
use crate::{preferences, sft};

/// Twelve rounds, each of four local steps of five replicas.
const LOCAL: &[&str] = &[
    "batch.local_steps=4",
    "schedule.steps=12",
    "schedule.warmup_steps=2",
    "evaluation.every_steps=4",
    "checkpoint.every_steps=3",
];

const KEPT: &str = "outer.keep_moments=true";

fn train(run: &Path, recipe: &str, more: &[&str], sets: &[&str]) {
    let arguments = ["train", recipe, "--device", "cpu", "--run", path(run)];
    succeed(lockstep(&[&arguments[..], more].concat(), sets));
}

#[test]
fn whoever_takes_part_the_run_is_the_same() {
    same_for_all("outer.keep_moments=false");
}

/// So it is where moments travel with the replica.
#[test]
fn whoever_takes_part_the_moments_are_the_same() {
    same_for_all(KEPT);
}

fn same_for_all(moments: &str) {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str| dir.path().join(name);
    let sets = [SMALL, LOCAL, &[moments]].concat();
    let quiet = run("quiet");
    train(&quiet, "quickstart", &["--workers", "1", "--threads", "1"], &sets);
    for (workers, threads) in [("2", "1"), ("3", "2"), ("4", "1")] {
        train(&run(workers), "quickstart", &["--workers", workers, "--threads", threads], &sets);
        assert_eq!(fingerprint(&run(workers)), fingerprint(&quiet), "{workers} workers");
    }
    let audited = run("audited");
    let all = [&sets[..], &["cluster.audit=1", "cluster.min_workers=2"]].concat();
    train(&audited, "quickstart", &["--workers", "2"], &all);
    assert_eq!(fingerprint(&audited), fingerprint(&quiet), "each replica computed by two workers");

    let by_both = run("by-both");
    let (mut coordinator_of_two, address) =
        coordinator("quickstart", &by_both, &[], &[&sets[..], &["cluster.min_workers=2"]].concat());
    let mut far = worker_with(&address, "far", &["--no-shared-memory"]);
    let mut near = worker(&address, "near");
    assert_eq!(coordinator_of_two.wait(), Some(0), "{}", coordinator_of_two.said);
    assert_eq!([near.wait(), far.wait()], [Some(0); 2], "{}{}", near.said, far.said);
    assert_eq!(fingerprint(&by_both), fingerprint(&quiet), "vectors by memory and by network");

    let killed = run("killed");
    outlive_a_worker("quickstart", &killed, 12, &sets);
    assert_eq!(fingerprint(&killed), fingerprint(&quiet), "a worker was killed");

    let stopped = run("stopped");
    train(&stopped, "quickstart", &["--workers", "2"], &[&sets[..], &["checkpoint.stop_after=5"]].concat());
    let resume = ["--workers", "3", "--resume"];
    train(&stopped, "quickstart", &resume, &[&sets[..], &["checkpoint.stop_after=9"]].concat());
    let own = ["train", "--resume", "--run", path(&stopped), "--device", "cpu", "--workers", "1"];
    let said = fail(lockstep(&own, &["batch.local_steps=8"]), 2);
    assert!(said.contains("batch.local_steps = 8: the run to resume was started with 4"), "{said}");
    succeed(lockstep(&own, &["checkpoint.stop_after=0"]));
    assert_eq!(fingerprint(&stopped), fingerprint(&quiet), "stopped and resumed, the outer momentum with it");
    assert_eq!(logged_steps(&stopped), (1..=12).collect::<Vec<u64>>());
    succeed(lockstep(&["verify", path(&stopped)], &[]));
    succeed(lockstep(&["compare", path(&quiet), "--rounds", "1", "--json"], &[]));

    // A line of the metrics is a round.
    let lines = metrics(&quiet);
    let rounds: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
    let tokens_per_round = f64::from(5 * 4 * 2 * 16);
    assert!(rounds.iter().zip(1..).all(|(line, round)| number(line, "tokens") == tokens_per_round * f64::from(round)));
    // The rate is still on its way up in the first one, at its peak of 1e-3 at the end of the second.
    assert_eq!([number(rounds[0], "lr"), number(rounds[1], "lr")], [5e-4, 1e-3]);
    let losses: Vec<f64> = lines.iter().filter_map(|line| line["val_loss"].as_f64()).collect();
    assert!(losses.len() == 4 && losses[1..].iter().all(|loss| *loss < losses[0] - 0.5), "{losses:?}");

    let otherwise = if moments == KEPT { "outer.keep_moments=false" } else { KEPT };
    for other in ["outer.momentum=0.8", otherwise] {
        train(&run(other), "quickstart", &["--workers", "2"], &[&sets[..], &[other]].concat());
        let [first, second] =
            [0, 1].map(|round| metrics(&run(other)).into_iter().filter(|line| line.get("loss").is_some()).nth(round));
        let [first, second] = [first, second].map(|line| number(&line.unwrap(), "loss"));
        assert!(first == number(rounds[0], "loss") && second != number(rounds[1], "loss"), "{other} shows in round 2");
    }
}

/// Whatever is trained, and however.
#[test]
fn every_stage_and_optimizer_takes_local_steps() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str| dir.path().join(name);
    let same = |name: &str, recipe: &str, sets: &[&str]| {
        let prints = ["1", "3"].map(|workers| {
            let run = run(&format!("{name}-{workers}"));
            train(&run, recipe, &["--workers", workers], sets);
            fingerprint(&run)
        });
        assert_eq!(prints[0], prints[1], "{name}");
        succeed(lockstep(&["verify", path(&run(&format!("{name}-3")))], &[]));
    };
    let muon = ["model.kv_heads=1", "model.ffn_width=48", "optimizer.kind=muon", "schedule.steps=4"];
    same("llama", "quickstart-llama", &[SMALL, LOCAL, &muon].concat());
    let init = format!("init={}", path(&run("llama-1")));
    let adapters = ["adapters.rank=2", "optimizer.kind=nesterov", KEPT];
    let adapters = [&muon[..], &[&init], &adapters].concat();
    same("adapters", "quickstart-llama", &[SMALL, LOCAL, &adapters].concat());

    let shorter = ["batch.local_steps=3", "schedule.steps=6", "schedule.warmup_steps=0", "evaluation.every_steps=3"];
    let chats = format!("data.input={}", path(&sft::conversations(dir.path())));
    same("sft", "sft", &[sft::SMALL, &[&chats], &shorter].concat());
    let init = format!("init={}", path(&preferences::answering(dir.path())));
    let pairs = format!("data.input={}", path(&preferences::preferences(dir.path(), "pairs.jsonl", 40)));
    for stage in ["reward", "dpo"] {
        same(stage, stage, &[preferences::SMALL, &[&init, &pairs], &shorter].concat());
    }
}

/// What `check` says of the wire, and what passes on it.
#[cfg(unix)]
#[test]
fn a_round_costs_what_a_step_does() {
    use crate::proxy::Proxy;

    let dir = tempfile::tempdir().unwrap();
    let quiet = ["evaluation.every_steps=0", "checkpoint.every_steps=0", "schedule.warmup_steps=0"];
    // At equal tokens: 24 steps, or 3 rounds of 8 local steps.
    let counted_and_computed = |name: &str, steps: u64, more: &[&str]| {
        let run = dir.path().join(name);
        let steps_set = format!("schedule.steps={steps}");
        let sets = [SMALL, &quiet, &[&steps_set], more].concat();
        let (mut coordinator, address) = coordinator("quickstart", &run, &[], &sets);
        let proxy = Proxy::before(&address);
        let mut only = worker_with(&proxy.address, "only", &["--no-shared-memory"]);
        assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
        assert_eq!(only.wait(), Some(0), "{}", only.said);
        let tokens = inspect(&run)["tokens"].as_u64().unwrap();
        assert_eq!(tokens, 24 * 5 * 2 * 16);
        let said = text(&succeed(lockstep(&["check", "quickstart", "--worker-tokens-per-sec", "1000"], &sets)).stdout);
        let row = said.lines().find(|line| line.trim_start().starts_with("1 ")).unwrap_or_else(|| panic!("{said}"));
        let [_, _, down, unit_down, up, unit_up, ..] = row.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{row}")
        };
        let bytes = |amount: &str, unit: &str| {
            let unit = match unit {
                "kB" => 1e3,
                "MB" => 1e6,
                other => panic!("{other}"),
            };
            amount.parse::<f64>().unwrap() * unit
        };
        let computed = (bytes(down, unit_down) + bytes(up, unit_up)) * steps as f64;
        let counted = proxy.passed_bytes().iter().sum::<u64>() as f64;
        println!("{name}: {counted} bytes counted, {computed} computed");
        // Besides, the invitation, headings, and what a busy machine has sent again.
        let vector = 4.0 * inspect(&run)["parameters"].as_f64().unwrap();
        // Moments that are 0 do not travel.
        let computed = if more.contains(&KEPT) { computed - 5.0 * 2.0 * vector } else { computed };
        let expected = computed..computed * 1.05 + 2.0 * vector;
        assert!(expected.contains(&counted), "{name}: {counted} bytes counted, {computed} computed");
        counted
    };
    let all = counted_and_computed("steps", 24, &[]);
    let local = counted_and_computed("rounds", 3, &["batch.local_steps=8"]);
    assert!(local < all / 5.0, "{local} of {all}");
    counted_and_computed("moments", 3, &["batch.local_steps=8", KEPT]);
}
