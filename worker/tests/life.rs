//! A worker's life over loopback, with a coordinator that follows a script.

mod scripted;

use std::sync::Arc;

use lockstep_model::batch::Sums;
use lockstep_model::compression::{GradientFormat, Rounding};
use lockstep_model::compute::{Computer, SlotGradient, SlotKey};
use lockstep_model::config::{LineConfig, ModelConfig};
use lockstep_model::device::{ComputeDevice, DeviceChoice};
use lockstep_model::ledger::{block_sha256, slot_sha256};
use lockstep_model::pieces::vector_blake3;
use lockstep_model::probe;
use lockstep_model::tree::{Block, add_vectors};
use lockstep_proto::v1;
use lockstep_worker::{Ended, SpanSource, WorkerConfig, WorkerError, run};
use scripted::{
    INCARNATION, PARAMETERS, RUN_ID, Script, Scripted, Seen, WORKER_ID, batch, invitation, lease, next_parameters,
    span_log,
};
use tokio::task::JoinHandle;
use tonic::Status;

fn cpu() -> ComputeDevice {
    ComputeDevice::open(DeviceChoice::Cpu).expect("this build has the CPU backend")
}

/// The straight line with `parameters`, on the CPU, without a cluster.
fn computer(parameters: &[f32]) -> Computer {
    let line = ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 });
    let mut computer = Computer::new(&line, &cpu());
    computer.load(parameters).unwrap();
    computer
}

fn slot_gradient(computer: &Computer, slot: u32) -> SlotGradient {
    computer.gradient(&batch(slot), SlotKey { seed: 1, step: 8, slot }).unwrap()
}

fn config(address: &str, spans: SpanSource) -> WorkerConfig {
    let (name, joined) = ("test".into(), Arc::new(|| {}));
    WorkerConfig { address: address.into(), name, shared_memory: true, spans, joined }
}

fn worker(address: &str, spans: SpanSource) -> JoinHandle<Result<Ended, WorkerError>> {
    tokio::spawn(run(config(address, spans), cpu(), std::future::pending()))
}

fn no_spans() -> SpanSource {
    Arc::new(Vec::new)
}

