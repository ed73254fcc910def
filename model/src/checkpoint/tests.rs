use super::manifest::MANIFEST;
use super::*;
use crate::adapters::AdapterConfig;
use crate::config::{Gelu, GptConfig, LineConfig, ModelConfig};

fn manifest(step: u64, val_loss: Option<f64>) -> Manifest {
    Manifest {
        step,
        train_loss: Some(1.0),
        validation: val_loss.map(|loss| Validation::new(step, loss, Some(4.0))),
        recipe_name: "line".into(),
        ..Manifest::new("r".into(), ModelConfig::Line(LineConfig { weight: 0.0, bias: 0.0 }))
    }
}

fn publish(directory: &Path, manifest: Manifest, parameters: &[f32], optimizer: &OptimizerState) -> PathBuf {
    write(directory, manifest, parameters, optimizer).and_then(Staged::publish).unwrap()
}

fn moments() -> OptimizerState {
    OptimizerState { first_moment: vec![0.5, -0.5], second_moment: vec![1e-9, f32::MAX], ..OptimizerState::default() }
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let replicas = OptimizerState { replicas: vec![vec![1.0, 2.0, 3.0, 4.0], vec![5.0, 6.0, 7.0, 8.0]], ..moments() };
    let with_one_moment = OptimizerState { replicas: vec![vec![1.0, 2.0]; 11], ..OptimizerState::default() };
    let apart = OptimizerState { master: vec![1.25, 1e-30], ..replicas.clone() };
    for optimizer in [moments(), OptimizerState::default(), replicas, with_one_moment, apart] {
        let path = publish(dir.path(), manifest(7, None), &[1.5, -0.0], &optimizer);
        let back = read(&path).unwrap();
        assert_eq!(path, dir.path().join("step-000000007"));
        assert_eq!(back.parameters.iter().map(|p| p.to_bits()).collect::<Vec<_>>(), [0x3fc0_0000, 0x8000_0000]);
        assert_eq!(back.optimizer, optimizer);
        assert_eq!(back.manifest.params_sha256, hex(&vector_sha256(&[1.5, -0.0])));
    }
}

#[test]
fn a_checkpoint_cut_at_any_byte_or_changed_in_any_is_passed_over_for_an_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let old = publish(dir.path(), manifest(1, None), &[1.0, 2.0], &moments());
    let new = publish(dir.path(), manifest(2, Some(1.5)), &[3.0, 4.0], &moments());
    let passed_over = |damage: &dyn Fn() -> String| {
        let (found, damaged) = newest(dir.path()).unwrap();
        assert_eq!((found.unwrap().0, damaged.len()), (old.clone(), 1), "{}", damage());
        assert!(check(&new).is_err(), "{}", damage());
    };
    for name in [MANIFEST, PARAMETERS, OPTIMIZER] {
        let file = new.join(name);
        let whole = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        passed_over(&|| format!("{name} missing"));
        for at in 0..whole.len() {
            fs::write(&file, &whole[..at]).unwrap();
            passed_over(&|| format!("{name} cut to {at} bytes"));
            let mut changed = whole.clone();
            changed[at] ^= 1 << (at % 8);
            fs::write(&file, &changed).unwrap();
            passed_over(&|| format!("{name} changed at byte {at}"));
        }
        fs::write(&file, &whole).unwrap();
    }
    assert_eq!(newest(dir.path()).unwrap().0.unwrap().0, new, "restored, it is whole again");
}

#[test]
fn another_release_s_checkpoint_is_told_from_a_damaged_one() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(MANIFEST), r#"{"format_version": 1, "run_id": "r"}"#).unwrap();
    let said = read(dir.path()).unwrap_err().to_string();
    assert!(said.contains("format version 1") && said.contains("reads 2"), "{said}");
}

#[test]
fn adapters_are_merged_into_their_base_as_a_model_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let model = ModelConfig::Gpt(GptConfig {
        vocab_size: 3,
        context: 2,
        layers: 1,
        heads: 1,
        width: 2,
        bias: false,
        tied_head: true,
        score_head: false,
        gelu: Gelu::Exact,
        norm_epsilon: 1e-5,
        dropout: 0.0,
    });
    let adapters = AdapterConfig { rank: 1, alpha: 2.0, targets: vec!["c_fc".into()], whole: Vec::new() };
    let layout = AdaptedLayout::of(&model, &adapters);
    let base: Vec<f32> = (0..layout.base.len()).map(|i| i as f32).collect();
    keep_base(dir.path(), Manifest::new("r".into(), model.clone()), &base).unwrap();
    let initial_sha256 = Some(hex(&vector_sha256(&base)));
    let manifest = Manifest { adapters: Some(adapters), initial_sha256, ..Manifest::new("r".into(), model) };
    let trained: Vec<f32> = (0..layout.trained.len()).map(|i| i as f32 / 2.0).collect();
    let optimizer = OptimizerState { first_moment: vec![0.5; trained.len()], ..OptimizerState::default() };
    let path = publish(&dir.path().join("checkpoints"), manifest, &trained, &optimizer);
    let back = read(&path).unwrap();
    assert_eq!((&back.parameters, &back.optimizer), (&trained, &optimizer));
    assert_eq!(back.manifest.params_sha256, hex(&vector_sha256(&trained)));
    let (manifest, parameters) = read_parameters(&path).unwrap();
    assert_eq!((parameters.len(), manifest), (base.len(), back.manifest));
    assert_eq!(parameters, layout.merge(base.clone(), &trained));
    assert_ne!(parameters, base);
    fs::remove_dir_all(dir.path().join(BASE)).unwrap();
    assert!(read_parameters(&path).unwrap_err().to_string().contains("lockstep merge"));
}

