//! The engine under measurement: set up for a list of phases, and driven with batch plans.
//!
//! [`Session::new`] checks that every phase fits before it takes memory. Sequences have blocks of their own, so the KV
//! traffic of a batch is that of a batch; what the blocks hold does not matter to any kernel's time, so the cached
//! context is one chunk's keys and values over and over.

use super::args::SetupArgs;
use super::host;
use crate::{demo, dirs, roles};
use anyhow::{Context, ensure};
use ridge_kernels::machine::{Gauge, Limits};
use ridge_kernels::sync::pool::Placement;
use ridge_kernels::{Cpu, KvFormat};
use ridge_model::checkpoint::{Checkpoint, LoadOptions, ModelSource, load};
use ridge_model::cost::{Cost, CostModel};
use ridge_model::cuda::CudaEngine;
use ridge_model::device::{self, DeviceOptions};
use ridge_model::engine::{CpuEngine, Engine};
use ridge_model::kv::KvMemory;
use ridge_model::mapping::HugePages;
use ridge_model::memory::PassLimits;
use ridge_model::memory::machine::MachineMemory;
use ridge_model::spec::ModelSpec;
use ridge_model::worker::default_kv_dtype;
use ridge_protocol::{BatchPlan, BlockId, Duration, PlanItem, RequestId, SampleSpec, SamplingParams};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Tokens of the context that are computed before they are repeated.
const DISTINCT_CONTEXT: usize = 512;
/// Memory that measuring the read bandwidth takes at most, in bytes.
const GAUGE_BYTES_MAX: usize = 8 << 30;
/// Length of one measurement of the machine.
const SLICE: Duration = Duration::from_millis(150);

/// What is repeated and timed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// One prompt from its first token to its first sampled one.
    Prefill {
        /// Tokens of the prompt.
        tokens: usize,
        /// Most of them in one pass.
        chunk: usize,
    },
    /// Steps of a batch of sequences.
    Decode {
        /// Sequences.
        batch: usize,
        /// Tokens of each that are cached before the first step.
        context: usize,
        /// Steps, a token of each sequence every time.
        steps: usize,
    },
}

impl Phase {
    /// Tokens computed in one repetition.
    pub fn tokens(&self) -> usize {
        match *self {
            Phase::Prefill { tokens, .. } => tokens,
            Phase::Decode { batch, steps, .. } => batch * steps,
        }
    }

    /// Operations and bytes of one repetition.
    pub fn cost(&self, model: &CostModel) -> Cost {
        match *self {
            Phase::Prefill { tokens, chunk } => model.prompt(tokens, chunk),
            Phase::Decode { batch, context, steps } => {
                (context..context + steps).map(|position| model.decode(batch, position)).sum()
            }
        }
    }

    /// Most tokens of one sequence.
    fn positions(&self) -> usize {
        match *self {
            Phase::Prefill { tokens, .. } => tokens,
            Phase::Decode { context, steps, .. } => context.saturating_add(steps),
        }
    }

    fn sequences(&self) -> usize {
        match *self {
            Phase::Prefill { .. } => 1,
            Phase::Decode { batch, .. } => batch,
        }
    }

    /// Blocks of all its sequences.
    fn blocks(&self, block_size: usize) -> usize {
        self.sequences().saturating_mul(self.positions().div_ceil(block_size))
    }

    /// Refuses what does not fit into `limit` tokens.
    fn check(&self, limit: usize, what: &str) -> anyhow::Result<()> {
        let positions = self.positions();
        match *self {
            Phase::Prefill { tokens, .. } => ensure!(tokens <= limit, "--prompt-tokens {tokens} is more than {what}"),
            Phase::Decode { context, steps, .. } => ensure!(
                positions <= limit,
                "--context {context} and --gen-tokens {steps} make {positions} tokens, more than {what}"
            ),
        }
        Ok(())
    }
}

