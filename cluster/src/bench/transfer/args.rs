//! Flags of `cluster bench transfer`, and of the receiving process that it starts.

use crate::cli::KvCacheDtype;
use crate::network::{CongestionArg, NetworkArgs};
use crate::roles;
use crate::size::parse_count;
use crate::synth::Preset;
use clap::{Args, ValueEnum};
use ridge_kernels::{KvDtype, KvFormat};
use ridge_model::engine::cache_dtype;
use ridge_protocol::ModelIdentity;
use ridge_protocol::model::KV_LAYOUT;
use std::path::PathBuf;
use std::time::Duration;

/// A stalled side of a benchmark is a result, not a failure.
const PEER_TIMEOUT: Duration = Duration::from_secs(30);

/// Flags of `cluster bench transfer`.
#[derive(Args, Debug)]
pub struct TransferArgs {
    /// Largest UDP payloads to measure, one after the other. Defaults: what loopback, jumbo frames and Ethernet carry.
    #[arg(
        long, value_delimiter = ',', default_value = "65000,8972,1472", value_name = "LIST",
        value_parser = clap::value_parser!(u16).range(1200..=65000)
    )]
    pub mtu: Vec<u16>,
    /// Congestion control.
    #[arg(long, value_enum, default_value_t)]
    pub congestion: CongestionArg,
    /// Measured repetitions of each size, after one to warm up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repeat: u16,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// What is transferred.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// What a repetition transfers. Both processes need it.
#[derive(Args, Debug, Clone)]
pub struct LoadArgs {
    /// Whose KV pages: layers, KV heads and head size of a known model.
    #[arg(long, value_enum, default_value = "llama-3.2-1b")]
    pub preset: Preset,
    /// Element type of the KV cache; auto is bf16.
    #[arg(long, value_enum, default_value_t)]
    pub kv_cache_dtype: KvCacheDtype,
    /// Tokens in a KV block.
    #[arg(long, default_value_t = 16, value_parser = parse_count)]
    pub block_size: usize,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 1024, value_parser = parse_count)]
    pub prompt_tokens: usize,
    /// Prompts in a repetition. All of them are in memory on both sides, so that pages come from memory, not from caches.
    #[arg(long, default_value_t = 32, value_parser = parse_count)]
    pub prompts: usize,
    /// Prompts that are on their way at the same time.
    #[arg(long, default_value_t = 2, value_parser = parse_count)]
    pub concurrent: usize,
}

/// Flags of the receiving process.
#[derive(Args, Debug)]
pub struct ReceiverArgs {
    /// Folder with ca.pem, node.pem and node.key.
    #[arg(long, value_name = "DIR")]
    pub tls_dir: PathBuf,
    /// What is transferred.
    #[command(flatten)]
    pub load: LoadArgs,
    /// How the two processes talk.
    #[command(flatten)]
    pub network: NetworkArgs,
}

impl TransferArgs {
    /// The network settings of one size.
    pub fn network(&self, mtu: u16) -> NetworkArgs {
        NetworkArgs { peer_timeout: PEER_TIMEOUT, congestion: self.congestion, mtu: Some(mtu) }
    }
}

impl LoadArgs {
    /// The layout of a page.
    pub fn format(&self) -> KvFormat {
        let shape = self.preset.shape();
        let dtype = roles::kv_dtype(self.kv_cache_dtype).unwrap_or(KvDtype::BF16);
        KvFormat { dtype, kv_heads: shape.kv_heads, head_dim: shape.head_dim, block_size: self.block_size }
    }

    /// Layers of the model.
    pub fn layers(&self) -> usize {
        self.preset.shape().layers
    }

    /// Blocks of one prompt.
    pub fn blocks_each(&self) -> usize {
        self.prompt_tokens.div_ceil(self.block_size)
    }

    /// Blocks of all prompts.
    pub fn blocks(&self) -> usize {
        self.prompts.saturating_mul(self.blocks_each())
    }

    /// Pages of a repetition.
    pub fn pages(&self) -> u64 {
        self.blocks() as u64 * self.layers() as u64
    }

    /// What both sides claim to serve. There are no weights, so their digests are zero.
    pub fn identity(&self) -> ModelIdentity {
        let format = self.format();
        ModelIdentity {
            weights: [0; 32],
            config: [0; 32],
            tokenizer: [0; 32],
            layers: self.layers() as u32,
            kv_heads: format.kv_heads as u32,
            head_dim: format.head_dim as u32,
            block_size: format.block_size as u32,
            kv_dtype: cache_dtype(format.dtype),
            kv_layout: KV_LAYOUT.into(),
            rope: String::new(),
        }
    }

    /// The same as flags, for the receiving process.
    pub fn flags(&self) -> Vec<String> {
        fn name<T: ValueEnum>(value: &T) -> String {
            value.to_possible_value().expect("no value is skipped").get_name().to_owned()
        }
        vec![
            format!("--preset={}", name(&self.preset)),
            format!("--kv-cache-dtype={}", name(&self.kv_cache_dtype)),
            format!("--block-size={}", self.block_size),
            format!("--prompt-tokens={}", self.prompt_tokens),
            format!("--prompts={}", self.prompts),
            format!("--concurrent={}", self.concurrent),
        ]
    }
}
