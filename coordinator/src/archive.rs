//! Checkpoints written in the background, on a thread of their own.

use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use lockstep_model::checkpoint::{self, Manifest};

use crate::dataplane::State;

/// What to write.
struct Job {
    manifest: Manifest,
    state: State,
}

/// The thread that writes. Dropping it waits for the checkpoint under way.
#[derive(Debug)]
pub(crate) struct Archive {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// Takes checkpoints to the thread.
#[derive(Clone, Debug)]
pub(crate) struct Handle(Sender<Job>);

impl Handle {
    /// Writes a checkpoint and removes those no longer kept.
    pub(crate) fn write(&self, manifest: Manifest, state: State) {
        // The thread ends only when the run does.
        let _ = self.0.send(Job { manifest, state });
    }
}

impl Archive {
    /// Starts the thread for `directory`, keeping the `keep_last` newest checkpoints and the best. Each attempt's step
    /// and outcome go to `done`.
    pub(crate) fn start(
        directory: PathBuf,
        keep_last: usize,
        done: impl Fn(u64, Result<PathBuf, String>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let thread = std::thread::Builder::new().name("archive".into()).spawn(move || {
            for Job { manifest, state } in queue {
                let step = manifest.step;
                let written = checkpoint::write(&directory, manifest, &state.parameters, &state.optimizer);
                drop(state);
                let kept = written.and_then(|path| checkpoint::prune(&directory, keep_last).map(|()| path));
                done(step, kept.map_err(|error| error.to_string()));
            }
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// A handle for another thread; `None` only while this is being dropped.
    pub(crate) fn handle(&self) -> Option<Handle> {
        self.jobs.clone().map(Handle)
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}
