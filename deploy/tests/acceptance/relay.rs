//! Relays between coordinator and workers: the same run at any depth, in every mode, and through the death of any of them, at
//! a share of the traffic.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::cluster::{
    Running, SMALL, coordinator, fail, fingerprint, lockstep, logged_steps, path, relay, relay_at, succeed, text,
    worker, worker_with,
};
use crate::preferences;

const BY_NETWORK: &[&str] = &["--no-shared-memory"];

/// `lockstep status --json`.
fn status(address: &str) -> Value {
    serde_json::from_slice(&succeed(lockstep(&["status", address, "--json"], &[])).stdout).expect("status prints JSON")
}

/// A run, in a directory of its own for each kind of cluster.
struct Kind<'a> {
    dir: &'a Path,
    recipe: &'a str,
    sets: Vec<&'a str>,
}

impl Kind<'_> {
    fn run(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{}-{name}", self.recipe))
    }

    /// By one worker, without a relay.
    fn quiet(&self) -> Value {
        let run = self.run("quiet");
        let arguments = ["train", self.recipe, "--device", "cpu", "--workers", "1", "--run", path(&run)];
        succeed(lockstep(&arguments, &self.sets));
        fingerprint(&run)
    }

    /// By whatever `start` starts for the coordinator, which begins once so many workers are there. All end well.
    fn by(&self, name: &str, workers: u32, start: impl FnOnce(&str) -> Vec<Running>) -> Value {
        let (run, workers) = (self.run(name), format!("cluster.min_workers={workers}"));
        let (mut coordinator, address) = coordinator(self.recipe, &run, &[], &[&self.sets[..], &[&workers]].concat());
        let mut others = start(&address);
        assert_eq!(coordinator.wait(), Some(0), "{name}: {}", coordinator.said);
        for other in &mut others {
            assert_eq!(other.wait(), Some(0), "{name}: {}", other.said);
        }
        succeed(lockstep(&["verify", path(&run)], &[]));
        fingerprint(&run)
    }
}

/// A relay of two beside a worker.
fn one_relay(address: &str) -> Vec<Running> {
    let (relay, below) = relay(address, "relay", &[]);
    vec![relay, worker(&below, "a"), worker_with(&below, "b", BY_NETWORK), worker(address, "c")]
}

/// Two relays of two, all vectors by the network.
fn two_relays(address: &str) -> Vec<Running> {
    let ((one, below_one), (other, below_other)) =
        (relay(address, "one", BY_NETWORK), relay(address, "other", BY_NETWORK));
    let workers = [(&below_one, "a"), (&below_one, "b"), (&below_other, "c"), (&below_other, "d")];
    let workers = workers.map(|(below, name)| worker_with(below, name, BY_NETWORK));
    [one, other].into_iter().chain(workers).collect()
}

/// A relay of one, and of a relay of two.
fn a_relay_behind_a_relay(address: &str) -> Vec<Running> {
    let (outer, below_outer) = relay(address, "outer", BY_NETWORK);
    let (inner, below_inner) = relay(&below_outer, "inner", &[]);
    vec![outer, inner, worker(&below_outer, "a"), worker_with(&below_inner, "b", BY_NETWORK), worker(&below_inner, "c")]
}

/// With dropout and evaluations, whose slots each count by themselves.
#[test]
fn the_run_is_the_same_at_any_depth() {
    let dir = tempfile::tempdir().unwrap();
    let kind = Kind { dir: dir.path(), recipe: "quickstart", sets: SMALL.to_vec() };
    let quiet = kind.quiet();
    assert_eq!(kind.by("one", 3, one_relay), quiet);
    assert_eq!(kind.by("two", 4, two_relays), quiet);
    assert_eq!(kind.by("deep", 3, a_relay_behind_a_relay), quiet);
}

