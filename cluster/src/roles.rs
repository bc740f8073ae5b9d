//! `cluster router`, `cluster prefill` and `cluster decode`: flags become options, signals become a shutdown.
//!
//! The roles themselves live in their crates. Read [`router`], [`prefill`], [`decode`] and [`Shutdown`].

use crate::cli::{
    EngineArgs, HugePagesArg, KernelsArg, KvCacheDtype, NodeArgs, ProductsArg, RouterArgs, SupervisionArgs, Switch,
    WeightsCache,
};
use crate::dirs;
use anyhow::Context;
use ridge_decode_node::machine::DecodeConfig;
use ridge_decode_node::shell::DecodeOptions;
use ridge_kernels::KvDtype;
use ridge_kernels::sync::pool::Placement;
use ridge_kvtransfer::shell::LinkOptions;
use ridge_model::device::{DeviceOptions, KernelSet, ProductSet};
use ridge_model::mapping::HugePages;
use ridge_model::memory::KvDemand;
use ridge_model::worker::EngineOptions;
use ridge_prefill_node::machine::PrefillConfig;
use ridge_prefill_node::shell::PrefillOptions;
use ridge_protocol::NodeName;
use ridge_router::machine::RouterConfig;
use ridge_router::shell::RouterOptions;
use ridge_router::shell::http::HttpConfig;
use std::future::Future;
use std::io::Read;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How long a role may go on after its supervisor vanished. Nobody is left to end it if it hangs.
const ORPHAN_GRACE: Duration = Duration::from_secs(5);

/// Runs a router until a signal.
pub fn router(args: RouterArgs) -> anyhow::Result<()> {
    let mut machine = RouterConfig::default();
    if let Some(limit) = args.max_in_flight {
        machine.max_in_flight = limit;
    }
    let options = RouterOptions {
        name: NodeName(args.name),
        listen: args.listen,
        http: HttpConfig {
            bind: SocketAddr::new(args.http.host, args.http.port),
            api_keys: args.http.keys(),
            admin_keys: args.http.admin_keys(),
            resume: args.http.resume.config(),
            served_model_names: args.http.served_model_name,
            ..HttpConfig::default()
        },
        tls_dir: args.tls_dir,
        transport: args.network.transport(),
        model: args.model,
        max_model_len: args.max_model_len,
        machine,
        expect_prefill: !args.decode_only,
        record: args.record.options(),
    };
    block_on(router_runtime()?, &args.supervision, |shutdown| ridge_router::shell::run(options, shutdown))
}

/// Runs a prefill node until a signal.
pub fn prefill(args: NodeArgs) -> anyhow::Result<()> {
    let mut machine = PrefillConfig {
        block_size: args.engine.block_size as u32,
        prefix_caching: !args.no_enable_prefix_caching,
        ..PrefillConfig::default()
    };
    if let Some(limit) = args.max_num_seqs {
        machine.max_running = limit;
    }
    if let Some(limit) = args.max_num_batched_tokens {
        machine.max_batched_tokens = u32::try_from(limit).context("--max-num-batched-tokens is too large")?;
    }
    let options = PrefillOptions {
        link: link(&args, "prefill-0"),
        engine: node_engine(&args),
        machine,
        sender: ridge_kvtransfer::SenderConfig::default(),
        record: args.record.options(),
        corrupt_pages: args.chaos_corrupt_pages,
    };
    block_on(node_runtime()?, &args.supervision, |shutdown| ridge_prefill_node::shell::run(options, shutdown))
}

/// Runs a decode node until a signal.
pub fn decode(args: NodeArgs) -> anyhow::Result<()> {
    let mut machine = DecodeConfig {
        block_size: args.engine.block_size as u32,
        prefix_caching: !args.no_enable_prefix_caching,
        ..DecodeConfig::default()
    };
    if let Some(limit) = args.max_num_seqs {
        machine.max_num_seqs = limit;
    }
    if let Some(limit) = args.max_num_batched_tokens {
        machine.max_prefill_tokens = u32::try_from(limit).context("--max-num-batched-tokens is too large")?;
    }
    let options = DecodeOptions {
        link: link(&args, "decode-0"),
        engine: node_engine(&args),
        machine,
        receiver: ridge_kvtransfer::ReceiverConfig::default(),
        sender: ridge_kvtransfer::SenderConfig::default(),
        record: args.record.options(),
    };
    block_on(node_runtime()?, &args.supervision, |shutdown| ridge_decode_node::shell::run(options, shutdown))
}

/// A node's place in the network.
fn link(args: &NodeArgs, default_name: &str) -> LinkOptions {
    LinkOptions {
        name: NodeName(args.name.clone().unwrap_or_else(|| default_name.into())),
        listen: args.listen,
        advertise: args.advertise,
        router: args.router,
        router_name: NodeName(args.router_name.clone()),
        tls_dir: args.tls_dir.clone(),
        transport: args.network.transport(),
    }
}

