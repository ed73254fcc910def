//! Every run is the same run: whatever the number of workers, whoever dies, however often it stops.

use std::path::Path;

use serde_json::Value;

use crate::cluster::{
    SMALL, coordinator, fingerprint, lockstep, logged_steps, metrics, outlive_a_worker, path, succeed, worker,
    worker_with,
};

fn train(run: &Path, more: &[&str], overrides: &[&str]) {
    let mut arguments = vec!["train", "quickstart", "--device", "cpu", "--run", path(run)];
    arguments.extend_from_slice(more);
    succeed(lockstep(&arguments, &[SMALL, overrides].concat()));
}

/// The run that nothing happens to.
fn quiet(dir: &Path) -> Value {
    let run = dir.join("quiet");
    train(&run, &["--workers", "1", "--threads", "1"], &[]);
    fingerprint(&run)
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let quiet = quiet(dir.path());
    for (workers, threads) in [("2", "1"), ("3", "2"), ("4", "1")] {
        let run = dir.path().join(format!("{workers}-workers"));
        train(&run, &["--workers", workers, "--threads", threads], &[]);
        assert_eq!(fingerprint(&run), quiet, "{workers} workers of {threads} threads");
    }
    let other = dir.path().join("other-seed");
    train(&other, &["--workers", "2"], &["seed=2"]);
    assert_ne!(fingerprint(&other)["params_sha256"], quiet["params_sha256"], "another seed is another run");
}

#[test]
fn so_it_is_with_a_llama_and_muon() {
    const LLAMA: &[&str] = &[
        "model.heads=4",
        "model.kv_heads=2",
        "model.ffn_width=48",
        "model.qk_norm=true",
        "optimizer.kind=muon",
        "schedule.steps=6",
    ];
    let dir = tempfile::tempdir().unwrap();
    let fingerprints = ["1", "2", "3"].map(|workers| {
        let run = dir.path().join(workers);
        let arguments = ["train", "quickstart-llama", "--device", "cpu", "--run", path(&run), "--workers", workers];
        succeed(lockstep(&arguments, &[SMALL, LLAMA].concat()));
        fingerprint(&run)
    });
    assert!(fingerprints.iter().all(|print| *print == fingerprints[0]), "{fingerprints:?}");
}

/// The bits differ, as batches of other sizes run through other kernels.
#[test]
fn more_slots_of_fewer_rows_are_the_same_run_but_for_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let losses = ["1", "2", "4"].map(|slots| {
        let run = dir.path().join(slots);
        let slots: u32 = slots.parse().unwrap();
        let cut = [format!("batch.slots={slots}"), format!("batch.sequences_per_slot={}", 8 / slots)];
        train(&run, &["--workers", "2"], &["model.dropout=0", &cut[0], &cut[1]]);
        metrics(&run).iter().filter_map(|line| line["loss"].as_f64()).collect::<Vec<f64>>()
    });
    assert_eq!(losses[0].len(), 24);
    for others in &losses[1..] {
        for (one, other) in losses[0].iter().zip(others) {
            assert!((one - other).abs() <= 1e-5, "{one} in one slot, {other} in more");
        }
    }
}

#[test]
fn a_run_stopped_and_resumed_gives_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let quiet = quiet(dir.path());
    let run = dir.path().join("resumed");
    train(&run, &["--workers", "2"], &["checkpoint.stop_after=9"]);
    assert_eq!(fingerprint(&run)["step"], 9);
    train(&run, &["--workers", "3", "--resume"], &["checkpoint.stop_after=17"]);
    // Without a recipe it is the run's own that goes on.
    let own = ["train", "--resume", "--run", path(&run), "--device", "cpu", "--workers", "1"];
    succeed(lockstep(&own, &["checkpoint.stop_after=0"]));
    assert_eq!(fingerprint(&run), quiet);
    assert_eq!(logged_steps(&run), (1..=24).collect::<Vec<u64>>(), "each step is logged once");
}

#[test]
fn vectors_by_memory_and_by_network_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let quiet = quiet(dir.path());
    let run = dir.path().join("both");
    let (mut coordinator, address) =
        coordinator("quickstart", &run, &[], &[SMALL, &["cluster.min_workers=2"]].concat());
    let mut by_network = worker_with(&address, "far", &["--no-shared-memory"]);
    let mut near = worker(&address, "near");
    by_network.wait_for("vectors by network");
    near.wait_for(if cfg!(target_os = "linux") { "vectors by shared memory" } else { "vectors by network" });
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!([near.wait(), by_network.wait()], [Some(0); 2], "{}{}", near.said, by_network.said);
    assert_eq!(fingerprint(&run), quiet);
}

#[test]
fn a_killed_worker_costs_time_and_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let quiet = quiet(dir.path());
    let run = dir.path().join("killed");
    outlive_a_worker("quickstart", &run, 24, SMALL);
    assert_eq!(fingerprint(&run), quiet);
}

#[cfg(unix)]
#[test]
fn interrupted_once_it_saves_and_ends_well() {
    let dir = tempfile::tempdir().unwrap();
    let quiet = quiet(dir.path());
    let run = dir.path().join("interrupted");
    let (mut coordinator, address) = coordinator("quickstart", &run, &[], SMALL);
    let mut only = worker(&address, "only");
    coordinator.wait_for("step 3/24");
    coordinator.signal("INT");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!(only.wait(), Some(0), "{}", only.said);
    let step = fingerprint(&run)["step"].as_u64().unwrap();
    assert!((3..24).contains(&step), "stopped at step {step}");
    train(&run, &["--workers", "2", "--resume"], &[]);
    assert_eq!(fingerprint(&run), quiet);
}

#[cfg(target_os = "linux")]
#[test]
fn no_process_outlives_a_killed_train() {
    use crate::cluster::{Running, children, is_alive};

    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("orphans");
    let arguments = ["train", "quickstart", "--device", "cpu", "--run", path(&run)];
    let mut train = Running::start(lockstep(&arguments, &[SMALL, &["schedule.steps=100000"]].concat()));
    train.wait_for("step 5000/100000");
    let children = children(train.id());
    assert_eq!(children.len(), 3, "a coordinator and two workers");
    train.kill();
    // They notice that their standard input ended; nothing tells us when, so look until they are gone.
    while children.iter().any(|child| is_alive(*child)) {
        std::thread::yield_now();
    }
}
