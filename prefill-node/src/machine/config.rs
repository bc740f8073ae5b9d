//! Limits of the prefill node's machine.

use ridge_protocol::Duration;
use serde::{Deserialize, Serialize};

/// Everything the machine needs to know about its node. The shell fills in what the model decides.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PrefillConfig {
    /// Blocks in the pool.
    pub blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Layers of the model.
    pub layers: u32,
    /// Vocabulary size: a token at or above it is refused.
    pub vocab: u32,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: u32,
    /// Prompt tokens computed in one engine pass. Larger is faster; smaller lets short prompts overtake sooner.
    pub max_batched_tokens: u32,
    /// Prompts computed at a time. More share a pass; each holds its blocks from its first chunk on.
    pub max_running: usize,
    /// Prompts waiting for blocks or a place; one more is refused as overloaded.
    pub max_waiting: usize,
    /// Keep the KV of finished prompts for reuse.
    pub prefix_caching: bool,
    /// How often gauges are reported to the router.
    pub report_interval: Duration,
}

impl Default for PrefillConfig {
    /// The model's fields are zero and must be filled in.
    fn default() -> Self {
        Self {
            blocks: 0,
            block_size: 16,
            layers: 0,
            vocab: 0,
            max_model_len: 0,
            max_batched_tokens: 512,
            max_running: 8,
            max_waiting: 1024,
            prefix_caching: true,
            report_interval: Duration::from_secs(1),
        }
    }
}