/// What the model is, for reports.
pub struct ModelFacts {
    /// Its name.
    pub name: String,
    /// Its family.
    pub arch: String,
    /// The storage type of most of its bytes.
    pub dtype: &'static str,
    /// Whether that type is a block of small integers.
    pub quantised: bool,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Stored bytes of all tensors.
    pub weight_bytes: u64,
}

/// An engine, the phases to run on it, and the measuring of the machine.
pub struct Session {
    /// What the model is.
    pub model: ModelFacts,
    /// What a pass must compute and move.
    pub cost: CostModel,
    /// What is measured.
    pub phases: Vec<Phase>,
    engine: Box<dyn Engine>,
    params: Arc<SamplingParams>,
    /// Threads for measuring the machine; the engine's own are inside it.
    cpu: Cpu,
    gauge: Gauge,
}

impl Session {
    /// Loads the model and sets up an engine with room for the phases, which are made from the longest sequence that the
    /// model (or `--max-model-len`) allows.
    pub fn new(args: &SetupArgs, phases: impl FnOnce(usize) -> Vec<Phase>) -> anyhow::Result<Self> {
        Self::adjusted(args, phases, |_| {})
    }

    /// As [`Session::new`], with something else than the flags say about how a device is used.
    pub fn adjusted(
        args: &SetupArgs,
        phases: impl FnOnce(usize) -> Vec<Phase>,
        adjust: impl FnOnce(&mut DeviceOptions),
    ) -> anyhow::Result<Self> {
        let path = match &args.model {
            Some(model) => model.clone(),
            None => demo::unpack(&dirs::cache()?)?.display().to_string(),
        };
        let threads = args.threads.map_or_else(host::cores, usize::from);
        let available = MachineMemory::read().bytes;
        let checkpoint = load(&ModelSource::parse(&path)?, &LoadOptions::default(), &mut |_| {})?;
        let limit = longest(args.engine.max_model_len, checkpoint.spec.context)?;
        let phases = phases(limit);
        let what = match args.engine.max_model_len {
            Some(_) => format!("--max-model-len {limit}"),
            None => format!("the {limit} tokens this model was made for"),
        };
        for phase in &phases {
            phase.check(limit, &what)?;
        }

        let spec = &checkpoint.spec;
        let format = KvFormat {
            dtype: roles::kv_dtype(args.engine.kv_cache_dtype).unwrap_or_else(|| default_kv_dtype(&checkpoint)),
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            block_size: args.engine.block_size,
        };
        let cost = CostModel::of(&checkpoint, &format)?;
        let blocks = phases.iter().map(|phase| phase.blocks(format.block_size)).max().context("nothing to measure")?;
        let kv_bytes = (blocks as u64).saturating_mul(KvMemory::block_bytes(&format, spec.layers) as u64);
        let spare = spare_memory(available, checkpoint.tensors.bytes() as u64, kv_bytes, args.engine.kv_memory)?;
        let kv = Arc::new(KvMemory::with_huge_pages(format, spec.layers, blocks, HugePages::Auto)?);
        let model = ModelFacts::of(&checkpoint, &cost);

        let cpu = Cpu::new(threads, None);
        let gauge_bytes = GAUGE_BYTES_MAX.min(usize::try_from(spare / 2).unwrap_or(usize::MAX)) / threads;
        let gauge = Gauge::new(&cpu, gauge_bytes.min(Gauge::BYTES_PER_THREAD));
        let cache = roles::weights_cache(&args.engine.weights_cache);
        let mut kernels = roles::engine(path, Placement::threads(threads), &args.engine);
        adjust(&mut kernels.on_device);
        let engine: Box<dyn Engine> = match device::open(kernels.device, kernels.on_device.cache.as_deref())? {
            None => Box::new(CpuEngine::new(&checkpoint, kv, Cpu::new(threads, None), cache.as_deref())?),
            Some(device) => {
                let pass = PassLimits { tokens: args.chunk, sequences: 1 };
                let cpu = Cpu::new(threads, None);
                Box::new(CudaEngine::new(&checkpoint, kv, cpu, device, pass, &kernels.on_device)?)
            }
        };
        let params = Arc::new(SamplingParams::greedy(1));
        let mut session = Self { model, cost, phases, engine, params, cpu, gauge };
        session.fill_contexts(limit);
        Ok(session)
    }

