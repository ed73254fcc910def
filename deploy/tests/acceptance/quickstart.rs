//! The main job, as a newcomer runs it.

use crate::cluster::{inspect, lockstep, path, succeed, text};

/// What a bigram model of the same text reaches on the same validation part, nats a character. Computed, and held to this
/// value, by the unit test `builtin::tests::a_bigram_model_of_the_corpus`.
const BIGRAM_CROSS_ENTROPY: f64 = 2.3;

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
