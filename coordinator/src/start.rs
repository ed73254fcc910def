//! How a run starts, or goes on: from its configuration and what lies in its directory.

use std::hash::BuildHasher as _;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use lockstep_model::adapters::{AdaptedLayout, initial_adapters, trained_layout};
use lockstep_model::checkpoint::{self, BaseFile, Checkpoint, CheckpointError, Manifest};
use lockstep_model::compression::ParameterFormat;
use lockstep_model::config::ModelConfig;
use lockstep_model::digest::{bytes_sha256, hex, parse_hex};
use lockstep_model::layout::initial_parameters;
use lockstep_model::optimizer::OptimizerState;
use lockstep_model::step_filter::StepFilter;
use lockstep_model::tree::Block;
use lockstep_proto::{MAX_LEASE_BYTES, v1};

use crate::config::RunConfig;
use crate::dataplane::State;
use crate::engine::{self, DeviceClass, EngineConfig};
use crate::ledger::LedgerFile;
use crate::metrics::Metrics;
use crate::references::ReferenceFile;
use crate::report;
use crate::run_dir::{Identity, RunDir};
use crate::service::unix_nanos;
use crate::trace::traceparent;
use crate::translate;

/// A run, ready to go on from where it is.
pub(crate) struct Start {
    pub(crate) run_dir: RunDir,
    pub(crate) state: State,
    /// What adapters stand on, if such are trained.
    pub(crate) base: Option<Arc<BaseFile>>,
    pub(crate) manifest: Manifest,
    pub(crate) metrics: Metrics,
    pub(crate) ledger: LedgerFile,
    /// What the first version says of rows, if it was asked already.
    pub(crate) references: Option<Arc<[f32]>>,
    /// Whether all this comes from a checkpoint.
    pub(crate) resumed: bool,
}

/// Takes hold of the run directory and loads the newest whole checkpoint, or starts at step 0 where there is none. What
/// adapters stand on is in the directory from then on, and `config` holds it no more.
pub(crate) fn prepare(config: &mut RunConfig) -> anyhow::Result<Start> {
    let seed = format!("{}/{}/{}", config.run_dir.display(), std::process::id(), unix_nanos());
    let mut run_dir = RunDir::open(&config.run_dir, config.resume, &hex(&bytes_sha256(seed.as_bytes())[..16]))?;
    let mut manifest = new_manifest(config, &run_dir.identity().run_id);
    let base = keep_base(config, &run_dir, &manifest)?;
    checkpoint::remove_partial(&run_dir.checkpoints())?;
    if let Some(step) = run_dir.identity().trusted_up_to {
        checkpoint::remove_after(&run_dir.checkpoints(), step)?;
        run_dir.trust_up_to(None)?;
    }
    let (newest, damaged) = checkpoint::newest(&run_dir.checkpoints())?;
    for error in damaged {
        if let (None, CheckpointError::OtherVersion { .. }) = (&newest, &error) {
            return Err(error.into());
        }
        tracing::warn!("{error}; going back to an older checkpoint");
    }
    let resumed = newest.is_some();
    let state = match newest {
        Some((path, loaded)) => {
            let saved = &loaded.manifest;
            let shown = path.display();
            if !same_network(&saved.model, &manifest.model) {
                bail!("{shown}: holds another model than the recipe describes; resume with the run's own recipe");
            }
            if saved.adapters != manifest.adapters {
                bail!("{shown}: holds other adapters than the recipe describes; resume with the run's own recipe");
            }
            if saved.corpus_sha256.is_empty() {
                bail!(
                    "{shown}: was imported, and trained on nothing yet; start a run of its own with the recipe in \
                     {}, or with init = {:?}",
                    run_dir.root().display(),
                    run_dir.root()
                );
            }
            if saved.initial_sha256 != manifest.initial_sha256 {
                let [first, now] = [&saved.initial_sha256, &manifest.initial_sha256]
                    .map(|digest| digest.as_deref().unwrap_or("none: drawn from the seed"));
                bail!(
                    "{shown}: the run began with other parameters than init holds now (SHA-256 {first} and {now}); put the first \
                     ones back, or start a new run"
                );
            }
            if saved.corpus_sha256 != manifest.corpus_sha256 {
                bail!(
                    "{shown}: the run was trained on another text than data.input holds now (SHA-256 {} and {}); put the \
                     first one back, or start a new run",
                    saved.corpus_sha256,
                    manifest.corpus_sha256
                );
            }
            let state;
            (manifest, state) = go_on(config, loaded);
            state
        }
        None => initial_state(config),
    };
    if manifest.step > config.schedule.steps {
        bail!(
            "{}: the run is at step {}, beyond schedule.steps = {}",
            run_dir.root().display(),
            manifest.step,
            config.schedule.steps
        );
    }
    let references = known_references(config, &run_dir, &mut manifest)?;
    run_dir.write_recipe(&config.recipe_toml)?;
    let metrics = Metrics::open(&run_dir.metrics(), manifest.step, manifest.is_validated(), &manifest.metrics_seal)
        .context("the metrics of the run cannot be opened")?;
    if metrics.journal().seal() != manifest.metrics_seal {
        tracing::warn!(
            "{}: does not agree with the checkpoint of step {}; the run goes on, and `lockstep verify` says what is wrong \
             with the file",
            run_dir.metrics().display(),
            manifest.step
        );
    }
    let rows_per_step = config.batch.sequences_per_step();
    let ledger =
        LedgerFile::open(&run_dir.ledger(), manifest.ledger, &manifest.ledger_seal, config.batch.slots, rows_per_step);
    let ledger = ledger.context("the ledger of the run cannot be opened")?;
    report::remove_after(&run_dir.reports(), manifest.step)?;
    Ok(Start { run_dir, state, base, manifest, metrics, ledger, references, resumed })
}

