//! Attention with a softmax kept as it goes, and with splits that are combined afterwards.

use crate::cuda::plan::attention::SPLIT;
use crate::reference::attention::read;
use crate::{AttentionItem, KvFormat};
use std::ops::Range;

/// What is known of a query after some keys: the largest score, the sum of weights relative to it, and the weighted values.
#[derive(Clone, Debug)]
struct State {
    largest: f32,
    total: f32,
    output: Vec<f32>,
}

impl State {
    /// Before the first key.
    fn new(dim: usize) -> Self {
        Self { largest: f32::NEG_INFINITY, total: 0.0, output: vec![0.0; dim] }
    }

    /// Takes in a tile: scores and values of the keys that the query sees. An empty tile changes nothing.
    fn take(&mut self, scores: &[f32], values: &[Vec<f32>], round: impl Fn(f32) -> f32) {
        let largest = scores.iter().copied().fold(self.largest, f32::max);
        let rescale = if largest == self.largest { 1.0 } else { (self.largest - largest).exp() };
        let weights: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
        self.total = self.total * rescale + weights.iter().sum::<f32>();
        for (d, output) in self.output.iter_mut().enumerate() {
            *output *= rescale;
            for (weight, value) in weights.iter().zip(values) {
                *output = round(*weight).mul_add(value[d], *output);
            }
        }
        self.largest = largest;
    }

    /// Takes in what is known of later keys.
    fn join(&mut self, later: &Self) {
        let largest = self.largest.max(later.largest);
        let (before, added) = ((self.largest - largest).exp(), (later.largest - largest).exp());
        self.total = self.total.mul_add(before, later.total * added);
        for (output, later) in self.output.iter_mut().zip(&later.output) {
            *output = output.mul_add(before, later * added);
        }
        self.largest = largest;
    }

    fn finish(&self, out: &mut [f32]) {
        for (out, output) in out.iter_mut().zip(&self.output) {
            *out = output / self.total;
        }
    }
}

/// One query of one head, and what it sees.
struct Query<'a> {
    fmt: &'a KvFormat,
    item: &'a AttentionItem<'a>,
    kv_head: usize,
    scale: f32,
    seen: Range<usize>,
    q: &'a [f32],
}

impl Query<'_> {
    /// Takes the keys of `tile` that the query sees into `state`.
    fn take(&self, state: &mut State, tile: Range<usize>, round: impl Fn(f32) -> f32) {
        let (mut scores, mut values) = (Vec::new(), Vec::new());
        for position in tile.start.max(self.seen.start)..tile.end.min(self.seen.end) {
            let (key, value) = read(self.fmt, self.item, self.kv_head, position);
            let score = key.iter().zip(self.q).fold(0.0f32, |sum, (k, q)| k.mul_add(*q, sum));
            scores.push(score * self.scale);
            values.push(value);
        }
        state.take(&scores, &values, round);
    }
}

