//! One forward pass on a device: the pass of [`crate::forward`], a launch for each of its steps.
//!
//! Rows of one token per item (decode steps) and rows of longer items (chunks of prompts) go through different kernels, made for few
//! rows and for many; an output's bits depend on which of the two computed it, and on nothing else of the batch. Behind the
//! last layer's keys and values, where only sampled rows go on, all rows are steps.
//!
//! Everything is asked for in order on one stream. The host waits for the device only where pages land.

#![allow(unsafe_code, reason = "the device's memory is addressed by numbers")]

use super::attending::Attending;
use super::batch::Batch;
use super::pages::DevicePages;
use super::scratch::{Numbers, Scratch, Types, bytes_of};
use super::weights::{DeviceWeights, Embed, Layer, Projection, scratch_of};
use crate::device::KernelSet;
use crate::memory::PassLimits;
use crate::spec::{Activation, ModelSpec};
use ridge_kernels::cuda::ops::attention;
use ridge_kernels::cuda::ops::matmul::{Finish, Path, Products, Weight, X};
use ridge_kernels::cuda::ops::pages::{KeyTurn, Pages, Write, write_kv};
use ridge_kernels::cuda::ops::rows::{self, Heads};
use ridge_kernels::cuda::plan::attention::{PrefillKernel, experimental_prefill_kernel, prefill_kernel};
use ridge_kernels::cuda::{Buffer, CudaError, Device};
use ridge_kernels::{Cpu, DType, Gate, KvFormat};
use ridge_protocol::BatchPlan;
use std::sync::Arc;

/// The pass and its buffers.
pub struct Pass {
    device: Arc<dyn Device>,
    scratch: Scratch,
    products: Products,
    /// Attention of chunks.
    prefill: PrefillKernel,
}

/// What every step of a pass is told.
struct Step<'a> {
    device: &'a dyn Device,
    weights: &'a DeviceWeights,
    scratch: &'a Scratch,
    products: &'a Products,
    /// Type of queries.
    query: DType,
    /// Where the pass's numbers lie, and the block tables among them.
    numbers: u64,
    tables: u64,
}

/// Rows of a step of the pass: first those that go through the kernels for few, then those for many.
#[derive(Clone, Copy)]
struct Rows {
    steps: usize,
    chunks: usize,
}

impl Rows {
    fn all(self) -> usize {
        self.steps + self.chunks
    }

    /// Each part with its first row.
    fn parts(self) -> impl Iterator<Item = (Path, usize, usize)> {
        let parts = [(Path::Skinny, 0, self.steps), (Path::Gemm, self.steps, self.chunks)];
        parts.into_iter().filter(|(_, _, rows)| *rows > 0)
    }
}

/// Addresses of one set of activations: the whole batch's, or the sampled rows'.
#[derive(Clone, Copy)]
struct Activations {
    rows: Rows,
    x: u64,
    h: u64,
    cos: u64,
    sin: u64,
}

impl Pass {
    /// Allocates for passes up to `limits`; a larger one allocates more.
    pub fn new(
        device: &Arc<dyn Device>,
        weights: &DeviceWeights,
        format: &KvFormat,
        limits: PassLimits,
        kernels: KernelSet,
    ) -> Result<Self, CudaError> {
        let apart = weights.layers.iter().any(|layer| layer.gate.dtype != layer.up.dtype);
        let types = Types { compute: weights.compute, kv: format.dtype, apart };
        let mut scratch = Scratch::new(device, &weights.spec, types)?;
        scratch.fit(limits)?;
        let (shared, sm) = (device.properties().shared_per_block as usize, device.properties().sm);
        let prefill = match kernels {
            KernelSet::Stable => prefill_kernel(format, shared),
            KernelSet::Experimental => experimental_prefill_kernel(format, shared, sm),
        };
        for (kernel, reason) in prefill.rejected {
            tracing::debug!("attention of prompts does not take {kernel:?}: {reason}");
        }
        let products = Products::new(device, scratch_of(weights))?;
        let products = match kernels {
            KernelSet::Stable => products,
            KernelSet::Experimental => products.experimental(),
        };
        Ok(Self { device: device.clone(), scratch, products, prefill: prefill.chosen })
    }