/// What the first version says of rows, if that is wanted and known; it must be what the run was trained with so far.
fn known_references(
    config: &RunConfig,
    run_dir: &RunDir,
    manifest: &mut Manifest,
) -> anyhow::Result<Option<Arc<[f32]>>> {
    if config.source.reference_slots() == 0 {
        return Ok(None);
    }
    let path = run_dir.references();
    let known = ReferenceFile::of(&path, manifest).read(&config.source)?;
    let sha256 = known.as_ref().map(|(_, sha256)| sha256);
    if manifest.references_sha256.as_ref().is_some_and(|saved| Some(saved) != sha256) {
        bail!(
            "{}: is not there, or is not what the run was trained with; put its own file back, or start a new run",
            path.display()
        );
    }
    Ok(known.map(|(references, sha256)| {
        manifest.references_sha256 = Some(sha256);
        references
    }))
}

/// What adapters stand on, which the run keeps from its first start on.
fn keep_base(config: &mut RunConfig, run_dir: &RunDir, manifest: &Manifest) -> anyhow::Result<Option<Arc<BaseFile>>> {
    let Some(adapters) = &config.adapters else { return Ok(None) };
    let initial = config.initial.as_mut().context("adapters are trained beside a model, and init names none")?;
    let directory = run_dir.base();
    if !directory.exists() {
        let Manifest { run_id, tokenizer, recipe_name, recipe, model, .. } = manifest.clone();
        let base = Manifest { tokenizer, recipe_name, recipe, ..Manifest::new(run_id, model) };
        checkpoint::keep_base(run_dir.root(), base, &initial.parameters)?;
    }
    let layout = AdaptedLayout::of(&config.model, adapters);
    initial.parameters = Arc::new(layout.whole(&config.model, &initial.parameters));
    let base = BaseFile::open(&directory, &layout.base)?;
    if base.sha256() != initial.sha256 {
        bail!(
            "{}: the run's adapters belong to another model than init holds now (SHA-256 {} and {}); put the first one back, or \
             start a new run",
            directory.display(),
            base.sha256(),
            initial.sha256
        );
    }
    Ok(Some(Arc::new(base)))
}

/// Where a run goes on from a checkpoint: with the present recipe, which may differ in what no parameter depends on.
pub(crate) fn go_on(config: &RunConfig, checkpoint: Checkpoint) -> (Manifest, State) {
    let Checkpoint { manifest, parameters, optimizer } = checkpoint;
    let Manifest { recipe, recipe_name, files, .. } = new_manifest(config, &manifest.run_id);
    let manifest = Manifest { recipe, recipe_name, files, ..manifest };
    let filter = manifest.filter.clone();
    (manifest, State { parameters, optimizer, filter })
}

