//! Numbers that may be NaN, in JSON, which has no word for it: written as `null`, read back as NaN.

use serde::{Deserialize, Deserializer};

/// Reads a number, or `null` as NaN. (serde_json writes NaN and infinities as `null`.)
///
/// # Errors
/// If the value is something else.
pub fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
