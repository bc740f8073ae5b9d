//! The CUDA back end: a device's memory, launches of the kernels in `kernels/cuda/`, and plans for them.
//!
//! Read first: [`device`], the interface; then [`emulated`], which runs the very same `.cu` sources on the CPU, so that a
//! wrong index or a missing barrier shows on any machine that has a C++ compiler; and [`driver`], the real device. Nothing
//! here knows models, sequences or block tables.
//!
//! ```text
//! planes    how quantised matrices lie on a device                       (no device)
//! plan      pure launch plans: shapes in, tiles and grids out            (no device)
//! reference the kernels' algorithms, walking the same tiles              (no device)
//! ops       one safe function per operation: checks, plan, launch        (any device)
//! device    memory, copies, launches: driver::Driver or emulated::Emulated
//! source    the .cu texts            compile   NVRTC, and its cache of cubins
//! ```

pub mod check;
pub mod compile;
pub mod device;
pub mod driver;
pub mod emulated;
pub mod nvml;
pub mod ops;
pub mod plan;
pub mod planes;
pub mod reference;
pub mod selftest;
pub mod source;

pub use device::{
    Arg, Buffer, CudaError, Device, Element, Fetch, Graph, Kernel, Launch, Pinned, Plain, Properties, TensorMap,
};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Nothing behind the locks of this module is left half changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
