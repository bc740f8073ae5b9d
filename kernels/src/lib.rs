//! Numerics of Ridge: weights' storage types, the scalar reference of every operation, vectorised CPU kernels chosen at run
//! time, and the thread pool they run on. Knows nothing of models, sequences or blocks, and imports no workspace crate.
//!
//! Read first: [`Cpu`], the entry point of the engine; [`Matrix`], a weight as stored; [`KvFormat`], a page of keys and values.
//!
//! **Batch invariance.** For a given [`Isa`], the result of a row of a matrix product, or of a query of an attention, does
//! not depend on the other rows of the call, on the number of threads, on how a prompt was cut into chunks, nor on the page size:
//! each output is reduced in one fixed order. Speculation, preemption, failover and prefix caching all lean on this.
//!
//! This is the only crate with unsafe numerics: register tiles need intrinsics and raw pointers. The cost of losing them is
//! large (more than tenfold in a loop whose intrinsics were not inlined); `cargo bench -p ridge-kernels` prints what they reach.

#![allow(
    clippy::needless_range_loop,
    reason = "an index names the same place in several arrays: registers, blocks, rows"
)]

#[cfg(not(loom))]
mod cpu;
#[cfg(not(loom))]
pub mod cuda;
mod dtype;
mod kv;
mod lock_file;
#[cfg(not(loom))]
pub mod machine;
#[cfg(not(loom))]
mod packed;
pub mod quant;
pub mod reference;
pub mod sync;
#[cfg(all(test, not(loom)))]
mod testing;

#[cfg(not(loom))]
pub use cpu::{
    Cpu, convert_kv,
    digest::{CopyTo, DigestedCopy},
    dispatch::Isa,
    generic::matmul::{Finish, Gate},
    operand::{Operand, Rows},
};
pub use dtype::{DType, Matrix, ShapeError};
pub use kv::{AttentionItem, KvDtype, KvFormat, KvMove, KvWrite, e4m3_to_f32, f32_to_e4m3};
pub use lock_file::lock_file;
#[cfg(not(loom))]
pub use packed::Packed;
pub use quant::{QuantizeError, dequantize_row, e2m1_to_f32, quantize_row};
