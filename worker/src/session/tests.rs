//! Each rule of a session, by the exact commands it gives.

use std::collections::BTreeSet;

use lockstep_model::tree::Block;
use proptest::prelude::*;

use super::*;

const START: Duration = Duration::from_secs(100);
const TIMING: Timing = Timing { heartbeat_interval: Duration::from_secs(1), liveness_timeout: Duration::from_secs(10) };

/// Version `version`, of which there is only one.
fn parameters(version: u64) -> Parameters {
    Parameters { version, digest: Some([version as u8; 32]) }
}

fn gradient(id: u64, version: u64) -> Lease {
    let (parameters, block) = (parameters(version), Block::leaf(id as u32));
    Lease { id, step: version + 1, parameters, block, seed: 1, task: Task::Gradient }
}

fn evaluation(id: u64, version: u64) -> Lease {
    Lease { step: version, task: Task::Evaluate, ..gradient(id, version) }
}

/// A session and the moment it lives in.
struct Driven(Session);

impl Driven {
    fn new() -> Self {
        Self(Session::new(TIMING, Vec::new(), START))
    }

    /// A session that keeps the gradients of these leases, and has offered them.
    fn keeping(leases: &[Lease]) -> Self {
        let names: Vec<GradientName> = leases.iter().map(|lease| lease.gradient_name().unwrap()).collect();
        let mut session = Session::new(TIMING, names.clone(), START);
        assert_eq!(session.handle(Event::Tick, START), [Command::SendKept(names), Command::SendHeartbeat]);
        Self(session)
    }

    /// A session whose device already computes lease 1 with version 0.
    fn computing() -> Self {
        let mut driven = Self::new();
        assert_eq!(driven.on(Event::Leased(gradient(1, 0))), [pull(0, 1)]);
        assert_eq!(driven.on(arrived(0)), [Command::Compute { lease: 1 }]);
        driven
    }

    fn on(&mut self, event: Event) -> Vec<Command> {
        self.0.handle(event, START)
    }
}

fn pull(version: u64, lease: u64) -> Command {
    Command::Pull { parameters: parameters(version), lease }
}

fn arrived(version: u64) -> Event {
    Event::ParametersArrived { parameters: parameters(version) }
}

fn damaged() -> TransferFailure {
    TransferFailure::Damaged("a checksum is wrong".into())
}

fn refused() -> TransferFailure {
    TransferFailure::Refused("not published".into())
}

#[test]
fn a_gradient_is_pulled_for_computed_pushed_and_reported() {
    let mut session = Driven::computing();
    assert_eq!(session.on(Event::Computed { lease: 1 }), [Command::Push { lease: 1 }]);
    assert_eq!(session.on(Event::Pushed { lease: 1 }), [Command::SendResult { lease: 1 }]);
}

#[test]
fn an_evaluation_is_reported_without_a_push() {
    let mut session = Driven::computing();
    assert_eq!(session.on(Event::Leased(evaluation(2, 0))), []);
    let commands = session.on(Event::Computed { lease: 1 });
    assert_eq!(commands, [Command::Push { lease: 1 }, Command::Compute { lease: 2 }]);
    assert_eq!(session.on(Event::Computed { lease: 2 }), [Command::SendResult { lease: 2 }]);
}

#[test]
fn leases_wait_their_turn_and_share_the_parameters_held() {
    let mut session = Driven::computing();
    assert_eq!(session.on(Event::Leased(gradient(2, 0))), []);
    assert_eq!(session.on(Event::Leased(gradient(3, 1))), []);
    let commands = session.on(Event::Computed { lease: 1 });
    assert_eq!(commands, [Command::Push { lease: 1 }, Command::Compute { lease: 2 }]);
    assert_eq!(session.on(Event::Pushed { lease: 1 }), [Command::SendResult { lease: 1 }]);
    let commands = session.on(Event::Computed { lease: 2 });
    assert_eq!(commands, [Command::Push { lease: 2 }, pull(1, 3)]);
    assert_eq!(session.on(arrived(1)), [Command::Compute { lease: 3 }]);
}

