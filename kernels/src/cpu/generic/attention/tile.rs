//! Where a tile's keys and values are read from: pages as they are, or f32 scratch decoded from them.

use super::{Floats, Run, TILE};
use crate::cpu::vector::Vector;
use crate::kv::e4m3_to_f32;
use crate::quant::{bf16_to_f32, f16_to_f32};
use std::ops::Range;

/// A stored type, as numbers: the element's value divided by [`Element::UNIT`] and by its scale.
pub(crate) trait Element {
    /// Bytes per element.
    const BYTES: usize;
    /// What a loaded number is to be multiplied by: a power of two, so that it may be left to the end.
    const UNIT: f32 = 1.0;
    /// Whether each vector has a scale.
    const SCALED: bool = false;
    /// Whether the elements are in a cache already, because this thread has just decoded them.
    const NEAR: bool = false;

    /// Reads a register of elements.
    ///
    /// # Safety
    /// The CPU has `V`'s features; `p` is valid for reads of `V::LANES` elements.
    unsafe fn load<V: Vector>(p: *const u8) -> V;

    /// Reads a register at `a` and one at `b`, in an order that [`Element::undeal`] undoes.
    ///
    /// # Safety
    /// As [`Element::load`], for both.
    #[inline(always)]
    unsafe fn load_dealt<V: Vector>(a: *const u8, b: *const u8) -> [V; 2] {
        // SAFETY: passed on.
        unsafe { [Self::load(a), Self::load(b)] }
    }

    /// [`Element::load_dealt`] of neighbours.
    ///
    /// # Safety
    /// As [`Element::load`], for two registers.
    #[inline(always)]
    unsafe fn load_dealt_neighbours<V: Vector>(p: *const u8) -> [V; 2] {
        // SAFETY: passed on.
        unsafe { Self::load_dealt(p, p.add(V::LANES * Self::BYTES)) }
    }

    /// Two registers in the order of [`Element::load_dealt`].
    #[inline(always)]
    fn deal<V: Vector>(pair: [V; 2]) -> [V; 2] {
        pair
    }

    /// Undoes [`Element::deal`].
    #[inline(always)]
    fn undeal<V: Vector>(pair: [V; 2]) -> [V; 2] {
        pair
    }

    /// Reads one element, to the same bits.
    ///
    /// # Safety
    /// `p` is valid for reads of an element.
    unsafe fn one(p: *const u8) -> f32;
}

pub(crate) struct Single;
/// Floats of a decoded tile.
pub(crate) struct Decoded;
pub(crate) struct Half;
pub(crate) struct Brain;
pub(crate) struct Fp8;
pub(crate) struct Int8;

impl Element for Single {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const u8) -> V {
        // SAFETY: passed on.
        unsafe { V::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by contract.
        unsafe { p.cast::<f32>().read_unaligned() }
    }
}

impl Element for Decoded {
    const BYTES: usize = 4;
    const NEAR: bool = true;
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const u8) -> V {
        // SAFETY: passed on.
        unsafe { Single::load(p) }
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: passed on.
        unsafe { Single::one(p) }
    }
}

impl Element for Half {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const u8) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by contract.
        f16_to_f32(unsafe { p.cast::<u16>().read_unaligned() })
    }
}

impl Element for Brain {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const u8) -> V {
        // SAFETY: passed on.
        unsafe { V::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn load_dealt<V: Vector>(a: *const u8, b: *const u8) -> [V; 2] {
        // SAFETY: passed on.
        unsafe { V::load_bf16_dealt(a, b) }
    }
    #[inline(always)]
    unsafe fn load_dealt_neighbours<V: Vector>(p: *const u8) -> [V; 2] {
        // SAFETY: passed on.
        unsafe { V::load_bf16_dealt_neighbours(p) }
    }
    #[inline(always)]
    fn deal<V: Vector>(pair: [V; 2]) -> [V; 2] {
        V::deal(pair)
    }
    #[inline(always)]
    fn undeal<V: Vector>(pair: [V; 2]) -> [V; 2] {
        V::undeal(pair)
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by contract.
        bf16_to_f32(unsafe { p.cast::<u16>().read_unaligned() })
    }
}

impl Element for Fp8 {
    const BYTES: usize = 1;
    const UNIT: f32 = 256.0;
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const u8) -> V {
        // SAFETY: passed on.
        unsafe { V::load_e4m3(p) }
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by contract.
        e4m3_to_f32(unsafe { *p }) / Self::UNIT
    }
}

