//! Lock-free and blocking pieces that kernels and the KV pool need, each small enough for loom to explore.
//!
//! Run the models with `RUSTFLAGS="--cfg loom" cargo test -p ridge-kernels --release loom_`.

mod claims;
pub(crate) mod gate;
pub mod page_lock;
#[cfg(not(loom))]
pub mod pool;
mod primitive;
