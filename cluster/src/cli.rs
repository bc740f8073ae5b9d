//! The command line, in vLLM's spelling where it has one. Parsed once into the types that the rest uses.
//!
//! Read [`Cli`], then [`UpArgs`]. Every flag of a role can also come from the environment as `RIDGE_<FLAG>`.

use crate::bench::{BenchArgs, RooflineArgs};
use crate::drain::DrainArgs;
use crate::gpu_check::GpuCheckArgs;
use crate::logging::LogFormat;
use crate::network::NetworkArgs;
use crate::record::RecordArgs;
use crate::replay::ReplayArgs;
use crate::sim::SimArgs;
use crate::size::{parse_bytes, parse_count, parse_duration};
use crate::synth::{Preset, SynthDType};
use crate::trial::{ChaosArgs, VerifyArgs};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ridge_model::device::DeviceChoice;
use ridge_protocol::{CacheDtype, Role};
use ridge_router::shell::http::ResumeConfig;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Ridge: a prefill/decode disaggregated LLM serving cluster.
#[derive(Parser, Debug)]
#[command(name = "cluster", version, propagate_version = true)]
pub struct Cli {
    /// How log lines look. What is logged is chosen with RUST_LOG.
    #[arg(long, global = true, env = "RIDGE_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Start a router, prefill nodes and decode nodes on this machine and look after them.
    Up(Box<UpArgs>),
    /// Run a router: the OpenAI-compatible HTTP server that places requests on nodes.
    Router(Box<RouterArgs>),
    /// Run a prefill node: computes prompts and ships their KV blocks.
    Prefill(Box<NodeArgs>),
    /// Run a decode node: receives KV blocks and generates tokens.
    Decode(Box<NodeArgs>),
    /// Take a node out of service: it gets nothing new, and a decode node's sequences move on with their KV.
    Drain(DrainArgs),
    /// Generate in this process alone, without a cluster: the oracle for what a cluster answers.
    Generate(Box<GenerateArgs>),
    /// Write a model of a real shape with seeded random weights.
    Synth(Box<SynthArgs>),
    /// Measure how fast a part of Ridge is, beside what this machine can do.
    Bench(BenchArgs),
    /// Draw where prefill and decode stand under this machine's roofline.
    Roofline(Box<RooflineArgs>),
    /// Run whole clusters under virtual time, with faults.
    Sim(SimArgs),
    /// Make the decisions of recorded processes (--record) again and compare them with what was recorded.
    Replay(ReplayArgs),
    /// Check that clusters on this machine answer a model's prompts with the very tokens of a single process.
    Verify(VerifyArgs),
    /// Break a cluster on this machine, again and again, and check that no stream notices.
    Chaos(ChaosArgs),
    /// Check the CUDA kernels, engine and clusters on a device, and measure them.
    GpuCheck(GpuCheckArgs),
    /// Create the cluster's certificate authority or issue a node's certificate, for clusters of several machines.
    Ca(CaArgs),
}