#[test]
fn a_diverged_run_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let diverged = Manifest { train_loss: Some(f64::NAN), ..manifest(3, Some(f64::NAN)) };
    let path = publish(dir.path(), diverged, &[f32::NAN, 2.0], &moments());
    assert!(read(&path).unwrap().manifest.validation.unwrap().loss.is_nan());
}

#[test]
fn bits_per_byte_are_the_loss_in_another_unit() {
    let validation = Validation::new(1, 2.0 * std::f64::consts::LN_2, Some(4.0));
    assert_eq!(validation.bits_per_byte, Some(0.5));
    assert_eq!(serde_json::from_str::<Validation>(r#"{"step":1,"loss":2.0}"#).unwrap(), Validation::new(1, 2.0, None));
}

#[test]
fn a_refused_write_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let blocked = dir.path().join("checkpoints");
    fs::write(&blocked, "a file where the directory should be").unwrap();
    assert!(matches!(write(&blocked, manifest(1, None), &[1.0, 2.0], &moments()), Err(CheckpointError::Io { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_is_not_published_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    drop(write(dir.path(), manifest(1, None), &[1.0, 2.0], &moments()).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A device cannot be flushed; neither can a file on a disk that fails.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_does_not_flush_is_named() {
    let said = CheckpointError::from(sync_file(Path::new("/dev/null")).unwrap_err()).to_string();
    assert!(said.starts_with("/dev/null: cannot flush to the disk: "), "{said}");
}

#[test]
fn the_newest_and_the_best_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for (step, loss) in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.2)] {
        publish(dir.path(), manifest(step, Some(loss)), &[1.0, 2.0], &moments());
    }
    fs::create_dir_all(dir.path().join(".step-000000001.partial/remains")).unwrap();
    prune(dir.path(), 2, &mut BTreeSet::new()).unwrap();
    assert_eq!(kept(dir.path()), [2, 4, 5]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is left of the others");
}

#[test]
fn no_damaged_checkpoint_takes_the_place_of_a_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    for step in 1..=5 {
        publish(dir.path(), manifest(step, None), &[1.0, 2.0], &moments());
    }
    let damage = |step, name| fs::write(dir.path().join(directory_name(step)).join(name), "").unwrap();
    damage(5, PARAMETERS);
    damage(3, MANIFEST);
    prune(dir.path(), 2, &mut BTreeSet::new()).unwrap();
    assert_eq!(kept(dir.path()), [2, 3, 4, 5], "4 and 2 are the newest whole ones");
    damage(2, OPTIMIZER);
    damage(4, OPTIMIZER);
    prune(dir.path(), 1, &mut BTreeSet::new()).unwrap();
    assert_eq!(kept(dir.path()), [2, 3, 4, 5], "there is no whole one");
    remove_after(dir.path(), 3).unwrap();
    assert_eq!(kept(dir.path()), [2, 3]);
}

#[test]
fn what_is_known_to_be_whole_is_not_read_again() {
    let dir = tempfile::tempdir().unwrap();
    for step in 1..=4 {
        publish(dir.path(), manifest(step, None), &[1.0, 2.0], &moments());
    }
    // If they were read, 3 and 4 would not count.
    for step in [3, 4] {
        fs::write(dir.path().join(directory_name(step)).join(PARAMETERS), "").unwrap();
    }
    let mut whole = [4].into();
    prune(dir.path(), 2, &mut whole).unwrap();
    assert_eq!((kept(dir.path()), &whole), (vec![2, 3, 4], &[2, 4].into()));
    whole.insert(3);
    prune(dir.path(), 2, &mut whole).unwrap();
    assert_eq!(kept(dir.path()), [3, 4]);
}

#[test]
fn what_a_killed_start_left_half_done_is_removed_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    remove_partial(&dir.path().join("none yet")).unwrap();
    publish(dir.path(), manifest(1, None), &[1.0, 2.0], &moments());
    let others = [".mine.partial", ".step-2.partial", ".step-000000003", "step-000000004-before-lr-change"];
    for name in [".step-000000002.partial", ".step-1000000000.partial"].iter().chain(&others) {
        fs::create_dir_all(dir.path().join(name).join("remains")).unwrap();
    }
    remove_partial(dir.path()).unwrap();
    assert_eq!(kept(dir.path()), [1]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1 + others.len());
}

#[test]
fn only_what_is_named_as_one_is_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let last = 999_999_999;
    for step in [100, last, last + 1] {
        publish(dir.path(), manifest(step, None), &[1.0, 2.0], &moments());
    }
    for name in ["step-000000100-before-lr-change", "step-101", "step-+00000102", "step-", "steps"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("step-000000103"), "a file").unwrap();
    assert_eq!(kept(dir.path()), [100, last, last + 1], "by step, and not by name");
    assert_eq!(newest(dir.path()).unwrap().0.unwrap().1.manifest.step, last + 1);
    assert_eq!(newest_manifest(dir.path()).unwrap().unwrap().step, last + 1);
    remove_after(dir.path(), 50).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 6, "what others named stays");
}

/// The steps of what is there.
fn kept(directory: &Path) -> Vec<u64> {
    list(directory).unwrap().iter().map(|path| step_of(path).unwrap()).collect()
}