#[test]
fn the_device_waits_while_two_vectors_are_on_their_way() {
    let mut session = Driven::computing();
    session.on(Event::Leased(gradient(2, 0)));
    session.on(Event::Leased(gradient(3, 0)));
    session.on(Event::Computed { lease: 1 });
    assert_eq!(session.on(Event::Computed { lease: 2 }), [Command::Push { lease: 2 }]);
    let commands = session.on(Event::Pushed { lease: 1 });
    assert_eq!(commands, [Command::SendResult { lease: 1 }, Command::Compute { lease: 3 }]);
}

#[test]
fn a_lease_told_twice_is_computed_once() {
    let mut session = Driven::computing();
    assert_eq!(session.on(Event::Leased(gradient(1, 0))), []);
    session.on(Event::Leased(gradient(2, 0)));
    session.on(Event::Leased(gradient(2, 0)));
    session.on(Event::Computed { lease: 1 });
    assert_eq!(session.on(Event::Leased(gradient(1, 0))), []);
    assert_eq!(session.on(Event::Computed { lease: 2 }), [Command::Push { lease: 2 }]);
}

#[test]
fn a_revoked_lease_is_dropped_before_it_starts() {
    let mut session = Driven::computing();
    session.on(Event::Leased(gradient(2, 0)));
    assert_eq!(session.on(Event::Revoked { lease: 2 }), [Command::Discard { lease: 2 }]);
    assert_eq!(session.on(Event::Revoked { lease: 2 }), []);
    assert_eq!(session.on(Event::Computed { lease: 1 }), [Command::Push { lease: 1 }]);
}

#[test]
fn a_lease_revoked_while_it_is_computed_is_abandoned_and_the_next_begins_with_the_same_parameters() {
    let mut session = Driven::computing();
    session.on(Event::Leased(gradient(2, 0)));
    let [abandon, discard] = [Command::Abandon { lease: 1 }, Command::Discard { lease: 1 }];
    assert_eq!(session.on(Event::Revoked { lease: 1 }), [abandon, discard, Command::Compute { lease: 2 }]);
    assert_eq!(session.on(Event::Computed { lease: 1 }), []);
    let failed = Event::ComputeFailed { lease: 1, reason: "it was cut short".into() };
    assert_eq!(session.on(failed), []);
    assert_eq!(session.on(Event::Computed { lease: 2 }), [Command::Push { lease: 2 }]);
}

#[test]
fn a_lease_revoked_while_it_is_sent_makes_room_for_the_next() {
    let mut session = Driven::computing();
    session.on(Event::Leased(gradient(2, 0)));
    session.on(Event::Leased(gradient(3, 0)));
    session.on(Event::Computed { lease: 1 });
    session.on(Event::Computed { lease: 2 });
    let [abandon, discard] = [Command::Abandon { lease: 2 }, Command::Discard { lease: 2 }];
    assert_eq!(session.on(Event::Revoked { lease: 2 }), [abandon, discard, Command::Compute { lease: 3 }]);
    assert_eq!(session.on(Event::Pushed { lease: 2 }), []);
    assert_eq!(session.on(Event::Pushed { lease: 1 }), [Command::SendResult { lease: 1 }]);
}

#[test]
fn another_version_of_the_same_number_is_pulled() {
    let mut session = Driven::computing();
    let other = Parameters { version: 0, digest: Some([99; 32]) };
    session.on(Event::Leased(Lease { parameters: other, ..gradient(2, 0) }));
    let commands = session.on(Event::Computed { lease: 1 });
    assert_eq!(commands, [Command::Push { lease: 1 }, Command::Pull { parameters: other, lease: 2 }]);
    assert_eq!(session.on(arrived(0)), [], "what is waited for is the other one");
    let commands = session.on(Event::ParametersArrived { parameters: other });
    assert_eq!(commands, [Command::Compute { lease: 2 }]);
}