    /// What is computed.
    pub fn spec(&self) -> &ModelSpec {
        self.engine.spec()
    }

    /// How keys and values are cached.
    pub fn kv_format(&self) -> &KvFormat {
        self.engine.kv().format()
    }

    /// The machine's kernels and threads.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Measures the machine, for about a sixth of a second.
    pub fn limits(&self) -> Limits {
        self.gauge.measure(&self.cpu, SLICE)
    }

    /// Runs a whole prompt, or one decode step, to grow buffers and to fetch weights.
    pub fn warm_up(&mut self, phase: Phase) {
        let plans = self.plans(phase);
        let count = if matches!(phase, Phase::Prefill { .. }) { plans.len() } else { 1 };
        self.run(&plans[..count]);
    }

    /// Runs a phase once and returns the time of its passes.
    pub fn repetition(&mut self, phase: Phase) -> Duration {
        let plans = self.plans(phase);
        self.run(&plans)
    }

    fn run(&mut self, plans: &[BatchPlan]) -> Duration {
        let begin = Instant::now();
        for plan in plans {
            self.engine.run(plan, &mut |_| {});
        }
        begin.elapsed()
    }

    fn plans(&self, phase: Phase) -> Vec<BatchPlan> {
        let blocks_each = phase.positions().div_ceil(self.kv_format().block_size);
        let plan = |items| BatchPlan { step: 0, items };
        match phase {
            Phase::Prefill { tokens, chunk } => (0..tokens)
                .step_by(chunk)
                .map(|start| {
                    let count = chunk.min(tokens - start);
                    plan(vec![self.item(0, start, count, blocks_each, start + count == tokens)])
                })
                .collect(),
            Phase::Decode { batch, context, steps } => (context..context + steps)
                .map(|position| plan((0..batch).map(|s| self.item(s, position, 1, blocks_each, true)).collect()))
                .collect(),
        }
    }

    /// A sequence's `count` tokens from `start` on; its blocks are the `sequence`th run of `blocks_each`.
    fn item(&self, sequence: usize, start: usize, count: usize, blocks_each: usize, sampled: bool) -> PlanItem {
        let blocks = sequence * blocks_each..(sequence + 1) * blocks_each;
        PlanItem {
            request: RequestId(sequence as u64),
            // Any tokens will do; repeating one would look up one row of the embedding.
            tokens: (start..start + count).map(|i| ((i * 7 + sequence * 13) % self.spec().vocab) as u32).collect(),
            start: start as u32,
            block_table: blocks.map(|block| BlockId(block as u32)).collect(),
            sample: sampled.then(|| SampleSpec {
                params: self.params.clone(),
                history: Vec::new(),
                prompt_len: start as u32,
                position: (start + count) as u32,
            }),
            reader: None,
        }
    }

    /// Gives every block of the pool content: memory that was never written is a page of zeros in a cache. One chunk is
    /// computed, and its pages are copied to all others.
    fn fill_contexts(&mut self, limit: usize) {
        let kv = self.engine.kv().clone();
        let block_size = kv.format().block_size;
        let room = (kv.blocks() * block_size).min(limit);
        let tokens = DISTINCT_CONTEXT.min(room);
        let distinct = tokens.div_ceil(block_size);
        let chunk = self.item(0, 0, tokens, distinct, false);
        self.run(&[BatchPlan { step: 0, items: vec![chunk] }]);
        let id = |block: usize| BlockId(block as u32);
        for layer in 0..kv.layers() {
            for block in distinct..kv.blocks() {
                kv.write(layer, id(block)).copy_from_slice(&kv.read(layer, id(block % distinct)));
            }
        }
    }
}

