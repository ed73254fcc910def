//! Faults that befall real processes, at moments drawn from a seed: the run ends as the quiet one does, to the bit.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use lockstep_model::random::{Draws, Stream};
use serde_json::Value;

use crate::cluster::{
    Running, SMALL, coordinator, fingerprint, lockstep, logged_steps, path, send_signal, succeed, text, worker_with,
};
use crate::proxy::Proxy;

const STEPS: u64 = 200;
/// A line is printed each so many steps: moments are seen there.
const EVERY: u64 = STEPS / 20;
const OVERRIDES: &[&str] = &[
    "schedule.steps=200",
    "evaluation.every_steps=50",
    "checkpoint.every_steps=7",
    "cluster.heartbeat_interval_ms=100",
    "cluster.liveness_timeout_ms=1500",
];
/// Runs of each kind of fault.
const SEEDS: std::ops::Range<u64> = 1..4;
const WORKERS: u32 = 3;
/// A run that takes longer hangs, and is ended so that the test fails.
const PATIENCE: Duration = Duration::from_secs(180);

/// Workers die in the middle of a step, and others take their places.
#[test]
fn killed_workers() {
    each_seed("killed workers", |story, cluster| {
        for step in story.moments(2) {
            cluster.coordinator.wait_for(&at(step));
            let victim = story.below(cluster.workers.len() as u64) as usize;
            story.tell(format!("step {step}: kill -9 of worker process {victim}"));
            cluster.workers[victim].kill();
            cluster.coordinator.wait_for(" left: ");
            cluster.workers.remove(victim);
            cluster.add_worker(story);
        }
    });
}

/// A worker that stands still is no worker after a while; awake again, it takes part anew.
#[test]
fn stopped_workers() {
    each_seed("stopped workers", |story, cluster| {
        for step in story.moments(2) {
            cluster.coordinator.wait_for(&at(step));
            let victim = story.below(cluster.workers.len() as u64) as usize;
            story.tell(format!("step {step}: SIGSTOP of worker process {victim}"));
            cluster.workers[victim].signal("STOP");
            cluster.coordinator.wait_for(&at(step + EVERY));
            story.tell(format!("step {}: SIGCONT", step + EVERY));
            cluster.workers[victim].signal("CONT");
        }
    });
}

/// A coordinator that stands still, for a moment or until its workers give it up, first hears what was said meanwhile.
#[test]
fn a_stopped_coordinator() {
    each_seed("a stopped coordinator", |story, cluster| {
        for (step, long) in story.moments(2).into_iter().zip([false, true]) {
            cluster.coordinator.wait_for(&at(step));
            story.tell(format!("step {step}: SIGSTOP of the coordinator, {}", if long { "long" } else { "short" }));
            cluster.coordinator.signal("STOP");
            if long {
                cluster.workers[0].wait_for("no connection");
            }
            story.tell("SIGCONT".into());
            cluster.coordinator.signal("CONT");
        }
    });
}

/// A coordinator that dies is started again by hand, where it was; its workers find it.
#[test]
fn a_coordinator_killed_and_resumed() {
    each_seed("a coordinator killed and resumed by hand", |story, cluster| {
        for step in story.moments(2) {
            cluster.coordinator.wait_for(&at(step));
            story.tell(format!("step {step}: kill -9 of the coordinator"));
            cluster.coordinator.kill();
            story.tell("coordinator --resume on the same port".into());
            cluster.resume(story);
        }
    });
}

/// Under `train` nobody has to start it again.
#[cfg(target_os = "linux")]
#[test]
fn a_coordinator_killed_under_train() {
    for seed in SEEDS {
        let mut story = Story::begin("a coordinator killed under train", seed);
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let arguments = ["train", "quickstart", "--device", "cpu", "--workers", "2", "--run", path(&run)];
        let mut train = Running::start(lockstep(&arguments, &[SMALL, OVERRIDES].concat()));
        story.watch(train.id());
        for step in story.moments(2) {
            train.wait_for(&at(step));
            story.tell(format!("step {step}: kill -9 of the coordinator"));
            kill_coordinator_of(&train);
            train.wait_for("starting it again");
        }
        assert_eq!(train.wait(), Some(0), "{}", train.said);
        story.ends_quietly(&run);
    }
}