#[test]
fn what_is_kept_is_offered_before_anything_is_said() {
    let name = gradient(1, 0).gradient_name().unwrap();
    let mut session = Session::new(TIMING, vec![name], START);
    let commands = session.handle(Event::Leased(gradient(2, 0)), START);
    assert_eq!(commands, [Command::SendKept(vec![name]), pull(0, 2)]);
    assert_eq!(session.handle(Event::Tick, START), [Command::SendHeartbeat]);
}

#[test]
fn a_lease_of_something_kept_is_answered_from_memory_beside_what_is_computed() {
    let mut session = Driven::keeping(&[gradient(7, 1), gradient(8, 1)]);
    session.on(Event::Leased(gradient(1, 0)));
    let from_memory = [Command::Recall { lease: 2 }, Command::Push { lease: 2 }];
    assert_eq!(session.on(Event::Leased(Lease { id: 2, ..gradient(7, 1) })), from_memory);
    assert_eq!(session.on(Event::Pushed { lease: 2 }), [Command::SendResult { lease: 2 }]);
    assert_eq!(session.on(arrived(0)), [Command::Compute { lease: 1 }]);
}

#[test]
fn a_gradient_is_answered_from_memory_once() {
    let mut session = Driven::keeping(&[gradient(7, 1)]);
    session.on(Event::Leased(Lease { id: 1, ..gradient(7, 1) }));
    session.on(Event::Pushed { lease: 1 });
    assert_eq!(session.on(Event::Leased(Lease { id: 2, ..gradient(7, 1) })), [pull(1, 2)]);
}

#[test]
fn only_the_very_gradient_that_is_kept_is_answered_from_memory() {
    let kept = gradient(7, 1);
    let lease = Lease { id: 1, ..kept };
    let unnamed = Parameters { version: 1, digest: None };
    let other = Parameters { version: 1, digest: Some([99; 32]) };
    let others = [
        Lease { task: Task::Evaluate, ..lease },
        Lease { step: 1, ..lease },
        Lease { block: Block::leaf(8), ..lease },
        Lease { block: Block { level: 1, index: 7 }, ..lease },
        Lease { seed: 2, ..lease },
        Lease { parameters: parameters(2), ..lease },
        Lease { parameters: unnamed, ..lease },
        Lease { parameters: other, ..lease },
    ];
    for lease in others {
        let commands = Driven::keeping(&[kept]).on(Event::Leased(lease));
        assert_eq!(commands, [Command::Pull { parameters: lease.parameters, lease: 1 }], "{lease:?}");
    }
}

#[test]
fn leases_from_memory_wait_while_two_vectors_are_on_their_way() {
    let mut session = Driven::keeping(&[gradient(1, 1), gradient(2, 1), gradient(3, 1)]);
    (1..=2).for_each(|id| drop(session.on(Event::Leased(gradient(id, 1)))));
    assert_eq!(session.on(Event::Leased(gradient(3, 1))), []);
    let commands = session.on(Event::Pushed { lease: 1 });
    let [recall, push] = [Command::Recall { lease: 3 }, Command::Push { lease: 3 }];
    assert_eq!(commands, [Command::SendResult { lease: 1 }, recall, push]);
}

#[test]
fn what_the_device_computes_keeps_its_place_among_the_vectors_on_their_way() {
    let mut session = Driven::keeping(&[gradient(7, 0), gradient(8, 0)]);
    session.on(Event::Leased(gradient(1, 0)));
    assert_eq!(session.on(arrived(0)), [Command::Compute { lease: 1 }]);
    let from_memory = |lease| [Command::Recall { lease }, Command::Push { lease }];
    assert_eq!(session.on(Event::Leased(Lease { id: 2, ..gradient(7, 0) })), from_memory(2));
    assert_eq!(session.on(Event::Leased(Lease { id: 3, ..gradient(8, 0) })), []);
    assert_eq!(session.on(Event::Computed { lease: 1 }), [Command::Push { lease: 1 }]);
    let [recall, push] = from_memory(3);
    assert_eq!(session.on(Event::Pushed { lease: 2 }), [Command::SendResult { lease: 2 }, recall, push]);
}

