//! `lockstep serve`: an HTTP server with OpenAI's interface, and a page to talk on.
//!
//! A request is checked whole ([`request`]), becomes tokens ([`service`]), waits its turn and is computed on the thread
//! that owns the engine ([`scheduler`](crate::web::scheduler)); what comes out is counted and timed ([`answering`]) and
//! sent at once or as it comes ([`reply`]).

mod access;
mod answering;
mod reply;
mod request;
mod service;

use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::Context as _;
use axum::routing::{get, post};
use axum::{Router, middleware};
use lockstep_model::inference::Engine;
use lockstep_model::tokenizer::Tokenizer;
use tokio::net::TcpListener;

pub(crate) use self::access::Access;
use self::service::Service;
use crate::chat::template::Template;
use crate::web;
use crate::web::assets::Page;
use crate::web::scheduler::Scheduler;

/// Hexadecimal digits of a parameters' digest that name them.
const FINGERPRINT_DIGITS: usize = 12;

const PAGE: Page = Page {
    html: include_str!("page/index.html"),
    style: include_str!("page/page.css"),
    script: include_str!("page/page.js"),
};

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
    let (scheduler, ended) =
        Scheduler::start(config.engine, config.slots, config.queue).context("no thread for the engine")?;
    let scheduler = Arc::new(scheduler);
    let service = Arc::new(Service {
        scheduler: scheduler.clone(),
        access: config.access,
        fingerprint: format!("fp_{}", &config.params_sha256[..FINGERPRINT_DIGITS.min(config.params_sha256.len())]),
        tokenizer: config.tokenizer,
        template: config.template,
        name: config.name,
        context,
        max_tokens: config.max_tokens,
        slots: config.slots,
        started: web::since_1970().as_secs(),
        requests: AtomicU64::new(0),
        random: RandomState::new(),
    });
    web::serve(router(service), listener, scheduler, ended, grace, shutdown).await
}

fn router(service: Arc<Service>) -> Router {
    let api = Router::new()
        .route("/v1/chat/completions", post(service::chat))
        .route("/v1/completions", post(service::completions))
        .route("/v1/models", get(service::models))
        .route("/v1/models/{id}", get(service::model))
        .route_layer(middleware::from_fn_with_state(service.clone(), access::by_key));
    Router::new()
        .route("/healthz", get(service::health))
        .merge(PAGE.routes())
        .merge(api)
        .method_not_allowed_fallback(service::other_method)
        .fallback(service::nothing)
        .layer(web::body::limit())
        .layer(middleware::from_fn_with_state(service.access.hosts(), web::access::by_host))
        .with_state(service)
}
