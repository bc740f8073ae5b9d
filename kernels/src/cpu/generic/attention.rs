//! Causal attention over paged keys and values, one tile of keys at a time, with the softmax kept as it goes.
//!
//! For one key/value head and a run of queries:
//!
//! ```text
//! every query: maximum m = -inf, sum l = 0, output o = 0
//! for each tile of 64 keys, at positions 64 t .. 64 t + 64:
//!     decode its keys (transposed) and values to f32 scratch, across page borders
//!     scores[query][key] = scale * q . k                      (a small matrix product)
//!     for each query that sees a key of the tile:
//!         m' = max(m, its scores); p = e^(scores - m'), 0 where masked
//!         l = l e^(m - m') + sum p;  o = o e^(m - m') + sum p v;  m = m'
//! o / l is the answer
//! ```
//!
//! Tiles are cut at absolute positions, masked keys are skipped or weigh exactly 0, and a score is one chain of multiply-adds
//! over the head's elements. So a query's bits do not depend on the run it is computed in, nor on the page size. A run holds
//! all query heads of the key/value head, so grouped queries share every read of the cache.

use crate::DType;
use crate::cpu::vector::{Vector, exp};
use crate::kv::{AttentionItem, KvDtype, KvFormat};
use crate::quant::decode_row;

/// Keys per tile.
pub(crate) const TILE: usize = 64;
/// Most query rows per run: enough to pay for decoding a tile, few enough that their state stays in L2.
pub(crate) const RUN_ROWS: usize = 32;

/// A run of consecutive queries of one sequence against one key/value head.
pub(crate) struct Run<'a> {
    pub(crate) fmt: &'a KvFormat,
    pub(crate) pages: &'a [&'a [u8]],
    pub(crate) kv_head: usize,
    /// Query heads in all; `heads / kv_heads` of them belong to this run.
    pub(crate) heads: usize,
    /// Row of `q` and `out` of the first query, and how many queries.
    pub(crate) row: usize,
    pub(crate) rows: usize,
    /// Absolute position of the first query.
    pub(crate) start: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<usize>,
    /// `[.., heads, head_dim]`.
    pub(crate) q: &'a [f32],
    /// As `q`; by pointer because other runs write the other heads.
    pub(crate) out: *mut f32,
}

/// Reused memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// The tile as decoded, `[TILE][width]`: first the keys, then the values.
    tile: Vec<f32>,
    /// The keys transposed, `[width][TILE]`.
    keys: Vec<f32>,
    /// `[queries][TILE]`.
    scores: Vec<f32>,
    /// `[queries][width]`.
    output: Vec<f32>,
    /// Per query: running maximum and sum.
    max_sum: Vec<(f32, f32)>,
}

impl Run<'_> {
    fn group(&self) -> usize {
        self.heads / self.fmt.kv_heads
    }

    /// Offset in `q` and `out` of query `i` of the run; the heads of a row are neighbours.
    fn offset(&self, i: usize) -> usize {
        let group = self.group();
        ((self.row + i / group) * self.heads + self.kv_head * group + i % group) * self.fmt.head_dim
    }
}

/// Computes a run.
///
/// # Safety
/// The CPU has `V`'s features; `out` is writable at the run's rows and heads, and nobody else touches them. (Everything read
/// is a slice and checked.)
#[inline(always)]
pub(crate) unsafe fn attention<V: Vector>(run: &Run<'_>, scratch: &mut Scratch) {
    let dim = run.fmt.head_dim;
    // Rows of the scratch are whole registers; the padding is zero and stays so.
    let width = dim.next_multiple_of(V::LANES);
    let queries = run.rows * run.group();
    scratch.tile.clear();
    scratch.tile.resize(TILE * width, 0.0);
    scratch.keys.resize(TILE * width, 0.0);
    scratch.scores.resize(queries * TILE, 0.0);
    scratch.output.clear();
    scratch.output.resize(queries * width, 0.0);
    scratch.max_sum.clear();
    scratch.max_sum.resize(queries, (f32::NEG_INFINITY, 0.0));

    let first = AttentionItem::first_key(run.start, run.window);
    let end = run.start + run.rows;
    for tile in first / TILE..end.div_ceil(TILE) {
        let begin = tile * TILE;
        let keys = begin.max(first)..end.min(begin + TILE);
        let used = keys.start - begin..keys.end - begin;
        decode_half(run, keys.clone(), begin, width, false, &mut scratch.tile);
        // SAFETY: the features are passed on; each pointer is to scratch of the size set above.
        unsafe {
            transpose::<V>(&scratch.tile, width, &mut scratch.keys);
            scores::<V>(run, &scratch.keys, &mut scratch.scores);
        }
        decode_half(run, keys, begin, width, true, &mut scratch.tile);
        for row in 0..run.rows {
            let pos = run.start + row;
            let low = AttentionItem::first_key(pos, run.window).max(begin) - begin;
            let high = (pos + 1).min(begin + TILE).saturating_sub(begin);
            if low >= high {
                continue;
            }
            debug_assert!(used.start <= low && high <= used.end);
            let group = row * run.group()..(row + 1) * run.group();
            // SAFETY: as above; `low..high` lies inside the tile.
            unsafe { absorb::<V>(scratch, group, low, high, width, run.scale) };
        }
    }
    for i in 0..queries {
        let inverse = 1.0 / scratch.max_sum[i].1;
        // SAFETY: query `i`'s output is ours to write.
        let out = unsafe { std::slice::from_raw_parts_mut(run.out.add(run.offset(i)), dim) };
        for (out, o) in out.iter_mut().zip(&scratch.output[i * width..]) {
            *out = o * inverse;
        }
    }
}

