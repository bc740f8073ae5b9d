//! A router on a bench, and its outputs as text, one line each: `d1 <- decode r7` tells a node, `c1: token #0 5` a
//! client.

use crate::machine::{
    ClientId, ReplyEvent, Router, RouterConfig, RouterError, RouterInput, RouterOutput, RouterStats, Submit,
};
use ridge_protocol::wire::{FinishReason, NodeError, NodeHello, NodeToRouter, Receipt, RouterToNode};
use ridge_protocol::{
    CacheDtype, Duration, Instant, Machine, ModelIdentity, NodeId, NodeName, RequestId, Role, SamplingParams, TokenId,
    TokenOut,
};

/// Node numbers: prefill nodes are 1 and 2, decode nodes 11 and 12, as `p1` and `d2` in what follows.
pub(super) fn number(name: &str) -> NodeId {
    let (role, digits) = name.split_at(1);
    NodeId(digits.parse::<u32>().expect("a digit") + if role == "d" { 10 } else { 0 })
}

pub(super) fn name(node: NodeId) -> String {
    if node.0 > 10 { format!("d{}", node.0 - 10) } else { format!("p{}", node.0) }
}

pub(super) fn identity() -> ModelIdentity {
    ModelIdentity {
        weights: [1; 32],
        config: [2; 32],
        tokenizer: [3; 32],
        layers: 2,
        kv_heads: 1,
        head_dim: 8,
        block_size: 4,
        kv_dtype: CacheDtype::F32,
        kv_layout: String::new(),
        rope: "10000".into(),
    }
}

pub(super) fn hello(name: &str) -> NodeHello {
    let role = if name.starts_with('d') { Role::Decode } else { Role::Prefill };
    NodeHello {
        name: NodeName(name.into()),
        role,
        kv_addr: (role == Role::Decode).then(|| "127.0.0.1:1".parse().expect("an address")),
        identity: identity(),
        max_model_len: 64,
        blocks: 16,
        pid: 1,
    }
}

pub(super) fn submit(client: u64, tokens: &[TokenId], max_tokens: u32) -> Submit {
    let params = SamplingParams::greedy(max_tokens);
    Submit { client: ClientId(client), tokens: tokens.to_vec(), params, salt: 0, whole_path: false }
}

pub(super) fn show_message(message: RouterToNode) -> String {
    match message {
        RouterToNode::Prefill(it) => {
            let to = it.to.map_or(String::new(), |peer| format!(" to {}", peer.name));
            format!("prefill {}{to}: {:?} of {}", it.request, it.tokens, it.prompt_len)
        }
        RouterToNode::Decode(it) => {
            let from = it.from.map_or(String::new(), |from| format!(" from {from}"));
            let how = if it.last_resort { ", as a last resort" } else { "" };
            format!("decode {}{from}{how}: {:?} of {}", it.request, it.tokens, it.prompt_len)
        }
        RouterToNode::Cancel { request } => format!("cancel {request}"),
        RouterToNode::Welcome { node } => format!("welcome {}", name(node)),
        RouterToNode::Refuse { reason } => format!("refuse: {reason}"),
        RouterToNode::Drain => "drain".into(),
        RouterToNode::TransferFailed { request, reason } => format!("transfer of {request} failed: {reason}"),
        RouterToNode::Move { request, next, to } => format!("move {request} to {} as {next}", to.name),
    }
}

pub(super) fn show(output: RouterOutput) -> String {
    match output {
        RouterOutput::Send { node, message } => format!("{} <- {}", name(node), show_message(message)),
        RouterOutput::Close { node, reason } => format!("close {}: {reason}", name(node)),
        RouterOutput::Reply { client, event } => match event {
            ReplyEvent::Token { index, out, .. } => format!("c{}: token #{index} {}", client.0, out.token),
            ReplyEvent::Finished { reason, .. } => format!("c{}: finished, {reason:?}", client.0),
            ReplyEvent::Failed(error) => {
                let kind = match error {
                    RouterError::Invalid(_) => "invalid",
                    RouterError::Overloaded(_) => "overloaded",
                    RouterError::Unavailable(_) => "unavailable",
                    RouterError::Failed(_) => "failed",
                };
                format!("c{}: {kind}: {error}", client.0)
            }
        },
        RouterOutput::Drained => "drained".into(),
    }
}

/// A router, and what it said since it was last asked. Times are in seconds.
pub(super) struct Bench {
    pub router: Router,
    pub now: Instant,
    pub seen: Vec<RouterOutput>,
}

