//! The softmax as it is kept: per query a maximum, a sum and an output, over the keys seen so far.

use super::tile::{Element, Scales};
use super::{PAD, Run, SPLIT, TILE};
use crate::cpu::vector::{Vector, exp2};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// The state of a run's queries after some keys.
pub(super) struct Tally<'a> {
    /// Largest scaled score, times log2 e: then the powers are of 2, which cost half as much as those of e.
    pub(super) max: &'a mut [f32],
    /// Sum of `2^(score - max)`.
    pub(super) sum: &'a mut [f32],
    /// Sum of `2^(score - max) * value`, `[queries][width]`.
    pub(super) output: &'a mut [f32],
}

impl Tally<'_> {
    /// Lays a state of [`Run::state_len`] floats out.
    #[inline(always)]
    pub(super) fn new(state: &mut [f32], queries: usize) -> Tally<'_> {
        let (max, rest) = state.split_at_mut(queries.next_multiple_of(PAD));
        let (sum, output) = rest.split_at_mut(max.len());
        Tally { max, sum, output }
    }

    /// No key seen.
    #[inline(always)]
    pub(super) fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.output.fill(0.0);
    }
}

/// Reads up to a register of floats, zeros after them.
///
/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn read<V: Vector>(floats: &[f32]) -> V {
    // SAFETY: that many floats are there.
    unsafe {
        match floats.len() < V::LANES {
            true => V::load_first(floats.as_ptr(), floats.len()),
            false => V::load(floats.as_ptr()),
        }
    }
}

/// Writes as many lanes as there are floats.
///
/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn write<V: Vector>(v: V, floats: &mut [f32]) {
    // SAFETY: that many floats are there.
    unsafe {
        match floats.len() < V::LANES {
            true => v.store_first(floats.as_mut_ptr(), floats.len()),
            false => v.store(floats.as_mut_ptr()),
        }
    }
}

/// Turns the scores of the tile at `begin` into weights for the queries of `rows`, and brings maxima, sums and outputs so
/// far to the new maximum. The tile's values are still to be added.
///
/// # Safety
/// The CPU has `V`'s features. (Lengths are asserted.)
#[inline(always)]
pub(super) unsafe fn absorb<V: Vector, E: Element>(
    run: &Run<'_>,
    rows: Range<usize>,
    begin: usize,
    tally: &mut Tally<'_>,
    scores: &mut [f32],
    scales: &Scales,
) {
    let (group, width) = (run.group(), run.width());
    let factor = run.scale * E::UNIT * LOG2_E;
    let end = rows.end * group;
    // As many queries at a time as a register has lanes, so that what is one number per query is done for all of them.
    for first in (rows.start * group..end).step_by(V::LANES) {
        let block = first..end.min(first + V::LANES);
        let scores = scores[block.start * TILE..block.end * TILE].as_chunks_mut::<TILE>().0;
        let mut largest = [f32::NEG_INFINITY; PAD];
        for (i, scores) in scores.iter_mut().enumerate() {
            if E::SCALED {
                // SAFETY: the features, by contract.
                unsafe { multiply::<V>(scores, &scales.keys) };
            }
            let seen = run.seen((first + i) / group, begin);
            scores[..seen.start].fill(f32::NEG_INFINITY);
            scores[seen.end..].fill(f32::NEG_INFINITY);
            // SAFETY: the features, by contract.
            largest[i] = unsafe { max::<V>(scores) };
        }
        let mut rescale = [1.0; PAD];
        let mut sums = [0.0; PAD];
        // SAFETY: the features, by contract.
        unsafe {
            let old = read::<V>(&tally.max[block.clone()]);
            let new = read::<V>(&largest[..V::LANES]).mul(V::splat(factor)).max(old);
            // Before a query's first key the old maximum is -inf, and 2^-inf is 0 here as it should be.
            exp2(old.sub(new)).store(rescale.as_mut_ptr());
            write(new, &mut tally.max[block.clone()]);
            for (i, scores) in scores.iter_mut().enumerate() {
                sums[i] = weights::<V, E>(scores, factor, tally.max[first + i], &scales.values);
            }
            let sum = read::<V>(&tally.sum[block.clone()]).fma(read(&rescale[..V::LANES]), read(&sums[..V::LANES]));
            write(sum, &mut tally.sum[block.clone()]);
        }
        for (query, rescale) in block.zip(rescale) {
            if rescale != 1.0 {
                for o in &mut tally.output[query * width..][..width] {
                    *o *= rescale;
                }
            }
        }
    }
}

