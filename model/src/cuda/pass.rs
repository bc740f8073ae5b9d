//! One forward pass on a device: the pass of [`crate::forward`], a launch for each of its steps.
//!
//! Rows of one token per item (decode steps) and rows of longer items (chunks of prompts) go through different kernels, made for few
//! rows and for many; an output's bits depend on which of the two computed it, and on nothing else of the batch. Behind the
//! last layer's keys and values, where only sampled rows go on, all rows are steps.
//!
//! Everything is asked for in order on one stream. The host waits for the device only where pages land. A pass of decode steps alone is
//! one sequence of launches, which [`super::graphs`] may record.

#![allow(unsafe_code, reason = "the device's memory is addressed by numbers")]

use super::attending::Attending;
use super::batch::Batch;
use super::graphs::{Graphs, Shape};
use super::made::Made;
use super::pages::DevicePages;
use super::scratch::{Numbers, Scratch, Types, bytes_of};
use super::weights::{DeviceWeights, Embed, Layer, Linear, Projection, measurable, scratch_of};
use crate::device::{DeviceOptions, KernelSet, ProductSet};
use crate::memory::PassLimits;
use crate::spec::{Activation, ModelSpec};
use ridge_kernels::cuda::ops::attention;
use ridge_kernels::cuda::ops::matmul::{Finish, Path, Products, X};
use ridge_kernels::cuda::ops::measure::MEASURED_ROWS;
use ridge_kernels::cuda::ops::pages::{KeyTurn, Pages, Write, write_kv};
use ridge_kernels::cuda::ops::rows::{self, Heads};
use ridge_kernels::cuda::ops::scaled::{self, Fp8Rows, ScaledFinish, ScaledType, ScaledWeight};
use ridge_kernels::cuda::plan::attention::{PrefillKernel, experimental_prefill_kernel, prefill_kernel};
use ridge_kernels::cuda::plan::gemv::ROWS_MAX;
use ridge_kernels::cuda::{Buffer, CudaError, Device};
use ridge_kernels::{Cpu, DType, Gate, KvFormat};
use ridge_protocol::BatchPlan;
use std::sync::Arc;
use std::time::Instant;

/// The pass and its buffers.
pub struct Pass {
    device: Arc<dyn Device>,
    scratch: Scratch,
    products: Products,
    /// Attention of chunks.
    prefill: PrefillKernel,
    graphs: Graphs,
    /// Whether pages of prompts go to the host as they are computed.
    ship: bool,
}

