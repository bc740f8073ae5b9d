//! The router's machine among hostile nodes: whatever they say, a client gets a stream without a gap or a duplicate
//! that ends exactly once.

use super::peers;
use crate::draw::Draw;
use ridge_protocol::wire::{DecodeRequest, FinishReason, NodeToRouter, PrefillRequest, Receipt, RouterToNode};
use ridge_protocol::{Duration, Instant, Machine, NodeId, RequestId, SamplingParams, TokenOut};
use ridge_router::machine::{
    ClientId, ReplyEvent, Router, RouterConfig, RouterInput, RouterOutput, RouterStats, Submit,
};
use std::collections::{BTreeMap, BTreeSet};

const DEADLINE: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(10);

/// A dispatch as an honest node sees it. Random messages alone would rarely complete one.
struct Work {
    node: NodeId,
    /// Index of its next token.
    next: u32,
    max_tokens: u32,
}

struct World {
    now: Instant,
    router: Router,
    /// Connected nodes, as the shell knows them.
    nodes: BTreeSet<NodeId>,
    /// Requests that a node was told of.
    requests: Vec<RequestId>,
    /// What an honest node would say about them next.
    work: BTreeMap<RequestId, Work>,
    /// Clients that wait, and the index of the token that each waits for.
    waiting: BTreeMap<ClientId, u32>,
}

impl World {
    fn tell(&mut self, input: RouterInput) {
        self.router.handle(self.now, input);
        self.pump();
    }

    fn pump(&mut self) {
        while let Some(output) = self.router.poll_output() {
            match output {
                RouterOutput::Send { node, message } => {
                    if let RouterToNode::Prefill(PrefillRequest { request, tokens, prompt_len, params, .. })
                    | RouterToNode::Decode(DecodeRequest { request, tokens, prompt_len, params, .. }) = message
                    {
                        self.requests.push(request);
                        let next = tokens.len() as u32 - prompt_len;
                        self.work.insert(request, Work { node, next, max_tokens: params.max_tokens });
                    }
                }
                RouterOutput::Close { node, .. } => drop(self.nodes.remove(&node)),
                RouterOutput::Reply { client, event } => {
                    let next = self.waiting.get_mut(&client).expect("nothing follows the end of an answer");
                    match event {
                        ReplyEvent::Token { index, .. } => {
                            assert_eq!(index, *next, "a gap or a duplicate");
                            *next += 1;
                        }
                        ReplyEvent::Finished { usage, .. } => {
                            assert_eq!(usage.completion_tokens, *next, "the answer is as long as its tokens");
                            self.waiting.remove(&client);
                        }
                        ReplyEvent::Failed(_) => drop(self.waiting.remove(&client)),
                    }
                }
                RouterOutput::Drained => assert!(self.waiting.is_empty(), "drained with answers open"),
            }
        }
        self.router.check_integrity();
    }

    /// Goes on with one of the latest dispatches as an honest node would.
    fn honest(&mut self, draw: &mut Draw<'_>) {
        let latest = self.work.len().clamp(1, 6) as u32;
        let at = draw.below(latest) as usize;
        let Some((&request, work)) = self.work.iter_mut().nth_back(at) else { return };
        let (node, index) = (work.node, work.next);
        if index >= work.max_tokens || !self.nodes.contains(&node) {
            return;
        }
        work.next += 1;
        let finish = (work.next == work.max_tokens).then_some(FinishReason::Length);
        let out = TokenOut { token: index % peers::VOCAB, logprob: None, top: Vec::new(), ends: false };
        if index == 0 {
            let receipt = Receipt { cached: 1, ..Receipt::default() };
            self.tell(RouterInput::Node { node, message: NodeToRouter::Receipt { request, receipt } });
        }
        self.tell(RouterInput::Node { node, message: NodeToRouter::Token { request, index, out, finish } });
    }

