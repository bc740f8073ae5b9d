//! An engine on its own thread, and how a node's engine is made from options.
//!
//! Kernels never run on the async runtime's threads. A [`Worker`] takes one [`BatchPlan`] at a time and reports through
//! a callback; [`load_engine`] turns [`EngineOptions`] into weights, KV memory and an engine, or says why not.

use crate::checkpoint::{Checkpoint, LoadError, LoadOptions, LoadProgress, ModelSource, TensorMap, load};
use crate::cuda::monitor::Monitor;
use crate::cuda::{CudaEngine, Footprint};
use crate::device::{self, DeviceChoice, DeviceOptions};
use crate::engine::{CpuEngine, Engine, EngineError, identity};
use crate::kv::{KvError, KvMemory};
use crate::mapping::HugePages;
use crate::memory::device::{DeviceDemand, DeviceRefusal};
use crate::memory::machine::MachineMemory;
use crate::memory::{self, Demand, KvDemand, MemoryPlan, OnDevice, PassLimits, Refusal, WeightBytes};
use ridge_kernels::cuda::CudaError;
use ridge_kernels::sync::pool::{Placement, lower_priority, pin_to};
use ridge_kernels::{Cpu, DType, KvDtype, KvFormat};
use ridge_protocol::{BatchPlan, Duration, ModelIdentity, NoToken, RequestId, TokenOut};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// How a node's engine is set up.
#[derive(Clone, PartialEq, Debug)]
pub struct EngineOptions {
    /// A folder, a `.gguf` file, or a Hugging Face repository id.
    pub model: String,
    /// Threads that compute, at least one, and where.
    pub placement: Placement,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Element type of the KV cache; `None` follows the weights.
    pub kv_dtype: Option<KvDtype>,
    /// Longest prompt plus answer; `None` takes what the model was trained for, as far as the pool has room.
    pub max_model_len: Option<usize>,
    /// How much KV memory.
    pub kv: KvDemand,
    /// Bytes that the nodes of this machine may use together; `None` takes what the machine has.
    pub memory_bytes: Option<u64>,
    /// Nodes that share them, this one included.
    pub memory_nodes: usize,
    /// Huge pages for the KV cache.
    pub huge_pages: HugePages,
    /// Folder for packed weights, shared by the machine's processes; `None` packs into private memory.
    pub weights_cache: Option<PathBuf>,
    /// What to compute on.
    pub device: DeviceChoice,
    /// The part of a CUDA device's memory that this node may use, from 0 to 1.
    pub gpu_memory_utilization: f64,
    /// How to use a CUDA device.
    pub on_device: DeviceOptions,
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
    /// The machine is too small for it.
    #[error(transparent)]
    Memory(#[from] Refusal),
    /// The device that was asked for cannot be used.
    #[error("--device {choice}: {error}")]
    Device {
        /// What was asked for.
        choice: DeviceChoice,
        /// Why not.
        error: CudaError,
    },
    /// The device is too small.
    #[error(transparent)]
    DeviceMemory(#[from] DeviceRefusal),
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
    /// What watches its device, if there is one that says how it is.
    pub monitor: Option<Monitor>,
}

/// Loads a model and lays out its KV memory, for passes up to `pass`.
///
/// What all of it will take is planned and logged first, and refused if the machine has not got it.
pub fn load_engine(
    options: &EngineOptions,
    pass: PassLimits,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedEngine, SetupError> {
    let started = std::time::Instant::now();
    if options.placement.threads == 0 {
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
    if !(options.gpu_memory_utilization > 0.0 && options.gpu_memory_utilization <= 1.0) {
        let text =
            format!("--gpu-memory-utilization must be above 0 and at most 1, got {}", options.gpu_memory_utilization);
        return Err(SetupError::Option(text));
    }
    let refused = |error| SetupError::Device { choice: options.device, error };
    let device = device::open(options.device, options.on_device.cache.as_deref()).map_err(refused)?;
    let planned = match &device {
        None => plan_memory(options, pass, &checkpoint, format, None)?,
        Some(device) => {
            let demand = DeviceDemand {
                engine: Footprint::of(&checkpoint, &format, pass, &options.on_device, device.properties().sm)?,
                block_bytes: KvMemory::block_bytes(&format, spec.layers) as u64,
                name: &device.properties().name,
                total: device.properties().memory_bytes,
                free: device.free_bytes().map_err(EngineError::Device)?,
                utilization: options.gpu_memory_utilization,
            };
            plan_memory(options, pass, &checkpoint, format, Some(&demand))?
        }
    };
    let MemoryPlan { blocks, max_model_len, .. } = planned;
    let kv = Arc::new(KvMemory::with_huge_pages(format, spec.layers, blocks, options.huge_pages)?);
    let cpu = Cpu::placed(&options.placement);
    let monitor = device.as_deref().and_then(Monitor::start);
    let engine: Box<dyn Engine> = match device {
        None => Box::new(CpuEngine::new(&checkpoint, kv.clone(), cpu, options.weights_cache.as_deref())?),
        Some(device) => Box::new(CudaEngine::new(&checkpoint, kv.clone(), cpu, device, pass, &options.on_device)?),
    };
    let identity = identity(&checkpoint, &format);
    tracing::info!(
        model = %checkpoint.name,
        kv_mib = (blocks * KvMemory::block_bytes(&format, spec.layers)) >> 20,
        blocks,
        max_model_len,
        huge_pages = %kv.huge_pages(),
        ms = started.elapsed().as_millis() as u64,
        "engine is ready"
    );
    // The engine has what it needs of them.
    checkpoint.tensors = TensorMap::default();
    Ok(LoadedEngine { checkpoint: Arc::new(checkpoint), kv, engine, identity, max_model_len, monitor })
}

/// KV follows the weights: 16 bits for what is stored in 16 bits or fewer.
pub fn default_kv_dtype(checkpoint: &Checkpoint) -> KvDtype {
    match checkpoint.tensors.get("layers.0.wq").map(|t| t.dtype) {
        Ok(DType::F32) => KvDtype::F32,
        Ok(DType::BF16) => KvDtype::BF16,
        _ => KvDtype::F16,
    }
}

/// Plans the node's memory, and its device's, and logs the plans.
fn plan_memory(
    options: &EngineOptions,
    pass: PassLimits,
    checkpoint: &Checkpoint,
    format: KvFormat,
    device: Option<&DeviceDemand<'_>>,
) -> Result<MemoryPlan, SetupError> {
    let weights = match device {
        None => WeightBytes::of(checkpoint, options.weights_cache.is_some())?,
        Some(_) => WeightBytes::default(),
    };
    let plan = memory::plan(&Demand {
        spec: &checkpoint.spec,
        weights,
        format,
        pass,
        threads: options.placement.threads,
        kv: options.kv,
        max_model_len: options.max_model_len,
        machine: options.memory_bytes.map_or_else(MachineMemory::read, MachineMemory::given),
        nodes: options.memory_nodes,
        on_device: device.map(|demand| OnDevice { room: memory::device::room(demand) }),
    })?;
    if let Some(demand) = device {
        let plan = memory::device::plan(demand, plan.blocks)?;
        tracing::info!(target: "ridge_model::memory", "memory plan of the device\n{plan}");
    }
    // A target of its own, so that a supervisor that hides other news can show it.
    tracing::info!(target: "ridge_model::memory", "memory plan\n{plan}");
    if options.max_model_len.is_none() && plan.max_model_len < checkpoint.spec.context {
        let (context, fits) = (checkpoint.spec.context, plan.max_model_len);
        tracing::warn!("context cut from {context} to {fits} tokens: KV memory has no room for more");
    }
    Ok(plan)
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
        /// Sampled tokens, or why there is none.
        outputs: Vec<(RequestId, Result<TokenOut, NoToken>)>,
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
    /// Moves an engine to a new thread, which counts as the first of `placement`: it computes beside the engine's own.
    /// `report` is called there; layers are reported only if `layers` is set.
    pub fn spawn(
        mut engine: Box<dyn Engine>,
        placement: &Placement,
        layers: bool,
        mut report: impl FnMut(WorkerEvent) + Send + 'static,
    ) -> Self {
        let (plans, queue) = sync_channel::<BatchPlan>(1);
        let (core, nice) = (placement.core(0), placement.nice);
        let run = move || {
            lower_priority(nice);
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
