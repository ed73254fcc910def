//! Texts on their way to tokens: [`inputs`] lists files, [`documents`] reads them piece by piece, [`tokenize`] turns the
//! pieces into tokens on all cores, [`corpus`] does it for a recipe, and [`progress`] shows how far it is. [`conversations`]
//! reads those, [`supervised`] and [`preferences`] make of them what recipes of later stages learn from, and [`lessons`] holds what
//! both share.

pub(crate) mod conversations;
pub(crate) mod corpus;
pub(crate) mod documents;
pub(crate) mod inputs;
pub(crate) mod jsonl;
mod lessons;
mod parquet;
pub(crate) mod preferences;
pub(crate) mod progress;
pub(crate) mod supervised;
pub(crate) mod tokenize;