    fn some_node(&self, draw: &mut Draw<'_>) -> Option<NodeId> {
        let count = self.nodes.len().min(200) as u32;
        self.nodes.iter().nth(draw.below(count.max(1)) as usize).copied()
    }
}

pub(super) fn router(bytes: &[u8]) {
    run(bytes);
}

/// Runs the program and says what happened in it.
fn run(bytes: &[u8]) -> RouterStats {
    let mut draw = Draw::new(bytes);
    let config = RouterConfig {
        max_in_flight: 6,
        placement_deadline: DEADLINE,
        progress_deadline: DEADLINE,
        overload_backoff: STEP,
        max_prefix_hashes: 16,
        ..RouterConfig::default()
    };
    let mut world = World {
        now: Instant(0),
        router: Router::new(config, 0),
        nodes: BTreeSet::new(),
        requests: Vec::new(),
        work: BTreeMap::new(),
        waiting: BTreeMap::new(),
    };
    let (mut next_node, mut next_client) = (0, 0);
    while !draw.is_over() {
        match draw.below(24) {
            0 => {
                let node = NodeId(next_node);
                next_node += 1;
                world.nodes.insert(node);
                world.tell(RouterInput::NodeUp { node, hello: peers::hello(&mut draw) });
            }
            1 if draw.coin() => {
                if let Some(node) = world.some_node(&mut draw) {
                    world.nodes.remove(&node);
                    world.tell(RouterInput::NodeLost { node, reason: "gone".into() });
                }
            }
            2..=5 => {
                let client = ClientId(next_client);
                next_client += 1;
                world.waiting.insert(client, 0);
                let params = SamplingParams { max_tokens: 1 + draw.below(8), ..peers::params(&mut draw) };
                let (tokens, salt) = (peers::tokens(&mut draw), draw.below(2).into());
                world.tell(RouterInput::Submit(Submit { client, tokens, params, salt, whole_path: draw.coin() }));
            }
            6 => {
                let client = ClientId(draw.below(next_client.max(1) as u32).into());
                world.waiting.remove(&client);
                world.tell(RouterInput::ClientGone(client));
            }
            7 => {
                world.now = world.now + STEP * draw.below(32);
                world.router.handle_timeout(world.now);
                world.pump();
            }
            8 if draw.byte() == 0 => world.tell(RouterInput::Drain),
            9..=16 => (0..draw.below(16)).for_each(|_| world.honest(&mut draw)),
            _ => {
                let latest = world.requests.len().saturating_sub(8);
                if let Some(node) = world.some_node(&mut draw)
                    && let Some(message) = peers::node_to_router(&mut draw, &world.requests[latest..])
                {
                    world.tell(RouterInput::Node { node, message });
                }
            }
        }
    }
    // Nobody says anything more: every answer ends by its deadlines.
    for node in std::mem::take(&mut world.nodes) {
        world.tell(RouterInput::NodeLost { node, reason: "over".into() });
    }
    // A pause may be running; the deadline is looked at after it.
    for _ in 0..2 {
        world.now = world.now + DEADLINE + 64 * STEP;
        world.router.handle_timeout(world.now);
        world.pump();
    }
    assert!(world.waiting.is_empty(), "{} answers never end", world.waiting.len());
    world.router.stats()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutate::{Mutator, Shape};

    #[test]
    fn programs_reach_every_end_of_an_answer() {
        let mut mutator = Mutator::new(1, super::super::nodes::seeds(), Shape::Bytes);
        let stats: Vec<RouterStats> = (0..500).map(|_| run(&mutator.next_input())).collect();
        let sum = |of: fn(&RouterStats) -> u64| stats.iter().map(of).sum::<u64>();
        let counts = [sum(|s| s.finished), sum(|s| s.failed), sum(|s| s.gone), sum(|s| s.redispatched)];
        let tokens = [sum(|s| s.completion_tokens), sum(|s| s.cached_tokens)];
        assert!(counts.iter().chain(&tokens).all(|count| *count > 0), "{counts:?} {tokens:?}");
    }
}