#[tokio::test]
async fn a_worker_joins_computes_and_is_released() {
    let mut coordinator = Scripted::start(Script::default(), 0).await;
    let worker = worker(&coordinator.address, no_spans());

    let (admit, to_worker) = coordinator.sees_joining().await;
    let expected = slot_gradient(&computer(&probe::parameters(2)), 0);
    let mut digest = probe::Digest::new();
    digest.add_sums(expected.sums);
    digest.add_vector(&expected.gradient);
    assert_eq!(admit.probe_sha256, digest.finish());
    assert_eq!((admit.run_id.as_str(), admit.incarnation, admit.name.as_str()), (RUN_ID, INCARNATION, "test"));

    to_worker.lease(lease(1, true, &[0, 1, 2])).await;
    to_worker.lease(lease(2, false, &[0, 1])).await;
    let Seen::Pull(pull) = coordinator.sees().await else { panic!("parameters are pulled first") };
    assert_eq!((pull.run_id.as_str(), pull.incarnation, pull.version), (RUN_ID, INCARNATION, 7));

    let computer = computer(&PARAMETERS);
    let [first, second, third] = [0, 1, 2].map(|slot| slot_gradient(&computer, slot));
    let gradient = add_vectors(add_vectors(first.gradient, &second.gradient), &third.gradient);
    let gradient_sums = first.sums + second.sums + third.sums;
    let evaluation = [0, 1].map(|slot| computer.loss(&batch(slot)).unwrap());

    // The evaluation needs no push and may overtake the gradient's.
    let (mut pushed, mut results) = (None, Vec::new());
    while results.len() < 2 {
        match coordinator.sees().await {
            Seen::Push { header, vector, traceparent } => pushed = Some((header, vector, traceparent)),
            Seen::Result(result) => results.push(result),
            other => panic!("{other:?}"),
        }
    }
    let (header, vector, traceparent) = pushed.expect("a gradient is pushed before its result is sent");
    assert_eq!((header.worker_id, header.lease_id, header.total_bytes), (WORKER_ID, 1, 8));
    assert_eq!(vector, gradient);
    assert_eq!(traceparent, Some(lease(1, true, &[0]).traceparent));

    results.sort_by_key(|result| result.lease_id);
    let [of_gradient, of_evaluation] = results.try_into().unwrap();
    assert_eq!(of_gradient.vector_blake3, vector_blake3(&gradient));
    assert_eq!(header.vector_blake3, of_gradient.vector_blake3);
    assert_eq!(Sums { loss: of_gradient.loss_sum, weight: of_gradient.weight_sum, ..Sums::default() }, gradient_sums);
    assert_eq!((of_gradient.step, of_gradient.version), (8, 7));
    assert_eq!(of_gradient.block, Some(v1::Block { level: 2, index: 0 }));
    assert_eq!(of_gradient.batch_sha256, block_sha256([0, 1, 2].map(|slot| slot_sha256(slot, &batch(slot)))));
    assert!(of_gradient.compute_nanos > 0 && of_gradient.upload_nanos > 0);

    assert_eq!(of_evaluation.slot_loss_sums, evaluation.map(|sums| sums.loss));
    assert_eq!(of_evaluation.slot_weight_sums, evaluation.map(|sums| sums.weight));
    assert_eq!(of_evaluation.loss_sum, evaluation[0].loss + evaluation[1].loss);
    assert!(of_evaluation.vector_blake3.is_empty());
    assert_eq!(of_evaluation.batch_sha256, block_sha256([0, 1].map(|slot| slot_sha256(slot, &batch(slot)))));

    to_worker.release("the run is complete").await;
    assert_eq!(worker.await.unwrap().unwrap(), Ended::Released("the run is complete".into()));
}