/// Flags of `cluster up`.
#[derive(Args, Debug)]
pub struct UpArgs {
    /// Run every process on this machine. (The only way so far; on several machines, start the roles by hand.)
    #[arg(long, required = true)]
    pub local: bool,
    /// Hugging Face folder, .gguf file or Hugging Face repository id. Without it, the built-in ridge-demo.
    #[arg(long)]
    pub model: Option<String>,
    /// Where the HTTP server listens.
    #[command(flatten)]
    pub http: HttpArgs,
    /// Prefill nodes. With 0, decode nodes compute prompts themselves: the co-located mode to compare with.
    #[arg(long, value_name = "P", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub prefill: u16,
    /// Decode nodes.
    #[arg(long, value_name = "D", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub decode: u16,
    /// Who computes on which cores.
    #[arg(long, value_enum, default_value_t)]
    pub cores_policy: CoresPolicy,
    /// Memory for all nodes together, such as 12GiB. Default: what the machine, or the container, has available.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// Compute threads of each node. Without it, what --cores-policy gives.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// What the engines are to be like.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// What prefill nodes do otherwise.
    #[command(flatten)]
    pub prefill_kv: PrefillKvArgs,
    /// What prefill nodes compute on, if not on --device.
    #[arg(long, value_name = "DEVICE")]
    pub prefill_device: Option<DeviceChoice>,
    /// What decode nodes compute on, if not on --device.
    #[arg(long, value_name = "DEVICE")]
    pub decode_device: Option<DeviceChoice>,
    /// Sequences that a decode node runs in one pass.
    #[arg(long, value_parser = parse_count)]
    pub max_num_seqs: Option<usize>,
    /// Prompt tokens that a prefill node computes in one pass.
    #[arg(long, value_parser = parse_count)]
    pub max_num_batched_tokens: Option<usize>,
    /// How the processes talk with one another.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Whether decisions are recorded.
    #[command(flatten)]
    pub record: RecordArgs,
    /// For tests only: what prefill nodes get as --chaos-corrupt-pages.
    #[arg(long, hide = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chaos_corrupt_pages: Option<u32>,
    /// Write the log of each process to a file in this folder instead of to stderr.
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// Folder of the cluster's CA. Default: XDG_DATA_HOME/ridge.
    #[arg(long, value_name = "DIR", env = "RIDGE_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Seconds that running requests get to finish after Ctrl-C.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub drain_timeout: u64,
    /// How it is looked after itself.
    #[command(flatten)]
    pub supervision: SupervisionArgs,
}

/// Where and for whom the HTTP server answers.
#[derive(Args, Debug, Clone)]
pub struct HttpArgs {
    /// Address of the HTTP server. Anything but loopback should come with an API key.
    #[arg(long, env = "RIDGE_HOST", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub host: IpAddr,
    /// Port of the HTTP server; 0 takes a free one.
    #[arg(long, env = "RIDGE_PORT", default_value_t = 8000)]
    pub port: u16,
    /// Key that clients must send; may be given several times. Better passed in RIDGE_API_KEY (comma-separated),
    /// because other users can read a process's arguments.
    #[arg(long, env = "RIDGE_API_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY")]
    pub api_key: Vec<String>,
    /// Key of those who may list and drain nodes; as --api-key. Without any key at all, everybody on this machine may.
    #[arg(long, env = "RIDGE_ADMIN_KEY", hide_env_values = true, value_delimiter = ',', value_name = "KEY")]
    pub admin_key: Vec<String>,
    /// Name of the model in the API; may be given several times, the first is what answers carry.
    #[arg(long, env = "RIDGE_SERVED_MODEL_NAME", value_delimiter = ',', value_name = "NAME")]
    pub served_model_name: Vec<String>,
    /// Streams that outlive their connection.
    #[command(flatten)]
    pub resume: ResumeArgs,
}

/// What is kept for streaming clients that ask for it (`X-Ridge-Resumable`) when their connection breaks.
#[derive(Args, Debug, Clone)]
pub struct ResumeArgs {
    /// Longest time that a stream is kept for a client to come back, such as 90s. With 0, no stream is kept.
    #[arg(long, env = "RIDGE_RESUME_GRACE", value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub resume_grace: Duration,
    /// Streams kept at a time. Where there are several API keys, each has half of them at most.
    #[arg(long, env = "RIDGE_RESUME_STREAMS", value_name = "N", default_value = "512", value_parser = parse_count)]
    pub resume_streams: usize,
    /// Memory for the events of one stream. One that its client does not read is cancelled when they take more.
    #[arg(long, env = "RIDGE_RESUME_BUFFER", value_name = "SIZE", default_value = "1MiB", value_parser = parse_bytes)]
    pub resume_buffer: u64,
}

