//! `verify`: a sound run is told to be one, and whatever is tampered with is found and named.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cluster::{SMALL, coordinator, fingerprint, lockstep, path, succeed, text, worker};
use crate::running::output;

fn train(run: &Path, more: &[&str], overrides: &[&str]) {
    let arguments = [&["train", "quickstart", "--device", "cpu", "--run", path(run)], more].concat();
    succeed(lockstep(&arguments, &[SMALL, overrides].concat()));
}

/// What `verify --json` finds, and its exit status.
fn report(run: &Path) -> (Value, Option<i32>) {
    let output = output(&mut lockstep(&["verify", path(run), "--json"], &[]));
    let report = serde_json::from_slice(&output.stdout);
    (report.unwrap_or_else(|_| panic!("no JSON: {}", text(&output.stderr))), output.status.code())
}

/// The places of what is damaged and what is wrong there, one a line.
fn damage(run: &Path) -> String {
    let (report, status) = report(run);
    let line =
        |damage: &Value| format!("{}: {}\n", damage["place"].as_str().unwrap(), damage["problem"].as_str().unwrap());
    let damage: String = report["damage"].as_array().unwrap().iter().map(line).collect();
    assert_eq!(status, Some(i32::from(!damage.is_empty())), "{damage}");
    damage
}

/// Expects a sound run of `steps` steps of SMALL.
fn assert_sound(run: &Path, steps: u64) {
    assert_eq!(damage(run), "");
    let (report, _) = report(run);
    let draws = serde_json::json!({ "committed": steps * 10, "lost": 0, "repeated": 0, "different": 0 });
    assert_eq!((&report["steps"], &report["draws"]), (&steps.into(), &draws));
    assert_eq!(report["ledger_lines"], serde_json::json!({ "whole": steps, "damaged": 0 }));
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn change_byte(file: &Path, from_end: usize) {
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.len() - from_end;
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

fn change_text(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(file, text.replacen(from, to, 1)).unwrap();
}

fn change_lines(file: &Path, change: impl Fn(&mut Vec<&str>)) {
    let text = fs::read_to_string(file).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    change(&mut lines);
    fs::write(file, lines.join("\n") + "\n").unwrap();
}

fn drop_line(lines: &mut Vec<&str>, index: usize) {
    lines.remove(index);
}

/// Sentences, prepared as a corpus.
fn corpus(dir: &Path) -> PathBuf {
    let (input, out) = (dir.join("text.txt"), dir.join("corpus"));
    let sentences: String = (0..300).map(|i| format!("The {i}th little dog ran to the river.\n")).collect();
    fs::write(&input, sentences).unwrap();
    succeed(lockstep(&["prepare", path(&input), "--tokenizer", "chars", "--out", path(&out)], &[]));
    out
}

#[test]
fn a_sound_run_verifies_and_tampering_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let sound = dir.path().join("sound");
    train(&sound, &[], &[]);
    assert_sound(&sound, 24);
    let said = text(&succeed(lockstep(&["verify", path(&sound)], &[])).stdout);
    assert!(said.contains("draws lost        0\n") && said.contains("\nverified in "), "{said}");

    let tampered = |name: &str, tamper: &dyn Fn(&Path)| {
        let run = dir.path().join(name);
        copy(&sound, &run);
        tamper(&run);
        let damage = damage(&run);
        assert!(!damage.is_empty(), "{name}: not found");
        (damage, report(&run).0)
    };
    let newest = "checkpoints/step-000000024";
    let (damage, _) = tampered("tensor", &|run| change_byte(&run.join(newest).join("model.safetensors"), 9));
    assert!(damage.contains("step-000000024/model.safetensors"), "{damage}");
    let (damage, report) = tampered("manifest", &|run| {
        change_text(&run.join(newest).join("manifest.json"), "\"tokens\": 3840", "\"tokens\": 3841");
    });
    assert!(damage.contains("step-000000024/manifest.json") && damage.contains("seal"), "{damage}");
    assert_eq!(report["checkpoints"]["damaged"], 1);

    let metrics = |run: &Path| run.join("metrics.jsonl");
    let (damage, _) =
        tampered("metric", &|run| change_text(&metrics(run), "\"step\":7,\"loss\":", "\"step\":7,\"loss\":1"));
    assert!(damage.contains("metrics.jsonl: line "), "{damage}");
    let (damage, _) = tampered("no-metric", &|run| change_lines(&metrics(run), |lines| drop_line(lines, 10)));
    assert!(damage.contains("metrics.jsonl: line 11: ") && damage.contains("metrics.jsonl: step "), "{damage}");
    let (damage, _) =
        tampered("last-metric", &|run| change_lines(&metrics(run), |lines| lines.truncate(lines.len() - 1)));
    assert!(damage.contains("metrics.jsonl: its lines up to step 24"), "{damage}");

    let ledger = |run: &Path| run.join("ledger.jsonl");
    let slot = |run: &Path| {
        let lines = fs::read_to_string(ledger(run)).unwrap();
        let line: Value = serde_json::from_str(lines.lines().nth(4).unwrap()).unwrap();
        line["slots"][3].as_str().unwrap().to_string()
    };
    let (damage, report) =
        tampered("ledger", &|run| change_text(&ledger(run), &slot(run), &slot(run).chars().rev().collect::<String>()));
    assert!(damage.contains("ledger.jsonl: line 5: ") && damage.contains("ledger, step 5, slot 3: "), "{damage}");
    assert_eq!(report["draws"]["different"], 2, "the rows of one slot");
    let (damage, report) = tampered("no-ledger", &|run| change_lines(&ledger(run), |lines| drop_line(lines, 9)));
    assert!(damage.contains("ledger, step 10: "), "{damage}");
    assert_eq!((&report["draws"]["lost"], &report["draws"]["repeated"]), (&10.into(), &0.into()));
    let (damage, report) = tampered("again", &|run| change_lines(&ledger(run), |lines| lines.insert(9, lines[9])));
    assert!(damage.contains("ledger, step 10: ") && damage.contains("ledger.jsonl: line 11: "), "{damage}");
    assert_eq!((&report["draws"]["lost"], &report["draws"]["repeated"]), (&0.into(), &10.into()));
    let (damage, report) =
        tampered("absurd", &|run| change_text(&ledger(run), "\"step\":7,", "\"step\":10000000000000,"));
    assert!(damage.contains("ledger.jsonl: line 7: step 10000000000000 is not the next after step 24"), "{damage}");
    assert!(damage.contains("ledger, step 7: "), "{damage}");
    assert_eq!((&report["steps"], &report["draws"]["lost"]), (&24.into(), &10.into()));
    let (damage, _) = tampered("by", &|run| change_text(&ledger(run), "\"by\":[\"", "\"by\":[\"not "));
    assert!(damage.contains("ledger.jsonl: line 1: "), "{damage}");
    let (damage, report) = tampered("none", &|run| fs::remove_file(ledger(run)).unwrap());
    assert!(damage.contains("ledger.jsonl"), "{damage}");
    assert_eq!(report["draws"]["lost"], 240);
}

#[test]
fn a_corpus_that_changed_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = corpus(dir.path());
    let (prepared, plain) = (dir.path().join("prepared"), dir.path().join("plain"));
    let input = |path_: &Path| format!("data.input={}", path(path_));
    train(&prepared, &[], &[&input(&corpus), "tokenizer.kind=auto", "data.order=epoch"]);
    let text_file = dir.path().join("text.txt");
    train(&plain, &[], &[&input(&text_file)]);
    assert_sound(&prepared, 24);
    assert_sound(&plain, 24);

    // Elsewhere, it is the same corpus.
    let moved = dir.path().join("moved.txt");
    fs::rename(&text_file, &moved).unwrap();
    let said = damage(&plain);
    assert!(said.contains("data.input: ") && said.contains("text.txt"), "{said}");
    succeed(lockstep(&["verify", path(&plain)], &[&input(&moved)]));
    let refused = output(&mut lockstep(&["verify", path(&plain)], &["seed=2"]));
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stderr));

    change_byte(&corpus.join("shard-00000.bin"), 100);
    let said = damage(&prepared);
    assert!(said.contains("data.input: ") && said.contains("shard-00000.bin"), "{said}");
    fs::rename(&moved, &text_file).unwrap();
    change_text(&text_file, "The 7th little dog", "The 7th little god");
    let said = damage(&plain);
    assert!(said.contains("data.input: it holds other text"), "{said}");
}

