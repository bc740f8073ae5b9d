//! The matrix product of one strip of quantised weights; see [`super::matmul`], whose loops these are.

use super::matmul::{AHEAD, Ahead, FEW_ROWS, Job, Part, Scratch, by_rows, fit};
use super::unpack::{self, Lanes, Supers};
use crate::DType;
use crate::cpu::vector::{BytesDot, Vector};
use crate::packed::{QUANT_BLOCK, Quants, STRIP};
use std::ops::Range;

/// Elements of k per chunk of bytes, or a block if that is more: for one tile of rows, for two and for many.
const BYTES_ONCE: usize = 64;
const BYTES_TWICE: usize = 128;
const BYTES: usize = 512;
/// Rows of x up to which quants are unpacked in registers; those that are bytes have only scales to unpack.
const FUSED_ROWS: usize = 4;
const FUSED_ROWS_OF_BYTES: usize = 2;

/// A strip of quantised weights, chunk by chunk.
///
/// # Safety
/// As [`super::matmul::strip`], whose strip is `data`.
#[inline(always)]
pub(super) unsafe fn strip<V: Vector, B: ByteTiles<V>>(
    job: &Job<'_>,
    rows: &Range<usize>,
    layout: &Quants,
    data: &[u8],
    scratch: &mut Scratch,
    sums: *mut f32,
) {
    let (k, dtype) = (job.w.cols(), job.w.dtype());
    // With few tiles memory is the limit: they take turns often, so that it is asked all the time.
    let (chunk, soon) = match job.tiles.len() {
        1 => (BYTES_ONCE, true),
        2 => (BYTES_TWICE, true),
        _ => (BYTES, false),
    };
    let chunk = chunk.max(layout.block);
    let fused = fused::<V>(rows.len(), layout.bits);
    let tile: *mut u8 = fit(&mut scratch.tile, chunk * STRIP / 4).cast();
    let scales = fit(&mut scratch.scales, chunk / layout.group * STRIP);
    let minima = fit(&mut scratch.minima, chunk / layout.group * STRIP);
    let mut at = 0;
    while at < k {
        let end = k.min(at + chunk);
        let blocks = &data[at / layout.block * layout.block_bytes()..end / layout.block * layout.block_bytes()];
        // SAFETY: the scratch has room for the chunk; the features are passed on.
        unsafe {
            if !fused {
                unpack::scales::<V>(dtype, layout, blocks, scales, minima);
            }
            let distance = if soon { AHEAD } else { blocks.len() };
            let ahead = Ahead { start: blocks.as_ptr().wrapping_add(distance), bytes: blocks.len(), soon };
            let mut w = Bytes { dtype, quants: blocks.as_ptr(), layout: *layout, scales, minima, ahead };
            if !fused && layout.bits != 8 {
                unpack::quants::<V>(layout, blocks, tile);
                w.quants = tile;
                w.layout = layout.unpacked();
            }
            let groups = at / layout.group..end / layout.group;
            let packed = if fused { (layout.bits, layout.levels.is_some()) } else { (8, false) };
            match (packed, layout.group, layout.minima) {
                ((8, _), 16, false) => byte_tiles::<V, B, Stored<8, false, 16, false>>(job, rows, groups, &w, sums),
                ((8, _), 16, true) => byte_tiles::<V, B, Stored<8, false, 16, true>>(job, rows, groups, &w, sums),
                ((8, _), _, false) => byte_tiles::<V, B, Stored<8, false, 32, false>>(job, rows, groups, &w, sums),
                ((8, _), _, true) => byte_tiles::<V, B, Stored<8, false, 32, true>>(job, rows, groups, &w, sums),
                ((2, _), ..) => byte_tiles::<V, B, Stored<2, false, 16, true>>(job, rows, groups, &w, sums),
                ((3, _), ..) => byte_tiles::<V, B, Stored<3, false, 16, false>>(job, rows, groups, &w, sums),
                ((4, true), ..) => byte_tiles::<V, B, Stored<4, true, 32, false>>(job, rows, groups, &w, sums),
                ((4, false), _, false) => byte_tiles::<V, B, Stored<4, false, 32, false>>(job, rows, groups, &w, sums),
                ((4, false), _, true) => byte_tiles::<V, B, Stored<4, false, 32, true>>(job, rows, groups, &w, sums),
                ((5, _), _, false) => byte_tiles::<V, B, Stored<5, false, 32, false>>(job, rows, groups, &w, sums),
                ((5, _), _, true) => byte_tiles::<V, B, Stored<5, false, 32, true>>(job, rows, groups, &w, sums),
                _ => byte_tiles::<V, B, Stored<6, false, 16, false>>(job, rows, groups, &w, sums),
            }
        }
        at = end;
    }
}

