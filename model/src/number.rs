//! Numbers that may be NaN, in JSON, which has no word for it: written as `null`, read back as NaN.

use serde::{Deserialize, Deserializer};

/// Reads a number, or `null` as NaN. (serde_json writes NaN and infinities as `null`.)
///
/// # Errors
/// If the value is something else.
pub fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Numbers to the bit. JSON's decimals do not always come back as they were written, so these are written as the 16
/// hexadecimal digits of their bits: `#[serde(with = "number::bits")]`.
pub mod bits {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    /// Writes numbers as bits.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<'a, S: Serializer>(
        numbers: impl IntoIterator<Item = &'a f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(numbers.into_iter().map(|number| format!("{:016x}", number.to_bits())))
    }

    /// Reads them back.
    ///
    /// # Errors
    /// If a text is not 16 hexadecimal digits, and those of the deserializer.
    pub fn deserialize<'de, D: Deserializer<'de>, C: FromIterator<f64>>(deserializer: D) -> Result<C, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        let number = |text: &String| u64::from_str_radix(text, 16).map(f64::from_bits).map_err(D::Error::custom);
        texts.iter().map(number).collect()
    }
}