impl ResumeArgs {
    /// As the HTTP server takes it.
    pub fn config(&self) -> ResumeConfig {
        ResumeConfig {
            max_grace: self.resume_grace,
            max_streams: self.resume_streams,
            max_bytes: usize::try_from(self.resume_buffer).unwrap_or(usize::MAX),
        }
    }

    /// The same as flags, for a child process.
    pub fn flags(&self) -> Vec<String> {
        vec![
            format!("--resume-grace={}us", self.resume_grace.as_micros()),
            format!("--resume-streams={}", self.resume_streams),
            format!("--resume-buffer={}", self.resume_buffer),
        ]
    }
}

/// What an engine is to be like.
#[derive(Args, Debug, Clone)]
pub struct EngineArgs {
    /// Longest prompt plus answer, in tokens (32k works). Default: the model's own limit.
    #[arg(long, env = "RIDGE_MAX_MODEL_LEN", value_parser = parse_count)]
    pub max_model_len: Option<usize>,
    /// Tokens per KV block.
    #[arg(long, env = "RIDGE_BLOCK_SIZE", default_value_t = 16, value_parser = parse_block_size)]
    pub block_size: usize,
    /// Element type of the KV cache. `auto` follows the checkpoint; `fp8` (E4M3) and `int8` (a scale per token and head) take
    /// half the memory and transfer of 16 bits, and round more.
    #[arg(long, env = "RIDGE_KV_CACHE_DTYPE", value_enum, default_value_t)]
    pub kv_cache_dtype: KvCacheDtype,
    /// Memory for KV blocks of each node, such as 2GiB. Default: room for 16 sequences of --max-model-len, in at most
    /// half of what is left when weights, buffers and headroom have their part.
    #[arg(long, env = "RIDGE_KV_MEMORY", value_name = "SIZE", value_parser = parse_bytes)]
    pub kv_memory: Option<u64>,
    /// Folder where weights are kept in the order in which the kernels read them, shared by all processes; as large as the
    /// model. `auto` is XDG_CACHE_HOME/ridge/packed; with `off`, every process packs its own copy in memory.
    #[arg(long, env = "RIDGE_WEIGHTS_CACHE", value_name = "DIR", default_value = "auto")]
    pub weights_cache: WeightsCache,
    /// Whether to ask for transparent huge pages for the KV cache.
    #[arg(long, env = "RIDGE_HUGE_PAGES", value_enum, default_value_t)]
    pub huge_pages: HugePagesArg,
    /// What to compute on: auto, cpu or cuda:N. `auto` is the first CUDA device of a kind that has passed its checks (none so
    /// far), or the CPU. `emulated` runs the CUDA kernels on the CPU; it is slow, and for tests.
    #[arg(long, env = "RIDGE_DEVICE", value_name = "DEVICE", default_value_t)]
    pub device: DeviceChoice,
    /// The part of a CUDA device's memory for all nodes of this command together.
    #[arg(long, env = "RIDGE_GPU_MEMORY_UTILIZATION", value_name = "PART", default_value_t = 0.9, value_parser = parse_part)]
    pub gpu_memory_utilization: f64,
    /// CUDA kernels to choose from. `experimental` adds those that no device has checked yet.
    #[arg(long, env = "RIDGE_KERNELS", value_enum, default_value_t)]
    pub kernels: KernelsArg,
    /// Products of prompts on a CUDA device. `measured` times Ridge's own and NVIDIA's cuBLASLt, where that is installed, for every
    /// matrix, and takes the faster one; what was found is kept beside the compiled kernels, for all processes of the machine. `own`
    /// takes Ridge's: machines that were measured apart may choose differently.
    #[arg(long, env = "RIDGE_PRODUCTS", value_enum, default_value_t)]
    pub products: ProductsArg,
    /// Whether a CUDA device's decode steps are recorded as graphs of launches.
    #[arg(long, env = "RIDGE_CUDA_GRAPHS", value_enum, default_value_t)]
    pub cuda_graphs: Switch,
}

