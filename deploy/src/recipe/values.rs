//! The values of a recipe by key: from a file and overrides to one complete set, and back to text.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use toml::Value;

use super::error::RecipeError;
use super::keys::{self, KEYS, Key, Kinds, parse_value};

/// Keys of a model that its parameters do not depend on, so that they may be given where all others come from `init`.
const FREE_OF_INIT: [&str; 2] = ["model.dropout", "model.context"];

/// A recipe's values, of the right keys but not yet checked themselves.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Values {
    /// The recipe's name, for messages.
    recipe: String,
    by_path: BTreeMap<String, Value>,
}

impl Values {
    /// The values of the TOML text, changed by overrides of the form `key=value`, defaults filled in. `name` is the
    /// recipe's name unless it gives itself one.
    ///
    /// Keys of the text that an override leaves without a reader are dropped: with `optimizer.kind=sgd`, AdamW's.
    pub(super) fn complete(name: &str, text: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        let file = Self { recipe: name.into(), by_path: flatten(name, text)? };
        let overridden: BTreeMap<String, Value> =
            overrides.iter().map(|set| parse_override(set)).collect::<Result<_, _>>()?;
        let mut values = file.clone();
        values.by_path.extend(overridden.clone());
        let own_name = values.by_path.entry("name".into()).or_insert_with(|| Value::String(name.into()));
        if let Value::String(own_name) = own_name {
            values.recipe.clone_from(own_name);
        }

        let unknown = values.by_path.iter().find(|(path, _)| Key::find(path).is_none());
        if let Some((path, value)) = unknown {
            return Err(RecipeError::UnknownKey {
                recipe: values.recipe.clone(),
                key: path.clone(),
                value: in_toml(value),
                hint: keys::hint(path),
            });
        }
        let (kinds, kinds_of_file) = (values.kinds()?, file.kinds().ok());
        for key in KEYS {
            if key.reader.includes(kinds) {
                let value = values.value(key)?;
                values.by_path.insert(key.path.into(), value);
            } else if let Some(value) = values.by_path.remove(key.path) {
                let was_read = kinds_of_file.is_some_and(|kinds| key.reader.includes(kinds));
                if overridden.contains_key(key.path) || !was_read {
                    return Err(values.refused_unread(key, &value));
                }
            }
        }
        Ok(values)
    }

    /// `init`, where it is given and no size of the model is.
    ///
    /// # Errors
    /// If neither is given for conversations or preferences to be learned.
    pub(super) fn init_of_unnamed_model(
        name: &str,
        text: &str,
        overrides: &[String],
    ) -> Result<Option<PathBuf>, RecipeError> {
        let mut by_path = flatten(name, text)?;
        by_path.extend(overrides.iter().map(|set| parse_override(set)).collect::<Result<Vec<_>, _>>()?);
        let is_size = |path: &&String| path.starts_with("model.") && !FREE_OF_INIT.contains(&path.as_str());
        let init = by_path.get("init").and_then(Value::as_str).filter(|init| !init.is_empty());
        let named = by_path.keys().any(|path| is_size(&path));
        let stage = by_path.get("stage").and_then(Value::as_str);
        if !named && init.is_none() && stage.is_some_and(|stage| ["sft", "reward", "dpo"].contains(&stage)) {
            let nothing = Self { recipe: name.into(), by_path: BTreeMap::new() };
            let reason = "the recipe has no [model] either, so that nothing says which model is to learn";
            return Err(nothing.refuse_for("init", reason, "init = \"runs/quickstart-1\""));
        }
        Ok(init.filter(|_| !named).map(PathBuf::from))
    }

    /// The value of a key that the recipe reads.
    pub(super) fn find(&self, path: &str) -> Option<&Value> {
        self.by_path.get(path)
    }

    /// The kinds, which decide what else is read.
    pub(super) fn kinds(&self) -> Result<Kinds, RecipeError> {
        Ok(Kinds {
            stage: self.choice("stage")?,
            model: self.choice("model.kind")?,
            adapted: self.read("adapters.rank")?.as_integer().is_some_and(|rank| rank > 0),
            tokenizer: self.choice("tokenizer.kind")?,
            optimizer: self.choice("optimizer.kind")?,
            decay: self.choice("schedule.decay")?,
            local: self.read("batch.local_steps")?.as_integer().is_some_and(|steps| steps > 0),
        })
    }

