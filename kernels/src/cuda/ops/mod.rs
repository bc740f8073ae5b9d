//! Operations on device memory: each checks its shapes, takes a launch from [`super::plan`] and launches it.

pub mod matmul;
