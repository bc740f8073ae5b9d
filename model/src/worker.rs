//! An engine on its own thread, and how a node's engine is made from options.
//!
//! Kernels never run on the async runtime's threads. A [`Worker`] takes one [`BatchPlan`] at a time and reports through
//! a callback; [`load_engine`] turns [`EngineOptions`] into weights, KV memory and an engine, or says why not.

use crate::checkpoint::{Checkpoint, LoadError, LoadOptions, LoadProgress, ModelSource, TensorMap, load};
use crate::engine::{CpuEngine, Engine, EngineError, identity};
use crate::kv::{KvError, KvMemory};
use ridge_kernels::sync::pool::pin_to;
use ridge_kernels::{Cpu, DType, KvDtype, KvFormat};
use ridge_protocol::{BatchPlan, Duration, ModelIdentity, RequestId, TokenOut};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Sequences of the longest length that the default KV pool has room for, memory permitting.
const DEFAULT_SEQUENCES: usize = 16;
/// Share of the machine's available memory that a default KV pool may take: several nodes may share the machine.
const DEFAULT_MEMORY_SHARE: u64 = 5;

/// How a node's engine is set up.
#[derive(Clone, PartialEq, Debug)]
pub struct EngineOptions {
    /// A folder, a `.gguf` file, or a Hugging Face repository id.
    pub model: String,
    /// Threads that compute, at least one.
    pub threads: usize,
    /// Cores to pin them to, in order.
    pub cores: Option<Vec<usize>>,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Element type of the KV cache; `None` follows the weights.
    pub kv_dtype: Option<KvDtype>,
    /// Longest prompt plus answer; `None` takes what the model was trained for, as far as the pool has room.
    pub max_model_len: Option<usize>,
    /// Blocks in the pool; `None` derives them from the memory.
    pub kv_blocks: Option<usize>,
    /// Bytes of KV memory; `None` takes a share of what is available.
    pub kv_memory_bytes: Option<u64>,
    /// Folder for packed weights, shared by the machine's processes; `None` packs into private memory.
    pub weights_cache: Option<PathBuf>,
}

/// Why a node's engine could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The KV memory could not be had.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// Weights and memory do not fit together.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An option is out of range.
    #[error("{0}")]
    Option(String),
}

/// Everything a node needs to know about its engine, and the engine itself.
pub struct LoadedEngine {
    /// The model.
    pub checkpoint: Arc<Checkpoint>,
    /// Its KV memory.
    pub kv: Arc<KvMemory>,
    /// What computes.
    pub engine: Box<dyn Engine>,
    /// What other nodes must agree with.
    pub identity: ModelIdentity,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: usize,
}

