//! Causal attention over paged keys and values: splits of the context, tiles of a split, and a softmax kept as it goes.
//!
//! For one key/value head and a run of queries:
//!
//! ```text
//! every query: maximum M = -inf, sum L = 0, output O = 0
//! for each split of 512 keys, at positions 512 s .. 512 s + 512:
//!     m = -inf, l = 0, o = 0
//!     for each tile of 128 keys of the split:
//!         scores[query][key] = q . k
//!         for each query that sees a key of the tile:
//!             m' = max(m, scale * its scores); p = 2^(scale * score - m'), 0 where masked
//!             l = l 2^(m - m') + sum p;  o = o 2^(m - m') + sum p v;  m = m'
//!     M' = max(M, m); L = L 2^(M - M') + l 2^(m - M'); O likewise; M = M'
//! O / L is the answer; log2 e is part of the scale, so that powers are of 2
//! ```
//!
//! Splits and tiles are cut at absolute positions, a key outside a query's view is skipped or weighs exactly 0, a score is one
//! chain of multiply-adds over the head's elements and an output one over the keys. So a query's bits do not depend on the
//! run it is computed in, nor on the page size; and the splits of a run may be computed apart, by any threads, and be
//! joined in ascending order later ([`join`]): that is the same arithmetic again. It is how one long sequence occupies all
//! threads.
//!
//! A run holds all query heads of the key/value head, so grouped queries share every read of the cache. Few queries read
//! pages directly; many share a tile decoded to f32 ([`tile`]).

pub(crate) mod products;
mod softmax;
pub(crate) mod tile;

use crate::cpu::Shared;
use crate::cpu::vector::Vector;
use crate::kv::{AttentionItem, KvDtype, KvFormat};
use products::{Ahead, Strips, Values, score, weigh};
use softmax::{Tally, absorb, finish, merge};
use std::ops::Range;
use tile::{Brain, Decoded, Element, Fp8, Half, Int8, Keys, Scales, Single};

/// Keys per tile: what is done once per tile costs a fifth as much as the products with 64 keys, and a tenth with these.
pub(crate) const TILE: usize = 128;
/// Keys per split. A split of a head of 64 in bf16 is 128 KiB, about 10 us of memory time: a hundred times what it costs to
/// hand out a task, and joining its result is 1 % of computing it. Shorter would serve more threads than machines have.
pub(crate) const SPLIT: usize = 512;
/// Most queries of a run (rows times grouped heads), unless one row has more. The more, the less is decoded: a tile once per run;
/// these, their scores and their outputs just stay in the second-level cache.
pub(crate) const RUN_QUERIES_MAX: usize = 384;
/// Queries that pay for decoding a tile: where threads are many, runs become as short as this to occupy them all.
pub(crate) const RUN_QUERIES_MIN: usize = 96;
/// Rows of scratch are multiples of this many floats, the widest register.
const PAD: usize = 16;

/// A run of consecutive queries of one sequence against one key/value head.
#[derive(Clone)]
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
    /// As `q`; shared because other runs write the other heads.
    pub(crate) out: Shared<f32>,
}

/// Some splits of a run, to be computed by one task.
pub(crate) struct Piece<'a> {
    pub(crate) run: Run<'a>,
    pub(crate) splits: Range<usize>,
    /// Where the states of all the run's splits go, [`Run::state_len`] floats each, to be joined later. None for a piece that
    /// is the whole run and writes its output.
    pub(crate) states: Option<*mut f32>,
    /// What this thread will probably compute next: a run and one of its splits.
    pub(crate) next: Option<(Run<'a>, usize)>,
}

/// Reused memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Keys of a tile, transposed: `[head_dim][TILE]`.
    keys: Floats,
    /// Values of a tile, `[TILE][width]`.
    values: Floats,
    /// Scales of a tile's keys and of its values, for types that have them.
    scales: Scales,
    /// `[queries][TILE]`.
    scores: Floats,
    /// State of the current split.
    state: Floats,
    /// State of the splits so far.
    total: Floats,
}

