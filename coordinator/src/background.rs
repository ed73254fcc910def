//! A thread that does jobs in the order in which they are sent.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Owns the thread. Dropping it waits for the jobs at hand, and passes a panic of the thread on.
pub(crate) struct Background<Job> {
    /// `None` only while this is being dropped.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl<Job: Send + 'static> Background<Job> {
    /// Starts a thread called `name` that gives what it is sent to `work`.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub(crate) fn start(name: &str, work: impl FnOnce(Receiver<Job>) + Send + 'static) -> std::io::Result<Self> {
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || work(queue))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Adds a job to the queue.
    pub(crate) fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // A thread that takes no more has panicked, and dropping `self` passes that on.
            let _ = jobs.send(job);
        }
    }

    /// For a job of another thread to add jobs to this one. The thread ends when all senders are gone.
    pub(crate) fn sender(&self) -> Option<Sender<Job>> {
        self.jobs.clone()
    }
}

impl<Job> Drop for Background<Job> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}
