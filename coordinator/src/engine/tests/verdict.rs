//! Blocks that count only once they are confirmed, and workers that compute something else than others.

use expect_test::expect;

use super::*;

fn audited(workers: u64) -> Run {
    let mut run = Run::new(EngineConfig { audit: 1.0, min_workers: workers as u32, slots: 1, ..config() });
    (0..workers).for_each(|_| drop(run.join()));
    run
}

/// A run whose workers have computed twelve steps of gradients of norm 1.
fn experienced(workers: u64, more: EngineConfig) -> Run {
    let mut run = Run::new(EngineConfig { total_steps: 100, slots: 1, min_workers: workers as u32, ..more });
    (0..workers).for_each(|_| drop(run.join()));
    for step in 1..=12 {
        run.done(run.holder());
        run.applied(step);
    }
    run
}

#[test]
fn an_audited_block_counts_once_two_workers_agree() {
    let mut run = audited(3);
    expect![[r#"
        worker 2: lease 2: gradient of block 0/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.done(1));
    expect!["worker 2 (host-2) to finish slot 0 of step 1"].assert_eq(&run.waiting_for());
    expect![[r#"
        discard lease 2 of worker 2: it confirms another worker's result
        accept lease 1 of worker 1: block 0/0 of step 1
        apply step 1, loss 1 over 1
    "#]]
    .assert_eq(&run.done(2));
}

#[test]
fn two_who_disagree_wait_for_a_third_and_the_odd_one_goes_for_good() {
    let mut run = audited(3);
    run.lie(1);
    expect![[r#"
        report: slot 0 of step 1: host-1 and host-2 computed different results; another worker decides
        worker 3: lease 3: gradient of block 0/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.done(2));
    expect!["worker 3 (host-3) to finish slot 0 of step 1"].assert_eq(&run.waiting_for());
    expect![[r#"
        discard lease 1 of worker 1: others computed something else
        discard lease 3 of worker 3: it confirms another worker's result
        accept lease 2 of worker 2: block 0/0 of step 1
        report: slot 0 of step 1: host-1 computed something else than others; quarantined
        quarantine host-1
        release worker 1: quarantined: its result for slot 0 of step 1 is not what others computed; mend or replace the machine
        apply step 1, loss 1 over 1
    "#]].assert_eq(&run.done(3));
    assert_eq!(run.engine.status().quarantined, ["host-1"]);
    run.joined = 0;
    expect![[r#"
        refuse: a worker of this name computed other results than two others did; mend or replace the machine, and join under another name
    "#]].assert_eq(&run.ask(7));
}

#[test]
fn without_a_third_a_dispute_waits_or_ends_the_run() {
    let mut run = audited(2);
    run.lie(1);
    assert!(run.done(2).contains("computed different results"));
    expect!["a third worker to decide about slot 0 of step 1, which host-1 and host-2 computed differently"]
        .assert_eq(&run.waiting_for());
    assert_eq!(run.pass_and_tick(5), "");

    let config = EngineConfig { audit: 1.0, min_workers: 2, slots: 1, on_dispute: OnDispute::Halt, ..config() };
    let mut run = Run::new(config);
    run.join();
    run.join();
    run.lie(1);
    expect![[r#"
        report: slot 0 of step 1: host-1 and host-2 computed different results; another worker decides
        discard lease 1 of worker 1: the run ends
        discard lease 2 of worker 2: the run ends
        checkpoint step 0
    "#]]
    .assert_eq(&run.done(2));
}

#[test]
fn nobody_escapes_a_vote_by_leaving() {
    let mut run = audited(3);
    run.lie(1);
    assert!(run.close(1).contains("discard lease 1 of worker 1: the worker left"));
    run.join();
    run.done(2);
    expect![[r#"
        discard lease 3 of worker 3: it confirms another worker's result
        accept lease 2 of worker 2: block 0/0 of step 1
        report: slot 0 of step 1: host-1 computed something else than others; quarantined
        quarantine host-1
        apply step 1, loss 1 over 1
    "#]]
    .assert_eq(&run.done(run.holder()));
    assert_eq!(run.engine.status().quarantined, ["host-1"]);
}

#[test]
fn a_result_of_one_who_left_confirms_and_does_not_count() {
    let mut run = audited(2);
    run.done(1);
    run.close(1);
    expect![[r#"
        accept lease 2 of worker 2: block 0/0 of step 1
        apply step 1, loss 1 over 1
    "#]]
    .assert_eq(&run.done(2));
}

#[test]
fn a_repeated_result_leaves_the_first_one_where_it_waits() {
    let mut run = audited(2);
    run.done(1);
    assert_eq!(run.done(1), "");
    assert!(run.done(2).contains("accept lease 1 of worker 1"));
}

#[test]
fn a_stop_does_not_wait_for_a_confirmation_that_nobody_here_can_give() {
    let mut run = audited(2);
    run.done(1);
    run.close(2);
    expect![[r#"
        discard lease 1 of worker 1: the run ends
        checkpoint step 0
    "#]]
    .assert_eq(&run.stop());
}

#[test]
fn one_who_declined_to_confirm_is_asked_again_if_nobody_else_can() {
    let mut run = audited(2);
    run.done(1);
    expect![[r#"
        discard lease 2 of worker 2: the worker declined it
        worker 2: lease 3: gradient of block 0/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.decline(2));
}

#[test]
fn an_audit_waits_for_another_worker() {
    let mut run = audited(2);
    run.close(2);
    assert_eq!(run.done(1), "");
    expect!["a worker of another name to confirm slot 0 of step 1, by host-1"].assert_eq(&run.waiting_for());
}

#[test]
fn one_who_joins_again_under_its_name_confirms_nothing() {
    let mut run = audited(2);
    run.done(1);
    run.joined = 0;
    // A second membership of the same process, before the first one is given up.
    run.send(Event::JoinRequested {
        ticket: Ticket(9),
        name: "host-1".into(),
        device: "cpu".into(),
        class: DeviceClass([7; 32]),
        workers: 1,
    });
    run.close(2);
    expect![[r#"
        report: enough workers are here again
    "#]]
    .assert_eq(&run.open(3));
    expect!["a worker of another name to confirm slot 0 of step 1, by host-1"].assert_eq(&run.waiting_for());
}

#[test]
fn a_gradient_that_looks_wrong_is_computed_again_by_another() {
    let mut run = experienced(2, config());
    let first = run.holder();
    expect![[r#"
        report: slot 0 of step 13, by host-1: the gradient's norm is 1.100e1, usual is 1.000e0; computed again before it counts
        worker 2: lease 14: gradient of block 0/0 of step 13 with version 12
    "#]].assert_eq(&run.done_with_norm(first, 11.0));
    let second = 3 - first;
    expect![[r#"
        report: slot 0 of step 13: host-1 and host-2 computed the same; it is the data or the model
        discard lease 14 of worker 2: it confirms another worker's result
        accept lease 13 of worker 1: block 0/0 of step 13
        apply step 13, loss 1 over 1
    "#]]
    .assert_eq(&run.done_with_norm(second, 11.0));
}

#[test]
fn what_is_not_finite_always_looks_wrong() {
    let mut run = Run::new(EngineConfig { slots: 1, ..config() });
    run.join();
    run.join();
    expect![[r#"
        report: slot 0 of step 1, by host-1: the gradient's norm is NaN; computed again before it counts
        worker 2: lease 2: gradient of block 0/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.done_with_norm(1, f64::NAN));
}

#[test]
fn one_who_is_alone_computes_it_again_and_that_is_said() {
    let mut run = experienced(1, config());
    expect![[r#"
        report: slot 0 of step 13, by host-1: the gradient's norm is 1.100e1, usual is 1.000e0; computed again before it counts
        worker 1: lease 14: gradient of block 0/0 of step 13 with version 12
    "#]].assert_eq(&run.done_with_norm(1, 11.0));
    expect![[r#"
        report: slot 0 of step 13: host-1 computed the same twice, and nobody else could check
        discard lease 14 of worker 1: it confirms another worker's result
        accept lease 13 of worker 1: block 0/0 of step 13
        apply step 13, loss 1 over 1
    "#]]
    .assert_eq(&run.done_with_norm(1, 11.0));
}

#[test]
fn one_who_is_alone_and_never_computes_the_same_ends_the_run() {
    let mut run = experienced(1, config());
    let lie = |run: &mut Run, digest| {
        let done = BlockDone { norm: Some(f64::NAN), digest: Some([digest; 32]), ..run.answer_of(1) };
        run.send(Event::BlockDone(done))
    };
    lie(&mut run, 1);
    lie(&mut run, 2);
    expect![[r#"
        discard lease 13 of worker 1: the run ends
        discard lease 14 of worker 1: the run ends
        discard lease 15 of worker 1: the run ends
        checkpoint step 12
    "#]]
    .assert_eq(&lie(&mut run, 3));
}

#[test]
fn a_liar_with_unchecked_blocks_sends_the_run_back() {
    let unchecked_since = [("host-1".to_string(), 3)].into();
    let start =
        Start::Resumed { step: 5, validated: true, classes: BTreeSet::new(), skipped_in_a_row: 0, unchecked_since };
    let mut run = Run::new(EngineConfig { total_steps: 9, audit: 1.0, min_workers: 3, slots: 2, start, ..config() });
    (0..3).for_each(|_| drop(run.join()));
    // Workers 1 and 2 have a block each, and worker 3 confirms.
    run.lie(1);
    expect![[r#"
        report: slot 0 of step 6: host-1 and host-3 computed different results; another worker decides
    "#]]
    .assert_eq(&run.done(3));
    expect![[r#"
        worker 1: lease 4: gradient of block 0/1 of step 6 with version 5
        worker 2: lease 5: gradient of block 0/0 of step 6 with version 5
    "#]]
    .assert_eq(&run.done(2));
    expect![[r#"
        discard lease 1 of worker 1: others computed something else
        discard lease 5 of worker 2: it confirms another worker's result
        accept lease 3 of worker 3: block 0/0 of step 6
        report: slot 0 of step 6: host-1 computed something else than others; quarantined. Blocks of it that nobody checked count since step 3
        quarantine host-1
        discard lease 4 of worker 1: the worker was released
        release worker 1: quarantined: its result for slot 0 of step 6 is not what others computed; mend or replace the machine
        discard lease 2 of worker 2: the step starts over
        roll back to step 2 or earlier
    "#]].assert_eq(&run.done(2));
    expect!["an earlier version of the parameters to be restored"].assert_eq(&run.waiting_for());
    // What comes meanwhile is stale.
    let stale = run.answer_of(3);
    assert!(run.send(Event::BlockDone(stale)).contains("discard"));
    run.join();
    let back = Event::RolledBack { step: 2, validated: true, saved: true, skipped_in_a_row: 0 };
    expect![[r#"
        worker 2: lease 6: gradient of block 0/0 of step 3 with version 2
        worker 3: lease 7: gradient of block 0/1 of step 3 with version 2
    "#]]
    .assert_eq(&run.send(back));
}

#[test]
fn a_liar_believed_in_this_step_alone_restarts_it() {
    // With this seed one of the two blocks is audited, and the other is not.
    let seed = (0..).find(|seed| {
        let audited = |slot| crate::engine::review::is_audited(0.5, *seed, 1, Task::Gradient, Block::leaf(slot));
        !audited(0) && audited(1)
    });
    let config = EngineConfig {
        audit: 0.5,
        audit_seed: seed.unwrap(),
        min_workers: 3,
        slots: 2,
        max_slots_per_lease: 1,
        ..config()
    };
    let mut run = Run::new(config);
    (0..3).for_each(|_| drop(run.join()));
    // Slot 0 by worker 1 counts; then it lies about slot 1, which worker 2 has had, and worker 3 decides.
    assert!(run.done(1).contains("accept"));
    run.done(2);
    let confirming = run.holder();
    run.lie(confirming);
    expect![[r#"
        discard lease 3 of worker 1: others computed something else
        discard lease 4 of worker 3: it confirms another worker's result
        accept lease 2 of worker 2: block 0/1 of step 1
        report: slot 1 of step 1: host-1 computed something else than others; quarantined. Blocks of it that nobody checked count since step 1
        quarantine host-1
        release worker 1: quarantined: its result for slot 1 of step 1 is not what others computed; mend or replace the machine
        restart step 1
        report: paused: 1 more worker needed
    "#]].assert_eq(&run.done(run.holder()));
}

#[test]
fn steps_of_no_use_are_counted_and_three_in_a_row_end_the_run() {
    let mut run = experienced(1, config());
    let mut said = String::new();
    for step in 13..=15 {
        run.done_with_norm(1, f64::INFINITY);
        run.done_with_norm(1, f64::INFINITY);
        said += &run.send(Event::StepApplied { step, skipped: true });
    }
    expect![[r#"
        report: step 13 is skipped (1 in a row): its gradient is no use because of slot 0
        worker 1: lease 15: gradient of block 0/0 of step 14 with version 13
        report: step 14 is skipped (2 in a row): its gradient is no use because of slot 0
        worker 1: lease 17: gradient of block 0/0 of step 15 with version 14
        report: step 15 is skipped (3 in a row): its gradient is no use because of slot 0
        checkpoint step 15
    "#]]
    .assert_eq(&said);

    // A resumed run goes on counting.
    let start = Start::Resumed {
        step: 1,
        validated: true,
        classes: BTreeSet::new(),
        skipped_in_a_row: 2,
        unchecked_since: BTreeMap::new(),
    };
    let mut run = Run::new(EngineConfig { slots: 1, start, ..config() });
    run.join();
    run.done(1);
    run.send(Event::StepApplied { step: 2, skipped: true });
    assert!(run.written(2).contains("the run failed: 3 steps in a row"));
}
