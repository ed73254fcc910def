//! Checkpoints written in the background.

use std::path::PathBuf;

use lockstep_model::checkpoint::{self, Manifest};

use crate::background::Background;
use crate::dataplane::State;

/// A checkpoint to write.
pub(crate) struct Job {
    pub(crate) manifest: Manifest,
    pub(crate) state: State,
}

/// Starts a thread that writes checkpoints to `directory`, keeping the `keep_last` newest and the best. Each attempt's
/// step and outcome go to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    directory: PathBuf,
    keep_last: usize,
    done: impl Fn(u64, Result<PathBuf, String>) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    Background::start("archive", move |jobs| {
        for Job { manifest, state } in jobs {
            let step = manifest.step;
            let written = checkpoint::write(&directory, manifest, &state.parameters, &state.optimizer);
            drop(state);
            let kept = written.and_then(|path| checkpoint::prune(&directory, keep_last).map(|()| path));
            done(step, kept.map_err(|error| error.to_string()));
        }
    })
}