impl UpArgs {
    /// What the nodes of a role compute on.
    fn device_of(&self, role: Role) -> DeviceChoice {
        let of_role = if role == Role::Prefill { self.prefill_device } else { self.decode_device };
        of_role.unwrap_or(self.engine.device)
    }

    /// Flags that tell a node of a role its device, and its part of the device's memory.
    pub fn device_flags(&self, role: Role) -> Vec<String> {
        let device = self.device_of(role);
        let nodes = [(Role::Prefill, self.prefill), (Role::Decode, self.decode)];
        let sharing = nodes.into_iter().filter(|(role, _)| self.device_of(*role) == device).map(|(_, nodes)| nodes);
        let part = self.engine.gpu_memory_utilization / f64::from(sharing.sum::<u16>().max(1));
        let mut flags = vec![format!("--device={device}"), format!("--gpu-memory-utilization={part}")];
        if self.engine.kernels == KernelsArg::Experimental {
            flags.push("--kernels=experimental".into());
        }
        if self.engine.products == ProductsArg::Own {
            flags.push("--products=own".into());
        }
        if self.engine.cuda_graphs == Switch::Off {
            flags.push("--cuda-graphs=off".into());
        }
        flags
    }
}

/// Which CUDA kernels may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum KernelsArg {
    /// The simplest that do the job.
    #[default]
    Stable,
    /// Also those for one architecture that no device has checked yet.
    Experimental,
}

/// Whose kernels multiply many rows on a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum ProductsArg {
    /// Ridge's own.
    Own,
    /// For each matrix, the fastest there is.
    #[default]
    Measured,
}

/// Something that is on unless it makes trouble.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Switch {
    /// As usual.
    #[default]
    On,
    /// Do without.
    Off,
}

/// Blocks of prefill nodes that are not as decode nodes': KV is converted on its way.
#[derive(Args, Debug, Clone)]
pub struct PrefillKvArgs {
    /// Tokens per KV block where prompts are computed. Default: --block-size.
    #[arg(long, value_name = "N", value_parser = parse_block_size)]
    pub prefill_block_size: Option<usize>,
    /// Element type of the KV cache where prompts are computed. Default: --kv-cache-dtype. f32, f16 and bf16 are converted into any
    /// type; what has 8 bits only stays what it is.
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub prefill_kv_cache_dtype: Option<KvCacheDtype>,
}

impl PrefillKvArgs {
    /// Whether prompts are computed in other blocks at all.
    pub fn is_given(&self) -> bool {
        self.prefill_block_size.is_some() || self.prefill_kv_cache_dtype.is_some()
    }

    /// Why KV of those nodes cannot be converted into decode nodes' blocks, as far as is known without the model.
    pub fn refusal(&self, engine: &EngineArgs) -> Option<String> {
        let from = self.over(engine).kv_cache_dtype.protocol()?;
        // `auto` is one of the floats, and they all take the same.
        let to = engine.kv_cache_dtype.protocol().unwrap_or(CacheDtype::Bf16);
        let name = engine.kv_cache_dtype.to_possible_value().expect("no type is skipped");
        (!from.converts_into(to))
            .then(|| format!("prefill nodes' KV: {from} is not converted into {}", name.get_name()))
    }

    /// What an engine that computes prompts is to be like.
    pub fn over(&self, engine: &EngineArgs) -> EngineArgs {
        EngineArgs {
            block_size: self.prefill_block_size.unwrap_or(engine.block_size),
            kv_cache_dtype: self.prefill_kv_cache_dtype.unwrap_or(engine.kv_cache_dtype),
            ..engine.clone()
        }
    }
}

/// Where packed weights are kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WeightsCache {
    /// In the user's cache folder.
    Auto,
    /// Nowhere.
    Off,
    /// In this folder.
    Folder(PathBuf),
}

