//! How well workers of different speeds are used, in virtual time.

use super::*;

/// The share of their summed speed that workers reach over 40 steps of `slots` slots, each of which takes worker `i`
/// `millis[i]` of virtual time. Computing is all that takes time.
fn utilisation(slots: u32, millis: &[u64]) -> f64 {
    let total_steps = 40;
    let mut run = Run::new(EngineConfig { total_steps, slots, min_workers: millis.len() as u32, ..config() });
    millis.iter().for_each(|_| drop(run.join()));
    let mut begun: BTreeMap<WorkerId, (LeaseId, Time)> = BTreeMap::new();
    loop {
        let status = run.engine.status();
        if status.waiting_for.starts_with("the optimizer") {
            run.applied(status.step + 1);
            if status.step + 1 == total_steps {
                break;
            }
            continue;
        }
        // Whoever holds a lease is done after its slots; a revoked one stops at once.
        let done = status.members.iter().filter_map(|member| {
            let lease = *member.leases.first()?;
            let (known, since) = *begun.entry(member.worker).or_insert((lease, run.now));
            let since = if known == lease { since } else { run.now };
            begun.insert(member.worker, (lease, since));
            let block = run.leases[&member.worker].block;
            let compute = Duration::from_millis(millis[member.worker.0 as usize - 1]) * block.slots(slots).len() as u32;
            Some((since + compute, member.worker, compute))
        });
        let (at, worker, compute) = done.min().expect("somebody is at work");
        if let Some(deadline) = run.engine.next_deadline().filter(|deadline| *deadline < at) {
            run.now = deadline;
            run.hear_all();
            run.tick();
            continue;
        }
        run.now = at;
        run.hear_all();
        let done = BlockDone { compute, ..run.answer_of(worker.0) };
        run.send(Event::BlockDone(done));
    }
    let slots_per_milli: f64 = millis.iter().map(|millis| 1.0 / *millis as f64).sum();
    let ideal = (total_steps * u64::from(slots)) as f64 / slots_per_milli;
    ideal / run.now.0.as_millis() as f64
}

#[test]
fn workers_of_unequal_speed_are_put_to_use() {
    for (slots, millis) in [(16, [100, 400]), (32, [100, 400]), (16, [400, 100]), (64, [30, 250])] {
        let share = utilisation(slots, &millis);
        assert!(share >= 0.85, "{slots} slots at {millis:?} ms: {share:.3}");
    }
    let share = utilisation(64, &[100, 100, 100, 200, 400]);
    assert!(share >= 0.85, "{share:.3}");
}
