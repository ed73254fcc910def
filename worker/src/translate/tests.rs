//! What is taken from the wire, and what is refused in which words.

use expect_test::{Expect, expect};

use super::*;

fn u32_column() -> v1::Column {
    let data: Vec<u8> = [7u32, 8, 9, u32::MAX].iter().flat_map(|value| value.to_le_bytes()).collect();
    let element_type = v1::ElementType::U32.into();
    v1::Column { name: "tokens".into(), element_type, shape: vec![2, 2], data: data.into() }
}

fn wire_lease() -> v1::Lease {
    let slot = |slot| v1::Slot { slot, columns: vec![u32_column()], moments_blake3: Vec::new() };
    v1::Lease {
        lease_id: 5,
        step: 3,
        version: 2,
        block: Some(v1::Block { level: 2, index: 1 }),
        task: Some(v1::lease::Task::Gradient(v1::GradientTask::default())),
        slots: vec![slot(4), slot(5), slot(6)],
        seed: 11,
        traceparent: "00-aa-bb-01".into(),
        parameters_blake3: vec![3; 32],
        difference_from_blake3: vec![4; 32],
        step_slots: 7,
    }
}

fn wire_invitation() -> v1::Invitation {
    let spec = |name: &str, shape: Vec<u32>, offset_elements, decay| v1::TensorSpec {
        name: name.into(),
        shape,
        offset_elements,
        decay,
        trainable: true,
    };
    v1::Invitation {
        run_id: "ab".into(),
        incarnation: 4,
        model: Some(v1::Model { kind: Some(v1::model::Kind::Line(v1::Line {})) }),
        layout: Some(v1::Layout {
            tensors: vec![spec("weight", vec![1, 1], 0, true), spec("bias", vec![1], 1, false)],
            total_elements: 2,
        }),
        probe: vec![wire_lease()],
        heartbeat_interval_ms: 500,
        liveness_timeout_ms: 3000,
        objective: None,
        adapters: None,
        local_optimizer: None,
        gradient_format: v1::GradientFormat::Int8.into(),
        precision: v1::Precision::Bf16.into(),
    }
}

fn wire_gpt() -> v1::Gpt {
    v1::Gpt { vocab_size: 65, context: 8, layers: 1, heads: 2, width: 4, norm_epsilon: 1e-5, ..Default::default() }
}

fn wire_llama() -> v1::Llama {
    v1::Llama {
        vocab_size: 65,
        context: 8,
        layers: 1,
        heads: 4,
        kv_heads: 2,
        width: 16,
        ffn_width: 24,
        rope_theta: 1e4,
        norm_epsilon: 1e-5,
        ..Default::default()
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, WireError>, words: &Expect) {
    words.assert_eq(&result.unwrap_err().to_string());
}

#[test]
fn a_lease_is_read_in_full() {
    let work = work(wire_lease()).unwrap();
    let block = Block { level: 2, index: 1 };
    let parameters = Parameters { version: 2, digest: Some([3; 32]) };
    assert_eq!(work.lease, Lease { id: 5, step: 3, parameters, block, seed: 11, task: Task::Gradient });
    assert_eq!((work.first_slot(), work.slots.len()), (4, 3));
    assert_eq!(work.traceparent, "00-aa-bb-01");
    let values = Values::U32(vec![7, 8, 9, u32::MAX]);
    assert_eq!(work.slots[0].batch.columns, [Column { name: "tokens".into(), shape: [2, 2], values }]);
}

#[test]
fn parameters_without_a_digest_are_named_by_number() {
    let lease = work(v1::Lease { parameters_blake3: Vec::new(), ..wire_lease() }).unwrap().lease;
    assert_eq!((lease.parameters, lease.gradient_name()), (Parameters { version: 2, digest: None }, None));
}

#[test]
fn what_is_kept_is_offered_by_step_version_and_block() {
    let name = work(wire_lease()).unwrap().lease.gradient_name().unwrap();
    let expected = v1::KeptBlock { step: 3, version: 2, block: Some(v1::Block { level: 2, index: 1 }) };
    assert_eq!(kept(&[name]).blocks, [expected]);
}

#[test]
fn floats_keep_their_bits() {
    let bits = [0x7fc0_1234_u32, 0x8000_0000, 1, 0x3f80_0000];
    let data: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let wire = v1::Column { element_type: v1::ElementType::F32.into(), data: data.into(), ..u32_column() };
    let Values::F32(values) = column(wire).unwrap().values else { panic!("an f32 column") };
    assert_eq!(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), bits);
}

