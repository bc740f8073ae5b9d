//! The decode node: reserves blocks for a sequence, takes its KV, joins it to the running batch and streams its
//! tokens; preempts when blocks run out; computes prompts itself where the hand-off failed or was never wanted.
//!
//! [`machine`] decides, [`shell`] does. Read [`machine::DecodeNode`] first.

#![forbid(unsafe_code)]

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;
