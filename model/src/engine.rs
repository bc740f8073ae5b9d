//! The engine: runs a [`BatchPlan`] over KV memory and returns the sampled tokens.
//!
//! A node's shell gives it plans and ships what it writes; the engine knows neither queues nor peers. Read
//! [`Engine`] first.

use crate::checkpoint::{Checkpoint, LoadError};
use crate::forward::{Forward, Weights};
use crate::kv::KvMemory;
use crate::sampling::sample_rows;
use crate::spec::ModelSpec;
use ridge_kernels::cuda::CudaError;
use ridge_kernels::{Cpu, KvDtype, KvFormat};
use ridge_protocol::{BatchPlan, CacheDtype, KV_LAYOUT, ModelIdentity, RequestId, TokenOut};
use std::path::Path;
use std::sync::Arc;

/// A token that a pass produced.
#[derive(Clone, PartialEq, Debug)]
pub struct Output {
    /// The sequence it continues.
    pub request: RequestId,
    /// The token.
    pub token: TokenOut,
}

/// Computes passes. One engine belongs to one thread; its KV memory is shared with whoever ships pages.
pub trait Engine: Send {
    /// Runs one pass and samples for every item that asks for it, in the order of the items.
    ///
    /// `on_layer(l)` is called once layer `l`'s keys and values of all items are in their pages: finished blocks of
    /// that layer may be shipped while the next layer is computed.
    ///
    /// # Panics
    ///
    /// If the plan is impossible (no tokens, a token outside the vocabulary, a block table that does not cover the
    /// positions, a page in use by someone else): all of these are bugs of the scheduler.
    fn run(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Vec<Output>;

    /// The memory that plans' block numbers refer to.
    fn kv(&self) -> &Arc<KvMemory>;

    /// What is computed.
    fn spec(&self) -> &ModelSpec;
}

/// Why an engine could not be built.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EngineError {
    /// The checkpoint lacks a tensor.
    #[error(transparent)]
    Checkpoint(#[from] LoadError),
    /// The KV memory was laid out for another model.
    #[error("KV memory has {field} {found}, the model needs {wanted}")]
    KvLayout {
        /// What differs.
        field: &'static str,
        /// The memory's value.
        found: usize,
        /// The model's value.
        wanted: usize,
    },
    /// The device refused something.
    #[error(transparent)]
    Device(#[from] CudaError),
}

/// Checks that KV memory was laid out for a model.
pub(crate) fn check_layout(spec: &ModelSpec, kv: &KvMemory) -> Result<(), EngineError> {
    let format = kv.format();
    let layout = [
        ("layers", kv.layers(), spec.layers),
        ("kv heads", format.kv_heads, spec.kv_heads),
        ("head dim", format.head_dim, spec.head_dim),
    ];
    match layout.into_iter().find(|(_, found, wanted)| found != wanted) {
        None => Ok(()),
        Some((field, found, wanted)) => Err(EngineError::KvLayout { field, found, wanted }),
    }
}

/// The engine that computes on CPU cores.
pub struct CpuEngine {
    weights: Weights,
    kv: Arc<KvMemory>,
    cpu: Cpu,
    forward: Forward,
}

impl CpuEngine {
    /// Joins weights, memory and threads. Large packed weights are kept in a file in the folder `cache`, if there is one. Of the
    /// checkpoint, the engine keeps the embedding.
    pub fn new(
        checkpoint: &Checkpoint,
        kv: Arc<KvMemory>,
        cpu: Cpu,
        cache: Option<&Path>,
    ) -> Result<Self, EngineError> {
        check_layout(&checkpoint.spec, &kv)?;
        let weights = Weights::new(checkpoint, &cpu, cache)?;
        Ok(Self { weights, kv, cpu, forward: Forward::default() })
    }
}

impl Engine for CpuEngine {
    fn run(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Vec<Output> {
        let vocab = self.weights.spec().vocab;
        let logits = self.forward.run(&self.weights, &self.kv, &self.cpu, plan, on_layer);
        let wanted: Vec<_> = plan.items.iter().filter_map(|item| Some((item.request, item.sample.as_ref()?))).collect();
        let specs: Vec<_> = wanted.iter().map(|(_, spec)| *spec).collect();
        let tokens = sample_rows(self.cpu.pool(), logits, vocab, &specs);
        wanted.iter().zip(tokens).map(|((request, _), token)| Output { request: *request, token }).collect()
    }

    fn kv(&self) -> &Arc<KvMemory> {
        &self.kv
    }

    fn spec(&self) -> &ModelSpec {
        self.weights.spec()
    }
}

/// The protocol's name for an element type.
pub fn cache_dtype(dtype: KvDtype) -> CacheDtype {
    match dtype {
        KvDtype::F32 => CacheDtype::F32,
        KvDtype::F16 => CacheDtype::F16,
        KvDtype::BF16 => CacheDtype::Bf16,
        KvDtype::Fp8 => CacheDtype::Fp8,
        KvDtype::Int8 => CacheDtype::Int8,
    }
}

/// What another node must agree with before KV of this checkpoint in this layout may pass.
pub fn identity(checkpoint: &Checkpoint, format: &KvFormat) -> ModelIdentity {
    let narrow = |value: usize| u32::try_from(value).expect("`ModelSpec::defect` bounds every size");
    let identity = ModelIdentity {
        weights: checkpoint.weights_digest,
        config: checkpoint.config_digest,
        tokenizer: checkpoint.tokenizer_digest,
        layers: narrow(checkpoint.spec.layers),
        kv_heads: narrow(format.kv_heads),
        head_dim: narrow(format.head_dim),
        block_size: narrow(format.block_size),
        kv_dtype: cache_dtype(format.dtype),
        kv_layout: KV_LAYOUT.into(),
        rope: checkpoint.spec.rope.canonical(),
    };
    // The identity's readers compute sizes from it: both must mean the same page.
    assert_eq!(identity.page_bytes(), format.page_bytes());
    identity
}
