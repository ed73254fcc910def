//! Runs the `lockstep` program and what is needed to watch it.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

pub(crate) use crate::running::Running;
use crate::running::output;
#[cfg(unix)]
pub(crate) use crate::running::send_signal;

/// A small Transformer with dropout that trains in a second or two.
pub(crate) const SMALL: &[&str] = &[
    "model.layers=2",
    "model.heads=2",
    "model.width=32",
    "model.context=16",
    "model.dropout=0.1",
    "batch.slots=5",
    "batch.sequences_per_slot=2",
    "schedule.steps=24",
    "schedule.warmup_steps=4",
    "evaluation.every_steps=8",
    "evaluation.slots=7",
    "sampling.every_steps=0",
    "checkpoint.every_steps=6",
    "cluster.heartbeat_interval_ms=200",
    "cluster.liveness_timeout_ms=5000",
];

/// The program with arguments, and with `--set` for each override.
pub(crate) fn lockstep(arguments: &[&str], overrides: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.args(arguments).args(overrides.iter().flat_map(|set| ["--set", set]));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs to the end and expects success.
pub(crate) fn succeed(mut command: Command) -> Output {
    let output = output(&mut command);
    assert!(output.status.success(), "{command:?}\n{}\n{}", text(&output.stdout), text(&output.stderr));
    output
}

/// Runs to the end and expects this exit status; what was said on standard error.
pub(crate) fn fail(mut command: Command, status: i32) -> String {
    let output = output(&mut command);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{command:?}\n{said}");
    said
}

/// Bytes as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `lockstep inspect --json` of a run.
pub(crate) fn inspect(run: &Path) -> Value {
    let output = succeed(lockstep(&["inspect", path(run), "--json"], &[]));
    serde_json::from_slice(&output.stdout).expect("inspect prints JSON")
}

/// What makes two runs the same: step, parameters, optimizer state and validation loss.
pub(crate) fn fingerprint(run: &Path) -> Value {
    let shown = inspect(run);
    let keys = ["step", "params_sha256", "optimizer_sha256", "val_loss", "train_loss", "tokens"];
    keys.iter().map(|key| (key.to_string(), shown[*key].clone())).collect()
}

/// The lines of a run's metrics.
pub(crate) fn metrics(run: &Path) -> Vec<Value> {
    let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The steps that have a line there.
pub(crate) fn logged_steps(run: &Path) -> Vec<u64> {
    metrics(run).iter().filter(|line| line.get("loss").is_some()).map(|line| line["step"].as_u64().unwrap()).collect()
}

/// A path that is text, as all of ours are.
pub(crate) fn path(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// A path relative to the directory that holds `Cargo.toml` of the workspace. Asked at run time: checkouts that share
/// a target directory share this program too.
pub(crate) fn workspace(relative: &str) -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo test names the package's directory");
    Path::new(&package).parent().expect("the workspace lies above").join(relative)
}

/// Starts a program that others join, and waits for its address.
fn listening(command: Command) -> (Running, String) {
    let mut running = Running::start(command);
    let line = running.wait_for("listening on");
    let address = line.split_whitespace().find_map(|word| word.strip_suffix(';')).expect("the line names the address");
    (running, address.to_string())
}

/// A coordinator that others join, and its address.
pub(crate) fn coordinator(recipe: &str, run: &Path, more: &[&str], overrides: &[&str]) -> (Running, String) {
    let mut arguments = vec!["coordinator", recipe, "--listen", "127.0.0.1:0", "--run", path(run)];
    arguments.extend_from_slice(more);
    listening(lockstep(&arguments, overrides))
}

/// A relay of this name, and its address.
pub(crate) fn relay_at(coordinator: &str, listen: &str, name: &str, more: &[&str]) -> (Running, String) {
    let arguments = ["relay", "--join", coordinator, "--listen", listen, "--name", name];
    listening(lockstep(&[&arguments, more].concat(), &[]))
}

/// The same, on a port that is free.
pub(crate) fn relay(coordinator: &str, name: &str, more: &[&str]) -> (Running, String) {
    relay_at(coordinator, "127.0.0.1:0", name, more)
}

/// A worker of one thread on the CPU.
pub(crate) fn worker(address: &str, name: &str) -> Running {
    worker_with(address, name, &[])
}

/// The same, with more arguments.
pub(crate) fn worker_with(address: &str, name: &str, more: &[&str]) -> Running {
    let arguments = ["worker", "--join", address, "--device", "cpu", "--threads", "1", "--name", name];
    Running::start(lockstep(&[&arguments, more].concat(), &[]))
}

/// Trains into `run` by two workers, of whom the first is killed once the second is there, in the middle of `steps`.
pub(crate) fn outlive_a_worker(recipe: &str, run: &Path, steps: u64, overrides: &[&str]) {
    let (mut coordinator, address) = coordinator(recipe, run, &[], overrides);
    let mut first = worker(&address, "first");
    coordinator.wait_for(&format!("step 2/{steps}"));
    let mut second = worker(&address, "second");
    coordinator.wait_for("worker 2 joined");
    coordinator.wait_for("step ");
    first.kill();
    coordinator.wait_for("worker 1 left");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!(second.wait(), Some(0), "a released worker ends well: {}", second.said);
}

/// Processes started by any thread of `id`.
#[cfg(target_os = "linux")]
pub(crate) fn children(id: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{id}/task")).unwrap().map(|thread| thread.unwrap().path());
    let lists = threads.map(|thread| std::fs::read_to_string(thread.join("children")).unwrap_or_default());
    lists.flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>()).collect()
}

/// Whether a process is there and no zombie.
#[cfg(target_os = "linux")]
pub(crate) fn is_alive(id: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// A file or directory below `LOCKSTEP_DATA`, or `None` after saying that the test skips.
pub(crate) fn data(test: &str, relative: &str) -> Option<PathBuf> {
    let found = std::env::var_os("LOCKSTEP_DATA").map(|root| Path::new(&root).join(relative)).filter(|p| p.exists());
    if found.is_none() {
        skip(test, &format!("LOCKSTEP_DATA names no directory that holds {relative}"));
    }
    found
}

/// A Python interpreter that has these modules, or `None` after saying that the test skips.
pub(crate) fn python(test: &str, modules: &[&str]) -> Option<PathBuf> {
    let interpreter = std::env::var_os("LOCKSTEP_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    let imports: Vec<String> = modules.iter().map(|module| format!("import {module}")).collect();
    let found = Command::new(&interpreter).args(["-c", &imports.join("; ")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(interpreter);
    }
    skip(test, &format!("no Python with {} (LOCKSTEP_PYTHON names the interpreter)", modules.join(" and ")));
    None
}

/// Says that a test skips, and why: on standard error, and in the file named by `LOCKSTEP_SKIPS`.
pub(crate) fn skip(test: &str, reason: &str) {
    eprintln!("SKIPPED {test}: {reason}");
    if let Some(path) = std::env::var_os("LOCKSTEP_SKIPS") {
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| writeln!(file, "{test}: {reason}")).expect("the list of skips is writable");
    }
}
