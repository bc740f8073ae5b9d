//! The matrix product of one strip: `y[m, 64] = x[m, k] · w[64, k]ᵀ`, from packed weights and prepared rows.
//!
//! ```text
//! for each chunk of k:
//!     if many rows are to pass: unpack the strip's weights of the chunk to a tile of f32 or of bytes
//!     for each four (or pair) of registers of columns:             the tile's columns stay in L1
//!         for each tile of rows:                                    up to 6 rows of x, in L1
//!             sums[rows][columns] += x · w, sums of floats in registers
//! finish: bias, residual or gate, and store
//! ```
//!
//! With few rows nothing is unpacked to memory: weights are widened in registers on their way from the strip.
//!
//! An output is one chain of additions in ascending k, from zero: which rows it was computed with, how k was cut into chunks
//! and where the sums rested between chunks cannot change its bits. With bytes, a link of the chain is a whole group of 16 or
//! 32 elements, whose integer dot product is exact in any order:
//! `sum += scale_x * (scale_w * (q·x - offset * Σx) - minimum_w * Σx)`.

use super::rows::{GeluTanhMul, SiluMul};
use super::unpack::{self, Lanes, Supers};
use crate::DType;
use crate::cpu::operand::{Form, Operand};
use crate::cpu::vector::{BytesDot, Vector, WordsDot};
use crate::packed::{Layout, Packed, QUANT_BLOCK, Quants, STRIP};
use std::ops::Range;

/// Rows of x up to which float weights are widened in registers, once per tile of rows, and not unpacked.
const WIDEN_ROWS: usize = 24;
/// Elements of k per chunk of float weights that are widened in registers: 16 KiB of 16-bit weights.
const FLOATS_WIDENED: usize = 128;
/// Elements of k per chunk of unpacked floats: a panel of four registers of columns (32 KiB) and a tile of x (3 KiB) stay in L1.
const FLOATS: usize = 128;
/// Elements of k per chunk of bytes, or a block if that is more: for one tile of rows, for two and for many.
const BYTES_ONCE: usize = 64;
const BYTES_TWICE: usize = 128;
const BYTES: usize = 512;
/// Rows of x up to which quants are unpacked in registers; those that are bytes have only scales to unpack.
const FUSED_ROWS: usize = 4;
const FUSED_ROWS_OF_BYTES: usize = 2;
/// Rows of a tile up to which its neighbour's are not asked for: there is none, or they are near.
const FEW_ROWS: usize = 3;
/// How far ahead of the weights being multiplied to ask for more, in bytes, when memory is the limit.
const AHEAD: usize = 8192;

/// What becomes of a product.
#[derive(Clone, Copy, Debug)]
pub enum Finish<'a> {
    /// `y = x·wᵀ (+ bias)`.
    Store(Option<&'a [f32]>),
    /// `y = y + (x·wᵀ (+ bias))`: a residual connection.
    Add(Option<&'a [f32]>),
    /// `y = act(x·gᵀ) * (x·uᵀ)`, for gated weights.
    Gate(Gate),
}

/// The activation of a gated product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gate {
    /// `x / (1 + e^-x)`.
    Silu,
    /// Gelu by its tanh approximation.
    GeluTanh,
}

/// One strip's product, by pointers because neighbouring columns of y are written by other threads.
pub(crate) struct Job<'a> {
    pub(crate) x: &'a Operand,
    /// Register tiles of x to compute.
    pub(crate) tiles: Range<usize>,
    pub(crate) w: &'a Packed<'a>,
    pub(crate) strip: usize,
    pub(crate) finish: Finish<'a>,
    /// Row 0 of y, and the distance of rows.
    pub(crate) y: *mut f32,
    pub(crate) y_stride: usize,
}

/// 16 floats, aligned to a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; 16]);

/// Reused memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[rows][64]`: the sums between chunks.
    sums: Vec<Line>,
    /// The unpacked chunk: `[k][64]` floats, or `[k / 4][64][4]` bytes.
    tile: Vec<Line>,
    /// `[k / group][64]`.
    scales: Vec<Line>,
    minima: Vec<Line>,
}