    /// A whole number within `range`.
    pub(super) fn integer<T: TryFrom<i64>>(&self, path: &str, range: RangeInclusive<i64>) -> Result<T, RecipeError> {
        let value = self.read(path)?.as_integer().filter(|number| range.contains(number));
        value.and_then(|number| T::try_from(number).ok()).ok_or_else(|| {
            let (least, most) = (range.start(), range.end());
            let bounds = match *most {
                i64::MAX => format!("of at least {least}"),
                most => format!("from {least} to {most}"),
            };
            self.refuse(path, format!("must be a whole number {bounds}"))
        })
    }

    /// A finite number that is `allowed`, which `words` describe.
    pub(super) fn number(&self, path: &str, words: &str, allowed: impl Fn(f64) -> bool) -> Result<f64, RecipeError> {
        let number = self.read(path)?.as_float().filter(|&number| number.is_finite() && allowed(number));
        number.ok_or_else(|| self.refuse(path, format!("must be a number {words}")))
    }

    /// Yes or no.
    pub(super) fn boolean(&self, path: &str) -> Result<bool, RecipeError> {
        self.read(path)?.as_bool().ok_or_else(|| self.refuse(path, "must be true or false"))
    }

    /// A text that is not empty.
    pub(super) fn text(&self, path: &str) -> Result<String, RecipeError> {
        let value = self.read(path)?;
        let text = value.as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned).ok_or_else(|| self.refuse(path, "must be a text in quotes, and not an empty one"))
    }

    /// A text, which may be empty.
    pub(super) fn text_or_none(&self, path: &str) -> Result<Option<String>, RecipeError> {
        let value = self.read(path)?;
        let text = value
            .as_str()
            .ok_or_else(|| self.refuse_for(path, "must be a text in quotes", format!("{path} = \"\"")))?;
        Ok((!text.is_empty()).then(|| text.to_owned()))
    }

    /// One text, or a list of at least one, none of them empty.
    pub(super) fn text_or_texts(&self, path: &str) -> Result<Vec<String>, RecipeError> {
        if !self.read(path)?.is_array() {
            return Ok(vec![self.text(path)?]);
        }
        let texts = self.texts(path)?;
        if texts.is_empty() { Err(self.refuse(path, "must name at least one input")) } else { Ok(texts) }
    }

    /// Positive numbers.
    pub(super) fn positive_numbers(&self, path: &str) -> Result<Vec<f64>, RecipeError> {
        let number = |value: &Value| value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64));
        let positive = |value: &Value| number(value).filter(|number| number.is_finite() && *number > 0.0);
        let numbers = self.read(path)?.as_array().and_then(|values| values.iter().map(positive).collect());
        numbers.ok_or_else(|| self.refuse(path, "must be a list of numbers above 0"))
    }

    /// Texts, none of them empty.
    pub(super) fn texts(&self, path: &str) -> Result<Vec<String>, RecipeError> {
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let value = self.read(path)?;
        let texts = value.as_array().and_then(|texts| texts.iter().map(text).collect());
        texts.ok_or_else(|| self.refuse(path, "must be a list of texts in quotes, none of them empty"))
    }

    /// One of the words that `T` knows.
    pub(super) fn choice<T: DeserializeOwned>(&self, path: &str) -> Result<T, RecipeError> {
        let word = self.read(path)?.as_str().unwrap_or_default().to_owned();
        Value::String(word).try_into().map_err(|error: toml::de::Error| {
            // "unknown variant `x`, expected `a` or `b`"
            let words = error.message().split_once("expected ").map_or(error.message(), |(_, words)| words);
            self.refuse(path, format!("must be {words}"))
        })
    }

    /// Says why a value cannot be, with the table's example of a better one.
    pub(super) fn refuse(&self, path: &str, reason: impl Display) -> RecipeError {
        self.refuse_for(path, reason, format!("{path} = {}", in_toml(&known(path).example())))
    }

    /// Says why a value cannot be, with an assignment that would do.
    pub(super) fn refuse_for(&self, path: &str, reason: impl Display, example: impl Display) -> RecipeError {
        RecipeError::Refused {
            recipe: self.recipe.clone(),
            key: path.into(),
            value: self.read(path).map_or_else(|_| "(missing)".into(), |value| in_toml(&value)),
            reason: reason.to_string(),
            example: example.to_string(),
        }
    }

    /// Says that a key has no meaning beside the others.
    fn refused_unread(&self, key: &Key, value: &Value) -> RecipeError {
        RecipeError::Refused {
            recipe: self.recipe.clone(),
            key: key.path.into(),
            value: in_toml(value),
            reason: "nothing reads this key beside the others; leave it out, or change the kind".into(),
            example: key.reader.condition().into(),
        }
    }

    /// The value of `path`, or what stands in for it.
    fn read(&self, path: &str) -> Result<Value, RecipeError> {
        self.value(known(path))
    }

    /// The value of `key`, or what stands in for it. Where the table has a float, whole numbers become floats.
    fn value(&self, key: &'static Key) -> Result<Value, RecipeError> {
        match (self.by_path.get(key.path), key.default()) {
            (Some(Value::Integer(whole)), _) if key.example().is_float() => Ok(Value::Float(*whole as f64)),
            (Some(value), _) => Ok(value.clone()),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(RecipeError::Missing {
                recipe: self.recipe.clone(),
                key: key.path,
                example: in_toml(&key.example()),
            }),
        }
    }

    /// The recipe as TOML text, every key that it reads included.
    pub(super) fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for (key, value) in KEYS.iter().filter_map(|key| Some((key, self.by_path.get(key.path)?))) {
            if key.section() != section {
                section = key.section();
                text.push_str(&format!("\n[{section}]\n"));
            }
            text.push_str(&format!("{} = {}\n", key.leaf(), in_toml(value)));
        }
        text
    }
}

