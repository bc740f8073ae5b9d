//! What a node's memory goes to, worked out from the checkpoint's headers before any weight is touched.
//!
//! [`plan`] is pure: sizes go in, a [`MemoryPlan`] or a [`Refusal`] that says what would fit comes out. What the
//! machine has is read by [`machine`]. Neither knows threads, files or networks. Read [`Demand`] and [`MemoryPlan`]
//! first.

pub mod device;
pub mod machine;

use crate::checkpoint::{Checkpoint, LoadError};
use crate::forward::Weights;
use crate::kv::KvMemory;
use crate::packed::WORTH_A_FILE;
use crate::spec::ModelSpec;
use machine::MachineMemory;
use ridge_kernels::KvFormat;
use std::fmt::{self, Display};

/// Sequences of the longest length that a default KV pool has room for, memory permitting.
const DEFAULT_SEQUENCES: u64 = 16;
/// The share of what is left over that a default KV pool may take: the rest stays with the file cache and with other
/// programs. An explicit size may take all of it.
const DEFAULT_KV_SHARE: u64 = 2;
/// Workspace of the process itself: code, runtimes, channels, the block pool's tables (measured: 12 MB).
const PROCESS_BYTES: u64 = 16 << 20;
/// Tokenizer, per token of the vocabulary: texts, merges and hash tables (measured: 40 MB for Llama 3's 128 256).
const TOKENIZER_BYTES_PER_TOKEN: u64 = 384;
/// Per compute thread: unpacked weights, sums of a strip, attention's tiles, each sized to stay in a core's cache, and its stack.
const THREAD_BYTES: u64 = 2 << 20;
/// Headroom as a share of everything else: page tables, network buffers, what the allocator has not given back.
const HEADROOM_SHARE: u64 = 20;
/// Least headroom.
const HEADROOM_BYTES_MIN: u64 = 64 << 20;

/// The largest pass that a node will ever run; buffers are sized for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassLimits {
    /// Tokens, of all sequences together.
    pub tokens: usize,
    /// Sequences that sample.
    pub sequences: usize,
}

/// Weights in memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WeightBytes {
    /// Packed in a file that is mapped: processes of one machine that serve the same model share these pages.
    pub shared: u64,
    /// Packed in this process's own memory.
    pub own: u64,
}

impl WeightBytes {
    /// What the engine will hold of this checkpoint, with or without a folder for packed weights. Rows of the embedding are
    /// copied from the checkpoint's own file as tokens need them, and nothing of it is kept.
    pub fn of(checkpoint: &Checkpoint, cached: bool) -> Result<Self, LoadError> {
        let packed = Weights::packed_bytes(checkpoint)?;
        let shared = if cached && packed >= WORTH_A_FILE { packed } else { 0 };
        Ok(Self { shared: shared as u64, own: (packed - shared) as u64 })
    }

    fn total(self) -> u64 {
        self.shared + self.own
    }
}

/// How much KV memory is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KvDemand {
    /// As much as makes sense.
    #[default]
    Auto,
    /// As many blocks as fit into this many bytes.
    Bytes(u64),
    /// Exactly this many blocks.
    Blocks(usize),
}

/// Everything that decides how much memory a node needs and may use.
#[derive(Clone, PartialEq, Debug)]
pub struct Demand<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Its weights.
    pub weights: WeightBytes,
    /// A page of its KV cache.
    pub format: KvFormat,
    /// The largest pass.
    pub pass: PassLimits,
    /// Compute threads.
    pub threads: usize,
    /// The KV cache asked for.
    pub kv: KvDemand,
    /// Longest prompt plus answer; `None` takes the model's context, as far as the pool has room.
    pub max_model_len: Option<usize>,
    /// What the node's machine can give.
    pub machine: MachineMemory,
    /// Nodes that share it, this one included.
    pub nodes: usize,
    /// What is computed on a device, if anything: the host then has pages, staging and logits.
    pub on_device: Option<OnDevice>,
}

/// What a device takes off the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OnDevice {
    /// Blocks that the device has room for.
    pub room: usize,
}

/// The five line items, in bytes, and what follows from them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryPlan {
    /// Weights.
    pub weights: WeightBytes,
    /// The KV pool when every page has been written; a page costs nothing before.
    pub kv: u64,
    /// Buffers of the largest pass.
    pub activations: u64,
    /// Scratch of the threads, tokenizer, the process itself.
    pub workspace: u64,
    /// What is left free on purpose.
    pub headroom: u64,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: usize,
    /// What this node may use: of the machine's memory what weights that it shares take, and an equal part of the
    /// rest. `None` if nobody knows.
    pub allowed: Option<u64>,
    /// Nodes that share the machine.
    pub nodes: usize,
    pass: PassLimits,
    machine: MachineMemory,
}

