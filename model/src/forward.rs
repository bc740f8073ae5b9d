//! One forward pass over a ragged batch: prefill chunks and decode steps are the same thing with other lengths.
//!
//! The pass is driven by the layer descriptions of [`ModelSpec`]; no architecture has code of its own. Per layer:
//!
//! ```text
//! h = norm(x);  k, v = h·Wk, h·Wv;  rotate k;  write k, v into their pages;  on_layer
//! q = h·Wq;     rotate q;           x += attention(q, pages)·Wo
//! h = norm(x);  x += (activation(h·Wgate) * (h·Wup))·Wdown
//! ```
//!
//! Every kernel computes a row from that row alone, in an order that does not depend on the batch, and attention
//! reads keys from pages even if this very pass wrote them. So a sequence's logits are the same bits whatever it is
//! batched with and however it is cut into chunks.
//!
//! It knows neither sampling nor scheduling. Read [`Weights`] and [`Forward::run`] first.

mod weights;

pub use weights::Weights;

use crate::kv::KvMemory;
use crate::spec::{Activation, FfnKind, ModelSpec};
use ridge_kernels::{AttentionItem, Cpu};
use ridge_protocol::{BatchPlan, BlockId, PlanItem, TokenId};
use weights::LayerWeights;

/// Consecutive rows of the batch that are consecutive positions of one sequence.
struct Run<'a> {
    table: &'a [BlockId],
    /// Position of the first row.
    start: usize,
    first_row: usize,
    rows: usize,
}

/// Activations of one pass, kept between passes: a buffer grows to the largest batch and is never shrunk.
#[derive(Default)]
struct Scratch {
    tokens: Vec<TokenId>,
    /// `[rows, hidden]`: the residual stream.
    x: Vec<f32>,
    /// `[rows, hidden]`: normed, or a branch about to be added.
    h: Vec<f32>,
    /// `[rows, q_width]`
    q: Vec<f32>,
    /// `[rows, q_width]`
    attended: Vec<f32>,
    /// `[rows, kv_width]`
    k: Vec<f32>,
    /// `[rows, kv_width]`
    v: Vec<f32>,
    /// `[rows, ffn]`
    gate: Vec<f32>,
    /// `[rows, ffn]`
    up: Vec<f32>,
    /// `[rows, rotary_dim / 2]`
    cos: Vec<f32>,
    /// `[rows, rotary_dim / 2]`
    sin: Vec<f32>,
    /// `[sampled rows, vocab]`
    logits: Vec<f32>,
}

/// The pass and its buffers.
#[derive(Default)]
pub struct Forward {
    scratch: Scratch,
}

impl Forward {
    /// Bytes that the buffers have grown to; `memory::activation_bytes` says beforehand how far they can.
    pub fn scratch_bytes(&self) -> usize {
        let s = &self.scratch;
        let floats = [&s.x, &s.h, &s.q, &s.attended, &s.k, &s.v, &s.gate, &s.up, &s.cos, &s.sin, &s.logits];
        size_of_val(&*s.tokens) + floats.into_iter().map(|buffer| size_of_val(&**buffer)).sum::<usize>()
    }

    /// Runs `plan` and returns the logits, `[items that sample, vocab]` in the order of the items.
    ///
    /// `on_layer(l)` is called once layer `l`'s keys and values of all items are in their pages, while later layers
    /// are still to be computed.
    pub fn run(
        &mut self,
        weights: &Weights,
        kv: &KvMemory,
        cpu: &Cpu,
        plan: &BatchPlan,
        on_layer: &mut dyn FnMut(u32),
    ) -> &mut [f32] {
        check(plan, &weights.spec, kv);
        let mut runs = runs(plan);
        let sampled: Vec<usize> = plan
            .items
            .iter()
            .zip(&runs)
            .filter(|(item, _)| item.sample.is_some())
            .map(|(_, run)| run.first_row + run.rows - 1)
            .collect();
        self.embed(weights, cpu, plan, &runs);

        let last_layer = weights.layers.len() - 1;
        for (index, layer) in weights.layers.iter().enumerate() {
            self.fill_cache(weights, layer, index, kv, cpu, &runs);
            on_layer(index as u32);
            if index == last_layer {
                // Nothing reads the last layer's output except the sampled rows.
                runs = self.narrow(weights, plan, &sampled);
                if runs.is_empty() {
                    return &mut [];
                }
            }
            self.attend(weights, layer, index, kv, cpu, &runs);
            self.feed_forward(weights, layer, cpu, &runs);
        }
        self.project(weights, cpu, &runs)
    }

