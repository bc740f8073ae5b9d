//! The prefill node: computes prompts in chunks, ships each layer's finished blocks while the next layer is
//! computed, samples the first token, and holds the KV until the hand-off is settled.
//!
//! [`machine`] decides, [`shell`] does. Read [`machine::PrefillNode`] first.

#![forbid(unsafe_code)]

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;
