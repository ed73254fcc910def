//! The fields of a request, taken one by one: what is left in the end is refused by name rather than passed over.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object under way to its meaning. A field that is `null` is as if it were not there.
#[derive(Debug)]
pub(crate) struct Fields {
    rest: Map<String, Value>,
    /// What stands before each name in errors, for objects in others.
    within: String,
}

impl Fields {
    /// Reads a body.
    ///
    /// # Errors
    /// If it is no JSON object.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(rest)) => Ok(Self { rest, within: String::new() }),
            Ok(_) => Err(ApiError::body("the body is JSON, and no object")),
            Err(error) => Err(ApiError::body(format!("the body is no JSON: {error}"))),
        }
    }

    /// The fields of an object in another one.
    ///
    /// # Errors
    /// If it is none.
    pub(crate) fn of(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(rest) => Ok(Self { rest, within: format!("{path}.") }),
            other => Err(ApiError::parameter(path, format_args!("must be an object, and is {}", shown(&other)))),
        }
    }

    /// A field's full name.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.within)
    }

    /// Any value.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.rest.remove(name).filter(|value| !value.is_null())
    }

    /// A value by `read`, or the error that it is not what was `expected`.
    fn read<T>(
        &mut self,
        name: &str,
        expected: impl Display,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let wrong =
            || ApiError::parameter(self.path(name), format_args!("must be {expected}, and is {}", shown(&value)));
        read(&value).map(Some).ok_or_else(wrong)
    }

    /// A number.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.read(name, expected, |value| value.as_f64().filter(|number| range.contains(number)))
    }

    /// A whole number.
    pub(crate) fn count(&mut self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let expected = match *range.end() {
            usize::MAX => format!("a whole number from {}", range.start()),
            end => format!("a whole number from {} to {end}", range.start()),
        };
        self.read(name, expected, |value| {
            value.as_u64().and_then(|number| usize::try_from(number).ok()).filter(|number| range.contains(number))
        })
    }

    /// A whole number of 64 bits, of either sign.
    pub(crate) fn integer(&mut self, name: &str) -> Result<Option<u64>, ApiError> {
        let bits = |value: &Value| value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        self.read(name, "a whole number of 64 bits", bits)
    }

    /// True or false; false where nothing is said.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.read(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A text.
    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.read(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// Takes a field that may only say what holds anyway.
    ///
    /// # Errors
    /// If it asks for something.
    pub(crate) fn only(&mut self, name: &str, neutral: impl FnOnce(&Value) -> bool, why: &str) -> Result<(), ApiError> {
        match self.value(name) {
            Some(value) if !neutral(&value) => Err(ApiError::unsupported(self.path(name), why)),
            _ => Ok(()),
        }
    }

    /// Refuses what was not taken, unless it is empty.
    ///
    /// # Errors
    /// Names the first such field.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let asks = |value: &Value| match value {
            Value::Null => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
            _ => true,
        };
        match self.rest.iter().find(|(_, value)| asks(value)) {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::unsupported(self.path(name), "this server has no such parameter")),
        }
    }
}

/// A value in an error, cut where it is long.
pub(crate) fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((cut, _)) => format!("{}…", &text[..cut]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    fn message(error: &ApiError) -> String {
        error.to_json()["error"]["message"].as_str().unwrap().into()
    }

    #[test]
    fn fields_are_taken_with_their_type_and_range() {
        let mut fields = fields(&json!({
            "temperature": 2.5, "n": 0, "seed": -1, "stream": null, "model": 7, "max_tokens": 3.5
        }));
        let temperature = fields.number("temperature", 0.0..=2.0).unwrap_err();
        assert_eq!(message(&temperature), "temperature: must be a number from 0 to 2, and is 2.5");
        assert_eq!(temperature.to_json()["error"]["param"], "temperature");
        let n = fields.count("n", 1..=usize::MAX).unwrap_err();
        assert_eq!(message(&n), "n: must be a whole number from 1, and is 0");
        assert!(message(&fields.count("max_tokens", 1..=9).unwrap_err()).ends_with("from 1 to 9, and is 3.5"));
        assert_eq!(fields.integer("seed"), Ok(Some(u64::MAX)));
        assert_eq!(fields.flag("stream"), Ok(false));
        assert!(fields.text("model").is_err());
        assert_eq!(fields.finish(), Ok(()));
    }

    #[test]
    fn what_is_left_is_refused_by_name() {
        let mut left = fields(&json!({ "a": null, "b": [], "c": {}, "echo": false }));
        assert_eq!(left.only("d", |_| false, "never"), Ok(()));
        let error = left.finish().unwrap_err();
        assert_eq!(error.to_json()["error"]["param"], "echo");
        assert_eq!(error.to_json()["error"]["code"], "unsupported_parameter");
        let mut inner = Fields::of(json!({ "x": 1 }), "messages[0]").unwrap();
        assert_eq!(message(&inner.only("x", |_| false, "not here").unwrap_err()), "messages[0].x: not here");
    }

    #[test]
    fn other_bodies_are_refused_in_words() {
        assert_eq!(message(&Fields::parse(b"[]").unwrap_err()), "the body is JSON, and no object");
        assert!(message(&Fields::parse(b"{\"a\":").unwrap_err()).contains("line 1 column 5"));
        assert!(message(&Fields::of(json!("x".repeat(99)), "m").unwrap_err()).ends_with('…'));
    }
}
