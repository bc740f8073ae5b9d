//! What is done to each row of activations: norms, rotation, gates, sums, embeddings (`rows.cu`).
//!
//! Rows are f32; results are in the compute type where a matrix product or attention reads them next. A row's bits depend on
//! that row alone.
//!
//! # Safety
//!
//! of every function here: each address leads to memory of `device` of the shape and type that is named, and what is written
//! overlaps nothing else that the call reads, unless the function says so. The work is done in the order of the calls.

#![allow(clippy::missing_safety_doc, reason = "the module says it once")]
#![allow(clippy::too_many_arguments, reason = "an operation of the model has these operands")]

use super::{assert_aligned, blocks_of, by_type};
use crate::DType;
use crate::cuda::{Arg, CudaError, Device, Kernel, Launch};

const SOURCE: &str = "rows.cu";
/// Threads of a block that goes along one row, or along a whole array.
const THREADS: u32 = 256;
/// Heads that a block rotates, a warp each.
const HEADS: u32 = 8;
/// Most blocks that go along a whole array; each thread then takes several elements.
const BLOCKS_MAX: usize = 4096;

/// `out[row] = x[row] / rms(x[row]) * weight`, `x` `[rows, width]` and `weight` `[width]` in f32, `out` in type `to`.
pub unsafe fn rms_norm(
    device: &dyn Device,
    (rows, width): (usize, usize),
    eps: f32,
    x: u64,
    weight: u64,
    to: DType,
    out: u64,
) -> Result<(), CudaError> {
    let name = by_type(to, ["rms_norm_f32", "rms_norm_f16", "rms_norm_bf16"]);
    let args = [Arg::U32(width as u32), Arg::F32(eps), Arg::Ptr(x), Arg::Ptr(weight), Arg::Ptr(out)];
    // SAFETY: passed on; a block per row.
    unsafe { per_row(device, Kernel { source: SOURCE, name }, rows, THREADS / 32 * 4, &args) }
}

/// The heads of some rows, and how they are rotated.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rotated pairs `(i, i + pairs)`; 0 rotates nothing.
    pub pairs: usize,
    /// Added to the mean square where heads are normed.
    pub eps: f32,
}

/// Norms each head of `x` `[rows, heads, head_dim]` (if `weight` `[head_dim]` is not 0), rotates it by the angles of its row, `cos`
/// and `sin` `[rows, pairs]`, and writes it in type `to`. In f32 `out` may be `x`.
pub unsafe fn rotate_heads(
    device: &dyn Device,
    shape: &Heads,
    x: u64,
    weight: u64,
    (cos, sin): (u64, u64),
    to: DType,
    out: u64,
) -> Result<(), CudaError> {
    assert!(2 * shape.pairs <= shape.head_dim, "{shape:?}");
    let heads = shape.rows * shape.heads;
    if heads == 0 {
        return Ok(());
    }
    let name = by_type(to, ["rotate_heads_f32", "rotate_heads_f16", "rotate_heads_bf16"]);
    let sizes = [shape.rows, shape.heads, shape.head_dim, shape.pairs].map(|n| Arg::U32(n as u32));
    let addresses = [x, weight, cos, sin, out].map(Arg::Ptr);
    let args: Vec<Arg> = sizes.into_iter().chain([Arg::F32(shape.eps)]).chain(addresses).collect();
    let grid = [blocks_of(heads, HEADS as usize), 1, 1];
    // SAFETY: passed on; a warp per head.
    unsafe {
        device.launch(
            Kernel { source: SOURCE, name },
            &Launch { grid, block: [32 * HEADS, 1, 1], shared_bytes: 0 },
            &args,
        )
    }
}

