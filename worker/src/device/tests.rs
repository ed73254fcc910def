//! The device's thread on the straight line, whose sums can be checked against a plain loop.

use std::cell::Cell;
use std::sync::Weak;

use lockstep_model::adapters::{AdapterConfig, all_targets};
use lockstep_model::batch::{Batch, Column, Values};
use lockstep_model::compression::Rounding;
use lockstep_model::compute::{Computer, SlotGradient, SlotKey};
use lockstep_model::config::{Gelu, GptConfig, LineConfig, UpdateRule};
use lockstep_model::device::DeviceChoice;
use lockstep_model::layout::Layout;
use lockstep_model::ledger::{block_sha256, slot_sha256};
use lockstep_model::probe;
use lockstep_model::tree::{Block, add_vectors};
#[cfg(target_os = "linux")]
use lockstep_proto::{
    region::{Region, stamp_of},
    v1,
};

use super::thread::{caught, in_one_line};
use super::*;
use crate::lease::{Lease, Slot, Task};
#[cfg(target_os = "linux")]
use crate::shared::Shared;

const LINE: ModelConfig = ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 });

fn line() -> Setting {
    Setting {
        model: LINE,
        objective: Objective::NextToken,
        adapters: None,
        local_optimizer: None,
        format: GradientFormat::F32,
        precision: Precision::F32,
    }
}

fn batch(slot: u32) -> Batch {
    let column =
        |name: &str, values: Vec<f32>| Column { name: name.into(), shape: [2, 1], values: Values::F32(values) };
    let x = vec![0.3 + slot as f32, 1.7 * slot as f32];
    let y = x.iter().map(|x| 1.9 * x + 0.2).collect();
    Batch { columns: vec![column("x", x), column("y", y)] }
}

fn work(task: Task, block: Block, step_slots: u32) -> Arc<Work> {
    let slots =
        block.slots(step_slots).map(|number| Slot { number, batch: batch(number), moments_blake3: None }).collect();
    let parameters = Parameters { version: 0, digest: Some([7; 32]) };
    let lease = Lease { id: 1, step: 1, parameters, block, seed: 1, task };
    Arc::new(Work {
        lease,
        slots,
        learning_rates: Vec::new(),
        difference_from: None,
        traceparent: String::new(),
        step_slots: None,
    })
}

fn cpu() -> ComputeDevice {
    ComputeDevice::open(DeviceChoice::Cpu).expect("this build has the CPU backend")
}

/// The definition: a node is its left child plus its right one, where that covers a slot.
fn recursive(computer: &Computer, block: Block, step_slots: u32) -> SlotGradient {
    let Some([left, right]) = block.children() else {
        let key = SlotKey { seed: 1, step: 1, slot: block.index };
        return computer.gradient(&batch(block.index), key).unwrap();
    };
    let left = recursive(computer, left, step_slots);
    if !right.exists(step_slots) {
        return left;
    }
    let right = recursive(computer, right, step_slots);
    SlotGradient { sums: left.sums + right.sums, gradient: add_vectors(left.gradient, &right.gradient) }
}

#[tokio::test]
async fn a_block_is_summed_in_tree_order() {
    let parameters = [0.35, 0.01];
    let mut computer = Computer::new(&LINE, &cpu());
    computer.load(&parameters).unwrap();
    let device = DeviceThread::start(cpu()).unwrap();
    device.probe(line(), Vec::new()).await.unwrap();
    device.load(parameters.to_vec()).await.unwrap();

    let blocks = [(3, 0, 7), (2, 1, 7), (1, 3, 7), (0, 5, 7), (2, 1, 5), (3, 0, 5)];
    for (level, index, step_slots) in blocks {
        let block = Block { level, index };
        let outcome = device
            .compute(work(Task::Gradient, block, step_slots), Vec::new(), Stop::default(), Span::none())
            .await
            .unwrap();
        let expected = recursive(&computer, block, step_slots);
        assert_eq!(outcome.sums, expected.sums, "block {block} of {step_slots}");
        assert_eq!(outcome.gradient, Some(Gradient::from(expected.gradient)));
        assert_eq!(outcome.slot_sums.len(), block.slots(step_slots).len());
        assert_eq!(outcome.batch_sha256, block_sha256(block.slots(step_slots).map(|s| slot_sha256(s, &batch(s)))));
    }
}

