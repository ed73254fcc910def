//! Checkpoints written and taken back, in the background.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use lockstep_model::checkpoint::{self, Checkpoint, Manifest};

use crate::background::Background;
use crate::dataplane::State;
use crate::service::Input;

/// Something to do with checkpoints.
pub(crate) enum Job {
    /// Write one.
    Write { manifest: Box<Manifest>, state: State },
    /// Load the newest of step `at_most` or earlier, and remove later ones.
    RollBack { at_most: u64 },
}

/// Starts a thread that keeps checkpoints in `directory`: the `keep_last` newest and the best. What became of each job goes
/// to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    directory: PathBuf,
    keep_last: usize,
    done: impl Fn(Input) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    Background::start("archive", move |jobs| {
        for job in jobs {
            match job {
                Job::Write { manifest, state } => {
                    let step = manifest.step;
                    let written = checkpoint::write(&directory, *manifest, &state.parameters, &state.optimizer);
                    drop(state);
                    let kept = written.and_then(|path| checkpoint::prune(&directory, keep_last).map(|()| path));
                    done(Input::Archived { step, written: kept.map_err(|error| error.to_string()) });
                }
                Job::RollBack { at_most } => done(Input::RolledBack(roll_back(&directory, at_most))),
            }
        }
    })
}

fn roll_back(directory: &Path, at_most: u64) -> anyhow::Result<Option<Box<Checkpoint>>> {
    for path in checkpoint::list(directory)? {
        if checkpoint::step_of(&path).is_none_or(|step| step > at_most) {
            fs::remove_dir_all(&path).with_context(|| format!("{}: cannot remove the checkpoint", path.display()))?;
        }
    }
    let (newest, damaged) = checkpoint::newest(directory)?;
    for error in damaged {
        tracing::warn!("{error}; going back to an older checkpoint");
    }
    Ok(newest.map(|(_, checkpoint)| Box::new(checkpoint)))
}