/// `out[i] = silu(gate[i]) * up[i]` for `n` elements in f32, `out` in type `to`. In f32 `out` may be `gate` or `up`.
pub unsafe fn silu_mul(
    device: &dyn Device,
    n: usize,
    gate: u64,
    up: u64,
    to: DType,
    out: u64,
) -> Result<(), CudaError> {
    let name = by_type(to, ["silu_mul_f32", "silu_mul_f16", "silu_mul_bf16"]);
    // SAFETY: passed on.
    unsafe { along(device, name, n, &[Arg::U64(n as u64), Arg::Ptr(gate), Arg::Ptr(up), Arg::Ptr(out)]) }
}

/// As [`silu_mul`], with the tanh approximation of gelu.
pub unsafe fn gelu_tanh_mul(
    device: &dyn Device,
    n: usize,
    gate: u64,
    up: u64,
    to: DType,
    out: u64,
) -> Result<(), CudaError> {
    let name = by_type(to, ["gelu_tanh_mul_f32", "gelu_tanh_mul_f16", "gelu_tanh_mul_bf16"]);
    // SAFETY: passed on.
    unsafe { along(device, name, n, &[Arg::U64(n as u64), Arg::Ptr(gate), Arg::Ptr(up), Arg::Ptr(out)]) }
}

/// `x[i] += y[i]` for `n` elements in f32.
pub unsafe fn add(device: &dyn Device, n: usize, x: u64, y: u64) -> Result<(), CudaError> {
    // SAFETY: passed on.
    unsafe { along(device, "add", n, &[Arg::U64(n as u64), Arg::Ptr(x), Arg::Ptr(y)]) }
}

/// `out[i] = table[ids[i]]` for each of `rows` ids (u32): rows of `width` elements of the plain type `of`, to f32.
/// Addresses are multiples of 16.
pub unsafe fn embed(
    device: &dyn Device,
    (rows, width): (usize, usize),
    ids: u64,
    of: DType,
    table: u64,
    out: u64,
) -> Result<(), CudaError> {
    assert_aligned(&[ids, table, out]);
    let name = by_type(of, ["embed_f32", "embed_f16", "embed_bf16"]);
    let args = [Arg::U32(width as u32), Arg::Ptr(ids), Arg::Ptr(table), Arg::Ptr(out)];
    // SAFETY: passed on; a block per row.
    unsafe { per_row(device, Kernel { source: SOURCE, name }, rows, 0, &args) }
}

/// `out[i] = x[which[i]]` for each of `rows` row numbers (u32): rows of `row_bytes`, a multiple of 4. `out` is not `x`.
pub unsafe fn gather(
    device: &dyn Device,
    (rows, row_bytes): (usize, usize),
    which: u64,
    x: u64,
    out: u64,
) -> Result<(), CudaError> {
    assert!(row_bytes.is_multiple_of(4), "rows of {row_bytes} bytes");
    let args = [Arg::U32((row_bytes / 4) as u32), Arg::Ptr(which), Arg::Ptr(x), Arg::Ptr(out)];
    // SAFETY: passed on; a block per row.
    unsafe { per_row(device, Kernel { source: SOURCE, name: "gather_rows" }, rows, 0, &args) }
}

/// A block per row.
unsafe fn per_row(
    device: &dyn Device,
    kernel: Kernel,
    rows: usize,
    shared_bytes: u32,
    args: &[Arg],
) -> Result<(), CudaError> {
    if rows == 0 {
        return Ok(());
    }
    let shape = Launch { grid: [rows as u32, 1, 1], block: [THREADS, 1, 1], shared_bytes };
    // SAFETY: passed on.
    unsafe { device.launch(kernel, &shape, args) }
}

/// Blocks along an array of `n` elements.
unsafe fn along(device: &dyn Device, name: &'static str, n: usize, args: &[Arg]) -> Result<(), CudaError> {
    if n == 0 {
        return Ok(());
    }
    let grid = [blocks_of(n, THREADS as usize).min(BLOCKS_MAX as u32), 1, 1];
    // SAFETY: passed on.
    unsafe {
        device.launch(Kernel { source: SOURCE, name }, &Launch { grid, block: [THREADS, 1, 1], shared_bytes: 0 }, args)
    }
}

#[cfg(test)]
mod tests;