/// Floats at a cache line's start, so that no register of them lies across two lines.
#[derive(Default)]
pub(crate) struct Floats(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; PAD]);

impl Floats {
    /// The first `len` floats, left over from earlier use or zero.
    #[inline(always)]
    pub(crate) fn floats(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(PAD);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; PAD]));
        }
        // SAFETY: a line is 16 floats and nothing else, and there are enough lines.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

impl Run<'_> {
    fn group(&self) -> usize {
        self.heads / self.fmt.kv_heads
    }

    fn queries(&self) -> usize {
        self.rows * self.group()
    }

    /// Offset in `q` and `out` of query `i` of the run; the heads of a row are neighbours.
    fn offset(&self, i: usize) -> usize {
        let group = self.group();
        ((self.row + i / group) * self.heads + self.kv_head * group + i % group) * self.fmt.head_dim
    }

    /// The splits that the run's queries see.
    pub(crate) fn splits(&self) -> Range<usize> {
        self.first_key() / SPLIT..(self.start + self.rows).div_ceil(SPLIT)
    }

    /// Floats of the state of the run after some keys: per query a maximum, a sum and an output.
    pub(crate) fn state_len(&self) -> usize {
        2 * self.queries().next_multiple_of(PAD) + self.queries() * self.width()
    }

    /// Floats per output of a state and per value of a tile.
    fn width(&self) -> usize {
        self.fmt.head_dim.next_multiple_of(PAD)
    }

    fn first_key(&self) -> usize {
        AttentionItem::first_key(self.start, self.window)
    }

    /// Where the first tile of a split begins.
    fn first_tile(&self, split: usize) -> usize {
        self.first_key().max(split * SPLIT) / TILE * TILE
    }

    /// The rows that see one of the keys at `begin..begin + len`.
    fn rows_seeing(&self, begin: usize, len: usize) -> Range<usize> {
        let first = begin.saturating_sub(self.start).min(self.rows);
        let last = match self.window {
            // The last position that sees key `begin + len - 1` is `w - 1` further.
            Some(w) => (begin + len + w.max(1) - 1).saturating_sub(self.start).min(self.rows),
            None => self.rows,
        };
        first..last.max(first)
    }

    /// The keys that a row sees of the tile at `begin`, counted from there; not empty for a row that sees one.
    fn seen(&self, row: usize, begin: usize) -> Range<usize> {
        let pos = self.start + row;
        let low = AttentionItem::first_key(pos, self.window).max(begin) - begin;
        low..(pos + 1).min(begin + TILE) - begin
    }
}

/// Computes a piece.
///
/// # Safety
/// The CPU has `V`'s features. Without states, `out` is writable at the run's rows and heads and nobody else touches them; with
/// them, the states of the piece's splits are. (Everything read is a slice and checked.)
#[inline(always)]
pub(crate) unsafe fn attention<V: Strips>(piece: &Piece<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on.
    unsafe {
        match piece.run.fmt.dtype {
            KvDtype::F32 => compute::<V, Single>(piece, scratch),
            KvDtype::F16 => compute::<V, Half>(piece, scratch),
            KvDtype::BF16 => compute::<V, Brain>(piece, scratch),
            KvDtype::Fp8 => compute::<V, Fp8>(piece, scratch),
            KvDtype::Int8 => compute::<V, Int8>(piece, scratch),
        }
    }
}