/// The key of a path that the program reads.
fn known(path: &str) -> &'static Key {
    Key::find(path).expect("the program reads only keys of the table")
}

/// A value as TOML, on one line.
pub(super) fn in_toml(value: &Value) -> String {
    match value {
        // JSON's escapes are TOML's, but for the one control character that JSON lets stand.
        Value::String(text) => serde_json::Value::from(text.as_str()).to_string().replace('\u{7f}', "\\u007f"),
        Value::Array(values) => format!("[{}]", values.iter().map(in_toml).collect::<Vec<_>>().join(", ")),
        Value::Float(number) if number.is_finite() => format!("{number:?}"),
        other => other.to_string(),
    }
}

/// The values of a TOML text by dotted path. What nests deeper than a section stays as it is.
fn flatten(recipe: &str, text: &str) -> Result<BTreeMap<String, Value>, RecipeError> {
    let syntax = |error: toml::de::Error| {
        let problem = error.to_string().trim_end().to_owned();
        RecipeError::Syntax { recipe: recipe.into(), problem }
    };
    let mut values = BTreeMap::new();
    for (name, value) in text.parse::<toml::Table>().map_err(syntax)? {
        match value {
            Value::Table(section) if !section.is_empty() || keys::is_section(&name) => {
                values.extend(section.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)));
            }
            value => {
                values.insert(name, value);
            }
        }
    }
    Ok(values)
}

/// Path and value of `key=value`. What is no TOML value is taken as a text, so that quotes are seldom needed.
fn parse_override(argument: &str) -> Result<(String, Value), RecipeError> {
    let refused = |problem| RecipeError::Override { argument: argument.into(), problem };
    let (path, value) = argument.split_once('=').ok_or_else(|| refused("must have the form KEY=VALUE"))?;
    let (path, value) = (path.trim(), value.trim());
    if path.is_empty() {
        return Err(refused("has no key before the ="));
    }
    Ok((path.into(), parse_value(value).unwrap_or_else(|| Value::String(value.into()))))
}
