//! Checkpoint formats, tokenizer, chat template, forward pass and sampling of one model on one node.
//!
//! The engine does not know that it is distributed: it takes batch plans and returns tokens. Read
//! [`spec::ModelSpec`] for what a model is and [`checkpoint::load`] for where it comes from.

#![deny(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod cost;
pub mod cuda;
pub mod detokenize;
pub mod device;
pub mod engine;
pub mod forward;
pub mod generate;
pub mod grammar;
pub mod kv;
pub mod mapping;
pub mod memory;
pub mod outgoing;
pub mod packed;
pub mod rope;
pub mod sampling;
pub mod spec;
pub mod template;
pub mod tokenizer;
pub mod worker;
