//! The router: admits requests, places each on a prefill and a decode node, and stitches what they say into one
//! stream without a gap or a duplicate.
//!
//! [`machine`] decides, [`shell`] does: the OpenAI-compatible HTTP server, and the QUIC connections of the nodes.
//! Read [`machine::Router`] first.

#![forbid(unsafe_code)]

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;
