//! The straight line: the smallest job through the whole cluster, against known numbers and a plain loop.

use std::path::Path;

use lockstep_model::digest::{hex, vector_sha256};
use serde_json::Value;

use crate::cluster::{Running, coordinator, inspect, lockstep, path, python, succeed, text, worker, workspace};

/// Losses at epochs 40, 80, 120, 160 and 200, to four places.
const KNOWN_LOSSES: [&str; 5] = ["0.1391", "0.0884", "0.0562", "0.0357", "0.0227"];

/// Full-batch gradient descent without cluster, autodiff or framework, in the order of the slot tree: two slots of five
/// rows, each summed row by row, then added.
fn plain_loop() -> [f32; 2] {
    let [mut weight, mut bias] = [0.35f32, 0.01];
    for _ in 0..200 {
        let slot = |rows: std::ops::Range<u8>| {
            let (mut weight_gradient, mut bias_gradient) = (0f32, 0f32);
            for x in rows.map(f32::from) {
                let error = x * weight + bias - (x + 1.0);
                weight_gradient += x * (error + error);
                bias_gradient += error + error;
            }
            [weight_gradient, bias_gradient]
        };
        let (left, right) = (slot(0..5), slot(5..10));
        let scale = (1.0f64 / 10.0) as f32;
        weight -= 0.01 * ((left[0] + right[0]) * scale);
        bias -= 0.01 * ((left[1] + right[1]) * scale);
    }
    [weight, bias]
}

fn losses(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let fifth = lines.filter(|line| line["step"].as_u64().unwrap() % 40 == 0 && line["loss"].is_f64());
    fifth.map(|line| format!("{:.4}", line["loss"].as_f64().unwrap())).collect()
}

#[test]
fn known_losses_and_prediction_to_the_bit_of_a_plain_loop() {
    let dir = tempfile::tempdir().unwrap();
    let expected = hex(&vector_sha256(&plain_loop()));
    for workers in ["1", "2", "3"] {
        let run = dir.path().join(workers);
        let arguments = ["train", "line", "--device", "cpu", "--workers", workers, "--run", path(&run)];
        let output = succeed(lockstep(&arguments, &[]));
        assert_eq!(losses(&run), KNOWN_LOSSES);
        assert_eq!(inspect(&run)["params_sha256"], expected.as_str(), "{workers} workers");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(KNOWN_LOSSES.iter().all(|loss| said.contains(loss)) && said.contains("5.94"), "{said}");
    }
}

/// A worker in another language, written from the comments of the contract alone, beside one of ours: the run is exact, so
/// both compute the same bits from the probe on, whoever does which slot.
#[test]
fn a_python_worker_computes_the_line_beside_ours() {
    let test = "a_python_worker_computes_the_line_beside_ours";
    let Some(python) = python(test, &["grpc", "grpc_tools", "blake3"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("mixed");
    let (mut coordinator, address) = coordinator("line", &run, &[], &["cluster.min_workers=2"]);
    let mut command = std::process::Command::new(python);
    command.args([path(&workspace("deploy/tests/peer/line_worker.py")), &address]);
    let mut theirs = Running::start(command);
    let mut ours = worker(&address, "ours");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!((theirs.wait(), ours.wait()), (Some(0), Some(0)), "{}{}", theirs.said, ours.said);
    assert!(theirs.said.contains("released"), "{}", theirs.said);
    assert_eq!(losses(&run), KNOWN_LOSSES);
    assert_eq!(inspect(&run)["params_sha256"], hex(&vector_sha256(&plain_loop())).as_str());
}