/// Calls `each` with every query of every item and its place in `q` and `out`.
fn queries(
    fmt: &KvFormat,
    items: &[AttentionItem<'_>],
    heads: usize,
    scale: f32,
    window: Option<usize>,
    q: &[f32],
    mut each: impl FnMut(Query<'_>, Range<usize>),
) {
    let dim = fmt.head_dim;
    for item in items {
        for (row, head) in (0..item.rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let position = item.start + row;
            let at = ((item.first_row + row) * heads + head) * dim;
            let seen = AttentionItem::first_key(position, window)..position + 1;
            let kv_head = head / (heads / fmt.kv_heads);
            each(Query { fmt, item, kv_head, scale, seen, q: &q[at..at + dim] }, at..at + dim);
        }
    }
}

/// As `attention_prefill.cu` and `attention_simt.cu`: tiles of `tile` keys at absolute positions, one after the other. Weights go
/// through `round` before they meet the values, as tensor cores want them in 16 bits. Shapes are those of
/// [`crate::reference::attention`].
#[allow(clippy::too_many_arguments, reason = "an operation of the model has these operands")]
pub fn prefill(
    fmt: &KvFormat,
    items: &[AttentionItem<'_>],
    heads: usize,
    scale: f32,
    window: Option<usize>,
    tile: usize,
    round: impl Fn(f32) -> f32,
    q: &[f32],
    out: &mut [f32],
) {
    queries(fmt, items, heads, scale, window, q, |query, at| {
        let mut state = State::new(fmt.head_dim);
        for begin in (query.seen.start / tile * tile..query.seen.end).step_by(tile) {
            query.take(&mut state, begin..begin + tile, &round);
        }
        state.finish(&mut out[at]);
    });
}

/// As `attention_decode.cu`: each split of 512 keys by itself, and the splits combined in ascending order.
pub fn decode(
    fmt: &KvFormat,
    items: &[AttentionItem<'_>],
    heads: usize,
    scale: f32,
    window: Option<usize>,
    q: &[f32],
    out: &mut [f32],
) {
    queries(fmt, items, heads, scale, window, q, |query, at| {
        let mut state = State::new(fmt.head_dim);
        for split in query.seen.start / SPLIT..query.seen.end.div_ceil(SPLIT) {
            let mut part = State::new(fmt.head_dim);
            query.take(&mut part, split * SPLIT..(split + 1) * SPLIT, |weight| weight);
            state.join(&part);
        }
        state.finish(&mut out[at]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvDtype;
    use crate::quant::{bf16_to_f32, f32_to_bf16};
    use crate::reference;
    use crate::testing::{Random, assert_close, assert_same};

    /// Tiles, splits and windows of every kind against the definition; and tiles that a query does not see leave no trace.
    #[test]
    fn tiles_and_splits_are_the_definition() {
        let mut random = Random::new(71);
        for (dtype, window) in [(KvDtype::F32, None), (KvDtype::BF16, Some(40)), (KvDtype::Int8, Some(600))] {
            let fmt = KvFormat { dtype, kv_heads: 2, head_dim: 24, block_size: 16 };
            let tokens = random.within(1030, 1100);
            let (k, v) = (random.vector(tokens * 48), random.vector(tokens * 48));
            let mut pages = vec![vec![0; fmt.page_bytes()]; tokens.div_ceil(16)];
            for (i, page) in pages.iter_mut().enumerate() {
                let range = i * 16 * 48..tokens.min(i * 16 + 16) * 48;
                fmt.write(page, 0, &k[range.clone()], &v[range]);
            }
            let pages: Vec<&[u8]> = pages.iter().map(|page| &**page).collect();
            let rows = 6;
            let q = random.vector(rows * 4 * 24);
            let item = AttentionItem { pages: &pages, first_row: 0, rows, start: tokens - rows };
            let run = |with: &dyn Fn(&mut [f32])| {
                let mut out = vec![f32::NAN; q.len()];
                with(&mut out);
                out
            };
            let want = run(&|out| reference::attention(&fmt, &[item], 4, 0.2, window, &q, out));
            let split = run(&|out| decode(&fmt, &[item], 4, 0.2, window, &q, out));
            assert_close(&split, &want, 1e-5, 1e-6, "splits");
            for tile in [32, 64, 4096] {
                let tiled = run(&|out| prefill(&fmt, &[item], 4, 0.2, window, tile, |p| p, &q, out));
                assert_close(&tiled, &want, 1e-5, 1e-6, "tiles");
            }
            let round = |p: f32| bf16_to_f32(f32_to_bf16(p));
            let rounded = run(&|out| prefill(&fmt, &[item], 4, 0.2, window, 64, round, &q, out));
            assert_close(&rounded, &want, 1e-2, 1e-2, "weights of 16 bits");
        }
        let mut state = State { largest: 1.5, total: 2.0, output: vec![-0.0, 3.0] };
        state.take(&[], &[], |p| p);
        assert_same(&[state.largest, state.total, state.output[0], state.output[1]], &[1.5, 2.0, -0.0, 3.0], "nothing");
        let mut nothing = State::new(1);
        nothing.take(&[], &[], |p| p);
        nothing.join(&State { largest: 0.5, total: 2.0, output: vec![3.0] });
        assert_same(&[nothing.largest, nothing.total, nothing.output[0]], &[0.5, 2.0, 3.0], "the first split");
    }
}
