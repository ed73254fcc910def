//! Ctrl-C while an answer comes: the first ends the answer, any other the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Context as _;

use crate::stop::INTERRUPTED;

const IDLE: u8 = 0;
const ANSWERING: u8 = 1;
const STOPPING: u8 = 2;

/// Listens for Ctrl-C for the rest of the process.
pub(crate) struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// Listens from now on.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let state = Arc::new(AtomicU8::new(IDLE));
        let shared = state.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listen = move || {
            runtime.block_on(async {
                while tokio::signal::ctrl_c().await.is_ok() {
                    let stops = shared.compare_exchange(ANSWERING, STOPPING, Ordering::Relaxed, Ordering::Relaxed);
                    if stops.is_err() {
                        std::process::exit(INTERRUPTED.into());
                    }
                }
            });
        };
        std::thread::Builder::new().name("interrupt".into()).spawn(listen).context("no thread for Ctrl-C")?;
        Ok(Self(state))
    }

    /// From now on, and as long as this value lives, Ctrl-C is a request to it.
    pub(crate) fn watch(&self) -> Watch {
        self.0.store(ANSWERING, Ordering::Relaxed);
        Watch(self.0.clone())
    }
}

/// Something that Ctrl-C may stop.
pub(crate) struct Watch(Arc<AtomicU8>);

impl Watch {
    /// Whether it was asked to.
    pub(crate) fn interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed) == STOPPING
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(IDLE, Ordering::Relaxed);
    }
}
