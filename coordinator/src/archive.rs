//! Checkpoints written and taken back, in the background.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use lockstep_model::checkpoint::{self, Checkpoint, Manifest};

use crate::background::Background;
use crate::dataplane::State;
use crate::run_dir::Fence;
use crate::service::Input;

/// Something to do with checkpoints.
pub(crate) enum Job {
    /// Write one. What the files hold whose seals are in the manifest, `sealed`, must be on the disk before it.
    Write { manifest: Box<Manifest>, state: State, sealed: Vec<File> },
    /// Load the newest of step `at_most` or earlier, and remove later ones.
    RollBack { at_most: u64 },
}

/// Starts a thread that keeps checkpoints in `directory`: the `keep_last` newest and the best, as long as `fence` lets it.
/// What became of each job goes to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    directory: PathBuf,
    keep_last: usize,
    fence: Fence,
    done: impl Fn(Input) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    Background::start("archive", move |jobs| {
        for job in jobs {
            match job {
                Job::Write { manifest, state, sealed } => {
                    let step = manifest.step;
                    let written = write(&directory, keep_last, &fence, *manifest, state, &sealed);
                    done(Input::Archived { step, written: written.map_err(|error| format!("{error:#}")) });
                }
                Job::RollBack { at_most } => done(Input::RolledBack(roll_back(&directory, &fence, at_most))),
            }
        }
    })
}

fn write(
    directory: &Path,
    keep_last: usize,
    fence: &Fence,
    manifest: Manifest,
    state: State,
    sealed: &[File],
) -> anyhow::Result<PathBuf> {
    sealed.iter().try_for_each(File::sync_data).context("metrics or ledger cannot be flushed to the disk")?;
    let staged = checkpoint::write(directory, manifest, &state.parameters, &state.optimizer)?;
    drop(state);
    fence.check()?;
    let path = staged.publish()?;
    checkpoint::prune(directory, keep_last)?;
    Ok(path)
}

fn roll_back(directory: &Path, fence: &Fence, at_most: u64) -> anyhow::Result<Option<Box<Checkpoint>>> {
    fence.check()?;
    checkpoint::remove_after(directory, at_most)?;
    let (newest, damaged) = checkpoint::newest(directory)?;
    for error in damaged {
        tracing::warn!("{error}; going back to an older checkpoint");
    }
    Ok(newest.map(|(_, checkpoint)| Box::new(checkpoint)))
}
