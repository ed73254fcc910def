//! Who may ask.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::Response;
use subtle::ConstantTimeEq as _;

use super::service::Service;
use crate::web::access::{Hosts, bearer};
use crate::web::error::ApiError;

/// To whom the server answers.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Access {
    /// To whoever knows this key.
    Key(String),
    /// To this machine.
    LocalNames,
    /// To all who reach it.
    Anyone,
}

impl Access {
    /// Under which names it does.
    pub(crate) fn hosts(&self) -> Hosts {
        match self {
            Self::LocalNames => Hosts::Local,
            Self::Key(_) | Self::Anyone => Hosts::Any,
        }
    }

    /// Whether the API may be used. Keys are compared in a time that depends on their lengths alone.
    fn allows_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Self::Key(key) = self else { return Ok(()) };
        match bearer(headers) {
            None => Err(ApiError::unauthorized("the header authorization with the API key is missing: Bearer KEY")),
            Some(given) if given.ct_eq(key.as_bytes()).into() => Ok(()),
            Some(_) => Err(ApiError::unauthorized("the API key is not this server's")),
        }
    }
}

/// Turns away who has no key.
pub(crate) async fn by_key(
    State(service): State<Arc<Service>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    service.access.allows_key(request.headers())?;
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use axum::http::header::AUTHORIZATION;

    use super::*;

    #[test]
    fn the_key_must_be_the_servers() {
        let bringing = |value: &str| HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())]);
        let access = Access::Key("secret".into());
        assert_eq!(access.allows_key(&bringing("Bearer secret")), Ok(()));
        for wrong in ["Bearer secrets", "Bearer ", "secret", "Basic secret"] {
            assert!(access.allows_key(&bringing(wrong)).is_err(), "{wrong}");
        }
        assert!(access.allows_key(&HeaderMap::new()).is_err());
        assert_eq!(Access::LocalNames.allows_key(&HeaderMap::new()), Ok(()));
    }
}
