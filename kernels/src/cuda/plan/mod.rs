//! Launch plans: which tile, grid and shared memory an operation takes for a shape, and why not another. Pure functions.

pub mod gemm;
pub mod gemv;
