//! Whole clusters of the production machines, without their shells, under virtual time: a network that delays and breaks,
//! nodes that die and stall, and KV that is real enough to be wrong.
//!
//! This is the other shell around the machines of the roles. It knows no model, socket, thread or clock, and everything
//! that chance decides follows from one seed: the same seed gives the same run. Read [`Scenario`] (what is simulated),
//! then `run` (what happens), `network` (what connections do) and `chaos` (what strikes).

#![forbid(unsafe_code)]

mod chaos;
mod client;
mod kv;
mod network;
mod node;
mod observer;
mod random;
mod run;
mod scenario;
mod sum;
mod trace;

pub use random::Random;
pub use run::{Failure, Outcome, run, try_run};
pub use scenario::{Faults, Sabotage, Scenario};
pub use sum::Sum;
