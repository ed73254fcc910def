//! Who takes part, who computes what, and which results count.

use expect_test::expect;

use super::*;
use crate::engine::command::DiscardReason;

#[test]
fn the_first_worker_decides_the_class_of_an_exact_run() {
    let mut run = Run::new(config());
    expect![[r#"
        admit worker 1 of class 0101010101010101
        refuse: this worker's device class is 0202020202020202 and the run's is 0101010101010101: they compute different bits. Join with a device and build like those of the run's workers, or start the run with cluster.exact = false
        admit worker 2 of class 0101010101010101
    "#]].assert_eq(&(run.ask(1) + &run.ask(2) + &run.ask(1)));

    let classes = BTreeSet::from([DeviceClass([2; 32])]);
    let mut run = Run::new(EngineConfig {
        start: Start::Resumed {
            step: 1,
            validated: true,
            classes,
            skipped_in_a_row: 0,
            unchecked_since: BTreeMap::new(),
        },
        ..config()
    });
    expect![[r#"
        refuse: this worker's device class is 0101010101010101 and the run's is 0202020202020202: they compute different bits. Join with a device and build like those of the run's workers, or start the run with cluster.exact = false
        admit worker 1 of class 0202020202020202
    "#]].assert_eq(&(run.ask(1) + &run.ask(2)));
}

#[test]
fn an_inexact_run_collects_classes() {
    let mut run = Run::new(EngineConfig { exact: false, ..config() });
    run.ask(1);
    run.ask(2);
    assert_eq!(run.engine.status().classes, [DeviceClass([1; 32]), DeviceClass([2; 32])]);
    assert_eq!(run.engine.status().members.len(), 2);
}

#[test]
fn work_starts_with_enough_workers_and_pauses_without() {
    let mut run = Run::new(EngineConfig { min_workers: 2, ..config() });
    expect!["its first event"].assert_eq(&run.waiting_for());
    run.ask(7);
    expect!["worker 1 (host-1) to open its control stream"].assert_eq(&run.waiting_for());
    assert_eq!(run.open(1), "");
    expect!["1 more worker (cluster.min_workers = 2)"].assert_eq(&run.waiting_for());
    expect![[r#"
        admit worker 2 of class 0707070707070707
        worker 1: lease 1: gradient of block 1/0 of step 1 with version 0
        worker 2: lease 2: gradient of block 1/1 of step 1 with version 0
    "#]]
    .assert_eq(&run.join());
    expect!["worker 1 (host-1) to finish slots 0-1 of step 1, worker 2 (host-2) to finish slots 2-3 of step 1"]
        .assert_eq(&run.waiting_for());
    // The one who remains finishes what it has, and gets no more.
    expect![[r#"
        discard lease 2 of worker 2: the worker left
        report: paused: 1 more worker needed
    "#]]
    .assert_eq(&run.close(2));
    expect!["worker 1 (host-1) to finish slots 0-1 of step 1, 1 more worker (cluster.min_workers = 2)"]
        .assert_eq(&run.waiting_for());
    expect![[r#"
        accept lease 1 of worker 1: block 1/0 of step 1
    "#]]
    .assert_eq(&run.done(1));
    expect!["1 more worker (cluster.min_workers = 2)"].assert_eq(&run.waiting_for());
    expect![[r#"
        admit worker 3 of class 0707070707070707
        report: enough workers are here again
        worker 1: lease 3: gradient of block 0/2 of step 1 with version 0
        worker 3: lease 4: gradient of block 0/3 of step 1 with version 0
    "#]]
    .assert_eq(&run.join());
}

#[test]
fn faster_workers_get_larger_blocks() {
    let mut run = Run::new(EngineConfig { total_steps: 3, slots: 8, ..config() });
    run.join();
    run.join();
    // Worker 1 had all eight slots, worker 2 none: it counts as fast as the other until it is measured.
    run.done_in(1, 8);
    expect![[r#"
        worker 1: lease 2: gradient of block 2/0 of step 2 with version 1
        worker 2: lease 3: gradient of block 2/1 of step 2 with version 1
    "#]]
    .assert_eq(&run.applied(1));
    run.done_in(1, 1);
    run.done_in(2, 8);
    let speeds: Vec<_> = run.engine.status().members.iter().map(|member| member.slots_per_sec).collect();
    expect!["[Some(1.9), Some(0.5)]"].assert_eq(&format!("{speeds:?}"));
    expect![[r#"
        worker 1: lease 4: gradient of block 2/0 of step 3 with version 2
        worker 2: lease 5: gradient of block 0/4 of step 3 with version 2
    "#]]
    .assert_eq(&run.applied(2));
}

#[test]
fn no_lease_is_larger_than_a_message_may_be() {
    let mut run = Run::new(EngineConfig { max_slots_per_lease: 2, ..config() });
    expect![[r#"
        admit worker 1 of class 0707070707070707
        worker 1: lease 1: gradient of block 1/0 of step 1 with version 0
        accept lease 1 of worker 1: block 1/0 of step 1
        worker 1: lease 2: gradient of block 1/1 of step 1 with version 0
    "#]]
    .assert_eq(&(run.join() + &run.done(1)));
}

#[test]
fn the_blocks_of_one_who_leaves_are_leased_again() {
    let mut run = Run::new(EngineConfig { min_workers: 2, ..config() });
    run.join();
    run.join();
    run.join();
    assert_eq!(run.engine.status().counts.blocks_leased_again, 0);
    expect![[r#"
        discard lease 1 of worker 1: the worker left
        worker 3: lease 3: gradient of block 0/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.close(1));
    assert_eq!(run.engine.status().counts.blocks_leased_again, 1);
    assert_eq!(run.close(1), "");
}

#[test]
fn one_who_is_silent_is_given_up() {
    let mut run = Run::new(EngineConfig { min_workers: 2, ..config() });
    run.join();
    run.join();
    run.ask(7);
    run.pass(6);
    run.send(Event::Heartbeat { worker: WorkerId(2) });
    assert_eq!(run.engine.next_deadline(), Some(Time(Duration::from_secs(10))));
    run.pass(3);
    assert_eq!(run.tick(), "");
    run.pass(1);
    expect![[r#"
        discard lease 1 of worker 1: the worker fell silent
        disconnect worker 1: nothing was heard from it for 10.0 s
        disconnect worker 3: it did not open its control stream within 10.0 s
        report: paused: 1 more worker needed
    "#]]
    .assert_eq(&run.tick());
    assert_eq!(run.engine.next_deadline(), Some(Time(Duration::from_secs(16))));
    // What it sends from now on is too late.
    expect![[r#"
        discard lease 1 of worker 1: the worker is not, or no longer, a member
    "#]]
    .assert_eq(&run.done(1));
    expect![[r#"
        disconnect worker 1: it is not, or no longer, a member; it may join again
    "#]]
    .assert_eq(&run.open(1));
}

#[test]
fn silence_is_judged_after_what_is_queued_was_heard() {
    let mut run = Run::new(config());
    run.join();
    run.pass(100);
    assert_eq!(run.send(Event::Heartbeat { worker: WorkerId(1) }), "");
    assert_eq!(run.tick(), "");
}

#[test]
fn a_declined_block_goes_to_somebody_else() {
    let mut run = Run::new(EngineConfig { min_workers: 2, ..config() });
    run.join();
    run.join();
    expect![[r#"
        discard lease 1 of worker 1: the worker declined it
    "#]]
    .assert_eq(&run.decline(1));
    expect![[r#"
        accept lease 2 of worker 2: block 1/1 of step 1
        worker 2: lease 3: gradient of block 0/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.done(2));
    // Where everybody declined it, everybody may try again.
    expect![[r#"
        discard lease 3 of worker 2: the worker declined it
        worker 1: lease 4: gradient of block 0/0 of step 1 with version 0
        worker 2: lease 5: gradient of block 0/1 of step 1 with version 0
    "#]]
    .assert_eq(&run.decline(2));
}

#[test]
fn who_declines_everything_is_released() {
    let mut run = Run::new(EngineConfig { slots: 8, max_slots_per_lease: 1, ..config() });
    run.join();
    run.join();
    let declined = run.decline(2) + &run.decline(2) + &run.decline(2);
    expect![[r#"
        discard lease 2 of worker 2: the worker declined it
        worker 2: lease 3: gradient of block 0/2 of step 1 with version 0
        discard lease 3 of worker 2: the worker declined it
        worker 2: lease 4: gradient of block 0/3 of step 1 with version 0
        discard lease 4 of worker 2: the worker declined it
        release worker 2: declined 3 leases in a row, the last because: out of memory
    "#]]
    .assert_eq(&declined);
}

#[test]
fn a_run_whose_last_worker_declines_everything_fails() {
    let mut run = Run::new(config());
    run.join();
    run.done(1);
    run.applied(1);
    let declined = run.decline(1) + &run.decline(1) + &run.decline(1);
    expect![[r#"
        discard lease 2 of worker 1: the worker declined it
        worker 1: lease 3: gradient of block 2/0 of step 2 with version 1
        discard lease 3 of worker 1: the worker declined it
        worker 1: lease 4: gradient of block 2/0 of step 2 with version 1
        discard lease 4 of worker 1: the worker declined it
        release worker 1: declined 3 leases in a row, the last because: out of memory
        checkpoint step 1
    "#]]
    .assert_eq(&declined);
    expect![[r#"
        finish at step 1: the run failed: the last worker, host-1, declined every lease, the last because: out of memory
    "#]]
    .assert_eq(&run.written(1));
}

#[test]
fn a_result_counts_once() {
    let mut run = Run::new(EngineConfig { max_slots_per_lease: 2, ..config() });
    run.join();
    let first = run.answer_of(1);
    run.done(1);
    expect![[r#"
        discard lease 1 of worker 1: its slots are counted already
    "#]]
    .assert_eq(&run.send(Event::BlockDone(first.clone())));
    run.done(1);
    run.applied(1);
    expect![[r#"
        discard lease 1 of worker 1: it is for another step, version or task than the one under way
    "#]]
    .assert_eq(&run.send(Event::BlockDone(first)));
    let discards = run.engine.status().discards;
    assert_eq!(discards, BTreeMap::from([(DiscardReason::AlreadyCounted, 1), (DiscardReason::Stale, 1)]));
}

#[test]
fn a_result_counts_under_the_workers_own_lease_alone() {
    let mut run = Run::new(EngineConfig { min_workers: 2, ..config() });
    run.join();
    run.join();
    let stolen = BlockDone { worker: WorkerId(2), ..run.answer_of(1) };
    expect![[r#"
        discard lease 1 of worker 2: the worker does not hold this lease
    "#]]
    .assert_eq(&run.send(Event::BlockDone(stolen)));
    let invented = BlockDone { lease: LeaseId(99), ..run.answer_of(1) };
    expect![[r#"
        discard lease 99 of worker 1: the worker does not hold this lease
    "#]]
    .assert_eq(&run.send(Event::BlockDone(invented)));
    let overflowing = BlockDone { lease: LeaseId(99), block: Block { level: 77, index: 1 }, ..run.answer_of(1) };
    expect![[r#"
        discard lease 99 of worker 1: the worker does not hold this lease
    "#]]
    .assert_eq(&run.send(Event::BlockDone(overflowing)));
}

#[test]
fn a_result_that_does_not_fit_its_lease_counts_as_declined() {
    let mut run = Run::new(EngineConfig { min_workers: 2, ..config() });
    run.join();
    run.join();
    let other_block = BlockDone { block: Block::leaf(3), ..run.answer_of(1) };
    expect![[r#"
        discard lease 1 of worker 1: it does not fit its lease
    "#]]
    .assert_eq(&run.send(Event::BlockDone(other_block)));
    run.done(2);
    let other_version = BlockDone { version: 5, ..run.answer_of(2) };
    expect![[r#"
        discard lease 3 of worker 2: it is for another step, version or task than the one under way
        worker 1: lease 4: gradient of block 0/0 of step 1 with version 0
        worker 2: lease 5: gradient of block 0/1 of step 1 with version 0
    "#]]
    .assert_eq(&run.send(Event::BlockDone(other_version)));
    let no_vector = BlockDone { digest: None, ..run.answer_of(1) };
    expect![[r#"
        discard lease 4 of worker 1: it does not fit its lease
        worker 1: lease 6: gradient of block 0/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.send(Event::BlockDone(no_vector)));
}

#[test]
fn a_loss_that_is_not_finite_is_passed_on() {
    let mut run = Run::new(config());
    run.join();
    let mut done = run.answer_of(1);
    done.sums.loss = f64::NAN;
    expect![[r#"
        accept lease 1 of worker 1: block 2/0 of step 1
        apply step 1, loss NaN over 4
    "#]]
    .assert_eq(&run.send(Event::BlockDone(done)));
}

#[test]
fn status_names_at_most_three_of_those_it_waits_for() {
    let mut run = Run::new(EngineConfig { slots: 5, min_workers: 5, ..config() });
    (0..5).for_each(|_| drop(run.join()));
    expect!["worker 1 (host-1) to finish slot 0 of step 1, worker 2 (host-2) to finish slot 1 of step 1, worker 3 (host-3) to finish slot 2 of step 1, 2 more workers to finish theirs"]
.assert_eq(&run.waiting_for());
}
