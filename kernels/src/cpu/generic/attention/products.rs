//! The two products of attention, in register tiles: queries with keys, weights with values.

use super::softmax::Tally;
use super::tile::{Decoded, Element, Keys};
use super::{Run, TILE};
use crate::cpu::vector::Vector;
use std::ops::Range;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The values of a tile.
pub(crate) enum Values<'a> {
    /// In the run's pages.
    Pages(&'a Run<'a>),
    /// In `[TILE][width]` floats.
    Tile(&'a [f32]),
}

impl Values<'_> {
    /// Where the value at `begin + key` starts, how many rows follow one another from there (the tile's end counts as an
    /// end), and how far apart they are in bytes.
    #[inline(always)]
    fn rows_from(&self, run: &Run<'_>, begin: usize, key: usize) -> (*const u8, usize, usize) {
        match self {
            Values::Pages(run) => {
                let (fmt, pos) = (run.fmt, begin + key);
                let (slot, row) = (pos % fmt.block_size, fmt.head_dim * fmt.dtype.bytes());
                let count = (fmt.block_size - slot).min(TILE - key);
                let at = fmt.value(run.kv_head, slot);
                (run.pages[pos / fmt.block_size][at..at + count * row].as_ptr(), count, row)
            }
            Values::Tile(tile) => {
                let width = run.width();
                (tile[key * width..TILE * width].as_ptr().cast(), TILE - key, width * Decoded::BYTES)
            }
        }
    }
}

/// The tile that comes next, as a run and the tile's first position. Its keys and values are asked for while this tile's are
/// multiplied, as many bytes at a time as are read: memory would rest otherwise, and a core waits when it has more than a few
/// dozen requests open.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    pub(crate) run: &'a Run<'a>,
    pub(crate) begin: usize,
}

impl Ahead<'_> {
    /// About where value `key` of the tile lies; a key past the last page is somewhere.
    #[inline(always)]
    fn value(&self, key: usize) -> *const u8 {
        let (fmt, pos) = (self.run.fmt, self.begin + key);
        let page = self.run.pages[(pos / fmt.block_size).min(self.run.pages.len() - 1)];
        page.as_ptr().wrapping_add(fmt.value(self.run.kv_head, pos % fmt.block_size))
    }

    /// Asks for the values of some keys of the tile, and for as large a part of its keys: these lie across one another.
    #[inline(always)]
    fn ask<V: Vector>(&self, keys: Range<usize>) {
        let fmt = self.run.fmt;
        let between = fmt.value(self.run.kv_head, 0) - fmt.key(self.run.kv_head, 0, 0);
        for key in keys {
            let value = self.value(key);
            for line in (0..fmt.head_dim * fmt.dtype.bytes()).step_by(LINE) {
                V::prefetch_far(value.wrapping_add(line));
                V::prefetch_far(value.wrapping_sub(between).wrapping_add(line));
            }
        }
    }
}

/// The register tiles, each compiled as a function of its own: inlined, some hundred of them (types by lengths) would make one
/// function that takes the compiler many minutes.
pub(crate) trait Strips: Vector {
    /// [`score`] for `N` queries.
    ///
    /// # Safety
    /// As [`score`]; `q[..N]` each lead to `dim` floats, `out` to `N * TILE` writable ones.
    unsafe fn score_strip<E: Element, const N: usize>(
        q: &[*const f32; 6],
        dim: usize,
        keys: &Keys,
        ahead: &Keys,
        count: usize,
        out: *mut f32,
    );

    /// `out[i] += sum over keys of weights[i][key] * value[key]` for `N` queries.
    ///
    /// # Safety
    /// As [`weigh`]; `weights` leads to `N * TILE` floats, `out` to `N * width` writable ones, the keys are inside the tile.
    unsafe fn weigh_strip<E: Element, const N: usize>(
        strip: &Strip<'_>,
        weights: *const f32,
        keys: Range<usize>,
        out: *mut f32,
    );
}

/// Calls `$kernel::<E, N>` for a strip of `$n` queries, at most six; the lengths that an ISA never has are not compiled.
macro_rules! for_strip {
    ($n:expr, $kernel:ident($($argument:expr),*)) => {
        if const { V::TILE_QUERIES <= 2 } {
            match $n {
                1 => V::$kernel::<E, 1>($($argument),*),
                _ => V::$kernel::<E, 2>($($argument),*),
            }
        } else {
            match $n {
                1 => V::$kernel::<E, 1>($($argument),*),
                2 => V::$kernel::<E, 2>($($argument),*),
                3 => V::$kernel::<E, 3>($($argument),*),
                4 => V::$kernel::<E, 4>($($argument),*),
                5 => V::$kernel::<E, 5>($($argument),*),
                _ => V::$kernel::<E, 6>($($argument),*),
            }
        }
    };
}