#[test]
fn what_is_kept_stays_while_steps_ahead_may_come_and_is_forgotten_once_all_are_past() {
    let mut session = Driven::keeping(&[gradient(7, 1), gradient(8, 3)]);
    assert_eq!(session.on(Event::Leased(gradient(1, 2))), [pull(2, 1)]);
    assert_eq!(session.on(Event::Leased(evaluation(2, 9))), []);
    assert_eq!(session.on(Event::Leased(gradient(3, 4))), [Command::Forget]);
    assert_eq!(session.on(Event::Leased(gradient(4, 5))), []);
    session.on(Event::Revoked { lease: 1 });
    assert_eq!(session.on(Event::Leased(Lease { id: 5, ..gradient(8, 3) })), [], "it waits to be computed");
}

#[test]
fn parameters_nobody_needs_any_more_stay_for_the_next_lease() {
    let mut session = Driven::new();
    session.on(Event::Leased(gradient(1, 4)));
    assert_eq!(session.on(Event::Revoked { lease: 1 }), [Command::Discard { lease: 1 }]);
    assert_eq!(session.on(arrived(4)), []);
    assert_eq!(session.on(Event::Leased(gradient(2, 4))), [Command::Compute { lease: 2 }]);
}

#[test]
fn a_failed_computation_is_declined_and_the_device_loaded_anew() {
    let mut session = Driven::computing();
    session.on(Event::Leased(gradient(2, 0)));
    let reason = String::from("out of memory; lower batch.sequences_per_slot");
    let commands = session.on(Event::ComputeFailed { lease: 1, reason: reason.clone() });
    assert_eq!(commands, [Command::SendDeclined { lease: 1, reason }, pull(0, 2)]);
}

#[test]
fn an_unreadable_lease_is_declined() {
    let reason = String::from("lease 9 names no slots");
    let commands = Driven::new().on(Event::Unreadable { lease: 9, reason: reason.clone() });
    assert_eq!(commands, [Command::SendDeclined { lease: 9, reason }]);
}

#[test]
fn damaged_parameters_are_pulled_three_times_before_the_connection_is_given_up() {
    let mut session = Driven::new();
    session.on(Event::Leased(gradient(1, 0)));
    let failed = Event::PullFailed { parameters: parameters(0), failure: damaged() };
    assert_eq!(session.on(failed.clone()), [pull(0, 1)]);
    assert_eq!(session.on(failed.clone()), [pull(0, 1)]);
    let lost = Departure::Lost("version 0 did not arrive: a checksum is wrong".into());
    assert_eq!(session.on(failed), [Command::Leave(lost)]);
}

#[test]
fn leases_of_a_version_that_is_gone_are_declined_and_others_go_on() {
    let mut session = Driven::new();
    session.on(Event::Leased(gradient(1, 0)));
    session.on(Event::Leased(gradient(2, 1)));
    session.on(Event::Leased(gradient(3, 0)));
    let commands = session.on(Event::PullFailed { parameters: parameters(0), failure: refused() });
    let declined = |lease| Command::SendDeclined { lease, reason: "not published".into() };
    assert_eq!(commands, [declined(1), declined(3), pull(1, 2)]);
}

#[test]
fn a_damaged_gradient_is_pushed_three_times_before_the_connection_is_given_up() {
    let mut session = Driven::computing();
    session.on(Event::Computed { lease: 1 });
    let failed = Event::PushFailed { lease: 1, failure: damaged() };
    assert_eq!(session.on(failed.clone()), [Command::Push { lease: 1 }]);
    assert_eq!(session.on(failed.clone()), [Command::Push { lease: 1 }]);
    let lost = Departure::Lost("lease 1 could not be sent: a checksum is wrong".into());
    assert_eq!(session.on(failed), [Command::Leave(lost)]);
}

#[test]
fn a_gradient_that_is_refused_is_declined() {
    let mut session = Driven::computing();
    session.on(Event::Computed { lease: 1 });
    let commands = session.on(Event::PushFailed { lease: 1, failure: refused() });
    assert_eq!(commands, [Command::SendDeclined { lease: 1, reason: "not published".into() }]);
}

