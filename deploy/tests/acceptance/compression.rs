//! Vectors in fewer bytes: still the same run for everybody, and as many bytes as `check` says.

use std::path::Path;

use serde_json::Value;

use crate::cluster::{
    Running, SMALL, coordinator, fail, fingerprint, inspect, lockstep, logged_steps, metrics, path, succeed, text,
    worker, worker_with,
};

/// Formats of gradients and of parameters, besides the default.
const MODES: [[&str; 2]; 5] = [
    ["wire.gradients=bf16", "wire.parameters=f32"],
    ["wire.gradients=int8", "wire.parameters=f32"],
    ["wire.gradients=f32", "wire.parameters=bf16"],
    ["wire.gradients=bf16", "wire.parameters=bf16"],
    ["wire.gradients=int8", "wire.parameters=bf16"],
];

fn train(run: &Path, more: &[&str], overrides: &[&str]) {
    let mut arguments = vec!["train", "quickstart", "--device", "cpu", "--run", path(run)];
    arguments.extend_from_slice(more);
    succeed(lockstep(&arguments, &[SMALL, overrides].concat()));
}

fn validation_losses(run: &Path) -> Vec<f64> {
    metrics(run).iter().filter_map(|line| line["val_loss"].as_f64()).collect()
}

#[test]
fn any_number_of_workers_gives_the_same_bits_in_every_mode() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    train(&plain, &["--workers", "1"], &[]);
    let last = |run: &Path| *validation_losses(run).last().unwrap();
    let mut digests = vec![inspect(&plain)["params_sha256"].clone()];
    for (number, mode) in MODES.iter().enumerate() {
        let run = |name: &str| dir.path().join(format!("{number}-{name}"));
        let prints = [("1", "1"), ("2", "1"), ("3", "2"), ("4", "1")].map(|(workers, threads)| {
            train(&run(workers), &["--workers", workers, "--threads", threads], mode);
            fingerprint(&run(workers))
        });
        assert!(prints.iter().all(|print| *print == prints[0]), "{mode:?}: {prints:#?}");
        let off = (last(&run("1")) - last(&plain)).abs();
        assert!(off < 0.02, "{mode:?}: the validation loss is off by {off}");
        digests.push(prints[0]["params_sha256"].clone());

        let stopped = run("stopped");
        train(&stopped, &["--workers", "2"], &[&mode[..], &["checkpoint.stop_after=9"]].concat());
        let own = ["train", "--resume", "--run", path(&stopped), "--device", "cpu", "--workers", "3"];
        succeed(lockstep(&own, &["checkpoint.stop_after=0"]));
        assert_eq!(fingerprint(&stopped), prints[0], "{mode:?}: stopped and resumed");
        assert_eq!(logged_steps(&stopped), (1..=24).collect::<Vec<u64>>());
        succeed(lockstep(&["verify", path(&stopped)], &[]));

        joined_killed_and_killed(&run("torn"), mode, &prints[0]);
    }
    for (number, digest) in digests.iter().enumerate() {
        assert!(digests[number + 1..].iter().all(|other| other != digest), "each mode is a run of its own");
    }
}

/// Two workers by the network and one by shared memory, who confirm one another's blocks; one of each kind of process dies.
fn joined_killed_and_killed(run: &Path, mode: &[&str], quiet: &Value) {
    let sets = [SMALL, mode, &["checkpoint.every_steps=4", "cluster.min_workers=2", "cluster.audit=0.5"]].concat();
    let (mut first, address) = coordinator("quickstart", run, &[], &sets);
    let mut far = ["far", "farther"].map(|name| worker_with(&address, name, &["--no-shared-memory"]));
    let mut near = worker(&address, "near");
    first.wait_for("step 5/24");
    let [dying, _] = &mut far;
    dying.kill();
    first.wait_for(" left: ");
    first.wait_for("step 11/24");
    first.kill();
    let again = ["coordinator", "--listen", &address, "--run", path(run), "--resume"];
    let mut second = Running::start(lockstep(&again, &[]));
    assert_eq!(second.wait(), Some(0), "{}", second.said);
    let [_, staying] = &mut far;
    assert_eq!([staying.wait(), near.wait()], [Some(0); 2], "{}{}", staying.said, near.said);
    assert_eq!(fingerprint(run), *quiet, "{mode:?}: workers of both kinds, and deaths");
}

