//! The engine: runs a [`BatchPlan`] over KV memory and returns the sampled tokens.
//!
//! A node's shell gives it plans and ships what it writes; the engine knows neither queues nor peers. Read
//! [`Engine`] first.

use crate::checkpoint::{Checkpoint, LoadError};
use crate::forward::{Forward, Weights};
use crate::grammar::{Allowed, Constraints, Grammars};
use crate::kv::KvMemory;
use crate::sampling::sample_rows;
use crate::spec::ModelSpec;
use ridge_kernels::cuda::CudaError;
use ridge_kernels::{Cpu, KvDtype, KvFormat};
use ridge_protocol::{BatchPlan, CacheDtype, KV_LAYOUT, ModelIdentity, NoToken, RequestId, SampleSpec, TokenOut};
use std::path::Path;
use std::sync::Arc;

/// A token that a pass produced.
#[derive(Clone, PartialEq, Debug)]
pub struct Output {
    /// The sequence it continues.
    pub request: RequestId,
    /// The token, or why there is none.
    pub token: Result<TokenOut, NoToken>,
}

/// Computes passes. One engine belongs to one thread; its KV memory is shared with whoever ships pages.
pub trait Engine: Send {
    /// Runs one pass and samples for every item that asks for it, in the order of the items.
    ///
    /// `on_layer(l)` is called once layer `l`'s keys and values of all items are in their pages: finished blocks of
    /// that layer may be shipped while the next layer is computed. Pages for an item's reader may then be in
    /// [`KvMemory::outgoing`]; an engine need not make them.
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
    constraints: Constraints,
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
        Ok(Self { weights, kv, cpu, forward: Forward::default(), constraints: constraints(checkpoint) })
    }
}

impl Engine for CpuEngine {
    fn run(&mut self, plan: &BatchPlan, on_layer: &mut dyn FnMut(u32)) -> Vec<Output> {
        let (weights, kv, cpu) = (&self.weights, &*self.kv, &self.cpu);
        let (forward, constraints) = (&mut self.forward, &mut self.constraints);
        let wanted = sampling(plan);
        let (logits, allowed) = constraints.beside(&wanted, move || forward.run(weights, kv, cpu, plan, on_layer));
        let tokens = sample_rows(cpu.pool(), logits, weights.spec().vocab, &rows(&wanted, &allowed));
        constraints.take(&wanted, allowed, tokens)
    }

    fn kv(&self) -> &Arc<KvMemory> {
        &self.kv
    }

    fn spec(&self) -> &ModelSpec {
        self.weights.spec()
    }
}

/// What a model's engine follows constrained answers with.
pub(crate) fn constraints(checkpoint: &Checkpoint) -> Constraints {
    Constraints::new(Arc::new(Grammars::new(checkpoint.tokenizer.clone(), checkpoint.spec.vocab)))
}

/// The items that sample.
pub(crate) fn sampling(plan: &BatchPlan) -> Vec<(RequestId, &SampleSpec)> {
    plan.items.iter().filter_map(|item| Some((item.request, item.sample.as_ref()?))).collect()
}

/// How each of them samples, and from which tokens.
pub(crate) fn rows<'a>(
    wanted: &[(RequestId, &'a SampleSpec)],
    allowed: &'a [Allowed],
) -> Vec<(&'a SampleSpec, Option<&'a [u32]>)> {
    wanted.iter().zip(allowed).map(|((_, spec), allowed)| (*spec, allowed.mask())).collect()
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
