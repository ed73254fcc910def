//! Recipes from text to types and back, and what they refuse.

use expect_test::expect;
use lockstep_model::compression::{GradientFormat, ParameterFormat};
use lockstep_model::config::{AdamwConfig, Decay, DpoConfig, LineConfig, NesterovConfig, UpdateRule};
use lockstep_model::layout::Layout;

use super::keys::{KEYS, Key};
use super::*;

fn load(name: &str, overrides: &[&str]) -> Result<Recipe, RecipeError> {
    let overrides: Vec<String> = overrides.iter().map(|set| set.to_string()).collect();
    Recipe::load(name, &overrides)
}

/// An embedded recipe, with a small model where it leaves that to `init`.
fn embedded(name: &str) -> Recipe {
    match name {
        "sft" | "reward" | "dpo" => small(name, &["init=elsewhere"]),
        name => load(name, &[]).unwrap(),
    }
}

/// A recipe that leaves its model to `init`, with a small one.
fn small(name: &str, overrides: &[&str]) -> Recipe {
    const MODEL: [&str; 4] = ["model.layers=1", "model.heads=2", "model.width=16", "model.context=64"];
    load(name, &[&MODEL, overrides].concat()).unwrap()
}

/// The recipe that learns from conversations, with a small model.
pub(crate) fn sft(overrides: &[&str]) -> Recipe {
    small("sft", overrides)
}

/// The recipe that learns from preferences, with a small model.
pub(crate) fn dpo(overrides: &[&str]) -> Recipe {
    small("dpo", &[&["init=elsewhere"], overrides].concat())
}

/// A recipe whose settings do not change.
fn fixed(overrides: &[&str]) -> Result<Recipe, RecipeError> {
    load("shakespeare-char-cpu", overrides)
}

/// What it says when these keys, separated by spaces, are set.
fn refusal(overrides: &str) -> String {
    match fixed(&overrides.split(' ').collect::<Vec<_>>()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{overrides} is accepted"),
    }
}

fn parameters(recipe: &Recipe, vocab_size: usize) -> usize {
    Layout::of(&recipe.model.with_vocabulary(vocab_size)).len()
}

#[test]
fn embedded_recipes_are_whole_and_carry_their_own_names() {
    for (name, _) in EMBEDDED {
        assert_eq!(embedded(name).name, name);
    }
}