/// Most rows in a tile of bytes of four registers of columns, or of two.
const fn byte_rows<V: Vector>(four: bool) -> usize {
    match (four, V::FOUR) {
        (true, true) => V::BYTE_ROWS / 2,
        (true, false) => 0,
        (false, _) => V::BYTE_ROWS,
    }
}

/// Whether quants are unpacked in registers.
#[inline(always)]
const fn fused<V: Vector>(rows: usize, bits: usize) -> bool {
    V::FOUR && rows <= if bits == 8 { FUSED_ROWS_OF_BYTES } else { FUSED_ROWS }
}

/// A chunk of quantised weights.
struct Bytes {
    dtype: DType,
    /// Blocks as the layout says: packed, or bytes alone.
    quants: *const u8,
    layout: Quants,
    /// `[k / group][64]`; with few rows unused, since scales are then unpacked on the way.
    scales: *const f32,
    /// As the scales; also unused without minima.
    minima: *const f32,
    /// What comes next.
    ahead: Ahead,
}

/// All tiles of rows against the groups of a chunk; `groups` are their numbers in the row.
///
/// # Safety
/// The CPU has `V`'s and `B`'s features; `w` holds the groups, stored as `Q` says, `sums` `rows` by 64 floats; x has the groups.
#[inline(always)]
unsafe fn byte_tiles<V: Vector, B: ByteTiles<V>, Q: Kind>(
    job: &Job<'_>,
    rows: &Range<usize>,
    groups: Range<usize>,
    w: &Bytes,
    sums: *mut f32,
) {
    if Q::BITS != 8 && !V::FOUR {
        unreachable!("this instruction set unpacks to memory");
    }
    let four = rows.len() <= byte_rows::<V>(true);
    let columns = if four { 4 * V::LANES } else { 2 * V::LANES };
    let calls = STRIP / columns * job.tiles.len();
    // A tile asks for more with every word of x if nothing else is to be kept, else with every 32 elements: around the loop that
    // asks, the compiler keeps sums and dots on the stack, which costs a third of the time.
    let step = if fused::<V>(rows.len(), Q::BITS) { 4 } else { QUANT_BLOCK };
    let mut call = 0;
    for column in (0..STRIP).step_by(columns) {
        for tile in job.tiles.clone() {
            let span = job.x.tile(tile);
            // SAFETY: the tile's words, scales and sums of x start at its first row times those of a row.
            unsafe {
                let first = groups.start * span.len();
                let [words, next] = job.words(tile);
                let t = ByteTile {
                    words: words.add(first * Q::G / 4),
                    next: next.wrapping_add(first * Q::G / 4),
                    x_scales: job.x.scales(span.start).add(first * Q::G / QUANT_BLOCK),
                    x_sums: if Q::G == 16 { job.x.sums_16(span.start) } else { job.x.sums_32(span.start) }.add(first),
                    w,
                    column,
                    ahead: w.ahead.part(call, calls, groups.len() * Q::G / step),
                    groups: groups.len(),
                    sums: sums.add((span.start - rows.start) * STRIP + column),
                    fresh: groups.start == 0,
                };
                call += 1;
                by_rows!(span.len(), [B::tile], [Q], four, (&t));
            }
        }
    }
}

/// How quants are stored when a tile meets them.
pub(crate) trait Kind {
    /// Bits of each: 8 if they are bytes, packed or unpacked.
    const BITS: usize;
    /// Whether bits are places in a table.
    const LEVELS: bool;
    /// Elements of a group, which has a scale: 16 or 32.
    const G: usize;
    /// Whether a group has a minimum.
    const MINIMA: bool;
}