/// Loads a model and lays out its KV memory.
pub fn load_engine(
    options: &EngineOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedEngine, SetupError> {
    if options.threads == 0 {
        return Err(SetupError::Option("--threads must be at least 1".into()));
    }
    if options.block_size == 0 || options.block_size > 1024 {
        return Err(SetupError::Option(format!("--block-size must be between 1 and 1024, got {}", options.block_size)));
    }
    let source = ModelSource::parse(&options.model)?;
    let mut checkpoint = load(&source, &LoadOptions::default(), progress)?;
    let spec = &checkpoint.spec;
    let format = KvFormat {
        dtype: options.kv_dtype.unwrap_or_else(|| default_kv_dtype(&checkpoint)),
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        block_size: options.block_size,
    };
    let (blocks, max_model_len) = plan_kv(options, &format, spec.layers, spec.context)?;
    let kv = Arc::new(KvMemory::new(format, spec.layers, blocks)?);
    let cpu = Cpu::new(options.threads, options.cores.as_deref());
    let engine = Box::new(CpuEngine::new(&checkpoint, kv.clone(), cpu, options.weights_cache.as_deref())?);
    let identity = identity(&checkpoint, &format);
    tracing::info!(
        model = %checkpoint.name,
        weights_mib = checkpoint.tensors.bytes() >> 20,
        kv_mib = (blocks * spec.layers * format.page_bytes()) >> 20,
        blocks,
        max_model_len,
        "engine is ready"
    );
    // The engine has what it needs of them.
    checkpoint.tensors = TensorMap::default();
    Ok(LoadedEngine { checkpoint: Arc::new(checkpoint), kv, engine, identity, max_model_len })
}

/// KV follows the weights: 16 bits for what is stored in 16 bits or fewer.
pub fn default_kv_dtype(checkpoint: &Checkpoint) -> KvDtype {
    match checkpoint.tensors.get("layers.0.wq").map(|t| t.dtype) {
        Ok(DType::F32) => KvDtype::F32,
        Ok(DType::BF16) => KvDtype::BF16,
        _ => KvDtype::F16,
    }
}

/// Number of blocks and the context length they allow.
fn plan_kv(
    options: &EngineOptions,
    format: &KvFormat,
    layers: usize,
    context: usize,
) -> Result<(usize, usize), SetupError> {
    let block_bytes = (format.page_bytes() * layers) as u64;
    let wanted_len = options.max_model_len.unwrap_or(context);
    if wanted_len < 2 {
        return Err(SetupError::Option("--max-model-len must be at least 2".into()));
    }
    if wanted_len > context {
        return Err(SetupError::Option(format!(
            "--max-model-len {wanted_len} is more than the {context} tokens this model was made for"
        )));
    }
    let per_sequence = wanted_len.div_ceil(format.block_size);
    let budget = options.kv_memory_bytes.unwrap_or_else(|| available_memory() / DEFAULT_MEMORY_SHARE);
    let affordable = (budget / block_bytes) as usize;
    let blocks = match (options.kv_blocks, options.kv_memory_bytes) {
        (Some(blocks), _) => blocks,
        (None, Some(_)) => affordable,
        (None, None) => affordable.min(per_sequence * DEFAULT_SEQUENCES),
    };
    if blocks >= per_sequence {
        return Ok((blocks, wanted_len));
    }
    let fits = blocks * format.block_size;
    if options.max_model_len.is_some() || fits < 2 {
        return Err(SetupError::Option(format!(
            "the KV pool has {blocks} blocks of {block_bytes} bytes, room for {fits} tokens, but one sequence of \
             --max-model-len {wanted_len} needs {per_sequence} blocks: raise --kv-memory or lower --max-model-len"
        )));
    }
    tracing::warn!("context cut from {wanted_len} to {fits} tokens: KV memory has no room for more");
    Ok((blocks, fits))
}

/// Memory the system could give without swapping, in bytes.
pub fn available_memory() -> u64 {
    const FALLBACK: u64 = 4 << 30;
    let Ok(info) = std::fs::read_to_string("/proc/meminfo") else { return FALLBACK };
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map_or(FALLBACK, |kib| kib << 10)
}

/// What a worker reports.
#[derive(Clone, PartialEq, Debug)]
pub enum WorkerEvent {
    /// One layer's keys and values of the whole pass are in their pages.
    LayerDone {
        /// The pass.
        step: u64,
        /// The layer, from 0.
        layer: u32,
    },
    /// The pass is over.
    StepDone {
        /// The pass.
        step: u64,
        /// Sampled tokens.
        outputs: Vec<(RequestId, TokenOut)>,
        /// How long it took.
        busy: Duration,
    },
}

/// An engine on its own thread.
#[derive(Debug)]
pub struct Worker {
    plans: Option<SyncSender<BatchPlan>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Moves an engine to a new thread, which runs on `core` if given: it computes beside the engine's own threads.
    /// `report` is called there; layers are reported only if `layers` is set.
    pub fn spawn(
        mut engine: Box<dyn Engine>,
        core: Option<usize>,
        layers: bool,
        mut report: impl FnMut(WorkerEvent) + Send + 'static,
    ) -> Self {
        let (plans, queue) = sync_channel::<BatchPlan>(1);
        let run = move || {
            if let Some(core) = core {
                pin_to(core);
            }
            while let Ok(plan) = queue.recv() {
                let begin = std::time::Instant::now();
                let step = plan.step;
                let outputs = engine.run(&plan, &mut |layer| {
                    if layers {
                        report(WorkerEvent::LayerDone { step, layer });
                    }
                });
                let outputs = outputs.into_iter().map(|o| (o.request, o.token)).collect();
                report(WorkerEvent::StepDone { step, outputs, busy: begin.elapsed() });
            }
        };
        let thread =
            std::thread::Builder::new().name("engine".into()).spawn(run).expect("the system can start a thread");
        Self { plans: Some(plans), thread: Some(thread) }
    }

    /// Starts a pass. The scheduler never gives a second one before the first is over, so this does not block.
    pub fn run(&self, plan: BatchPlan) -> Result<(), WorkerDied> {
        self.plans.as_ref().and_then(|plans| plans.try_send(plan).ok()).ok_or(WorkerDied)
    }
}

/// The engine's thread is gone: it panicked, and its message is on standard error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the engine's thread died")]
pub struct WorkerDied;

impl Drop for Worker {
    fn drop(&mut self) {
        self.plans = None;
        if let Some(thread) = self.thread.take() {
            // A panic was already printed by the thread itself.
            let _ = thread.join();
        }
    }
}
