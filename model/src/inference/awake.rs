//! Threads that stay awake while there is work in small parts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rayon::Yield;

/// Says that there is no more work, however it ended.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `work` on one of rayon's threads, while the others look for parts of it all the time: a token is some thirty products
/// one after the other, each done before a thread that sleeps would have woken.
pub(super) fn awake<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        let leader = rayon::current_thread_index();
        for _ in 1..rayon::current_num_threads() {
            let done = &done;
            scope.spawn(move |_| {
                // The leader has better things to do.
                while rayon::current_thread_index() != leader && !done.load(Ordering::Relaxed) {
                    if rayon::yield_now() != Some(Yield::Executed) {
                        thread::yield_now();
                    }
                }
            });
        }
        let _done = Done(&done);
        work()
    })
}
