//! Results that are not believed: of workers that compute wrong, and of data or a model that is of no use.

use std::path::Path;
use std::process::Command;

use crate::cluster::{
    Running, SMALL, coordinator, fail, fingerprint, lockstep, path, python, succeed, worker, workspace,
};

/// The straight line in slots enough for three.
const LINE: &[&str] = &["batch.slots=5", "batch.sequences_per_slot=2"];

/// A worker in Python.
fn peer(python: &Path, address: &str, more: &[&str]) -> Running {
    let mut command = Command::new(python);
    command.arg(path(&workspace("deploy/tests/peer/line_worker.py"))).arg(address).args(more);
    Running::start(command)
}

/// Goes on with, or begins, [`LINE`] in `dir` on three workers in Python, so equally fast that results of each count, one of
/// whose gradients are off from step 50 on. Once that one is found out, a fourth joins, one of ours, since the run wants three.
/// It ends as a quiet run does, and verifies. Returns what the coordinator said.
fn line_with_a_broken_worker(python: &Path, dir: &Path, resume: &[&str], audit: &str, wire: &[&str]) -> String {
    let [quiet, run] = ["quiet", "distrustful"].map(|name| dir.join(name));
    let line = ["train", "line", "--device", "cpu", "--workers", "1", "--run", path(&quiet)];
    succeed(lockstep(&line, &[LINE, wire].concat()));
    let overrides = [LINE, wire, &["cluster.min_workers=3", "checkpoint.stop_after=0", audit]].concat();
    let (mut coordinator, address) = coordinator("line", &run, resume, &overrides);
    let mut broken = peer(python, &address, &["--wrong-from", "50"]);
    let mut right = ["first", "second"].map(|name| peer(python, &address, &["--name", name]));
    coordinator.wait_for("computed something else than others; quarantined");
    let mut fourth = worker(&address, "fourth");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert!(broken.wait().is_some(), "it ended by itself");
    assert!(broken.said.contains("released: quarantined"), "{}", broken.said);
    assert!(broken.said.contains("; the run goes on"), "{}", broken.said);
    for worker in right.iter_mut().chain([&mut fourth]) {
        assert_eq!(worker.wait(), Some(0), "{}", worker.said);
    }
    assert_eq!(fingerprint(&run), fingerprint(&quiet), "{}", coordinator.said);
    succeed(lockstep(&["verify", path(&run)], &[]));
    std::mem::take(&mut coordinator.said)
}

#[test]
fn a_worker_that_computes_wrong_is_outvoted_before_its_results_count() {
    let test = "a_worker_that_computes_wrong_is_outvoted_before_its_results_count";
    let Some(python) = python(test, &["grpc", "grpc_tools", "blake3"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let said = line_with_a_broken_worker(&python, dir.path(), &[], "cluster.audit=1", &[]);
    assert!(!said.contains("goes back"), "{said}");
}

#[test]
fn what_a_broken_worker_did_before_it_was_found_out_is_done_again() {
    let test = "what_a_broken_worker_did_before_it_was_found_out_is_done_again";
    let Some(python) = python(test, &["grpc", "grpc_tools", "blake3"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let said = line_with_a_broken_worker(&python, dir.path(), &[], "cluster.audit=0.2", &[]);
    assert!(said.contains("the run goes back to step 0"), "{said}");
}

#[test]
fn what_was_done_before_the_broken_worker_came_stands() {
    let test = "what_was_done_before_the_broken_worker_came_stands";
    let Some(python) = python(test, &["grpc", "grpc_tools", "blake3"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("distrustful");
    let before = ["train", "line", "--device", "cpu", "--run", path(&run)];
    succeed(lockstep(&before, &[LINE, &["checkpoint.stop_after=40"]].concat()));
    let said = line_with_a_broken_worker(&python, dir.path(), &["--resume"], "cluster.audit=0.2", &[]);
    assert!(said.contains("the run goes back to step 40"), "{said}");
}

/// What is rounded, and added up from differences, is audited and taken back as well: the odd one speaks the same formats.
#[test]
fn so_it_is_where_vectors_are_made_smaller() {
    let test = "so_it_is_where_vectors_are_made_smaller";
    let Some(python) = python(test, &["grpc", "grpc_tools", "blake3"]) else { return };
    for (gradients, audit, back) in [("bf16", "cluster.audit=1", false), ("int8", "cluster.audit=0.2", true)] {
        let dir = tempfile::tempdir().unwrap();
        let wire = [&format!("wire.gradients={gradients}"), "wire.parameters=bf16"];
        let said = line_with_a_broken_worker(&python, dir.path(), &[], audit, &wire);
        assert_eq!(said.contains("the run goes back to step 0"), back, "{said}");
    }
}

#[test]
fn a_dispute_that_nobody_can_decide_ends_the_run_with_a_report() {
    let test = "a_dispute_that_nobody_can_decide_ends_the_run_with_a_report";
    let Some(python) = python(test, &["grpc", "grpc_tools", "blake3"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let overrides = [LINE, &["cluster.min_workers=2", "cluster.audit=1", "cluster.on_dispute=halt"]].concat();
    let (mut coordinator, address) = coordinator("line", &run, &[], &overrides);
    let mut broken = peer(&python, &address, &["--wrong-from", "7"]);
    let mut ours = worker(&address, "ours");
    assert_eq!(coordinator.wait(), Some(1), "{}", coordinator.said);
    assert!(coordinator.said.contains("there is no third worker to decide"), "{}", coordinator.said);
    assert!(broken.wait().is_some() && ours.wait().is_some());
    let report = std::fs::read_to_string(run.join("reports/step-000000007.txt")).unwrap();
    assert!(report.contains("ours") && report.contains("of step 7\n  x\n"), "{report}");
}

#[test]
fn a_model_that_diverges_ends_the_run_with_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let train = ["train", "quickstart", "--device", "cpu", "--run", path(&run)];
    let diverging = ["optimizer.lr=1e30", "optimizer.grad_clip=0", "schedule.warmup_steps=0"];
    let said = fail(lockstep(&train, &[SMALL, &diverging].concat()), 1);
    assert!(said.contains("3 steps in a row"), "{said}");
    assert!(said.contains("computed the same"), "a second worker confirmed it: {said}");
    let reports = std::fs::read_dir(run.join("reports")).unwrap();
    let reports: Vec<String> = reports.map(|report| std::fs::read_to_string(report.unwrap().path()).unwrap()).collect();
    assert_eq!(reports.len(), 3);
    for report in reports {
        assert!(report.contains("slot 0 of step ") && report.contains("  tokens\n    \""), "{report}");
    }
    // The parameters are still those before.
    succeed(lockstep(&["generate", "--run", path(&run), "--prompt", "In", "--tokens", "5"], &[]));
}