/// The first `floats` floats of a buffer that grows if it must.
fn fit(buffer: &mut Vec<Line>, floats: usize) -> *mut f32 {
    let lines = floats.div_ceil(16);
    if buffer.len() < lines {
        buffer.resize(lines, Line([0.0; 16]));
    }
    buffer.as_mut_ptr().cast()
}

/// Computes a [`Job`].
///
/// # Safety
/// The CPU has the features of `V`, `B` and (if the operand is in pairs) `P`; y is writable at the job's rows and columns, and
/// nobody else touches them. (x and w are checked by their types; that x is in a form that w can be multiplied with is asserted.)
#[inline(always)]
pub(crate) unsafe fn strip<V: Vector, P: WordsDot<V>, B: ByteTiles<V>>(job: &Job<'_>, scratch: &mut Scratch) {
    let rows = job.x.rows_of(job.tiles.clone());
    let sums = fit(&mut scratch.sums, rows.len() * STRIP);
    let data = job.w.strip(job.strip);
    let k = job.w.cols();
    assert_eq!(k, job.x.cols());
    let layout = Layout::of(job.w.dtype());
    // SAFETY: the features are passed on. The strip's bytes are as long as its layout says (checked when it was made), scratch
    // is as large as the chunk, and chunks stay inside k.
    unsafe {
        match (layout, job.x.form()) {
            (Layout::F32, Form::Floats) => widened::<V, Floats>(job, &rows, 0..k, data.as_ptr(), sums),
            (Layout::Bf16, Form::Pairs) => widened::<V, P>(job, &rows, 0..k.div_ceil(2), data.as_ptr(), sums),
            (Layout::F16, Form::Floats) if rows.len() <= WIDEN_ROWS => {
                widened::<V, Halves>(job, &rows, 0..k, data.as_ptr(), sums);
            }
            (Layout::Bf16, Form::Floats) if rows.len() <= WIDEN_ROWS && k.is_multiple_of(2) => {
                widened::<V, Bf16s>(job, &rows, 0..k / 2, data.as_ptr(), sums);
            }
            (Layout::Bf16 | Layout::F16, Form::Floats) => {
                let tile = fit(&mut scratch.tile, FLOATS * STRIP);
                let mut at = 0;
                while at < k {
                    // An odd last element of bf16 has a zero beside it in the tile, which is not multiplied.
                    let end = k.min(at + FLOATS);
                    let src = data.as_ptr().add(at * STRIP * 2);
                    match layout {
                        Layout::F16 => unpack::f16::<V>(src.cast(), end - at, tile),
                        _ => unpack::bf16::<V>(src.cast(), (end - at).div_ceil(2), tile),
                    }
                    let next = Ahead { start: src.add((end - at) * STRIP * 2), bytes: FLOATS * STRIP * 2, soon: false };
                    let panels = Columns::of_panels::<V>(tile.cast(), (end - at).next_multiple_of(2));
                    float_tiles::<V, Floats>(job, &rows, at..end, &panels, next, sums);
                    at = end;
                }
            }
            (Layout::Quants(layout), Form::Bytes) => quants::<V, B>(job, &rows, &layout, data, scratch, sums),
            (_, form) => panic!("{} cannot be multiplied with {form:?}", job.w.dtype().name()),
        }
        finish::<V>(job, &rows, sums);
    }
}

