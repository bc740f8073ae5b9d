//! The decode node's decisions: reservation, continuous batching, preemption, local prefill.
//!
//! Knows no engine, socket or clock; see [`ridge_protocol::Machine`] for how it is driven.

mod config;
mod node;
mod phase;
mod record;
mod sequence;
#[cfg(test)]
mod tests;

pub use config::DecodeConfig;
pub use node::{DecodeInput, DecodeNode, DecodeOutput};
