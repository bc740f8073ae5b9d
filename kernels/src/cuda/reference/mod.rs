//! The kernels' algorithms in plain Rust, walking the same tiles in the same order: what a kernel does, without its threads.
//! Tested against the oracle ([`crate::reference`]); the kernels are tested against both.

mod attention;
mod matmul;

pub use attention::{decode, prefill};
pub use matmul::{DEPTH_8, DEPTH_16, Groups, gemm, skinny};