/// Two local steps in each slot, of a row each.
fn local_work(block: Block, step_slots: u32) -> Work {
    Work { learning_rates: vec![0.1, 0.05], ..Work::clone(&work(Task::Gradient, block, step_slots)) }
}

fn line_of_replicas() -> Setting {
    Setting {
        local_optimizer: Some(LocalOptimizer { rule: UpdateRule::Sgd, grad_clip: None, keep_moments: false }),
        ..line()
    }
}

#[tokio::test]
async fn replicas_go_their_way_and_what_comes_back_is_how_far() {
    let start = [0.35f32, 0.01];
    let replica = |slot: u32| {
        let (x, y) = (batch(slot).columns[0].values.clone(), batch(slot).columns[1].values.clone());
        let (Values::F32(x), Values::F32(y)) = (x, y) else { panic!("the line reads floats") };
        let [mut weight, mut bias] = start;
        for ((x, y), lr) in x.into_iter().zip(y).zip([0.1f32, 0.05]) {
            let error = x * weight + bias - y;
            weight -= lr * (x * (error + error));
            bias -= lr * (error + error);
        }
        vec![start[0] - weight, start[1] - bias]
    };
    let device = DeviceThread::start(cpu()).unwrap();
    device.probe(line_of_replicas(), Vec::new()).await.unwrap();
    device.load(start.to_vec()).await.unwrap();
    let evaluation = work(Task::Evaluate, Block::root(3), 3);
    let before = device.compute(evaluation.clone(), Vec::new(), Stop::default(), Span::none()).await.unwrap();
    let outcome = device
        .compute(Arc::new(local_work(Block::root(3), 3)), Vec::new(), Stop::default(), Span::none())
        .await
        .unwrap();
    let expected = add_vectors(add_vectors(replica(0), &replica(1)), &replica(2));
    assert_eq!(outcome.gradient, Some(Gradient::from(expected)));
    assert_eq!((outcome.sums.weight, outcome.slot_sums.len()), (6.0, 3));
    // The parameters that were loaded are there still.
    let after = device.compute(evaluation, Vec::new(), Stop::default(), Span::none()).await.unwrap();
    assert_eq!(after.sums, before.sums);
}

#[tokio::test]
async fn local_steps_need_an_optimizer_and_an_optimizer_local_steps() {
    let device = DeviceThread::start(cpu()).unwrap();
    let gradient = work(Task::Gradient, Block::leaf(0), 1);
    for (setting, work, expected) in [
        (
            line(),
            Arc::new(local_work(Block::leaf(0), 1)),
            "the lease has 2 local steps, and the invitation no optimizer",
        ),
        (line_of_replicas(), gradient, "the lease has 0 local steps, and the invitation one optimizer"),
    ] {
        device.probe(setting, Vec::new()).await.unwrap();
        device.load(vec![0.35, 0.01]).await.unwrap();
        let failure = device.compute(work, Vec::new(), Stop::default(), Span::none()).await.unwrap_err();
        assert!(failure.to_string().starts_with(expected), "{failure}");
    }
}

#[tokio::test]
async fn an_evaluation_has_sums_and_no_gradient() {
    let device = DeviceThread::start(cpu()).unwrap();
    device.probe(line(), Vec::new()).await.unwrap();
    device.load(vec![1.9, 0.2]).await.unwrap();
    let outcome = device
        .compute(work(Task::Evaluate, Block::root(3), 3), Vec::new(), Stop::default(), Span::none())
        .await
        .unwrap();
    assert_eq!(outcome.sums.weight, 6.0);
    assert!(outcome.sums.loss < 1e-9, "{:?}", outcome.sums);
    assert_eq!((outcome.slot_sums.len(), outcome.gradient), (3, None));
}

#[tokio::test]
async fn the_probe_is_the_digest_of_sums_and_gradients_with_the_probes_parameters() {
    let leases = [work(Task::Gradient, Block::root(2), 2), work(Task::Evaluate, Block::leaf(0), 1)];
    let mut computer = Computer::new(&LINE, &cpu());
    computer.load(&probe::parameters(2)).unwrap();
    let gradient = recursive(&computer, Block::root(2), 2);
    let mut expected = probe::Digest::new();
    expected.add_sums(gradient.sums);
    expected.add_vector(&gradient.gradient);
    expected.add_sums(computer.loss(&batch(0)).unwrap());

    let device = DeviceThread::start(cpu()).unwrap();
    let leases = leases.iter().map(|work| Work::clone(work)).collect();
    assert_eq!(device.probe(line(), leases).await.unwrap(), expected.finish());
}

