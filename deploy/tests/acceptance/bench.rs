//! `lockstep bench`: that it measures training, not how fast.

use serde_json::Value;

use crate::cluster::{fail, lockstep, succeed, text};

#[test]
fn compute_is_measured_in_as_many_processes_as_are_asked_for() {
    let arguments = ["bench", "compute", "--shape", "tiny", "--device", "cpu", "--workers", "2", "--threads", "1"];
    let arguments = [&arguments[..], &["--steps", "3", "--json"]].concat();
    let result: Value = serde_json::from_str(&text(&succeed(lockstep(&arguments, &[])).stdout)).unwrap();
    let number = |key: &str| result[key].as_f64().unwrap_or_else(|| panic!("{key} in {result}"));
    assert_eq!(["workers", "threads", "steps", "tokens_per_step"].map(number), [2.0, 1.0, 3.0, 768.0]);
    assert!((number("loss") - 65f64.ln()).abs() < 0.1, "tokens drawn from 65 cost ln 65 nats at first: {result}");
    assert!(number("tokens_per_sec") > 0.0 && number("step_ms_median") > 0.0 && number("matmul_share") > 0.0);
    if cfg!(target_os = "linux") {
        assert!(number("peak_rss_bytes") > 4.0 * number("parameters"), "{result}");
    }
}

#[test]
fn a_cluster_is_measured_beside_its_workers_alone() {
    let arguments = ["bench", "cluster", "--shape", "tiny", "--device", "cpu", "--workers", "2", "--threads", "1"];
    let arguments = [&arguments[..], &["--steps", "4", "--json"]].concat();
    let result: Value = serde_json::from_str(&text(&succeed(lockstep(&arguments, &[])).stdout)).unwrap();
    let number = |key: &str| result[key].as_f64().unwrap_or_else(|| panic!("{key} in {result}"));
    assert_eq!(["workers", "threads", "steps", "tokens_per_step"].map(number), [2.0, 1.0, 4.0, 1536.0]);
    let kept = number("tokens_per_sec") / number("alone_tokens_per_sec");
    assert!((1.0 - kept - number("overhead_ratio")).abs() < 1e-9, "{result}");
    assert!((number("tokens_per_sec") * number("step_ms_median") / 1536e3 - 1.0).abs() < 1e-9, "{result}");
    if cfg!(target_os = "linux") {
        assert!(number("checkpoint_peak_rss_bytes") >= number("peak_rss_bytes"), "{result}");
        assert!(number("peak_rss_bytes") > 3.0 * 4.0 * number("parameters"), "parameters and both moments: {result}");
    }
}

#[test]
fn the_exchange_of_vectors_is_measured_with_two_optimizers() {
    let arguments = ["bench", "wire", "--floats", "200_000", "--workers", "2", "--steps", "3", "--json"];
    let result: Value = serde_json::from_str(&text(&succeed(lockstep(&arguments, &[])).stdout)).unwrap();
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or_else(|| panic!("{key} in {result}"));
    assert!((200_000.0..200_064.0).contains(&number(&result, "floats")), "{result}");
    for rule in ["sgd", "adamw"] {
        let of = |key: &str| number(&result[rule], key);
        assert!(of("exchange_ms_median") > of("upload_ms_median") && of("upload_ms_median") > 0.0, "{result}");
        assert!(of("step_ms_median") > of("compute_ms_median"), "{result}");
    }
    assert!(fail(lockstep(&["bench", "wire", "--floats", "9"], &[]), 2).contains("100_000"));
}

#[test]
fn generation_is_measured_alone_and_in_company() {
    let arguments =
        ["bench", "generate", "--shape", "tiny", "--device", "cpu", "--batch", "3", "--repetitions", "2", "--json"];
    let result: Value = serde_json::from_str(&text(&succeed(lockstep(&arguments, &[])).stdout)).unwrap();
    let number = |key: &str| result[key].as_f64().unwrap_or_else(|| panic!("{key} in {result}"));
    assert_eq!(["prompt_tokens", "tokens", "batch", "repetitions"].map(number), [32.0, 16.0, 3.0, 2.0]);
    let rates = ["prefill", "decode", "batch", "memory_limit"].map(|rate| number(&format!("{rate}_tokens_per_sec")));
    assert!(rates.iter().all(|rate| *rate > 0.0), "{result}");
    assert!(number("weight_bytes") >= 4.0 * (number("parameters") - (65 + 64) as f64 * 128.0 - 20_000.0), "{result}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    for (shape, said) in [("nonsense", "nonsense"), ("line", "its model is no Transformer")] {
        let words = fail(lockstep(&["bench", "compute", "--shape", shape], &[]), 2);
        assert!(words.contains(said), "{words}");
    }
}
