//! `lockstep compare`: training changes parameters and inference does not, and nothing in the run's directory changes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cluster::{SMALL, fail, inspect, lockstep, path, succeed, text};

/// The bytes of all files below a directory.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            let bytes = fs::read(&path).unwrap();
            found.insert(path, bytes);
        }
    }
    found
}

#[test]
fn training_changes_parameters_and_inference_leaves_them() {
    let dir = tempfile::tempdir().unwrap();
    for (recipe, dropout) in [("quickstart", "0.1"), ("quickstart-llama", "0.0")] {
        let run = dir.path().join(recipe);
        let few = ["schedule.steps=2", "schedule.warmup_steps=0", &format!("model.dropout={dropout}")];
        let arguments = ["train", recipe, "--device", "cpu", "--workers", "1", "--run", path(&run)];
        succeed(lockstep(&arguments, &[SMALL, &few].concat()));
        let before = files(&run);
        let arguments = ["compare", path(&run), "--device", "cpu", "--threads", "2", "--rounds", "2"];
        let said = succeed(lockstep(&[&arguments[..], &["--json"]].concat(), &[])).stdout;
        let table = text(&succeed(lockstep(&arguments, &[])).stdout);
        assert!(files(&run) == before, "nothing in the run's directory changes");

        let result: Value = serde_json::from_slice(&said).unwrap();
        let (training, inference) = (&result["training"], &result["inference"]);
        let own = &inspect(&run)["params_sha256"];
        for digest in [&result["params_sha256"], &training["sha256_before"], &inference["sha256_before"]] {
            assert_eq!(digest, own, "{result}");
        }
        assert_eq!(&inference["sha256_after"], own);
        assert_ne!(&training["sha256_after"], own);
        assert_eq!((&training["parameters_changed"], &inference["parameters_changed"]), (&true.into(), &false.into()));
        assert_eq!(training["dropout_active"], dropout != "0.0", "{result}");
        assert_eq!(inference["dropout_active"], false, "{result}");

        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {result}"));
        let vector = 4.0 * number(&result["parameters"]);
        let of = |side: &Value, name: &str| number(&side["memory"][name]);
        assert_eq!(of(training, "parameters"), 2.0 * vector);
        // Five slots: the device's and the flat one, and sums of the left halves of a tree over eight.
        assert_eq!(of(training, "gradients"), 5.0 * vector);
        assert_eq!(of(training, "moments"), 2.0 * vector);
        assert!(of(training, "activations") > 0.0 && of(training, "cache") == 0.0);
        assert!((vector..2.0 * vector).contains(&of(inference, "parameters")));
        assert_eq!(["gradients", "moments", "activations"].map(|name| of(inference, name)), [0.0; 3]);
        assert!(of(inference, "cache") > 0.0);
        assert_eq!(number(&result["tokens_per_step"]), 5.0 * 2.0 * 16.0);
        assert!(number(&training["tokens_per_sec"]["step"]) > 0.0);
        for name in ["prefill", "decode_1", "decode_8"] {
            assert!(number(&inference["tokens_per_sec"][name]) > 0.0, "{name} in {result}");
        }
        if cfg!(target_os = "linux") {
            for side in [training, inference] {
                assert!(number(&side["peak_rss_bytes"]) >= number(&side["start_rss_bytes"]), "{result}");
            }
        }
        for expected in
            ["changed by a step", "unchanged by generating", "keys and values, 8 streams", &own.as_str().unwrap()[..16]]
        {
            assert!(table.contains(expected), "{expected} is missing in:\n{table}");
        }
    }
}

#[test]
fn what_cannot_be_compared_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    assert!(fail(lockstep(&["compare", path(&run)], &[]), 1).contains("no checkpoint here"));
    succeed(lockstep(&["train", "line", "--device", "cpu", "--run", path(&run)], &["schedule.steps=2"]));
    assert!(fail(lockstep(&["compare", path(&run)], &[]), 1).contains("reads no text"));
    succeed(lockstep(
        &["train", "quickstart", "--device", "cpu", "--run", path(&dir.path().join("text"))],
        &[SMALL, &["schedule.steps=1", "schedule.warmup_steps=0"]].concat(),
    ));
    let said = fail(lockstep(&["compare", path(&dir.path().join("text")), "--device", "wgpu:999"], &[]), 1);
    assert!(said.contains("there is no wgpu adapter 999"), "{said}");
}
