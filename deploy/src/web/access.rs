//! Under which names a server answers, and the secret that a request brings.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST};
use axum::middleware::Next;
use axum::response::Response;

use super::error::ApiError;

/// Which names of hosts are taken for this server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hosts {
    /// Addresses and localhost. A web page whose own name was pointed at this machine (DNS rebinding) has another.
    Local,
    /// All.
    Any,
}

impl Hosts {
    /// Whether a request under this name is meant for this server.
    fn allows(self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(host) = headers.get(HOST).filter(|_| self == Self::Local) else { return Ok(()) };
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

/// Turns away requests under other names.
pub(crate) async fn by_host(State(hosts): State<Hosts>, request: Request, next: Next) -> Result<Response, ApiError> {
    hosts.allows(request.headers())?;
    Ok(next.run(request).await)
}

/// What a request brings to be let in: `Authorization: Bearer SECRET`.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_others_are_not_this_machine() {
        let named = |host: &str| HeaderMap::from_iter([(HOST, host.parse().unwrap())]);
        for host in ["localhost", "LocalHost:8080", "127.0.0.1:80", "[::1]:8080", "[::1]", "192.168.0.7"] {
            assert_eq!(Hosts::Local.allows(&named(host)), Ok(()), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", ""] {
            assert!(Hosts::Local.allows(&named(host)).is_err(), "{host}");
        }
        assert_eq!(Hosts::Any.allows(&named("models.example")), Ok(()));
    }
}
