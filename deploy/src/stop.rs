//! Ctrl-C once: finish the step, write a checkpoint, release the workers. Twice: now.

use tokio::signal;

/// Exit status after a second Ctrl-C: 128 + SIGINT, as shells count it.
const INTERRUPTED: i32 = 130;

/// Completes with the reason once somebody asks to stop. From then on, asking again ends the process at once.
pub(crate) async fn requested() -> String {
    let reason = signalled().await;
    tokio::spawn(async {
        signalled().await;
        eprintln!("stopped at once; the newest checkpoint is whole, --resume continues from it");
        std::process::exit(INTERRUPTED);
    });
    reason
}

#[cfg(unix)]
async fn signalled() -> String {
    use signal::unix::{SignalKind, signal};
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => drop(terminate.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        interrupted = signal::ctrl_c() => match interrupted {
            Ok(()) => "interrupted by Ctrl-C".into(),
            Err(_) => std::future::pending().await,
        },
        () = terminated => "asked to terminate".into(),
    }
}

#[cfg(not(unix))]
async fn signalled() -> String {
    match signal::ctrl_c().await {
        Ok(()) => "interrupted by Ctrl-C".into(),
        Err(_) => std::future::pending().await,
    }
}