#[test]
fn epochs_are_followed_window_by_window() {
    let dir = tempfile::tempdir().unwrap();
    let text_file = dir.path().join("text.txt");
    fs::write(&text_file, "0123456789abcdef".repeat(20)).unwrap();
    let run = dir.path().join("run");
    train(&run, &[], &[&format!("data.input={}", path(&text_file)), "data.order=epoch"]);
    assert_sound(&run, 24);
    // 288 of 320 characters are trained on: 17 windows of 16 and the character after; 240 draws are 14 epochs and 2.
    let windows = serde_json::json!({ "complete_epochs": 14, "repeated": 0, "left_out": 0 });
    assert_eq!(report(&run).0["windows"], windows);
}

#[test]
fn nothing_is_lost_or_repeated_when_workers_and_coordinators_die() {
    let dir = tempfile::tempdir().unwrap();
    let (run, quiet) = (dir.path().join("run"), dir.path().join("quiet"));
    train(&quiet, &["--workers", "1"], &[]);
    let (mut first, address) = coordinator("quickstart", &run, &[], SMALL);
    let mut one = worker(&address, "one");
    first.wait_for("step 2/24");
    let two = worker(&address, "two");
    first.wait_for("worker 2 joined");
    one.kill();
    first.wait_for("worker 1 left");
    first.wait_for("checkpoint ");
    first.wait_for("step ");
    first.kill();
    drop(two);
    // As it was left: steps after the newest checkpoint stand in the ledger and in the metrics.
    assert_eq!(damage(&run), "");
    train(&run, &["--workers", "2", "--resume"], &[]);
    assert_sound(&run, 24);
    assert_eq!(fingerprint(&run), fingerprint(&quiet));
}

#[cfg(unix)]
#[test]
fn a_second_coordinator_fences_off_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let (run, quiet) = (dir.path().join("run"), dir.path().join("quiet"));
    const LONG: &[&str] = &["schedule.steps=1000", "evaluation.every_steps=0", "checkpoint.every_steps=100"];
    train(&quiet, &["--workers", "1"], LONG);
    let overrides = [SMALL, LONG].concat();
    let (mut first, address) = coordinator("quickstart", &run, &[], &overrides);
    let one = worker(&address, "one");
    first.wait_for("checkpoint ");
    // It computes again once there is a second coordinator.
    one.signal("STOP");
    // As on a file system whose locks do not work.
    fs::remove_file(run.join("lock")).unwrap();
    let (mut second, address) = coordinator("quickstart", &run, &["--resume"], &overrides);
    one.signal("CONT");
    let mut two = worker(&address, "two");
    assert_eq!(first.wait(), Some(1), "{}", first.said);
    assert!(first.said.contains("start 2 of this run has taken over from start 1"), "{}", first.said);
    assert_eq!(second.wait(), Some(0), "{}", second.said);
    assert_eq!(two.wait(), Some(0), "{}", two.said);
    assert_eq!(fingerprint(&run), fingerprint(&quiet));
    assert_sound(&run, 1000);
}
