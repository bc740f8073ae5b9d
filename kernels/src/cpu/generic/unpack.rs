//! From packed weights to what the register tiles read. Loops over bytes are plain, so that each ISA's compiler vectorises them.

use super::matmul::columns;
use crate::DType;
use crate::cpu::vector::Vector;
use crate::packed::{QUANT_BLOCK, Quants, STRIP};
use crate::quant::e8m0_half;

/// Pairs of bf16 `[pairs][64][2]` to f32 `[64 / c][2 pairs][c]`, where `c` columns are a register tile's.
///
/// # Safety
/// The CPU has `V`'s features; `src` leads to `pairs * 64` words, `tile` to twice as many writable floats, elsewhere.
#[inline(always)]
pub(crate) unsafe fn bf16<V: Vector>(src: *const u32, pairs: usize, tile: *mut f32) {
    let columns = columns::<V>();
    for pair in 0..pairs {
        for lane in (0..STRIP).step_by(V::LANES) {
            // SAFETY: by contract; 64 is a multiple of a tile's columns.
            unsafe {
                let src = src.add(pair * STRIP + lane);
                let row = lane / columns * 2 * pairs + 2 * pair;
                let to = tile.add(row * columns + lane % columns);
                V::load_half_of_pairs(src, 0).store(to);
                V::load_half_of_pairs(src, 1).store(to.add(columns));
            }
        }
    }
}

/// f16 `[steps][64]` to f32 `[64 / c][s][c]`, where `c` columns are a register tile's and `s` is `steps`, made even.
///
/// # Safety
/// The CPU has `V`'s features; `src` leads to `steps * 64` halves, `tile` to `s * 64` writable floats.
#[inline(always)]
pub(crate) unsafe fn f16<V: Vector>(src: *const u16, steps: usize, tile: *mut f32) {
    let (columns, rows) = (columns::<V>(), steps.next_multiple_of(2));
    for step in 0..steps {
        for lane in (0..STRIP).step_by(V::LANES) {
            // SAFETY: by contract; 64 is a multiple of a tile's columns.
            unsafe {
                let to = tile.add((lane / columns * rows + step) * columns + lane % columns);
                V::load_f16(src.add(step * STRIP + lane).cast()).store(to);
            }
        }
    }
}

/// The scales (and minima) of whole blocks: `[elements / group][64]`.
///
/// # Safety
/// The CPU has `V`'s features; both are writable for the blocks' groups (`minima` only if there are any).
#[inline(always)]
pub(crate) unsafe fn scales<V: Vector>(
    dtype: DType,
    layout: &Quants,
    blocks: &[u8],
    scales: *mut f32,
    minima: *mut f32,
) {
    let subs = layout.block / QUANT_BLOCK;
    let groups = QUANT_BLOCK / layout.group;
    for (index, block) in blocks.chunks_exact(layout.block_bytes()).enumerate() {
        // SAFETY: the features are passed on; the places are large enough by contract.
        unsafe {
            let supers = Supers::of::<V>(dtype, layout, block);
            for (sub, bytes) in block[layout.head..].chunks_exact(layout.sub_bytes()).enumerate() {
                let at = (index * subs + sub) * groups;
                let scales = std::slice::from_raw_parts_mut(scales.cast::<Lanes>().add(at), groups);
                let minima = std::slice::from_raw_parts_mut(minima.cast::<Lanes>().add(at), groups);
                sub_scales(dtype, &supers, bytes, scales, minima);
            }
        }
    }
}

/// The quants of whole blocks as bytes: `[elements / 4][64][4]`.
///
/// # Safety
/// The CPU has `V`'s features; `tile` is writable for the blocks' elements.
#[inline(always)]
pub(crate) unsafe fn quants<V: Vector>(layout: &Quants, blocks: &[u8], tile: *mut u8) {
    let subs = layout.block / QUANT_BLOCK;
    for (index, block) in blocks.chunks_exact(layout.block_bytes()).enumerate() {
        for (sub, bytes) in block[layout.head..].chunks_exact(layout.sub_bytes()).enumerate() {
            // SAFETY: the features are passed on; the tile is large enough by contract.
            unsafe {
                let to = tile.add((index * subs + sub) * QUANT_BLOCK * STRIP).cast::<[u8; QUANT_BLOCK * STRIP]>();
                planes(layout.bits, &bytes[layout.sub_head..], &mut *to);
                if let Some(levels) = &layout.levels {
                    V::look_up(levels, &mut *to);
                }
            }
        }
    }
}

/// The f16 scales that open a block, as f32.
pub(crate) struct Supers {
    scale: Lanes,
    minimum: Lanes,
}

/// A float for each row of a strip. Sizes are constants here, or the compiler makes loops with slow ends.
pub(crate) type Lanes = [f32; STRIP];

impl Default for Supers {
    fn default() -> Self {
        Supers { scale: [0.0; STRIP], minimum: [0.0; STRIP] }
    }
}

