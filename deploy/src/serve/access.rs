//! Who may ask.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST};
use axum::middleware::Next;
use axum::response::Response;
use subtle::ConstantTimeEq as _;

use super::error::ApiError;
use super::service::Service;

/// To whom the server answers.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Access {
    /// To whoever knows this key.
    Key(String),
    /// To this machine: requests name it by an address or as localhost. A web page whose own name was pointed at this
    /// machine (DNS rebinding) does not.
    LocalNames,
    /// To all who reach it.
    Anyone,
}

impl Access {
    /// Whether the API may be used. Keys are compared in a time that depends on their lengths alone.
    fn allows_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Self::Key(key) = self else { return Ok(()) };
        let given = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        match given {
            None => Err(ApiError::unauthorized("the header authorization with the API key is missing: Bearer KEY")),
            Some(given) if given.ct_eq(key.as_bytes()).into() => Ok(()),
            Some(_) => Err(ApiError::unauthorized("the API key is not this server's")),
        }
    }

    /// Whether a request under this name is meant for this server.
    fn allows_host(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(host) = headers.get(HOST).filter(|_| *self == Self::LocalNames) else { return Ok(()) };
        let host = String::from_utf8_lossy(host.as_bytes());
        if is_local_name(&host) { Ok(()) } else { Err(ApiError::foreign_host(&host)) }
    }
}

/// Whether HOST or HOST:PORT is an address or localhost.
fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
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

/// Turns away requests under other names.
pub(crate) async fn by_host(
    State(service): State<Arc<Service>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    service.access.allows_host(request.headers())?;
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_header(name: axum::http::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn the_key_must_be_the_servers() {
        let access = Access::Key("secret".into());
        assert_eq!(access.allows_key(&with_header(AUTHORIZATION, "Bearer secret")), Ok(()));
        for wrong in ["Bearer secrets", "Bearer ", "secret", "Basic secret"] {
            assert!(access.allows_key(&with_header(AUTHORIZATION, wrong)).is_err(), "{wrong}");
        }
        assert!(access.allows_key(&HeaderMap::new()).is_err());
        assert_eq!(Access::LocalNames.allows_key(&HeaderMap::new()), Ok(()));
    }

    #[test]
    fn names_of_others_are_not_this_machine() {
        for host in ["localhost", "LocalHost:8080", "127.0.0.1:80", "[::1]:8080", "[::1]", "192.168.0.7"] {
            assert_eq!(Access::LocalNames.allows_host(&with_header(HOST, host)), Ok(()), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", ""] {
            assert!(Access::LocalNames.allows_host(&with_header(HOST, host)).is_err(), "{host}");
        }
        assert_eq!(Access::Anyone.allows_host(&with_header(HOST, "models.example")), Ok(()));
    }
}
