//! What is answered to a request that cannot be served, in OpenAI's form.

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

const INVALID_REQUEST: &str = "invalid_request_error";
const RETRY_AFTER_SECS: &str = "1";

/// A refusal: `{"error":{"message","type","param","code"}}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    kind: &'static str,
    /// The parameter at fault.
    param: Option<String>,
    /// For programs.
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code }
    }

    /// A parameter that cannot be what it is.
    pub(crate) fn parameter(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param}: {problem}");
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, None, message) }
    }

    /// A parameter that this server does not have.
    pub(crate) fn unsupported(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::parameter(param, problem) }
    }

    /// A body that is no request.
    pub(crate) fn body(problem: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, None, problem)
    }

    /// A body in another format.
    pub(crate) fn media_type() -> Self {
        let message = "the body must be JSON, and the header content-type say so: application/json";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID_REQUEST, None, message)
    }

    /// A body beyond what is read.
    pub(crate) fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the body is larger than {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID_REQUEST, None, message)
    }

    /// A prompt, or prompt and answer, beyond the model's context.
    pub(crate) fn context_length(param: &str, context: usize, prompt: usize, answer: usize) -> Self {
        let message = format!(
            "the model's context is {context} tokens, and {} were asked for: {prompt} of {param} and {answer} of the answer; \
             shorten either",
            prompt + answer
        );
        let error = Self::new(StatusCode::BAD_REQUEST, INVALID_REQUEST, Some("context_length_exceeded"), message);
        Self { param: Some(param.into()), ..error }
    }

    /// No key, or a wrong one.
    pub(crate) fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID_REQUEST, Some("invalid_api_key"), message)
    }

    /// A request under a name that is not this server's.
    pub(crate) fn foreign_host(host: &str) -> Self {
        let message = format!(
            "the request is for the host {host:?}, and a server that asks for no key answers to localhost and to addresses \
             alone, lest web pages reach it by a name of theirs; start it with keys, or with --insecure"
        );
        Self::new(StatusCode::FORBIDDEN, INVALID_REQUEST, Some("host_not_allowed"), message)
    }

    /// Another model than the one that is here.
    pub(crate) fn model(asked: &str, here: &str) -> Self {
        let message = format!("the model {asked:?} is not here; this server has {here:?}");
        let error = Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, Some("model_not_found"), message);
        Self { param: Some("model".into()), ..error }
    }

    /// Nothing is there, but at `paths`.
    pub(crate) fn route(method: &str, path: &str, paths: &str) -> Self {
        let message = format!("there is no {method} {path}; see {paths}");
        Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, Some("unknown_url"), message)
    }

    /// Something is there, for another method.
    pub(crate) fn method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID_REQUEST, Some("method_not_allowed"), message)
    }

    /// No place is free.
    pub(crate) fn queue_full(places: usize) -> Self {
        let message = format!("all {places} places are taken, running and waiting; try again in {RETRY_AFTER_SECS} s");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
    }

    /// The server ends.
    pub(crate) fn stopping() -> Self {
        let message = "the server is stopping, and takes no more requests";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("server_stopping"), message)
    }

    /// What was asked for does not fit what is.
    pub(crate) fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, INVALID_REQUEST, Some(code), message)
    }

    /// Something by a name that nothing has.
    pub(crate) fn unknown(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID_REQUEST, Some(code), message)
    }

    /// A fault of ours.
    pub(crate) fn internal(problem: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, problem)
    }

    /// The body.
    pub(crate) fn to_json(&self) -> Value {
        let Self { message, kind, param, code, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECS));
            }
            _ => {}
        }
        response
    }
}
