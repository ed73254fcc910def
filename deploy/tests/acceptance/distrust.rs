//! Results that are not believed: of workers that compute wrong, and of data or a model that is of no use.

use std::path::Path;
use std::process::Command;

use crate::cluster::{
    Running, SMALL, coordinator, fail, fingerprint, lockstep, path, python, succeed, worker, workspace,
};

/// The straight line in slots enough for three.
const LINE: &[&str] = &["batch.slots=5", "batch.sequences_per_slot=2"];

/// [`LINE`] on two workers of ours and one in Python whose gradients are off from step 50 on. Once that one is found out, a
/// fourth joins, since the run wants three. It ends as the quiet run in `dir` does. Returns what the coordinator said.
fn line_with_a_broken_worker(python: &Path, dir: &Path, audit: &str) -> String {
    let [quiet, run] = ["quiet", "distrustful"].map(|name| dir.join(name));
    succeed(lockstep(&["train", "line", "--device", "cpu", "--workers", "1", "--run", path(&quiet)], LINE));
    let audit = format!("cluster.audit={audit}");
    let (mut coordinator, address) =
        coordinator("line", &run, &[], &[LINE, &[audit.as_str(), "cluster.min_workers=3"]].concat());
    let mut command = Command::new(python);
    command.args([path(&workspace("deploy/tests/peer/line_worker.py")), &address, "--wrong-from", "50"]);
    let mut broken = Running::start(command);
    let mut ours = ["first", "second"].map(|name| worker(&address, name));
    coordinator.wait_for("computed something else than others; quarantined");
    let mut fourth = worker(&address, "fourth");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!(broken.wait(), Some(0), "{}", broken.said);
    assert!(broken.said.contains("released: quarantined"), "{}", broken.said);
    for worker in ours.iter_mut().chain([&mut fourth]) {
        assert_eq!(worker.wait(), Some(0), "{}", worker.said);
    }
    assert_eq!(fingerprint(&run), fingerprint(&quiet), "{}", coordinator.said);
    std::mem::take(&mut coordinator.said)
}

#[test]
fn a_worker_that_computes_wrong_is_outvoted_before_its_results_count() {
    let test = "a_worker_that_computes_wrong_is_outvoted_before_its_results_count";
    let Some(python) = python(test, &["grpc", "grpc_tools"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let said = line_with_a_broken_worker(&python, dir.path(), "1");
    assert!(!said.contains("goes back"), "{said}");
}

#[test]
fn what_a_broken_worker_did_before_it_was_found_out_is_done_again() {
    let test = "what_a_broken_worker_did_before_it_was_found_out_is_done_again";
    let Some(python) = python(test, &["grpc", "grpc_tools"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let said = line_with_a_broken_worker(&python, dir.path(), "0.2");
    assert!(said.contains("the run goes back to step 0"), "{said}");
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
        assert!(report.contains("slot 0\n  tokens\n    \""), "{report}");
    }
    // The parameters are still those before.
    succeed(lockstep(&["generate", "--run", path(&run), "--prompt", "In", "--tokens", "5"], &[]));
}
