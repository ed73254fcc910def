//! `lockstep rate`: a page on which people say which of two answers of a model is better.
//!
//! Prompts come from a file ([`prompts`]) or from the raters ([`raters`]). A rater's desk decides what is sampled, shown and
//! written next ([`desk`]); pairs are drawn ([`pair`]) and sampled ahead ([`sampling`]), and each judgement is a line of a file
//! ([`preferences`]) that `lockstep train` reads. A room holds all desks and the file ([`room`]).

pub(crate) mod desk;
pub(crate) mod pair;
pub(crate) mod preferences;
pub(crate) mod prompts;
pub(crate) mod raters;
pub(crate) mod room;
pub(crate) mod sampling;
mod service;

use std::sync::Arc;
use std::time::Duration;

use axum::routing::{get, post};
use axum::{Router, middleware};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use self::raters::Raters;
use self::room::Room;
use self::sampling::Sampler;
use self::service::Service;
use crate::web;
use crate::web::access::Hosts;
use crate::web::assets::Page;

const PAGE: Page = Page {
    html: include_str!("page/index.html"),
    style: include_str!("page/page.css"),
    script: include_str!("page/page.js"),
};

/// Who rates what.
pub(crate) struct RateConfig {
    pub(crate) sampler: Sampler,
    /// Tells that the sampler's scheduler has ended.
    pub(crate) ended: oneshot::Receiver<()>,
    /// Has a desk for each of `raters`.
    pub(crate) room: Arc<Room>,
    pub(crate) raters: Raters,
    /// What the model is called.
    pub(crate) model: String,
    pub(crate) hosts: Hosts,
}

/// Serves the page over `listener` until `shutdown` gives a reason to stop. Judgements that were sent are kept; answers under
/// way are nobody's yet.
///
/// # Errors
/// If the system refuses, or the engine's thread ends.
pub(crate) async fn run(
    config: RateConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = String>,
) -> anyhow::Result<()> {
    let RateConfig { sampler, ended, room, raters, model, hosts } = config;
    let sampler = Arc::new(sampler);
    // They end when dropped, as this ends.
    let mut sampling = JoinSet::new();
    for rater in raters.names() {
        sampling.spawn(sampler.clone().serve(room.clone(), rater));
    }
    let scheduler = sampler.scheduler.clone();
    let service = Arc::new(Service { room, sampler, raters, model });
    web::serve(router(service, hosts), listener, scheduler, ended, Duration::ZERO, shutdown).await
}

fn router(service: Arc<Service>, hosts: Hosts) -> Router {
    let api = Router::new()
        .route("/api/state", get(service::state))
        .route("/api/judgements", post(service::judge))
        .route("/api/undo", post(service::undo))
        .route("/api/prompts", post(service::write))
        .route_layer(middleware::from_fn_with_state(service.clone(), service::by_token));
    Router::new()
        .merge(PAGE.routes())
        .merge(api)
        .method_not_allowed_fallback(service::other_method)
        .fallback(service::nothing)
        .layer(web::body::limit())
        .layer(middleware::from_fn_with_state(hosts, web::access::by_host))
        .with_state(service)
}
