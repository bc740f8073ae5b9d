//! The process around the router's machine: QUIC to the nodes, HTTP to the clients, one loop over one closed set
//! of events.

pub mod gateway;
pub mod http;
mod probe;
mod process;
mod served;

pub use process::{RouterOptions, RouterRunError, run};
pub use served::Served;
