//! Checkpoints written in the background.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use anyhow::Context as _;
use lockstep_model::checkpoint::{self, Manifest};

use crate::background::Background;
use crate::dataplane::State;
use crate::run_dir::Fence;

/// A checkpoint to write.
pub(crate) struct Job {
    pub(crate) manifest: Manifest,
    pub(crate) state: State,
    /// Files whose seals the manifest holds: what they hold so far must be on the disk before it.
    pub(crate) sealed: Vec<File>,
}

/// Starts a thread that writes checkpoints to `directory`, keeping the `keep_last` newest and the best, as long as `fence`
/// lets it. Each attempt's step and outcome go to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    directory: PathBuf,
    keep_last: usize,
    fence: Fence,
    done: impl Fn(u64, Result<PathBuf, String>) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    Background::start("archive", move |jobs: Receiver<Job>| {
        for job in jobs {
            let step = job.manifest.step;
            let kept = keep(&directory, keep_last, &fence, job);
            done(step, kept.map_err(|error| format!("{error:#}")));
        }
    })
}

fn keep(directory: &Path, keep_last: usize, fence: &Fence, job: Job) -> anyhow::Result<PathBuf> {
    let Job { manifest, state, sealed } = job;
    sealed.iter().try_for_each(File::sync_data).context("metrics or ledger cannot be flushed to the disk")?;
    let staged = checkpoint::write(directory, manifest, &state.parameters, &state.optimizer)?;
    drop(state);
    fence.check()?;
    let path = staged.publish()?;
    checkpoint::prune(directory, keep_last)?;
    Ok(path)
}