fn node_engine(args: &NodeArgs) -> EngineOptions {
    let cores = args.cores.as_ref().map(|list| list.0.clone());
    let threads = match (args.threads, &cores) {
        (Some(threads), _) => threads.into(),
        (None, Some(cores)) => cores.len(),
        (None, None) => default_threads(),
    };
    let placement = Placement { threads, cores, nice: args.nice, shared: args.shared_cores };
    let options = engine(args.model.clone(), placement, &args.engine);
    EngineOptions {
        kv: args.kv_blocks.map_or(options.kv, KvDemand::Blocks),
        memory_bytes: args.memory,
        memory_nodes: args.memory_nodes.into(),
        ..options
    }
}

/// The folder for packed weights. Without a home there is none.
pub fn weights_cache(choice: &WeightsCache) -> Option<PathBuf> {
    match choice {
        WeightsCache::Auto => dirs::cache().ok().map(|cache| cache.join("packed")),
        WeightsCache::Off => None,
        WeightsCache::Folder(folder) => Some(folder.clone()),
    }
}

/// An engine that has the machine's memory to itself.
pub fn engine(model: String, placement: Placement, args: &EngineArgs) -> EngineOptions {
    EngineOptions {
        model,
        placement,
        block_size: args.block_size,
        kv_dtype: kv_dtype(args.kv_cache_dtype),
        max_model_len: args.max_model_len,
        kv: args.kv_memory.map_or(KvDemand::Auto, KvDemand::Bytes),
        memory_bytes: None,
        memory_nodes: 1,
        huge_pages: match args.huge_pages {
            HugePagesArg::Auto => HugePages::Auto,
            HugePagesArg::Off => HugePages::Off,
        },
        weights_cache: weights_cache(&args.weights_cache),
        device: args.device,
        gpu_memory_utilization: args.gpu_memory_utilization,
        on_device: DeviceOptions {
            kernels: match args.kernels {
                KernelsArg::Stable => KernelSet::Stable,
                KernelsArg::Experimental => KernelSet::Experimental,
            },
            products: match args.products {
                ProductsArg::Own => ProductSet::Own,
                ProductsArg::Measured => ProductSet::Measured,
            },
            graphs: args.cuda_graphs == Switch::On,
            ship: true,
            cache: kernel_cache(),
        },
    }
}

/// The folder for compiled kernels and measured products.
pub fn kernel_cache() -> Option<PathBuf> {
    dirs::cache().ok().map(|cache| cache.join("kernels"))
}

/// A thread per core.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The engine's spelling; `None` follows the checkpoint.
pub fn kv_dtype(dtype: KvCacheDtype) -> Option<KvDtype> {
    match dtype {
        KvCacheDtype::Auto => None,
        KvCacheDtype::F32 => Some(KvDtype::F32),
        KvCacheDtype::F16 => Some(KvDtype::F16),
        KvCacheDtype::Bf16 => Some(KvDtype::BF16),
        KvCacheDtype::Fp8 => Some(KvDtype::Fp8),
        KvCacheDtype::Int8 => Some(KvDtype::Int8),
    }
}

/// The async runtime of a node: its loop, QUIC, control messages and timers on one thread. A second thread would have a page
/// handed from core to core on its way.
pub fn node_runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")
}

/// The async runtime of a router, which answers HTTP besides.
fn router_runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start tokio")
}

/// Runs a role on its runtime until it ends.
fn block_on<F, E>(
    runtime: Runtime,
    supervision: &SupervisionArgs,
    role: impl FnOnce(Shutdown) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = Result<(), E>>,
    E: std::error::Error + Send + Sync + 'static,
{
    let ended = runtime.block_on(async {
        let shutdown = shutdown(supervision.stop_on_stdin_eof)?;
        Ok::<_, anyhow::Error>(role(shutdown).await?)
    });
    // A blocked helper thread must not keep a role alive that has said goodbye.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

/// Resolves when the role should stop.
pub type Shutdown = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Listens for SIGINT, SIGTERM and, if asked to, the end of stdin.
fn shutdown(stop_on_stdin_eof: bool) -> anyhow::Result<Shutdown> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut stdin_closed = watch_stdin(stop_on_stdin_eof)?;
    Ok(Box::pin(async move {
        tokio::select! {
            _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
            _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
            Ok(()) = &mut stdin_closed => tracing::info!("stopping: the supervisor is gone"),
        }
    }))
}

/// A thread of its own reads stdin: a blocking read can be neither cancelled nor waited for by the runtime.
pub fn watch_stdin(wanted: bool) -> anyhow::Result<oneshot::Receiver<()>> {
    let (closed, receiver) = oneshot::channel();
    let watch = move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = [0; 64];
        while stdin.read(&mut buffer).is_ok_and(|read| read > 0) {}
        let _ = closed.send(());
        std::thread::sleep(ORPHAN_GRACE);
        std::process::exit(1);
    };
    if wanted {
        std::thread::Builder::new().name("stdin".into()).spawn(watch).context("cannot start a thread")?;
    }
    Ok(receiver)
}