/// What a checkpoint holds is what was validated, not the master parameters that the optimizer goes on from.
#[test]
fn a_run_is_left_with_the_parameters_that_were_validated() {
    let dir = tempfile::tempdir().unwrap();
    let [run, next] = ["run", "next"].map(|name| dir.path().join(name));
    let mode = ["wire.gradients=int8", "wire.parameters=bf16", "model.dropout=0"];
    train(&run, &["--workers", "2"], &mode);
    let init = format!("init={}", path(&run));
    train(&next, &["--workers", "1"], &[&mode[..], &[&init, "schedule.steps=4"]].concat());
    assert_eq!(validation_losses(&next).first(), validation_losses(&run).last());
    assert_eq!(inspect(&next)["initial_sha256"], inspect(&run)["params_sha256"]);
    for changed in ["wire.gradients=bf16", "wire.parameters=f32"] {
        let resume = ["train", "--resume", "--run", path(&run), "--device", "cpu"];
        let said = fail(lockstep(&resume, &[changed]), 2);
        assert!(said.contains("may not change"), "{said}");
    }
    succeed(lockstep(&["compare", path(&run), "--rounds", "1", "--json"], &[]));
}

/// Adapters, Muon's matrices, and the ways of replicas are vectors as any.
#[test]
fn adapters_and_other_optimizers_are_the_same_run_too() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    train(&base, &["--workers", "1"], &["schedule.steps=6"]);
    let init = format!("init={}", path(&base));
    let adapted = ["adapters.rank=4", &init];
    let others = [("muon", &["optimizer.kind=muon"][..]), ("replicas", &["batch.local_steps=3"])];
    for (name, sets) in others.into_iter().chain([("adapters", &adapted[..])]) {
        let mode = ["wire.gradients=int8", "wire.parameters=bf16", "schedule.steps=10"];
        let prints = ["1", "3"].map(|workers| {
            let run = dir.path().join(format!("{name}-{workers}"));
            train(&run, &["--workers", workers], &[&mode[..], sets].concat());
            fingerprint(&run)
        });
        assert_eq!(prints[0], prints[1], "{name}");
    }
}

/// Bytes a step to and from one worker by the network, in the difference of two runs of unlike length. A step is one slot, so
/// that there is one block whatever the worker is given.
#[cfg(unix)]
#[test]
fn as_many_bytes_pass_as_check_says() {
    use crate::proxy::Proxy;

    /// Of a step besides vectors and tokens: frames, messages around them, heartbeats and spans.
    const AROUND: u64 = 4_000;
    let dir = tempfile::tempdir().unwrap();
    let shape = [
        "model.layers=3",
        "model.width=96",
        "model.heads=4",
        "batch.slots=1",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
    ];
    let modes = [["wire.gradients=f32", "wire.parameters=f32"], MODES[1], MODES[2], MODES[3], MODES[4]];
    for (number, mode) in modes.iter().enumerate() {
        let passed = |steps: u64| {
            let run = dir.path().join(format!("{number}-{steps}"));
            let steps = format!("schedule.steps={steps}");
            let sets = [SMALL, &shape, &mode[..], &[&steps]].concat();
            let (mut coordinator, address) = coordinator("quickstart", &run, &[], &sets);
            let proxy = Proxy::before(&address);
            let mut only = worker_with(&proxy.address, "only", &["--no-shared-memory"]);
            assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
            assert_eq!(only.wait(), Some(0), "{}", only.said);
            proxy.passed_bytes()
        };
        let (short, long) = (passed(10), passed(40));
        let [up, down] = [0, 1].map(|direction| (long[direction] - short[direction]) / 30);
        let check = ["check", "quickstart", "--worker-tokens-per-sec", "1000"];
        let said = text(&succeed(lockstep(&check, &[SMALL, &shape, &mode[..]].concat())).stdout);
        let [computed_down, computed_up] = of_one_worker(&said);
        println!("{mode:?}: {down} bytes down and {up} up a step, by check {computed_down} and {computed_up}");
        for (counted, computed) in [(down, computed_down), (up, computed_up)] {
            // `check` shows three digits.
            let shown = computed / 200;
            let expected = computed - shown..computed + shown + AROUND;
            assert!(expected.contains(&counted), "{mode:?}: {counted} bytes counted, {computed} computed");
        }
    }
}

/// Bytes down and up of a step with one worker, as `check` says.
#[cfg(unix)]
fn of_one_worker(said: &str) -> [u64; 2] {
    let row = said.lines().skip_while(|line| !line.contains("down         up")).nth(1);
    let words: Vec<&str> = row.unwrap_or_else(|| panic!("{said}")).split_whitespace().collect();
    let bytes = |number: &str, unit: &str| {
        let unit = match unit {
            "B" => 1.0,
            "kB" => 1e3,
            "MB" => 1e6,
            other => panic!("{other} in {said}"),
        };
        (number.parse::<f64>().unwrap() * unit) as u64
    };
    [bytes(words[2], words[3]), bytes(words[4], words[5])]
}
