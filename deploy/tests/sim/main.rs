//! Clusters in virtual time: the real engine and real sessions, under every fault that a seed can draw. The example
//! `simulate` runs any number of seeds.

mod scale;
mod simulator;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use simulator::{Failure, MUTATIONS, Mutation, Scenario};

/// Runs something for each seed on all cores; the failure of the least seed that has one.
fn first_failure(seeds: u64, run: impl Fn(u64) -> Result<(), Box<Failure>> + Sync) -> Option<Box<Failure>> {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let (next, failures) = (AtomicU64::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    if let Err(failure) = run(seed) {
                        failures.lock().unwrap().insert(seed, failure);
                        next.store(seeds, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    failures.into_inner().unwrap().pop_first().map(|(_, failure)| failure)
}

#[test]
fn a_thousand_clusters_end_as_the_quiet_run_whatever_fails() {
    let faults: Mutex<BTreeMap<String, u64>> = Mutex::default();
    let failure = first_failure(1000, |seed| {
        let course = simulator::run(seed, Mutation::None, false)?;
        assert!(course.secs > 0.0, "seed {seed} took no time");
        let mut faults = faults.lock().unwrap();
        for (fault, number) in course.faults {
            *faults.entry(fault).or_default() += number;
        }
        Ok(())
    });
    if let Some(failure) = failure {
        panic!("{failure}");
    }
    let faults = faults.into_inner().unwrap();
    assert_eq!(faults.len(), simulator::FAULTS.len(), "some kinds of fault were never drawn: {faults:?}");
    assert!(faults.values().all(|number| *number > 500), "{faults:?}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    if let Some(failure) = first_failure(100, |seed| simulator::run_twice(seed, Mutation::None).map(drop)) {
        panic!("{failure}");
    }
}

#[test]
fn one_worker_in_peace_computes_what_a_plain_loop_does() {
    let quiet = |seed| simulator::run_scenario(Scenario::quiet(seed), Mutation::None, false).map(drop);
    if let Some(failure) = first_failure(100, quiet) {
        panic!("{failure}");
    }
}

/// By which invariant each broken rule is noticed.
fn noticed_by(mutation: Mutation) -> &'static [&'static str] {
    match mutation {
        Mutation::None => &[],
        Mutation::KeepOvertaken => &["every_lease_ends_once", "nobody_has_two_leases_to_compute"],
        Mutation::CountLate => &["only_results_of_open_leases_count"],
        Mutation::CountTwice => &["every_slot_counts_once"],
        Mutation::LeaseToTheGone => &["leases_go_to_the_connected"],
        Mutation::ApplyEarly => &["every_slot_counts_once"],
        Mutation::ForgetBlock => &["every_slot_counts_once", "every_lease_ends_once"],
        Mutation::SumAsItComes => &["every_version_is_the_quiet_runs"],
        Mutation::NoAudit => &["audited_blocks_count_when_two_agree"],
        Mutation::AdmitQuarantined => &["the_quarantined_stay_out"],
        Mutation::LeaseBelowMinimum => &["nothing_is_leased_below_the_least_number_of_workers"],
        Mutation::ResumeFromTorn => &["every_version_is_the_quiet_runs", "a_run_goes_back_to_the_newest_checkpoint"],
        Mutation::LoseCheckpoints => &["a_run_goes_back_to_the_newest_checkpoint"],
        Mutation::ValidateAgain => &["a_validation_loss_is_recorded_once"],
        Mutation::IgnoreIncarnation => &["earlier_incarnations_are_not_heard"],
        Mutation::IgnoreRestart => &["leases_are_for_the_present_version", "every_slot_counts_once"],
        Mutation::RollBackTooLittle => &["a_run_goes_back_to_the_newest_checkpoint"],
        Mutation::ForgetTheWayBack => &["a_run_goes_back_to_the_newest_checkpoint"],
        Mutation::DeafToLeaving => &["every_lease_ends_once", "leases_go_to_the_connected"],
        Mutation::DeafToTime => &["the_engine_rests"],
        Mutation::OutsideChance => &["the_same_seed_gives_the_same_run"],
    }
}

#[test]
fn every_broken_rule_is_noticed() {
    for mutation in MUTATIONS {
        let run = |seed| match mutation {
            Mutation::OutsideChance => simulator::run_twice(seed, mutation).map(drop),
            _ => simulator::run(seed, mutation, false).map(drop),
        };
        let failure = first_failure(2000, run).unwrap_or_else(|| panic!("{mutation:?} is not noticed"));
        println!("{mutation:?}: seed {}, {}: {}", failure.seed(), failure.invariant(), failure.what());
        assert_eq!(Mutation::named(&format!("{mutation:?}")), Some(mutation));
        assert!(noticed_by(mutation).contains(&failure.invariant()), "{mutation:?} is noticed otherwise: {failure}");
    }
}