/// Gradients are rounded at each node, wherever that is, and parameters passed on as differences.
#[test]
fn so_it_is_with_compressed_vectors() {
    let dir = tempfile::tempdir().unwrap();
    for (number, mode) in [["int8", "bf16"], ["bf16", "f32"]].into_iter().enumerate() {
        let dir = dir.path().join(number.to_string());
        let [gradients, parameters] = mode;
        let wire = [format!("wire.gradients={gradients}"), format!("wire.parameters={parameters}")];
        let sets = [SMALL, &[&wire[0], &wire[1], "batch.slots=7", "schedule.steps=12"]].concat();
        let kind = Kind { dir: &dir, recipe: "quickstart", sets };
        let quiet = kind.quiet();
        assert_eq!(kind.by("two", 4, two_relays), quiet, "{mode:?}");
        assert_eq!(kind.by("deep", 3, a_relay_behind_a_relay), quiet, "{mode:?}");
    }
}

/// Replicas' moments come and go through relays; a relay has as many replicas at a time as workers.
#[test]
fn so_it_is_with_replicas_and_their_moments() {
    let dir = tempfile::tempdir().unwrap();
    for moments in ["true", "false"] {
        let dir = dir.path().join(moments);
        let moments = format!("outer.keep_moments={moments}");
        let local = ["batch.local_steps=3", "schedule.steps=6", "schedule.warmup_steps=1", "evaluation.every_steps=3"];
        let kind = Kind { dir: &dir, recipe: "quickstart", sets: [SMALL, &local, &[&moments]].concat() };
        let quiet = kind.quiet();
        assert_eq!(kind.by("one", 3, one_relay), quiet, "{moments}");
        assert_eq!(kind.by("deep", 3, a_relay_behind_a_relay), quiet, "{moments}");
    }
}

/// The base of adapters is fetched once by each relay; references are numbers of rows.
#[test]
fn so_it_is_with_adapters_and_preferences() {
    let dir = tempfile::tempdir().unwrap();
    let init = format!("init={}", path(&preferences::answering(dir.path())));
    let pairs = format!("data.input={}", path(&preferences::preferences(dir.path(), "pairs.jsonl", 40)));
    let sets = [preferences::SMALL, &[&init, &pairs, "adapters.rank=2", "schedule.steps=5"]].concat();
    let kind = Kind { dir: dir.path(), recipe: "dpo", sets };
    let quiet = kind.quiet();
    assert_eq!(kind.by("two", 4, two_relays), quiet);
    assert_eq!(kind.by("deep", 3, a_relay_behind_a_relay), quiet);
}

/// A worker behind a relay, the relay, and the coordinator die in the middle of a step, one after the other.
#[test]
fn whoever_dies_the_run_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [SMALL, &["schedule.steps=40", "checkpoint.every_steps=5"]].concat();
    let kind = Kind { dir: dir.path(), recipe: "quickstart", sets: sets.clone() };
    let quiet = kind.quiet();

    let run = kind.run("torn");
    // Without the relay's workers the other one waits.
    let (mut first, address) = coordinator("quickstart", &run, &[], &[&sets[..], &["cluster.min_workers=2"]].concat());
    let (mut dying, below) = relay(&address, "relay", &[]);
    let mut behind = ["a", "b"].map(|name| worker(&below, name));
    let mut beside = worker(&address, "beside");
    first.wait_for("step 6/40");
    behind[0].kill();
    dying.wait_for("left this relay");
    first.wait_for("step 12/40");
    dying.kill();
    first.wait_for(" left: ");
    let (mut again, _) = relay_at(&address, &below, "relay", &[]);
    again.wait_for("joined this relay: b");
    first.wait_for("step 20/40");
    first.kill();
    let resume = ["coordinator", "--listen", &address, "--run", path(&run), "--resume"];
    let mut second = Running::start(lockstep(&resume, &[]));
    assert_eq!(second.wait(), Some(0), "{}", second.said);
    let [_, behind] = &mut behind;
    for ended in [&mut again, behind, &mut beside] {
        assert_eq!(ended.wait(), Some(0), "{}", ended.said);
    }
    assert_eq!(fingerprint(&run), quiet);
    assert_eq!(logged_steps(&run), (1..=40).collect::<Vec<u64>>());
    succeed(lockstep(&["verify", path(&run)], &[]));
}

