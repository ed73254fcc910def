//! Why a recipe is refused, in words that say what, where, and what to write instead.

use std::io;
use std::path::PathBuf;

/// Why there is no recipe.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecipeError {
    /// Neither embedded nor a file.
    #[error("there is no recipe {name:?}{hint}; give the path of a TOML file or an embedded recipe: {embedded}")]
    NoSuchRecipe {
        /// What was asked for.
        name: String,
        /// A name that it may have meant.
        hint: String,
        /// All embedded names.
        embedded: String,
    },
    /// The file cannot be read.
    #[error(
        "{path}: the recipe cannot be read: {problem}; give the path of a TOML file or an embedded recipe: {embedded}",
        path = path.display()
    )]
    Unreadable {
        /// Where.
        path: PathBuf,
        /// What the system says.
        problem: io::Error,
        /// All embedded names.
        embedded: String,
    },
    /// The text is no TOML.
    #[error("recipe {recipe}: {problem}")]
    Syntax {
        /// The recipe's name.
        recipe: String,
        /// Line, column and what was expected there.
        problem: String,
    },
    /// An override that is none.
    #[error("--set {argument}: {problem}; for example --set schedule.steps=100")]
    Override {
        /// As given.
        argument: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A key that no recipe has.
    #[error("recipe {recipe}: {key} = {value}: unknown key{hint}")]
    UnknownKey {
        /// The recipe's name.
        recipe: String,
        /// Dotted.
        key: String,
        /// As TOML.
        value: String,
        /// The nearest key, and those there are.
        hint: String,
    },
    /// A key that the recipe must have.
    #[error("recipe {recipe}: {key} is missing; for example {key} = {example}")]
    Missing {
        /// The recipe's name.
        recipe: String,
        /// Dotted.
        key: &'static str,
        /// A value that would do, as TOML.
        example: String,
    },
    /// A value that cannot be.
    #[error("recipe {recipe}: {key} = {value}: {reason}; for example {example}")]
    Refused {
        /// The recipe's name.
        recipe: String,
        /// Dotted.
        key: String,
        /// As TOML.
        value: String,
        /// Why not.
        reason: String,
        /// An assignment that would do, as TOML.
        example: String,
    },
    /// A key that must stay as it is while a run is resumed.
    #[error(
        "recipe {recipe}: {key} = {requested}: the run to resume was started with {saved}, and this key may not change; \
         leave it as it was, or start a new run in another directory"
    )]
    Changed {
        /// The recipe's name.
        recipe: String,
        /// Dotted.
        key: &'static str,
        /// The run's value, as TOML.
        saved: String,
        /// The value asked for, as TOML.
        requested: String,
    },
}
