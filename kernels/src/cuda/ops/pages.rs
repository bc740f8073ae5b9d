//! Keys and values into pages, and pages to and from other memory (`pages.cu`). Pages have the CPU's layout and bits.
//!
//! # Safety
//!
//! of every function here: as in [`super::rows`]; block numbers and slots lie in the pages' memory.

#![allow(clippy::missing_safety_doc, reason = "the module says it once")]
#![allow(clippy::too_many_arguments, reason = "an operation of the model has these operands")]

use super::{assert_aligned, blocks_of};
use crate::cuda::{Arg, CudaError, Device, Kernel, Launch};
use crate::{KvDtype, KvFormat};

const SOURCE: &str = "pages.cu";
/// Threads of a block that writes keys and values of one head: a warp per token.
const WRITE_THREADS: u32 = 128;
/// `TOKENS` of `pages.cu`.
const TOKENS: usize = 16;
const THREADS: u32 = 256;
/// Bytes of a page that a block of threads copies.
const COPY_BYTES: usize = 16 << 10;

/// Pages of one layer in device memory: that of block `b` begins at `base + b * block_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// Shape and type of each.
    pub format: KvFormat,
    /// Where block 0's begins: a multiple of 16, as the stride is.
    pub base: u64,
    /// Bytes from one block's page to the next one's.
    pub block_stride: u64,
}

/// Consecutive tokens that go to one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Write {
    /// The block. If `slot` is 0 it is new, and its slots after the last row are zeroed.
    pub block: u32,
    /// Slot of the first token.
    pub slot: u32,
    /// Its row among the keys and values.
    pub row: u32,
    /// Number of tokens, which fit the page.
    pub rows: u32,
}

impl Write {
    /// The words of a list of writes, as the device reads them.
    pub fn words(writes: &[Write]) -> Vec<u32> {
        writes.iter().flat_map(|w| [w.block, w.slot, w.row, w.rows]).collect()
    }
}

/// How keys are turned on their way into a page.
#[derive(Clone, Copy, Default, Debug)]
pub struct KeyTurn {
    /// Weight of the norm of each head, `[head_dim]` f32; 0 if there is none.
    pub norm: u64,
    /// Added to the mean square.
    pub eps: f32,
    /// Rotated pairs `(i, i + pairs)`; 0 rotates nothing.
    pub pairs: usize,
    /// `[rows, pairs]` f32.
    pub cos: u64,
    /// `[rows, pairs]` f32.
    pub sin: u64,
}

/// Writes rows of `k` and `v`, each `[rows, kv_heads, head_dim]` f32, into pages, as [`KvFormat::write`] does and to the same bits;
/// keys are normed and rotated first. `writes` is the address, a
/// multiple of 16, of the [`Write::words`] of `count` writes, which share no slots.
pub unsafe fn write_kv(
    device: &dyn Device,
    pages: &Pages,
    (writes, count): (u64, usize),
    turn: &KeyTurn,
    k: u64,
    v: u64,
) -> Result<(), CudaError> {
    check(pages);
    let format = pages.format;
    assert!(2 * turn.pairs <= format.head_dim, "{} pairs of {}", turn.pairs, format.head_dim);
    assert_aligned(&[writes]);
    if count == 0 {
        return Ok(());
    }
    let names = ["write_kv_f32", "write_kv_f16", "write_kv_bf16", "write_kv_fp8", "write_kv_int8"];
    let shape = Launch {
        grid: [count as u32, format.kv_heads as u32, 1],
        block: [WRITE_THREADS, 1, 1],
        shared_bytes: (4 * TOKENS * (format.head_dim + 2)) as u32,
    };
    let sizes = [format.kv_heads, format.head_dim, format.block_size, turn.pairs].map(|n| Arg::U32(n as u32));
    let inputs = [k, v, turn.norm, turn.cos, turn.sin, pages.base].map(Arg::Ptr);
    let args: Vec<Arg> = [Arg::Ptr(writes)]
        .into_iter()
        .chain(sizes)
        .chain([Arg::F32(turn.eps)])
        .chain(inputs)
        .chain([Arg::U64(pages.block_stride)])
        .collect();
    // SAFETY: passed on.
    unsafe { device.launch(Kernel { source: SOURCE, name: names[number(format.dtype)] }, &shape, &args) }
}

/// Copies `count` pages, converting them if the types differ (by way of f32, as [`KvFormat::write`] rounds). On either side the
/// list of blocks is the address of u32 block numbers, or 0 for the blocks from 0 on: a staging buffer.
///
/// # Panics
///
/// If the shapes differ in more than the type.
pub unsafe fn copy(
    device: &dyn Device,
    count: usize,
    (from, from_blocks): (&Pages, u64),
    (to, to_blocks): (&Pages, u64),
) -> Result<(), CudaError> {
    check(from);
    check(to);
    let format = from.format;
    assert_eq!(KvFormat { dtype: format.dtype, ..to.format }, format, "pages of other shapes");
    if count == 0 {
        return Ok(());
    }
    let source = [Arg::Ptr(from.base), Arg::U64(from.block_stride), Arg::Ptr(from_blocks)];
    let target = [Arg::Ptr(to.base), Arg::U64(to.block_stride), Arg::Ptr(to_blocks)];
    let (name, grid_y, shared_bytes, args): (_, _, _, Vec<Arg>) = if format.dtype == to.format.dtype {
        let bytes = format.page_bytes();
        let args = [Arg::U64(bytes as u64)].into_iter().chain(source).chain(target).collect();
        ("copy_pages", blocks_of(bytes, COPY_BYTES).min(64), 0, args)
    } else {
        let names =
            ["convert_pages_f32", "convert_pages_f16", "convert_pages_bf16", "convert_pages_fp8", "convert_pages_int8"];
        let sizes = [format.kv_heads, format.head_dim, format.block_size].map(|n| Arg::U32(n as u32));
        let to_type = Arg::U32(number(to.format.dtype) as u32);
        let args = sizes.into_iter().chain(source).chain([to_type]).chain(target).collect();
        let shared = if to.format.dtype == KvDtype::Int8 { 8 * format.block_size } else { 0 };
        (names[number(format.dtype)], format.kv_heads as u32, shared as u32, args)
    };
    let shape = Launch { grid: [count as u32, grid_y, 1], block: [THREADS, 1, 1], shared_bytes };
    // SAFETY: passed on.
    unsafe { device.launch(Kernel { source: SOURCE, name }, &shape, &args) }
}

fn check(pages: &Pages) {
    assert_aligned(&[pages.base, pages.block_stride]);
}

/// The kernels' number of a type.
pub(super) fn number(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::F32 => 0,
        KvDtype::F16 => 1,
        KvDtype::BF16 => 2,
        KvDtype::Fp8 => 3,
        KvDtype::Int8 => 4,
    }
}

#[cfg(test)]
mod tests;