impl ModelFacts {
    fn of(checkpoint: &Checkpoint, cost: &CostModel) -> Self {
        let mut bytes = BTreeMap::new();
        for (_, tensor) in checkpoint.tensors.iter() {
            *bytes.entry(tensor.dtype.to_ggml()).or_insert(0) += tensor.bytes().len();
        }
        let most = checkpoint.tensors.iter().map(|(_, tensor)| tensor.dtype);
        let main = most.max_by_key(|dtype| bytes[&dtype.to_ggml()]).expect("a checkpoint has tensors");
        Self {
            name: checkpoint.name.clone(),
            arch: checkpoint.spec.arch.clone(),
            dtype: main.name(),
            quantised: main.block_len() > 1,
            parameters: cost.parameters(),
            weight_bytes: cost.weight_bytes(),
        }
    }
}

/// The longest sequence, in tokens.
fn longest(asked: Option<usize>, context: usize) -> anyhow::Result<usize> {
    let limit = asked.unwrap_or(context);
    ensure!(limit <= context, "--max-model-len {limit} is more than the {context} tokens this model was made for");
    Ok(limit)
}

/// Memory left beside weights and KV cache, in bytes, or what is too large.
fn spare_memory(available: u64, weights: u64, kv: u64, kv_limit: Option<u64>) -> anyhow::Result<u64> {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    if let Some(limit) = kv_limit {
        ensure!(
            kv <= limit,
            "the phases need {:.2} GiB of KV cache, more than --kv-memory: lower --batch, --context or --prompt-tokens",
            gib(kv)
        );
    }
    ensure!(
        weights < available,
        "the model is too large: it has {:.2} GiB of weights, and {:.2} GiB of memory are available; \
         its time would be the disk's",
        gib(weights),
        gib(available)
    );
    available.checked_sub(weights).and_then(|rest| rest.checked_sub(kv)).with_context(|| {
        format!(
            "the phases need {:.2} GiB of KV cache beside {:.2} GiB of weights, and {:.2} GiB of memory are available: \
             lower --batch, --context or --prompt-tokens",
            gib(kv),
            gib(weights),
            gib(available)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_that_do_not_fit_are_refused_by_their_flags() {
        let decode = Phase::Decode { batch: 1, context: 500, steps: 13 };
        let error = decode.check(512, "the 512 tokens this model was made for").expect_err("too long").to_string();
        assert!(error.contains("--context 500 and --gen-tokens 13 make 513 tokens"), "{error}");
        assert!(Phase::Decode { batch: 1, context: 500, steps: 12 }.check(512, "").is_ok());
        assert!(Phase::Prefill { tokens: 512, chunk: 100 }.check(512, "").is_ok());
        let error = Phase::Prefill { tokens: 513, chunk: 100 }.check(512, "x").expect_err("too long").to_string();
        assert!(error.contains("--prompt-tokens 513"), "{error}");
        assert!(Phase::Decode { batch: 1, context: usize::MAX, steps: 2 }.check(512, "").is_err());
    }

    #[test]
    fn what_does_not_fit_in_memory_is_said() {
        const GIB: u64 = 1 << 30;
        let error = |weights, kv, limit| spare_memory(8 * GIB, weights, kv, limit).expect_err("refused").to_string();
        assert!(error(9 * GIB, GIB, None).contains("the model is too large"));
        assert!(error(7 * GIB, 2 * GIB, None).contains("--batch"));
        assert!(error(GIB, 2 * GIB, Some(GIB)).contains("--kv-memory"));
        assert!(error(GIB, u64::MAX, None).contains("--context"));
        assert_eq!(spare_memory(8 * GIB, 3 * GIB, GIB, Some(GIB)).ok(), Some(4 * GIB));
    }

    #[test]
    fn blocks_are_counted_per_sequence() {
        assert_eq!(Phase::Decode { batch: 3, context: 16, steps: 1 }.blocks(16), 6);
        assert_eq!(Phase::Prefill { tokens: 33, chunk: 8 }.blocks(16), 3);
        assert_eq!(Phase::Decode { batch: usize::MAX, context: 64, steps: 1 }.blocks(16), usize::MAX);
    }
}