    /// The logits of the last pass, `[items that sampled, vocab]` in the order of the items.
    pub fn logits(&self) -> &Buffer {
        &self.scratch.logits
    }

    /// Runs a plan that has been checked, up to the logits. Returns how many items sample.
    ///
    /// `on_layer(l)` is called once layer `l`'s pages are on the host.
    pub fn run(
        &mut self,
        weights: &DeviceWeights,
        pages: &mut DevicePages,
        cpu: &Cpu,
        plan: &BatchPlan,
        on_layer: &mut dyn FnMut(u32),
    ) -> Result<usize, CudaError> {
        let format = *pages.format();
        let batch = Batch::new(plan, format.block_size);
        pages.upload_arrivals(batch.blocks())?;
        self.scratch.fit(PassLimits { tokens: batch.rows(), sequences: batch.sampled.len() })?;
        let writes = batch.writes(format.block_size);
        let mut numbers = Numbers::default();
        let shipped: Vec<u32> = batch.written_by_chunks.iter().map(|block| block.0).collect();
        let lists = [&batch.tokens, &batch.sampled_rows, &batch.tables, &Write::words(&writes), &shipped];
        let at = lists.map(|list| numbers.push(list));
        let (spec, prefill) = (&weights.spec, self.prefill);
        let whole = Attending::new(spec, prefill, &batch.steps, &batch.chunks, &mut numbers);
        let narrow = Attending::new(spec, prefill, &batch.sampled, &[], &mut numbers);
        self.scratch.fit_parts(whole.workspace_bytes().max(narrow.workspace_bytes()))?;
        let base = self.scratch.upload(&numbers)?;
        let [tokens, sampled_rows, tables, writes_at, shipped] = at.map(|at| base + at);

        let step = Step {
            device: &*self.device,
            weights,
            scratch: &self.scratch,
            products: &self.products,
            query: attention::query_dtype(format.dtype),
            numbers: base,
            tables,
        };
        step.embed(cpu, &batch, tokens)?;
        let chunks = batch.chunks.iter().map(|run| run.rows).sum();
        let mut now = step.whole(Rows { steps: batch.steps.len(), chunks });
        let (mut attending, mut landed) = (&whole, |layer: usize| on_layer(layer as u32));
        let last = weights.layers.len() - 1;
        for (index, layer) in weights.layers.iter().enumerate() {
            let pages_of = pages.of_layer(index);
            step.fill_cache(layer, &now, &pages_of, (writes_at, writes.len()), index != last)?;
            pages.keep(index, &batch.written_by_steps);
            pages.ship(index, (&batch.written_by_chunks, shipped), &mut landed)?;
            if index == last {
                if batch.sampled.is_empty() {
                    pages.land_all(&mut landed)?;
                    return Ok(0);
                }
                // Nothing reads the last layer's output except the sampled rows.
                now = step.narrow(&now, sampled_rows, batch.sampled.len())?;
                attending = &narrow;
                step.query(layer, &now)?;
            }
            step.attend(layer, &now, attending, pages_of)?;
            step.feed_forward(layer, &now)?;
        }
        step.project(&now)?;
        pages.land_all(&mut landed)?;
        Ok(batch.sampled.len())
    }
}

