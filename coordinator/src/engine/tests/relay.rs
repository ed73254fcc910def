//! What changes where a member stands for several workers, and what an engine does whose work is lent from above.

use expect_test::expect;

use super::*;
use crate::engine::Lent;

impl Run {
    /// A member that stands for so many workers joins and opens its control stream.
    fn join_for(&mut self, workers: u32) -> String {
        self.joined += 1;
        let (ticket, name) = (Ticket(self.joined), format!("relay-{}", self.joined));
        let class = DeviceClass([7; 32]);
        self.send(Event::JoinRequested { ticket, name, device: "relay".into(), class, workers })
            + &self.open(self.joined)
    }

    fn workers(&mut self, worker: u64, workers: u32) -> String {
        self.send(Event::Workers { worker: WorkerId(worker), workers })
    }

    /// The coordinator above lends a block of a step of twelve slots.
    fn lend(&mut self, step: u64, level: u32, index: u32) -> String {
        let (task, block) = (Task::Gradient, Block { level, index });
        self.send(Event::Lent(Lent { step, version: step - 1, task, step_slots: 12, block }))
    }
}

/// What was lent is part of a step of twelve slots.
fn relay() -> Run {
    Run::new(EngineConfig { slots: 12, ..EngineConfig::relay(Duration::from_secs(10)) })
}

#[test]
fn a_member_of_whom_nothing_is_known_counts_as_many_as_it_stands_for() {
    let mut run = Run::new(EngineConfig { slots: 8, min_workers: 4, ..config() });
    run.join_for(3);
    expect![[r#"
        admit worker 2 of class 0707070707070707
        worker 1: lease 1: gradient of block 2/0 of step 1 with version 0
        worker 2: lease 2: gradient of block 1/2 of step 1 with version 0
    "#]]
    .assert_eq(&run.join());
}

#[test]
fn it_is_lent_more_until_all_have_a_slot() {
    let mut run = Run::new(EngineConfig { slots: 8, max_slots_per_lease: 1, ..config() });
    expect![[r#"
        admit worker 1 of class 0707070707070707
        worker 1: lease 1: gradient of block 0/0 of step 1 with version 0
        worker 1: lease 2: gradient of block 0/1 of step 1 with version 0
        worker 1: lease 3: gradient of block 0/2 of step 1 with version 0
    "#]]
    .assert_eq(&run.join_for(3));
    expect![[r#"
        worker 1: lease 4: gradient of block 0/3 of step 1 with version 0
    "#]]
    .assert_eq(&run.workers(1, 4));
    assert_eq!(run.workers(1, 2), "", "what is lent stays lent");
    assert_eq!(run.engine.status().members[0].workers, 2);
}

#[test]
fn fewer_slots_than_workers_say_how_fast_all_would_be() {
    let mut run = Run::new(EngineConfig { slots: 8, total_steps: 3, max_slots_per_lease: 2, ..config() });
    run.join_for(4);
    run.pass(3);
    // Two slots by two of four workers in three seconds.
    run.done_in(1, 3);
    assert_eq!(run.engine.status().members[0].slots_per_sec, Some(4.0 / 3.0));
    run.workers(1, 2);
    assert_eq!(run.engine.status().members[0].slots_per_sec, Some(2.0 / 3.0));
}

/// Two relays of four, of which one is a moment slower, are still lent their four slots.
#[test]
fn who_is_a_moment_slower_is_not_lent_half() {
    let mut run = Run::new(EngineConfig { slots: 8, total_steps: 3, min_workers: 8, ..config() });
    run.join_for(4);
    run.join_for(4);
    run.pass(10);
    run.done_in(1, 10);
    run.pass(2);
    run.done_in(2, 12);
    expect![[r#"
        worker 1: lease 3: gradient of block 2/0 of step 2 with version 1
        worker 2: lease 4: gradient of block 2/1 of step 2 with version 1
    "#]]
    .assert_eq(&run.applied(1));
}

#[test]
fn nobody_twins_what_it_computes_itself() {
    let mut run = Run::new(EngineConfig { slots: 1, total_steps: 3, ..config() });
    run.join_for(2);
    run.pass(1);
    run.done_in(1, 1);
    run.applied(1);
    assert_eq!(run.pass_and_tick(9) + &run.pass_and_tick(9), "");
}

#[test]
fn what_is_lent_is_lent_on_within_its_bounds() {
    let mut run = relay();
    run.tick();
    assert_eq!(run.waiting_for(), "a first worker");
    run.join();
    run.join();
    assert_eq!(run.waiting_for(), "a lease from the coordinator");
    // Slots 8 to 11 of twelve: an equal part for each.
    expect![[r#"
        worker 1: lease 1: gradient of block 1/4 of step 5 with version 4
        worker 2: lease 2: gradient of block 1/5 of step 5 with version 4
    "#]]
    .assert_eq(&run.lend(5, 2, 2));
    // Two blocks side by side are not one.
    assert_eq!(run.lend(5, 0, 2) + &run.lend(5, 0, 3), "");
    expect![[r#"
        accept lease 1 of worker 1: block 1/4 of step 5
        worker 1: lease 3: gradient of block 0/2 of step 5 with version 4
    "#]]
    .assert_eq(&run.done(1));
    expect![[r#"
        accept lease 2 of worker 2: block 1/5 of step 5
        worker 2: lease 4: gradient of block 0/3 of step 5 with version 4
    "#]]
    .assert_eq(&run.done(2));
    run.done(1);
    run.done(2);
    assert_eq!(run.waiting_for(), "a lease from the coordinator");
    // The same block again, as when its sum was lost above.
    expect![[r#"
        worker 1: lease 5: gradient of block 0/3 of step 5 with version 4
    "#]]
    .assert_eq(&run.lend(5, 0, 3));
}

#[test]
fn what_is_withdrawn_is_revoked_and_another_step_ends_the_one_before() {
    let mut run = relay();
    run.join();
    run.lend(5, 2, 0);
    let withdrawn = Event::Withdrawn { block: Block { level: 2, index: 0 } };
    expect![[r#"
        discard lease 1 of worker 1: the coordinator above does not want it any more
    "#]]
    .assert_eq(&run.send(withdrawn));
    run.lend(5, 1, 2);
    expect![[r#"
        discard lease 2 of worker 1: the coordinator above does not want it any more
        worker 1: lease 3: gradient of block 1/3 of step 6 with version 5
    "#]]
    .assert_eq(&run.lend(6, 1, 3));
}

#[test]
fn what_all_decline_goes_back() {
    let mut run = relay();
    run.join();
    run.join();
    run.lend(5, 0, 7);
    expect![[r#"
        discard lease 1 of worker 1: the worker declined it
        worker 2: lease 2: gradient of block 0/7 of step 5 with version 4
    "#]]
    .assert_eq(&run.decline(1));
    let declined = run.decline(2);
    assert!(declined.contains("give block 0/7 back: out of memory"), "{declined}");
}

#[test]
fn a_relay_has_workers_of_one_class() {
    let mut run = relay();
    run.join();
    let refused = run.ask(8);
    assert!(refused.contains("a relay stands for one class"), "{refused}");
    assert_eq!(run.engine.workers(), 1);
}