/// Strips of nearly equal length, at most `V::TILE_QUERIES`: the length of the next one of those that cover `left` queries.
#[inline(always)]
fn strip<V: Vector>(left: usize) -> usize {
    left.div_ceil(left.div_ceil(V::TILE_QUERIES))
}

/// Products of some of the run's queries with the keys they see of the tile at `begin` (and others, which mean nothing), into
/// their rows of `scores` `[queries][TILE]`. The keys of `ahead` are asked for; its values too if the keys are decoded.
///
/// # Safety
/// The CPU has `V`'s features; the keys are `E`s of the run's head. (Lengths are asserted.)
#[inline(always)]
pub(super) unsafe fn score<V: Strips, E: Element>(
    run: &Run<'_>,
    queries: Range<usize>,
    begin: usize,
    keys: &Keys,
    ahead: Ahead<'_>,
    scores: &mut [f32],
) {
    let dim = run.fmt.head_dim;
    let next = if E::NEAR { *keys } else { Keys::of_pages::<V>(ahead.run, ahead.begin) };
    let share = |i: usize| (i - queries.start) * TILE / queries.len();
    let mut i = queries.start;
    while i < queries.end {
        let n = strip::<V>(queries.end - i);
        if E::NEAR {
            ahead.ask::<V>(share(i)..share(i + n));
        }
        let mut q = [run.q.as_ptr(); 6];
        for (j, q) in q.iter_mut().enumerate().take(n) {
            *q = run.q[run.offset(i + j)..][..dim].as_ptr();
        }
        // The last query of a strip sees the most.
        let count = run.seen((i + n - 1) / run.group(), begin).end;
        let out = scores[i * TILE..][..n * TILE].as_mut_ptr();
        // SAFETY: `n` pointers to `dim` floats and room for `n * TILE` scores, checked above; the keys by contract.
        unsafe { for_strip!(n, score_strip(&q, dim, keys, &next, count, out)) };
        i += n;
    }
}