impl Step<'_> {
    fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    fn whole(&self, rows: Rows) -> Activations {
        let s = self.scratch;
        Activations { rows, x: s.x.address(), h: s.h.address(), cos: s.cos.address(), sin: s.sin.address() }
    }

    /// Fills the residual stream with embeddings, and the cosines and sines of every row's position.
    fn embed(&self, cpu: &Cpu, batch: &Batch, tokens: u64) -> Result<(), CudaError> {
        let (rows, hidden, s) = (batch.rows(), self.spec().hidden, self.scratch);
        match &self.weights.embed {
            // SAFETY: ids are below the vocabulary (the plan was checked), the table has a row for each, and `x` has room.
            Embed::Device(dtype, table) => unsafe {
                rows::embed(self.device, (rows, hidden), tokens, *dtype, *table, s.x.address())?;
            },
            Embed::Host(table) => {
                let read = |row: usize, bytes: &mut [u8]| {
                    let read = table.read_row(batch.tokens[row] as usize, bytes);
                    // The weights themselves are mapped, and would end the process just the same.
                    read.unwrap_or_else(|error| panic!("the embedding of a token cannot be read: {error}"));
                };
                let mut x = vec![0.0; rows * hidden];
                cpu.embed(table.dtype, table.cols, &read, &mut x);
                s.x.upload(0, &x)?;
            }
        }
        let rope = &self.weights.rope;
        let pairs = rope.pairs();
        let (mut cos, mut sin) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
        let angles = cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs));
        for (position, (cos, sin)) in batch.positions.iter().zip(angles) {
            rope.fill(*position, cos, sin);
        }
        s.cos.upload(0, &cos)?;
        s.sin.upload(0, &sin)
    }

    /// Norms the residual stream into `h`, computes keys, values and, if asked to, queries, and writes keys and values into
    /// their pages.
    fn fill_cache(
        &self,
        layer: &Layer,
        now: &Activations,
        pages: &Pages,
        writes: (u64, usize),
        with_queries: bool,
    ) -> Result<(), CudaError> {
        let (spec, s) = (self.spec(), self.scratch);
        self.norm(layer.attn_norm, now)?;
        self.store(now.rows, now.h, &layer.key, s.k.address())?;
        self.store(now.rows, now.h, &layer.value, s.v.address())?;
        if with_queries {
            self.query(layer, now)?;
        }
        let turn = KeyTurn {
            norm: layer.key.head_norm,
            eps: spec.norm_eps,
            pairs: self.weights.rope.pairs(),
            cos: now.cos,
            sin: now.sin,
        };
        // SAFETY: `k` and `v` hold a row for each of the batch, the writes name blocks of the pool and rows of the batch, and no
        // two name one slot, as no two items of a plan share a block that they write to.
        unsafe { write_kv(self.device, pages, writes, &turn, s.k.address(), s.v.address()) }
    }

    /// Computes queries from `h`.
    fn query(&self, layer: &Layer, now: &Activations) -> Result<(), CudaError> {
        let (spec, s) = (self.spec(), self.scratch);
        self.store(now.rows, now.h, &layer.query, s.raw.address())?;
        let heads = Heads {
            rows: now.rows.all(),
            heads: spec.heads,
            head_dim: spec.head_dim,
            pairs: self.weights.rope.pairs(),
            eps: spec.norm_eps,
        };
        let (angles, norm) = ((now.cos, now.sin), layer.query.head_norm);
        // SAFETY: `raw` and `q` have a row of all heads for each row.
        unsafe { rows::rotate_heads(self.device, &heads, s.raw.address(), norm, angles, self.query, s.q.address()) }
    }

    /// Adds attention's output to the residual stream.
    fn attend(&self, layer: &Layer, now: &Activations, attending: &Attending, pages: Pages) -> Result<(), CudaError> {
        let (spec, s) = (self.spec(), self.scratch);
        let scale = 1.0 / (spec.head_dim as f32).sqrt();
        let of = attention::Layer { pages, tables: self.tables, heads: spec.heads, scale };
        let out = (self.weights.compute, s.attended.address());
        // SAFETY: the lists and tables are this pass's, the buffers have a row for each of its rows, and `parts` was made to fit.
        unsafe { attending.run(self.device, &of, layer.window, (self.numbers, s.parts()), s.q.address(), out)? };
        self.add(now.rows, s.attended.address(), &layer.out.weight, layer.out.bias, now.x)
    }

    /// Adds the feed-forward layer's output to the residual stream.
    fn feed_forward(&self, layer: &Layer, now: &Activations) -> Result<(), CudaError> {
        let (spec, s, compute) = (self.spec(), self.scratch, self.weights.compute);
        self.norm(layer.ffn_norm, now)?;
        let (activation, out) = match spec.activation {
            Activation::Silu => (Gate::Silu, s.gated.address()),
            Activation::GeluTanh => (Gate::GeluTanh, s.gated.address()),
        };
        if layer.gate.dtype == layer.up.dtype {
            for (path, first, count) in now.rows.parts() {
                let (x, y) = (self.rows_of(now.h, first, count, spec.hidden), first * spec.ffn * bytes_of(compute));
                let y = out + y as u64;
                // SAFETY: `h` and `gated` have a row for each of these rows, as wide as the matrices on either side.
                unsafe { self.products.gated(path, x, &layer.gate, &layer.up, activation, compute, y)? };
            }
        } else {
            // Some quantisations store the two in different types.
            self.store(now.rows, now.h, &Projection::plain(layer.gate), s.gate.address())?;
            self.store(now.rows, now.h, &Projection::plain(layer.up), s.up.address())?;
            let (n, gate, up) = (now.rows.all() * spec.ffn, s.gate.address(), s.up.address());
            // SAFETY: each has `ffn` elements for each row.
            unsafe {
                match spec.activation {
                    Activation::Silu => rows::silu_mul(self.device, n, gate, up, compute, out)?,
                    Activation::GeluTanh => rows::gelu_tanh_mul(self.device, n, gate, up, compute, out)?,
                }
            }
        }
        self.add(now.rows, out, &layer.down, 0, now.x)
    }

    /// Norms the residual stream and multiplies it with the output head.
    fn project(&self, now: &Activations) -> Result<(), CudaError> {
        self.norm(self.weights.norm, now)?;
        self.store(now.rows, now.h, &Projection::plain(self.weights.head), self.scratch.logits.address())
    }

    /// Copies the sampled rows of everything that is still needed.
    fn narrow(&self, whole: &Activations, sampled_rows: u64, count: usize) -> Result<Activations, CudaError> {
        let (spec, s) = (self.spec(), self.scratch);
        let angles = self.weights.rope.pairs() * size_of::<f32>();
        let rows = Rows { steps: count, chunks: 0 };
        let [x, h, cos, sin] = [&s.few_x, &s.few_h, &s.few_cos, &s.few_sin].map(|buffer| buffer.address());
        let h_bytes = spec.hidden * bytes_of(self.weights.compute);
        let moves =
            [(whole.x, x, spec.hidden * 4), (whole.h, h, h_bytes), (whole.cos, cos, angles), (whole.sin, sin, angles)];
        for (from, to, row_bytes) in moves {
            // SAFETY: the sampled rows are rows of the batch, and the buffers for few rows have one for each.
            unsafe { rows::gather(self.device, (count, row_bytes), sampled_rows, from, to)? };
        }
        Ok(Activations { rows, x, h, cos, sin })
    }

    fn norm(&self, weight: u64, now: &Activations) -> Result<(), CudaError> {
        let spec = self.spec();
        let shape = (now.rows.all(), spec.hidden);
        // SAFETY: `x` and `h` have these rows; the weight has an element for each column.
        unsafe { rows::rms_norm(self.device, shape, spec.norm_eps, now.x, weight, self.weights.compute, now.h) }
    }

    /// `y = x·Wᵀ + bias` in f32.
    fn store(&self, rows: Rows, x: u64, projection: &Projection, y: u64) -> Result<(), CudaError> {
        let finish = Finish::Store { bias: projection.bias, to: DType::F32 };
        self.product(rows, x, &projection.weight, finish, y)
    }

    /// `y = y + x·Wᵀ + bias` in f32.
    fn add(&self, rows: Rows, x: u64, weight: &Weight, bias: u64, y: u64) -> Result<(), CudaError> {
        self.product(rows, x, weight, Finish::Add { bias }, y)
    }

    fn product(&self, rows: Rows, x: u64, weight: &Weight, finish: Finish, y: u64) -> Result<(), CudaError> {
        for (path, first, count) in rows.parts() {
            let x = self.rows_of(x, first, count, weight.k);
            let y = y + (first * weight.n * size_of::<f32>()) as u64;
            // SAFETY: the callers' buffers have a row for each of `rows`, as wide as the matrix on either side.
            unsafe { self.products.matmul(path, x, weight, finish, y)? };
        }
        Ok(())
    }

    /// Some rows of an operand in the compute type, `width` elements each.
    fn rows_of(&self, x: u64, first: usize, rows: usize, width: usize) -> X {
        let dtype = self.weights.compute;
        X { address: x + (first * width * bytes_of(dtype)) as u64, dtype, rows }
    }
}
