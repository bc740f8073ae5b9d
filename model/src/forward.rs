//! One forward pass over a ragged batch: prefill chunks and decode steps are the same thing with other lengths.
//!
//! The pass is driven by the layer descriptions of [`ModelSpec`]; no architecture has code of its own. Per layer:
//!
//! ```text
//! h = norm(x);  q, k, v = h·Wq, h·Wk, h·Wv;  rotate q, k;  write k, v into their pages;  on_layer
//! x += attention(q, pages)·Wo
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

use crate::kv::{KvMemory, PageWrite};
use crate::spec::{Activation, FfnKind, ModelSpec};
use ridge_kernels::{AttentionItem, Cpu, Finish, Gate, KvWrite, Operand, Rows};
use ridge_protocol::{BatchPlan, BlockId, PlanItem, TokenId};
use weights::{GateUp, LayerWeights};

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
    /// `[rows, hidden]`: normed.
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
    /// A product's left side, as the kernels want it.
    operand: Operand,
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
            // Nothing reads the last layer's output except the sampled rows.
            let last = index == last_layer;
            self.fill_cache(weights, layer, index, kv, cpu, &runs, !last);
            on_layer(index as u32);
            if last {
                runs = self.narrow(weights, plan, &sampled);
                if runs.is_empty() {
                    return &mut [];
                }
                self.query(weights, layer, cpu, &runs);
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
        let (embed, tokens) = (&weights.embed, &s.tokens);
        let read = |row: usize, bytes: &mut [u8]| {
            let read = embed.read_row(tokens[row] as usize, bytes);
            // The weights themselves are mapped, and would end the process just the same.
            read.unwrap_or_else(|error| panic!("the embedding of token {} cannot be read: {error}", tokens[row]));
        };
        cpu.embed(embed.dtype, embed.cols, &read, fit(&mut s.x, rows * weights.spec.hidden));

        let cos = fit(&mut s.cos, rows * pairs).chunks_exact_mut(pairs);
        let sin = fit(&mut s.sin, rows * pairs).chunks_exact_mut(pairs);
        let positions = runs.iter().flat_map(|run| run.start..run.start + run.rows);
        for ((position, cos), sin) in positions.zip(cos).zip(sin) {
            weights.rope.fill(position as u32, cos, sin);
        }
    }

    /// Norms the residual stream into `h`, computes keys, values and, if asked to, queries, and writes keys and values into their
    /// pages.
    #[allow(clippy::too_many_arguments, reason = "a pass has these parts")]
    fn fill_cache(
        &mut self,
        weights: &Weights,
        layer: &LayerWeights,
        index: usize,
        kv: &KvMemory,
        cpu: &Cpu,
        runs: &[Run<'_>],
        with_queries: bool,
    ) {
        let (spec, store, s) = (&weights.spec, &weights.store, &mut self.scratch);
        let (rows, width, pairs) = (row_count(runs), spec.kv_width(), weights.rope.pairs());
        let h = fit(&mut s.h, rows * spec.hidden);
        cpu.rms_norm(&s.x[..rows * spec.hidden], &layer.attn_norm, spec.norm_eps, h);
        let mut h = Rows::new(h, spec.hidden, &mut s.operand);
        let k = fit(&mut s.k, rows * width);
        let v = fit(&mut s.v, rows * width);
        layer.key.apply(cpu, store, spec.norm_eps, &mut h, k);
        layer.value.apply(cpu, store, spec.norm_eps, &mut h, v);
        if with_queries {
            let q = fit(&mut s.q, rows * spec.q_width());
            layer.query.apply(cpu, store, spec.norm_eps, &mut h, q);
            cpu.rope(q, spec.heads, spec.head_dim, &s.cos[..rows * pairs], &s.sin[..rows * pairs]);
        }
        cpu.rope(k, spec.kv_heads, spec.head_dim, &s.cos[..rows * pairs], &s.sin[..rows * pairs]);
        let mut pages: Vec<_> = runs.iter().flat_map(|run| written_pages(kv, index, run)).collect();
        let mut writes: Vec<KvWrite<'_>> = pages.iter_mut().map(WrittenPage::as_write).collect();
        cpu.write_kv(kv.format(), &mut writes, k, v);
    }

    /// Computes queries from `h`.
    fn query(&mut self, weights: &Weights, layer: &LayerWeights, cpu: &Cpu, runs: &[Run<'_>]) {
        let (spec, s) = (&weights.spec, &mut self.scratch);
        let (rows, pairs) = (row_count(runs), weights.rope.pairs());
        let mut h = Rows::new(&s.h[..rows * spec.hidden], spec.hidden, &mut s.operand);
        let q = fit(&mut s.q, rows * spec.q_width());
        layer.query.apply(cpu, &weights.store, spec.norm_eps, &mut h, q);
        cpu.rope(q, spec.heads, spec.head_dim, &s.cos[..rows * pairs], &s.sin[..rows * pairs]);
    }

    /// Adds attention's output to the residual stream.
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
        let (rows, width) = (row_count(runs), spec.q_width());
        let q = &s.q[..rows * width];
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

        let mut attended = Rows::new(attended, width, &mut s.operand);
        layer.out.add_to(cpu, &weights.store, &mut attended, &mut s.x[..rows * spec.hidden]);
    }

    /// Adds the feed-forward layer's output to the residual stream.
    fn feed_forward(&mut self, weights: &Weights, layer: &LayerWeights, cpu: &Cpu, runs: &[Run<'_>]) {
        let (spec, store, s) = (&weights.spec, &weights.store, &mut self.scratch);
        let rows = row_count(runs);
        let x = &mut s.x[..rows * spec.hidden];
        let h = &mut s.h[..rows * spec.hidden];
        cpu.rms_norm(x, &layer.ffn_norm, spec.norm_eps, h);
        let mut h = Rows::new(h, spec.hidden, &mut s.operand);
        let gate = fit(&mut s.gate, rows * spec.ffn);
        match &layer.gate_up {
            GateUp::Fused(both) => {
                let activation = match spec.activation {
                    Activation::Silu => Gate::Silu,
                    Activation::GeluTanh => Gate::GeluTanh,
                };
                cpu.matmul(&mut h, &store.get(both), Finish::Gate(activation), gate);
            }
            GateUp::Apart { gate: gate_weight, up: up_weight } => {
                let up = fit(&mut s.up, rows * spec.ffn);
                cpu.matmul(&mut h, &store.get(gate_weight), Finish::Store(None), gate);
                cpu.matmul(&mut h, &store.get(up_weight), Finish::Store(None), up);
                match spec.activation {
                    Activation::Silu => cpu.silu_mul(gate, up),
                    Activation::GeluTanh => cpu.gelu_tanh_mul(gate, up),
                }
            }
        }
        let mut gate = Rows::new(gate, spec.ffn, &mut s.operand);
        cpu.matmul(&mut gate, &store.get(&layer.down), Finish::Add(None), x);
    }

    /// Norms the residual stream and multiplies it with the output head.
    fn project(&mut self, weights: &Weights, cpu: &Cpu, runs: &[Run<'_>]) -> &mut [f32] {
        let (spec, s) = (&weights.spec, &mut self.scratch);
        let rows = row_count(runs);
        let h = &mut s.h[..rows * spec.hidden];
        cpu.rms_norm(&s.x[..rows * spec.hidden], &weights.norm, spec.norm_eps, h);
        let mut h = Rows::new(h, spec.hidden, &mut s.operand);
        let logits = fit(&mut s.logits, rows * spec.vocab);
        cpu.matmul(&mut h, &weights.store.get(&weights.head), Finish::Store(None), logits);
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

/// A page that a pass writes to, and the rows of the batch that go there.
struct WrittenPage<'a> {
    page: PageWrite<'a>,
    slot: usize,
    row: usize,
    rows: usize,
}

impl WrittenPage<'_> {
    fn as_write(&mut self) -> KvWrite<'_> {
        let (slot, row, rows) = (self.slot, self.row, self.rows);
        // A block written from its first slot on is new to this sequence: what an earlier owner left behind must never be
        // shipped.
        KvWrite { page: &mut self.page, slot, row, rows, clear_rest: slot == 0 }
    }
}

/// The pages of one layer that one run's keys and values go to, locked.
fn written_pages<'a>(kv: &'a KvMemory, layer: usize, run: &Run<'_>) -> impl Iterator<Item = WrittenPage<'a>> {
    let (block_size, end) = (kv.format().block_size, run.start + run.rows);
    (run.start / block_size..end.div_ceil(block_size)).map(move |index| {
        let first = run.start.max(index * block_size);
        WrittenPage {
            page: kv.write(layer, run.table[index]),
            slot: first % block_size,
            row: run.first_row + first - run.start,
            rows: end.min((index + 1) * block_size) - first,
        }
    })
}

/// A plan that breaks these is a scheduler's bug: running it would read or write another sequence's cache.
pub(crate) fn check(plan: &BatchPlan, spec: &ModelSpec, kv: &KvMemory) {
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