/// A strip of quantised weights, chunk by chunk.
///
/// # Safety
/// As [`strip`], whose strip is `data`.
#[inline(always)]
unsafe fn quants<V: Vector, B: ByteTiles<V>>(
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

/// Stands where an ISA has no dot product of pairs: operands in pairs are then never made.
pub(crate) struct NoPairs;

impl<V: Vector> WordsDot<V> for NoPairs {
    type Words = ();
    const BYTES: usize = 4;
    const STEPS: usize = 1;

    unsafe fn load(_: *const u8, _: usize) {}
    unsafe fn broadcast(_: *const u32) {}
    fn dot(_: V, (): (), (): ()) -> V {
        unreachable!("this instruction set multiplies no pairs")
    }
}

/// f32 weights.
struct Floats;

/// f16 weights.
struct Halves;

/// Pairs of bf16 weights, two steps of k to a word.
struct Bf16s;

macro_rules! multiply_floats {
    () => {
        type Words = V;

        #[inline(always)]
        unsafe fn broadcast(p: *const u32) -> V {
            // SAFETY: passed on.
            unsafe { V::splat(*p.cast()) }
        }
        #[inline(always)]
        fn dot(sum: V, a: V, b: V) -> V {
            a.fma(b, sum)
        }
    };
}

impl<V: Vector> WordsDot<V> for Floats {
    multiply_floats!();
    const BYTES: usize = 4;
    const STEPS: usize = 1;

    #[inline(always)]
    unsafe fn load(p: *const u8, _: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load(p.cast()) }
    }
}

impl<V: Vector> WordsDot<V> for Halves {
    multiply_floats!();
    const BYTES: usize = 2;
    const STEPS: usize = 1;

    #[inline(always)]
    unsafe fn load(p: *const u8, _: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f16(p) }
    }
}

impl<V: Vector> WordsDot<V> for Bf16s {
    multiply_floats!();
    const BYTES: usize = 4;
    const STEPS: usize = 2;

    #[inline(always)]
    unsafe fn load(p: *const u8, step: usize) -> V {
        // SAFETY: passed on.
        unsafe { V::load_half_of_pairs(p.cast(), step) }
    }
}

/// Weights multiplied as they come from the strip, in chunks, so that the second pair of columns finds them in L1.
///
/// # Safety
/// As [`float_tiles`], for all units of the strip.
#[inline(always)]
unsafe fn widened<V: Vector, D: WordsDot<V>>(
    job: &Job<'_>,
    rows: &Range<usize>,
    units: Range<usize>,
    w: *const u8,
    sums: *mut f32,
) {
    let once = job.tiles.len() == 1 && columns::<V>() == STRIP;
    let chunk = if once { units.len() } else { FLOATS_WIDENED / D::STEPS };
    for start in units.clone().step_by(chunk.max(1)) {
        let end = units.end.min(start + chunk);
        // SAFETY: passed on.
        unsafe {
            let w = w.add(start * STRIP * D::BYTES);
            let bytes = (end - start) * STRIP * D::BYTES;
            let ahead = Ahead { start: w.wrapping_add(if once { AHEAD } else { bytes }), bytes, soon: once };
            float_tiles::<V, D>(job, rows, start..end, &Columns::of_strip(w, D::BYTES), ahead, sums);
        }
    }
}

/// Weights to ask memory for while others are multiplied: without that, memory rests while registers work, and the hardware's
/// own prefetcher stops at each page.
#[derive(Clone, Copy)]
struct Ahead {
    start: *const u8,
    bytes: usize,
    /// Whether they are soon to be multiplied, once or twice each: then the first-level cache asks. What many rows pass over has
    /// that cache to itself, and more weights wait in the second level.
    soon: bool,
}

impl Ahead {
    /// The part for call `index` of `calls` of `steps` steps each.
    #[inline(always)]
    fn part(&self, index: usize, calls: usize, steps: usize) -> Part {
        let per_call = self.bytes.div_ceil(calls);
        let next = self.start.wrapping_add(index * per_call);
        Part { next, due: next, per_step: per_call.div_ceil(steps.max(1)), soon: self.soon }
    }
}

/// What one call asks for: a little at every step, because memory takes only so many requests at a time.
#[derive(Clone, Copy)]
struct Part {
    next: *const u8,
    /// Up to where lines have been due.
    due: *const u8,
    per_step: usize,
    soon: bool,
}

impl Part {
    #[inline(always)]
    fn step<V: Vector>(&mut self) {
        self.due = self.due.wrapping_add(self.per_step);
        while self.next < self.due {
            match self.soon {
                true => V::prefetch(self.next),
                false => V::prefetch_far(self.next),
            }
            self.next = self.next.wrapping_add(64);
        }
    }
}

