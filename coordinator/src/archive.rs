//! Checkpoints written and taken back, in the background.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;

use anyhow::Context as _;
use lockstep_model::checkpoint::{self, Checkpoint, Manifest};

use crate::background::Background;
use crate::dataplane::State;
use crate::input::Input;
use crate::run_dir::Fence;

/// Something to do with checkpoints.
pub(crate) enum Job {
    /// Write one. What the files hold whose seals are in the manifest, `sealed`, must be on the disk before it.
    Write { manifest: Box<Manifest>, state: State, sealed: Vec<File> },
    /// Load the newest of step `at_most` or earlier, and remove later ones.
    RollBack { at_most: u64 },
}

/// The directory of a run's checkpoints.
struct Archive {
    directory: PathBuf,
    keep_last: usize,
    fence: Fence,
    /// Steps of the checkpoints that this process wrote or read whole.
    whole: BTreeSet<u64>,
}

/// Starts a thread that keeps checkpoints in `directory`: the `keep_last` newest and the best, as long as `fence` lets it.
/// The checkpoint of step `whole` was read just before. What became of each job goes to `done`.
///
/// # Errors
/// If the system starts no thread.
pub(crate) fn start(
    directory: PathBuf,
    keep_last: usize,
    fence: Fence,
    whole: Option<u64>,
    done: impl Fn(Input) + Send + 'static,
) -> std::io::Result<Background<Job>> {
    let mut archive = Archive { directory, keep_last, fence, whole: whole.into_iter().collect() };
    Background::start("archive", move |jobs| {
        for job in jobs {
            match job {
                Job::Write { manifest, state, sealed } => {
                    let step = manifest.step;
                    let written = archive.write(*manifest, state, &sealed);
                    done(Input::Archived { step, written: written.map_err(|error| format!("{error:#}")) });
                }
                Job::RollBack { at_most } => done(Input::RolledBack(archive.roll_back(at_most))),
            }
        }
    })
}

impl Archive {
    fn write(&mut self, manifest: Manifest, state: State, sealed: &[File]) -> anyhow::Result<PathBuf> {
        sealed.iter().try_for_each(File::sync_data).context("metrics or ledger cannot be flushed to the disk")?;
        let step = manifest.step;
        let staged = checkpoint::write(&self.directory, manifest, &state.parameters, &state.optimizer)?;
        drop(state);
        self.fence.check()?;
        let path = staged.publish()?;
        self.whole.insert(step);
        // The new one is there, whatever becomes of old ones.
        if let Err(error) = checkpoint::prune(&self.directory, self.keep_last, &mut self.whole) {
            tracing::warn!("{error}; the run goes on, and older checkpoints take up space");
        }
        Ok(path)
    }

    fn roll_back(&mut self, at_most: u64) -> anyhow::Result<Option<Box<Checkpoint>>> {
        self.fence.check()?;
        self.whole.retain(|&step| step <= at_most);
        checkpoint::remove_after(&self.directory, at_most)?;
        let (newest, damaged) = checkpoint::newest(&self.directory)?;
        for error in damaged {
            tracing::warn!("{error}; going back to an older checkpoint");
        }
        Ok(newest.map(|(_, checkpoint)| {
            self.whole.insert(checkpoint.manifest.step);
            Box::new(checkpoint)
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use lockstep_model::checkpoint::directory_name;

    use super::*;
    use crate::config::RunConfig;
    use crate::run_dir::RunDir;
    use crate::start;

    fn write(archive: &mut Archive, step: u64) -> anyhow::Result<PathBuf> {
        let config = RunConfig::line(&archive.directory);
        let manifest = Manifest { step, ..start::new_manifest(&config, "a") };
        archive.write(manifest, start::initial_state(&config), &[])
    }

    #[test]
    fn a_checkpoint_counts_though_an_older_one_cannot_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(dir.path(), false, "a").unwrap();
        let directory = run.checkpoints();
        let mut archive = Archive { directory, keep_last: 1, fence: run.fence(), whole: BTreeSet::new() };
        write(&mut archive, 1).unwrap();
        // In the way of its removal.
        fs::write(archive.directory.join(".step-000000001.partial"), "a file").unwrap();
        assert_eq!(write(&mut archive, 2).unwrap(), archive.directory.join(directory_name(2)));
        assert_eq!(checkpoint::list(&archive.directory).unwrap().len(), 2);
        assert_eq!(archive.whole, [1, 2].into());
        let back = archive.roll_back(1).unwrap().unwrap();
        assert_eq!((back.manifest.step, archive.whole), (1, [1].into()));
    }
}