impl Supers {
    /// # Safety
    /// The CPU has `V`'s features.
    #[inline(always)]
    pub(crate) unsafe fn of<V: Vector>(dtype: DType, layout: &Quants, block: &[u8]) -> Supers {
        let mut supers = Supers::default();
        if dtype != DType::MXFP4 {
            // SAFETY: the features are passed on.
            unsafe { halves::<V>(&block[..2 * STRIP], &mut supers.scale) };
        }
        if layout.minima {
            // SAFETY: as above.
            unsafe { halves::<V>(&block[2 * STRIP..4 * STRIP], &mut supers.minimum) };
        }
        supers
    }
}

/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn halves<V: Vector>(bytes: &[u8], out: &mut [f32; STRIP]) {
    assert_eq!(bytes.len(), 2 * STRIP);
    for i in (0..STRIP).step_by(V::LANES) {
        // SAFETY: both have 64 elements, a multiple of the lanes.
        unsafe { V::load_f16(bytes.as_ptr().add(2 * i)).store(out.as_mut_ptr().add(i)) }
    }
}

/// Scales (and minima) of 32 elements, one [`Lanes`] per group.
#[inline(always)]
pub(crate) fn sub_scales(dtype: DType, supers: &Supers, bytes: &[u8], scales: &mut [Lanes], minima: &mut [Lanes]) {
    let Supers { scale, minimum } = supers;
    let bytes = bytes.as_chunks::<STRIP>().0;
    match dtype {
        DType::MXFP4 => {
            for i in 0..STRIP {
                scales[0][i] = e8m0_half(bytes[0][i]);
            }
        }
        DType::Q4_1 | DType::Q5_1 => {
            scales[0] = *scale;
            // These add their minimum, the product subtracts it.
            minima[0] = minimum.map(|minimum| -minimum);
        }
        DType::Q4K | DType::Q5K => {
            scales[0] = multiples(scale, &bytes[0], i32::from);
            minima[0] = multiples(minimum, &bytes[1], i32::from);
        }
        DType::Q2K => {
            for half in 0..2 {
                scales[half] = multiples(scale, &bytes[half], |byte| i32::from(byte & 15));
                minima[half] = multiples(minimum, &bytes[half], |byte| i32::from(byte >> 4));
            }
        }
        DType::Q3K | DType::Q6K => {
            for half in 0..2 {
                scales[half] = multiples(scale, &bytes[half], |byte| i32::from(byte as i8));
            }
        }
        _ => scales[0] = *scale,
    }
}

/// Each scale times the integer that its byte stands for.
#[inline(always)]
fn multiples(scale: &Lanes, bytes: &[u8; STRIP], of: impl Fn(u8) -> i32) -> Lanes {
    let mut out = [0.0; STRIP];
    for i in 0..STRIP {
        out[i] = scale[i] * of(bytes[i]) as f32;
    }
    out
}

/// Bit planes (see [`crate::packed`]) to bytes.
#[inline(always)]
fn planes(bits: usize, src: &[u8], out: &mut [u8; QUANT_BLOCK * STRIP]) {
    const NIBBLES: usize = QUANT_BLOCK * STRIP / 2;
    const PAIRS: usize = QUANT_BLOCK * STRIP / 4;
    const SINGLES: usize = QUANT_BLOCK * STRIP / 8;
    match bits {
        8 => out.copy_from_slice(src),
        2 | 3 => {
            let low = src.first_chunk::<PAIRS>().expect("a plane of two bits");
            for (j, out) in out.as_chunks_mut::<PAIRS>().0.iter_mut().enumerate() {
                for i in 0..PAIRS {
                    out[i] = (low[i] >> (2 * j)) & 3;
                }
            }
            if bits == 3 {
                top::<SINGLES>(&src[PAIRS..], 1, 2, out);
            }
        }
        _ => {
            let low = src.first_chunk::<NIBBLES>().expect("a plane of four bits");
            let (first, second) = out.split_at_mut(NIBBLES);
            for i in 0..NIBBLES {
                first[i] = low[i] & 15;
                second[i] = low[i] >> 4;
            }
            match bits {
                5 => top::<SINGLES>(&src[NIBBLES..], 1, 4, out),
                6 => top::<PAIRS>(&src[NIBBLES..], 2, 4, out),
                _ => {}
            }
        }
    }
}

/// Adds a plane of `width` bits at bit `at` of the quants; the plane has `N` bytes.
#[inline(always)]
fn top<const N: usize>(plane: &[u8], width: usize, at: usize, out: &mut [u8; QUANT_BLOCK * STRIP]) {
    let plane = plane.first_chunk::<N>().expect("a plane");
    let mask = (1u8 << width) - 1;
    for (j, out) in out.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        for i in 0..N {
            out[i] |= ((plane[i] >> (width * j)) & mask) << at;
        }
    }
}
