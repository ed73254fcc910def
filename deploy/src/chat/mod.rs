//! Talking with a model: what `chat` and `serve` share, and how a model learns it.

pub(crate) mod answer;
pub(crate) mod conversation;
pub(crate) mod learned;
pub(crate) mod line;
pub(crate) mod template;