impl MemoryPlan {
    /// All five items.
    pub fn total(&self) -> u64 {
        self.weights.total() + self.kv + self.activations + self.workspace + self.headroom
    }
}

impl Display for MemoryPlan {
    /// A table, one item a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WeightBytes { shared, own } = self.weights;
        let weights = match own {
            0 => "packed in a file that all nodes of the machine map".to_owned(),
            own if shared == 0 => format!("packed in this node's own memory ({})", size(own)),
            own => format!("{} mapped and shared, {} this node's own", size(shared), size(own)),
        };
        let rows = [
            ("weights", shared + own, weights),
            (
                "KV cache",
                self.kv,
                format!("{} blocks; one sequence may have {} tokens", self.blocks, self.max_model_len),
            ),
            (
                "activations",
                self.activations,
                format!("a pass of {} tokens, {} of them sampled", self.pass.tokens, self.pass.sequences),
            ),
            ("workspace", self.workspace, "threads' scratch, tokenizer, process (estimated)".into()),
            (
                "headroom",
                self.headroom,
                "page tables, network buffers, allocator (a twentieth, at least 64 MiB)".into(),
            ),
        ];
        for (name, bytes, remark) in rows {
            writeln!(f, "  {name:11} {:>11}  {remark}", size(bytes))?;
        }
        let of = match (self.allowed, self.nodes) {
            (None, _) => "of an unknown amount".to_owned(),
            (Some(allowed), 1) => format!("of {} ({})", size(allowed), self.machine.source),
            (Some(allowed), nodes) => format!(
                "of {}: this node's part of {} ({}) for {nodes} nodes",
                size(allowed),
                size(self.machine.bytes),
                self.machine.source
            ),
        };
        write!(f, "  {:11} {:>11}  {of}", "total", size(self.total()))
    }
}

/// Why a node was not started.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// A number that makes no sense for this model.
    #[error("{0}")]
    Option(String),
    /// The items are more than there is.
    #[error("out of memory before the start: {} more needed than there is\n{plan}\n  {advice}", size(*.short))]
    TooLarge {
        /// What was planned.
        plan: Box<MemoryPlan>,
        /// Bytes that lack.
        short: u64,
        /// What would fit.
        advice: String,
    },
}

/// Divides a node's memory up, or says why it is not enough.
pub fn plan(demand: &Demand<'_>) -> Result<MemoryPlan, Refusal> {
    let context = demand.spec.context;
    let wanted_len = demand.max_model_len.unwrap_or(context);
    if wanted_len < 2 {
        return Err(Refusal::Option("--max-model-len must be at least 2".into()));
    }
    if wanted_len > context {
        return Err(Refusal::Option(format!(
            "--max-model-len {wanted_len} is more than the {context} tokens this model was made for"
        )));
    }
    let block_bytes = block_bytes(demand);
    let per_sequence = wanted_len.div_ceil(demand.format.block_size);
    let room = kv_room(demand, demand.nodes);
    let blocks = match demand.kv {
        KvDemand::Blocks(blocks) => blocks,
        KvDemand::Bytes(bytes) => (bytes / block_bytes) as usize,
        KvDemand::Auto => {
            // At least one sequence, if that fits at all; then up to a share of what is left.
            let fair = (room / DEFAULT_KV_SHARE / block_bytes) as usize;
            let one = per_sequence.min((room / block_bytes) as usize);
            let least = if demand.max_model_len.is_some() { per_sequence } else { one };
            fair.min(per_sequence * DEFAULT_SEQUENCES as usize)
                .max(least)
                .max(2usize.div_ceil(demand.format.block_size))
                .min(demand.on_device.map_or(usize::MAX, |device| device.room.max(1)))
        }
    };
    let fits = blocks.saturating_mul(demand.format.block_size);
    if fits < 2 || (fits < wanted_len && demand.max_model_len.is_some()) {
        return Err(Refusal::Option(format!(
            "the KV pool has {blocks} blocks of {block_bytes} bytes, room for {fits} tokens, but one sequence of \
             --max-model-len {wanted_len} needs {per_sequence} blocks: raise --kv-memory or lower --max-model-len"
        )));
    }
    let kv = blocks as u64 * block_bytes;
    let (activations, workspace) = (host_activation_bytes(demand), workspace_bytes(demand));
    let others = demand.weights.total() + activations + workspace;
    let plan = MemoryPlan {
        weights: demand.weights,
        kv,
        activations,
        workspace,
        headroom: ((others + kv) / HEADROOM_SHARE).max(HEADROOM_BYTES_MIN),
        blocks,
        max_model_len: wanted_len.min(fits),
        allowed: demand.machine.known.then(|| allowed(demand, demand.nodes)),
        nodes: demand.nodes,
        pass: demand.pass,
        machine: demand.machine,
    };
    match plan.allowed {
        Some(allowed) if plan.total() > allowed => {
            let short = plan.total() - allowed;
            Err(Refusal::TooLarge { advice: advice(demand, &plan), plan: Box::new(plan), short })
        }
        _ => Ok(plan),
    }
}

