//! The KV hand-off between a prefill node and a decode node.
//!
//! Two session machines, [`Sender`] and [`Receiver`], hold the conversation: offer, grant, credit, pages, finish,
//! commit, abort. They know block numbers and page coordinates, never bytes, sockets or clocks. Behind the feature
//! `shell` stands the QUIC driver that carries messages and pages between processes, and the cluster CA that says
//! who may take part. This crate knows nothing of schedulers, models or memory: a node's shell looks up the bytes.
//!
//! Read [`machine`] first; `shell` after it.

#![forbid(unsafe_code)]

pub mod machine;
#[cfg(feature = "shell")]
pub mod shell;

pub use machine::{
    Receiver, ReceiverConfig, ReceiverInput, ReceiverOutput, Sender, SenderConfig, SenderInput, SenderOutput,
    TransferStats,
};
