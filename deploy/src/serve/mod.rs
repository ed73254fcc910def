//! `lockstep serve`: an HTTP server with OpenAI's interface, and a page to talk on.
//!
//! A request is checked whole ([`request`], [`fields`]), becomes tokens ([`service`]), waits its turn and is computed on the
//! thread that owns the engine ([`scheduler`]); what comes out is counted and timed ([`answering`]) and sent at once or as it
//! comes ([`reply`]).

mod access;
mod answering;
mod error;
mod fields;
mod page;
mod reply;
mod request;
mod scheduler;
mod service;

use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use axum::serve::ListenerExt as _;
use axum::{Router, middleware};
use lockstep_model::inference::Engine;
use lockstep_model::tokenizer::Tokenizer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

pub(crate) use self::access::Access;
use self::scheduler::Scheduler;
use self::service::{BODY_BYTES, Service, unix_secs};
use crate::chat::template::Template;

/// How long connections may take to receive their last words once nothing is computed any more.
const FAREWELL: Duration = Duration::from_secs(2);
/// Hexadecimal digits of a parameters' digest that name them.
const FINGERPRINT_DIGITS: usize = 12;

/// What is served, and how.
pub(crate) struct ServeConfig {
    /// Computes at most `slots` sequences at once.
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Template,
    /// What clients call the model.
    pub(crate) name: String,
    /// SHA-256 of the parameters, hexadecimal.
    pub(crate) params_sha256: String,
    /// Sequences at once.
    pub(crate) slots: usize,
    /// Sequences that wait.
    pub(crate) queue: usize,
    /// Most tokens of an answer.
    pub(crate) max_tokens: usize,
    pub(crate) access: Access,
    /// How long what runs may take to finish when the server stops.
    pub(crate) grace: Duration,
}

/// Serves over `listener` until `shutdown` gives a reason to stop: then new requests are refused, and those that are here
/// finish within the grace time, or are cut off.
///
/// # Errors
/// If the system refuses, or the engine's thread ends.
pub(crate) async fn run(
    config: ServeConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = String>,
) -> anyhow::Result<()> {
    let (grace, context) = (config.grace, config.engine.context());
    let (scheduler, mut ended) =
        Scheduler::start(config.engine, config.slots, config.queue).context("no thread for the engine")?;
    let service = Arc::new(Service {
        scheduler,
        access: config.access,
        fingerprint: format!("fp_{}", &config.params_sha256[..FINGERPRINT_DIGITS.min(config.params_sha256.len())]),
        tokenizer: config.tokenizer,
        template: config.template,
        name: config.name,
        context,
        max_tokens: config.max_tokens,
        slots: config.slots,
        started: unix_secs(),
        requests: AtomicU64::new(0),
        random: RandomState::new(),
    });
    let (close, closed) = oneshot::channel::<()>();
    let listener = listener.tap_io(|stream: &mut TcpStream| {
        // Tokens are not to wait for one another.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("a connection keeps its delay: {error}");
        }
    });
    let server = axum::serve(listener, router(service.clone())).with_graceful_shutdown(async {
        let _ = closed.await;
    });
    // Ends when dropped, whatever happens below.
    let mut tasks = JoinSet::new();
    tasks.spawn(server.into_future());
    tokio::select! {
        reason = shutdown => {
            let scheduler::Load { running, queued } = service.scheduler.load();
            tracing::info!(running, queued, "{reason}: what is under way may finish within {} s", grace.as_secs());
        }
        _ = &mut ended => bail!("the thread that computes has ended, which is a bug; its last words are above"),
        Some(served) = tasks.join_next() => return served?.context("connections cannot be accepted"),
    }
    let unfinished = service.scheduler.stop(grace, &mut ended).await;
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

fn router(service: Arc<Service>) -> Router {
    let api = Router::new()
        .route("/v1/chat/completions", post(service::chat))
        .route("/v1/completions", post(service::completions))
        .route("/v1/models", get(service::models))
        .route("/v1/models/{id}", get(service::model))
        .route_layer(middleware::from_fn_with_state(service.clone(), access::by_key));
    Router::new()
        .route("/", get(page::index))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/healthz", get(service::health))
        .merge(api)
        .method_not_allowed_fallback(service::other_method)
        .fallback(service::nothing)
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(middleware::from_fn_with_state(service.clone(), access::by_host))
        .with_state(service)
}