/// Blocks of what a step has are rounded at their nodes, and the probe's digest holds its gradient as it was before, too.
#[tokio::test]
async fn gradients_are_rounded_to_what_the_run_says() {
    let parameters = [0.35, 0.01];
    let mut computer = Computer::new(&LINE, &cpu());
    for format in [GradientFormat::Bf16, GradientFormat::Int8] {
        let rounding = Rounding { format, seed: 1, step: 1 };
        let leaf = |computer: &Computer, slot: u32| {
            let key = SlotKey { seed: 1, step: 1, slot };
            let SlotGradient { sums, gradient } = computer.gradient(&batch(slot), key).unwrap();
            let mut rounded = gradient.clone();
            rounding.round(Block::leaf(slot), &mut rounded);
            (sums, gradient, rounded)
        };
        computer.load(&probe::parameters(2)).unwrap();
        let (sums, before, rounded) = leaf(&computer, 0);
        assert_ne!(before, rounded);
        let mut expected = probe::Digest::new();
        expected.add_sums(sums);
        expected.add_vector(&before);
        expected.add_vector(&rounded);

        let device = DeviceThread::start(cpu()).unwrap();
        let probe = vec![Work::clone(&work(Task::Gradient, Block::leaf(0), 1))];
        assert_eq!(device.probe(Setting { format, ..line() }, probe).await.unwrap(), expected.finish());
        device.load(parameters.to_vec()).await.unwrap();
        let block = work(Task::Gradient, Block { level: 1, index: 1 }, 4);
        let outcome = device.compute(block, Vec::new(), Stop::default(), Span::none()).await.unwrap();
        computer.load(&parameters).unwrap();
        let (left, right) = (leaf(&computer, 2).2, leaf(&computer, 3).2);
        let sum = rounding.add(left, &right, Block { level: 1, index: 1 });
        assert_eq!(outcome.gradient, Some(Gradient::from(sum)));
    }
}

#[tokio::test]
async fn a_failure_is_told_and_the_thread_goes_on_after_another_load() {
    let device = DeviceThread::start(cpu()).unwrap();
    device.probe(line(), Vec::new()).await.unwrap();
    device.load(vec![0.35, 0.01]).await.unwrap();
    let good = work(Task::Gradient, Block::leaf(0), 1);
    let mut bad = Work::clone(&good);
    bad.slots[0].batch.columns.pop();

    let failure = device.compute(Arc::new(bad), Vec::new(), Stop::default(), Span::none()).await.unwrap_err();
    let expected = "the batch has no f32 column \"y\"; coordinator and worker disagree on the model";
    assert_eq!(failure.to_string(), expected);
    let failure = device.compute(good.clone(), Vec::new(), Stop::default(), Span::none()).await.unwrap_err();
    assert_eq!(failure.to_string(), "no parameters are loaded");
    device.load(vec![0.35, 0.01]).await.unwrap();
    device.compute(good, Vec::new(), Stop::default(), Span::none()).await.unwrap();
}

/// The thread's state without the thread, with parameters loaded.
fn device_worker() -> DeviceWorker {
    let mut worker = DeviceWorker::new(cpu(), Weak::new());
    worker.setting = Some(line());
    worker.load(&[0.35, 0.01]).unwrap();
    worker
}

