//! What the page asks for.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{Method, Uri};
use axum::middleware::Next;
use axum::response::Response;
use axum::{Extension, Json};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::preferences::{Choice, Id};
use super::prompts::asked;
use super::raters::Raters;
use super::room::Room;
use super::sampling::Sampler;
use crate::web::body;
use crate::web::error::ApiError;
use crate::web::fields::{Fields, shown};

/// What can be asked for.
const PATHS: &str = "/api/state, /api/judgements, /api/undo, /api/prompts";
/// How long a request waits for a pair; the page asks again. Proxies give up later than that.
const LONGEST_WAIT: Duration = Duration::from_secs(25);

/// What all requests share.
pub(crate) struct Service {
    pub(crate) room: Arc<Room>,
    pub(crate) sampler: Arc<Sampler>,
    pub(crate) raters: Raters,
    /// What the model is called.
    pub(crate) model: String,
}

/// Whose request it is.
#[derive(Clone)]
pub(crate) struct Name(String);

/// Turns away who is no rater.
pub(crate) async fn by_token(
    State(service): State<Arc<Service>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let name = Name(service.raters.recognise(request.headers())?.into());
    request.extensions_mut().insert(name);
    Ok(next.run(request).await)
}

/// `GET /api/state`: where the rater is, once there is a pair to judge or nothing to wait for.
pub(crate) async fn state(
    State(service): State<Arc<Service>>,
    Extension(Name(rater)): Extension<Name>,
) -> Result<Json<Value>, ApiError> {
    let until = Instant::now() + LONGEST_WAIT;
    let mut changes = service.room.changes();
    loop {
        if service.sampler.scheduler.is_stopping() {
            return Err(ApiError::stopping());
        }
        changes.mark_unchanged();
        service.room.arrive(&rater)?;
        let waits = service.room.look(&rater, |desk| desk.is_waiting());
        if !waits || timeout_at(until, changes.changed()).await.is_err() {
            return Ok(service.shown_to(&rater));
        }
    }
}

/// `POST /api/judgements` of `{"id", "choice"}`: the rater's judgement of a pair, kept when this is answered.
pub(crate) async fn judge(
    State(service): State<Arc<Service>>,
    Extension(Name(rater)): Extension<Name>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body::read(request).await?)?;
    let id = id(&mut fields)?;
    let choice = required(&mut fields, "choice")?;
    let choice: Choice = serde_json::from_value(choice.clone()).map_err(|_| {
        let problem = format!("must be first, second, tie or both_bad, and is {}", shown(&choice));
        ApiError::parameter("choice", problem)
    })?;
    fields.finish()?;
    service.write(rater, move |room, rater| room.judge(rater, id, choice)).await
}

/// `POST /api/undo` of `{"id"}`: takes the rater's last judgement back.
pub(crate) async fn undo(
    State(service): State<Arc<Service>>,
    Extension(Name(rater)): Extension<Name>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body::read(request).await?)?;
    let id = id(&mut fields)?;
    fields.finish()?;
    service.write(rater, move |room, rater| room.undo(rater, id)).await
}

/// `POST /api/prompts` of `{"prompt"}`: what the rater asks the model, where the rater writes the prompts.
pub(crate) async fn write(
    State(service): State<Arc<Service>>,
    Extension(Name(rater)): Extension<Name>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body::read(request).await?)?;
    let text = fields.text("prompt")?.unwrap_or_default();
    fields.finish()?;
    let text = text.trim();
    if text.is_empty() {
        return Err(ApiError::parameter("prompt", "is empty; write what the model is to answer"));
    }
    let prompt = asked(text.into());
    service.sampler.reader.tokens(&prompt).map_err(|error| ApiError::parameter("prompt", error))?;
    service.room.write(&rater, &prompt)?;
    Ok(service.shown_to(&rater))
}

/// Whatever else is asked for.
pub(crate) async fn nothing(method: Method, uri: Uri) -> ApiError {
    ApiError::route(method.as_str(), uri.path(), PATHS)
}

/// What is there, asked for in another way.
pub(crate) async fn other_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method(method.as_str(), uri.path())
}

fn required(fields: &mut Fields, name: &str) -> Result<Value, ApiError> {
    fields.value(name).ok_or_else(|| ApiError::parameter(name, "is missing"))
}

fn id(fields: &mut Fields) -> Result<Id, ApiError> {
    let id = fields.text("id")?.ok_or_else(|| ApiError::parameter("id", "is missing"))?;
    id.parse().map_err(|problem| ApiError::parameter("id", problem))
}

impl Service {
    /// Has something written down, on a thread that may wait for the disk. It goes on where the client hangs up.
    async fn write(
        self: Arc<Self>,
        rater: String,
        write: impl FnOnce(&Room, &str) -> Result<(), ApiError> + Send + 'static,
    ) -> Result<Json<Value>, ApiError> {
        let write = move || {
            write(&self.room, &rater)?;
            Ok(self.shown_to(&rater))
        };
        let written = tokio::task::spawn_blocking(write).await;
        written.map_err(|_| ApiError::internal("this could not be kept: a bug; see the log"))?
    }

    /// Where a rater is.
    fn shown_to(&self, rater: &str) -> Json<Value> {
        self.room.look(rater, |desk| {
            let progress = desk.progress();
            let pair = desk.offer().map(|(id, pair)| {
                json!({
                    "id": id,
                    "prompt": pair.task.prompt,
                    "answers": pair.answers.each_ref().map(|answer| &answer.text),
                    "finish": pair.answers.each_ref().map(|answer| answer.finish),
                })
            });
            let last = desk.last().map(|last| json!({ "id": last.id, "choice": last.choice }));
            Json(json!({
                "rater": rater,
                "model": self.model,
                "typed": desk.is_typed(),
                "judged": progress.judged,
                "total": progress.total,
                "alike": progress.alike,
                "last": last,
                "pair": pair,
                "waiting": desk.is_waiting(),
            }))
        })
    }
}