#[test]
fn a_lost_connection_ends_the_membership() {
    let mut session = Driven::computing();
    session.on(Event::Leased(gradient(2, 0)));
    session.on(Event::Computed { lease: 1 });
    let failure = TransferFailure::Disconnected("connection reset".into());
    let lost = Departure::Lost("lease 1 could not be sent: connection reset".into());
    assert_eq!(session.on(Event::PushFailed { lease: 1, failure }), [Command::Leave(lost)]);
}

#[test]
fn a_release_ends_the_membership_for_good() {
    let released =
        |reason: &str, run_goes_on| Driven::computing().on(Event::Released { reason: reason.into(), run_goes_on });
    let departure = Departure::Released("the run is complete".into());
    assert_eq!(released("the run is complete", false), [Command::Leave(departure)]);
    assert_eq!(released("quarantined", true), [Command::Leave(Departure::Dismissed("quarantined".into()))]);
}

#[test]
fn heartbeats_keep_the_interval_and_silence_ends_the_membership() {
    let mut session = Session::new(TIMING, Vec::new(), START);
    let after = |secs| START + Duration::from_secs(secs);
    assert_eq!(session.next_deadline(), START);
    assert_eq!(session.handle(Event::Tick, START), [Command::SendHeartbeat]);
    assert_eq!(session.next_deadline(), after(1));
    assert_eq!(session.handle(Event::Tick, START + Duration::from_millis(999)), []);
    assert_eq!(session.handle(Event::HeartbeatAcked, after(1)), []);
    assert_eq!(session.handle(Event::Tick, after(10)), [Command::SendHeartbeat]);
    assert_eq!(session.next_deadline(), after(11));
    let lost = Departure::Lost("the coordinator has said nothing for 10.0 s".into());
    assert_eq!(session.handle(Event::Tick, after(11)), [Command::Leave(lost)]);
}

/// The world around a session in the property test: what is under way, and what was promised.
#[derive(Default)]
struct World {
    pulling: Option<Parameters>,
    loaded: Option<Parameters>,
    computing: Option<Lease>,
    pushing: BTreeSet<u64>,
    kept: BTreeSet<GradientName>,
    computed: BTreeSet<u64>,
    leases: Vec<Lease>,
    ended: BTreeSet<u64>,
}

