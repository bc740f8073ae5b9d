//! The engine on a CUDA device: weights and pages there, the pass as launches, and the host's pages kept up to date.
//!
//! [`CudaEngine`] keeps the promises of [`Engine`] as the CPU's does: what a peer shipped is in the host's pages when it is asked to
//! run, and what it wrote is there when it says so. Read it, then [`pass`] (the launches), [`pages`] (the traffic between the two
//! memories) and [`weights`]. The kernels are in the kernels crate; the device may be an emulated one, which is how all of this is
//! tested.

mod attending;
mod batch;
mod graphs;
mod made;
pub mod monitor;
mod pages;
mod pass;
pub mod sampler;
mod scratch;
mod weights;

pub use weights::WeightsError;

pub(crate) use pages::{outgoing_bytes, staging_bytes};

use crate::checkpoint::{Checkpoint, LoadError};
use crate::device::{DeviceOptions, KernelSet, ProductSet};
use crate::engine::{Engine, EngineError, Output, check_layout, constraints, rows, sampling};
use crate::forward::check;
use crate::grammar::Constraints;
use crate::kv::KvMemory;
use crate::memory::PassLimits;
use crate::spec::ModelSpec;
use pages::DevicePages;
use pass::Pass;
use ridge_kernels::cuda::ops::blas;
use ridge_kernels::cuda::ops::matmul::Products;
use ridge_kernels::cuda::ops::sampling::{Sampler, scratch_bytes};
use ridge_kernels::cuda::{CudaError, Device};
use ridge_kernels::{Cpu, KvFormat};
use ridge_protocol::BatchPlan;
use sampler::sample_rows;
use scratch::Types;
use std::sync::Arc;
use std::time::Instant;
use weights::DeviceWeights;

/// Uploads report their progress in the log when they take longer than this, and about as often.
const PROGRESS_EVERY: std::time::Duration = std::time::Duration::from_secs(2);

/// Bytes that an engine takes on its device besides its KV pool, worked out from the checkpoint's headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footprint {
    /// Weights.
    pub weights: u64,
    /// What products need beside their operands.
    pub products: u64,
    /// Buffers of the largest pass, and pages on their way to the host.
    pub activations: u64,
}

impl Footprint {
    /// For passes up to `pass` with such a cache, on a device of compute capability `sm / 10`.
    pub fn of(
        checkpoint: &Checkpoint,
        format: &KvFormat,
        pass: PassLimits,
        options: &DeviceOptions,
        sm: u32,
    ) -> Result<Self, LoadError> {
        let stored =
            |layer: usize, name: &str| checkpoint.tensors.get(&format!("layers.{layer}.{name}")).map(|t| t.dtype);
        let mut apart = false;
        for layer in 0..checkpoint.spec.layers {
            apart |= stored(layer, "w_gate")? != stored(layer, "w_up")?;
        }
        let fp8 = weights::has_fp8(checkpoint, sm)?;
        let types = Types { compute: weights::compute_type(checkpoint)?, kv: format.dtype, apart, fp8 };
        let sampling = scratch_bytes(pass.sequences, checkpoint.spec.vocab, true) as u64;
        let spec = &checkpoint.spec;
        let columns = spec.hidden.max(spec.ffn).max(spec.heads * spec.head_dim);
        let library = match options.products {
            ProductSet::Measured if blas::is_present() => Products::library_bytes(columns) as u64,
            ProductSet::Measured | ProductSet::Own => 0,
        };
        let staging = pages::staging_bytes(format, KvMemory::page_stride_of(format), pass);
        Ok(Self {
            weights: weights::device_bytes(checkpoint, sm)?,
            products: weights::product_bytes(checkpoint, sm)? + library,
            activations: scratch::scratch_bytes(&checkpoint.spec, types, pass) + staging + sampling,
        })
    }
}

/// Largest vocabulary that the device samples from.
const VOCAB_MAX: usize = 1 << 19;

/// The engine that computes on a CUDA device.
pub struct CudaEngine {
    weights: DeviceWeights,
    pages: DevicePages,
    pass: Pass,
    sampler: Sampler,
    constraints: Constraints,
    /// Decodes rows of a quantised embedding.
    cpu: Cpu,
}

