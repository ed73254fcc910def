//! The model's arithmetic on cases that can be done by hand, and what must hold of any cluster.

use std::time::Duration;

use super::cluster::{Shape, numbers, run};
use super::link::Link;
use super::relays::Tree;
use crate::simulator::numbers::Quiet;

const GBIT: f64 = 1e9;
/// Takes a second at 1 Gbit/s.
const BYTES: f64 = 125e6;

fn secs(secs: f64) -> Duration {
    Duration::from_secs_f64(secs)
}

/// Who is done when, in seconds, if nothing else begins.
fn course(mut link: Link) -> Vec<(f64, Vec<usize>)> {
    let mut course = Vec::new();
    while let Some(at) = link.next_done() {
        let seconds = (at.as_secs_f64() * 1e6).round() / 1e6;
        course.push((seconds, link.done(at)));
    }
    course
}

#[test]
fn transfers_share_a_link() {
    let mut link = Link::new(GBIT, 10.0 * GBIT);
    link.begin(1, BYTES, secs(0.0));
    link.begin(2, BYTES, secs(0.0));
    assert!(link.clone().done(secs(1.999)).is_empty());
    assert_eq!(course(link), [(2.0, vec![1, 2])]);
}

#[test]
fn who_comes_later_slows_down_who_is_there() {
    let mut link = Link::new(GBIT, 10.0 * GBIT);
    link.begin(1, BYTES, secs(0.0));
    link.begin(2, BYTES, secs(0.5));
    assert_eq!(course(link), [(1.5, vec![1]), (2.0, vec![2])]);
}

#[test]
fn a_worker_gets_no_more_than_its_own_link_carries() {
    let mut link = Link::new(10.0 * GBIT, GBIT);
    (0..5).for_each(|worker| link.begin(worker, BYTES, secs(0.0)));
    assert_eq!(course(link.clone()), [(1.0, vec![0, 1, 2, 3, 4])]);
    (5..20).for_each(|worker| link.begin(worker, BYTES, secs(0.0)));
    let course = course(link);
    assert_eq!((course.len(), course[0].0, course[0].1.len()), (1, 2.0, 20));
}

#[test]
fn what_is_broken_off_leaves_its_part_to_others() {
    let mut link = Link::new(GBIT, 10.0 * GBIT);
    link.begin(1, BYTES, secs(0.0));
    link.begin(2, BYTES, secs(0.0));
    link.cancel(1, secs(1.0));
    assert_eq!(link.carried(), BYTES);
    assert_eq!(course(link), [(1.5, vec![2])]);
}

/// Equal workers, vectors of a second at 1 Gbit/s, slots of five, and a link of 1 Gbit/s.
fn shape(workers: u32) -> Shape {
    Shape {
        workers,
        slots_per_worker: 1,
        steps: 3,
        parameters: BYTES / 4.0,
        up_bytes: 4.0,
        down_bytes: 4.0,
        bits_per_sec: GBIT,
        worker_bits_per_sec: GBIT,
        latency: secs(0.010),
        secs_per_slot: 5.0,
        spread: 0.0,
        added_bytes_per_sec: 10.0 * BYTES,
        apply_secs: 0.25,
        heartbeat_interval: secs(10.0),
        seed: 3,
    }
}

#[test]
fn a_step_takes_what_its_links_and_workers_take() {
    for workers in [1, 2, 16, 100] {
        let course = run(&shape(workers));
        // Lease, question, parameters, gradient, acknowledgement and result travel.
        let latency = 6.0 * 0.010;
        let links = 2.0 * f64::from(workers);
        let adding = 0.1 * f64::from(workers - 1);
        let expected = latency + links + 5.0 + adding + 0.25;
        for step in &course.steps {
            assert!((step.secs - expected).abs() < 1e-4, "{workers} workers: {} s, not {expected}", step.secs);
            assert_eq!(step.blocks, u64::from(workers));
            assert!((step.compute_secs - 5.0 * f64::from(workers)).abs() < 1e-9);
            assert!((step.up_bytes - f64::from(workers) * BYTES).abs() < 1.0 && step.up_bytes == step.down_bytes);
            assert!((step.up_use - f64::from(workers) / step.secs).abs() < 1e-6);
            assert!((step.added_bytes - f64::from(workers - 1) * BYTES).abs() < 1.0);
        }
    }
}

#[test]
fn the_parameters_are_those_of_the_quiet_run() {
    for (seed, workers, slots_per_worker) in [(1, 1, 5), (2, 3, 7), (3, 50, 1), (4, 13, 4), (5, 120, 3)] {
        // Unequal workers on a fast link: blocks of several sizes, and twins.
        let unequal =
            Shape { slots_per_worker, steps: 5, spread: 0.9, seed, bits_per_sec: 1e3 * GBIT, ..shape(workers) };
        let quiet = Quiet::run(&numbers(&unequal), unequal.steps, 0);
        assert_eq!(Some(run(&unequal).params), quiet.versions.last().copied(), "seed {seed}");
    }
}

#[test]
fn ten_thousand_workers_finish_their_steps() {
    let large = Shape { steps: 2, spread: 0.3, parameters: 1e4, ..shape(10_000) };
    let course = run(&large);
    assert!(course.steps.iter().all(|step| step.blocks == 10_000 && step.secs < 60.0), "{:?}", course.steps);
    assert_eq!(Some(course.params), Quiet::run(&numbers(&large), 2, 0).versions.last().copied());
}

#[test]
fn relays_take_load_off_the_link() {
    let star = shape(64);
    let tree = |fan_out| Tree { star: star.clone(), relay_bits_per_sec: GBIT, fan_out };
    assert_eq!([2, 4, 8, 9, 63, 64].map(|fan_out| tree(fan_out).levels()), [5, 2, 1, 1, 1, 0]);
    // Eight relays of eight: two levels of links, sums and latency, one of computing and of the optimizer.
    let level = 6.0 * 0.010 + 2.0 * 8.0 + 0.1 * 7.0;
    let expected = 2.0 * level + 5.0 + 0.25;
    let steps = tree(8).run().steps;
    assert!((steps[2].secs - expected).abs() < 1e-4, "{} s, not {expected}", steps[2].secs);
    assert!(run(&star).steps[2].secs > 3.0 * steps[2].secs);
    assert_eq!(steps[2].blocks, 8);
}
