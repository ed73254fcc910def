use expect_test::expect;

use super::*;

fn plan(name: &str, overrides: &[&str], bandwidth_bits_per_sec: f64, worker_tokens_per_sec: f64) -> Plan {
    let overrides: Vec<String> = overrides.iter().map(|set| set.to_string()).collect();
    let recipe = Recipe::load(name, &overrides).unwrap();
    Plan::of(&recipe, 65, bandwidth_bits_per_sec, worker_tokens_per_sec)
}

#[test]
fn the_plan_of_a_transformer() {
    expect![[r#"
            recipe            shakespeare-char-cpu
            model             Transformer of 4 layers, 4 heads, 128 wide, context 64, vocabulary 65
            parameters        804,096 (3.22 MB)
            tokens a step     768: 4 slots of 3 sequences of 64
            the run           2,000 steps, 1,536,000 tokens

            on the wire, a step
              parameters      3.22 MB down to each worker
              gradients       3.22 MB up for each block of slots that is leased
              tokens          6.14 kB down in all

            memory, about, beside program and corpus
              a worker        29.08 MB: parameters 6.43 MB, gradients 12.87 MB, activations of a slot 9.78 MB
              the coordinator 19.30 MB: parameters 6.43 MB, moments 6.43 MB, gradients of 2 waiting blocks 6.43 MB
                              and 9.65 MB more while a checkpoint is written

            with 4000 tokens/s a worker and 1000 Mbit/s at the coordinator
              workers  blocks       down         up     compute    transfer        step    tokens/s
                    1       1    3.22 MB    3.22 MB    192.0 ms     51.5 ms    243.5 ms       3,154
                    2       2    6.44 MB    6.43 MB     96.0 ms    103.0 ms    199.0 ms       3,860
                    4       4   12.87 MB   12.87 MB     48.0 ms    205.9 ms    253.9 ms       3,025
            useful workers    2: more shorten the step by less than 5 %, or not at all"#]]
    .assert_eq(&plan("shakespeare-char-cpu", &[], 1e9, 4000.0).to_string());
}

#[test]
fn the_plan_of_adapters() {
    let sets = ["init=runs/a", "adapters.rank=4", "adapters.targets=['c_attn', 'c_fc']", "batch.slots=2"];
    let adapted = plan("shakespeare-char-cpu", &sets, 1e9, 4000.0);
    expect![[r#"
            recipe            shakespeare-char-cpu
            model             Transformer of 4 layers, 4 heads, 128 wide, context 64, vocabulary 65
            parameters        804,096 (3.22 MB)
            trained           18,432 (73.73 kB), 2.29 % of these: adapters of rank 4 beside c_attn, c_fc
            tokens a step     384: 2 slots of 3 sequences of 64
            the run           2,000 steps, 768,000 tokens

            on the wire, a step
              parameters      73.73 kB down to each worker
              gradients       73.73 kB up for each block of slots that is leased
              tokens          3.07 kB down in all
              and once        3.22 MB to each worker: the model that adapters stand on

            memory, about, beside program and corpus
              a worker        13.37 MB: parameters 3.36 MB, gradients 221.18 kB, activations of a slot 9.78 MB
              the coordinator 442.37 kB: parameters 147.46 kB, moments 147.46 kB, gradients of 2 waiting blocks 147.46 kB
                              and 221.18 kB more while a checkpoint is written

            with 4000 tokens/s a worker and 1000 Mbit/s at the coordinator
              workers  blocks       down         up     compute    transfer        step    tokens/s
                    1       1   76.80 kB   73.73 kB     96.0 ms      1.2 ms     97.2 ms       3,950
                    2       2  150.53 kB  147.46 kB     48.0 ms      2.4 ms     50.4 ms       7,621
            useful workers    2: more shorten the step by less than 5 %, or not at all"#]].assert_eq(&adapted.to_string());
    let all = plan("shakespeare-char-cpu", &["batch.slots=2"], 1e9, 4000.0);
    let tokens = 2 * 3 * 64 * 8;
    let wire = |plan: &Plan| (plan.step(1).down_bytes, plan.step(1).up_bytes);
    assert_eq!(wire(&adapted), (4 * adapted.trained + tokens, 4 * adapted.trained));
    assert_eq!(wire(&all), (4 * adapted.parameters + tokens, 4 * adapted.parameters));
    assert_eq!(adapted.trained, 4 * 4 * ((128 + 384) + (128 + 512)));
}

#[test]
fn the_plan_of_replicas() {
    let sets = ["batch.local_steps=50", "schedule.steps=40", "schedule.warmup_steps=2"];
    let local = plan("shakespeare-char-cpu", &sets, 1e8, 4000.0);
    expect![[r#"
            recipe            shakespeare-char-cpu
            model             Transformer of 4 layers, 4 heads, 128 wide, context 64, vocabulary 65
            parameters        804,096 (3.22 MB)
            tokens a round    38,400: 4 replicas, 50 local steps of 3 sequences of 64
            the run           40 rounds, 2,000 local steps, 1,536,000 tokens

            on the wire, a round
              parameters      3.22 MB down to each worker
              gradients       3.22 MB up for each block of slots that is leased
              tokens          307.20 kB down in all

            memory, about, beside program and corpus
              a worker        45.16 MB: parameters 6.43 MB, gradients 12.87 MB, activations of a slot 9.78 MB
                              replica and moments 16.08 MB
              the coordinator 22.51 MB: parameters 6.43 MB, moments 3.22 MB, gradients of 4 waiting blocks 12.87 MB
                              and 6.43 MB more while a checkpoint is written

            with 4000 tokens/s a worker and 100 Mbit/s at the coordinator
              workers  blocks       down         up     compute    transfer       round    tokens/s
                    1       1    3.52 MB    3.22 MB      9.60 s    539.2 ms     10.14 s       3,787
                    2       2    6.74 MB    6.43 MB      4.80 s      1.05 s      5.85 s       6,560
                    4       4   13.17 MB   12.87 MB      2.40 s      2.08 s      4.48 s       8,566
            useful workers    4: more shorten the round by less than 5 %, or not at all"#]]
    .assert_eq(&local.to_string());
    // As many bytes a round as a step has without, but for tokens; and fifty times as long to compute.
    let all = plan("shakespeare-char-cpu", &[], 1e8, 4000.0);
    let tokens = 4 * 3 * 64 * 8;
    assert_eq!(local.step(4).down_bytes - 50 * tokens, all.step(4).down_bytes - tokens);
    assert!((local.step(4).compute_secs / all.step(4).compute_secs - 50.0).abs() < 1e-9);
    assert_eq!((all.useful_workers, local.useful_workers), (1, 4));
    let kept = plan("shakespeare-char-cpu", &[&sets[..], &["outer.keep_moments=true"]].concat(), 1e8, 4000.0);
    assert!(kept.to_string().contains("  moments         6.43 MB down to each replica, and as much up"), "{kept}");
    let vector = 4 * kept.trained;
    // A replica's way is a vector, and its moments are two in each direction.
    for workers in [1, 4] {
        let Step { down_bytes, up_bytes, .. } = kept.step(workers);
        assert_eq!(down_bytes, (u64::from(workers) + 4 * 2) * vector + 50 * tokens);
        assert_eq!(up_bytes, 4 * (1 + 2) * vector);
    }
}

#[test]
fn the_plan_of_the_line() {
    expect![[r#"
            recipe            line
            model             straight line
            parameters        2 (8 B)
            tokens a step     10: 2 slots of 5 rows
            the run           200 steps, 2,000 tokens

            on the wire, a step
              parameters      8 B down to each worker
              gradients       8 B up for each block of slots that is leased
              tokens          80 B down in all

            memory, about, beside program and corpus
              a worker        100 B: parameters 16 B, gradients 24 B, activations of a slot 60 B
              the coordinator 32 B: parameters 16 B, moments 0 B, gradients of 2 waiting blocks 16 B
                              and 8 B more while a checkpoint is written

            with 1000000 tokens/s a worker and 1000 Mbit/s at the coordinator
              workers  blocks       down         up     compute    transfer        step    tokens/s
                    1       1       88 B        8 B     10.0 µs      0.8 µs     10.8 µs     928,678
                    2       2       96 B       16 B      5.0 µs      0.9 µs      5.9 µs   1,696,065
            useful workers    2: more shorten the step by less than 5 %, or not at all"#]]
    .assert_eq(&plan("line", &[], 1e9, 1e6).to_string());
}

#[test]
fn wire_bytes_are_vectors_and_tokens() {
    let tokens = 4 * 3 * 64 * 8;
    for (gradients, parameters, pushed, pulled) in [
        ("f32", "f32", 804_096 * 4, 804_096 * 4),
        ("bf16", "bf16", 804_096 * 2, 804_096 * 2),
        // 3,141 blocks of 256 elements, with a byte more each.
        ("int8", "bf16", 804_096 + 3_141, 804_096 * 2),
        ("int8", "f32", 804_096 + 3_141, 804_096 * 4),
    ] {
        let sets = [format!("wire.gradients={gradients}"), format!("wire.parameters={parameters}")];
        let plan = plan("shakespeare-char-cpu", &sets.each_ref().map(|set| set.as_str()), 1e9, 4000.0);
        // One worker pulls once and pushes the whole tree; four pull and push each.
        for (workers, step) in [(1, plan.step(1)), (4, plan.step(4))] {
            assert_eq!((step.down_bytes, step.up_bytes), (workers * pulled + tokens, workers * pushed));
            let secs = (workers * (pulled + pushed) + tokens) as f64 * 8.0 / 1e9;
            assert!((step.transfer_secs - secs).abs() < 1e-12);
        }
    }
}

#[test]
fn the_plan_of_a_slow_network() {
    let sets = ["wire.gradients=int8", "wire.parameters=bf16"];
    expect![[r#"
            recipe            shakespeare-char-cpu
            model             Transformer of 4 layers, 4 heads, 128 wide, context 64, vocabulary 65
            parameters        804,096 (3.22 MB)
            tokens a step     768: 4 slots of 3 sequences of 64
            the run           2,000 steps, 1,536,000 tokens

            on the wire, a step
              parameters      1.61 MB down to each worker that holds the version before; 3.22 MB to others
              gradients       807.24 kB up for each block of slots that is leased
              tokens          6.14 kB down in all

            memory, about, beside program and corpus
              a worker        29.08 MB: parameters 6.43 MB, gradients 12.87 MB, activations of a slot 9.78 MB
              the coordinator 20.91 MB: parameters 11.26 MB, moments 6.43 MB, gradients of 1 waiting blocks 3.22 MB
                              and 12.87 MB more while a checkpoint is written

            with 4000 tokens/s a worker and 10 Mbit/s at the coordinator
              workers  blocks       down         up     compute    transfer        step    tokens/s
                    1       1    1.61 MB  807.24 kB    192.0 ms      1.94 s      2.13 s         361
                    2       2    3.22 MB    1.61 MB     96.0 ms      3.87 s      3.97 s         194
                    4       4    6.44 MB    3.23 MB     48.0 ms      7.73 s      7.78 s          99
            useful workers    1: more shorten the step by less than 5 %, or not at all"#]]
    .assert_eq(&plan("shakespeare-char-cpu", &sets, 1e7, 4000.0).to_string());
}

#[test]
fn slots_are_leased_in_aligned_blocks() {
    let plan = plan("line", &["batch.slots=12"], 1e9, 1e6);
    let blocks = [(1, 1), (2, 3), (3, 3), (4, 6), (5, 6), (7, 12), (12, 12)];
    for (workers, blocks) in blocks {
        assert_eq!(plan.step(workers).blocks, blocks, "{workers} workers");
    }
    // Three blocks of four slots for two workers: one of them computes two.
    assert!((plan.step(2).compute_secs - 8.0 * 5.0 / 1e6).abs() < 1e-12);
    assert!((plan.step(3).compute_secs - 4.0 * 5.0 / 1e6).abs() < 1e-12);
}

#[test]
fn a_lease_is_one_message() {
    // A slot of 4 MiB: two of them fill a lease.
    let plan = plan("line", &["batch.slots=8", "batch.sequences_per_slot=524288"], 1e9, 1e6);
    assert_eq!(plan.step(1).blocks, 4);
}

#[test]
fn a_slow_link_needs_few_workers_and_a_fast_one_takes_all() {
    let useful = |bandwidth| plan("shakespeare-char-cpu", &["batch.slots=16"], bandwidth, 4000.0).useful_workers;
    assert_eq!(useful(1e12), 16);
    assert_eq!(useful(1e6), 1);
    let all = [1e6, 1e7, 1e8, 1e9, 1e10, 1e12].map(useful);
    assert!(all.is_sorted(), "{all:?}");
}

#[test]
fn a_worker_that_only_waits_is_not_useful() {
    // With four slots, a third worker leaves the busiest with two all the same.
    let plan = plan("shakespeare-char-cpu", &[], 2e8, 4000.0);
    assert!(plan.step(3).secs() > plan.step(2).secs());
    assert_ne!(plan.useful_workers, 3);
}