impl World {
    /// Carries commands out, checking that each is one that may be given now.
    fn obey(&mut self, commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::SendKept(kept) => self.kept.extend(kept),
                Command::Pull { parameters, lease } => {
                    assert!(self.pulling.is_none() && self.computing.is_none(), "the device does one thing at a time");
                    assert_eq!(self.leases[lease as usize].parameters, parameters);
                    self.loaded = None;
                    self.pulling = Some(parameters);
                }
                Command::Compute { lease } => {
                    let lease = self.leases[lease as usize];
                    assert!(self.pulling.is_none() && self.computing.is_none(), "the device does one thing at a time");
                    assert_eq!(self.loaded, Some(lease.parameters), "parameters of another version");
                    self.computing = Some(lease);
                }
                Command::Recall { lease } => {
                    let name = self.leases[lease as usize].gradient_name().expect("a gradient that has a name");
                    assert!(self.kept.remove(&name), "lease {lease} asks for nothing that is kept");
                    self.computed.insert(lease);
                }
                Command::Forget => self.kept.clear(),
                Command::Push { lease } => {
                    assert!(self.computed.contains(&lease), "lease {lease} has no gradient to push");
                    assert!(self.pushing.insert(lease), "pushed twice at once");
                    assert!(self.pushing.len() <= MAX_UPLOADS, "{} uploads at once", self.pushing.len());
                }
                Command::Abandon { lease } => {
                    let computing = self.computing.take_if(|computing| computing.id == lease).is_some();
                    assert!(self.pushing.remove(&lease) || computing, "lease {lease} is not under way");
                }
                Command::SendResult { lease } | Command::SendDeclined { lease, .. } | Command::Discard { lease } => {
                    assert!(self.ended.insert(lease), "lease {lease} ended twice");
                }
                Command::SendHeartbeat => {}
                Command::Leave(departure) => panic!("no reason to leave: {departure:?}"),
            }
        }
    }

    /// The report of something under way, chosen by `choice`; `None` if nothing is.
    fn report(&mut self, choice: u8) -> Option<Event> {
        let fails = choice.is_multiple_of(5);
        if choice.is_multiple_of(2)
            && let Some(lease) = self.pushing.pop_first()
        {
            return Some(match fails {
                true => Event::PushFailed { lease, failure: refused() },
                false => Event::Pushed { lease },
            });
        }
        if let Some(Lease { id: lease, .. }) = self.computing.take() {
            if fails {
                self.loaded = None;
                return Some(Event::ComputeFailed { lease, reason: "out of memory".into() });
            }
            self.computed.insert(lease);
            return Some(Event::Computed { lease });
        }
        if let Some(parameters) = self.pulling.take() {
            if fails {
                return Some(Event::PullFailed { parameters, failure: refused() });
            }
            self.loaded = Some(parameters);
            return Some(Event::ParametersArrived { parameters });
        }
        self.pushing.pop_first().map(|lease| Event::Pushed { lease })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn every_lease_ends_exactly_once_whatever_happens(choices in prop::collection::vec(any::<u8>(), 0..200)) {
        let kept = (0..40).step_by(3).map(|id| gradient(id, id % 3).gradient_name().unwrap()).collect();
        let mut session = Session::new(TIMING, kept, START);
        let mut world = World::default();
        for choice in choices {
            let id = world.leases.len() as u64;
            let event = match choice % 4 {
                0 => {
                    let make = if choice & 64 == 0 { gradient } else { evaluation };
                    world.leases.push(make(id, u64::from(choice / 4 % 3)));
                    Event::Leased(world.leases[id as usize])
                }
                1 if id > 0 => Event::Revoked { lease: u64::from(choice / 4) % id },
                _ => world.report(choice / 4).unwrap_or(Event::Tick),
            };
            world.obey(session.handle(event, START));
        }
        while let Some(event) = world.report(1) {
            world.obey(session.handle(event, START));
        }
        prop_assert_eq!(world.ended.len(), world.leases.len());
    }
}

/// What a relay has in a device's place computes leases of one step at once, and takes other parameters when all are done.
#[test]
fn several_places_compute_leases_of_one_step_at_once() {
    let mut session = Driven(Session::new(TIMING, Vec::new(), START).with_places(3));
    assert_eq!(session.on(Event::Leased(evaluation(1, 0))), [pull(0, 1)]);
    assert_eq!(session.on(Event::Leased(evaluation(2, 0))), []);
    let both = [Command::Compute { lease: 1 }, Command::Compute { lease: 2 }];
    assert_eq!(session.on(arrived(0)), both);
    // The same parameters, but another task; then other parameters.
    assert_eq!(session.on(Event::Leased(gradient(3, 0))), []);
    assert_eq!(session.on(Event::Leased(gradient(4, 1))), []);
    assert_eq!(session.on(Event::Computed { lease: 2 }), [Command::SendResult { lease: 2 }]);
    let next = [Command::SendResult { lease: 1 }, Command::Compute { lease: 3 }];
    assert_eq!(session.on(Event::Computed { lease: 1 }), next);
    assert_eq!(session.on(Event::Computed { lease: 3 }), [Command::Push { lease: 3 }, pull(1, 4)]);
    assert_eq!(session.on(arrived(1)), [Command::Compute { lease: 4 }]);
    for lease in 5..8 {
        let started = session.on(Event::Leased(gradient(lease, 1)));
        assert_eq!(started.len(), usize::from(lease < 7), "there are three places: {started:?}");
    }
    let revoked = [Command::Abandon { lease: 4 }, Command::Discard { lease: 4 }, Command::Compute { lease: 7 }];
    assert_eq!(session.on(Event::Revoked { lease: 4 }), revoked);
}
