//! KV blocks as numbers: which are free, who refers to which, and which hold a prefix that can be reused.
//!
//! This crate never sees a byte of KV. A [`BlockPool`] hands out [`BlockId`](ridge_protocol::BlockId)s with
//! reference counts by [`Claim`]; full blocks can be published under their chain hash ([`HashChain`]) and are then found by
//! [`BlockPool::match_prefix`], also after their last owner let go, until the space is needed.
//!
//! Read [`BlockPool`] first.

#![forbid(unsafe_code)]

mod chain;
mod pool;

pub use chain::{HashChain, hash_blocks};
pub use pool::{BlockPool, CacheChange, Claim, Lease, OutOfBlocks};
