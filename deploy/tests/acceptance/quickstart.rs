//! The main job, as a newcomer runs it.

use crate::cluster::{data, inspect, lockstep, path, succeed, text};

/// What a bigram model of the same text reaches on the same validation part, nats a character. Computed, and held to this
/// value, by the unit test `builtin::tests::a_bigram_model_of_the_corpus`.
const BIGRAM_CROSS_ENTROPY: f64 = 2.340;

#[test]
fn quickstart_learns_more_than_a_bigram_and_writes() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let output = succeed(lockstep(&["train", "--device", "cpu", "--run", path(&run)], &[]));
    let shown = inspect(&run);
    let val_loss = shown["val_loss"].as_f64().unwrap();
    assert_eq!(shown["step"], shown["val_step"]);
    assert!(val_loss < BIGRAM_CROSS_ENTROPY, "{val_loss}");

    let said = text(&output.stdout) + &text(&output.stderr);
    for expected in ["step 0: sample", "In the beginning", "lockstep generate --run", "loss.svg"] {
        assert!(said.contains(expected), "{expected} is missing in:\n{said}");
    }
    for file in ["metrics.jsonl", "loss.svg", "samples.txt", "recipe.toml"] {
        assert!(run.join(file).exists(), "{file}");
    }

    let generate = |seed: &str| {
        let arguments = ["generate", "--run", path(&run), "--prompt", "And God ", "--tokens", "80", "--seed", seed];
        text(&succeed(lockstep(&[&arguments[..], &["--device", "cpu"]].concat(), &[])).stdout)
    };
    let written = generate("1");
    assert!(written.starts_with("And God ") && written.trim_end().chars().count() > 60, "{written:?}");
    assert_eq!(written, generate("1"), "a seed names one text");
    assert_ne!(written, generate("2"));
}

/// The first steps of the published reference on its own corpus: size, start value, and a loss that falls.
#[test]
fn shakespeare_starts_where_the_reference_does() {
    let file = "tinyshakespeare/input.txt";
    let Some(corpus) = data("shakespeare_starts_where_the_reference_does", file) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let input = format!("data.input={}", path(&corpus));
    let few = ["checkpoint.stop_after=40", "evaluation.slots=40", "sampling.every_steps=0", &input];
    succeed(lockstep(&["train", "shakespeare-char-cpu", "--device", "cpu", "--run", path(&run)], &few));
    let shown = inspect(&run);
    assert_eq!(shown["parameters"], 804_096);

    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    let start = first["val_loss"].as_f64().unwrap();
    assert!((4.13..4.23).contains(&start), "ln 65 = 4.174, and the reference starts at 4.17 to 4.20: {start}");
    assert!(shown["train_loss"].as_f64().unwrap() < 3.4, "{shown}");
}