/// What would fit, in words that can be typed.
fn advice(demand: &Demand<'_>, plan: &MemoryPlan) -> String {
    let fit = |nodes: usize| {
        let room = kv_room(demand, nodes);
        // Cut to what is easy to type before tokens are counted, so that the two flags fit each other.
        let (bytes, text) = match room >> 20 {
            0 => (room, room.to_string()),
            mib => (mib << 20, format!("{mib}MiB")),
        };
        let tokens = bytes / block_bytes(demand) * demand.format.block_size as u64;
        let tokens = tokens.min(demand.spec.context as u64);
        (tokens >= 2).then(|| format!("--kv-memory {text} with --max-model-len {tokens}"))
    };
    let mut ways = Vec::new();
    ways.extend(fit(demand.nodes).map(|fit| format!("at most {fit}")));
    let fewer = (1..demand.nodes).rev().find_map(|nodes| Some((nodes, fit(nodes)?)));
    if let Some((nodes, fit)) = fewer {
        ways.push(format!("{nodes} instead of {} nodes on this machine, each with at most {fit}", demand.nodes));
    }
    let needed = plan.total() - plan.kv + block_bytes(demand);
    if ways.is_empty() {
        ways.push(format!("no KV cache at all: a machine needs {} for this model", size(needed)));
        if plan.activations > plan.weights.total() {
            ways.push("or fewer --max-num-batched-tokens".into());
        }
    }
    format!("what would fit: {}", ways.join("; or "))
}

/// Bytes of a block over all layers.
fn block_bytes(demand: &Demand<'_>) -> u64 {
    KvMemory::block_bytes(&demand.format, demand.spec.layers) as u64
}

/// What one of `nodes` nodes may use: shared weights count once for all of them.
fn allowed(demand: &Demand<'_>, nodes: usize) -> u64 {
    let shared = demand.weights.shared.min(demand.machine.bytes);
    shared + (demand.machine.bytes - shared) / nodes.max(1) as u64
}

/// What is left for KV when everything else, headroom included, has its part.
fn kv_room(demand: &Demand<'_>, nodes: usize) -> u64 {
    let allowed = allowed(demand, nodes);
    let others = demand.weights.total() + host_activation_bytes(demand) + workspace_bytes(demand);
    // The inverse of `x + x / 20`, and never less than the least headroom below what is allowed.
    let before_headroom = allowed / (HEADROOM_SHARE + 1) * HEADROOM_SHARE;
    before_headroom.min(allowed.saturating_sub(HEADROOM_BYTES_MIN)).saturating_sub(others)
}

/// Buffers of the forward pass for this largest pass, as `forward::Scratch` names them.
pub fn activation_bytes(spec: &ModelSpec, pass: PassLimits) -> u64 {
    let pairs = spec.rope.rotary_dim / 2;
    let row = 2 * spec.hidden + 2 * spec.q_width() + 2 * spec.kv_width() + 2 * spec.ffn + 2 * pairs + 1;
    let floats = pass.tokens as u64 * row as u64 + pass.sequences as u64 * spec.vocab as u64;
    floats * size_of::<f32>() as u64
}

/// Buffers of the pass on the host. Beside a device: logits, and pages on their way, as `cuda::pages` stages and `outgoing` keeps them.
fn host_activation_bytes(demand: &Demand<'_>) -> u64 {
    if demand.on_device.is_none() {
        return activation_bytes(demand.spec, demand.pass);
    }
    let (format, pass) = (&demand.format, demand.pass);
    let stride = KvMemory::page_stride_of(format);
    let staging = crate::cuda::staging_bytes(format, stride, pass);
    let outgoing = crate::cuda::outgoing_bytes(format, stride, pass, demand.spec.layers);
    staging + outgoing + (pass.sequences * demand.spec.vocab * size_of::<f32>()) as u64
}

/// Everything that is neither weights nor KV nor a row of the pass; an estimate, see the constants.
fn workspace_bytes(demand: &Demand<'_>) -> u64 {
    let spec = demand.spec;
    // The kernels lay one operand of a product out in memory of their own: at most 32 bits an element.
    let operand = demand.pass.tokens * spec.hidden.max(spec.ffn).max(spec.q_width()) * 4;
    let sampling = demand.threads.min(demand.pass.sequences) * spec.vocab * size_of::<f32>();
    PROCESS_BYTES
        + demand.threads as u64 * THREAD_BYTES
        + spec.vocab as u64 * TOKENIZER_BYTES_PER_TOKEN
        + (operand + sampling) as u64
}

/// A size for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests;
