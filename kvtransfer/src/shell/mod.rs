//! The QUIC driver around the machines: certificates, endpoint, framed control streams, page streams.
//!
//! One [`Endpoint`] per process carries everything: the node's control connection to the router ([`connect_control`],
//! [`ControlServer`]) and the KV connections between nodes ([`KvClient`], [`KvServer`]). Nothing here decides
//! anything about a transfer: it moves messages and pages, and says exactly once when a peer is gone.
//! Every queue is bounded; a full one closes the connection with a reason, it never blocks the node's loop.

mod buffers;
pub mod ca;
pub mod client;
pub mod control;
pub mod endpoint;
pub mod link;
mod offences;
pub mod pages;
pub mod path;
mod presence;
pub mod process;
pub mod record;
pub mod registry;
pub mod server;
pub mod socket;
#[cfg(test)]
mod tests;
pub mod tls;

pub use ca::{CaError, ClusterCa, NodeCert};
pub use client::{KvClient, KvClientEvent, OutgoingPage};
pub use control::{Control, ControlError, ControlEvent, ControlHandle};
pub use endpoint::{Congestion, ConnectFailure, Endpoint, EndpointError, TransportOptions};
pub use link::{LinkEvent, LinkOptions};
pub use pages::{PageBytes, PageError};
pub use path::Link;
pub use registry::{ConnId, ControlServer, ControlServerEvent, JoinError, connect_control};
pub use server::{KvServer, KvServerEvent};
pub use tls::{NodeTls, PeerError, TlsError};