    /// Fills the residual stream with embeddings, and the cosines and sines of every row's position.
    fn embed(&mut self, weights: &Weights, cpu: &Cpu, plan: &BatchPlan, runs: &[Run<'_>]) {
        let s = &mut self.scratch;
        let (rows, pairs) = (row_count(runs), weights.rope.pairs());
        s.tokens.clear();
        s.tokens.extend(plan.items.iter().flat_map(|item| &item.tokens));
        cpu.embed(&weights.embed.matrix(), &s.tokens, fit(&mut s.x, rows * weights.spec.hidden));

        let cos = fit(&mut s.cos, rows * pairs).chunks_exact_mut(pairs);
        let sin = fit(&mut s.sin, rows * pairs).chunks_exact_mut(pairs);
        let positions = runs.iter().flat_map(|run| run.start..run.start + run.rows);
        for ((position, cos), sin) in positions.zip(cos).zip(sin) {
            weights.rope.fill(position as u32, cos, sin);
        }
    }

    /// Norms the residual stream into `h`, computes keys and values and writes them into their pages.
    fn fill_cache(
        &mut self,
        weights: &Weights,
        layer: &LayerWeights,
        index: usize,
        kv: &KvMemory,
        cpu: &Cpu,
        runs: &[Run<'_>],
    ) {
        let (spec, s) = (&weights.spec, &mut self.scratch);
        let (rows, width, pairs) = (row_count(runs), spec.kv_width(), weights.rope.pairs());
        let h = fit(&mut s.h, rows * spec.hidden);
        cpu.rms_norm(&s.x[..rows * spec.hidden], &layer.attn_norm, spec.norm_eps, h);
        let k = fit(&mut s.k, rows * width);
        let v = fit(&mut s.v, rows * width);
        layer.key.apply(cpu, spec.norm_eps, h, k);
        layer.value.apply(cpu, spec.norm_eps, h, v);
        cpu.rope(k, spec.kv_heads, spec.head_dim, &s.cos[..rows * pairs], &s.sin[..rows * pairs]);
        for run in runs {
            let rows = run.first_row * width..(run.first_row + run.rows) * width;
            write_pages(kv, index, run, &k[rows.clone()], &v[rows]);
        }
    }

    /// Adds attention's output to the residual stream; `h` still holds the normed stream.
    fn attend(
        &mut self,
        weights: &Weights,
        layer: &LayerWeights,
        index: usize,
        kv: &KvMemory,
        cpu: &Cpu,
        runs: &[Run<'_>],
    ) {
        let (spec, s) = (&weights.spec, &mut self.scratch);
        let (rows, width, pairs) = (row_count(runs), spec.q_width(), weights.rope.pairs());
        let h = &mut s.h[..rows * spec.hidden];
        let q = fit(&mut s.q, rows * width);
        layer.query.apply(cpu, spec.norm_eps, h, q);
        cpu.rope(q, spec.heads, spec.head_dim, &s.cos[..rows * pairs], &s.sin[..rows * pairs]);

        let block_size = kv.format().block_size;
        let guards: Vec<Vec<_>> = runs
            .iter()
            .map(|run| {
                let blocks = (run.start + run.rows).div_ceil(block_size);
                run.table[..blocks].iter().map(|block| kv.read(index, *block)).collect()
            })
            .collect();
        let pages: Vec<Vec<&[u8]>> = guards.iter().map(|run| run.iter().map(|page| &**page).collect()).collect();
        let items: Vec<AttentionItem<'_>> = runs
            .iter()
            .zip(&pages)
            .map(|(run, pages)| AttentionItem { pages, first_row: run.first_row, rows: run.rows, start: run.start })
            .collect();
        let attended = fit(&mut s.attended, rows * width);
        let scale = 1.0 / (spec.head_dim as f32).sqrt();
        cpu.attention(kv.format(), &items, spec.heads, scale, layer.attention.window, q, attended);

        layer.out.apply(cpu, spec.norm_eps, attended, h);
        cpu.add(&mut s.x[..rows * spec.hidden], h);
    }

    /// Adds the feed-forward layer's output to the residual stream.
    fn feed_forward(&mut self, weights: &Weights, layer: &LayerWeights, cpu: &Cpu, runs: &[Run<'_>]) {
        let (spec, s) = (&weights.spec, &mut self.scratch);
        let rows = row_count(runs);
        let x = &mut s.x[..rows * spec.hidden];
        let h = &mut s.h[..rows * spec.hidden];
        cpu.rms_norm(x, &layer.ffn_norm, spec.norm_eps, h);
        let gate = fit(&mut s.gate, rows * spec.ffn);
        let up = fit(&mut s.up, rows * spec.ffn);
        cpu.matmul(h, &layer.gate.matrix(), None, gate);
        cpu.matmul(h, &layer.up.matrix(), None, up);
        match spec.activation {
            Activation::Silu => cpu.silu_mul(gate, up),
            Activation::GeluTanh => cpu.gelu_tanh_mul(gate, up),
        }
        cpu.matmul(gate, &layer.down.matrix(), None, h);
        cpu.add(x, h);
    }

    /// Norms the residual stream and multiplies it with the output head.
    fn project(&mut self, weights: &Weights, cpu: &Cpu, runs: &[Run<'_>]) -> &mut [f32] {
        let (spec, s) = (&weights.spec, &mut self.scratch);
        let rows = row_count(runs);
        let h = &mut s.h[..rows * spec.hidden];
        cpu.rms_norm(&s.x[..rows * spec.hidden], &weights.norm, spec.norm_eps, h);
        let logits = fit(&mut s.logits, rows * spec.vocab);
        cpu.matmul(h, &weights.head.matrix(), None, logits);
        logits
    }

    /// Moves the sampled rows to the front of every buffer that is still needed, and describes them as runs of one.
    fn narrow<'a>(&mut self, weights: &Weights, plan: &'a BatchPlan, sampled: &[usize]) -> Vec<Run<'a>> {
        let (s, hidden, pairs) = (&mut self.scratch, weights.spec.hidden, weights.rope.pairs());
        for (to, from) in sampled.iter().enumerate() {
            for (buffer, width) in [(&mut s.x, hidden), (&mut s.h, hidden), (&mut s.cos, pairs), (&mut s.sin, pairs)] {
                buffer.copy_within(from * width..(from + 1) * width, to * width);
            }
        }
        let items = plan.items.iter().filter(|item| item.sample.is_some());
        let run = |(row, item): (usize, &'a PlanItem)| Run {
            table: &item.block_table,
            start: item.start as usize + item.tokens.len() - 1,
            first_row: row,
            rows: 1,
        };
        items.enumerate().map(run).collect()
    }
}

/// Writes the keys and values of one run, `[rows, kv_width]` each, into one layer's pages.
fn write_pages(kv: &KvMemory, layer: usize, run: &Run<'_>, k: &[f32], v: &[f32]) {
    let format = kv.format();
    let width = format.kv_heads * format.head_dim;
    let (mut row, block_size) = (0, format.block_size);
    while row < run.rows {
        let position = run.start + row;
        let (first, slots) = (position % block_size, (block_size - position % block_size).min(run.rows - row));
        let mut page = kv.write(layer, run.table[position / block_size]);
        for slot in first..first + slots {
            format.write(&mut page, slot, &k[row * width..][..width], &v[row * width..][..width]);
            row += 1;
        }
        if first == 0 {
            // The block is new to this sequence: what an earlier owner left behind must never be shipped.
            format.zero_tail(&mut page, slots);
        }
    }
}

/// A plan that breaks these is a scheduler's bug: running it would read or write another sequence's cache.
fn check(plan: &BatchPlan, spec: &ModelSpec, kv: &KvMemory) {
    assert!(!plan.items.is_empty(), "step {}: a plan without items", plan.step);
    for item in &plan.items {
        let request = item.request;
        assert!(!item.tokens.is_empty(), "step {}: {request} has no tokens", plan.step);
        let covered = item.block_table.len() * kv.format().block_size;
        let needed = item.start as usize + item.tokens.len();
        assert!(needed <= covered, "step {}: {request} needs {needed} positions, has {covered}", plan.step);
        let beyond = item.tokens.iter().find(|token| **token as usize >= spec.vocab);
        assert!(beyond.is_none(), "step {}: {request} has token {beyond:?} of {}", plan.step, spec.vocab);
    }
    let mut requests: Vec<_> = plan.items.iter().map(|item| item.request).collect();
    requests.sort_unstable();
    assert!(requests.windows(2).all(|pair| pair[0] != pair[1]), "step {}: a request occurs twice", plan.step);
    // `FfnKind` has one shape; a second one must not run as the first.
    assert!(spec.layer_specs.iter().all(|layer| layer.ffn.kind == FfnKind::Gated && !layer.ffn.bias));
}

fn runs(plan: &BatchPlan) -> Vec<Run<'_>> {
    let mut next_row = 0;
    let run = |item| {
        let PlanItem { tokens, start, block_table, .. }: &PlanItem = item;
        let first_row = next_row;
        next_row += tokens.len();
        Run { table: block_table, start: *start as usize, first_row, rows: tokens.len() }
    };
    plan.items.iter().map(run).collect()
}

/// Rows of the whole batch.
fn row_count(runs: &[Run<'_>]) -> usize {
    runs.last().map_or(0, |run| run.first_row + run.rows)
}

/// The first `len` elements of a buffer, which grows if it must. Their values are left over from earlier use.
fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
