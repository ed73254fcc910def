//! What HTTP servers of this program share: how they start and end, whom they answer, how bodies are read and errors told,
//! the thread that computes, and what their pages have in common.

pub(crate) mod access;
pub(crate) mod assets;
pub(crate) mod body;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod scheduler;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use axum::Router;
use axum::serve::ListenerExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use self::scheduler::{Load, Scheduler};

/// How long connections may take to receive their last words once nothing is computed any more.
const FAREWELL: Duration = Duration::from_secs(2);

/// Serves `router` over `listener` until `shutdown` gives a reason to stop: then `scheduler`, whose thread's end `ended`
/// tells, takes nothing new, and what is under way finishes within `grace`, or is cut off.
///
/// # Errors
/// If the system refuses, or the scheduler's thread ends.
pub(crate) async fn serve(
    router: Router,
    listener: TcpListener,
    scheduler: Arc<Scheduler>,
    mut ended: oneshot::Receiver<()>,
    grace: Duration,
    shutdown: impl Future<Output = String>,
) -> anyhow::Result<()> {
    let (close, closed) = oneshot::channel::<()>();
    let listener = listener.tap_io(|stream: &mut TcpStream| {
        // Tokens are not to wait for one another.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("a connection keeps its delay: {error}");
        }
    });
    let server = axum::serve(listener, router).with_graceful_shutdown(async {
        let _ = closed.await;
    });
    // Ends when dropped, whatever happens below.
    let mut tasks = JoinSet::new();
    tasks.spawn(server.into_future());
    tokio::select! {
        reason = shutdown => {
            let Load { running, queued } = scheduler.load();
            match grace.as_secs() {
                0 => tracing::info!(running, queued, "{reason}: what is under way is cut off"),
                secs => tracing::info!(running, queued, "{reason}: what is under way may finish within {secs} s"),
            }
        }
        _ = &mut ended => bail!("the thread that computes has ended, which is a bug; its last words are above"),
        Some(served) = tasks.join_next() => return served?.context("connections cannot be accepted"),
    }
    let unfinished = scheduler.stop(grace, &mut ended).await;
    if unfinished > 0 {
        tracing::warn!("{unfinished} sequences were cut off");
    }
    drop(close);
    match tokio::time::timeout(FAREWELL, tasks.join_next()).await {
        Ok(Some(served)) => served?.context("the server failed"),
        // Whoever does not hang up is hung up on.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// How long ago 1970 began.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