impl CudaEngine {
    /// Brings weights to the device and gives every page of `kv` its copy there. Passes up to `limits` allocate nothing later.
    pub fn new(
        checkpoint: &Checkpoint,
        kv: Arc<KvMemory>,
        cpu: Cpu,
        device: Arc<dyn Device>,
        limits: PassLimits,
        options: &DeviceOptions,
    ) -> Result<Self, EngineError> {
        check_layout(&checkpoint.spec, &kv)?;
        check_heads(&checkpoint.spec)?;
        if options.kernels == KernelSet::Experimental {
            tracing::warn!(
                "--kernels experimental: kernels that no device has checked yet are used where there are any"
            );
        }
        let weights = upload(&device, checkpoint)?;
        // Before the pages, because measuring takes memory for a while.
        let products = pass::products(&device, &weights, options)?;
        let pages = DevicePages::new(&device, kv, limits)?;
        let pass = Pass::new(&device, &weights, products, pages.format(), limits, options)?;
        let sampler = Sampler::new(&device, checkpoint.spec.vocab)?;
        Ok(Self { weights, pages, pass, sampler, constraints: constraints(checkpoint), cpu })
    }

    /// How many decode steps were replayed as graphs.
    pub fn graph_replays(&self) -> u64 {
        self.pass.graph_replays()
    }

    /// Logits of the items that sample, `[items, vocab]` in their order; otherwise as [`Engine::run`].
    ///
    /// # Errors
    ///
    /// What the device refused. What it holds is then unknown.
    pub fn logits(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Result<Vec<f32>, CudaError> {
        let rows = self.compute(plan, on_layer)?;
        self.pass.logits().to_vec(rows * self.weights.spec.vocab)
    }

    /// Runs a plan up to the logits; returns how many items sample.
    fn compute(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Result<usize, CudaError> {
        check(plan, &self.weights.spec, self.pages.host());
        self.pass.run(&self.weights, &mut self.pages, &self.cpu, plan, on_layer)
    }

    /// Runs a plan and samples.
    fn sample(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Result<Vec<Output>, CudaError> {
        check(plan, &self.weights.spec, self.pages.host());
        let wanted = sampling(plan);
        let pass = || self.pass.run(&self.weights, &mut self.pages, &self.cpu, plan, on_layer);
        let (computed, allowed) = self.constraints.beside(&wanted, pass);
        assert_eq!(wanted.len(), computed?, "a row of logits for each item that samples");
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let rows = rows(&wanted, &allowed);
        let tokens = sample_rows(&mut self.sampler, self.pass.logits(), self.weights.spec.vocab, &rows)?;
        Ok(self.constraints.take(&wanted, allowed, tokens))
    }
}

/// The kernels are made for the sizes of heads that models have.
fn check_heads(spec: &ModelSpec) -> Result<(), CudaError> {
    let dim = spec.head_dim;
    if spec.vocab > VOCAB_MAX {
        let text = format!("the CUDA kernels choose among {VOCAB_MAX} tokens at most; this model has {}", spec.vocab);
        return Err(CudaError::Unavailable(text));
    }
    // Rows of every operand begin at multiples of 16 bytes then.
    match [dim, spec.hidden, spec.ffn].iter().all(|size| size.is_multiple_of(8)) && dim <= 256 {
        true => Ok(()),
        false => Err(CudaError::Unavailable(format!(
            "the CUDA kernels take heads of up to 256 elements, and sizes that are multiples of 8: this model has heads of {dim}, a \
             hidden size of {} and a feed-forward size of {}",
            spec.hidden, spec.ffn
        ))),
    }
}

/// Uploads the weights and says how it goes.
fn upload(device: &Arc<dyn Device>, checkpoint: &Checkpoint) -> Result<DeviceWeights, EngineError> {
    let started = Instant::now();
    let mut said = started;
    let weights = DeviceWeights::new(device, checkpoint, &mut |done, total| {
        if said.elapsed() >= PROGRESS_EVERY {
            said = Instant::now();
            tracing::info!(done_mib = done >> 20, total_mib = total >> 20, "weights go to the device");
        }
    })
    .map_err(|error| match error {
        WeightsError::Checkpoint(error) => EngineError::Checkpoint(error),
        WeightsError::Device(error) => EngineError::Device(error),
    })?;
    let bytes = weights::device_bytes(checkpoint, device.properties().sm)?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(
        mib = bytes >> 20,
        ms = started.elapsed().as_millis() as u64,
        mb_per_s = (bytes as f64 / seconds / 1e6) as u64,
        "weights are on the device"
    );
    Ok(weights)
}

impl Engine for CudaEngine {
    fn run(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Vec<Output> {
        // Nobody above can go on without the device; the node's supervisor starts it again.
        self.sample(plan, on_layer).unwrap_or_else(|error| panic!("step {}: the device failed: {error}", plan.step))
    }

    fn kv(&self) -> &Arc<KvMemory> {
        self.pages.host()
    }

    fn spec(&self) -> &ModelSpec {
        self.weights.spec()
    }
}
