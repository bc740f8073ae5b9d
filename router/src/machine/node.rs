//! What the router knows about a node.

use ridge_protocol::stats::{LinkStats, NodeStats};
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::NodeHello;
use ridge_protocol::{BlockHash, RequestId};
use std::collections::{BTreeMap, BTreeSet};

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
        KvPeer { name: self.hello.name.clone(), addr }
    }

    /// Prompt tokens dispatched and not yet known to be computed.
    pub fn pending_tokens(&self) -> u64 {
        self.in_flight.values().sum()
    }

    /// Leading blocks of a prompt that the node has.
    pub fn overlap(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.cached.contains(hash)).count()
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