/// [`attention`] for one type of cache.
///
/// # Safety
/// As [`attention`]; `E` is the type of the run's pages.
#[inline(always)]
unsafe fn compute<V: Strips, E: Element>(piece: &Piece<'_>, scratch: &mut Scratch) {
    let run = &piece.run;
    let (len, first) = (run.state_len(), run.splits().start);
    let mut total = std::mem::take(&mut scratch.total);
    let mut state = std::mem::take(&mut scratch.state);
    let mut so_far = Tally::new(total.floats(len), run.queries());
    so_far.clear();
    for split in piece.splits.clone() {
        let ahead = match &piece.next {
            _ if split + 1 < piece.splits.end => Ahead { run, begin: run.first_tile(split + 1) },
            Some((run, split)) => Ahead { run, begin: run.first_tile(*split) },
            None => Ahead { run, begin: run.first_tile(split) },
        };
        // SAFETY: the features, and that the state is ours to write, by contract.
        unsafe {
            if let Some(states) = piece.states {
                let state = std::slice::from_raw_parts_mut(states.add((split - first) * len), len);
                compute_split::<V, E>(run, split, ahead, &mut Tally::new(state, run.queries()), scratch);
            } else {
                let mut part = Tally::new(state.floats(len), run.queries());
                compute_split::<V, E>(run, split, ahead, &mut part, scratch);
                merge::<V>(run, split, &mut so_far, &part);
            }
        }
    }
    if piece.states.is_none() {
        // SAFETY: the outputs are ours to write, by contract.
        unsafe { finish::<V>(run, &so_far, E::UNIT) };
    }
    (scratch.total, scratch.state) = (total, state);
}

/// Joins the states of all splits of a run, in ascending order, and writes the run's output.
///
/// # Safety
/// As [`attention`] without states; `states` leads to [`Run::state_len`] floats for each of the run's splits, which nobody
/// writes.
#[inline(always)]
pub(crate) unsafe fn join<V: Vector>(run: &Run<'_>, states: *mut f32, scratch: &mut Scratch) {
    let len = run.state_len();
    let mut total = Tally::new(scratch.total.floats(len), run.queries());
    total.clear();
    for (i, split) in run.splits().enumerate() {
        // SAFETY: by contract.
        unsafe {
            let state = std::slice::from_raw_parts_mut(states.add(i * len), len);
            merge::<V>(run, split, &mut total, &Tally::new(state, run.queries()));
        }
    }
    let unit = match run.fmt.dtype {
        KvDtype::Fp8 => Fp8::UNIT,
        KvDtype::F32 | KvDtype::F16 | KvDtype::BF16 | KvDtype::Int8 => 1.0,
    };
    // SAFETY: by contract.
    unsafe { finish::<V>(run, &total, unit) };
}

/// The state of the run's queries over the keys of one split; `after` is the tile after its last one.
///
/// # Safety
/// As [`compute`].
#[inline(always)]
unsafe fn compute_split<V: Strips, E: Element>(
    run: &Run<'_>,
    split: usize,
    after: Ahead<'_>,
    tally: &mut Tally<'_>,
    scratch: &mut Scratch,
) {
    tally.clear();
    let Scratch { keys, values, scales, scores, .. } = scratch;
    let scores = scores.floats(run.queries() * TILE);
    let direct = tile::is_direct::<V>(run);
    let end = run.start + run.rows;
    let (from, to) = (run.first_key().max(split * SPLIT), end.min((split + 1) * SPLIT));
    for begin in (from / TILE * TILE..to).step_by(TILE) {
        let rows = run.rows_seeing(begin, TILE);
        let queries = rows.start * run.group()..rows.end * run.group();
        let used = begin.max(from)..to.min(begin + TILE);
        if E::SCALED {
            tile::load_scales(run, begin, used.clone(), scales);
        }
        let ahead = if begin + TILE < to { Ahead { run, begin: begin + TILE } } else { after };
        // SAFETY: the features and the type, by contract.
        unsafe {
            if direct {
                score::<V, E>(run, queries, begin, &Keys::of_pages::<V>(run, begin), ahead, scores);
                absorb::<V, E>(run, rows.clone(), begin, tally, scores, scales);
                weigh::<V, E>(run, rows, begin, &Values::Pages(run), ahead, tally, scores);
            } else {
                let keys = Keys::of_tile::<V>(tile::decode_keys::<V, E>(run, begin, used.clone(), keys));
                score::<V, Decoded>(run, queries, begin, &keys, ahead, scores);
                absorb::<V, E>(run, rows.clone(), begin, tally, scores, scales);
                let values = Values::Tile(tile::decode_values::<V, E>(run, begin, used, values));
                weigh::<V, Decoded>(run, rows, begin, &values, ahead, tally, scores);
            }
        }
    }
}