#[tokio::test]
async fn all_spans_of_a_lease_travel_with_its_result() {
    let mut coordinator = Scripted::start(Script::default(), 0).await;
    let step = 1234;
    let worker = worker(&coordinator.address, span_log::record(step));
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.lease(v1::Lease { step, ..lease(1, true, &[0, 1]) }).await;
    let spans = loop {
        if let Seen::Result(result) = coordinator.sees().await {
            break result.spans;
        }
    };
    let lease_span = spans.last().expect("the lease's span ends last");
    let named = |name: &str| spans.iter().filter(|span| span.name == name).count();
    let counts = ["lease", "pull", "forward", "backward", "read back", "upload"].map(named);
    assert_eq!(counts, [1, 1, 2, 2, 1, 1]);
    assert_eq!((lease_span.name.as_str(), lease_span.parent_span_id), ("lease", 0));
    let children = spans.iter().filter(|span| span.parent_span_id == lease_span.span_id);
    assert_eq!(children.count(), 7);
    to_worker.release("done").await;
    worker.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_worker_connects_again_until_it_is_let_in_and_after_it_is_cut_off() {
    let mut coordinator = Scripted::start(Script::default(), 2).await;
    let worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.fail(Status::unavailable("the coordinator restarts")).await;
    drop(to_worker);
    let (_, to_worker) = coordinator.sees_joining().await;
    drop(to_worker);
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.release("done").await;
    assert_eq!(worker.await.unwrap().unwrap(), Ended::Released("done".into()));
}

#[tokio::test]
async fn damaged_parameters_are_pulled_again() {
    let mut coordinator = Scripted::start(Script { damaged_pulls: 2, ..Script::default() }, 0).await;
    let _worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.lease(lease(1, false, &[0])).await;
    for _ in 0..3 {
        assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    }
    assert!(matches!(coordinator.sees().await, Seen::Result(result) if result.lease_id == 1));
}

#[tokio::test]
async fn parameters_of_another_digest_are_pulled_again() {
    let mut coordinator = Scripted::start(Script { foreign_pulls: 2, ..Script::default() }, 0).await;
    let _worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.lease(lease(1, false, &[0])).await;
    for _ in 0..3 {
        assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    }
    let Seen::Result(result) = coordinator.sees().await else { panic!("the third vector is the right one") };
    assert_eq!(result.loss_sum, computer(&PARAMETERS).loss(&batch(0)).unwrap().loss);

    // Version 7 by another digest is another version: this coordinator does not have it.
    to_worker.lease(v1::Lease { parameters_blake3: vec![1; 32], ..lease(2, false, &[0]) }).await;
    for _ in 0..3 {
        assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    }
    coordinator.sees_joining().await;
}

/// Whoever holds what a difference is from pulls that; others pull all of the version.
#[tokio::test]
async fn parameters_are_pulled_as_a_difference_from_what_is_held() {
    let next = next_parameters();
    let loss = computer(&next).loss(&batch(0)).unwrap().loss;
    let (held, other) = (vector_blake3(&PARAMETERS).to_vec(), vec![9; 32]);
    for (from, pulls) in [(&held, [false, true]), (&other, [false, false])] {
        let mut coordinator = Scripted::start(Script::default(), 0).await;
        let _worker = worker(&coordinator.address, no_spans());
        let (_, to_worker) = coordinator.sees_joining().await;
        let differs = |lease| v1::Lease { difference_from_blake3: from.clone(), ..lease };
        to_worker.lease(differs(lease(1, false, &[0]))).await;
        let parameters_blake3 = vector_blake3(&next).to_vec();
        to_worker.lease(v1::Lease { version: 8, parameters_blake3, ..differs(lease(2, false, &[0])) }).await;
        let mut seen = Vec::new();
        loop {
            match coordinator.sees().await {
                Seen::Pull(pull) => seen.push(pull.difference),
                Seen::Result(result) if result.lease_id == 2 => break assert_eq!(result.loss_sum, loss),
                _ => {}
            }
        }
        assert_eq!(seen, pulls);
    }
}

#[tokio::test]
async fn a_difference_that_leads_elsewhere_is_followed_by_the_whole() {
    let mut coordinator = Scripted::start(Script { foreign_differences: 1, ..Script::default() }, 0).await;
    let _worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.lease(lease(1, false, &[0])).await;
    let (from, to) = (vector_blake3(&PARAMETERS).to_vec(), vector_blake3(&next_parameters()).to_vec());
    let next = v1::Lease { version: 8, parameters_blake3: to, difference_from_blake3: from, ..lease(2, false, &[0]) };
    to_worker.lease(next).await;
    let mut pulls = Vec::new();
    while pulls.len() < 3 {
        if let Seen::Pull(pull) = coordinator.sees().await {
            pulls.push((pull.version, pull.difference));
        }
    }
    assert_eq!(pulls, [(7, false), (8, true), (8, false)]);
    assert!(matches!(coordinator.sees().await, Seen::Result(result) if result.lease_id == 2));
}

#[tokio::test]
async fn a_gradient_travels_in_the_format_that_it_is_rounded_to() {
    for format in [GradientFormat::Bf16, GradientFormat::Int8] {
        let wire = match format {
            GradientFormat::Bf16 => v1::GradientFormat::Bf16,
            _ => v1::GradientFormat::Int8,
        };
        let invitation = v1::Invitation { gradient_format: wire.into(), ..invitation() };
        let mut coordinator = Scripted::start(Script { invitation: Ok(invitation), ..Script::default() }, 0).await;
        let _worker = worker(&coordinator.address, no_spans());
        let (_, to_worker) = coordinator.sees_joining().await;
        to_worker.lease(lease(1, true, &[0, 1])).await;
        let (header, vector) = loop {
            if let Seen::Push { header, vector, .. } = coordinator.sees().await {
                break (header, vector);
            }
        };
        let (computer, rounding) = (computer(&PARAMETERS), Rounding { format, seed: 1, step: 8 });
        let leaf = |slot| {
            let mut gradient = slot_gradient(&computer, slot).gradient;
            rounding.round(Block::leaf(slot), &mut gradient);
            gradient
        };
        assert_eq!(vector, rounding.add(leaf(0), &leaf(1), Block::root(2)));
        assert_eq!(header.total_bytes, format.bytes(2) as u64);
        assert_eq!(header.vector_blake3, vector_blake3(&vector));
    }
}

#[tokio::test]
async fn a_gradient_whose_upload_was_cut_off_is_offered_and_pushed_without_computing_it_anew() {
    let mut coordinator = Scripted::start(Script { stalled_pushes: 1, ..Script::default() }, 0).await;
    let worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.lease(lease(1, true, &[0, 1])).await;
    assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    let Seen::StalledPush(lost) = coordinator.sees().await else { panic!("the gradient is pushed") };
    drop(to_worker);

    let (_, to_worker) = coordinator.sees_joining().await;
    let Seen::Kept(kept) = coordinator.sees().await else { panic!("what is kept is offered first") };
    let block = Some(v1::Block { level: 1, index: 0 });
    assert_eq!(kept.blocks, [v1::KeptBlock { step: 8, version: 7, block }]);
    to_worker.lease(lease(5, true, &[0, 1])).await;
    let Seen::Push { header, vector, .. } = coordinator.sees().await else {
        panic!("nothing is pulled to be computed")
    };
    assert_eq!((header.lease_id, &header.vector_blake3), (5, &lost.vector_blake3));
    let computer = computer(&PARAMETERS);
    let [left, right] = [0, 1].map(|slot| slot_gradient(&computer, slot));
    assert_eq!(vector, add_vectors(left.gradient, &right.gradient));
    let Seen::Result(result) = coordinator.sees().await else { panic!("a result follows the push") };
    assert_eq!((result.lease_id, result.vector_blake3), (5, lost.vector_blake3));
    assert_eq!(Sums { loss: result.loss_sum, weight: result.weight_sum, ..Sums::default() }, left.sums + right.sums);
    assert_eq!(result.batch_sha256, block_sha256([0, 1].map(|slot| slot_sha256(slot, &batch(slot)))));

    // Asked for the same once more, the worker computes it.
    to_worker.lease(lease(6, true, &[0, 1])).await;
    assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    assert!(matches!(coordinator.sees().await, Seen::Push { header, .. } if header.lease_id == 6));
    assert!(matches!(coordinator.sees().await, Seen::Result(result) if result.lease_id == 6));
    to_worker.release("done").await;
    assert_eq!(worker.await.unwrap().unwrap(), Ended::Released("done".into()));
}

#[tokio::test]
async fn a_gradient_that_was_being_computed_when_the_connection_was_lost_is_finished_and_offered() {
    let mut coordinator = Scripted::start(Script::default(), 0).await;
    let _worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;
    to_worker.lease(lease(1, false, &[0])).await;
    assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    assert!(matches!(coordinator.sees().await, Seen::Result(result) if result.lease_id == 1));
    let slots: Vec<u32> = (0..1 << 12).collect();
    to_worker.lease(lease(2, true, &slots)).await;
    drop(to_worker);

    let (_, to_worker) = coordinator.sees_joining().await;
    let Seen::Kept(kept) = coordinator.sees().await else { panic!("what is kept is offered first") };
    let block = Some(v1::Block { level: 12, index: 0 });
    assert_eq!(kept.blocks, [v1::KeptBlock { step: 8, version: 7, block }]);
    to_worker.lease(lease(3, true, &slots)).await;
    assert!(matches!(coordinator.sees().await, Seen::Push { header, .. } if header.lease_id == 3));
    assert!(matches!(coordinator.sees().await, Seen::Result(result) if result.lease_id == 3));
}

#[tokio::test]
async fn a_revoked_lease_is_abandoned_and_the_next_begins() {
    let mut coordinator = Scripted::start(Script { stalled_pushes: 1, ..Script::default() }, 0).await;
    let _worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;

    // While it is sent: the push under way is dropped.
    to_worker.lease(lease(1, true, &[0])).await;
    assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    assert!(matches!(coordinator.sees().await, Seen::StalledPush(header) if header.lease_id == 1));
    to_worker.revoke(1).await;

    // While it is computed, which takes long: so many slots that it is far from its end when it is revoked.
    let slots: Vec<u32> = (0..1 << 15).collect();
    to_worker.lease(lease(2, true, &slots)).await;
    to_worker.revoke(2).await;
    to_worker.lease(lease(3, true, &[0, 1])).await;
    let seen = coordinator.sees().await;
    assert!(matches!(&seen, Seen::Push { header, .. } if header.lease_id == 3), "{seen:?}");
    assert!(matches!(coordinator.sees().await, Seen::Result(result) if result.lease_id == 3));
}

/// A replica cannot begin with other moments than its own.
#[tokio::test]
async fn a_lease_whose_moments_do_not_come_is_declined() {
    let adamw = v1::Adamw { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 };
    let rule = Some(v1::local_optimizer::Rule::Adamw(adamw));
    let local_optimizer = Some(v1::LocalOptimizer { rule, grad_clip: None, keep_moments: true });
    let local = |lease: v1::Lease| v1::Lease {
        task: Some(v1::lease::Task::Gradient(v1::GradientTask { learning_rates: vec![0.1, 0.1] })),
        ..lease
    };
    let probe = vec![local(lease(1, true, &[0]))];
    let invitation = Ok(v1::Invitation { local_optimizer, probe, ..invitation() });
    let mut coordinator = Scripted::start(Script { invitation, ..Script::default() }, 0).await;
    let worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;
    let mut first = local(lease(5, true, &[0]));
    to_worker.lease(first.clone()).await;
    let Seen::Pull(_) = coordinator.sees().await else { panic!("pulled") };
    let Seen::Push { vector, .. } = coordinator.sees().await else { panic!("pushed") };
    assert_eq!(vector.len(), 6, "the way of two parameters, and two moments of each");
    let Seen::Result(_) = coordinator.sees().await else { panic!("computed without moments, which are 0") };

    (first.lease_id, first.slots[0].moments_blake3) = (6, vec![7; 32]);
    to_worker.lease(first).await;
    for _ in 0..3 {
        let Seen::Pull(pull) = coordinator.sees().await else { panic!("asked for, three times in all") };
        assert_eq!(pull.moments_blake3, [7; 32]);
    }
    let Seen::Declined(declined) = coordinator.sees().await else { panic!("they are others") };
    assert!(declined.lease_id == 6 && declined.reason.contains("the replica's moments did not come"), "{declined:?}");
    to_worker.release("done").await;
    worker.await.unwrap().unwrap();
}

#[tokio::test]
async fn leases_that_cannot_be_computed_are_declined_and_the_worker_goes_on() {
    let mut coordinator = Scripted::start(Script::default(), 0).await;
    let _worker = worker(&coordinator.address, no_spans());
    let (_, to_worker) = coordinator.sees_joining().await;

    let without_slots = v1::Lease { slots: Vec::new(), ..lease(1, true, &[0]) };
    to_worker.lease(without_slots).await;
    let Seen::Declined(declined) = coordinator.sees().await else { panic!("declined at once") };
    assert_eq!(
        (declined.lease_id, declined.reason.as_str()),
        (1, "lease 1: slots [] are not the first of block 0/0, slots 0 to 0")
    );

    let mut without_y = lease(2, true, &[0]);
    without_y.slots[0].columns.pop();
    to_worker.lease(without_y).await;
    assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    let Seen::Declined(declined) = coordinator.sees().await else { panic!("declined after the attempt") };
    let expected = "the batch has no f32 column \"y\"; coordinator and worker disagree on the model";
    assert_eq!((declined.lease_id, declined.reason.as_str()), (2, expected));

    to_worker.lease(lease(3, false, &[0])).await;
    assert!(matches!(coordinator.sees().await, Seen::Pull(_)));
    assert!(matches!(coordinator.sees().await, Seen::Result(result) if result.lease_id == 3));
}

#[tokio::test]
async fn a_worker_tells_of_its_membership_and_that_the_run_goes_on_without_it() {
    let mut coordinator = Scripted::start(Script::default(), 0).await;
    let (joined, mut memberships) = tokio::sync::mpsc::unbounded_channel();
    let joined = Arc::new(move || joined.send(()).unwrap());
    let config = WorkerConfig { joined, ..config(&coordinator.address, no_spans()) };
    let worker = tokio::spawn(run(config, cpu(), std::future::pending()));
    let (_, to_worker) = coordinator.sees_joining().await;
    assert!(memberships.is_empty(), "nothing was heard yet");
    to_worker.let_go("quarantined", true).await;
    assert_eq!(worker.await.unwrap().unwrap(), Ended::Dismissed("quarantined".into()));
    assert_eq!((memberships.recv().await, memberships.recv().await), (Some(()), None), "one membership");
}

#[tokio::test]
async fn a_run_that_ends_while_a_worker_joins_releases_it() {
    let over = v1::admit_reply::Verdict::Release("the run is complete".into());
    let coordinator = Scripted::start(Script { verdict: over, ..Script::default() }, 0).await;
    let ended = worker(&coordinator.address, no_spans()).await.unwrap().unwrap();
    assert_eq!(ended, Ended::Released("the run is complete".into()));
}

#[tokio::test]
async fn a_refusal_is_final_and_said_in_words() {
    async fn error_of(script: Script) -> String {
        let coordinator = Scripted::start(script, 0).await;
        let error = worker(&coordinator.address, no_spans()).await.unwrap().unwrap_err();
        error.to_string().replace(&coordinator.address, "ADDRESS")
    }

    let refusal = v1::admit_reply::Verdict::Refusal("another device class; set cluster.exact = false".into());
    let expected = "not admitted by the coordinator at ADDRESS: another device class; set cluster.exact = false";
    assert_eq!(error_of(Script { verdict: refusal, ..Script::default() }).await, expected);

    let other_version = Err(Status::failed_precondition("protocol version 1 here is not 2"));
    let expected = "not admitted by the coordinator at ADDRESS: protocol version 1 here is not 2";
    assert_eq!(error_of(Script { invitation: other_version, ..Script::default() }).await, expected);

    let other_layout = v1::Invitation { layout: Some(v1::Layout::default()), ..invitation() };
    let expected = "not admitted by the coordinator at ADDRESS: the coordinator's invitation makes no sense to this build: \
                    the layout has 0 tensors of 0 elements in all where this build has 2 of 2; run the same version on \
                    both sides";
    assert_eq!(error_of(Script { invitation: Ok(other_layout), ..Script::default() }).await, expected);

    let mut bad_probe = invitation();
    bad_probe.probe[0].slots[0].columns.pop();
    let expected = "this worker cannot compute what the coordinator at ADDRESS trains: the batch has no f32 column \"y\"; \
                    coordinator and worker disagree on the model";
    assert_eq!(error_of(Script { invitation: Ok(bad_probe), ..Script::default() }).await, expected);
}

#[tokio::test]
async fn a_worker_ends_when_it_is_shut_down() {
    let config = config("127.0.0.1:1", no_spans());
    assert_eq!(run(config.clone(), cpu(), async {}).await.unwrap(), Ended::Shutdown);

    let config = WorkerConfig { address: "nowhere".into(), ..config };
    let error = run(config, cpu(), std::future::pending()).await.unwrap_err();
    let expected = "\"nowhere\" is not HOST:PORT (it does not end in a port); for example --join 192.168.1.20:7070";
    assert_eq!(error.to_string(), expected);
}