/// Kills the coordinator of `train` as `kill -9` does.
#[cfg(target_os = "linux")]
fn kill_coordinator_of(train: &Running) {
    let is_coordinator = |id: &u32| {
        let command = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).any(|argument| argument == b"coordinator")
    };
    let mut children = crate::cluster::children(train.id()).into_iter();
    send_signal(children.find(is_coordinator).expect("train has a coordinator"), "KILL");
}

/// A coordinator that dies at the same place again and again is not started for ever.
#[cfg(target_os = "linux")]
#[test]
fn a_coordinator_that_gets_nowhere_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let arguments = ["train", "quickstart", "--device", "cpu", "--workers", "1", "--run", path(&run)];
    let endless = ["schedule.steps=1000000", "checkpoint.every_steps=0", "checkpoint.every_secs=0"];
    let mut train = Running::start(lockstep(&arguments, &[SMALL, OVERRIDES, &endless].concat()));
    for _ in 0..3 {
        train.wait_for(" joined: ");
        kill_coordinator_of(&train);
        train.wait_for("the coordinator ended");
    }
    assert_eq!(train.wait(), Some(1), "{}", train.said);
    let given_up = "the coordinator ended 3 times (signal: 9 (SIGKILL)) after it went on from step 0, before a newer";
    assert!(train.said.contains(given_up), "{}", train.said);
}

/// All of it by itself, and an account of it.
#[test]
fn chaos_under_train() {
    for seed in SEEDS {
        let mut story = Story::begin("train --chaos", seed);
        let dir = tempfile::tempdir().unwrap();
        let (run, seed) = (dir.path().join("run"), seed.to_string());
        let arguments = ["train", "quickstart", "--device", "cpu", "--workers", "3", "--run", path(&run)];
        let chaos = ["--chaos", &seed, "--chaos-every", "0.3"];
        let output = succeed(lockstep(&[&arguments[..], &chaos].concat(), &[SMALL, OVERRIDES].concat()));
        let (said, account) = (text(&output.stderr), text(&output.stdout));
        said.lines().filter(|line| line.starts_with("chaos: ")).for_each(|line| story.tell(line.into()));
        story.ends_quietly(&run);
        let value = |name: &str| -> String {
            let line = account.lines().find_map(|line| line.strip_prefix(name)).expect("the account is whole");
            line.split_whitespace().next().expect("a value").trim_end_matches(':').into()
        };
        assert_eq!(value("faults "), story.done.len().to_string(), "{account}{said}");
        assert!(!story.done.is_empty(), "{account}{said}");
        assert_eq!(value("params_sha256"), quiet()["params_sha256"].as_str().unwrap());
    }
}

/// A connection that breaks is no worker that died, but its work goes to others all the same.
#[test]
fn cut_connections() {
    each_seed("cut connections", |story, cluster| {
        for step in story.moments(3) {
            cluster.coordinator.wait_for(&at(step));
            let links = cluster.proxy.open_links();
            let Some(link) = links.get(story.below(links.len() as u64) as usize) else { continue };
            story.tell(format!("step {step}: connection {link} is cut"));
            cluster.proxy.cut(*link);
        }
        cluster.coordinator.wait_for(" left: ");
    });
}

/// What comes late, by a moment or so late that nobody waits for it any more, counts once or not at all.
#[test]
fn delayed_connections() {
    each_seed("delayed connections", |story, cluster| {
        for (step, long) in story.moments(2).into_iter().zip([false, true]) {
            cluster.coordinator.wait_for(&at(step));
            let links = cluster.proxy.open_links();
            let link = links[story.below(links.len() as u64) as usize];
            story.tell(format!("step {step}: connection {link} is held up, {}", if long { "long" } else { "short" }));
            cluster.proxy.hold(link);
            if long {
                cluster.coordinator.wait_for(&at(step + EVERY));
            } else {
                // Heartbeats of the others, at the least.
                cluster.proxy.wait_for_passing(2 + story.below(8));
            }
            story.tell(format!("connection {link} goes on"));
            cluster.proxy.let_go(link);
        }
    });
}

