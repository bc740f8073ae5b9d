//! The prefill node's decisions: admission by free blocks, chunks under a token budget, what is ready to ship, and
//! when blocks may go.
//!
//! Knows no engine, socket or clock; see [`ridge_protocol::Machine`] for how it is driven.

mod config;
mod node;
mod phase;
mod record;
#[cfg(test)]
mod tests;

pub use config::PrefillConfig;
pub use node::{PrefillInput, PrefillNode, PrefillOutput};