impl std::str::FromStr for WeightsCache {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => WeightsCache::Auto,
            "off" => WeightsCache::Off,
            folder => WeightsCache::Folder(folder.into()),
        })
    }
}

impl std::fmt::Display for WeightsCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WeightsCache::Auto => f.write_str("auto"),
            WeightsCache::Off => f.write_str("off"),
            WeightsCache::Folder(folder) => folder.display().fmt(f),
        }
    }
}

/// Who computes on which cores when `up --local` puts several nodes on one machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum CoresPolicy {
    /// Each node has cores of its own; what cannot be divided goes to decode nodes. Decode never waits for prefill.
    #[default]
    Split,
    /// Every node may use every core; prefill nodes run at a low priority, so that they get what decode nodes leave.
    Share,
}

/// Whether to ask for huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum HugePagesArg {
    /// For pools of 64 MiB or more, if the system has them.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// Element types of the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, ValueEnum)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum KvCacheDtype {
    #[default]
    Auto,
    F32,
    F16,
    Bf16,
    Fp8,
    Int8,
}

impl KvCacheDtype {
    /// The protocol's type; `None` for `auto`, which follows the checkpoint.
    pub fn protocol(self) -> Option<CacheDtype> {
        CacheDtype::named(self.to_possible_value().expect("no type is skipped").get_name())
    }
}

/// Flags of `cluster router`.
#[derive(Args, Debug)]
pub struct RouterArgs {
    /// Its name: what its certificate was issued for.
    #[arg(long, env = "RIDGE_NAME", default_value = "router")]
    pub name: String,
    /// UDP address for the nodes' control connections; port 0 takes a free one.
    #[arg(long, env = "RIDGE_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Folder with ca.pem, node.pem and node.key.
    #[arg(long, env = "RIDGE_TLS_DIR", value_name = "DIR")]
    pub tls_dir: PathBuf,
    /// Model whose tokenizer and template are used: the one that the nodes serve.
    #[arg(long, env = "RIDGE_MODEL")]
    pub model: String,
    /// Longest prompt plus answer, in tokens.
    #[arg(long, env = "RIDGE_MAX_MODEL_LEN", value_parser = parse_count)]
    pub max_model_len: Option<usize>,
    /// Where the HTTP server listens.
    #[command(flatten)]
    pub http: HttpArgs,
    /// Requests in flight or waiting, beyond which clients get 429.
    #[arg(long, env = "RIDGE_MAX_IN_FLIGHT", value_parser = parse_count)]
    pub max_in_flight: Option<usize>,
    /// The cluster has no prefill nodes: decode nodes compute prompts themselves.
    #[arg(long, env = "RIDGE_DECODE_ONLY")]
    pub decode_only: bool,
    /// How it talks with the others.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Whether decisions are recorded.
    #[command(flatten)]
    pub record: RecordArgs,
    /// How it is looked after.
    #[command(flatten)]
    pub supervision: SupervisionArgs,
}

