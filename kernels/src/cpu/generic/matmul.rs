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

use super::bytes::{self, ByteTiles};
use super::rows::{GeluTanhMul, SiluMul};
use super::unpack;
use crate::cpu::operand::{Form, Operand};
use crate::cpu::vector::{Vector, WordsDot};
use crate::packed::{Layout, Packed, STRIP};
use std::ops::Range;

/// Rows of x up to which float weights are widened in registers, once per tile of rows, and not unpacked.
const WIDEN_ROWS: usize = 24;
/// Elements of k per chunk of float weights that are widened in registers: 16 KiB of 16-bit weights.
const FLOATS_WIDENED: usize = 128;
/// Elements of k per chunk of unpacked floats: a panel of four registers of columns (32 KiB) and a tile of x (3 KiB) stay in L1.
const FLOATS: usize = 128;
/// Rows of a tile up to which its neighbour's are not asked for: there is none, or they are near.
pub(super) const FEW_ROWS: usize = 3;
/// How far ahead of the weights being multiplied to ask for more, in bytes, when memory is the limit.
pub(super) const AHEAD: usize = 8192;

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

impl Job<'_> {
    /// The words of x of a tile, and those of the one after it: its own again for the last, because somebody asks for them.
    #[inline(always)]
    pub(super) fn words(&self, tile: usize) -> [*const u32; 2] {
        let span = self.x.tile(tile);
        let next = if tile + 1 < self.tiles.end { span.end } else { span.start };
        [self.x.words(span.start), self.x.words(next)]
    }
}

/// 16 floats, aligned to a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; 16]);

/// Reused memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[rows][64]`: the sums between chunks.
    pub(super) sums: Vec<Line>,
    /// The unpacked chunk: `[k][64]` floats, or `[k / 4][64][4]` bytes.
    pub(super) tile: Vec<Line>,
    /// `[k / group][64]`.
    pub(super) scales: Vec<Line>,
    pub(super) minima: Vec<Line>,
}

/// The first `floats` floats of a buffer that grows if it must.
pub(super) fn fit(buffer: &mut Vec<Line>, floats: usize) -> *mut f32 {
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
            (Layout::Quants(layout), Form::Bytes) => bytes::strip::<V, B>(job, &rows, &layout, data, scratch, sums),
            (_, form) => panic!("{} cannot be multiplied with {form:?}", job.w.dtype().name()),
        }
        finish::<V>(job, &rows, sums);
    }
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
pub(super) struct Ahead {
    pub(super) start: *const u8,
    pub(super) bytes: usize,
    /// Whether they are soon to be multiplied, once or twice each: then the first-level cache asks. What many rows pass over has
    /// that cache to itself, and more weights wait in the second level.
    pub(super) soon: bool,
}

impl Ahead {
    /// The part for call `index` of `calls` of `steps` steps each.
    #[inline(always)]
    pub(super) fn part(&self, index: usize, calls: usize, steps: usize) -> Part {
        let per_call = self.bytes.div_ceil(calls);
        let next = self.start.wrapping_add(index * per_call);
        Part { next, due: next, per_step: per_call.div_ceil(steps.max(1)), soon: self.soon }
    }
}

/// What one call asks for: a little at every step, because memory takes only so many requests at a time.
#[derive(Clone, Copy)]
pub(super) struct Part {
    next: *const u8,
    /// Up to where lines have been due.
    due: *const u8,
    per_step: usize,
    soon: bool,
}

impl Part {
    #[inline(always)]
    pub(super) fn step<V: Vector>(&mut self) {
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

pub(super) use by_rows;

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
                let first = units.start * D::STEPS * span.len();
                let [x, next] = job.words(tile);
                let start = w.start.add(column * w.column);
                let sums = sums.add((span.start - rows.start) * STRIP + column);
                by_rows!(
                    span.len(),
                    [float_tile],
                    [V, D],
                    V::FOUR,
                    ([x.add(first), next.wrapping_add(first)], start, w.unit, units.len(), ahead, sums, fresh)
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
