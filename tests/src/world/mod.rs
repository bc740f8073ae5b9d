//! A cluster of machines without shells: virtual time, a network that delays, nodes that die, and KV that is real
//! enough to be wrong.
//!
//! KV is simulated as the tokens that each page stands for, so a block that is shared, evicted, shipped or reused
//! wrongly changes an answer. The next token is a hash of all tokens before it, read back through every layer's
//! pages: the oracle needs no model. The same seed gives the same run.

mod client;
mod kv;
mod node;
mod run;

pub use client::oracle;
pub use run::{Outcome, Scenario, run};
