//! Limits of the decode node's machine.

use ridge_protocol::Duration;
use serde::{Deserialize, Serialize};

/// Everything the machine needs to know about its node. The shell fills in what the model decides.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DecodeConfig {
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
    /// Sequences decoded in one pass. More raise throughput and the time between tokens.
    pub max_num_seqs: usize,
    /// Prompt tokens that one pass may compute at most, when prompts are computed here.
    pub max_prefill_tokens: u32,
    /// How many times longer a pass beside decoding sequences may take for the prompt tokens in it. Larger shortens that
    /// prompt's wait; smaller protects everybody's inter-token latency. At 1, a prompt gets one token a pass.
    pub max_step_stretch: u32,
    /// Sequences waiting for blocks or a place; one more is refused as overloaded.
    pub max_waiting: usize,
    /// Blocks left free at admission, per running sequence, so that a newcomer does not cause a preemption at once.
    pub headroom_blocks: usize,
    /// Keep the KV of finished sequences for reuse.
    pub prefix_caching: bool,
    /// How often gauges are reported to the router.
    pub report_interval: Duration,
}

impl Default for DecodeConfig {
    /// The model's fields are zero and must be filled in.
    fn default() -> Self {
        Self {
            blocks: 0,
            block_size: 16,
            layers: 0,
            vocab: 0,
            max_model_len: 0,
            max_num_seqs: 64,
            max_prefill_tokens: 256,
            max_step_stretch: 2,
            max_waiting: 4096,
            headroom_blocks: 1,
            prefix_caching: true,
            report_interval: Duration::from_secs(1),
        }
    }
}
