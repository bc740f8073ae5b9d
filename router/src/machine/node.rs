//! What the router knows about a node.

use ridge_blocks::hash_blocks;
use ridge_protocol::stats::{LinkStats, NodeStats};
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::NodeHello;
use ridge_protocol::{BlockHash, BlockShape, Conversion, RequestId, TokenId};
use std::collections::{BTreeMap, BTreeSet};

/// A prompt's block hashes, once for every size that blocks have on this cluster's nodes.
#[derive(Debug)]
pub(super) struct PromptHashes {
    by_size: BTreeMap<u32, Vec<BlockHash>>,
    tokens: usize,
}

impl PromptHashes {
    pub fn new<'a>(nodes: impl Iterator<Item = &'a Node>, salt: u64, tokens: &[TokenId]) -> Self {
        let mut by_size = BTreeMap::new();
        for size in nodes.map(|node| node.blocks().block_size()) {
            by_size.entry(size).or_insert_with(|| hash_blocks(salt, size as usize, tokens));
        }
        Self { by_size, tokens: tokens.len() }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub hello: NodeHello,
    pub stats: NodeStats,
    pub links: Vec<LinkStats>,
    pub draining: bool,
    /// Dispatches that this node has a part in, with the prompt tokens it still has to compute for each.
    pub in_flight: BTreeMap<RequestId, u64>,
    /// Block hashes that the node says it can match.
    cached: BTreeSet<BlockHash>,
}

impl Node {
    pub fn new(hello: NodeHello) -> Self {
        Self {
            hello,
            stats: NodeStats::default(),
            links: Vec::new(),
            draining: false,
            in_flight: BTreeMap::new(),
            cached: BTreeSet::new(),
        }
    }

    /// Where KV for this decode node goes.
    pub fn kv_peer(&self) -> KvPeer {
        let addr = self.hello.kv_addr.expect("a decode node without a KV address was refused");
        KvPeer { name: self.hello.name.clone(), addr, blocks: self.blocks() }
    }

    /// What KV that it sends to `receiver` is converted from and to; `None` if it is taken as it is.
    pub fn conversion(&self, receiver: &Node) -> Option<Conversion> {
        let (from, to) = (self.blocks(), receiver.blocks());
        (from != to).then_some(Conversion { from, to })
    }

    /// What its blocks are like.
    pub fn blocks(&self) -> BlockShape {
        self.hello.identity.block_shape().expect("a node whose blocks hold nothing was refused")
    }

    /// Prompt tokens dispatched and not yet known to be computed.
    pub fn pending_tokens(&self) -> u64 {
        self.in_flight.values().sum()
    }

    /// Prompt tokens that the node does not have.
    pub fn missing_tokens(&self, prompt: &PromptHashes) -> u64 {
        let size = self.blocks().block_size();
        let hashes = prompt.by_size.get(&size).expect("a prompt is hashed for every node");
        let blocks = hashes.iter().take_while(|hash| self.cached.contains(hash)).count();
        (prompt.tokens - blocks * size as usize) as u64
    }

    /// Takes a cache report, remembering at most `limit` hashes: forgetting one costs a worse placement, no more.
    pub fn on_cache_changed(&mut self, added: Vec<BlockHash>, removed: Vec<BlockHash>, limit: usize) {
        for hash in removed {
            self.cached.remove(&hash);
        }
        for hash in added {
            if self.cached.len() < limit {
                self.cached.insert(hash);
            }
        }
    }
}
