//! Finished spans of work: recorded from `tracing`, gathered from all processes, written in Chrome's trace format.
//!
//! Each process records its own spans of target `lockstep`. Workers send theirs with their results; the coordinator's
//! process puts everything on one clock and writes one file, with a row for each process. Open it in
//! <https://ui.perfetto.dev> or `chrome://tracing`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use lockstep_proto::v1::SpanTiming;
use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

/// Target of the spans that belong to a step.
const TARGET: &str = "lockstep";
/// Most spans kept between two collections; more are dropped, so that a process nobody collects from stays small.
const CAPACITY: usize = 65_536;

/// Records finished spans until somebody takes them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorder(Arc<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    finished: Mutex<Vec<SpanTiming>>,
    next_id: AtomicU64,
}

impl Recorder {
    /// The spans finished since the last call.
    pub(crate) fn take(&self) -> Vec<SpanTiming> {
        std::mem::take(&mut *self.0.finished.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A number no other span of this run is likely to have: the process in the upper half, a count in the lower.
    fn new_id(&self) -> u64 {
        u64::from(std::process::id()) << 32 | (self.0.next_id.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// What a span says about itself, gathered from its fields.
#[derive(Debug, Default)]
struct Fields {
    step: u64,
    slot: Option<i32>,
    /// Given by who made the span, so that other processes know it.
    span_id: Option<u64>,
    remote_parent: u64,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "step" => self.step = value,
            "slot" => self.slot = i32::try_from(value).ok(),
            "span_id" => self.span_id = Some(value),
            _ => {}
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        if let Ok(value) = u64::try_from(value) {
            self.record_u64(field, value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "traceparent" {
            self.remote_parent = parent_of(value).unwrap_or(0);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "traceparent" {
            self.record_str(field, &format!("{value:?}"));
        }
    }
}

/// The span id in a W3C traceparent.
fn parent_of(traceparent: &str) -> Option<u64> {
    u64::from_str_radix(traceparent.split('-').nth(2)?, 16).ok()
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id).filter(|span| span.metadata().target() == TARGET) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let parent = span.parent().and_then(|parent| {
            let extensions = parent.extensions();
            extensions.get::<SpanTiming>().map(|parent| (parent.span_id, parent.step, parent.slot))
        });
        let (parent_id, step, slot) = parent.unwrap_or((fields.remote_parent, fields.step, -1));
        span.extensions_mut().insert(SpanTiming {
            name: span.name().into(),
            start_unix_nanos: unix_nanos(),
            duration_nanos: 0,
            step: if fields.step == 0 { step } else { fields.step },
            slot: fields.slot.unwrap_or(slot),
            span_id: fields.span_id.unwrap_or_else(|| self.new_id()),
            parent_span_id: parent_id,
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        values.record(&mut fields);
        if let Some(timing) = span.extensions_mut().get_mut::<SpanTiming>() {
            if fields.step != 0 {
                timing.step = fields.step;
            }
            if fields.remote_parent != 0 {
                timing.parent_span_id = fields.remote_parent;
            }
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(mut timing) = span.extensions_mut().remove::<SpanTiming>() else { return };
        timing.duration_nanos = unix_nanos().saturating_sub(timing.start_unix_nanos);
        let mut finished = self.0.finished.lock().unwrap_or_else(PoisonError::into_inner);
        if finished.len() < CAPACITY {
            finished.push(timing);
        }
    }
}

fn unix_nanos() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// A process in the trace.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    /// 0 for the coordinator, else the worker's id.
    pub(crate) id: u64,
    /// Its row's title.
    pub(crate) name: String,
    /// What to add to its clock to get the coordinator's, nanoseconds.
    pub(crate) clock_offset_nanos: i64,
}

/// Chrome's trace format, written as it comes: one event a line.
#[derive(Debug)]
pub(crate) struct TraceFile {
    file: BufWriter<File>,
    named: BTreeSet<u64>,
    first: bool,
    run_id: String,
}

impl TraceFile {
    /// Creates the file.
    pub(crate) fn create(path: &Path, run_id: &str) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("{}: cannot create the trace file", path.display()))?;
        Ok(Self { file: BufWriter::new(file), named: BTreeSet::new(), first: true, run_id: run_id.into() })
    }

    /// Adds spans of one process.
    pub(crate) fn add(&mut self, process: &Process, spans: &[SpanTiming]) -> anyhow::Result<()> {
        if !spans.is_empty() && self.named.insert(process.id) {
            let name = json!({"name": "process_name", "ph": "M", "pid": process.id, "args": {"name": process.name}});
            self.event(&name)?;
        }
        for span in spans {
            let start = (span.start_unix_nanos as i64).saturating_add(process.clock_offset_nanos);
            self.event(&json!({
                "name": span.name,
                "ph": "X",
                "pid": process.id,
                "tid": lane(&span.name),
                "ts": start as f64 / 1e3,
                "dur": span.duration_nanos as f64 / 1e3,
                "args": {
                    "trace_id": lockstep_coordinator::trace_id(&self.run_id, span.step),
                    "span_id": format!("{:016x}", span.span_id),
                    "parent_span_id": format!("{:016x}", span.parent_span_id),
                    "step": span.step,
                    "slot": span.slot,
                },
            }))?;
        }
        Ok(())
    }

    /// Completes the file.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        writeln!(self.file, "{}", if self.first { "[]" } else { "\n]" })?;
        self.file.flush().context("the trace file cannot be written; is the disk full?")
    }

    fn event(&mut self, event: &serde_json::Value) -> anyhow::Result<()> {
        let separator = if std::mem::take(&mut self.first) { "[\n" } else { ",\n" };
        write!(self.file, "{separator}{event}").context("the trace file cannot be written; is the disk full?")
    }
}

/// Spans on one lane nest; those that overlap others go on a lane of their own.
fn lane(name: &str) -> u32 {
    match name {
        "upload" | "pull" | "reduce" | "optimizer" | "publish" => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    fn recorded(work: impl FnOnce()) -> Vec<SpanTiming> {
        let recorder = Recorder::default();
        let subscriber = tracing_subscriber::registry().with(recorder.clone());
        tracing::subscriber::with_default(subscriber, work);
        recorder.take()
    }

    #[test]
    fn spans_know_their_step_and_their_parents() {
        let spans = recorded(|| {
            let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
            let lease = tracing::info_span!(target: "lockstep", "lease", step = 7u64, slot = 2u32, traceparent);
            let _lease = lease.entered();
            tracing::info_span!(target: "lockstep", "forward").in_scope(|| ());
            tracing::info_span!(target: "elsewhere", "ignored").in_scope(|| ());
        });
        let [forward, lease] = spans.as_slice() else { panic!("two spans: {spans:?}") };
        assert_eq!((lease.name.as_str(), lease.parent_span_id), ("lease", 0xb7ad_6b71_6920_3331));
        assert_eq!((forward.name.as_str(), forward.parent_span_id), ("forward", lease.span_id));
        assert_eq!((forward.step, forward.slot), (7, 2));
    }

    #[test]
    fn the_file_is_json_with_a_row_for_each_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let spans = recorded(|| tracing::info_span!(target: "lockstep", "step", step = 1u64).in_scope(|| ()));
        let mut file = TraceFile::create(&path, "run").unwrap();
        for (id, name) in [(0, "coordinator"), (1, "worker 1")] {
            let process = Process { id, name: name.into(), clock_offset_nanos: 1_000 };
            file.add(&process, &spans).unwrap();
        }
        file.finish().unwrap();
        let events: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(events.len(), 4);
        let start = (spans[0].start_unix_nanos + 1_000) as f64 / 1e3;
        assert!((events[1]["ts"].as_f64().unwrap() - start).abs() < 1.0);
        assert_eq!(events[1]["args"]["trace_id"], events[3]["args"]["trace_id"]);
    }
}