/// What multiplies, settled for this device: by measurement, if that is asked for, NVIDIA's library is there, and there is a folder in
/// which all processes of the machine find the same; else our own kernels.
pub fn products(
    device: &Arc<dyn Device>,
    weights: &DeviceWeights,
    options: &DeviceOptions,
) -> Result<Products, CudaError> {
    let products = Products::new(device, scratch_of(weights))?;
    let mut products = match options.kernels {
        KernelSet::Stable => products,
        KernelSet::Experimental => products.experimental(),
    };
    if options.products == ProductSet::Own {
        return Ok(products);
    }
    let Some(folder) = options.cache.as_deref() else {
        tracing::info!("products of prompts are Ridge's own: there is no folder to keep in what is measured");
        return Ok(products);
    };
    let (started, matrices) = (Instant::now(), measurable(weights));
    match products.add_library(&matrices) {
        Err(error) => tracing::info!("products of prompts are Ridge's own: {error}"),
        Ok(()) => {
            // SAFETY: these are the weights on the device.
            let measured = unsafe { products.measure(&matrices, MEASURED_ROWS, Some(folder))? };
            let ms = started.elapsed().as_millis() as u64;
            tracing::info!(measured = measured.len(), ms, "products of prompts are chosen by measurement");
        }
    }
    Ok(products)
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

/// Rows that matrices are multiplied by, in the compute type.
#[derive(Clone, Copy)]
struct Operand {
    address: u64,
    /// Whether the chunks' rows lie in `codes`, rounded to fp8, and perhaps nowhere else.
    rounded: bool,
}

impl Operand {
    /// As they are.
    fn plain(address: u64) -> Self {
        Self { address, rounded: false }
    }
}

impl Pass {
    /// Allocates for passes up to `limits`; a larger one allocates more.
    pub fn new(
        device: &Arc<dyn Device>,
        weights: &DeviceWeights,
        products: Products,
        format: &KvFormat,
        limits: PassLimits,
        options: &DeviceOptions,
    ) -> Result<Self, CudaError> {
        let apart = weights.layers.iter().any(|layer| !layer.gate.is_like(&layer.up));
        let linears = |layer: &Layer| {
            let heads = [&layer.query, &layer.key, &layer.value, &layer.out].map(|projection| projection.weight);
            heads.into_iter().chain([layer.gate, layer.up, layer.down]).any(|linear| linear.is_fp8())
        };
        let fp8 = weights.layers.iter().any(linears);
        let types = Types { compute: weights.compute, kv: format.dtype, apart, fp8 };
        let mut scratch = Scratch::new(device, &weights.spec, types)?;
        scratch.fit(limits)?;
        let (shared, sm) = (device.properties().shared_per_block as usize, device.properties().sm);
        let prefill = match options.kernels {
            KernelSet::Stable => prefill_kernel(format, shared),
            KernelSet::Experimental => experimental_prefill_kernel(format, shared, sm),
        };
        for (kernel, reason) in prefill.rejected {
            tracing::debug!("attention of prompts does not take {kernel:?}: {reason}");
        }
        Ok(Self {
            device: device.clone(),
            scratch,
            products,
            prefill: prefill.chosen,
            graphs: Graphs::new(options.graphs),
            ship: options.ship,
        })
    }

    /// How many passes were replayed as graphs.
    pub fn graph_replays(&self) -> u64 {
        self.graphs.replays()
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
        let lists = [&batch.tokens, &batch.sampled_rows, &Write::words(&writes), &shipped];
        let at = lists.map(|list| numbers.push(list));
        let (spec, prefill) = (&weights.spec, self.prefill);
        let whole = Attending::new(spec, prefill, &batch.steps, &batch.chunks, &mut numbers);
        let narrow = Attending::new(spec, prefill, &batch.sampled, &[], &mut numbers);
        // Behind the others, because their length is what changes as sequences grow: the other lists of steps stay where they are.
        let tables = numbers.push(&batch.tables);
        // No recorded launch reads these.
        let mut made = Made::by(plan, &format);
        made.iter_mut().for_each(|made| made.place(&mut numbers));
        let made: Arc<[Made]> = made.into();
        self.scratch.fit_parts(whole.workspace_bytes().max(narrow.workspace_bytes()))?;
        let base = self.scratch.upload(&numbers)?;
        let [tokens, sampled_rows, writes_at, shipped] = at.map(|at| base + at);

        let step = Step {
            device: &*self.device,
            weights,
            scratch: &self.scratch,
            products: &self.products,
            query: attention::query_dtype(format.dtype),
            numbers: base,
            tables: base + tables,
        };
        let chunks = batch.chunks.iter().map(|run| run.rows).sum();
        let lists = Lists {
            rows: Rows { steps: batch.steps.len(), chunks },
            tokens,
            sampled: (sampled_rows, batch.sampled.len()),
            writes: (writes_at, writes.len()),
            whole: &whole,
            narrow: &narrow,
            pages: (0..weights.layers.len()).map(|layer| pages.of_layer(layer)).collect(),
        };
        step.fill_inputs(cpu, &batch)?;
        let (mut landed, layers) = (|layer: usize| on_layer(layer as u32), weights.layers.len());
        if batch.chunks.is_empty() {
            let shape = Shape {
                steps: batch.steps.len(),
                sampled: batch.sampled.len(),
                attending: whole.shape().chain(narrow.shape()).collect(),
                generation: self.scratch.generation(),
            };
            // SAFETY: the launches of decode steps depend on the shape alone: their rows and lists have its lengths and lie where
            // those lengths put them, in buffers of its generation. The buffers hold this pass's numbers.
            unsafe { self.graphs.run(&self.device, shape, || step.run(&lists, &mut |_| Ok(())))? };
            // Once the device has been asked to write them.
            for layer in 0..layers {
                pages.keep(layer, &batch.written_by_steps);
                pages.ship(layer, (&[], 0), (&made, base), &mut landed)?;
            }
        } else {
            step.run(&lists, &mut |layer| {
                pages.keep(layer, &batch.written_by_steps);
                if self.ship {
                    let own = (&batch.written_by_chunks[..], shipped);
                    return pages.ship(layer, own, (&made, base), &mut landed);
                }
                pages.keep(layer, &batch.written_by_chunks);
                landed(layer);
                Ok(())
            })?;
        }
        pages.land_all(&mut landed)?;
        Ok(batch.sampled.len())
    }
}

/// What a pass's launches are told: counts, addresses of its lists, and the pages of every layer.
struct Lists<'a> {
    rows: Rows,
    tokens: u64,
    sampled: (u64, usize),
    writes: (u64, usize),
    whole: &'a Attending,
    narrow: &'a Attending,
    pages: Vec<Pages>,
}