impl Element for Int8 {
    const BYTES: usize = 1;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const u8) -> V {
        // SAFETY: passed on.
        unsafe { V::load_i8(p) }
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        // SAFETY: by contract.
        f32::from(unsafe { *p.cast::<i8>() })
    }
}

/// Whether the run reads pages directly: its queries are few, so that decoding in registers costs less than a pass over
/// scratch, and registers of keys and of values do not cross a page's or a head's border.
pub(super) fn is_direct<V: Vector>(run: &Run<'_>) -> bool {
    run.queries() <= 2 * V::TILE_QUERIES
        && run.fmt.block_size.is_multiple_of(V::LANES)
        && run.fmt.head_dim.is_multiple_of(V::LANES)
}

/// The transposed keys of a tile: where each register of them starts, for the head's first element.
#[derive(Clone, Copy)]
pub(crate) struct Keys {
    registers: [*const u8; TILE / 4],
    /// Bytes from one element to the next.
    pub(super) stride: usize,
}

impl Keys {
    /// The keys in their pages. Registers past the last page lead to that page instead, so that they can be read.
    #[inline(always)]
    pub(super) fn of_pages<V: Vector>(run: &Run<'_>, begin: usize) -> Keys {
        let fmt = run.fmt;
        let mut registers = [std::ptr::null(); TILE / 4];
        for (i, register) in registers.iter_mut().enumerate().take(TILE / V::LANES) {
            let pos = begin + i * V::LANES;
            let page = run.pages[(pos / fmt.block_size).min(run.pages.len() - 1)];
            *register = page[fmt.key(run.kv_head, 0, pos % fmt.block_size)..].as_ptr();
        }
        Keys { registers, stride: fmt.block_size * fmt.dtype.bytes() }
    }

    /// The keys in `[head_dim][TILE]` floats.
    #[inline(always)]
    pub(super) fn of_tile<V: Vector>(tile: &[f32]) -> Keys {
        let mut registers = [std::ptr::null(); TILE / 4];
        for (i, register) in registers.iter_mut().enumerate().take(TILE / V::LANES) {
            *register = tile[i * V::LANES..].as_ptr().cast();
        }
        Keys { registers, stride: TILE * 4 }
    }

    /// Four registers of keys, from the `i`th on.
    #[inline(always)]
    pub(super) fn four(&self, i: usize) -> [*const u8; 4] {
        [self.registers[i], self.registers[i + 1], self.registers[i + 2], self.registers[i + 3]]
    }
}

/// Positions `range` cut at page borders: `(page, first slot, first position, count)`.
fn segments<'a>(run: &'a Run<'_>, range: Range<usize>) -> impl Iterator<Item = (&'a [u8], usize, usize, usize)> {
    let block_size = run.fmt.block_size;
    let mut pos = range.start;
    std::iter::from_fn(move || {
        if pos >= range.end {
            return None;
        }
        let (first, slot) = (pos, pos % block_size);
        pos = range.end.min(first + block_size - slot);
        Some((run.pages[first / block_size], slot, first, pos - first))
    })
}

