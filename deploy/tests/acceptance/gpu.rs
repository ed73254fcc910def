//! The GPU path: the same model through wgpu, on the first adapter there is. A software adapter runs the same kernels.

use std::path::Path;

use serde_json::Value;

use crate::cluster::{SMALL, fail, fingerprint, lockstep, path, skip, succeed, text};

/// Largest difference of a step's loss from the CPU's, relative.
const LOSS_TOLERANCE: f64 = 1e-4;

/// The first adapter in words, or `None` after saying that the test skips.
fn adapter(test: &str) -> Option<String> {
    let listed = text(&succeed(lockstep(&["devices"], &[])).stdout);
    let found = listed.lines().find_map(|line| line.strip_prefix("wgpu:0")).map(|words| words.trim().to_string());
    if found.is_none() {
        skip(test, "wgpu finds no adapter (on Linux, mesa-vulkan-drivers brings one in software)");
    }
    found
}

fn train(run: &Path, device: &str, workers: &str) -> Vec<f64> {
    let arguments = ["train", "--device", device, "--workers", workers, "--threads", "1", "--run", path(run)];
    let shorter = ["schedule.steps=12", "evaluation.every_steps=6", "checkpoint.every_steps=0"];
    succeed(lockstep(&arguments, &[SMALL, &shorter].concat()));
    losses(run)
}

/// Of steps and validations.
fn losses(run: &Path) -> Vec<f64> {
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line["loss"].as_f64().or(line["val_loss"].as_f64())).collect()
}

/// Dropout included: masks are drawn by the same rule everywhere.
#[test]
fn a_gpu_computes_what_the_cpu_does() {
    let Some(adapter) = adapter("a_gpu_computes_what_the_cpu_does") else { return };
    let dir = tempfile::tempdir().unwrap();
    let [gpu, twice, cpu] = ["gpu", "twice", "cpu"].map(|name| dir.path().join(name));
    let (on_gpu, on_cpu) = (train(&gpu, "wgpu:0", "1"), train(&cpu, "cpu", "1"));
    assert_eq!((on_gpu.len(), on_cpu.len()), (15, 15)); // twelve steps, three validations
    let errors = on_gpu.iter().zip(&on_cpu).map(|(gpu, cpu)| (gpu / cpu - 1.0).abs());
    let worst = errors.fold(0.0, f64::max);
    println!("{adapter}: losses differ from the CPU's by at most {worst:.1e}");
    assert!(worst <= LOSS_TOLERANCE, "{on_gpu:?} is not {on_cpu:?}");

    train(&twice, "wgpu:0", "2");
    assert_eq!(fingerprint(&twice), fingerprint(&gpu), "two workers on {adapter}");

    let generate = |device: &str| {
        let arguments =
            ["generate", "--run", path(&gpu), "--device", device, "--prompt", "And God said", "--temperature", "0"];
        text(&succeed(lockstep(&[&arguments[..], &["--tokens", "40", "--samples", "2"]].concat(), &[])).stdout)
    };
    assert_eq!(generate("wgpu:0"), generate("cpu"), "beyond the context, too, on {adapter}");
}

#[test]
fn adapters_on_a_gpu_are_as_on_the_cpu() {
    let Some(adapter) = adapter("adapters_on_a_gpu_are_as_on_the_cpu") else { return };
    let dir = tempfile::tempdir().unwrap();
    let [base, gpu, twice, cpu] = ["base", "gpu", "twice", "cpu"].map(|name| dir.path().join(name));
    train(&base, "cpu", "1");
    let init = format!("init={}", path(&base));
    let adapters = |run: &Path, device: &str, workers: &str| {
        let arguments = ["train", "--device", device, "--workers", workers, "--threads", "1", "--run", path(run)];
        succeed(lockstep(&arguments, &[SMALL, &["schedule.steps=12", "adapters.rank=4", &init]].concat()));
        losses(run)
    };
    let (on_gpu, on_cpu) = (adapters(&gpu, "wgpu:0", "1"), adapters(&cpu, "cpu", "1"));
    let worst = on_gpu.iter().zip(&on_cpu).map(|(gpu, cpu)| (gpu / cpu - 1.0).abs()).fold(0.0, f64::max);
    assert!(worst <= LOSS_TOLERANCE && on_gpu.len() == 15, "{on_gpu:?} is not {on_cpu:?}");
    println!("{adapter}: with adapters, losses differ from the CPU's by at most {worst:.1e}");
    adapters(&twice, "wgpu:0", "2");
    assert_eq!(fingerprint(&twice), fingerprint(&gpu), "two workers on {adapter}");
}

/// Attention scores of 34 GB are more than any adapter takes in one piece.
#[test]
fn a_step_too_large_for_the_adapter_is_said() {
    let Some(adapter) = adapter("a_step_too_large_for_the_adapter_is_said") else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("large");
    let large = ["model.layers=1", "model.width=8", "model.heads=8", "model.context=4096"];
    let step = ["batch.slots=1", "batch.sequences_per_slot=64"];
    let arguments = ["train", "--device", "wgpu:0", "--workers", "1", "--run", path(&run)];
    let said = fail(lockstep(&arguments, &[large.as_slice(), &step].concat()), 1);
    for expected in ["worker 1 cannot work", &adapter, "lower batch.sequences_per_slot", "--device cpu"] {
        assert!(said.contains(expected), "{expected:?} is not in: {said}");
    }
}

/// WGSL, which this build hands to adapters, has no bf16.
#[cfg(not(feature = "gpu-tuned"))]
#[test]
fn an_adapter_without_bf16_takes_no_part_in_a_run_that_wants_it() {
    let Some(adapter) = adapter("an_adapter_without_bf16_takes_no_part_in_a_run_that_wants_it") else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("bf16");
    let arguments = ["train", "--device", "wgpu:0", "--workers", "1", "--run", path(&run)];
    let said = fail(lockstep(&arguments, &[SMALL, &["compute.precision=bf16"]].concat()), 1);
    for expected in ["worker 1 cannot work", "does not multiply bf16", "--device cpu", "compute.precision = \"f32\""] {
        assert!(said.contains(expected), "{expected:?} is not in what {adapter} leads to: {said}");
    }
}

#[test]
fn an_adapter_that_is_not_there_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("nowhere");
    let said = fail(lockstep(&["train", "line", "--device", "wgpu:1000", "--run", path(&run)], &[]), 1);
    assert!(said.contains("there is no wgpu adapter 1000") && said.contains("lockstep devices"), "{said}");
}
