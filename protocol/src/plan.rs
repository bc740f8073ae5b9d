//! What a scheduler asks an engine to run, and what comes back.

use crate::ids::{BlockId, RequestId, TokenId};
use crate::model::BlockShape;
use crate::sampling::SamplingParams;
use serde::{Deserialize, Serialize, Serializer};
use std::sync::Arc;

/// One forward pass over a ragged batch: prefill chunks and decode steps are the same thing with other lengths.
#[derive(Clone, Debug, Serialize)]
pub struct BatchPlan {
    /// Counts plans of one node; comes back with the result.
    pub step: u64,
    /// At least one sequence, each at most once.
    pub items: Vec<PlanItem>,
}

/// One sequence's part of a pass.
#[derive(Clone, Debug, Serialize)]
pub struct PlanItem {
    /// Whose it is.
    pub request: RequestId,
    /// The tokens to run, at positions `start..start + tokens.len()`; at least one.
    pub tokens: Vec<TokenId>,
    /// Tokens before these whose KV is already in the blocks.
    pub start: u32,
    /// Blocks of the whole sequence so far, in order: covers `start + tokens.len()` positions.
    pub block_table: Vec<BlockId>,
    /// Sample a token after the last of `tokens`, or only fill the cache.
    pub sample: Option<SampleSpec>,
    /// Who gets its KV, if that is sent away. An engine may make pages for it while it computes, or leave that to whoever sends.
    pub reader: Option<Reader>,
}

/// What a sequence's KV is read in where it is sent to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Reader {
    /// The blocks there.
    pub blocks: BlockShape,
    /// Tokens that are sent: the page of the last one may be part-filled, all others are full.
    pub tokens: u32,
}

impl Reader {
    /// Its pages, as numbers of its blocks, that are complete once the tokens `start..end` are computed and were not before.
    pub fn completed(&self, start: u32, end: u32) -> std::ops::Range<u32> {
        self.blocks.filled_blocks(start, self.tokens)..self.blocks.filled_blocks(end, self.tokens)
    }
}

/// How to sample after a plan item's last token.
#[derive(Clone, Debug, Serialize)]
pub struct SampleSpec {
    /// The sequence's parameters.
    #[serde(serialize_with = "serialize_shared")]
    pub params: Arc<SamplingParams>,
    /// Prompt and generated tokens so far, in order; empty unless `params.needs_history()`.
    pub history: Vec<TokenId>,
    /// How many of `history` are the prompt's.
    pub prompt_len: u32,
    /// Position of the token to be drawn (the counter of the generator): the number of tokens before it.
    pub position: u32,
}

fn serialize_shared<S: Serializer>(params: &Arc<SamplingParams>, serializer: S) -> Result<S::Ok, S::Error> {
    params.as_ref().serialize(serializer)
}

/// A sampled token.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TokenOut {
    /// The token.
    pub token: TokenId,
    /// Its log-probability before temperature and filters, when asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, likeliest first, when asked for.
    pub top: Vec<(TokenId, f32)>,
    /// Nothing may follow it: the grammar that constrains the answer is complete.
    pub ends: bool,
}

/// Why no token could be drawn for an item of a plan: its grammar cannot be compiled, or not be followed any further. It
/// would be so on every node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{0}")]
pub struct NoToken(pub String);
