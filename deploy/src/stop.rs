//! Asked to stop once: finish the step, write a checkpoint, release the workers. Twice: now.

use anyhow::Context as _;
use tokio::signal;
use tokio::sync::mpsc;

use crate::lifeline;

/// Exit status after a second request: 128 + SIGINT, as shells count it.
pub(crate) const INTERRUPTED: u8 = 130;
/// Exit status of a process whose parent is gone.
const ORPHANED: i32 = 1;

/// Those who may ask this process to stop.
#[derive(Debug)]
pub(crate) enum Requests {
    /// People and systems, by signals.
    Signals(Signals),
    /// The parent alone, by lines on standard input that say why.
    Parent(mpsc::UnboundedReceiver<String>),
}

impl Requests {
    /// Listens for signals, from now on.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn by_signal() -> anyhow::Result<Self> {
        Ok(Self::Signals(Signals::listen()?))
    }

    /// Listens to the parent, and ends this process at once when the parent is gone. Signals that ask to stop do nothing:
    /// who sends them to all processes sends them to the parent too, and is not to be heard twice.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn by_parent() -> anyhow::Result<Self> {
        let (lines, reasons) = mpsc::unbounded_channel();
        let hear = move |line| drop(lines.send(line));
        // A signal that was listened for once does not end the process any more.
        Signals::listen()?;
        lifeline::hold(hear, || std::process::exit(ORPHANED)).context("no thread for standard input")?;
        Ok(Self::Parent(reasons))
    }

    /// Completes with the reason when somebody asks. May be dropped before, and nothing is lost.
    pub(crate) async fn next(&mut self) -> String {
        match self {
            Self::Signals(signals) => signals.next().await,
            Self::Parent(reasons) => match reasons.recv().await {
                Some(reason) => reason,
                None => std::future::pending().await,
            },
        }
    }

    /// Completes with the reason of the first request. From then on, another one ends the process at once.
    pub(crate) async fn first(mut self) -> String {
        let reason = self.next().await;
        tokio::spawn(async move {
            self.next().await;
            eprintln!("stopped at once; the newest checkpoint is whole, --resume continues from it");
            std::process::exit(INTERRUPTED.into());
        });
        reason
    }
}

/// Ctrl-C, and the request to terminate where there is one.
#[derive(Debug)]
pub(crate) struct Signals {
    #[cfg(unix)]
    interrupt: signal::unix::Signal,
    #[cfg(unix)]
    terminate: signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> anyhow::Result<Self> {
        use signal::unix::{SignalKind, signal};
        let listen = |kind| signal(kind).context("signals cannot be received");
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) -> String {
        tokio::select! {
            Some(()) = self.interrupt.recv() => "interrupted by Ctrl-C".into(),
            Some(()) = self.terminate.recv() => "asked to terminate".into(),
            else => std::future::pending().await,
        }
    }
}

#[cfg(not(unix))]
impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {})
    }

    async fn next(&mut self) -> String {
        match signal::ctrl_c().await {
            Ok(()) => "interrupted by Ctrl-C".into(),
            Err(_) => std::future::pending().await,
        }
    }
}
