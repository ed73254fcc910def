//! A trace shows one step over all processes.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::cluster::{SMALL, lockstep, path, succeed};

#[test]
fn one_step_is_one_trace_over_three_processes() {
    let dir = tempfile::tempdir().unwrap();
    let (run, trace) = (dir.path().join("run"), dir.path().join("trace.json"));
    let arguments = ["train", "quickstart", "--device", "cpu", "--run", path(&run), "--trace", path(&trace)];
    // The run waits for both workers, so that each takes part.
    succeed(lockstep(&arguments, &[SMALL, &["cluster.min_workers=2"]].concat()));

    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    // One that both workers had a share in and handed in: where one of them is fast enough to have the other's ready sooner,
    // too, that one's lease is taken back, and ends wherever it is.
    let of_step = |step: u64| events.iter().filter(move |event| event["ph"] == "X" && event["args"]["step"] == step);
    let is_handed_in = |step: u64, lease: &Value| {
        let mut uploads = of_step(step).filter(|event| event["name"] == "upload");
        uploads.any(|upload| upload["args"]["parent_span_id"] == lease["args"]["span_id"])
    };
    let is_shared = |step: &u64| {
        let leases: Vec<&Value> = of_step(*step).filter(|event| event["name"] == "lease").collect();
        leases.iter().any(|lease| lease["pid"] != leases[0]["pid"])
            && leases.iter().all(|lease| is_handed_in(*step, lease))
    };
    let number = (10..=24).find(is_shared).expect("a step that both workers had a share in");
    let mut by_trace: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for event in of_step(number) {
        by_trace.entry(event["args"]["trace_id"].as_str().unwrap()).or_default().push(event);
    }
    assert_eq!(by_trace.len(), 1, "a step is one trace");
    let spans = by_trace.into_values().next().unwrap();
    let processes: std::collections::BTreeSet<u64> = spans.iter().map(|span| span["pid"].as_u64().unwrap()).collect();
    assert_eq!(processes.len(), 3, "coordinator and two workers");

    let step = spans.iter().find(|span| span["name"] == "step").expect("the step's own span");
    let id = |span: &Value, key: &str| span["args"][key].as_str().unwrap().to_string();
    let children = |parent: &Value| -> Vec<&str> {
        let of = |span: &&&Value| id(span, "parent_span_id") == id(parent, "span_id");
        spans.iter().filter(of).map(|span| span["name"].as_str().unwrap()).collect()
    };
    for name in ["lease", "reduce", "optimizer", "publish"] {
        assert!(children(step).contains(&name), "{name} is part of the step: {:?}", children(step));
    }
    for lease in spans.iter().filter(|span| span["name"] == "lease" && span["args"]["step"] == number) {
        let parts = children(lease);
        assert!(["forward", "backward"].iter().all(|name| parts.contains(name)), "{parts:?}");
    }
    assert!(spans.iter().any(|span| span["name"] == "upload"));

    // On one clock: what a worker did for the step lies within it, give or take what clocks are worth.
    let interval = |span: &Value| {
        let start = span["ts"].as_f64().unwrap();
        (start, start + span["dur"].as_f64().unwrap())
    };
    let (begin, end) = interval(step);
    for span in spans.iter().filter(|span| span["name"] == "forward") {
        let (first, last) = interval(span);
        assert!(first > begin - 5e3 && last < end + 5e3, "forward at {first}..{last}, step at {begin}..{end}");
    }
}
