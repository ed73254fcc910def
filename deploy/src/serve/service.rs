//! Requests in, tokens between, answers out.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use lockstep_model::inference::{self, Overflow, Sampling};
use lockstep_model::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::access::Access;
use super::answering::Answering;
use super::reply::{self, Endpoint, Envelope};
use super::request::{ChatRequest, CompletionRequest, Generation, Prompt};
use crate::chat::answer::Answer;
use crate::chat::template::{Template, today};
use crate::web::error::ApiError;
use crate::web::scheduler::{Load, Refusal, Scheduler, Sequence};
use crate::web::{body, since_1970};

/// What can be asked for.
const PATHS: &str = "/v1/models, /v1/chat/completions, /v1/completions";
/// Tokens of a completion where nothing is said, as with OpenAI.
const COMPLETION_TOKENS: usize = 16;

/// What all requests share.
pub(crate) struct Service {
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) access: Access,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Template,
    /// What the model is called.
    pub(crate) name: String,
    /// Names its parameters.
    pub(crate) fingerprint: String,
    /// Most tokens of prompt and answer.
    pub(crate) context: usize,
    /// Most tokens of an answer.
    pub(crate) max_tokens: usize,
    /// Sequences at once.
    pub(crate) slots: usize,
    /// When the server started, seconds since 1970.
    pub(crate) started: u64,
    /// Requests so far.
    pub(crate) requests: AtomicU64,
    /// Makes of the number of a request what nobody else's is.
    pub(crate) random: RandomState,
}

/// A prompt as the model reads it.
struct Tokens {
    tokens: Vec<u32>,
    /// What its answers begin with.
    beginning: String,
}

/// A request understood: what is to be computed, and how it is answered.
struct Order {
    endpoint: Endpoint,
    prompts: Vec<Tokens>,
    generation: Generation,
}

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(State(service): State<Arc<Service>>, request: Request) -> Result<Response, ApiError> {
    serve(service, request, Service::chat_order).await
}

/// `POST /v1/completions`.
pub(crate) async fn completions(State(service): State<Arc<Service>>, request: Request) -> Result<Response, ApiError> {
    serve(service, request, Service::completion_order).await
}

/// `GET /v1/models`.
pub(crate) async fn models(State(service): State<Arc<Service>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [service.model()] }))
}

/// `GET /v1/models/{id}`.
pub(crate) async fn model(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    service.check_model(Some(&name))?;
    Ok(Json(service.model()))
}

/// `GET /healthz`: 200 while requests are taken.
pub(crate) async fn health(State(service): State<Arc<Service>>) -> Response {
    let Load { running, queued } = service.scheduler.load();
    let (status, word) = match service.scheduler.is_stopping() {
        false => (StatusCode::OK, "ok"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    };
    let queue = service.scheduler.places() - service.slots;
    let body = json!({
        "status": word, "running": running, "queued": queued, "slots": service.slots, "queue": queue, "model": service.name,
    });
    (status, Json(body)).into_response()
}

/// Whatever else is asked for.
pub(crate) async fn nothing(method: Method, uri: Uri) -> ApiError {
    ApiError::route(method.as_str(), uri.path(), PATHS)
}

/// What is there, asked for in another way.
pub(crate) async fn other_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method(method.as_str(), uri.path())
}

/// Reads a body, and answers it.
async fn serve(
    service: Arc<Service>,
    request: Request,
    order: fn(&Service, &[u8], u64) -> Result<Order, ApiError>,
) -> Result<Response, ApiError> {
    let body = body::read(request).await?;
    let number = service.requests.fetch_add(1, Ordering::Relaxed);
    let [id, seed] = ["id", "seed"].map(|what| service.random.hash_one((what, number)));
    // Long texts take a while to become tokens, and other requests are not to wait for that.
    let understand = {
        let service = service.clone();
        move || order(&service, &body, seed)
    };
    let understood = tokio::task::spawn_blocking(understand).await;
    let order = understood.map_err(|_| ApiError::internal("the request could not be read: a bug; see the log"))??;
    service.carry_out(order, id).await
}

impl Service {
    fn chat_order(&self, body: &[u8], seed: u64) -> Result<Order, ApiError> {
        let ChatRequest { messages, mut generation } = ChatRequest::parse(body, seed)?;
        let tokens = self.template.prompt(&messages, today());
        let tokens = tokens.map_err(|error| ApiError::parameter("messages", error))?;
        generation.stops.extend_from_slice(self.template.stops());
        let prompts = vec![Tokens { tokens, beginning: String::new() }];
        Ok(Order { endpoint: Endpoint::Chat, prompts, generation })
    }