/// Flags of `cluster prefill` and `cluster decode`.
#[derive(Args, Debug)]
pub struct NodeArgs {
    /// Its name: what its certificate was issued for. Default: prefill-0 or decode-0.
    #[arg(long, env = "RIDGE_NAME")]
    pub name: Option<String>,
    /// UDP address for KV connections; port 0 takes a free one.
    #[arg(long, env = "RIDGE_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// UDP address at which prefill nodes reach this decode node, if it is not the one it listens on (behind NAT, say).
    #[arg(long, env = "RIDGE_ADVERTISE", value_name = "ADDR")]
    pub advertise: Option<SocketAddr>,
    /// UDP address of the router's control port.
    #[arg(long, env = "RIDGE_ROUTER")]
    pub router: SocketAddr,
    /// The router's name: what its certificate was issued for.
    #[arg(long, env = "RIDGE_ROUTER_NAME", default_value = "router")]
    pub router_name: String,
    /// Folder with ca.pem, node.pem and node.key.
    #[arg(long, env = "RIDGE_TLS_DIR", value_name = "DIR")]
    pub tls_dir: PathBuf,
    /// Hugging Face folder, .gguf file or Hugging Face repository id.
    #[arg(long, env = "RIDGE_MODEL")]
    pub model: String,
    /// Compute threads. Default: one per core of `--cores`, or per core of the machine.
    #[arg(long, env = "RIDGE_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Cores to pin the compute threads to, such as 0,2-5.
    #[arg(long, env = "RIDGE_CORES", value_name = "LIST")]
    pub cores: Option<CoreList>,
    /// Niceness of the compute threads: above 0 they leave the cores to other processes first.
    #[arg(long, env = "RIDGE_NICE", value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=19))]
    pub nice: u8,
    /// Other processes compute on the same cores: idle threads sleep sooner.
    #[arg(long, env = "RIDGE_SHARED_CORES")]
    pub shared_cores: bool,
    /// Memory that Ridge's nodes on this machine may use together. Default: what is available when the node starts.
    #[arg(long, env = "RIDGE_MEMORY", value_name = "SIZE", value_parser = parse_bytes)]
    pub memory: Option<u64>,
    /// Nodes that share --memory, this one included. Weights mapped from the same files count once.
    #[arg(long, env = "RIDGE_MEMORY_NODES", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub memory_nodes: u16,
    /// What the engine is to be like.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// KV blocks, instead of --kv-memory.
    #[arg(long, env = "RIDGE_KV_BLOCKS", value_parser = parse_count, conflicts_with = "kv_memory")]
    pub kv_blocks: Option<usize>,
    /// Sequences in one pass.
    #[arg(long, env = "RIDGE_MAX_NUM_SEQS", value_parser = parse_count)]
    pub max_num_seqs: Option<usize>,
    /// Prompt tokens in one pass.
    #[arg(long, env = "RIDGE_MAX_NUM_BATCHED_TOKENS", value_parser = parse_count)]
    pub max_num_batched_tokens: Option<usize>,
    /// Forget the KV of finished sequences.
    #[arg(long, env = "RIDGE_NO_ENABLE_PREFIX_CACHING")]
    pub no_enable_prefix_caching: bool,
    /// For tests only, prefill nodes: flip a bit in one shipped page of N, after its digest was computed; in one page of a
    /// transfer at most.
    #[arg(long, hide = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chaos_corrupt_pages: Option<u32>,
    /// How it talks with the others.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Whether decisions are recorded.
    #[command(flatten)]
    pub record: RecordArgs,
    /// How it is looked after.
    #[command(flatten)]
    pub supervision: SupervisionArgs,
}

/// How a role is looked after.
#[derive(Args, Debug)]
pub struct SupervisionArgs {
    /// Stop when stdin ends: a supervisor holds its other end, so that no role outlives it.
    #[arg(long, hide = true)]
    pub stop_on_stdin_eof: bool,
}