/// The [`Kind`] of these properties, in their order there.
struct Stored<const BITS: usize, const LEVELS: bool, const G: usize, const MINIMA: bool>;

impl<const BITS: usize, const LEVELS: bool, const G: usize, const MINIMA: bool> Kind
    for Stored<BITS, LEVELS, G, MINIMA>
{
    const BITS: usize = BITS;
    const LEVELS: bool = LEVELS;
    const G: usize = G;
    const MINIMA: bool = MINIMA;
}

/// The register tiles of bytes, each compiled as a function of its own: inlined, two hundred of them (types by rows) would make
/// one function that takes the compiler many minutes.
pub(crate) trait ByteTiles<V: Vector>: BytesDot<V> {
    /// [`byte_tile`].
    ///
    /// # Safety
    /// As [`byte_tile`].
    unsafe fn tile<Q: Kind, const M: usize, const R: usize>(t: &ByteTile<'_>);
}

/// Arguments of [`byte_tile`], of `M` rows.
pub(crate) struct ByteTile<'a> {
    /// `[k / 4][M]`
    words: *const u32,
    /// Where the next tile's words are, which are asked for; nothing is read.
    next: *const u32,
    /// `[k / 32][M]`
    x_scales: *const f32,
    /// `[k / group][M]`
    x_sums: *const i32,
    w: &'a Bytes,
    /// First column.
    column: usize,
    ahead: Part,
    groups: usize,
    /// At the first column.
    sums: *mut f32,
    fresh: bool,
}

/// `M` rows by `R` registers of columns, groups of `Q::G` elements.
///
/// # Safety
/// The CPU has the features; the pointers of the arguments lead to what their types say for all groups.
#[inline(always)]
pub(crate) unsafe fn byte_tile<V: Vector, B: BytesDot<V>, Q: Kind, const M: usize, const R: usize>(t: &ByteTile<'_>) {
    if M > byte_rows::<V>(R == 4) || Q::BITS != 8 && M > FUSED_ROWS {
        unreachable!("the operand's tiles have at most as many rows");
    }
    // SAFETY: by contract.
    unsafe {
        let mut acc = [[V::splat(0.0); R]; M];
        if !t.fresh {
            for i in 0..M {
                for r in 0..R {
                    acc[i][r] = V::load(t.sums.add(i * STRIP + r * V::LANES));
                }
            }
        }
        let Bytes { dtype, layout, mut scales, mut minima, .. } = *t.w;
        let levels = B::levels(&layout.levels.unwrap_or_default());
        let subs = layout.block / QUANT_BLOCK;
        let mut quants = t.w.quants;
        let mut x = t.words;
        let mut group = 0;
        let mut sub_of_block = 0;
        let fused = fused::<V>(M, Q::BITS);
        let mut supers = Supers::default();
        let (mut sub, mut sub_minima): ([Lanes; 2], [Lanes; 2]) = ([[0.0; STRIP]; 2], [[0.0; STRIP]; 2]);
        let (mut ahead, mut next) = (t.ahead, t.next);
        while group < t.groups {
            if sub_of_block == 0 {
                if fused {
                    supers = Supers::of::<V>(dtype, &layout, std::slice::from_raw_parts(quants, layout.block_bytes()));
                }
                quants = quants.add(layout.head);
            }
            if fused {
                let head = std::slice::from_raw_parts(quants, layout.sub_head);
                unpack::sub_scales(
                    dtype,
                    &supers,
                    head,
                    &mut sub[..QUANT_BLOCK / Q::G],
                    &mut sub_minima[..QUANT_BLOCK / Q::G],
                );
                (scales, minima) = (sub.as_ptr().cast(), sub_minima.as_ptr().cast());
            } else {
                ahead.step::<V>();
                if M > FEW_ROWS {
                    for line in 0..(M * QUANT_BLOCK).div_ceil(64) {
                        V::prefetch(next.cast::<u8>().wrapping_add(64 * line));
                    }
                    next = next.wrapping_add(M * QUANT_BLOCK / 4);
                }
            }
            let w = quants.add(layout.sub_head + t.column * 4);
            for half in 0..QUANT_BLOCK / Q::G {
                let x_sums = t.x_sums.add(group * M);
                let mut dots = [[B::splat(0); R]; M];
                if !Q::MINIMA {
                    for i in 0..M {
                        dots[i] = [B::splat(-layout.offset * *x_sums.add(i)); R];
                    }
                }
                for u in half * Q::G / 4..(half + 1) * Q::G / 4 {
                    if fused {
                        ahead.step::<V>();
                    }
                    let mut b = [unpack_word::<V, B, Q>(w, u); R];
                    for r in 1..R {
                        b[r] = unpack_word::<V, B, Q>(w.add(r * V::LANES * 4), u);
                    }
                    if Q::LEVELS {
                        for b in &mut b {
                            *b = B::look_up(levels, *b);
                        }
                    }
                    for i in 0..M {
                        let a = B::broadcast(x.add(i));
                        for r in 0..R {
                            dots[i][r] = B::dot(dots[i][r], b[r], a);
                        }
                    }
                    x = x.add(M);
                }
                let x_scales = t.x_scales.add(group * Q::G / QUANT_BLOCK * M);
                let at = if fused { half } else { group } * STRIP + t.column;
                for i in 0..M {
                    let x_scale = V::splat(*x_scales.add(i));
                    let x_sum = if Q::MINIMA {
                        V::splat(0.0).sub(B::floats(B::broadcast(x_sums.add(i).cast())))
                    } else {
                        x_scale
                    };
                    for r in 0..R {
                        let at = at + r * V::LANES;
                        let mut value = B::floats(dots[i][r]).mul(V::load(scales.add(at)));
                        if Q::MINIMA {
                            value = V::load(minima.add(at)).fma(x_sum, value);
                        }
                        acc[i][r] = value.fma(x_scale, acc[i][r]);
                    }
                }
                group += 1;
            }
            quants = quants.add(layout.sub_bytes());
            sub_of_block = if sub_of_block + 1 == subs { 0 } else { sub_of_block + 1 };
        }
        for i in 0..M {
            for r in 0..R {
                acc[i][r].store(t.sums.add(i * STRIP + r * V::LANES));
            }
        }
    }
}

