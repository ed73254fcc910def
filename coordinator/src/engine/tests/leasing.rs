//! Who gets which block beside the free ones: what is late, what is slow, what a worker has kept.

use expect_test::expect;

use super::*;
use crate::engine::event::KeptBlock;

/// A run of three steps of eight slots with two workers, measured in the first step: worker 1 does a slot in one second,
/// worker 2 in four.
fn fast_and_slow() -> Run {
    let mut run = Run::new(EngineConfig { total_steps: 3, slots: 8, ..config() });
    run.join();
    run.join();
    run.pass(8);
    run.done_in(1, 8);
    run.applied(1);
    run.pass(4);
    run.done_in(1, 4);
    run.pass(12);
    run.done_in(2, 16);
    run
}

/// A run in step 2, of a worker that took 4 s for the four slots of step 1: it has all of them again.
fn one_that_takes_a_second_a_slot() -> Run {
    let mut run = Run::new(EngineConfig { total_steps: 3, ..config() });
    run.join();
    run.pass(4);
    run.done_in(1, 4);
    run.applied(1);
    run
}

#[test]
fn what_is_late_goes_to_an_idle_worker_too_and_the_first_result_counts() {
    let mut run = one_that_takes_a_second_a_slot();
    expect![[r#"
        admit worker 2 of class 0707070707070707
    "#]]
    .assert_eq(&run.join());
    // Worker 1 should take 4 s for its four slots: it is late after three times that, and a second.
    assert_eq!(run.pass_and_tick(9) + &run.pass_and_tick(3), "");
    assert_eq!(run.engine.next_deadline(), Some(run.now + Duration::from_secs(1)));
    expect![[r#"
        worker 2: lease 3: gradient of block 2/0 of step 2 with version 1
    "#]]
    .assert_eq(&run.pass_and_tick(1));
    run.pass(1);
    // Both have done it, and the late one comes after all.
    let late = run.answer_of(1);
    expect![[r#"
        accept lease 3 of worker 2: block 2/0 of step 2
        discard lease 2 of worker 1: another worker was faster
        apply step 2, loss 10 over 4
    "#]]
    .assert_eq(&run.done(2));
    expect![[r#"
        discard lease 2 of worker 1: it is for another step, version or task than the one under way
    "#]]
    .assert_eq(&run.send(Event::BlockDone(late)));
    assert_eq!(run.engine.status().counts.twins, 1);
}

#[test]
fn near_the_end_of_a_step_a_faster_worker_computes_what_the_slowest_has() {
    let mut run = fast_and_slow();
    expect![[r#"
        worker 1: lease 4: gradient of block 2/0 of step 3 with version 2
        worker 2: lease 5: gradient of block 0/4 of step 3 with version 2
    "#]]
    .assert_eq(&run.applied(2));
    run.pass(4);
    run.hear_all();
    expect![[r#"
        accept lease 4 of worker 1: block 2/0 of step 3
        worker 1: lease 6: gradient of block 1/3 of step 3 with version 2
    "#]]
    .assert_eq(&run.done_in(1, 4));
}

#[test]
fn what_a_slow_worker_gets_first_a_faster_one_computes_at_once() {
    // One slot. The worker that is asked first needs minutes for it, the other one a second.
    let mut run = Run::new(EngineConfig { total_steps: 9, slots: 1, min_workers: 2, ..config() });
    run.join();
    run.join();
    let waiting: String = (0..50).map(|_| run.pass_and_tick(6)).collect();
    assert!(waiting.contains("worker 2: lease 2"), "late after five minutes: {waiting}");
    run.pass(1);
    run.done_in(2, 1);
    expect![[r#"
        worker 1: lease 3: gradient of block 0/0 of step 2 with version 1
        worker 2: lease 4: gradient of block 0/0 of step 2 with version 1
    "#]]
    .assert_eq(&run.applied(1));
}

#[test]
fn nobody_computes_what_another_will_have_sooner() {
    let mut run = Run::new(EngineConfig { total_steps: 3, ..config() });
    run.join();
    run.join();
    run.pass(4);
    run.done_in(1, 4);
    run.applied(1);
    run.pass(2);
    expect![[r#"
        accept lease 2 of worker 1: block 1/0 of step 2
    "#]]
    .assert_eq(&run.done_in(1, 2));
}

#[test]
fn a_worker_that_joins_again_is_lent_what_it_has_kept() {
    let mut run = Run::new(EngineConfig { total_steps: 3, min_workers: 2, ..config() });
    run.join();
    run.ask(7);
    let kept = |step, version, level, index| KeptBlock { step, version, block: Block { level, index } };
    let blocks = vec![kept(2, 1, 2, 0), kept(1, 0, 1, 1), kept(1, 0, 3, 9)];
    run.send(Event::Kept { worker: WorkerId(2), blocks });
    expect![[r#"
        worker 1: lease 1: gradient of block 1/0 of step 1 with version 0
        worker 2: lease 2: gradient of block 1/1 of step 1 with version 0
    "#]]
    .assert_eq(&run.open(2));
}

#[test]
fn a_stop_does_not_wait_for_what_is_late() {
    let mut run = one_that_takes_a_second_a_slot();
    assert_eq!(run.stop(), "");
    assert_eq!(run.pass_and_tick(8) + &run.pass_and_tick(4), "");
    assert_eq!(run.engine.next_deadline(), Some(run.now + Duration::from_secs(1)));
    expect![[r#"
        discard lease 2 of worker 1: the run ends
        checkpoint step 1
    "#]]
    .assert_eq(&run.pass_and_tick(1));
}

/// A timer may fire late: whatever is heard before it finds that a lease has become so.
#[test]
fn what_is_late_is_noticed_by_whatever_comes_first() {
    let mut run = one_that_takes_a_second_a_slot();
    run.join();
    run.pass(12);
    assert_eq!(run.hear_all(), "");
    run.pass(1);
    expect![[r#"
        worker 2: lease 3: gradient of block 2/0 of step 2 with version 1
    "#]]
    .assert_eq(&run.hear_all());
    assert_eq!(run.tick(), "");
}

#[test]
fn while_nothing_is_known_of_anybody_a_lease_may_take_minutes() {
    let mut run = Run::new(config());
    run.join();
    run.join();
    for _ in 0..49 {
        assert_eq!(run.pass_and_tick(6), "");
    }
    expect![[r#"
        worker 2: lease 2: gradient of block 2/0 of step 1 with version 0
    "#]]
    .assert_eq(&run.pass_and_tick(6));
}

#[test]
fn while_a_gradient_travels_its_worker_computes_the_next_block_and_no_third() {
    let mut run = Run::new(EngineConfig { max_slots_per_lease: 1, ..config() });
    assert!(run.join().contains("worker 1: lease 1: gradient of block 0/0"));
    let first = run.answer_of(1);
    expect![[r#"
        worker 1: lease 2: gradient of block 0/1 of step 1 with version 0
    "#]]
    .assert_eq(&run.push(1));
    assert_eq!(run.push(1), "", "two gradients of a worker are enough");
    expect![[r#"
        accept lease 1 of worker 1: block 0/0 of step 1
        worker 1: lease 3: gradient of block 0/2 of step 1 with version 0
    "#]]
    .assert_eq(&run.send(Event::BlockDone(first)));
    // Of two leases, the older one is over first.
    run.leases.insert(WorkerId(1), Lease { id: LeaseId(2), block: Block::leaf(1), ..run.leases[&WorkerId(1)] });
    assert_eq!(run.done(1), "accept lease 2 of worker 1: block 0/1 of step 1\n", "it computes the third");
}

#[test]
fn a_push_of_a_lease_that_is_over_changes_nothing() {
    let mut run = Run::new(EngineConfig { max_slots_per_lease: 1, ..config() });
    run.join();
    run.push(1);
    let second = run.leases[&WorkerId(1)];
    run.leases.insert(WorkerId(1), Lease { id: LeaseId(1), block: Block::leaf(0), ..second });
    run.done(1);
    assert_eq!(run.push(1), "");
}

#[test]
fn nobody_is_lent_the_twin_of_what_it_sends() {
    let mut run = Run::new(EngineConfig { slots: 1, ..config() });
    run.join();
    run.push(1);
    let late: String = (0..60).map(|_| run.pass_and_tick(6)).collect();
    assert_eq!(late, "", "late after five minutes, and its own");
    assert!(run.done(1).contains("accept lease 1"));
}