/// Flags of `cluster generate`.
#[derive(Args, Debug)]
pub struct GenerateArgs {
    /// Hugging Face folder, .gguf file or Hugging Face repository id. Without it, the built-in ridge-demo.
    #[arg(long)]
    pub model: Option<String>,
    /// Text to continue.
    #[arg(long, conflicts_with = "prompt_ids", required_unless_present = "prompt_ids")]
    pub prompt: Option<String>,
    /// Tokens to continue, instead of text.
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    pub prompt_ids: Option<Vec<u32>>,
    /// Put the prompt through the chat template as a user's message.
    #[arg(long, conflicts_with = "prompt_ids")]
    pub chat: bool,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Key of the random generator.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Generate up to --max-tokens whatever the model says.
    #[arg(long)]
    pub ignore_eos: bool,
    /// The answer must be JSON that this schema, a file, allows.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["regex", "grammar"])]
    pub json_schema: Option<PathBuf>,
    /// The answer must match this regular expression from beginning to end.
    #[arg(long, value_name = "PATTERN", conflicts_with = "grammar")]
    pub regex: Option<String>,
    /// The answer must follow this Lark grammar, a file.
    #[arg(long, value_name = "FILE")]
    pub grammar: Option<PathBuf>,
    /// Print token ids instead of text.
    #[arg(long)]
    pub ids: bool,
    /// Print one JSON object with ids, text and counts.
    #[arg(long, conflicts_with = "ids")]
    pub json: bool,
    /// Prompt tokens computed in one pass.
    #[arg(long, default_value_t = 512)]
    pub chunk: usize,
    /// Compute threads. Default: one per core.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// What the engine is to be like.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Another engine for the prompt, whose KV is converted: what a cluster of such nodes must answer.
    #[command(flatten)]
    pub prefill_kv: PrefillKvArgs,
}

/// Flags of `cluster synth`.
#[derive(Args, Debug)]
pub struct SynthArgs {
    /// A file that ends in .gguf, or a folder for safetensors.
    pub out: PathBuf,
    /// Whose shape.
    #[arg(long, value_enum)]
    pub preset: Preset,
    /// How weights are stored. Folders take bf16, f16 and f32.
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: SynthDType,
    /// Key of the random weights.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Layers, instead of the preset's.
    #[arg(long)]
    pub layers: Option<usize>,
    /// Context length, instead of the preset's.
    #[arg(long, value_parser = parse_count)]
    pub context: Option<usize>,
    /// Write over what is there.
    #[arg(long)]
    pub force: bool,
}

/// Flags of `cluster ca`.
#[derive(Args, Debug)]
pub struct CaArgs {
    /// Folder of the CA; created on first use. Default: XDG_DATA_HOME/ridge/ca.
    #[arg(long, value_name = "DIR", global = true)]
    pub ca_dir: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: CaCommand,
}

/// What `cluster ca` does.
#[derive(Subcommand, Debug)]
pub enum CaCommand {
    /// Create the CA if there is none, and say where it is.
    Init,
    /// Issue a certificate: writes ca.pem, node.pem and node.key for `--tls-dir` of that node.
    Issue {
        /// Name of the node, such as decode-0.
        name: String,
        /// What the node is.
        #[arg(long, value_enum)]
        role: RoleName,
        /// Folder for the three files.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// Roles on the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum RoleName {
    Router,
    Prefill,
    Decode,
}

/// A set of cores, in the kernel's spelling: `0,2-5`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CoreList(pub Vec<usize>);

impl std::str::FromStr for CoreList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |s: &str| s.trim().parse::<usize>().map_err(|_| format!("{s:?} is not a core number"));
        let mut cores = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last || last - first >= 4096 {
                return Err(format!("{part:?} is not a range of cores"));
            }
            cores.extend(first..=last);
        }
        cores.sort_unstable();
        cores.dedup();
        Ok(Self(cores))
    }
}

impl std::fmt::Display for CoreList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut rest = self.0.as_slice();
        let mut separator = "";
        while let Some(&first) = rest.first() {
            let run = rest.iter().zip(first..).take_while(|(core, expected)| *core == expected).count();
            match run {
                1 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{}", first + run - 1)?,
            }
            rest = &rest[run..];
            separator = ",";
        }
        Ok(())
    }
}

fn parse_block_size(text: &str) -> Result<usize, String> {
    let size = parse_count(text)?;
    if size.is_power_of_two() && size <= 256 { Ok(size) } else { Err("must be a power of two up to 256".into()) }
}

