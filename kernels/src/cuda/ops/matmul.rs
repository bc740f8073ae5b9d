//! Products with weights as stored.
//!
//! # Safety
//!
//! of every function here: as in [`super::rows`].

#![allow(clippy::missing_safety_doc, reason = "the module says it once")]

use super::{blocks_of, by_type};
use crate::DType;
use crate::cuda::{Arg, CudaError, Device, Kernel, Launch};

/// A matrix `[n, k]`, row-major, its bytes as stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Weight {
    /// How elements are stored.
    pub dtype: DType,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Where it begins.
    pub address: u64,
}

/// Which kind of kernel computes a product. An output's bits depend on it, and not on the number of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// For few rows: decode steps.
    Skinny,
    /// For many rows: chunks of prompts.
    Gemm,
}

/// What becomes of a product. Addresses of biases are of `[n]` f32, or 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finish {
    /// `y = x·wᵀ + bias`, in type `to`.
    Store {
        /// The bias, or 0.
        bias: u64,
        /// Type of `y`.
        to: DType,
    },
    /// `y = y + x·wᵀ + bias`, in f32.
    Add {
        /// The bias, or 0.
        bias: u64,
    },
}

/// Whether weights stored as `dtype` are multiplied as they are with activations of type `x`.
pub fn supports(dtype: DType, x: DType) -> bool {
    product_name(dtype, x).is_some()
}

/// The product of `x` `[m, k]` in type `x_type` with a matrix.
///
/// # Panics
///
/// If [`supports`] says no.
pub unsafe fn matmul(
    device: &dyn Device,
    _path: Path,
    (x, x_type, m): (u64, DType, usize),
    w: &Weight,
    finish: Finish,
    y: u64,
) -> Result<(), CudaError> {
    const THREADS: usize = 64;
    if m == 0 {
        return Ok(());
    }
    let name = product_name(w.dtype, x_type);
    let name = name.unwrap_or_else(|| panic!("no product of {} with {}", x_type.name(), w.dtype.name()));
    let (bias, add, to) = match finish {
        Finish::Store { bias, to } => (bias, 0, by_type(to, [0, 1, 2])),
        Finish::Add { bias } => (bias, 1, 0),
    };
    let sizes = [Arg::U32(w.n as u32), Arg::U32(w.k as u32)];
    let inputs = [x, w.address, bias].map(Arg::Ptr);
    let args: Vec<Arg> = sizes.into_iter().chain(inputs).chain([Arg::U32(add), Arg::U32(to), Arg::Ptr(y)]).collect();
    let grid = [blocks_of(w.n, THREADS), m as u32, 1];
    let launch = Launch { grid, block: [THREADS as u32, 1, 1], shared_bytes: 0 };
    // SAFETY: passed on.
    unsafe { device.launch(Kernel { source: "product.cu", name }, &launch, &args) }
}

fn product_name(weight: DType, x: DType) -> Option<&'static str> {
    match (x, weight) {
        (DType::F32, DType::F32) => Some("product_f32_f32"),
        (DType::F16, DType::F16) => Some("product_f16_f16"),
        (DType::BF16, DType::BF16) => Some("product_bf16_bf16"),
        (DType::BF16, DType::F16) => Some("product_bf16_f16"),
        (DType::BF16, DType::F32) => Some("product_bf16_f32"),
        _ => None,
    }
}