/// A relay is a member while it has workers, and says what it waits for.
#[cfg(unix)]
#[test]
fn a_relay_comes_and_goes_with_its_workers() {
    let dir = tempfile::tempdir().unwrap();
    let kind = Kind { dir: dir.path(), recipe: "quickstart", sets: SMALL.to_vec() };
    let run = kind.run("left");
    let (mut coordinator, address) = coordinator("quickstart", &run, &[], &[SMALL, &["schedule.steps=20000"]].concat());
    let (mut relay, below) = relay(&address, "relay", &[]);
    let mut only = worker(&below, "only");
    coordinator.wait_for("joined: relay");
    only.wait_for("worker 1 of run");
    let shown = status(&below);
    assert_eq!((&shown["relay_of"], &shown["workers"][0]["name"]), (&address.clone().into(), &"only".into()));
    assert!(text(&succeed(lockstep(&["status", &below], &[])).stdout).contains(&format!("relay of         {address}")));
    coordinator.wait_for("step 1000/20000");
    let shown = status(&address);
    assert_eq!((&shown["workers"][0]["name"], &shown["workers"][0]["workers"]), (&"relay".into(), &1.into()));

    only.kill();
    coordinator.wait_for(" left: ");
    relay.wait_for("left this relay");
    let waiting = status(&below)["waiting_for"].as_str().unwrap().to_string();
    assert!(waiting.contains(&address), "{waiting}");
    assert_eq!(status(&address)["workers"], Value::Array(Vec::new()));
    let mut next = worker(&below, "next");
    coordinator.wait_for("joined: relay");
    next.wait_for("worker 1 of run");

    // Leaves by itself, and its worker waits for the next one.
    relay.signal("TERM");
    assert_eq!(relay.wait(), Some(0), "{}", relay.said);
    assert!(relay.said.contains("shut down"), "{}", relay.said);
    coordinator.wait_for(" left: ");
    next.wait_for("no connection");
    let (mut again, _) = relay_at(&address, &below, "relay", &[]);
    coordinator.wait_for("joined: relay");
    coordinator.signal("INT");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    assert_eq!([again.wait(), next.wait()], [Some(0); 2], "{}{}", again.said, next.said);

    let said = fail(lockstep(&["relay", "--join", &address, "--listen", "0.0.0.0:0"], &[]), 2);
    assert!(said.contains("--insecure"), "{said}");
}

/// What passes through the coordinator's link with four workers, with and without a relay.
#[cfg(unix)]
#[test]
fn one_vector_comes_in_and_one_goes_out() {
    use crate::proxy::Proxy;

    let dir = tempfile::tempdir().unwrap();
    let shape = ["model.width=96", "batch.slots=4", "evaluation.every_steps=0", "schedule.steps=20"];
    let kind = Kind { dir: dir.path(), recipe: "quickstart", sets: [SMALL, &shape].concat() };
    let (mut passed, names) = (Vec::new(), ["a", "b", "c", "d"]);
    let mut through = |name: &str, start: fn(&str, [&str; 4]) -> Vec<Running>| {
        let mut proxy = None;
        let print = kind.by(name, 4, |address| {
            let proxy = proxy.insert(Proxy::before(address));
            start(&proxy.address, names)
        });
        passed.push(proxy.expect("it was there").passed_bytes());
        print
    };
    let star = through("star", |address, names| names.map(|name| worker_with(address, name, BY_NETWORK)).into());
    let relayed = through("relayed", |address, names| {
        let (relay, below) = relay(address, "relay", BY_NETWORK);
        std::iter::once(relay).chain(names.map(|name| worker(&below, name))).collect()
    });
    assert_eq!(star, relayed);
    let [star, relayed] = passed[..] else { panic!("two were counted") };
    println!("bytes up and down with four workers: {star:?}, with a relay before them {relayed:?}");
    for (star, relayed) in star.into_iter().zip(relayed) {
        assert!(relayed * 3 < star, "{relayed} of {star}");
    }
}
