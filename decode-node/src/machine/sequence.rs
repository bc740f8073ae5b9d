//! One sequence on a decode node.

use super::phase::Phase;
use ridge_blocks::{HashChain, Lease, hash_blocks};
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::{DecodeRequest, FinishReason, Receipt};
use ridge_protocol::{BlockHash, NodeName, PlanItem, RequestId, SampleSpec, SamplingParams, TokenId, TokenOut};
use std::sync::Arc;

/// Where a sequence is to be continued.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Move {
    /// The dispatch there.
    pub next: RequestId,
    pub to: KvPeer,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub id: RequestId,
    /// Prompt, then generated tokens.
    pub tokens: Vec<TokenId>,
    pub prompt_len: u32,
    salt: u64,
    pub params: Arc<SamplingParams>,
    /// Who sends the KV; cleared when the sequence is to be computed here.
    pub from: Option<NodeName>,
    /// Tokens that came with the request: the prompt, and what was generated before a failover.
    pub given: u32,
    pub phase: Phase,
    /// Present unless waiting.
    pub lease: Option<Lease>,
    /// Positions whose KV is in the blocks and may be read.
    pub computed: u32,
    chain: HashChain,
    /// Hashes of the full blocks of `tokens`.
    pub hashes: Vec<BlockHash>,
    /// Leading blocks already offered to the prefix index.
    pub published: usize,
    pub receipt: Receipt,
    pub receipt_sent: bool,
    /// Positions below this one were computed before, or should have come by transfer.
    pub again_until: u32,
    /// Blocks were leased for it once: what the cache gave is accounted for.
    pub admitted: bool,
    /// The latest token as it was said, with its log-probabilities.
    pub last: Option<TokenOut>,
    /// It goes to another node as soon as it can.
    pub moving: Option<Move>,
}

impl Sequence {
    pub fn new(request: DecodeRequest, block_size: u32) -> Self {
        let mut chain = HashChain::new(request.salt, block_size as usize);
        let hashes = chain.extend(&request.tokens);
        Self {
            id: request.request,
            given: request.tokens.len() as u32,
            tokens: request.tokens,
            prompt_len: request.prompt_len,
            salt: request.salt,
            params: Arc::new(request.params),
            from: request.from,
            phase: Phase::Waiting,
            lease: None,
            computed: 0,
            chain,
            hashes,
            published: 0,
            receipt: Receipt::default(),
            receipt_sent: false,
            again_until: 0,
            admitted: false,
            last: None,
            moving: None,
        }
    }

    pub fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Tokens whose KV is still to be computed; 1 means an ordinary decode step.
    pub fn remaining(&self) -> u32 {
        self.len() - self.computed
    }

    /// It is to move, its KV is whole but for the last token's, and that token was said here.
    pub fn can_move(&self) -> bool {
        self.phase == Phase::Running && self.moving.is_some() && self.remaining() == 1 && self.last.is_some()
    }

    /// Index of the latest token within the answer.
    pub fn last_index(&self) -> u32 {
        self.len() - 1 - self.prompt_len
    }

    /// Hashes of the full blocks of what is computed, were they of `size` tokens; this node's own hold `own`.
    pub fn computed_hashes(&self, size: u32, own: u32) -> Vec<BlockHash> {
        if size == own {
            self.hashes[..(self.computed / own) as usize].to_vec()
        } else {
            hash_blocks(self.salt, size as usize, &self.tokens[..self.computed as usize])
        }
    }

    /// Blocks that `positions` positions need.
    pub fn blocks_for(positions: u32, block_size: u32) -> usize {
        positions.div_ceil(block_size) as usize
    }

    /// Appends a generated token; says whether it was the last one.
    pub fn push(&mut self, out: TokenOut, max_model_len: u32) -> Option<FinishReason> {
        let (token, ends) = (out.token, out.ends);
        self.tokens.push(token);
        self.last = Some(out);
        let hashes = self.chain.extend(&self.tokens);
        self.hashes.extend(hashes);
        if ends || self.params.is_stop(token) {
            Some(FinishReason::Stop)
        } else if self.len() - self.prompt_len >= self.params.max_tokens || self.len() >= max_model_len {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// The plan item that computes `take` more tokens.
    pub fn item(&self, take: u32, block_size: u32) -> PlanItem {
        let end = self.computed + take;
        let lease = self.lease.as_ref().expect("a running sequence has blocks");
        let sample = (end == self.len()).then(|| SampleSpec {
            params: self.params.clone(),
            history: if self.params.needs_history() { self.tokens.clone() } else { Vec::new() },
            prompt_len: self.prompt_len,
            position: end,
        });
        PlanItem {
            request: self.id,
            tokens: self.tokens[self.computed as usize..end as usize].to_vec(),
            start: self.computed,
            block_table: lease.blocks()[..Self::blocks_for(end, block_size)].to_vec(),
            sample,
            reader: None,
        }
    }
}
