//! Everything one machine needs to train and sample a model: tokenizers, batches, the Transformer and its losses, flat
//! parameters, the tree sum, the optimizer, checkpoints and generation. It knows no network and no clock.
//!
//! Data flows one way: [`corpus`] → [`tokenizer`] → [`sampler`] → [`batch`] → [`compute`] → [`tree`] → [`optimizer`] →
//! [`checkpoint`] → [`generate`].

pub mod batch;
pub mod checkpoint;
pub mod compute;
pub mod config;
pub mod corpus;
pub mod device;
pub mod digest;
mod dropout;
pub mod generate;
pub mod layout;
mod line;
pub mod number;
pub mod optimizer;
pub mod probe;
pub mod random;
pub mod sampler;
pub mod schedule;
pub mod tokenizer;
mod transformer;
pub mod tree;
