//! A tracing layer that keeps finished spans, as the program's own does.

use std::sync::{Arc, Mutex};

use lockstep_proto::v1::SpanTiming;
use lockstep_worker::SpanSource;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::{LookupSpan, Registry};

/// Finished spans of one step. `span_id` and `parent_span_id` are the registry's.
#[derive(Clone)]
struct SpanLog {
    step: u64,
    finished: Arc<Mutex<Vec<SpanTiming>>>,
}

/// Records the spans of `step` from now on, in this whole process, and gives them where they are asked for.
pub(crate) fn record(step: u64) -> SpanSource {
    let log = SpanLog { step, finished: Arc::default() };
    let finished = log.finished.clone();
    let subscriber = Registry::default().with(log);
    tracing::subscriber::set_global_default(subscriber).expect("one test of this program records spans");
    Arc::new(move || std::mem::take(&mut finished.lock().unwrap()))
}

/// Of the span, or of what it is part of.
#[derive(Default)]
struct Step(u64);

impl Visit for Step {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "step" {
            self.0 = value;
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for SpanLog {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut step = Step::default();
        attributes.record(&mut step);
        let span = context.span(id).expect("a new span is there");
        if let (0, Some(parent)) = (step.0, span.parent()) {
            step.0 = parent.extensions().get::<Step>().map_or(0, |of_parent| of_parent.0);
        }
        span.extensions_mut().insert(step);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let span = context.span(&id).expect("a closing span is there");
        if span.metadata().target() != "lockstep" || span.extensions().get::<Step>().is_none_or(|s| s.0 != self.step) {
            return;
        }
        let parent_span_id = span.parent().map_or(0, |parent| parent.id().into_u64());
        let (name, span_id) = (span.name().to_owned(), id.into_u64());
        self.finished.lock().unwrap().push(SpanTiming { name, span_id, parent_span_id, ..Default::default() });
    }
}
