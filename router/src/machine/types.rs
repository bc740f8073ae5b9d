//! What goes into the router's machine and what comes out.

use ridge_protocol::stats::{LinkStats, NodeStats};
use ridge_protocol::wire::{FinishReason, NodeHello, NodeToRouter, Receipt, RouterToNode};
use ridge_protocol::{Duration, NodeId, SamplingParams, TokenId, TokenOut};
use serde::{Deserialize, Serialize};

/// One submitted sequence as the HTTP side numbers it. A request with `n = 3` is three of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ClientId(pub u64);

/// Limits and deadlines of the router's machine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RouterConfig {
    /// Sequences that may be in flight or waiting for a node; one more is refused as overloaded.
    pub max_in_flight: usize,
    /// How long a sequence waits for a usable decode node (a restarting one, say) before it fails.
    pub placement_deadline: Duration,
    /// How long a dispatched sequence may stay without a token before it is dispatched again: as long as a prompt may
    /// queue. Nodes that die are noticed by their connections, long before.
    pub progress_deadline: Duration,
    /// Dispatches of one sequence, without a token between them, before it fails: enough for nodes that die one after the
    /// other (with 4, `cluster chaos` at 1.4 kills per second lost 7 streams of 11 700), and an end for a request that kills them.
    pub max_attempts: u32,
    /// Pause before a sequence goes to a node again that had no room for it. It doubles with each attempt, up to 32-fold.
    pub overload_backoff: Duration,
    /// Hashes remembered per node for prefix-aware placement.
    pub max_prefix_hashes: usize,
    /// Digests of the model whose tokenizer the HTTP side uses; a node with another one is refused. `None` takes the
    /// first node's word.
    pub model: Option<ModelDigests>,
}

/// What a model is recognised by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModelDigests {
    /// Of the weights.
    pub weights: [u8; 32],
    /// Of the description.
    pub config: [u8; 32],
    /// Of the vocabulary.
    pub tokenizer: [u8; 32],
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            max_in_flight: 4096,
            placement_deadline: Duration::from_secs(30),
            progress_deadline: Duration::from_secs(900),
            max_attempts: 16,
            overload_backoff: Duration::from_millis(100),
            max_prefix_hashes: 1 << 20,
            model: None,
        }
    }
}

/// A sequence to be served.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Submit {
    /// Chosen by the HTTP side, never reused.
    pub client: ClientId,
    /// The prompt; at least one token.
    pub tokens: Vec<TokenId>,
    /// Checked by [`SamplingParams::check`]. `max_tokens` is cut to what the context still holds.
    pub params: SamplingParams,
    /// Salt of the tenant's prefix hashes.
    pub salt: u64,
    /// It is to pass through a prefill node if there is one, whatever placement thinks of it: a probe.
    pub whole_path: bool,
}

/// What can happen to the router.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum RouterInput {
    /// The HTTP side wants a sequence served.
    Submit(Submit),
    /// Nobody reads the answer any more.
    ClientGone(ClientId),
    /// A node's connection was authenticated and it said hello.
    NodeUp {
        /// Drawn by the shell, never reused.
        node: NodeId,
        /// What it said.
        hello: NodeHello,
    },
    /// A node's connection ended.
    NodeLost {
        /// Which.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// A node said something after its hello.
    Node {
        /// Which.
        node: NodeId,
        /// What.
        message: NodeToRouter,
    },
    /// Accept nothing new; [`RouterOutput::Drained`] follows when nothing is in flight.
    Drain,
    /// Give this node nothing new and move its sequences elsewhere. It stays connected until it is stopped.
    DrainNode(NodeId),
}

/// What the router wants done.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub enum RouterOutput {
    /// Tell a node.
    Send {
        /// Which.
        node: NodeId,
        /// What.
        message: RouterToNode,
    },
    /// Disconnect a node that broke the protocol.
    Close {
        /// Which.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// Tell the HTTP side.
    Reply {
        /// Whose.
        client: ClientId,
        /// What.
        event: ReplyEvent,
    },
    /// Nothing is in flight after a `Drain`.
    Drained,
}

/// What a client's answer is made of: any number of tokens in order without a gap or duplicate, then exactly one
/// `Finished` or `Failed`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub enum ReplyEvent {
    /// The next token of the answer.
    Token {
        /// Counts from 0.
        index: u32,
        /// The token. A stop token is reported too: the HTTP side leaves it out of the text.
        out: TokenOut,
        /// What is known so far, for an answer that the HTTP side ends itself (at a stop string).
        usage: Usage,
    },
    /// The answer is complete.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// There will be no more.
    Failed(RouterError),
}

/// Token counts of one sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Usage {
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Answer length, a final stop token included.
    pub completion_tokens: u32,
    /// Prompt tokens that were found in a prefix cache instead of being computed.
    pub cached_tokens: u32,
    /// How the decode node came by the prompt's KV.
    pub receipt: Receipt,
}

/// Why a sequence was not served.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, thiserror::Error)]
pub enum RouterError {
    /// The request can never be served as it stands (HTTP 400).
    #[error("{0}")]
    Invalid(String),
    /// Too much is in flight (HTTP 429).
    #[error("the cluster is overloaded: {0}")]
    Overloaded(String),
    /// No node can serve it now (HTTP 503).
    #[error("no node is available: {0}")]
    Unavailable(String),
    /// It was tried and failed (HTTP 500).
    #[error("{0}")]
    Failed(String),
}

/// A node as `/metrics`, `/health` and the topology show it.
#[derive(Clone, PartialEq, Debug)]
pub struct NodeView {
    /// Its number.
    pub node: NodeId,
    /// What it said.
    pub hello: NodeHello,
    /// Its latest report.
    pub stats: NodeStats,
    /// Its connections to decode nodes as it last reported them (prefill nodes).
    pub links: Vec<LinkStats>,
    /// Sequences dispatched to it and not over.
    pub in_flight: u32,
    /// It takes no new sequences.
    pub draining: bool,
}

/// Counters of the router's machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RouterStats {
    /// Sequences submitted.
    pub submitted: u64,
    /// Ended with `Finished`.
    pub finished: u64,
    /// Ended with `Failed`.
    pub failed: u64,
    /// Ended because the client left.
    pub gone: u64,
    /// Dispatches after the first of a sequence, moves not counted.
    pub redispatched: u64,
    /// Dispatches that left the prompt to the decode node although there was a prefill node: that was faster.
    pub local_prefills: u64,
    /// Sequences that went from one decode node to another with their KV.
    pub moved: u64,
    /// Sequences in flight or waiting now.
    pub in_flight: u64,
    /// Prompt tokens of finished sequences.
    pub prompt_tokens: u64,
    /// Answer tokens of finished sequences.
    pub completion_tokens: u64,
    /// Prompt tokens found in a prefix cache.
    pub cached_tokens: u64,
}
