//! The one place that chooses between std's primitives and loom's.

#[cfg(not(loom))]
#[allow(unused_imports, reason = "under loom the pool and its imports are left out")]
pub(super) use std::{
    hint::spin_loop,
    sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    sync::{Condvar, Mutex, MutexGuard},
};

#[cfg(loom)]
#[allow(unused_imports, reason = "under loom the pool and its imports are left out")]
pub(super) use loom::{
    hint::spin_loop,
    sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    sync::{Condvar, Mutex, MutexGuard},
};