/// Runs `f::<.., rows, registers>` for a tile of `$m` rows and four registers of columns, or two.
macro_rules! by_rows {
    ($m:expr, [$($f:tt)*], [$($type:tt)*], $four:expr, $arguments:tt) => {
        match ($m, $four) {
            (1, true) => $($f)*::<$($type)*, 1, 4> $arguments,
            (2, true) => $($f)*::<$($type)*, 2, 4> $arguments,
            (3, true) => $($f)*::<$($type)*, 3, 4> $arguments,
            (4, true) => $($f)*::<$($type)*, 4, 4> $arguments,
            (5, true) => $($f)*::<$($type)*, 5, 4> $arguments,
            (_, true) => $($f)*::<$($type)*, 6, 4> $arguments,
            (1, false) => $($f)*::<$($type)*, 1, 2> $arguments,
            (2, false) => $($f)*::<$($type)*, 2, 2> $arguments,
            (3, false) => $($f)*::<$($type)*, 3, 2> $arguments,
            (4, false) => $($f)*::<$($type)*, 4, 2> $arguments,
            (5, false) => $($f)*::<$($type)*, 5, 2> $arguments,
            (_, false) => $($f)*::<$($type)*, 6, 2> $arguments,
        }
    };
}

/// Columns of a register tile of floats.
#[inline(always)]
pub(super) const fn columns<V: Vector>() -> usize {
    if V::FOUR { 4 * V::LANES } else { 2 * V::LANES }
}

/// Where the weights of some columns lie, unit by unit of k.
struct Columns {
    start: *const u8,
    /// Bytes from one unit to the next.
    unit: usize,
    /// Bytes from one column to the next, for the columns that tiles begin with.
    column: usize,
}

impl Columns {
    /// As they are packed: `[units][64]` weights of so many bytes.
    #[inline(always)]
    fn of_strip(start: *const u8, bytes: usize) -> Columns {
        Columns { start, unit: STRIP * bytes, column: bytes }
    }

    /// As floats are unpacked for many rows: `[64 / c][units][c]`, where `c` columns are a tile's. What a tile passes over again
    /// and again then is contiguous: parts of the rows of a larger block would meet in some of a cache's sets.
    #[inline(always)]
    fn of_panels<V: Vector>(start: *const u8, units: usize) -> Columns {
        Columns { start, unit: columns::<V>() * 4, column: units * 4 }
    }
}

/// All tiles of rows against `units` units of k, whose weights are `w`.
///
/// # Safety
/// The CPU has `V`'s and `D`'s features; `w` has the units, `sums` leads to `rows` by 64 floats; x has the units.
#[inline(always)]
unsafe fn float_tiles<V: Vector, D: WordsDot<V>>(
    job: &Job<'_>,
    rows: &Range<usize>,
    units: Range<usize>,
    w: &Columns,
    ahead: Ahead,
    sums: *mut f32,
) {
    let fresh = units.start == 0;
    let mut call = 0;
    let columns = columns::<V>();
    let calls = STRIP / columns * job.tiles.len();
    for column in (0..STRIP).step_by(columns) {
        for tile in job.tiles.clone() {
            let span = job.x.tile(tile);
            let ahead = ahead.part(call, calls, units.len());
            call += 1;
            // SAFETY: the tile's words of x start at its first row times the words of a row; everything else is as by contract.
            unsafe {
                let x = job.x.words(span.start).add(units.start * D::STEPS * span.len());
                let next = if tile + 1 < job.tiles.end {
                    job.x.words(span.end).add(units.start * D::STEPS * span.len())
                } else {
                    x
                };
                let start = w.start.add(column * w.column);
                let sums = sums.add((span.start - rows.start) * STRIP + column);
                by_rows!(
                    span.len(),
                    [float_tile],
                    [V, D],
                    V::FOUR,
                    ([x, next], start, w.unit, units.len(), ahead, sums, fresh)
                );
            }
        }
    }
}

