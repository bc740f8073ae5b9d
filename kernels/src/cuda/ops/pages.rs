//! Keys and values into pages, and pages to and from other memory (`pages.cu`). Pages have the CPU's layout and bits.
//!
//! # Safety
//!
//! of every function here: as in [`super::rows`]; block numbers and slots lie in the pages' memory.

#![allow(clippy::missing_safety_doc, reason = "the module says it once")]
#![allow(clippy::too_many_arguments, reason = "an operation of the model has these operands")]

use super::{assert_aligned, blocks_of};
use crate::cuda::{Arg, CudaError, Device, Kernel, Launch};
use crate::{KvDtype, KvFormat, KvMove};

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

/// Copies `count` pages. On either side the list of blocks is the address of u32 block numbers, or 0 for the blocks from 0 on: a
/// staging buffer.
///
/// # Panics
///
/// If the formats differ: [`move_tokens`] converts.
pub unsafe fn copy(
    device: &dyn Device,
    count: usize,
    (from, from_blocks): (&Pages, u64),
    (to, to_blocks): (&Pages, u64),
) -> Result<(), CudaError> {
    check(from);
    check(to);
    assert_eq!(from.format, to.format, "pages are copied as they are");
    if count == 0 {
        return Ok(());
    }
    let bytes = from.format.page_bytes();
    let source = [Arg::Ptr(from.base), Arg::U64(from.block_stride), Arg::Ptr(from_blocks)];
    let target = [Arg::Ptr(to.base), Arg::U64(to.block_stride), Arg::Ptr(to_blocks)];
    let args: Vec<Arg> = [Arg::U64(bytes as u64)].into_iter().chain(source).chain(target).collect();
    let grid = [count as u32, blocks_of(bytes, COPY_BYTES).min(64), 1];
    let shape = Launch { grid, block: [THREADS, 1, 1], shared_bytes: 0 };
    // SAFETY: passed on.
    unsafe { device.launch(Kernel { source: SOURCE, name: "copy_pages" }, &shape, &args) }
}

/// Consecutive tokens on their way from one page into another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// The page that has them.
    pub from: u32,
    /// The page that gets them.
    pub to: u32,
    /// Their slots.
    pub slots: KvMove,
}

impl Move {
    /// The words of a list of moves, as the device reads them.
    pub fn words(moves: &[Move]) -> Vec<u32> {
        let of = |m: &Move| {
            let KvMove { from, to, tokens } = m.slots;
            [m.from, from as u32, m.to, to as u32, tokens as u32, 0, 0, 0]
        };
        moves.iter().flat_map(of).collect()
    }
}

/// Gathers or scatters tokens between pages of any two formats of the same heads, in one pass and to the bytes of
/// [`KvFormat::convert`], which says what is converted into what. `list` is the address, a multiple of 16, of the [`Move::words`] of
/// `moves`; no two of them write the same slots.
///
/// # Panics
///
/// If the heads differ, a slot does not fit, or another type is asked of 8 bits.
pub unsafe fn move_tokens(
    device: &dyn Device,
    (moves, list): (&[Move], u64),
    from: &Pages,
    to: &Pages,
) -> Result<(), CudaError> {
    check(from);
    check(to);
    assert_aligned(&[list]);
    let (source, target) = (from.format, to.format);
    assert_eq!((source.kv_heads, source.head_dim), (target.kv_heads, target.head_dim), "heads of one model");
    let narrow = matches!(source.dtype, KvDtype::Fp8 | KvDtype::Int8);
    assert!(!narrow || source.dtype == target.dtype, "{} stays what it is", source.dtype.name());
    for Move { slots, .. } in moves {
        let fits = slots.from + slots.tokens <= source.block_size && slots.to + slots.tokens <= target.block_size;
        assert!(fits && slots.tokens > 0, "{slots:?} from {} slots into {}", source.block_size, target.block_size);
    }
    let most = moves.iter().map(|m| m.slots.tokens).max().unwrap_or(0);
    if most == 0 {
        return Ok(());
    }
    let names = ["move_tokens_f32", "move_tokens_f16", "move_tokens_bf16", "move_tokens_fp8", "move_tokens_int8"];
    let sizes = [source.kv_heads, source.head_dim].map(|n| Arg::U32(n as u32));
    let side =
        |pages: &Pages| [Arg::Ptr(pages.base), Arg::U64(pages.block_stride), Arg::U32(pages.format.block_size as u32)];
    let to_type = Arg::U32(number(target.dtype) as u32);
    let args: Vec<Arg> =
        [Arg::Ptr(list)].into_iter().chain(sizes).chain(side(from)).chain([to_type]).chain(side(to)).collect();
    let shared_bytes = if target.dtype == KvDtype::Int8 { 8 * most as u32 } else { 0 };
    let grid = [moves.len() as u32, source.kv_heads as u32, 1];
    let kernel = Kernel { source: SOURCE, name: names[number(source.dtype)] };
    // SAFETY: passed on.
    unsafe { device.launch(kernel, &Launch { grid, block: [THREADS, 1, 1], shared_bytes }, &args) }
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