#[test]
fn a_recipe_survives_being_written() {
    let mut recipes: Vec<Recipe> = EMBEDDED.iter().map(|(name, _)| embedded(name)).collect();
    for set in [
        "optimizer.epsilon=6.02214076e-23",
        "optimizer.lr=0.30000000000000004",
        "optimizer.lr=1",
        "optimizer.kind=sgd",
        "optimizer.kind=nesterov",
        "batch.local_steps=10",
        "schedule.decay=constant",
        "model.kind=line",
        "adapters.rank=0",
        "tokenizer.kind=bpe",
        "tokenizer.file=data/tokenizer.json",
        "data.input=['a.txt', 'b']",
        "data.input=C:\\texts\\\"odd\" name.txt",
        "sampling.prompts=[\"\\n\", \"'\\\"\\\\\\t\\u007f\\u0000\", \"第一\"]",
        "checkpoint.stop_after=10",
        "name=a b",
        "seed=9223372036854775807",
    ] {
        recipes.push(fixed(&[set]).unwrap());
    }
    recipes.push(fixed(&["init=runs/a", "adapters.rank=4", "adapters.targets=['c_fc']"]).unwrap());
    for recipe in recipes {
        let text = recipe.to_toml();
        let again = Recipe::from_toml("another name", &text, &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(again, recipe);
        assert_eq!(again.to_toml(), text);
    }
}

#[test]
fn the_whole_text_names_every_key_that_is_read() {
    expect![[r#"
        name = "line"
        seed = 1

        [model]
        kind = "line"
        initial_weight = 0.35
        initial_bias = 0.01

        [optimizer]
        kind = "sgd"
        lr = 0.01
        grad_clip = 0.0
        max_bad_steps = 3
        skip_above_median = 0.0

        [schedule]
        steps = 200
        warmup_steps = 0
        decay = "constant"

        [batch]
        slots = 2
        sequences_per_slot = 5
        local_steps = 0

        [wire]
        gradients = "f32"
        parameters = "f32"

        [evaluation]
        every_steps = 0
        slots = 32

        [sampling]
        every_steps = 200
        prompts = ["5.0"]

        [checkpoint]
        every_steps = 0
        every_secs = 30.0
        keep_last = 2
        stop_after = 0

        [cluster]
        min_workers = 1
        exact = true
        audit = 0.0
        on_dispute = "wait"
        heartbeat_interval_ms = 1000
        liveness_timeout_ms = 10000
    "#]]
    .assert_eq(&load("line", &[]).unwrap().to_toml());
    for (name, _) in EMBEDDED {
        let values = embedded(name).values;
        let kinds = values.kinds().unwrap();
        for key in KEYS {
            assert_eq!(values.find(key.path).is_some(), key.reader.includes(kinds), "{name}: {}", key.path);
        }
    }
}

/// Whether an embedded recipe names a key of its own, at the beginning of a line.
fn names(recipe: &str, key: &Key) -> bool {
    let (_, text) = EMBEDDED.iter().find(|(name, _)| *name == recipe).unwrap();
    let table: toml::Table = text.parse().unwrap();
    let section =
        if key.section().is_empty() { Some(&table) } else { table.get(key.section()).and_then(|s| s.as_table()) };
    let line = text.lines().any(|line| line.starts_with(&format!("{} ", key.leaf())));
    line && section.is_some_and(|section| section.contains_key(key.leaf()))
}

#[test]
fn the_quickstarts_explain_every_key_of_a_transformer() {
    let kinds = |recipe: &str| load(recipe, &[]).unwrap().values.kinds().unwrap();
    let (gpt, llama) = (kinds("quickstart"), kinds("quickstart-llama"));
    for key in KEYS.iter().filter(|key| key.path != "name") {
        if key.reader.includes(gpt) {
            assert!(names("quickstart", key), "{} is not in quickstart.toml", key.path);
        } else if key.reader.includes(llama) {
            assert!(names("quickstart-llama", key), "{} is not in quickstart-llama.toml", key.path);
        }
    }
}

#[test]
fn the_sizes_of_a_llama_fit_together() {
    let model = |sets: &[&str]| match load("quickstart-llama", sets).map(|recipe| recipe.model.0) {
        Ok(ModelConfig::Llama(llama)) => Ok((llama.heads, llama.kv_heads, llama.ffn_width)),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    };
    assert_eq!(model(&[]), Ok((4, 2, 384)));
    assert_eq!(model(&["model.kv_heads=0", "model.ffn_width=0"]), Ok((4, 4, 352)));
    assert_eq!(model(&["model.heads=6", "model.head_width=10"]), Ok((6, 2, 384)));
    assert_eq!(model(&["model.rope_scaling=[8, 1, 4, 8192]"]), Ok((4, 2, 384)));
    let refused = [
        ["model.kv_heads=3"],
        ["model.heads=128"],
        ["model.width=129"],
        ["model.head_width=33"],
        ["model.rope_scaling=[8, 4, 1, 8192]"],
        ["model.gelu=tanh"],
    ];
    expect![[r#"
        recipe quickstart-llama: model.kv_heads = 3: heads must divide model.heads = 4; for example model.kv_heads = 2
        recipe quickstart-llama: model.heads = 128: heads must divide half of model.width = 64; for example model.heads = 64
        recipe quickstart-llama: model.width = 129: rotary positions turn pairs of numbers: it must be even; for example model.width = 130
        recipe quickstart-llama: model.head_width = 33: rotary positions turn pairs of numbers: it must be even; for example model.head_width = 34
        recipe quickstart-llama: model.rope_scaling = [8, 4, 1, 8192]: must be empty, or factor (at least 1), low_freq_factor, high_freq_factor (above the second) and original context; for example model.rope_scaling = [8.0, 1.0, 4.0, 8192.0]
        recipe quickstart-llama: model.gelu = "tanh": nothing reads this key beside the others; leave it out, or change the kind; for example model.kind = "gpt""#]].assert_eq(&refused.map(|sets| model(&sets).unwrap_err()).join("\n"));
}

#[test]
fn a_recipe_needs_only_what_has_no_default() {
    const LEAST: &str = "
        [model]
        layers = 1
        heads = 1
        width = 7
        context = 8
        [data]
        input = 'text.txt'
        [optimizer]
        lr = 1
        [schedule]
        steps = 10
        [batch]
        slots = 3
        sequences_per_slot = 1";
    let recipe = Recipe::from_toml("least", LEAST, &[]).unwrap();
    assert_eq!(recipe.name, "least");
    assert_eq!(recipe.optimizer.lr, 1.0);
    assert_eq!(recipe.evaluation, EvaluationConfig { every_steps: 0, slots: 0 });
    for line in LEAST.lines().filter(|line| line.contains('=')) {
        let error = Recipe::from_toml("least", &LEAST.replace(line, ""), &[]).unwrap_err().to_string();
        assert!(error.contains("is missing; for example"), "{error}");
    }
}

#[test]
fn conversations_take_a_stage_of_their_own() {
    let recipe = sft(&["data.input=['a.jsonl', 'b']"]);
    let data = recipe.data.as_ref().unwrap();
    assert_eq!((data.stage, data.order, data.inputs.len()), (Stage::Sft, WindowOrder::Epoch, 2));
    assert_eq!(recipe.bytes_per_token(), 16);
    assert_eq!(fixed(&[]).unwrap().data.unwrap().stage, Stage::Pretrain);
    // Keys of plain text have no meaning here, and a straight line reads none.
    expect![[r#"
        recipe shakespeare-char-cpu: data.weights = [2.0]: nothing reads this key beside the others; leave it out, or change the kind; for example stage = "pretrain"
        recipe shakespeare-char-cpu: data.separate_documents = true: nothing reads this key beside the others; leave it out, or change the kind; for example stage = "pretrain"
        recipe shakespeare-char-cpu: stage = "sft": nothing reads this key beside the others; leave it out, or change the kind; for example model.kind = "gpt"
        recipe shakespeare-char-cpu: stage = "rlhf": must be one of `pretrain`, `sft`, `reward`, `dpo`; for example stage = "pretrain""#]]
    .assert_eq(
        &[
            "stage=sft data.weights=[2.0]",
            "stage=sft data.separate_documents=true",
            "model.kind=line stage=sft",
            "stage=rlhf",
        ]
        .map(refusal)
        .join("\n"),
    );
}

#[test]
fn a_recipe_without_a_model_takes_that_of_init() {
    let init = |name: &str, sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Recipe::init_of_unnamed_model(name, &sets).unwrap()
    };
    let said = Recipe::init_of_unnamed_model("sft", &[]).unwrap_err().to_string();
    expect![[r#"recipe sft: init = "": the recipe has no [model] either, so that nothing says which model is to learn; for example init = "runs/quickstart-1""#]].assert_eq(&said);
    assert_eq!(init("sft", &["init=runs/a"]), Some("runs/a".into()));
    assert_eq!(init("sft", &["init=runs/a", "model.context=64", "model.dropout=0.1"]), Some("runs/a".into()));
    assert_eq!(init("sft", &["init=runs/a", "model.layers=4"]), None);
    assert_eq!(init("quickstart", &["init=runs/a"]), None);
}

#[test]
fn the_reference_settings_are_exact() {
    let cpu = load("shakespeare-char-cpu", &[]).unwrap();
    assert_eq!(parameters(&cpu, 65), 804_096);
    assert_eq!(cpu.schedule.decay, Decay::Cosine { steps: 2000 });
    assert_eq!(cpu.batch.slots * cpu.batch.sequences_per_slot, 12);
    assert_eq!(cpu.evaluation.slots * cpu.batch.sequences_per_slot, 200 * 12);
    let adamw = UpdateRule::Adamw(AdamwConfig { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 });
    assert_eq!(cpu.optimizer, OptimizerConfig { rule: adamw.clone(), lr: 1e-3, grad_clip: Some(1.0) });

    let gpu = load("shakespeare-char", &[]).unwrap();
    assert_eq!(gpu.batch.slots * gpu.batch.sequences_per_slot, 64);
    assert_eq!(gpu.evaluation.slots * gpu.batch.sequences_per_slot, 200 * 64);
    assert_eq!((gpu.schedule.steps, gpu.evaluation.every_steps, gpu.optimizer.rule), (5000, 250, adamw));
    assert!(matches!(gpu.model.0, ModelConfig::Gpt(GptConfig { dropout: 0.2, context: 256, .. })));

    let line = load("line", &[]).unwrap();
    assert_eq!(line.model.0, ModelConfig::Line(LineConfig { weight: 0.35, bias: 0.01 }));
    assert_eq!(line.optimizer, OptimizerConfig { rule: UpdateRule::Sgd, lr: 0.01, grad_clip: None });
    assert_eq!(line.schedule, ScheduleConfig { steps: 200, warmup_steps: 0, decay: Decay::Constant, min_lr: 0.0 });
    assert_eq!(line.batch, BatchConfig { slots: 2, sequences_per_slot: 5, local_steps: 1 });
    assert_eq!(line.data, None);

    let quickstart = load("quickstart", &[]).unwrap();
    assert!((800_000..1_000_000).contains(&parameters(&quickstart, 80)));
}

#[test]
fn overrides_are_toml_values_or_bare_texts() {
    let recipe = fixed(&["data.input=a/b.txt", "model.heads = 2", "sampling.prompts=['a']", "seed=3", "seed=4"]);
    let recipe = recipe.unwrap();
    let input = Input::Path("a/b.txt".into());
    assert_eq!(recipe.data.unwrap().inputs, [WeightedInput { input, weight: 1.0 }]);
    assert_eq!((recipe.sampling.prompts, recipe.seed), (vec!["a".to_string()], 4));
    expect![[r#"
        --set steps: must have the form KEY=VALUE; for example --set schedule.steps=100
        --set =3: has no key before the =; for example --set schedule.steps=100"#]]
    .assert_eq(&["steps", "=3"].map(refusal).join("\n"));
}

#[test]
fn another_kind_needs_no_cleaning_up() {
    let sgd = fixed(&["optimizer.kind=sgd"]).unwrap();
    assert_eq!(sgd.optimizer.rule, UpdateRule::Sgd);
    let constant = fixed(&["schedule.decay=constant"]).unwrap();
    assert_eq!(constant.schedule.decay, Decay::Constant);
    let line = fixed(&["model.kind=line", "batch.sequences_per_slot=1000000"]).unwrap();
    assert_eq!((line.data, line.sampling.tokens), (None, 0));
}

#[test]
fn decays_end_with_the_run_unless_told_otherwise() {
    let decay = |sets: &[&str]| fixed(sets).unwrap().schedule.decay;
    assert_eq!(decay(&["schedule.steps=500"]), Decay::Cosine { steps: 500 });
    assert_eq!(decay(&["schedule.decay=linear", "schedule.decay_steps=9000"]), Decay::Linear { steps: 9000 });
    assert_eq!(decay(&["schedule.steps=500", "schedule.decay=wsd"]), Decay::Wsd { steps: 100 });
    assert_eq!(decay(&["schedule.steps=110", "schedule.decay=wsd"]), Decay::Wsd { steps: 10 });
    assert_eq!(decay(&["schedule.decay=wsd", "schedule.decay_steps=7"]), Decay::Wsd { steps: 7 });
}

#[test]
fn refusals_name_key_value_reason_and_example() {
    let refusals = [
        "model.heads=5",
        "model.heads=four",
        "model.layers=0",
        "model.kind=gtp",
        "model.gelu=3",
        "model.bias=yes",
        "model.dropout=1.0",
        "model.width=65536 model.layers=100",
        "optimizer.lr=nan",
        "optimizer.weight_decay=-0.1",
        "schedule.decay=fast",
        "schedule.steps=20",
        "schedule.min_lr=0.1",
        "schedule.decay_steps=20",
        "schedule.decay=wsd schedule.decay_steps=9000",
        "schedule.decay=wsd schedule.warmup_steps=2000",
        "schedule.steps=9223372036854775807",
        "batch.slots=65537",
        "batch.sequences_per_slot=16385",
        "model.context=1 batch.sequences_per_slot=1000000 batch.slots=65536",
        "evaluation.slots=0",
        "data.train_fraction=1.0",
        "data.input=",
        "data.input=builtin:moby",
        "data.input=[]",
        "data.weights=[1,0]",
        "data.input=['a.txt','b.txt'] data.weights=[1]",
        "data.input=['a.txt','b.txt'] data.order=epoch",
        "tokenizer.kind=bpe tokenizer.vocab_size=256",
        "tokenizer.file=3",
        "sampling.prompts=[]",
        "sampling.prompts=[\"\"]",
        "sampling.temperature=-1",
        "checkpoint.keep_last=0",
        "checkpoint.stop_after=2001",
        "cluster.min_workers=0",
        "cluster.liveness_timeout_ms=2999",
        "name=../escape",
        "seed=-1",
    ];
    expect![[r#"
        recipe shakespeare-char-cpu: model.heads = 5: heads must divide model.width = 128; for example model.heads = 4
        recipe shakespeare-char-cpu: model.heads = "four": must be a whole number from 1 to 65536; for example model.heads = 4
        recipe shakespeare-char-cpu: model.layers = 0: must be a whole number from 1 to 1024; for example model.layers = 4
        recipe shakespeare-char-cpu: model.kind = "gtp": must be one of `gpt`, `llama`, `line`; for example model.kind = "gpt"
        recipe shakespeare-char-cpu: model.gelu = 3: must be `exact` or `tanh`; for example model.gelu = "exact"
        recipe shakespeare-char-cpu: model.bias = "yes": must be true or false; for example model.bias = true
        recipe shakespeare-char-cpu: model.dropout = 1.0: must be a number of at least 0 and below 1; for example model.dropout = 0.0
        recipe shakespeare-char-cpu: model.width = 65536: the model would have 5153978187776 parameters, more than the 2147483648 there may be; for example model.width = 128
        recipe shakespeare-char-cpu: optimizer.lr = nan: must be a number above 0; for example optimizer.lr = 0.001
        recipe shakespeare-char-cpu: optimizer.weight_decay = -0.1: must be a number of at least 0; for example optimizer.weight_decay = 0.01
        recipe shakespeare-char-cpu: schedule.decay = "fast": must be one of `cosine`, `linear`, `wsd`, `constant`; for example schedule.decay = "cosine"
        recipe shakespeare-char-cpu: schedule.warmup_steps = 100: the warm-up is longer than the run, which has schedule.steps = 20; for example schedule.warmup_steps = 2
        recipe shakespeare-char-cpu: schedule.min_lr = 0.1: the rate would rise from its peak, optimizer.lr = 0.001; for example schedule.min_lr = 0.0001
        recipe shakespeare-char-cpu: schedule.decay_steps = 20: the decay ends before schedule.warmup_steps = 100; for example schedule.decay_steps = 2000
        recipe shakespeare-char-cpu: schedule.decay_steps = 9000: the run has only 1900 steps after its warm-up; for example schedule.decay_steps = 1900
        recipe shakespeare-char-cpu: schedule.warmup_steps = 2000: leaves no step to the final decay, as schedule.steps = 2000; for example schedule.warmup_steps = 0
        recipe shakespeare-char-cpu: schedule.steps = 9223372036854775807: the run would read more than 9223372036854775807 tokens; for example schedule.steps = 1000
        recipe shakespeare-char-cpu: batch.slots = 65537: must be a whole number from 1 to 65536; for example batch.slots = 4
        recipe shakespeare-char-cpu: batch.sequences_per_slot = 16385: a slot's batch would have 8389120 bytes (64 tokens a sequence, 8 bytes each), and one message carries at most 8388608; for example batch.sequences_per_slot = 16384
        recipe shakespeare-char-cpu: batch.slots = 65536: with 1000000 sequences each, there would be more than 4294967295 sequences; for example batch.slots = 4
        recipe shakespeare-char-cpu: evaluation.slots = 0: must be a whole number from 1 to 65536; for example evaluation.slots = 32
        recipe shakespeare-char-cpu: data.train_fraction = 1.0: leaves no text to evaluate on; lower it, or set evaluation.every_steps = 0; for example data.train_fraction = 0.9
        recipe shakespeare-char-cpu: data.input = "": must be a text in quotes, and not an empty one; for example data.input = "builtin:kjv"
        recipe shakespeare-char-cpu: data.input = "builtin:moby": the only built-in text is builtin:kjv; for example data.input = "builtin:kjv"
        recipe shakespeare-char-cpu: data.input = []: must name at least one input; for example data.input = "builtin:kjv"
        recipe shakespeare-char-cpu: data.weights = [1, 0]: must be a list of numbers above 0; for example data.weights = []
        recipe shakespeare-char-cpu: data.weights = [1]: there must be one weight for each of the inputs, which are 2, or none, and not 1; for example data.weights = []
        recipe shakespeare-char-cpu: data.order = "epoch": a mixture is drawn from at random: its parts are not through at the same time; for example data.order = "random", or a single data.input
        recipe shakespeare-char-cpu: tokenizer.vocab_size = 256: must be a whole number from 257 to 1048576; for example tokenizer.vocab_size = 4096
        recipe shakespeare-char-cpu: tokenizer.file = 3: must be a text in quotes; for example tokenizer.file = ""
        recipe shakespeare-char-cpu: sampling.prompts = []: there is nothing to continue; set sampling.every_steps = 0 for no samples; for example sampling.prompts = ["\n"]
        recipe shakespeare-char-cpu: sampling.prompts = [""]: must be a list of texts in quotes, none of them empty; for example sampling.prompts = ["\n"]
        recipe shakespeare-char-cpu: sampling.temperature = -1.0: must be a number of at least 0; for example sampling.temperature = 0.8
        recipe shakespeare-char-cpu: checkpoint.keep_last = 0: must be a whole number from 1 to 1000000; for example checkpoint.keep_last = 2
        recipe shakespeare-char-cpu: checkpoint.stop_after = 2001: the run ends before, at schedule.steps = 2000; 0 goes on to the end; for example checkpoint.stop_after = 0
        recipe shakespeare-char-cpu: cluster.min_workers = 0: must be a whole number from 1 to 4294967295; for example cluster.min_workers = 1
        recipe shakespeare-char-cpu: cluster.liveness_timeout_ms = 2999: a worker must be given time for 3 heartbeats, one every cluster.heartbeat_interval_ms = 1000; for example cluster.liveness_timeout_ms = 3000
        recipe ../escape: name = "../escape": must be fit for a directory's name, of at most 64 bytes; for example name = "mine"
        recipe shakespeare-char-cpu: seed = -1: must be a whole number of at least 0; for example seed = 1"#]].assert_eq(&refusals.map(refusal).join("\n"));
}

#[test]
fn keys_that_nothing_reads_are_refused() {
    let refusals = [
        "optimizer.kind=sgd optimizer.beta1=0.5",
        "model.initial_weight=1",
        "tokenizer.vocab_size=300",
        "model.head=4",
        "train.steps=4",
        "model=4",
        "model.heads.x=4",
        "colour=red",
    ];
    expect![[r#"
        recipe shakespeare-char-cpu: optimizer.beta1 = 0.5: nothing reads this key beside the others; leave it out, or change the kind; for example optimizer.kind = "adamw"
        recipe shakespeare-char-cpu: model.initial_weight = 1: nothing reads this key beside the others; leave it out, or change the kind; for example model.kind = "line"
        recipe shakespeare-char-cpu: tokenizer.vocab_size = 300: nothing reads this key beside the others; leave it out, or change the kind; for example tokenizer.kind = "bpe"
        recipe shakespeare-char-cpu: model.head = 4: unknown key (did you mean model.heads?); the keys of [model] are kind, layers, heads, kv_heads, width, head_width, ffn_width, context, bias, qk_norm, tied_head, gelu, rope_theta, rope_scaling, norm_epsilon, dropout, initial_weight, initial_bias
        recipe shakespeare-char-cpu: train.steps = 4: unknown key (did you mean schedule.steps?); the sections are model, compute, adapters, data, dpo, tokenizer, optimizer, schedule, batch, outer, wire, evaluation, sampling, checkpoint, cluster; outside of them there are name, seed, stage, init
        recipe shakespeare-char-cpu: model = 4: unknown key; the keys of [model] are kind, layers, heads, kv_heads, width, head_width, ffn_width, context, bias, qk_norm, tied_head, gelu, rope_theta, rope_scaling, norm_epsilon, dropout, initial_weight, initial_bias
        recipe shakespeare-char-cpu: model.heads.x = 4: unknown key (did you mean model.heads?); the keys of [model] are kind, layers, heads, kv_heads, width, head_width, ffn_width, context, bias, qk_norm, tied_head, gelu, rope_theta, rope_scaling, norm_epsilon, dropout, initial_weight, initial_bias
        recipe shakespeare-char-cpu: colour = "red": unknown key; the sections are model, compute, adapters, data, dpo, tokenizer, optimizer, schedule, batch, outer, wire, evaluation, sampling, checkpoint, cluster; outside of them there are name, seed, stage, init"#]].assert_eq(&refusals.map(refusal).join("\n"));

    let text = |text: &str| Recipe::from_toml("mine", text, &[]).unwrap_err().to_string();
    expect![[r#"recipe mine: tokenizer.kind = "chars": nothing reads this key beside the others; leave it out, or change the kind; for example model.kind = "gpt""#]].assert_eq(&text("[model]\nkind = 'line'\n[tokenizer]\nkind = 'chars'"));
    expect!["recipe mine: modle = {}: unknown key; the sections are model, compute, adapters, data, dpo, tokenizer, optimizer, schedule, batch, outer, wire, evaluation, sampling, checkpoint, cluster; outside of them there are name, seed, stage, init"].assert_eq(&text("[modle]"));
}

#[test]
fn adapters_need_a_model_and_projections_of_it() {
    let adapters =
        |sets: &[&str]| fixed(&[&["init=runs/a", "adapters.rank=8"], sets].concat()).map(|recipe| recipe.adapters);
    let all = adapters(&[]).unwrap().unwrap();
    assert_eq!((all.rank, all.alpha, &*all.targets.join(" ")), (8, 16.0, "c_attn c_proj c_fc"));
    let some = adapters(&["adapters.targets=['attn.c_proj']", "adapters.alpha=3"]).unwrap().unwrap();
    assert_eq!((some.alpha, &*some.targets.join(" ")), (3.0, "attn.c_proj"));
    assert_eq!(adapters(&["adapters.rank=0"]).unwrap(), None);
    let llama = load("quickstart-llama", &["init=runs/a", "adapters.rank=1"]).unwrap().adapters.unwrap();
    assert_eq!(llama.targets.join(" "), "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj");
    let refusals = [
        "adapters.rank=8",
        "adapters.rank=-1",
        "adapters.alpha=8",
        "init=runs/a adapters.rank=8 adapters.alpha=0",
        "init=runs/a adapters.rank=8 adapters.targets=['q_proj']",
        "init=runs/a adapters.rank=8 adapters.targets=['wte']",
    ];
    expect![[r#"
        recipe shakespeare-char-cpu: adapters.rank = 8: adapters are trained beside a model that has learned something, and init names none; for example init = "runs/quickstart-1", or adapters.rank = 0
        recipe shakespeare-char-cpu: adapters.rank = -1: must be a whole number from 0 to 65536; for example adapters.rank = 0
        recipe shakespeare-char-cpu: adapters.alpha = 8: nothing reads this key beside the others; leave it out, or change the kind; for example adapters.rank = 8
        recipe shakespeare-char-cpu: adapters.alpha = 0.0: must be a number above 0; for example adapters.alpha = 16.0
        recipe shakespeare-char-cpu: adapters.targets = ["q_proj"]: "q_proj" is no projection of this model; there are c_attn, c_proj, c_fc; for example adapters.targets = ["c_attn", "c_proj", "c_fc"]
        recipe shakespeare-char-cpu: adapters.targets = ["wte"]: "wte" is no projection of this model; there are c_attn, c_proj, c_fc; for example adapters.targets = ["c_attn", "c_proj", "c_fc"]"#]].assert_eq(&refusals.map(refusal).join("\n"));
}

#[test]
fn local_steps_make_replicas_of_slots() {
    let local = |sets: &[&str]| fixed(&[&["batch.local_steps=50"], sets].concat()).unwrap();
    let recipe = local(&[]);
    let nesterov = |momentum| UpdateRule::Nesterov(NesterovConfig { momentum });
    assert_eq!(recipe.outer, Some(OptimizerConfig { rule: nesterov(0.9), lr: 0.7, grad_clip: None }));
    assert_eq!(recipe.batch, BatchConfig { slots: 4, sequences_per_slot: 3, local_steps: 50 });
    assert_eq!((recipe.batch.sequences_drawn_per_slot(), recipe.batch.sequences_per_step()), (150, 600));
    let single = local(&["batch.local_steps=1", "outer.lr=1", "outer.momentum=0"]);
    assert_eq!(single.outer, Some(OptimizerConfig { rule: nesterov(0.0), lr: 1.0, grad_clip: None }));
    let plain = fixed(&[]).unwrap();
    assert_eq!((plain.outer, plain.keep_moments, plain.batch.local_steps), (None, false, 1));
    assert!(!recipe.keep_moments && local(&["outer.keep_moments=true"]).keep_moments);
    let refusals = [
        "batch.local_steps=-1",
        "batch.local_steps=5500",
        "batch.local_steps=50 batch.slots=65536 batch.sequences_per_slot=100 model.context=1 evaluation.slots=1 \
         batch.local_steps=5000",
        "outer.lr=0.5",
        "batch.local_steps=50 outer.lr=0",
        "batch.local_steps=50 outer.momentum=1",
        "batch.local_steps=50 outer.keep_moments=1",
        "batch.local_steps=50 outer.keep_moments=true optimizer.kind=sgd",
    ];
    expect![[r#"
        recipe shakespeare-char-cpu: batch.local_steps = -1: must be a whole number from 0 to 65536; for example batch.local_steps = 0
        recipe shakespeare-char-cpu: batch.local_steps = 5500: a slot's batches would have 8448000 bytes (1536 for each local step), and one message carries at most 8388608; for example batch.local_steps = 5461
        recipe shakespeare-char-cpu: batch.slots = 65536: with 500000 sequences each, there would be more than 4294967295 sequences; for example batch.slots = 4
        recipe shakespeare-char-cpu: outer.lr = 0.5: nothing reads this key beside the others; leave it out, or change the kind; for example batch.local_steps = 50
        recipe shakespeare-char-cpu: outer.lr = 0.0: must be a number above 0; for example outer.lr = 0.7
        recipe shakespeare-char-cpu: outer.momentum = 1.0: must be a number of at least 0 and below 1; for example outer.momentum = 0.9
        recipe shakespeare-char-cpu: outer.keep_moments = 1: must be true or false; for example outer.keep_moments = false
        recipe shakespeare-char-cpu: outer.keep_moments = true: plain descent has no moments to keep; for example outer.keep_moments = false"#]].assert_eq(&refusals.map(refusal).join("\n"));
}

#[test]
fn what_is_no_toml_is_shown_with_its_line() {
    let error = Recipe::from_toml("mine", "seed = 1\nmodel = [", &[]).unwrap_err();
    expect![[r#"
        recipe mine: TOML parse error at line 2, column 10
          |
        2 | model = [
          |          ^
        unclosed array, expected `]`"#]]
    .assert_eq(&error.to_string());
}

#[test]
fn every_key_is_checked() {
    for (recipe, _) in EMBEDDED {
        let read = embedded(recipe);
        let text = read.to_toml();
        for key in KEYS.iter().filter(|key| read.values.find(key.path).is_some()) {
            // A date is right for no key.
            let error = Recipe::from_toml(recipe, &text, &[format!("{}=2026-01-01", key.path)]).unwrap_err();
            assert!(error.to_string().starts_with(&format!("recipe {recipe}: {} = 2026-01-01: ", key.path)), "{error}");
        }
    }
}

#[test]
fn preferences_take_stages_of_their_own() {
    let reward = small("reward", &[]);
    let (data, model) = (reward.data.as_ref().unwrap(), reward.model.with_vocabulary(65));
    assert_eq!((data.stage, reward.objective, model.has_score_head()), (Stage::Reward, Objective::Reward, true));
    // Two rows of 64 tokens, 12 bytes each.
    assert_eq!((reward.rows_per_sequence(), reward.bytes_per_token()), (2, 12));
    let recipe = dpo(&["dpo.beta=0.5"]);
    let config = DpoConfig { beta: 0.5, label_smoothing: 0.0 };
    assert_eq!((recipe.objective, recipe.model.with_vocabulary(65).has_score_head()), (Objective::Dpo(config), false));
    let refused = |recipe: &str, sets: &[&str]| {
        const MODEL: [&str; 4] = ["model.layers=1", "model.heads=2", "model.width=16", "model.context=64"];
        load(recipe, &[&MODEL, sets].concat()).unwrap_err().to_string()
    };
    expect![[r#"
        recipe dpo: init = "": a model learns by this how to differ from what it was, so it must have been something; for example init = "runs/sft-1"
        recipe dpo: dpo.beta = 0.0: must be a number above 0; for example dpo.beta = 0.1
        recipe dpo: dpo.label_smoothing = 0.5: must be a number of at least 0 and below 0.5; for example dpo.label_smoothing = 0.0
        recipe reward: sampling.every_steps = 5: a model that scores answers writes none; for example sampling.every_steps = 0
        recipe reward: dpo.beta = 0.1: nothing reads this key beside the others; leave it out, or change the kind; for example stage = "dpo""#]]
    .assert_eq(
        &[
            refused("dpo", &[]),
            refused("dpo", &["init=a", "dpo.beta=0"]),
            refused("dpo", &["init=a", "dpo.label_smoothing=0.5"]),
            refused("reward", &["sampling.every_steps=5"]),
            refused("reward", &["dpo.beta=0.1"]),
        ]
        .join("\n"),
    );
}

#[test]
fn moments_that_are_kept_travel_as_they_are() {
    let local = ["batch.local_steps=5", "outer.keep_moments=true"];
    let with = |set| fixed(&[&local[..], &[set]].concat());
    let formats = with("wire.parameters=bf16").unwrap().compression;
    assert_eq!((formats.gradients, formats.parameters), (GradientFormat::F32, ParameterFormat::Bf16));
    let said = with("wire.gradients=int8").unwrap_err().to_string();
    expect![[r#"recipe shakespeare-char-cpu: wire.gradients = "int8": moments travel with a replica's way, and cannot be rounded; for example wire.gradients = "f32", or outer.keep_moments = false"#]].assert_eq(&said);
    fixed(&["batch.local_steps=5", "wire.gradients=int8"]).unwrap();
}

#[test]
fn a_context_longer_than_the_corpus_is_refused() {
    let recipe = fixed(&[]).unwrap();
    recipe.check_corpus(80, 65, 65).unwrap();
    let refused = |(training, validation)| recipe.check_corpus(80, training, validation).unwrap_err().to_string();
    expect![[r#"
        recipe shakespeare-char-cpu: model.context = 64: the corpus has 64 tokens to train on, fewer than the context and the token after it (65 tokens); for example model.context = 63, or a longer text in data.input
        recipe shakespeare-char-cpu: model.context = 64: the corpus has 50 tokens to validate on, fewer than the context and the token after it (65 tokens); for example model.context = 49, or a longer text in data.input
        recipe shakespeare-char-cpu: model.context = 64: the corpus has 0 tokens to validate on, fewer than the context and the token after it (65 tokens); for example data.input = "builtin:kjv""#]].assert_eq(&[(64, 65), (600, 50), (9, 0)].map(refused).join("\n"));

    let unwatched = fixed(&["evaluation.every_steps=0"]).unwrap();
    unwatched.check_corpus(80, 65, 0).unwrap();
    load("line", &[]).unwrap().check_corpus(0, 0, 0).unwrap();
}

#[test]
fn documents_can_be_kept_apart_where_their_ends_are_marked() {
    let apart = fixed(&["data.separate_documents=true"]).unwrap();
    assert_eq!((apart.separator(Some(7)).unwrap(), apart.bytes_per_token()), (Some(7), 12));
    expect![[r#"recipe shakespeare-char-cpu: data.separate_documents = true: nothing in this corpus says where a document ends: its tokenizer has no end of text; for example tokenizer.kind = "bpe""#]].assert_eq(&apart.separator(None).unwrap_err().to_string());
    let together = fixed(&[]).unwrap();
    assert_eq!((together.separator(Some(7)).unwrap(), together.bytes_per_token()), (None, 8));
}

#[test]
fn a_vocabulary_that_makes_the_model_too_large_is_refused() {
    let wide = fixed(&["model.width=8192", "model.layers=2"]).unwrap();
    wide.check_corpus(80, 1000, 1000).unwrap();
    expect!["recipe shakespeare-char-cpu: model.width = 8192: the model would have 2839977984 parameters, more than the 2147483648 there may be; for example model.width = 128"].assert_eq(&wide.check_corpus(150_000, 1000, 1000).unwrap_err().to_string());
}

#[test]
fn recipes_come_from_files_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    std::fs::write(&path, EMBEDDED[0].1).unwrap();
    let recipe = load(path.to_str().unwrap(), &["seed=5"]).unwrap();
    assert_eq!((recipe.name.as_str(), recipe.seed), ("mine", 5));

    let error = load("quikstart", &[]).unwrap_err();
    expect![[r#"there is no recipe "quikstart" (did you mean quickstart?); give the path of a TOML file or an embedded recipe: quickstart, quickstart-llama, sft, reward, dpo, shakespeare-char-cpu, shakespeare-char, line"#]].assert_eq(&error.to_string());
    let error = load("no/such.toml", &[]).unwrap_err();
    expect!["no/such.toml: the recipe cannot be read: No such file or directory (os error 2); give the path of a TOML file or an embedded recipe: quickstart, quickstart-llama, sft, reward, dpo, shakespeare-char-cpu, shakespeare-char, line"].assert_eq(&error.to_string());
}
