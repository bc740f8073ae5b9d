//! The router's decisions: admission, placement by load and prefix overlap, re-dispatch, stream stitching.
//!
//! Knows no HTTP, socket, tokenizer or clock; see [`ridge_protocol::Machine`] for how it is driven.

mod dispatch;
mod node;
mod placement;
mod record;
mod router;
mod sequence;
#[cfg(test)]
mod tests;
mod types;

pub use router::Router;
pub use types::{
    ClientId, ModelDigests, NodeView, ReplyEvent, RouterConfig, RouterError, RouterInput, RouterOutput, RouterStats,
    Submit, Usage,
};
