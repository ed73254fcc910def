//! Standard input as the line to the process that started this one: it ends when that process does, however it went.

use std::io;

use tokio::sync::oneshot;

/// Calls `hear` with each line of standard input and `end` when it ends, on a thread of its own.
///
/// # Errors
/// If the system gives no thread.
pub(crate) fn hold(hear: impl FnMut(String) + Send + 'static, end: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let listen = move || {
        io::stdin().lines().map_while(Result::ok).for_each(hear);
        end();
    };
    std::thread::Builder::new().name("stdin".into()).spawn(listen).map(drop)
}

/// Completes when standard input ends.
///
/// # Errors
/// If the system gives no thread.
pub(crate) fn end() -> io::Result<oneshot::Receiver<()>> {
    let (gone, orphaned) = oneshot::channel();
    hold(drop, move || drop(gone))?;
    Ok(orphaned)
}