/// Decodes keys (or values) of positions `range` into rows `position - begin` of `tile`, and clears the tile's other rows, so
/// that nothing left there can turn into NaN.
#[inline(always)]
fn decode_half(
    run: &Run<'_>,
    range: std::ops::Range<usize>,
    begin: usize,
    width: usize,
    values: bool,
    tile: &mut [f32],
) {
    let fmt = run.fmt;
    let dim = fmt.head_dim;
    let dtype = match fmt.dtype {
        KvDtype::F32 => DType::F32,
        KvDtype::F16 => DType::F16,
        KvDtype::BF16 => DType::BF16,
    };
    tile[..(range.start - begin) * width].fill(0.0);
    tile[(range.end - begin) * width..].fill(0.0);
    let base = if values { fmt.half_bytes() } else { 0 };
    for pos in range {
        let page = run.pages[pos / fmt.block_size];
        let bytes = fmt.row(run.kv_head, pos % fmt.block_size);
        let row = &mut tile[(pos - begin) * width..][..dim];
        decode_row(dtype, &page[base + bytes.start..base + bytes.end], row);
    }
}

/// `keys[d][key] = tile[key][d]`.
///
/// # Safety
/// The CPU has `V`'s features; both slices have `TILE * width` floats, `width` a multiple of the lanes (asserted).
#[inline(always)]
unsafe fn transpose<V: Vector>(tile: &[f32], width: usize, keys: &mut [f32]) {
    assert!(tile.len() >= TILE * width && keys.len() >= TILE * width && width.is_multiple_of(V::LANES));
    for d in (0..width).step_by(V::LANES) {
        for key in (0..TILE).step_by(V::LANES) {
            // SAFETY: the block of LANES by LANES is inside both.
            unsafe {
                let src = tile.as_ptr().add(key * width + d);
                V::transpose(src, width, keys.as_mut_ptr().add(d * TILE + key), TILE);
            }
        }
    }
}

/// Unscaled scores of every query of the run against the whole tile.
///
/// # Safety
/// The CPU has `V`'s features. (Lengths are asserted.)
#[inline(always)]
unsafe fn scores<V: Vector>(run: &Run<'_>, keys: &[f32], out: &mut [f32]) {
    let queries = run.rows * run.group();
    let dim = run.fmt.head_dim;
    assert!(keys.len() >= dim * TILE && out.len() >= queries * TILE);
    let mut i = 0;
    while i < queries {
        let n = (queries - i).min(V::TILE_QUERIES);
        let mut q = [run.q.as_ptr(); 6];
        for (j, q) in q.iter_mut().enumerate().take(n) {
            *q = run.q[run.offset(i + j)..][..dim].as_ptr();
        }
        let out = out[i * TILE..][..n * TILE].as_mut_ptr();
        // SAFETY: `n` pointers to `dim` floats, `dim * TILE` keys and room for `n * TILE` scores, all checked above.
        unsafe {
            match n {
                1 => score_strip::<V, 1>(&q, dim, keys.as_ptr(), out),
                2 => score_strip::<V, 2>(&q, dim, keys.as_ptr(), out),
                3 => score_strip::<V, 3>(&q, dim, keys.as_ptr(), out),
                4 => score_strip::<V, 4>(&q, dim, keys.as_ptr(), out),
                5 => score_strip::<V, 5>(&q, dim, keys.as_ptr(), out),
                _ => score_strip::<V, 6>(&q, dim, keys.as_ptr(), out),
            }
        }
        i += n;
    }
}