/// `scores *= scales`.
///
/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn multiply<V: Vector>(scores: &mut [f32; TILE], scales: &[f32; TILE]) {
    for at in (0..TILE).step_by(V::LANES) {
        // SAFETY: TILE is a multiple of every register.
        unsafe {
            let p = scores.as_mut_ptr().add(at);
            V::load(p).mul(V::load(scales.as_ptr().add(at))).store(p);
        }
    }
}

/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn max<V: Vector>(scores: &[f32; TILE]) -> f32 {
    // SAFETY: TILE is a multiple of every register.
    unsafe {
        let mut largest = V::load(scores.as_ptr());
        for at in (V::LANES..TILE).step_by(V::LANES) {
            largest = V::load(scores.as_ptr().add(at)).max(largest);
        }
        largest.largest()
    }
}

/// Scores to `2^(factor * score - max)`, times the values' scales where there are any; returns the sum without those.
///
/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn weights<V: Vector, E: Element>(scores: &mut [f32; TILE], factor: f32, max: f32, scales: &[f32; TILE]) -> f32 {
    // SAFETY: TILE is a multiple of every register.
    unsafe {
        let (factor, shift) = (V::splat(factor), V::splat(-max));
        let mut total = V::splat(0.0);
        for at in (0..TILE).step_by(V::LANES) {
            let p = scores.as_mut_ptr().add(at);
            let e = exp2(V::load(p).fma(factor, shift));
            total = total.add(e);
            if E::SCALED {
                e.mul(V::load(scales.as_ptr().add(at))).store(p);
            } else {
                e.store(p);
            }
        }
        total.sum()
    }
}

/// Takes the state of one split into the state of all splits before it. Queries that see no key of the split are left alone.
///
/// # Safety
/// The CPU has `V`'s features. (Lengths are asserted.)
#[inline(always)]
pub(super) unsafe fn merge<V: Vector>(run: &Run<'_>, split: usize, total: &mut Tally<'_>, part: &Tally<'_>) {
    let (group, width) = (run.group(), run.width());
    let rows = run.rows_seeing(split * SPLIT, SPLIT);
    let end = rows.end * group;
    for first in (rows.start * group..end).step_by(V::LANES) {
        let block = first..end.min(first + V::LANES);
        let (mut of_total, mut of_part) = ([0.0f32; PAD], [0.0f32; PAD]);
        // SAFETY: the features, by contract.
        unsafe {
            let (before, added) = (read::<V>(&total.max[block.clone()]), read::<V>(&part.max[block.clone()]));
            let max = before.max(added);
            let (a, b) = (exp2(before.sub(max)), exp2(added.sub(max)));
            let sum = read::<V>(&part.sum[block.clone()]).mul(b);
            let sum = read::<V>(&total.sum[block.clone()]).fma(a, sum);
            write(max, &mut total.max[block.clone()]);
            write(sum, &mut total.sum[block.clone()]);
            a.store(of_total.as_mut_ptr());
            b.store(of_part.as_mut_ptr());
        }
        for (i, query) in block.enumerate() {
            let into = &mut total.output[query * width..][..width];
            let from = &part.output[query * width..][..width];
            for at in (0..width).step_by(V::LANES) {
                // SAFETY: the features, by contract; a width is a multiple of every register.
                unsafe {
                    let into = into.as_mut_ptr().add(at);
                    let added = V::load(from.as_ptr().add(at)).mul(V::splat(of_part[i]));
                    V::load(into).fma(V::splat(of_total[i]), added).store(into);
                }
            }
        }
    }
}

/// Writes `output * unit / sum` of every query.
///
/// # Safety
/// The CPU has `V`'s features; the run's outputs are writable and nobody else touches them.
#[inline(always)]
pub(super) unsafe fn finish<V: Vector>(run: &Run<'_>, total: &Tally<'_>, unit: f32) {
    let (dim, width) = (run.fmt.head_dim, run.width());
    for query in 0..run.queries() {
        // SAFETY: query `i`'s output is ours to write.
        let out = unsafe { std::slice::from_raw_parts_mut(run.out.at(run.offset(query)), dim) };
        // SAFETY: the features, by contract.
        let inverse = unsafe { V::splat(unit / total.sum[query]) };
        for (out, o) in out.chunks_mut(V::LANES).zip(total.output[query * width..].chunks(V::LANES)) {
            // SAFETY: as above.
            unsafe { write(read::<V>(&o[..V::LANES]).mul(inverse), out) };
        }
    }
}