/// Runs a cluster for each seed, lets `happen` what is to happen, and compares the end.
fn each_seed(kind: &'static str, happen: impl Fn(&mut Story, &mut Cluster)) {
    for seed in SEEDS {
        let mut story = Story::begin(kind, seed);
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Cluster::start(&mut story, dir.path());
        happen(&mut story, &mut cluster);
        assert_eq!(cluster.coordinator.wait(), Some(0), "{}", cluster.coordinator.said);
        story.ends_quietly(&cluster.run);
    }
}

/// The end of the run that nothing happens to.
fn quiet() -> &'static Value {
    static QUIET: OnceLock<Value> = OnceLock::new();
    QUIET.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("quiet");
        let arguments = ["train", "quickstart", "--device", "cpu", "--workers", "2", "--run", path(&run)];
        succeed(lockstep(&arguments, &[SMALL, OVERRIDES].concat()));
        fingerprint(&run)
    })
}

/// What is printed when a step has been taken.
fn at(step: u64) -> String {
    format!("step {step}/{STEPS} ")
}

/// A coordinator, a proxy before it, and workers that reach it through the proxy.
struct Cluster {
    run: PathBuf,
    address: String,
    coordinator: Running,
    proxy: Proxy,
    workers: Vec<Running>,
    started: u32,
}

impl Cluster {
    fn start(story: &mut Story, dir: &Path) -> Self {
        let run = dir.join("run");
        let (coordinator, address) = coordinator("quickstart", &run, &[], &[SMALL, OVERRIDES].concat());
        story.watch(coordinator.id());
        let proxy = Proxy::before(&address);
        let mut cluster = Self { run, address, coordinator, proxy, workers: Vec::new(), started: 0 };
        (0..WORKERS).for_each(|_| cluster.add_worker(story));
        cluster
    }

    fn add_worker(&mut self, story: &mut Story) {
        self.started += 1;
        // Vectors of one in two pass through the proxy, too.
        let more: &[&str] = if self.started.is_multiple_of(2) { &["--no-shared-memory"] } else { &[] };
        let worker = worker_with(&self.proxy.address, &format!("worker-{}", self.started), more);
        story.watch(worker.id());
        self.workers.push(worker);
    }

    fn resume(&mut self, story: &mut Story) {
        let arguments = ["coordinator", "--listen", &self.address, "--run", path(&self.run), "--resume"];
        self.coordinator = Running::start(lockstep(&arguments, &[]));
        story.watch(self.coordinator.id());
        self.coordinator.wait_for("listening on");
    }
}

/// What a seed does to a run; told where the run does not end as it should.
struct Story {
    kind: &'static str,
    seed: u64,
    draws: Draws,
    drawn: u64,
    done: Vec<String>,
    /// Processes to end if the run hangs.
    watched: Arc<Mutex<Vec<u32>>>,
    /// Dropped with this story, which ends the watch.
    _watch: Sender<()>,
}

impl Story {
    fn begin(kind: &'static str, seed: u64) -> Self {
        quiet();
        let watched = Arc::<Mutex<Vec<u32>>>::default();
        let (watch, over) = channel();
        let processes = watched.clone();
        std::thread::spawn(move || {
            if over.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{kind}, seed {seed}: not over after {PATIENCE:?}; ending it");
                processes.lock().unwrap().iter().for_each(|id| send_signal(*id, "KILL"));
            }
        });
        let draws = Draws::new(seed, Stream::Faults);
        Self { kind, seed, draws, drawn: 0, done: Vec::new(), watched, _watch: watch }
    }

    fn watch(&mut self, process: u32) {
        self.watched.lock().unwrap().push(process);
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        self.draws.below(0, self.drawn, bound)
    }

    /// So many steps in order, far enough apart for what happens at one not to last until the next.
    fn moments(&mut self, number: u64) -> Vec<u64> {
        let apart = STEPS * 3 / 4 / EVERY / number;
        (0..number).map(|moment| (moment * apart + 1 + self.below(apart - 1)) * EVERY).collect()
    }

    fn tell(&mut self, done: String) {
        self.done.push(done);
    }

    fn ends_quietly(&self, run: &Path) {
        assert_eq!(fingerprint(run), *quiet(), "another run than the quiet one");
        assert_eq!(logged_steps(run), (1..=STEPS).collect::<Vec<u64>>(), "each step is logged once");
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}, seed {}:\n  {}", self.kind, self.seed, self.done.join("\n  "));
        }
    }
}