/// Where every run begins.
pub(crate) fn initial_state(config: &RunConfig) -> State {
    let parameters = match (&config.adapters, &config.initial) {
        (Some(adapters), initial) => {
            let whole = initial.as_ref().map_or(&[][..], |initial| &initial.parameters);
            initial_adapters(&config.model, adapters, config.seed, whole)
        }
        (None, Some(initial)) => initial.parameters.to_vec(),
        (None, None) => initial_parameters(&config.model, config.seed),
    };
    let mut optimizer = OptimizerState::new(&config.optimizer_of_versions().rule, parameters.len());
    if config.compression.parameters != ParameterFormat::F32 {
        optimizer.master.clone_from(&parameters);
    }
    State { parameters, optimizer, filter: StepFilter::default() }
}

/// A new run's manifest, before its first step.
pub(crate) fn new_manifest(config: &RunConfig, run_id: &str) -> Manifest {
    Manifest {
        adapters: config.adapters.clone(),
        tokenizer: config.tokenizer.clone(),
        corpus_sha256: hex(&config.source.sha256()),
        initial_sha256: config.initial.as_ref().map(|initial| initial.sha256.clone()),
        recipe_name: config.recipe_name.clone(),
        recipe: config.recipe_toml.clone(),
        ..Manifest::new(run_id.into(), config.model.clone())
    }
}

/// Whether parameters of one fit the other; where the line starts does not matter once it has started.
fn same_network(saved: &ModelConfig, asked: &ModelConfig) -> bool {
    saved == asked || matches!((saved, asked), (ModelConfig::Line(_), ModelConfig::Line(_)))
}

/// What the engine must know.
pub(crate) fn engine_config(
    config: &RunConfig,
    identity: &Identity,
    manifest: &Manifest,
    resumed: bool,
) -> EngineConfig {
    let slot_bytes = config.source.slot_bytes();
    // Moments cannot be added up.
    let fitting = if config.keep_moments { 1 } else { (MAX_LEASE_BYTES / slot_bytes.max(1)).max(1) as u32 };
    let start = match resumed {
        false => engine::Start::Fresh,
        true => engine::Start::Resumed {
            step: manifest.step,
            validated: manifest.is_validated(),
            classes: manifest.device_classes.iter().filter_map(|class| parse_hex(class).map(DeviceClass)).collect(),
            skipped_in_a_row: manifest.filter.skipped_in_a_row,
            unchecked_since: manifest.unchecked_since.clone(),
        },
    };
    EngineConfig {
        total_steps: config.schedule.steps,
        slots: config.batch.slots,
        eval_slots: config.evaluation.slots,
        reference_slots: if manifest.references_sha256.is_some() { 0 } else { config.source.reference_slots() },
        evaluate_every_steps: config.evaluation.every_steps,
        sample_every_steps: config.sampling.every_steps,
        checkpoint_every_steps: config.checkpoint.every_steps,
        checkpoint_interval: config.checkpoint.interval,
        stop_after: config.checkpoint.stop_after,
        min_workers: config.cluster.min_workers,
        exact: config.cluster.exact,
        audit: config.cluster.audit,
        audit_seed: secret(),
        on_dispute: config.cluster.on_dispute,
        quarantined: identity.quarantined.clone(),
        max_bad_steps: config.skip.max_in_a_row,
        liveness_timeout: config.cluster.liveness_timeout,
        max_slots_per_lease: 1 << fitting.ilog2(),
        start,
    }
}

/// A number that nobody outside can guess: which blocks are audited must not be known beforehand.
fn secret() -> u64 {
    // Keyed by the system's randomness.
    std::collections::hash_map::RandomState::new().hash_one(unix_nanos())
}

/// Local steps of a probe, which show as much as all of them would: moments are not 0 in the second one.
const PROBE_LOCAL_STEPS: usize = 2;