/// Scores of `N` queries.
///
/// # Safety
/// The CPU has `V`'s features; `q[..N]` each lead to `dim` floats, `keys` to `dim * TILE`, `out` to `N * TILE` writable ones.
#[inline(always)]
unsafe fn score_strip<V: Vector, const N: usize>(q: &[*const f32; 6], dim: usize, keys: *const f32, out: *mut f32) {
    // Four registers of keys at a time: with N queries that is 4 N accumulators.
    let step = 4 * V::LANES;
    for at in (0..TILE).step_by(step) {
        // SAFETY: TILE is a multiple of four registers on every ISA, so all offsets are inside what the caller vouches for.
        unsafe {
            let mut sums = [[V::splat(0.0); 4]; N];
            for d in 0..dim {
                let k = keys.add(d * TILE + at);
                let k =
                    [V::load(k), V::load(k.add(V::LANES)), V::load(k.add(2 * V::LANES)), V::load(k.add(3 * V::LANES))];
                for i in 0..N {
                    let q = V::splat(*q[i].add(d));
                    for j in 0..4 {
                        sums[i][j] = q.fma(k[j], sums[i][j]);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    sum.store(out.add(i * TILE + at + j * V::LANES));
                }
            }
        }
    }
}

/// Takes keys `low..high` of the tile into the state of one row's queries.
///
/// # Safety
/// The CPU has `V`'s features; the scratch is sized for `queries` of `width`; `low < high <= TILE`.
#[inline(always)]
unsafe fn absorb<V: Vector>(
    scratch: &mut Scratch,
    queries: std::ops::Range<usize>,
    low: usize,
    high: usize,
    width: usize,
    scale: f32,
) {
    let scores = &mut scratch.scores[queries.start * TILE..queries.end * TILE];
    let output = &mut scratch.output[queries.start * width..queries.end * width];
    for (i, scores) in scores.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        scores[..low].fill(f32::NEG_INFINITY);
        scores[high..].fill(f32::NEG_INFINITY);
        let (max, sum) = &mut scratch.max_sum[queries.start + i];
        // SAFETY: the features, by contract; each offset is inside the 64 scores or the `width` outputs.
        let rescale = unsafe {
            let p = scores.as_mut_ptr();
            let lanes = (0..TILE).step_by(V::LANES);
            let factor = V::splat(scale);
            let mut largest = V::splat(*max);
            for at in lanes.clone() {
                let s = V::load(p.add(at)).mul(factor);
                s.store(p.add(at));
                largest = s.max(largest);
            }
            let new_max = largest.largest();
            let shift = V::splat(new_max);
            let mut total = V::splat(0.0);
            for at in lanes {
                let e = exp(V::load(p.add(at)).sub(shift));
                e.store(p.add(at));
                total = total.add(e);
            }
            // A first tile has m = -inf, and e^-inf is 0 here as it should be. `sum` broadcasts so that one lane can be read.
            let rescale = exp(V::splat(*max - new_max)).largest();
            *max = new_max;
            *sum = *sum * rescale + total.sum();
            rescale
        };
        if rescale != 1.0 {
            for o in &mut output[i * width..][..width] {
                *o *= rescale;
            }
        }
    }
    let values = &scratch.tile[..high * width];
    let mut i = 0;
    let count = queries.len();
    while i < count {
        let n = (count - i).min(4);
        let (p, o) = (scores[i * TILE..].as_ptr(), output[i * width..].as_mut_ptr());
        // SAFETY: `n` queries' scores and outputs start there, and `high` rows of values exist.
        unsafe {
            match n {
                1 => weigh::<V, 1>(p, values, low, high, width, o),
                2 => weigh::<V, 2>(p, values, low, high, width, o),
                3 => weigh::<V, 3>(p, values, low, high, width, o),
                _ => weigh::<V, 4>(p, values, low, high, width, o),
            }
        }
        i += n;
    }
}

/// `o[i] += sum over keys low..high of p[i][key] * values[key]` for `N` queries.
///
/// # Safety
/// The CPU has `V`'s features; `p` leads to `N * TILE` floats, `o` to `N * width` writable ones, `values` has `high` rows.
#[inline(always)]
unsafe fn weigh<V: Vector, const N: usize>(
    p: *const f32,
    values: &[f32],
    low: usize,
    high: usize,
    width: usize,
    o: *mut f32,
) {
    let mut at = 0;
    while at < width {
        // Two registers of the head at a time keep 2 N accumulators busy; a single one finishes an odd width.
        let pair = at + 2 * V::LANES <= width;
        // SAFETY: `at` and the registers after it are below `width`; keys are below `high`.
        unsafe {
            if pair {
                weigh_registers::<V, N, 2>(p, values.as_ptr().add(at), low, high, width, o.add(at));
                at += 2 * V::LANES;
            } else {
                weigh_registers::<V, N, 1>(p, values.as_ptr().add(at), low, high, width, o.add(at));
                at += V::LANES;
            }
        }
    }
}

/// [`weigh`] for `R` registers of the head.
///
/// # Safety
/// As [`weigh`], with `values` and `o` moved to the first of the registers.
#[inline(always)]
unsafe fn weigh_registers<V: Vector, const N: usize, const R: usize>(
    p: *const f32,
    values: *const f32,
    low: usize,
    high: usize,
    width: usize,
    o: *mut f32,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[V::splat(0.0); R]; N];
        for (i, sums) in sums.iter_mut().enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = V::load(o.add(i * width + r * V::LANES));
            }
        }
        for key in low..high {
            let mut v = [V::load(values.add(key * width)); R];
            for r in 1..R {
                v[r] = V::load(values.add(key * width + r * V::LANES));
            }
            for i in 0..N {
                let weight = V::splat(*p.add(i * TILE + key));
                for r in 0..R {
                    sums[i][r] = weight.fma(v[r], sums[i][r]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                sum.store(o.add(i * width + r * V::LANES));
            }
        }
    }
}