#[test]
fn senseless_leases_are_refused_in_words() {
    let slots = |numbers: &[u32]| numbers.iter().map(|&slot| v1::Slot { slot, ..v1::Slot::default() }).collect();
    let with_slots = |numbers: &[u32]| work(v1::Lease { slots: slots(numbers), ..wire_lease() });
    refused(with_slots(&[]), &expect!["lease 5: slots [] are not the first of block 2/1, slots 4 to 7"]);
    refused(with_slots(&[4, 6]), &expect!["lease 5: slots [4, 6] are not the first of block 2/1, slots 4 to 7"]);
    refused(
        with_slots(&[4, 5, 6, 7, 8]),
        &expect!["lease 5: slots [4, 5, 6, 7, 8] are not the first of block 2/1, slots 4 to 7"],
    );
    let block = Some(v1::Block { level: 40, index: 0 });
    refused(work(v1::Lease { block, ..wire_lease() }), &expect!["lease 5: block level 40 is above 31"]);
    refused(
        work(v1::Lease { block: None, ..wire_lease() }),
        &expect!["lease 5: its block is missing, or of a kind that this build does not know"],
    );
    refused(
        work(v1::Lease { task: None, ..wire_lease() }),
        &expect!["lease 5: its task is missing, or of a kind that this build does not know"],
    );
    refused(
        work(v1::Lease { parameters_blake3: vec![1; 31], ..wire_lease() }),
        &expect!["lease 5: parameters_blake3 has 31 bytes, not 32"],
    );
    let with_column = |column| {
        let slot = |slot, column: &v1::Column| v1::Slot {
            slot,
            columns: vec![u32_column(), column.clone()],
            moments_blake3: Vec::new(),
        };
        work(v1::Lease { slots: vec![slot(4, &column)], ..wire_lease() })
    };
    refused(
        with_column(v1::Column { shape: vec![4], ..u32_column() }),
        &expect![[r#"lease 5: slot 4: column "tokens" has shape [4], which is not [rows, length]"#]],
    );
    refused(
        with_column(v1::Column { shape: vec![u32::MAX, u32::MAX], ..u32_column() }),
        &expect![[
            r#"lease 5: slot 4: column "tokens" of shape [4294967295, 4294967295] has 16 bytes, not 4 an element"#
        ]],
    );
    refused(
        with_column(v1::Column { element_type: 9, ..u32_column() }),
        &expect![[r#"lease 5: slot 4: column "tokens" has element type 9, which this build does not know"#]],
    );
}

#[test]
fn a_lease_that_makes_no_sense_keeps_its_id() {
    let lease = v1::Lease { task: None, ..wire_lease() };
    let message = v1::CoordinatorMessage { kind: Some(v1::coordinator_message::Kind::Lease(lease)) };
    let reason = "lease 5: its task is missing, or of a kind that this build does not know".into();
    assert_eq!(instruction(message), Some(Instruction::Unreadable { lease: 5, reason }));
    assert_eq!(instruction(v1::CoordinatorMessage { kind: None }), None);
}

#[test]
fn an_invitation_is_read_in_full() {
    let invitation = invitation(wire_invitation()).unwrap();
    assert_eq!(invitation.run, Run { id: "ab".into(), incarnation: 4 });
    assert_eq!(invitation.model, ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 }));
    assert_eq!((invitation.elements, invitation.probe.len()), (2, 1));
    assert_eq!((invitation.format, invitation.precision), (GradientFormat::Int8, Precision::Bf16));
    let (heartbeat_interval, liveness_timeout) = (Duration::from_millis(500), Duration::from_secs(3));
    assert_eq!(invitation.timing, Timing { heartbeat_interval, liveness_timeout });
}

#[test]
fn a_format_of_gradients_that_is_not_known_is_refused() {
    refused(
        invitation(v1::Invitation { gradient_format: 9, ..wire_invitation() }),
        &expect!["gradients are rounded to format 9, which this build does not know"],
    );
}

#[test]
fn another_layout_is_refused_by_its_first_difference() {
    let with_layout = |change: fn(&mut v1::Layout)| {
        let mut wire = wire_invitation();
        wire.layout.as_mut().map(change).unwrap();
        invitation(wire)
    };
    refused(
        with_layout(|layout| layout.tensors[1].name = "b".into()),
        &expect![[
            r#"the layout has TensorSpec { name: "b", shape: [1], offset: 1, decay: false, trainable: true } where this build has TensorSpec { name: "bias", shape: [1], offset: 1, decay: false, trainable: true }"#
        ]],
    );
    refused(
        with_layout(|layout| layout.tensors.truncate(1)),
        &expect!["the layout has 1 tensors of 2 elements in all where this build has 2 of 2"],
    );
    refused(
        with_layout(|layout| layout.total_elements = 3),
        &expect!["the layout has 2 tensors of 3 elements in all where this build has 2 of 2"],
    );
}

#[test]
fn adapters_name_projections_and_what_they_stand_on() {
    let spec = |name: &str, shape: Vec<u32>, offset_elements| v1::TensorSpec {
        name: name.into(),
        decay: shape.len() == 2,
        shape,
        offset_elements,
        trainable: true,
    };
    let adapters = || v1::Adapters {
        rank: 2,
        alpha: 8.0,
        targets: vec!["c_fc".into()],
        whole: vec!["ln_f.weight".into()],
        base: Some(v1::Layout {
            tensors: vec![
                spec("wte.weight", vec![65, 4], 0),
                spec("wpe.weight", vec![8, 4], 260),
                spec("h.0.ln_1.weight", vec![4], 292),
                spec("h.0.attn.c_attn.weight", vec![4, 12], 296),
                spec("h.0.attn.c_proj.weight", vec![4, 4], 344),
                spec("h.0.ln_2.weight", vec![4], 360),
                spec("h.0.mlp.c_fc.weight", vec![4, 16], 364),
                spec("h.0.mlp.c_proj.weight", vec![16, 4], 428),
            ],
            total_elements: 492,
        }),
        base_blake3: vec![9; 32],
    };
    let gpt = v1::Gpt { tied_head: true, ..wire_gpt() };
    let with = |adapters| v1::Invitation {
        model: Some(v1::Model { kind: Some(v1::model::Kind::Gpt(gpt)) }),
        layout: Some(v1::Layout {
            tensors: vec![
                spec("h.0.mlp.c_fc.lora_A.weight", vec![4, 2], 0),
                spec("h.0.mlp.c_fc.lora_B.weight", vec![2, 16], 8),
                spec("ln_f.weight", vec![4], 40),
            ],
            total_elements: 44,
        }),
        adapters: Some(adapters),
        ..wire_invitation()
    };
    let read = invitation(with(adapters())).unwrap();
    let Adapters { config, base } = read.adapters.unwrap();
    assert_eq!((read.elements, base), (44, BaseName { blake3: [9; 32], elements: 492 }));
    assert_eq!((config.rank, config.alpha), (2, 8.0));
    refused(
        invitation(with(v1::Adapters { targets: vec!["q_proj".into()], ..adapters() })),
        &expect![[r#"adapters: "q_proj" is no projection of this model; there are c_attn, c_proj, c_fc"#]],
    );
    refused(invitation(with(v1::Adapters { rank: 0, ..adapters() })), &expect!["adapters of rank 0 and alpha 8"]);
    refused(
        invitation(with(v1::Adapters { rank: 3, ..adapters() })),
        &expect![[
            r#"the layout has TensorSpec { name: "h.0.mlp.c_fc.lora_A.weight", shape: [4, 2], offset: 0, decay: true, trainable: true } where this build has TensorSpec { name: "h.0.mlp.c_fc.lora_A.weight", shape: [4, 3], offset: 0, decay: true, trainable: true }"#
        ]],
    );
    refused(
        invitation(with(v1::Adapters { base: Some(v1::Layout::default()), ..adapters() })),
        &expect!["the layout has 0 tensors of 0 elements in all where this build has 8 of 492"],
    );
    refused(
        invitation(with(v1::Adapters { base_blake3: vec![9; 31], ..adapters() })),
        &expect!["base_blake3 has 31 bytes, not 32"],
    );
}

#[test]
fn models_that_cannot_be_are_refused() {
    assert_eq!(gpt(&wire_gpt()).unwrap().gelu, Gelu::Exact);
    refused(gpt(&v1::Gpt { layers: 0, ..wire_gpt() }), &expect!["the model's layers is 0"]);
    refused(gpt(&v1::Gpt { heads: 3, ..wire_gpt() }), &expect!["the model's 3 heads do not divide its width 4"]);
    refused(gpt(&v1::Gpt { dropout: 1.0, ..wire_gpt() }), &expect!["the model's dropout 1 is not in [0, 1)"]);
    refused(llama(&v1::Llama { ffn_width: 0, ..wire_llama() }), &expect!["the model's ffn_width is 0"]);
    refused(
        llama(&v1::Llama { kv_heads: 3, ..wire_llama() }),
        &expect!["the model's 3 kv_heads do not divide its heads 4"],
    );
    refused(
        llama(&v1::Llama { width: 12, ..wire_llama() }),
        &expect!["the model's head width 3 is odd, and its halves are rotated"],
    );
    let given = llama(&v1::Llama { width: 12, head_width: 6, ..wire_llama() }).unwrap();
    assert_eq!(given.head_width(), 6);
    refused(
        model(&v1::Model { kind: None }),
        &expect!["the kind of model is missing, or of a kind that this build does not know"],
    );
}

#[test]
fn texts_are_cut_between_characters() {
    assert_eq!(shortened("größe", 3), "gr");
    assert_eq!(shortened("größe", 64), "größe");
}

#[test]
fn a_local_optimizer_is_read_or_refused() {
    let adamw = || v1::Adamw { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
    let config = AdamwConfig { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
    let with = |rule, grad_clip| {
        let local_optimizer = Some(v1::LocalOptimizer { rule, grad_clip, keep_moments: false });
        invitation(v1::Invitation { local_optimizer, ..wire_invitation() }).map(|read| read.local_optimizer.unwrap())
    };
    use v1::local_optimizer::Rule;
    let muon = |momentum, others| Rule::Muon(v1::Muon { momentum, others });
    for (rule, expected) in [
        (Rule::Adamw(adamw()), UpdateRule::Adamw(config.clone())),
        (muon(0.95, Some(adamw())), UpdateRule::Muon(MuonConfig { momentum: 0.95, adamw: config })),
        (Rule::Nesterov(v1::Nesterov { momentum: 0.9 }), UpdateRule::Nesterov(NesterovConfig { momentum: 0.9 })),
        (Rule::Sgd(v1::Sgd {}), UpdateRule::Sgd),
    ] {
        assert_eq!(
            with(Some(rule), Some(1.0)).unwrap(),
            LocalOptimizer { rule: expected, grad_clip: Some(1.0), keep_moments: false }
        );
    }
    assert_eq!(invitation(wire_invitation()).unwrap().local_optimizer, None);
    let adamw_rule = Some(Rule::Adamw(adamw()));
    let kept = v1::LocalOptimizer { rule: adamw_rule, grad_clip: None, keep_moments: true };
    let kept = invitation(v1::Invitation { local_optimizer: Some(kept), ..wire_invitation() }).unwrap();
    assert_eq!((kept.elements, kept.kept_elements), (2, 4));
    let refusals = [
        with(None, None),
        with(Some(Rule::Adamw(v1::Adamw { beta2: 1.0, ..adamw() })), None),
        with(Some(muon(0.95, None)), None),
        with(Some(Rule::Nesterov(v1::Nesterov { momentum: -0.1 })), None),
        with(Some(Rule::Sgd(v1::Sgd {})), Some(0.0)),
    ];
    expect![[r#"
        the local optimizer's rule is missing, or of a kind that this build does not know
        the local optimizer's AdamwConfig { beta1: 0.9, beta2: 1.0, epsilon: 1e-8, weight_decay: 0.1 } cannot be
        what Muon does not rule is missing, or of a kind that this build does not know
        the local optimizer's momentum -0.1 is not in [0, 1)
        the local optimizer's grad_clip Some(0.0) is not above 0"#]]
    .assert_eq(&refusals.map(|refused| refused.unwrap_err().to_string()).join("\n"));
}

#[test]
fn learning_rates_come_with_a_lease() {
    let with = |learning_rates| {
        work(v1::Lease { task: Some(v1::lease::Task::Gradient(v1::GradientTask { learning_rates })), ..wire_lease() })
    };
    assert_eq!(with(vec![0.1, 0.2]).unwrap().learning_rates, [0.1, 0.2]);
    refused(with(vec![0.1, f64::NAN]), &expect!["lease 5: a learning rate is NaN"]);
}

#[test]
fn a_slot_names_the_moments_that_it_begins_with() {
    let with = |moments_blake3| {
        let mut lease = wire_lease();
        lease.slots[0].moments_blake3 = moments_blake3;
        work(lease)
    };
    let read = with(vec![5; 32]).unwrap();
    assert_eq!((read.slots[0].moments_blake3, read.slots[1].moments_blake3), (Some([5; 32]), None));
    refused(with(vec![5; 3]), &expect!["lease 5: slot 4: moments_blake3 has 3 bytes, not 32"]);
}