/// The body of [`Strips::score_strip`].
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn score_strip<V: Vector, E: Element, const N: usize>(
    q: &[*const f32; 6],
    dim: usize,
    keys: &Keys,
    ahead: &Keys,
    count: usize,
    out: *mut f32,
) {
    // Four registers of keys at a time: with N queries that is 4 N accumulators.
    for at in (0..count).step_by(4 * V::LANES) {
        let mut k = keys.four(at / V::LANES);
        let mut next = ahead.four(at / V::LANES);
        // SAFETY: TILE is a multiple of four registers on every ISA, so all offsets are inside what the caller vouches for.
        unsafe {
            let mut sums = [[V::splat(0.0); 4]; N];
            for d in 0..dim {
                let mut loaded = [V::splat(0.0); 4];
                [loaded[0], loaded[1]] = E::load_dealt::<V>(k[0], k[1]);
                [loaded[2], loaded[3]] = E::load_dealt::<V>(k[2], k[3]);
                for j in 0..4 {
                    k[j] = k[j].wrapping_add(keys.stride);
                    // Registers may be shorter than lines.
                    if !E::NEAR && next[j].addr() % LINE < V::LANES * E::BYTES {
                        V::prefetch_far(next[j]);
                    }
                    next[j] = next[j].wrapping_add(ahead.stride);
                }
                for i in 0..N {
                    let q = V::splat(*q[i].add(d));
                    for j in 0..4 {
                        sums[i][j] = q.fma(loaded[j], sums[i][j]);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (p, pair) in sums.as_chunks::<2>().0.iter().enumerate() {
                    let [a, b] = E::undeal(*pair);
                    a.store(out.add(i * TILE + at + 2 * p * V::LANES));
                    b.store(out.add(i * TILE + at + (2 * p + 1) * V::LANES));
                }
            }
        }
    }
}

/// Adds, for each query of `rows`, the values of the keys it sees in the tile at `begin`, times their weights
/// `[queries][TILE]`, in the order of the keys. The values of `ahead` are asked for, unless these are decoded.
///
/// # Safety
/// The CPU has `V`'s features; the values are `E`s. (Lengths are asserted.)
#[inline(always)]
pub(super) unsafe fn weigh<V: Strips, E: Element>(
    run: &Run<'_>,
    rows: Range<usize>,
    begin: usize,
    values: &Values<'_>,
    ahead: Ahead<'_>,
    tally: &mut Tally<'_>,
    weights: &[f32],
) {
    let (group, width) = (run.group(), run.width());
    let end = rows.end * group;
    let mut i = rows.start * group;
    while i < end {
        let n = strip::<V>(end - i);
        let weights = weights[i * TILE..][..n * TILE].as_ptr();
        let out = tally.output[i * width..][..n * width].as_mut_ptr();
        let strip = Strip { run, begin, values, ahead, width };
        let seen = |j: usize| run.seen((i + j) / group, begin);
        let (first, last) = (seen(0), seen(n - 1));
        // SAFETY: weights and outputs of `n` queries start there; seen keys are inside tile and pages.
        unsafe {
            if first == last {
                for_strip!(n, weigh_strip(&strip, weights, first, out));
            } else if last.start < first.end {
                // What only some of the queries see comes before what they share, or after it.
                for j in 0..n {
                    let before = seen(j).start..last.start;
                    V::weigh_strip::<E, 1>(&strip, weights.add(j * TILE), before, out.add(j * width));
                }
                for_strip!(n, weigh_strip(&strip, weights, last.start..first.end, out));
                for j in 0..n {
                    let after = first.end..seen(j).end;
                    V::weigh_strip::<E, 1>(&strip, weights.add(j * TILE), after, out.add(j * width));
                }
            } else {
                for j in 0..n {
                    V::weigh_strip::<E, 1>(&strip, weights.add(j * TILE), seen(j), out.add(j * width));
                }
            }
        }
        i += n;
    }
}

/// What the strips of a tile share.
pub(crate) struct Strip<'a> {
    run: &'a Run<'a>,
    begin: usize,
    values: &'a Values<'a>,
    ahead: Ahead<'a>,
    width: usize,
}

/// The body of [`Strips::weigh_strip`].
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn weigh_strip<V: Vector, E: Element, const N: usize>(
    strip: &Strip<'_>,
    weights: *const f32,
    keys: Range<usize>,
    out: *mut f32,
) {
    let span = strip.run.fmt.head_dim.next_multiple_of(V::LANES);
    let mut at = 0;
    // SAFETY: registers below `span` are inside a row: `is_direct` sees to it for pages, padding for the tile.
    unsafe {
        while at + 4 * V::LANES <= span {
            weigh_registers::<V, E, N, 4>(strip, weights, keys.clone(), at, out.add(at));
            at += 4 * V::LANES;
        }
        while at < span {
            weigh_registers::<V, E, N, 1>(strip, weights, keys.clone(), at, out.add(at));
            at += V::LANES;
        }
    }
}

/// [`weigh_strip`] for the `R` registers of each value from element `at` on, where `out` leads to.
///
/// # Safety
/// As [`weigh_strip`], and the registers are inside the rows.
#[inline(always)]
unsafe fn weigh_registers<V: Vector, E: Element, const N: usize, const R: usize>(
    strip: &Strip<'_>,
    weights: *const f32,
    keys: Range<usize>,
    at: usize,
    out: *mut f32,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[V::splat(0.0); R]; N];
        for (i, sums) in sums.iter_mut().enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = V::load(out.add(i * strip.width + r * V::LANES));
            }
            for pair in sums.as_chunks_mut::<2>().0 {
                *pair = E::deal(*pair);
            }
        }
        let mut key = keys.start;
        while key < keys.end {
            let (values, count, stride) = strip.values.rows_from(strip.run, strip.begin, key);
            let count = count.min(keys.end - key);
            let ahead = strip.ahead.value(key).wrapping_add(at * E::BYTES);
            let (values, weights) = (values.add(at * E::BYTES), weights.add(key));
            for key in 0..count {
                let row = values.add(key * stride);
                if !E::NEAR {
                    for line in (0..R * V::LANES * E::BYTES).step_by(LINE) {
                        V::prefetch_far(ahead.wrapping_add(key * stride + line));
                    }
                }
                let mut v = [V::splat(0.0); R];
                let (pairs, single) = v.as_chunks_mut::<2>();
                for (p, pair) in pairs.iter_mut().enumerate() {
                    *pair = E::load_dealt_neighbours::<V>(row.add(2 * p * V::LANES * E::BYTES));
                }
                for last in single {
                    *last = E::load::<V>(row.add((R - 1) * V::LANES * E::BYTES));
                }
                for i in 0..N {
                    let weight = V::splat(*weights.add(i * TILE + key));
                    for r in 0..R {
                        sums[i][r] = weight.fma(v[r], sums[i][r]);
                    }
                }
            }
            key += count;
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            for pair in sums.as_chunks_mut::<2>().0 {
                *pair = E::undeal(*pair);
            }
            for (r, sum) in sums.iter().enumerate() {
                sum.store(out.add(i * strip.width + r * V::LANES));
            }
        }
    }
}
