//! Those who judge, and the secrets by which they are known.

use std::collections::BTreeSet;

use axum::http::HeaderMap;
use subtle::{Choice, ConstantTimeEq as _};

use crate::web::access::bearer;
use crate::web::error::ApiError;

/// Whoever judges where nobody is named.
pub(crate) const ANYBODY: &str = "rater";

/// Somebody who judges.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Rater {
    pub(crate) name: String,
    /// What shows that it is them.
    pub(crate) token: String,
}

/// Who judges.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Raters {
    /// Whoever reaches the server, as one.
    Anybody,
    /// These, at least one.
    Named(Vec<Rater>),
}

impl Raters {
    /// Reads lines or arguments of the form NAME=TOKEN; blank lines and those that begin with # are passed over.
    ///
    /// # Errors
    /// Says which is none, or which name or token stands there twice.
    pub(crate) fn parse<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let mut raters = Vec::new();
        let (mut names, mut tokens) = (BTreeSet::new(), BTreeSet::new());
        for text in texts.map(str::trim).filter(|text| !text.is_empty() && !text.starts_with('#')) {
            let parts = text.rsplit_once('=').map(|(name, token)| (name.trim(), token.trim()));
            let (name, token) = parts
                .filter(|(name, _)| !name.is_empty())
                .ok_or_else(|| format!("{text:?} is no NAME=TOKEN; for example ann=$(openssl rand -hex 16)"))?;
            if name.chars().any(char::is_control) {
                return Err(format!("{name:?}: a name is a line of text"));
            }
            if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)) {
                return Err(format!(
                    "the token of {name:?} must be ASCII letters, digits, and any of -._~, so that it can stand in a link; for \
                     example the output of `openssl rand -hex 16`"
                ));
            }
            if !names.insert(name.to_owned()) {
                return Err(format!("{name:?} is named twice"));
            }
            if !tokens.insert(token.to_owned()) {
                return Err(format!("{name:?} has the token of another"));
            }
            raters.push(Rater { name: name.into(), token: token.into() });
        }
        Ok(if raters.is_empty() { Self::Anybody } else { Self::Named(raters) })
    }

    /// Their names.
    pub(crate) fn names(&self) -> Vec<String> {
        match self {
            Self::Anybody => vec![ANYBODY.into()],
            Self::Named(raters) => raters.iter().map(|rater| rater.name.clone()).collect(),
        }
    }

    /// Whose request this is. Tokens are compared in a time that depends on their lengths alone.
    ///
    /// # Errors
    /// If it is nobody's.
    pub(crate) fn recognise(&self, headers: &HeaderMap) -> Result<&str, ApiError> {
        let Self::Named(raters) = self else { return Ok(ANYBODY) };
        let Some(given) = bearer(headers) else {
            return Err(ApiError::unauthorized(
                "the header authorization with a rater's token is missing: Bearer TOKEN",
            ));
        };
        let mut found = None;
        for rater in raters {
            let is_theirs: Choice = given.ct_eq(rater.token.as_bytes());
            found = if is_theirs.into() { Some(rater) } else { found };
        }
        let unknown = || ApiError::unauthorized("the token is none of a rater here; ask for a link of your own");
        found.map(|rater| &*rater.name).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::header::AUTHORIZATION;

    use super::*;

    #[test]
    fn raters_are_known_by_their_tokens() {
        let raters = Raters::parse("# those who judge\n\nann = s3same\n安=Open-._~\n".lines())
            .unwrap_or_else(|said| panic!("{said}"));
        assert_eq!(raters.names(), ["ann", "安"]);
        let bringing = |value: &str| HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())]);
        assert_eq!(raters.recognise(&bringing("Bearer s3same")), Ok("ann"));
        assert_eq!(raters.recognise(&bringing("Bearer Open-._~")), Ok("安"));
        for wrong in ["Bearer s3sam", "Bearer ", "s3same"] {
            assert!(raters.recognise(&bringing(wrong)).is_err(), "{wrong}");
        }
        assert!(raters.recognise(&HeaderMap::new()).is_err());
        assert_eq!(Raters::Anybody.recognise(&HeaderMap::new()), Ok("rater"));
        assert!(Raters::parse("\n# nobody\n".lines()) == Ok(Raters::Anybody));
    }

    #[test]
    fn who_cannot_be_told_apart_is_refused() {
        for (lines, problem) in [
            ("ann", "\"ann\" is no NAME=TOKEN"),
            ("=secret", "is no NAME=TOKEN"),
            ("ann=", "the token of \"ann\" must be"),
            ("ann=a&b", "the token of \"ann\" must be"),
            ("ann=a\nann=b", "\"ann\" is named twice"),
            ("ann=a\nbob=a", "\"bob\" has the token of another"),
        ] {
            let said = Raters::parse(lines.lines()).err().unwrap_or_default();
            assert!(said.contains(problem), "{said}");
        }
    }
}