/// Words `u` of the bit planes at `w` (see [`crate::packed`]), one to a lane, as bytes.
///
/// # Safety
/// The CPU has the features; `w` leads to the planes of 32 elements, at the first of the lanes' columns.
#[inline(always)]
unsafe fn unpack_word<V: Vector, B: BytesDot<V>, Q: Kind>(w: *const u8, u: usize) -> B::Ints {
    // SAFETY: by contract.
    unsafe {
        match Q::BITS {
            8 => plane_word::<V, B>(w, 0, 8, u).0,
            2 | 4 => {
                let (word, from) = plane_word::<V, B>(w, 0, Q::BITS, u);
                B::bits(word, from, Q::BITS as u32)
            }
            _ => {
                let (low, high) = if Q::BITS == 3 { (2, 1) } else { (4, Q::BITS - 4) };
                let (word, from) = plane_word::<V, B>(w, 0, low, u);
                let bits = B::bits(word, from, low as u32);
                let (word, from) = plane_word::<V, B>(w, low, high, u);
                B::top(bits, word, from, high as u32, low as u32)
            }
        }
    }
}

/// The word that holds quants `u` of the plane of `width` bits whose first row of words is `first`, and the bit at which they
/// begin in each byte. (A function and not a closure, which would be compiled without the features.)
///
/// # Safety
/// As [`unpack_word`].
#[inline(always)]
unsafe fn plane_word<V: Vector, B: BytesDot<V>>(w: *const u8, first: usize, width: usize, u: usize) -> (B::Ints, u32) {
    const WORD: usize = 4 * STRIP;
    // SAFETY: by contract: a plane of n bits has n rows of a word per column.
    (unsafe { B::load(w.add((first + u % width) * WORD).cast()) }, (u / width * width) as u32)
}
