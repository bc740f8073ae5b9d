//! The engine on a CUDA device: weights and pages there, the pass as launches, and the host's pages kept up to date.
//!
//! [`CudaEngine`] keeps the promises of [`Engine`] as the CPU's does: what a peer shipped is in the host's pages when it is asked to
//! run, and what it wrote is there when it says so. Read it, then [`pass`] (the launches), [`pages`] (the traffic between the two
//! memories) and [`weights`]. The kernels are in the kernels crate; the device may be an emulated one, which is how all of this is
//! tested.

mod attending;
mod batch;
mod pages;
mod pass;
mod scratch;
mod weights;

pub use scratch::scratch_bytes;
pub use weights::{WeightsError, compute_type, device_bytes};

pub(crate) use pages::LAYERS_UNDER_WAY;

use crate::checkpoint::Checkpoint;
use crate::device::KernelSet;
use crate::engine::{Engine, EngineError, Output, check_layout};
use crate::forward::check;
use crate::kv::KvMemory;
use crate::memory::PassLimits;
use crate::sampling::sample_rows;
use crate::spec::ModelSpec;
use pages::DevicePages;
use pass::Pass;
use ridge_kernels::Cpu;
use ridge_kernels::cuda::{CudaError, Device};
use ridge_protocol::BatchPlan;
use std::sync::Arc;
use std::time::Instant;
use weights::DeviceWeights;

/// Uploads report their progress in the log when they take longer than this, and about as often.
const PROGRESS_EVERY: std::time::Duration = std::time::Duration::from_secs(2);

/// The engine that computes on a CUDA device.
pub struct CudaEngine {
    weights: DeviceWeights,
    pages: DevicePages,
    pass: Pass,
    /// Samples, and decodes rows of a quantised embedding.
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
        kernels: KernelSet,
    ) -> Result<Self, EngineError> {
        check_layout(&checkpoint.spec, &kv)?;
        check_heads(&checkpoint.spec)?;
        if kernels == KernelSet::Experimental {
            tracing::warn!(
                "--kernels experimental: kernels that no device has checked yet are used where there are any"
            );
        }
        let weights = upload(&device, checkpoint)?;
        let pages = DevicePages::new(&device, kv)?;
        let pass = Pass::new(&device, &weights, pages.format(), limits)?;
        Ok(Self { weights, pages, pass, cpu })
    }

    /// Logits of the items that sample, `[items, vocab]` in their order; otherwise as [`Engine::run`].
    ///
    /// # Errors
    ///
    /// What the device refused. What it holds is then unknown.
    pub fn logits(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Result<&mut [f32], CudaError> {
        check(plan, &self.weights.spec, self.pages.host());
        self.pass.run(&self.weights, &mut self.pages, &self.cpu, plan, on_layer)
    }
}

/// The kernels are made for the sizes of heads that models have.
fn check_heads(spec: &ModelSpec) -> Result<(), CudaError> {
    let dim = spec.head_dim;
    match dim.is_multiple_of(8) && dim <= 256 && spec.hidden.is_multiple_of(2) {
        true => Ok(()),
        false => Err(CudaError::Unavailable(format!(
            "the CUDA kernels take heads of a multiple of 8 elements up to 256 and an even hidden size; this model has {dim} and {}",
            spec.hidden
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
    let bytes = device_bytes(checkpoint)?;
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
        let vocab = self.weights.spec.vocab;
        check(plan, &self.weights.spec, self.pages.host());
        let logits = self.pass.run(&self.weights, &mut self.pages, &self.cpu, plan, on_layer);
        // Nobody above can go on without the device; the node's supervisor starts it again.
        let logits = logits.unwrap_or_else(|error| panic!("step {}: the device failed: {error}", plan.step));
        let wanted: Vec<_> = plan.items.iter().filter_map(|item| Some((item.request, item.sample.as_ref()?))).collect();
        let specs: Vec<_> = wanted.iter().map(|(_, spec)| *spec).collect();
        let tokens = sample_rows(self.cpu.pool(), logits, vocab, &specs);
        wanted.iter().zip(tokens).map(|((request, _), token)| Output { request: *request, token }).collect()
    }

    fn kv(&self) -> &Arc<KvMemory> {
        self.pages.host()
    }

    fn spec(&self) -> &ModelSpec {
        self.weights.spec()
    }
}
