//! Talking with a model: what `chat` and `serve` share.

pub(crate) mod answer;
pub(crate) mod conversation;
pub(crate) mod line;
pub(crate) mod template;