/// Decodes keys `used` of the tile at `begin` into `[head_dim][TILE]` floats. The other keys' floats are left over from
/// earlier tiles: their scores are masked.
///
/// # Safety
/// The CPU has `V`'s features; `E` is the type of the run's pages.
#[inline(always)]
pub(super) unsafe fn decode_keys<'t, V: Vector, E: Element>(
    run: &Run<'_>,
    begin: usize,
    used: Range<usize>,
    scratch: &'t mut Floats,
) -> &'t [f32] {
    let (fmt, dim) = (run.fmt, run.fmt.head_dim);
    let tile = scratch.floats(dim * TILE);
    for (page, slot, first, count) in segments(run, used) {
        let src = &page[fmt.key(run.kv_head, 0, slot)..fmt.key(run.kv_head, dim - 1, slot + count)];
        let dst = &mut tile[first - begin..dim * TILE - (TILE - count - (first - begin))];
        // SAFETY: row `d` of `count` elements begins `d` blocks into the page's range and `d` tiles into the scratch, and the
        // last of them ends where the slices end.
        unsafe {
            for d in 0..dim {
                let src = src.as_ptr().add(d * fmt.block_size * E::BYTES);
                widen::<V, E>(src, count, dst.as_mut_ptr().add(d * TILE));
            }
        }
    }
    tile
}

/// Decodes values `used` of the tile at `begin` into `[TILE][width]` floats. Other rows are not read; padding stays zero.
///
/// # Safety
/// As [`decode_keys`].
#[inline(always)]
pub(super) unsafe fn decode_values<'t, V: Vector, E: Element>(
    run: &Run<'_>,
    begin: usize,
    used: Range<usize>,
    scratch: &'t mut Floats,
) -> &'t [f32] {
    let (fmt, dim, width) = (run.fmt, run.fmt.head_dim, run.width());
    let tile = scratch.floats(width * TILE);
    if dim < width {
        // The buffer may have served another head size.
        tile.fill(0.0);
    }
    for (page, slot, first, count) in segments(run, used) {
        let src = &page[fmt.value(run.kv_head, slot)..fmt.value(run.kv_head, slot + count)];
        let rows = tile[(first - begin) * width..].chunks_exact_mut(width);
        for (src, row) in src.chunks_exact(dim * E::BYTES).zip(rows) {
            // SAFETY: both hold `dim` elements.
            unsafe { widen::<V, E>(src.as_ptr(), dim, row.as_mut_ptr()) };
        }
    }
    tile
}

/// Decodes `n` neighbouring elements.
///
/// # Safety
/// The CPU has `V`'s features; `src` is valid for reads of `n` elements, `dst` for writes of `n` floats.
#[inline(always)]
unsafe fn widen<V: Vector, E: Element>(src: *const u8, n: usize, dst: *mut f32) {
    let whole = n - n % V::LANES;
    // SAFETY: offsets stay below `n`.
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            E::load::<V>(src.add(i * E::BYTES)).store(dst.add(i));
        }
        for i in whole..n {
            *dst.add(i) = E::one(src.add(i * E::BYTES));
        }
    }
}

/// Scales of a tile, for types that have them.
pub(super) struct Scales {
    pub(super) keys: [f32; TILE],
    pub(super) values: [f32; TILE],
}

impl Default for Scales {
    fn default() -> Scales {
        Scales { keys: [0.0; TILE], values: [0.0; TILE] }
    }
}

/// The scales of keys and values `used` of the tile at `begin`; the others are left over, and meet masked scores.
#[inline(always)]
pub(super) fn load_scales(run: &Run<'_>, begin: usize, used: Range<usize>, scales: &mut Scales) {
    let fmt = run.fmt;
    for (page, slot, first, count) in segments(run, used) {
        let stored = [fmt.key_scale(run.kv_head, slot), fmt.value_scale(run.kv_head, slot)];
        for (at, of_tile) in stored.into_iter().zip([&mut scales.keys, &mut scales.values]) {
            let bytes = page[at..at + 4 * count].as_chunks::<4>().0;
            for (bytes, scale) in bytes.iter().zip(&mut of_tile[first - begin..]) {
                *scale = f32::from_le_bytes(*bytes);
            }
        }
    }
}
