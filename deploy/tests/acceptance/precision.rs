//! Products in bf16: a run of its own, the same for everybody.

use std::path::Path;

use crate::cluster::{SMALL, fail, fingerprint, inspect, lockstep, metrics, path, succeed};

const BF16: &str = "compute.precision=bf16";

fn train(run: &Path, workers: &str, threads: &str, overrides: &[&str]) {
    let arguments = ["train", "quickstart", "--device", "cpu", "--workers", workers, "--threads", threads];
    succeed(lockstep(&[&arguments[..], &["--run", path(run)]].concat(), &[SMALL, overrides].concat()));
}

fn last_validation_loss(run: &Path) -> f64 {
    metrics(run).iter().filter_map(|line| line["val_loss"].as_f64()).next_back().unwrap()
}

#[test]
fn any_workers_give_the_same_bits_which_are_not_those_of_f32() {
    let dir = tempfile::tempdir().unwrap();
    let init = dir.path().join("plain");
    let init_key = format!("init={}", path(&init));
    let settings: [(&str, &[&str]); 4] = [
        ("plain", &[]),
        ("llama", &["model.kind=llama", "model.dropout=0.1"]),
        ("local steps", &["batch.local_steps=3", "outer.keep_moments=true"]),
        ("adapters", &["adapters.rank=4", &init_key]),
    ];
    for (name, setting) in settings {
        let run = |name: String| dir.path().join(name);
        let f32 = run(name.into());
        train(&f32, "2", "1", setting);
        let prints = [("1", "2"), ("3", "1")].map(|(workers, threads)| {
            let run = run(format!("{name} in bf16 by {workers}"));
            train(&run, workers, threads, &[setting, &[BF16]].concat());
            let off = (last_validation_loss(&run) - last_validation_loss(&f32)).abs();
            assert!(off < 0.02, "{name}: the validation loss is off by {off}");
            fingerprint(&run)
        });
        assert_eq!(prints[0], prints[1], "{name}");
        assert_ne!(prints[0]["params_sha256"], inspect(&f32)["params_sha256"], "{name}");
    }

    let run = dir.path().join("plain in bf16 by 1");
    succeed(lockstep(&["verify", path(&run)], &[]));
    succeed(lockstep(&["compare", path(&run), "--device", "cpu", "--rounds", "1", "--json"], &[]));
    let resume = ["train", "--resume", "--run", path(&run), "--device", "cpu"];
    let said = fail(lockstep(&resume, &["compute.precision=f32"]), 2);
    assert!(said.contains("compute.precision") && said.contains("may not change"), "{said}");
}