impl Bench {
    pub fn with(config: RouterConfig, nodes: &[&str]) -> Self {
        let mut bench = Self { router: Router::new(config, 1), now: Instant(0), seen: vec![] };
        for node in nodes {
            bench.joins(node);
        }
        bench.seen.clear();
        bench
    }

    pub fn new(nodes: &[&str]) -> Self {
        Self::with(RouterConfig::default(), nodes)
    }

    /// One prefill and one decode node, and `[7, 8, 9]` dispatched to both as r1.
    pub fn serving(max_tokens: u32) -> Self {
        let mut bench = Self::new(&["p1", "d1"]);
        bench.submit(1, &[7, 8, 9], max_tokens);
        bench.seen.clear();
        bench
    }

    pub fn feed(&mut self, input: RouterInput) {
        self.router.handle(self.now, input);
        self.drain_outputs();
    }

    pub fn drain_outputs(&mut self) {
        self.seen.extend(std::iter::from_fn(|| self.router.poll_output()));
        self.router.check_integrity();
        let RouterStats { submitted, finished, failed, gone, in_flight, .. } = self.router.stats();
        assert_eq!(submitted, finished + failed + gone + in_flight, "every sequence ends once");
    }

    pub fn joins(&mut self, node: &str) {
        self.feed(RouterInput::NodeUp { node: number(node), hello: hello(node) });
    }

    /// As `joins`, taking sequences up to a length.
    pub fn joins_with(&mut self, node: &str, max_model_len: u32) {
        self.feed(RouterInput::NodeUp { node: number(node), hello: NodeHello { max_model_len, ..hello(node) } });
    }

    pub fn submit(&mut self, client: u64, tokens: &[TokenId], max_tokens: u32) {
        self.feed(RouterInput::Submit(submit(client, tokens, max_tokens)));
    }

    pub fn node(&mut self, node: &str, message: NodeToRouter) {
        self.feed(RouterInput::Node { node: number(node), message });
    }

    pub fn token(&mut self, node: &str, request: u64, index: u32, token: TokenId) {
        self.token_ends(node, request, index, token, None);
    }

    pub fn token_ends(&mut self, node: &str, request: u64, index: u32, token: TokenId, finish: Option<FinishReason>) {
        let out = TokenOut { token, logprob: None, top: vec![], ends: false };
        self.node(node, NodeToRouter::Token { request: RequestId(request), index, out, finish });
    }

    pub fn fails(&mut self, node: &str, request: u64, error: NodeError) {
        self.node(node, NodeToRouter::Failed { request: RequestId(request), error });
    }

    pub fn receipt(&mut self, node: &str, request: u64, receipt: Receipt) {
        self.node(node, NodeToRouter::Receipt { request: RequestId(request), receipt });
    }

    /// A decode node says that a sequence has left it.
    pub fn moving(&mut self, node: &str, request: u64, len: u32) {
        self.node(node, NodeToRouter::Moving { request: RequestId(request), len });
    }

    /// An operator wants a node to be drained.
    pub fn drains(&mut self, node: &str) {
        self.feed(RouterInput::DrainNode(number(node)));
    }

    pub fn lost(&mut self, node: &str) {
        self.feed(RouterInput::NodeLost { node: number(node), reason: "idle timeout".into() });
    }

    pub fn at(&mut self, seconds: u64) {
        self.now = Instant(0) + Duration::from_secs(seconds);
        self.router.handle_timeout(self.now);
        self.drain_outputs();
    }

    /// What was said since the last call.
    pub fn says(&mut self, want: &[&str]) {
        let seen: Vec<String> = self.seen.drain(..).map(show).collect();
        assert_eq!(seen, want);
    }

    /// What nodes were told about the answer's length since the last call.
    pub fn max_tokens(&mut self) -> Vec<u32> {
        let told = |output| match output {
            RouterOutput::Send { message: RouterToNode::Prefill(it), .. } => Some(it.params.max_tokens),
            RouterOutput::Send { message: RouterToNode::Decode(it), .. } => Some(it.params.max_tokens),
            _ => None,
        };
        self.seen.drain(..).filter_map(told).collect()
    }

    /// Dispatches in flight by node.
    pub fn in_flight(&self, want: &[(&str, u32)]) {
        let seen: Vec<(String, u32)> = self.router.nodes().iter().map(|n| (name(n.node), n.in_flight)).collect();
        let want: Vec<(String, u32)> = want.iter().map(|(node, n)| ((*node).to_owned(), *n)).collect();
        assert_eq!(seen, want);
    }
}
