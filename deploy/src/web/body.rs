//! Bodies of requests: JSON, and no more of it than is to be read.

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest as _, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};

use super::error::ApiError;

/// Largest body that is read, in bytes.
const LIMIT_BYTES: usize = 4 << 20;

/// What has a router read no more.
pub(crate) fn limit() -> DefaultBodyLimit {
    DefaultBodyLimit::max(LIMIT_BYTES)
}

/// Reads the body of a request; one that is not to be read is refused before it is sent.
///
/// # Errors
/// If it is not JSON by its header, too large, or ends early.
pub(crate) async fn read(request: Request) -> Result<Bytes, ApiError> {
    check_head(request.headers())?;
    Bytes::from_request(request, &()).await.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(LIMIT_BYTES),
        _ => ApiError::body(format!("the body cannot be read: {rejection}")),
    })
}

/// Refuses a body that is not to be read.
fn check_head(headers: &HeaderMap) -> Result<(), ApiError> {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    // Browsers ask before they send this type across sites, and are not answered: other sites' pages cannot use the API.
    let content_type = header(CONTENT_TYPE).split(';').next().unwrap_or_default().trim();
    if !content_type.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::media_type());
    }
    match header(CONTENT_LENGTH).parse::<usize>() {
        Ok(bytes) if bytes > LIMIT_BYTES => Err(ApiError::too_large(LIMIT_BYTES)),
        _ => Ok(()),
    }
}