/// `M` rows by `R` registers of columns.
///
/// # Safety
/// The CPU has the features; `x` leads to `[units][steps][M]` words, `w` to `units` times `R` registers of weights, `unit` bytes
/// apart, `sums` to `M` rows of 64 floats, of which the first `R` registers are used. `next` is where the next tile's words are:
/// they are asked for, because the hardware's prefetcher sees no way from tile to tile.
#[inline(always)]
unsafe fn float_tile<V: Vector, D: WordsDot<V>, const M: usize, const R: usize>(
    [mut x, mut next]: [*const u32; 2],
    mut w: *const u8,
    unit: usize,
    units: usize,
    mut ahead: Part,
    sums: *mut f32,
    fresh: bool,
) {
    if M > V::FLOAT_ROWS || V::FOUR != (R == 4) {
        unreachable!("the operand's tiles have at most as many rows");
    }
    // SAFETY: by contract.
    unsafe {
        let mut acc = [[V::splat(0.0); R]; M];
        if !fresh {
            for i in 0..M {
                for r in 0..R {
                    acc[i][r] = V::load(sums.add(i * STRIP + r * V::LANES));
                }
            }
        }
        for _ in 0..units {
            ahead.step::<V>();
            if M > FEW_ROWS {
                V::prefetch(next.cast());
                next = next.wrapping_add(M * D::STEPS);
            }
            for step in 0..D::STEPS {
                let mut b = [D::load(w, step); R];
                for r in 1..R {
                    b[r] = D::load(w.add(r * V::LANES * D::BYTES), step);
                }
                for i in 0..M {
                    let a = D::broadcast(x.add(i));
                    for r in 0..R {
                        acc[i][r] = D::dot(acc[i][r], a, b[r]);
                    }
                }
                x = x.add(M);
            }
            w = w.add(unit);
        }
        for i in 0..M {
            for r in 0..R {
                acc[i][r].store(sums.add(i * STRIP + r * V::LANES));
            }
        }
    }
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
                let words = job.x.words(span.start).add(first * Q::G / 4);
                let t = ByteTile {
                    words,
                    next: if tile + 1 < job.tiles.end { job.x.words(span.end).add(first * Q::G / 4) } else { words },
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
            }
            if !fused {
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

/// Writes the sums where they belong.
///
/// # Safety
/// As [`strip`]; `sums` leads to `rows` by 64 floats.
#[inline(always)]
unsafe fn finish<V: Vector>(job: &Job<'_>, rows: &Range<usize>, sums: *mut f32) {
    let per_strip = if job.w.is_gated() { STRIP / 2 } else { STRIP };
    let first = job.strip * per_strip;
    let columns = per_strip.min(job.w.rows() - first);
    for row in rows.clone() {
        // SAFETY: the row of sums exists; the row's columns of y are the job's alone.
        let (sums, y) = unsafe {
            (
                std::slice::from_raw_parts_mut(sums.add((row - rows.start) * STRIP), STRIP),
                std::slice::from_raw_parts_mut(job.y.add(row * job.y_stride + first), columns),
            )
        };
        match job.finish {
            Finish::Store(bias) => {
                add_bias(sums, bias, first);
                y.copy_from_slice(&sums[..columns]);
            }
            Finish::Add(bias) => {
                add_bias(sums, bias, first);
                for (y, sum) in y.iter_mut().zip(&*sums) {
                    *y += sum;
                }
            }
            Finish::Gate(gate) => {
                let (g, u) = sums.split_at_mut(STRIP / 2);
                // SAFETY: the features are passed on.
                unsafe {
                    match gate {
                        Gate::Silu => super::rows::combine::<V, SiluMul>(g, u),
                        Gate::GeluTanh => super::rows::combine::<V, GeluTanhMul>(g, u),
                    }
                }
                y.copy_from_slice(&g[..columns]);
            }
        }
    }
}

#[inline(always)]
fn add_bias(sums: &mut [f32], bias: Option<&[f32]>, first: usize) {
    if let Some(bias) = bias {
        for (sum, bias) in sums.iter_mut().zip(&bias[first..]) {
            *sum += bias;
        }
    }
}
