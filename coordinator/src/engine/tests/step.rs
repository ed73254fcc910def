//! The life of a step.

use expect_test::expect;

use super::*;

fn resumed(step: u64, validated: bool) -> Start {
    Start::Resumed { step, validated, classes: BTreeSet::new(), skipped_in_a_row: 0, unchecked_since: BTreeMap::new() }
}

#[test]
fn a_run_from_its_first_worker_to_its_end() {
    let mut run = Run::new(EngineConfig {
        eval_slots: 2,
        evaluate_every_steps: 2,
        sample_every_steps: 1,
        checkpoint_every_steps: 1,
        ..config()
    });
    let mut life = run.tick() + &run.join();
    life += &run.done(1);
    life += &run.done(1);
    life += &run.applied(1);
    life += &run.written(1);
    life += &run.done(1);
    life += &run.applied(2);
    life += &run.done(1);
    life += &run.written(2);
    expect![[r#"
        admit worker 1 of class 0707070707070707
        worker 1: lease 1: evaluation of block 1/0 of step 0 with version 0
        accept lease 1 of worker 1: block 1/0 of step 0
        validation at step 0, loss 3 over 2
        sample at step 0
        worker 1: lease 2: gradient of block 2/0 of step 1 with version 0
        accept lease 2 of worker 1: block 2/0 of step 1
        apply step 1, loss 10 over 4
        sample at step 1
        checkpoint step 1
        worker 1: lease 3: gradient of block 2/0 of step 2 with version 1
        accept lease 3 of worker 1: block 2/0 of step 2
        apply step 2, loss 10 over 4
        worker 1: lease 4: evaluation of block 1/0 of step 2 with version 2
        accept lease 4 of worker 1: block 1/0 of step 2
        validation at step 2, loss 3 over 2
        sample at step 2
        checkpoint step 2
        release worker 1: the run is complete
        finish at step 2: the run is complete
    "#]]
    .assert_eq(&life);
}

#[test]
fn the_first_version_is_asked_first_and_once() {
    let config =
        EngineConfig { reference_slots: 2, eval_slots: 1, evaluate_every_steps: 1, min_workers: 2, ..config() };
    let mut run = Run::new(config.clone());
    let mut life = run.join() + &run.join();
    life += &run.done(1);
    life += &run.done(2);
    life += &run.done(1);
    expect![[r#"
        admit worker 1 of class 0707070707070707
        admit worker 2 of class 0707070707070707
        worker 1: lease 1: reference of block 0/0 of step 0 with version 0
        worker 2: lease 2: reference of block 0/1 of step 0 with version 0
        accept lease 1 of worker 1: block 0/0 of step 0
        accept lease 2 of worker 2: block 0/1 of step 0
        every reference is here
        worker 1: lease 3: evaluation of block 0/0 of step 0 with version 0
        accept lease 3 of worker 1: block 0/0 of step 0
        validation at step 0, loss 1 over 1
        worker 1: lease 4: gradient of block 1/0 of step 1 with version 0
        worker 2: lease 5: gradient of block 1/1 of step 1 with version 0
    "#]]
    .assert_eq(&life);
    // It is known by the time that the coordinator starts again.
    let mut run = Run::new(EngineConfig { reference_slots: 0, min_workers: 1, ..config });
    assert!(run.join().contains("evaluation of block 0/0 of step 0"));
}

#[test]
fn checkpoints_come_by_time_and_sooner_after_a_start() {
    let interval = Some(Duration::from_secs(80));
    let mut run = Run::new(EngineConfig { total_steps: 1000, checkpoint_interval: interval, ..config() });
    run.join();
    let mut saved = Vec::new();
    for step in 1..=60 {
        run.pass(5);
        run.hear_all();
        run.done(1);
        if run.applied(step).contains("checkpoint") {
            saved.push(step * 5);
            run.written(step);
        }
    }
    assert_eq!(saved, [10, 30, 70, 150, 230], "after 10, 20, 40 and then 80 seconds each");
}

#[test]
fn nothing_is_leased_while_the_optimizer_works() {
    let mut run = Run::new(config());
    run.join();
    run.done(1);
    expect![[r#"
        admit worker 2 of class 0707070707070707
    "#]]
    .assert_eq(&run.join());
    expect!["the optimizer to apply step 1"].assert_eq(&run.waiting_for());
    expect![[r#"
        worker 1: lease 2: gradient of block 1/0 of step 2 with version 1
        worker 2: lease 3: gradient of block 1/1 of step 2 with version 1
    "#]]
    .assert_eq(&run.applied(1));
}

#[test]
fn the_optimizer_is_heard_once_and_for_its_step_alone() {
    let mut run = Run::new(config());
    run.join();
    run.done(1);
    assert_eq!(run.applied(2), "");
    assert_ne!(run.applied(1), "");
    assert_eq!(run.applied(1), "");
}

#[test]
fn a_resumed_run_does_again_only_what_is_missing() {
    let busy = EngineConfig {
        total_steps: 4,
        eval_slots: 1,
        evaluate_every_steps: 2,
        sample_every_steps: 2,
        checkpoint_every_steps: 2,
        ..config()
    };
    let mut run = Run::new(EngineConfig { start: resumed(2, true), ..busy.clone() });
    expect![[r#"
        admit worker 1 of class 0707070707070707
        worker 1: lease 1: gradient of block 2/0 of step 3 with version 2
    "#]]
    .assert_eq(&run.join());

    let mut run = Run::new(EngineConfig { start: resumed(2, false), ..busy.clone() });
    expect![[r#"
        admit worker 1 of class 0707070707070707
        worker 1: lease 1: evaluation of block 0/0 of step 2 with version 2
        accept lease 1 of worker 1: block 0/0 of step 2
        validation at step 2, loss 1 over 1
        worker 1: lease 2: gradient of block 2/0 of step 3 with version 2
    "#]]
    .assert_eq(&(run.join() + &run.done(1)));

    let mut run = Run::new(EngineConfig { start: resumed(4, true), ..busy });
    expect![[r#"
        finish at step 4: the run is complete
    "#]]
    .assert_eq(&run.tick());
}

#[test]
fn an_evaluation_is_added_in_slot_order_whoever_did_what() {
    let mut run = Run::new(EngineConfig { eval_slots: 4, evaluate_every_steps: 1, min_workers: 2, ..config() });
    run.join();
    run.join();
    // ((1e100 + 1) - 1e100) + 1 = 1 in slot order, but (1e100 + 1) + (-1e100 + 1) = 0 in tree order.
    let mut answer = |worker, losses: [f64; 2]| {
        let slot_sums = losses.map(|loss| Sums { loss, weight: 1.0, ..Sums::default() }).to_vec();
        let done = BlockDone { slot_sums, ..run.answer_of(worker) };
        run.send(Event::BlockDone(done))
    };
    assert!(!answer(2, [-1e100, 1.0]).contains("validation"));
    expect![[r#"
        accept lease 1 of worker 1: block 1/0 of step 0
        validation at step 0, loss 1 over 4
        worker 1: lease 3: gradient of block 1/0 of step 1 with version 0
        worker 2: lease 4: gradient of block 1/1 of step 1 with version 0
    "#]]
    .assert_eq(&answer(1, [1e100, 1.0]));
}

#[test]
fn a_checkpoint_that_is_due_while_one_is_written_is_skipped_unless_it_is_the_last() {
    let mut run = Run::new(EngineConfig { total_steps: 3, checkpoint_every_steps: 1, ..config() });
    run.join();
    let mut life = run.done(1) + &run.applied(1);
    life += &run.done(1);
    life += &run.applied(2);
    life += &run.done(1);
    life += &run.applied(3);
    expect![[r#"
        accept lease 1 of worker 1: block 2/0 of step 1
        apply step 1, loss 10 over 4
        checkpoint step 1
        worker 1: lease 2: gradient of block 2/0 of step 2 with version 1
        accept lease 2 of worker 1: block 2/0 of step 2
        apply step 2, loss 10 over 4
        worker 1: lease 3: gradient of block 2/0 of step 3 with version 2
        accept lease 3 of worker 1: block 2/0 of step 3
        apply step 3, loss 10 over 4
    "#]]
    .assert_eq(&life);
    expect!["a checkpoint of step 1"].assert_eq(&run.waiting_for());
    expect![[r#"
        checkpoint step 3
    "#]]
    .assert_eq(&run.written(1));
    expect!["a checkpoint of step 3"].assert_eq(&run.waiting_for());
    expect![[r#"
        release worker 1: the run is complete
        finish at step 3: the run is complete
    "#]]
    .assert_eq(&run.written(3));
}

#[test]
fn a_run_stops_after_the_step_it_is_told_to() {
    let mut run = Run::new(EngineConfig { stop_after: Some(1), ..config() });
    run.join();
    run.done(1);
    expect![[r#"
        checkpoint step 1
        release worker 1: the run stops: checkpoint.stop_after = 1
        finish at step 1: the run stops: checkpoint.stop_after = 1
    "#]]
    .assert_eq(&(run.applied(1) + &run.written(1)));
}

#[test]
fn a_requested_stop_finishes_the_step() {
    let mut run = Run::new(EngineConfig { slots: 2, ..config() });
    run.join();
    let mut life = run.stop() + &run.ask(7);
    life += &run.done(1);
    life += &run.applied(1);
    life += &run.written(1);
    expect![[r#"
        refuse: the run takes nobody in any more: the run stops: interrupted
        accept lease 1 of worker 1: block 1/0 of step 1
        apply step 1, loss 3 over 2
        checkpoint step 1
        release worker 1: the run stops: interrupted
        finish at step 1: the run stops: interrupted
    "#]]
    .assert_eq(&life);
}

#[test]
fn a_requested_stop_does_not_wait_for_more_workers() {
    let mut run = Run::new(EngineConfig { min_workers: 2, ..config() });
    assert_eq!(run.join().lines().count(), 1);
    expect![[r#"
        worker 1: lease 1: gradient of block 2/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.stop());
}

#[test]
fn a_step_that_nobody_computes_is_abandoned_on_request() {
    let mut run = Run::new(config());
    expect![[r#"
        checkpoint step 0
        finish at step 0: the run stops: interrupted
    "#]]
    .assert_eq(&(run.tick() + &run.stop() + &run.written(0)));

    let mut run = Run::new(EngineConfig { checkpoint_every_steps: 1, ..config() });
    run.join();
    run.done(1);
    run.applied(1);
    run.written(1);
    expect![[r#"
        discard lease 2 of worker 1: the worker left
        finish at step 1: the run stops: interrupted
    "#]]
    .assert_eq(&(run.stop() + &run.close(1)));
}

#[test]
fn a_run_that_cannot_save_ends() {
    let mut run = Run::new(EngineConfig { checkpoint_every_steps: 1, ..config() });
    run.join();
    run.done(1);
    run.applied(1);
    let reason = "no space left on device".to_string();
    expect![[r#"
        discard lease 2 of worker 1: the worker was released
        release worker 1: the run failed: the checkpoint of step 1 could not be written (no space left on device). Free space or make the run directory writable, then continue with --resume
        finish at step 1: the run failed: the checkpoint of step 1 could not be written (no space left on device). Free space or make the run directory writable, then continue with --resume
    "#]].assert_eq(&run.send(Event::CheckpointFailed { step: 1, reason }));
    assert!(run.ask(7).starts_with("refuse: the run takes nobody in any more: the run failed: "));
    assert!(run.open(1).starts_with("release worker 1: the run failed: "));
    assert!(run.waiting_for().starts_with("nothing: the run failed: "));
    assert_eq!(run.engine.next_deadline(), None);
}