/// What every joiner is told: the model, the adapters that stand on `base`, if such are trained, and a gradient (or the first
/// local steps of a replica) and an evaluation of the run's own shapes as the probe.
///
/// # Errors
/// If the first slot has not the rows that it should have.
pub(crate) fn invitation(
    config: &RunConfig,
    identity: &Identity,
    base: Option<&BaseFile>,
) -> anyhow::Result<v1::Invitation> {
    let probe = |task, batch| v1::Lease {
        lease_id: 0,
        step: 1,
        version: 0,
        block: Some(translate::block(Block::leaf(0))),
        task: Some(task),
        slots: vec![translate::slot(0, &batch, None)],
        seed: config.seed,
        traceparent: traceparent(&identity.run_id, 0),
        parameters_blake3: Vec::new(),
        difference_from_blake3: Vec::new(),
        step_slots: 0,
    };
    let mut slot = config.source.training_slot(1, 0);
    let mut learning_rates = config.local_learning_rates(1);
    if learning_rates.len() > PROBE_LOCAL_STEPS {
        let rows = slot.columns.first().map_or(0, |column| column.shape[0]);
        slot = slot.rows(0..rows / learning_rates.len() * PROBE_LOCAL_STEPS)?;
        learning_rates.truncate(PROBE_LOCAL_STEPS);
    }
    let gradient = v1::lease::Task::Gradient(v1::GradientTask { learning_rates });
    let mut probes = vec![probe(gradient, slot)];
    if config.evaluation.slots > 0 {
        let evaluate = v1::lease::Task::Evaluate(v1::EvaluateTask {});
        probes.push(probe(evaluate, config.source.validation_slot(0)));
    }
    Ok(v1::Invitation {
        run_id: identity.run_id.clone(),
        incarnation: identity.incarnation,
        model: Some(translate::model(&config.model)),
        layout: Some(translate::layout(&trained_layout(&config.model, config.adapters.as_ref()))),
        probe: probes,
        heartbeat_interval_ms: config.cluster.heartbeat_interval.as_millis() as u32,
        liveness_timeout_ms: config.cluster.liveness_timeout.as_millis() as u32,
        objective: Some(translate::objective(config.objective)),
        local_optimizer: config.local_optimizer().map(translate::local_optimizer),
        gradient_format: translate::gradient_format(config.compression.gradients).into(),
        precision: translate::precision(config.precision).into(),
        adapters: config.adapters.as_ref().zip(base).map(|(adapters, base)| {
            translate::adapters(adapters, &AdaptedLayout::of(&config.model, adapters).base, base.blake3())
        }),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use lockstep_model::adapters::AdapterConfig;
    use lockstep_model::digest::vector_sha256;
    use lockstep_model::pieces::vector_blake3;

    use super::*;
    use crate::config::Initial;

    #[test]
    fn a_base_is_kept_once_and_held_in_memory_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let initial = |value: f32| {
            let parameters = vec![value, 2.0];
            Some(Initial { sha256: hex(&vector_sha256(&parameters)), parameters: Arc::new(parameters) })
        };
        let adapters = AdapterConfig { rank: 1, alpha: 1.0, targets: Vec::new(), whole: vec!["bias".into()] };
        let config = |resume, value| RunConfig {
            adapters: Some(adapters.clone()),
            initial: initial(value),
            resume,
            ..RunConfig::line(dir.path())
        };
        let mut first = config(false, 1.0);
        let start = prepare(&mut first).unwrap();
        assert_eq!(start.base.as_ref().unwrap().parameters(), [1.0], "the bias is trained, and no part of it");
        assert_eq!(*first.initial.as_ref().unwrap().parameters, [2.0], "what is trained whole begins as it was");
        assert_eq!((start.state.parameters, start.manifest.layout().len()), (vec![2.0], 1));
        let invited = invitation(&first, start.run_dir.identity(), start.base.as_deref()).unwrap();
        let told = invited.adapters.unwrap();
        assert_eq!((told.base.unwrap().total_elements, invited.layout.unwrap().total_elements), (1, 1));
        assert_eq!(told.base_blake3, vector_blake3(&[1.0]));
        drop(start.run_dir);
        assert_eq!(prepare(&mut config(true, 1.0)).unwrap().base.unwrap().parameters(), [1.0]);
        let said = prepare(&mut config(true, 3.0)).err().unwrap().to_string();
        assert!(said.contains("belong to another model than init holds now"), "{said}");
    }

    #[test]
    fn what_a_killed_start_left_half_done_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let remains = dir.path().join("checkpoints/.step-000000007.partial/remains");
        fs::create_dir_all(&remains).unwrap();
        let reports = dir.path().join("reports");
        fs::create_dir(&reports).unwrap();
        fs::write(reports.join("step-000000003.txt"), "of a step that is not committed").unwrap();
        let start = prepare(&mut RunConfig::line(dir.path())).unwrap();
        assert_eq!((start.manifest.step, start.resumed), (0, false));
        assert_eq!(fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(reports).unwrap().count(), 0);
    }
}
