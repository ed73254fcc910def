//! Logs on the console and spans for traces.

use std::io::IsTerminal as _;

use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::trace::Recorder;

/// Sets the process's subscriber up, with `level` where `RUST_LOG` says nothing, and returns the recorder of spans.
/// Spans are recorded only where `record` is set: nobody would collect them otherwise.
pub(crate) fn init(level: &str, record: bool) -> Recorder {
    let recorder = Recorder::default();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let console = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .with_filter(filter);
    let spans = record.then(|| recorder.clone().with_filter(filter_fn(|metadata| metadata.target() == "lockstep")));
    tracing_subscriber::registry().with(console).with(spans).init();
    recorder
}
