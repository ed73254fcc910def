//! Everything one machine needs to train and sample a model: tokenizers, batches, the Transformer and its losses, flat
//! parameters, the tree sum, the optimizer, checkpoints and generation. It knows no network and no clock.
//!
//! Data flows one way: [`corpus`] or [`dataset`] → [`tokens`], or [`conversation`] → [`packing`], → [`sampler`] → [`batch`] → [`compute`] → [`tree`] → [`optimizer`] →
//! [`checkpoint`] → [`inference`].

pub mod adapters;
pub mod batch;
pub mod bpe;
pub mod bpe_training;
pub mod ceiling;
pub mod chat_template;
pub mod checkpoint;
pub mod comparison;
pub mod compression;
pub mod compute;
pub mod config;
pub mod conversation;
pub mod corpus;
pub mod dataset;
pub mod device;
pub mod digest;
pub mod dropout;
mod gpt;
pub mod hf_tokenizer;
pub mod inference;
pub mod interchange;
pub mod kernels;
pub mod layout;
mod leaves;
pub mod ledger;
mod line;
mod llama;
mod mapping;
mod network;
pub mod number;
pub mod optimizer;
pub mod packing;
pub mod pairs;
mod partial_dir;
pub mod pieces;
pub mod preference;
pub mod probe;
mod projection;
pub mod random;
pub mod sampler;
pub mod schedule;
pub mod scoring;
pub mod shard;
pub mod step_filter;
pub mod tokenizer;
pub mod tokens;
pub mod traffic;
mod transformer;
pub mod tree;
pub mod words;