impl Step<'_> {
    fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    fn whole(&self, rows: Rows) -> Activations {
        let s = self.scratch;
        Activations { rows, x: s.x.address(), h: s.h.address(), cos: s.cos.address(), sin: s.sin.address() }
    }

    /// Makes the pass's launches, up to the logits. `written(l)` is called when those that write layer `l`'s pages have been made.
    fn run(&self, lists: &Lists<'_>, written: &mut dyn FnMut(usize) -> Result<(), CudaError>) -> Result<(), CudaError> {
        self.embed(lists)?;
        let (mut now, mut attending) = (self.whole(lists.rows), lists.whole);
        let last = self.weights.layers.len() - 1;
        for (index, (layer, pages)) in self.weights.layers.iter().zip(&lists.pages).enumerate() {
            self.fill_cache(layer, &now, pages, lists.writes, index != last)?;
            written(index)?;
            if index == last {
                let (rows, count) = lists.sampled;
                if count == 0 {
                    return Ok(());
                }
                // Nothing reads the last layer's output except the sampled rows.
                now = self.narrow(&now, rows, count)?;
                attending = lists.narrow;
                self.query(layer, &now, Operand::plain(now.h))?;
            }
            self.attend(layer, &now, attending, *pages)?;
            self.feed_forward(layer, &now)?;
        }
        self.project(&now)
    }

    /// Fills the residual stream with embeddings from a table on the device.
    fn embed(&self, lists: &Lists<'_>) -> Result<(), CudaError> {
        let Embed::Device(dtype, table) = &self.weights.embed else { return Ok(()) };
        let shape = (lists.rows.all(), self.spec().hidden);
        // SAFETY: ids are below the vocabulary (the plan was checked), the table has a row for each, and `x` has room.
        unsafe { rows::embed(self.device, shape, lists.tokens, *dtype, *table, self.scratch.x.address()) }
    }

    /// Copies to the device what is made on the host: embeddings from a table there, and the cosines and sines of every row's
    /// position.
    fn fill_inputs(&self, cpu: &Cpu, batch: &Batch) -> Result<(), CudaError> {
        let (rows, hidden, s) = (batch.rows(), self.spec().hidden, self.scratch);
        if let Embed::Host(table) = &self.weights.embed {
            let read = |row: usize, bytes: &mut [u8]| {
                let read = table.read_row(batch.tokens[row] as usize, bytes);
                // The weights themselves are mapped, and would end the process just the same.
                read.unwrap_or_else(|error| panic!("the embedding of a token cannot be read: {error}"));
            };
            let mut x = vec![0.0; rows * hidden];
            cpu.embed(table.dtype, table.cols, &read, &mut x);
            s.x.upload(0, &x)?;
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
        let readers = [&layer.key.weight, &layer.value.weight, &layer.query.weight];
        // Queries of the last layer are computed later, from those rows of `h` that are sampled.
        let h = self.norm(layer.attn_norm, now, &readers, !with_queries)?;
        self.store(now.rows, h, &layer.key, s.k.address())?;
        self.store(now.rows, h, &layer.value, s.v.address())?;
        if with_queries {
            self.query(layer, now, h)?;
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

    /// Computes queries from the normed rows.
    fn query(&self, layer: &Layer, now: &Activations, h: Operand) -> Result<(), CudaError> {
        let (spec, s) = (self.spec(), self.scratch);
        self.store(now.rows, h, &layer.query, s.raw.address())?;
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
        let h = self.norm(layer.ffn_norm, now, &[&layer.gate, &layer.up], false)?;
        let (activation, out) = match spec.activation {
            Activation::Silu => (Gate::Silu, s.gated.address()),
            Activation::GeluTanh => (Gate::GeluTanh, s.gated.address()),
        };
        if layer.gate.is_like(&layer.up) {
            for (path, first, count) in now.rows.parts() {
                let (x, y) = (self.rows_of(h.address, first, count, spec.hidden), first * spec.ffn * bytes_of(compute));
                let y = out + y as u64;
                match (&layer.gate, &layer.up) {
                    (Linear::Scaled(gate), Linear::Scaled(up)) => {
                        let finish = ScaledFinish::Gated { up, activation, to: compute };
                        self.scaled(path, (x, h.rounded), gate, finish, y)?;
                    }
                    // SAFETY: `h` and `gated` have a row for each of these rows, as wide as the matrices on either side.
                    (Linear::Plain(gate), Linear::Plain(up)) => unsafe {
                        self.products.gated(path, x, gate, up, activation, compute, y)?;
                    },
                    _ => unreachable!("the two are alike"),
                }
            }
        } else {
            // Some quantisations store the two in different types.
            self.store(now.rows, h, &Projection::plain(layer.gate), s.gate.address())?;
            self.store(now.rows, h, &Projection::plain(layer.up), s.up.address())?;
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
        let h = self.norm(self.weights.norm, now, &[&self.weights.head], true)?;
        self.store(now.rows, h, &Projection::plain(self.weights.head), self.scratch.logits.address())
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

    /// Norms the residual stream into `h` for the matrices that it is multiplied by: rows of chunks are rounded to fp8 on the way if some
    /// are fp8, once for all of them, and are left out of `h` if all are and it need not `keep` them.
    fn norm(&self, weight: u64, now: &Activations, readers: &[&Linear], keep: bool) -> Result<Operand, CudaError> {
        let (spec, s, compute) = (self.spec(), self.scratch, self.weights.compute);
        let rounded = now.rows.chunks > 0 && readers.iter().any(|linear| linear.is_fp8());
        let plain = if rounded { now.rows.steps } else { now.rows.all() };
        let shape = (plain, spec.hidden);
        // SAFETY: `x` and `h` have these rows; the weight has an element for each column.
        unsafe { rows::rms_norm(self.device, shape, spec.norm_eps, now.x, weight, compute, now.h)? };
        if rounded {
            let to = Fp8Rows { address: s.codes.address(), scales: s.code_scales.address(), rows: now.rows.chunks };
            let x = now.x + (plain * spec.hidden * size_of::<f32>()) as u64;
            let h = now.h + (plain * spec.hidden * bytes_of(compute)) as u64;
            let h = if keep || !readers.iter().all(|linear| linear.is_fp8()) { h } else { 0 };
            // SAFETY: as above for the rows that follow; the codes have room for each of the pass's rows.
            unsafe { scaled::norm_rows(self.device, spec.hidden, spec.norm_eps, (x, weight), &to, h)? };
        }
        Ok(Operand { address: now.h, rounded })
    }

    /// `y = x·Wᵀ + bias` in f32.
    fn store(&self, rows: Rows, x: Operand, projection: &Projection, y: u64) -> Result<(), CudaError> {
        let finish = Finish::Store { bias: projection.bias, to: DType::F32 };
        self.product(rows, x, &projection.weight, finish, y)
    }

    /// `y = y + x·Wᵀ + bias` in f32.
    fn add(&self, rows: Rows, x: u64, weight: &Linear, bias: u64, y: u64) -> Result<(), CudaError> {
        self.product(rows, Operand::plain(x), weight, Finish::Add { bias }, y)
    }

    fn product(&self, rows: Rows, operand: Operand, weight: &Linear, finish: Finish, y: u64) -> Result<(), CudaError> {
        for (path, first, count) in rows.parts() {
            let x = self.rows_of(operand.address, first, count, weight.k());
            let y = y + (first * weight.n() * size_of::<f32>()) as u64;
            match weight {
                // SAFETY: the callers' buffers have a row for each of `rows`, as wide as the matrix on either side.
                Linear::Plain(weight) => unsafe { self.products.matmul(path, x, weight, finish, y)? },
                Linear::Scaled(weight) => {
                    self.scaled(path, (x, operand.rounded), weight, ScaledFinish::Plain(finish), y)?
                }
            }
        }
        Ok(())
    }

    /// A product with an fp8 or fp4 matrix: few rows as they are; many rounded to fp8 first unless they are already, or by the matrix in
    /// bf16 if it is fp4.
    fn scaled(
        &self,
        path: Path,
        (x, rounded): (X, bool),
        weight: &ScaledWeight,
        finish: ScaledFinish<'_>,
        y: u64,
    ) -> Result<(), CudaError> {
        let y_row =
            weight.n * if matches!(finish, ScaledFinish::Gated { .. }) { bytes_of(self.weights.compute) } else { 4 };
        let x_row = weight.k * bytes_of(x.dtype);
        match path {
            Path::Skinny => {
                for first in (0..x.rows).step_by(ROWS_MAX) {
                    let few =
                        X { address: x.address + (first * x_row) as u64, rows: (x.rows - first).min(ROWS_MAX), ..x };
                    // SAFETY: as in `product`, for these of the rows.
                    unsafe { scaled::skinny(self.device, few, weight, finish, y + (first * y_row) as u64)? };
                }
                Ok(())
            }
            Path::Gemm if weight.dtype == ScaledType::NvFp4 => {
                // SAFETY: as in `product`; the scratch was made for it.
                unsafe { self.products.fp4(x, weight, finish, y) }
            }
            Path::Gemm => {
                let s = self.scratch;
                let to = Fp8Rows { address: s.codes.address(), scales: s.code_scales.address(), rows: x.rows };
                // SAFETY: as in `product`; the codes have room for each of the pass's rows, and the stream's order keeps an earlier
                // product that reads them apart from this.
                unsafe {
                    if !rounded {
                        scaled::quantize_rows(self.device, x, weight.k, &to)?;
                    }
                    self.products.fp8(&to, weight, finish, y)
                }
            }
        }
    }

    /// Some rows of an operand in the compute type, `width` elements each.
    fn rows_of(&self, x: u64, first: usize, rows: usize, width: usize) -> X {
        let dtype = self.weights.compute;
        X { address: x + (first * width * bytes_of(dtype)) as u64, dtype, rows }
    }
}