fn parse_part(text: &str) -> Result<f64, String> {
    let part: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if part > 0.0 && part <= 1.0 { Ok(part) } else { Err("must be above 0 and at most 1".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn core_lists_round_trip() {
        let check = |text: &str, want: &str| {
            assert_eq!(text.parse::<CoreList>().map(|c| c.to_string()).as_deref(), Ok(want));
        };
        check("0", "0");
        check("0,1,2,5", "0-2,5");
        check("4-6,2,5", "2,4-6");
        for bad in ["", "a", "3-1", "0-999999", "1,,2"] {
            assert!(bad.parse::<CoreList>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_router_keeps_streams_as_up_was_told() {
        for flags in [&[][..], &["--resume-grace", "0.5s", "--resume-streams", "7", "--resume-buffer", "64KiB"]] {
            let parse = |command: &[&str], flags: &[String]| {
                let line = command.iter().map(|word| word.to_string()).chain(flags.iter().cloned());
                Cli::try_parse_from(line).expect("good flags").command
            };
            let flags: Vec<String> = flags.iter().map(|flag| flag.to_string()).collect();
            let Command::Up(up) = parse(&["cluster", "up", "--local"], &flags) else { panic!("up") };
            let child = ["cluster", "router", "--tls-dir", "x", "--model", "x"];
            let Command::Router(router) = parse(&child, &up.http.resume.flags()) else { panic!("router") };
            let config = router.http.resume.config();
            assert_eq!(config, up.http.resume.config());
            assert_eq!(config == ResumeConfig::default(), flags.is_empty());
        }
    }

    #[test]
    fn nodes_compute_where_up_was_told() {
        let engines = |flags: &[&str]| {
            let line = ["cluster", "up", "--local"].iter().chain(flags);
            let Command::Up(up) = Cli::try_parse_from(line).expect("good flags").command else { panic!("up") };
            [Role::Prefill, Role::Decode].map(|role| {
                let node = ["cluster", "prefill", "--router", "127.0.0.1:1", "--tls-dir", "x", "--model", "x"];
                let line = node.iter().map(|word| word.to_string()).chain(up.device_flags(role));
                let Command::Prefill(node) = Cli::parse_from(line).command else { panic!("prefill") };
                (node.engine.device, node.engine.gpu_memory_utilization, node.engine.kernels, node.engine.products)
            })
        };
        let (cuda, stable, measured) = (DeviceChoice::Cuda(1), KernelsArg::Stable, ProductsArg::Measured);
        assert_eq!(engines(&["--device", "cuda:1"]), [(cuda, 0.45, stable, measured); 2]);
        assert_eq!(engines(&["--device", "cuda:1", "--products", "own"]), [(cuda, 0.45, stable, ProductsArg::Own); 2]);
        let mixed = engines(&["--prefill-device", "cuda:1", "--device", "cpu", "--kernels", "experimental"]);
        assert_eq!(mixed[0], (cuda, 0.9, KernelsArg::Experimental, measured));
        assert_eq!(mixed[1].0, DeviceChoice::Cpu);
        for bad in [["--device", "gpu"], ["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "0"]] {
            assert!(Cli::try_parse_from(["cluster", "up", "--local"].iter().chain(&bad)).is_err());
        }
    }

    #[test]
    fn up_needs_no_model_and_takes_repeated_names() {
        let Command::Up(args) = Cli::parse_from(["cluster", "up", "--local"]).command else { panic!("up") };
        assert_eq!((args.model, args.http.port, args.prefill, args.decode), (None, 8000, 1, 1));
        let line = ["cluster", "up", "--local", "--served-model-name", "a", "--served-model-name", "b"];
        let Command::Up(args) = Cli::parse_from(line).command else { panic!("up") };
        assert_eq!(args.http.served_model_name, ["a", "b"]);
        assert!(Cli::try_parse_from(["cluster", "up", "--local", "--block-size", "12"]).is_err());
        assert!(Cli::try_parse_from(["cluster", "up", "--local", "--prefill", "0"]).is_ok());
        assert!(Cli::try_parse_from(["cluster", "up", "--local", "--decode", "0"]).is_err());
    }
}