    fn completion_order(&self, body: &[u8], seed: u64) -> Result<Order, ApiError> {
        let CompletionRequest { prompts, echo, mut generation } = CompletionRequest::parse(body, seed)?;
        generation.max_tokens.get_or_insert(COMPLETION_TOKENS.min(self.max_tokens));
        let prompts = prompts.into_iter().map(|prompt| {
            let (tokens, text) = match prompt {
                Prompt::Text(text) => {
                    let tokens = self.tokenizer.encode(&text);
                    (tokens.map_err(|error| ApiError::parameter("prompt", error))?, text)
                }
                Prompt::Tokens(tokens) => {
                    let size = self.tokenizer.vocab_size();
                    if let Some(token) = tokens.iter().find(|token| **token as usize >= size) {
                        let problem = format!("the token {token} is none of the model's {size}");
                        return Err(ApiError::parameter("prompt", problem));
                    }
                    let text = if echo { self.tokenizer.decode(&tokens) } else { String::new() };
                    (tokens, text)
                }
            };
            if tokens.is_empty() {
                return Err(ApiError::parameter("prompt", "is empty; a model continues at least one token"));
            }
            Ok(Tokens { tokens, beginning: if echo { text } else { String::new() } })
        });
        Ok(Order { endpoint: Endpoint::Completions, prompts: prompts.collect::<Result<_, _>>()?, generation })
    }

    /// Has an order computed, and answers.
    async fn carry_out(&self, order: Order, id: u64) -> Result<Response, ApiError> {
        let Order { endpoint, prompts, generation } = order;
        self.check_model(generation.model.as_deref())?;
        let (sequences, choices) = (prompts.len().saturating_mul(generation.choices), generation.choices);
        if sequences > self.scheduler.places() {
            let places = self.scheduler.places();
            let problem = format!("{sequences} answers were asked for, and this server has {places} places for them");
            return Err(ApiError::parameter("n", problem));
        }
        let prompt_tokens = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let (mut work, mut beginnings) = (Vec::with_capacity(sequences), Vec::with_capacity(sequences));
        for prompt in prompts {
            let max_tokens = self.answer_tokens(endpoint, prompt.tokens.len(), generation.max_tokens)?;
            for choice in 0..choices {
                work.push(self.sequence(endpoint, &prompt.tokens, max_tokens, &generation, choice as u64));
                beginnings.push(prompt.beginning.clone());
            }
        }
        let outputs = self.scheduler.submit(work).map_err(|refusal| match refusal {
            Refusal::Full => ApiError::queue_full(self.scheduler.places()),
            Refusal::Stopping => ApiError::stopping(),
        })?;

        let kind = match endpoint {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completions => "cmpl",
        };
        let id = format!("{kind}-{id:016x}");
        let answering = Answering::new(&id, prompt_tokens, sequences, outputs);
        let (model, fingerprint) = (self.name.clone(), self.fingerprint.clone());
        let envelope = Envelope { endpoint, id, created: since_1970().as_secs(), model, fingerprint };
        match generation.stream {
            true => Ok(reply::stream(envelope, beginnings, answering, generation.include_usage)),
            false => reply::whole(&envelope, beginnings, answering).await,
        }
    }

    /// One of the answers to a prompt.
    fn sequence(
        &self,
        endpoint: Endpoint,
        prompt: &[u32],
        max_tokens: usize,
        generation: &Generation,
        choice: u64,
    ) -> Sequence {
        let sampling = Sampling { seed: generation.sampling.seed.wrapping_add(choice), ..generation.sampling };
        let stops = generation.stops.clone();
        let (ends, answer) = match endpoint {
            Endpoint::Chat => (self.template.ends().to_vec(), Answer::new(&self.tokenizer, stops)),
            Endpoint::Completions => (self.tokenizer.stop_tokens(), Answer::continuation(&self.tokenizer, stops)),
        };
        let prompt = prompt.to_vec();
        let request = inference::Request { prompt, max_tokens, sampling, ends, overflow: Overflow::Stop };
        Sequence { request, answer }
    }

    /// How many tokens the answer to a prompt of `prompt` tokens may have.
    fn answer_tokens(&self, endpoint: Endpoint, prompt: usize, asked: Option<usize>) -> Result<usize, ApiError> {
        if let Some(asked) = asked.filter(|asked| *asked > self.max_tokens) {
            let problem = format!("{asked} were asked for, and this server gives at most {}", self.max_tokens);
            return Err(ApiError::parameter("max_tokens", problem));
        }
        let room = self.context.saturating_sub(prompt);
        let answer = asked.unwrap_or(self.max_tokens.min(room)).max(1);
        if answer > room {
            let param = match endpoint {
                Endpoint::Chat => "messages",
                Endpoint::Completions => "prompt",
            };
            return Err(ApiError::context_length(param, self.context, prompt, answer));
        }
        Ok(answer)
    }

    fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked.filter(|asked| *asked != self.name) {
            None => Ok(()),
            Some(other) => Err(ApiError::model(other, &self.name)),
        }
    }

    /// What is told of the model. The last three are not OpenAI's.
    fn model(&self) -> Value {
        json!({
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "lockstep",
            "context_length": self.context,
            "chat_template": self.template.form().name(),
            "trained_for_conversations": self.template.is_learned(),
        })
    }
}