#[test]
fn a_computation_is_cut_short_between_two_slots_and_leaves_the_parameters_where_they_are() {
    let worker = device_worker();
    for task in [Task::Gradient, Task::Evaluate] {
        let work = work(task, Block::root(8), 8);
        let asked = Cell::new(0);
        let after_two_slots = || {
            asked.set(asked.get() + 1);
            asked.get() > 2
        };
        assert_eq!(worker.compute(&work, &[], after_two_slots).unwrap(), None);
        assert_eq!(asked.get(), 3);
        assert!(worker.compute(&work, &[], || false).unwrap().is_some());
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_lease_is_computed_as_soon_as_its_parameters_are_out_of_shared_memory() {
    let [even, odd, gradient] = [(); 3].map(|()| Region::create(&[3; 32], 2).unwrap());
    let parameters = vec![even.path(), odd.path()];
    let offer = v1::SharedMemory { token: vec![3; 32], parameters, gradient: gradient.path() };
    let shared = Arc::new(Shared::open(&offer, 2, 2).unwrap());
    even.write(0, &[0.35, 0.01]).unwrap();
    even.put_stamp(stamp_of(&[7; 32])).unwrap();
    let device = DeviceThread::start(cpu()).unwrap();
    device.probe(line(), Vec::new()).await.unwrap();

    let lease = work(Task::Gradient, Block::root(3), 3);
    let version = || shared.version(lease.lease.parameters).unwrap();
    let next = || Some((lease.clone(), Stop::default(), Span::none()));
    let (loaded, outcome) = device.load_shared(version(), next());
    assert_eq!(loaded.get().await, Ok(true));
    let outcome = outcome.unwrap().get().await.unwrap();
    let asked = device.compute(lease.clone(), Vec::new(), Stop::default(), Span::none()).await.unwrap();
    assert_eq!((outcome.gradient, outcome.sums), (asked.gradient, asked.sums));

    let (overwritten, next) = (version(), next());
    even.clear().unwrap();
    let (loaded, outcome) = device.load_shared(overwritten, next);
    assert_eq!(loaded.get().await, Ok(false));
    assert!(outcome.unwrap().get().await.is_err(), "nothing is computed with what is not there");
}

#[tokio::test]
async fn a_computation_that_is_stopped_gives_nothing_and_is_not_kept() {
    let device = DeviceThread::start(cpu()).unwrap();
    device.probe(line(), Vec::new()).await.unwrap();
    device.load(vec![0.35, 0.01]).await.unwrap();
    let stop = Stop::default();
    stop.set();
    let failure =
        device.compute(work(Task::Gradient, Block::root(2), 2), Vec::new(), stop, Span::none()).await.unwrap_err();
    assert_eq!(failure.to_string(), "the computation was cut short: its lease is no longer wanted");
    assert_eq!(device.enter(String::new()).await.unwrap(), []);
    device.compute(work(Task::Gradient, Block::root(2), 2), Vec::new(), Stop::default(), Span::none()).await.unwrap();
}

#[tokio::test]
async fn a_gradient_is_kept_though_nobody_waits_for_it_and_an_evaluation_is_cut_short() {
    let device = DeviceThread::start(cpu()).unwrap();
    device.probe(line(), Vec::new()).await.unwrap();
    device.load(vec![0.35, 0.01]).await.unwrap();
    assert_eq!(device.enter("run".into()).await.unwrap(), []);
    drop(device.compute(work(Task::Gradient, Block::leaf(0), 2), Vec::new(), Stop::default(), Span::none()));
    drop(device.compute(work(Task::Evaluate, Block::leaf(1), 2), Vec::new(), Stop::default(), Span::none()));
    let kept = device.enter("run".into()).await.unwrap();
    let expected = work(Task::Gradient, Block::leaf(0), 2).lease.gradient_name();
    assert_eq!(kept.iter().map(|kept| Some(kept.name)).collect::<Vec<_>>(), [expected]);
    let again = device
        .compute(work(Task::Gradient, Block::leaf(0), 2), Vec::new(), Stop::default(), Span::none())
        .await
        .unwrap();
    assert_eq!(kept[0].outcome.gradient, again.gradient);
    assert_eq!(device.enter("another run".into()).await.unwrap(), []);
}

#[test]
fn nothing_is_computed_to_the_end_when_the_worker_is_gone() {
    let mut worker = device_worker();
    let (reply, answer) = oneshot::channel();
    drop(answer);
    let (work, stop, span) = (work(Task::Gradient, Block::leaf(0), 1), Stop::default(), Span::none());
    worker.do_job(Job::Compute(Computation { work, moments: Vec::new(), stop, span, reply }));
    assert_eq!(worker.kept.enter(""), []);
}

#[test]
fn a_long_report_comes_down_to_its_first_root_cause() {
    let report = "An error happened\nCaused by:\n  Several failures\nCaused by:\n  can't allocate buffer of size: 7\nNo backtrace\n\
                  Caused by:\n  another\n";
    assert_eq!(in_one_line(report), "An error happened: Several failures: can't allocate buffer of size: 7");
    assert_eq!(in_one_line("short"), "short");
}

#[test]
fn a_panic_of_the_backend_names_the_device_and_the_setting_to_change() {
    let failure = caught::<()>("wgpu (a GPU)", || panic!("out of memory: {} bytes", 7)).unwrap_err();
    let expected = "wgpu (a GPU) failed: out of memory: 7 bytes; if memory ran out, lower batch.sequences_per_slot in the \
                    recipe (and raise batch.slots); else start this worker with --device cpu";
    assert_eq!(failure.to_string(), expected);
}

fn adapted() -> (ModelConfig, Adapters) {
    let model = ModelConfig::Gpt(GptConfig {
        vocab_size: 7,
        context: 4,
        layers: 1,
        heads: 1,
        width: 4,
        bias: false,
        tied_head: true,
        score_head: false,
        gelu: Gelu::Exact,
        norm_epsilon: 1e-5,
        dropout: 0.0,
    });
    let config = AdapterConfig { rank: 2, alpha: 2.0, targets: all_targets(&model), whole: Vec::new() };
    let base = BaseName { blake3: [5; 32], elements: Layout::of(&model).len() };
    (model, Adapters { config, base })
}

/// Some text as slot 0.
fn text(task: Task) -> Arc<Work> {
    let column = |name: &str, values: [u32; 4]| Column {
        name: name.into(),
        shape: [1, 4],
        values: Values::U32(values.to_vec()),
    };
    let batch = Batch { columns: vec![column("tokens", [1, 2, 3, 4]), column("targets", [2, 3, 4, 5])] };
    let mut work = Work::clone(&work(task, Block::leaf(0), 1));
    work.slots[0].batch = batch;
    Arc::new(work)
}

#[tokio::test]
async fn a_base_is_held_over_memberships_and_until_a_failure() {
    let (model, adapters) = adapted();
    let (config, name) = (&adapters.config, adapters.base);
    let base: Vec<f32> = (0..name.elements).map(|i| (i as f32 * 0.7).sin() / 4.0).collect();
    let mut computer = Computer::new(&model, &cpu()).with_adapters(config);
    let trained: Vec<f32> = (0..computer.layout().len()).map(|i| (i as f32 * 0.3).cos() / 4.0).collect();
    computer.stand_on(computer.base(&base).unwrap());
    computer.load(&trained).unwrap();
    let gradient = text(Task::Gradient);
    let key = SlotKey { seed: 1, step: 1, slot: 0 };
    let expected = Some(Gradient::from(computer.gradient(&gradient.slots[0].batch, key).unwrap().gradient));
    let computed = async |device: &DeviceThread| {
        device.load(trained.clone()).await.unwrap();
        device.compute(gradient.clone(), Vec::new(), Stop::default(), Span::none()).await.unwrap().gradient
    };

    // What the probe says is of the probe's base.
    computer.stand_on(computer.base(&probe::parameters(name.elements)).unwrap());
    computer.load(&probe::parameters(computer.layout().len())).unwrap();
    let mut digest = probe::Digest::new();
    let of_probe = computer.gradient(&gradient.slots[0].batch, key).unwrap();
    digest.add_sums(of_probe.sums);
    digest.add_vector(&of_probe.gradient);
    let digest = digest.finish();

    let device = DeviceThread::start(cpu()).unwrap();
    let setting = |adapters| Setting { adapters, model: model.clone(), ..line() };
    let join = async |adapters: &Adapters| {
        let leases = vec![Work::clone(&gradient)];
        device.probe(setting(Some(adapters.clone())), leases).await.unwrap()
    };
    assert_eq!(join(&adapters).await, digest);
    assert!(!device.holds(name).await.unwrap(), "a probe's base is none");
    device.load_base(name, base.clone()).await.unwrap();
    assert_eq!(computed(&device).await, expected);
    assert_eq!(join(&adapters).await, digest);
    assert!(device.holds(name).await.unwrap(), "the next membership finds it");
    assert_eq!(computed(&device).await, expected);

    let mut bad = Work::clone(&gradient);
    bad.slots[0].batch.columns.pop();
    device.compute(Arc::new(bad), Vec::new(), Stop::default(), Span::none()).await.unwrap_err();
    assert!(!device.holds(name).await.unwrap(), "what a failure leaves behind is not used again");
    assert!(device.load_base(name, base[1..].to_vec()).await.is_err());
    device.load_base(name, base).await.unwrap();
    assert_eq!(computed(&device).await, expected);
    let another = Adapters { base: BaseName { blake3: [6; 32], ..name }, ..adapters };
    join(&another).await;
    assert!(!device.holds(name).await.unwrap() && !device.holds(another.base).await.unwrap());
}
