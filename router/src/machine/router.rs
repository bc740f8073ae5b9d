//! [`Router`].

use super::dispatch::{Dispatch, Moving, Phase, Word};
use super::node::{Node, PromptHashes};
use super::placement::{place, place_move};
use super::sequence::{Arrival, Early, Sequence};
use super::types::{
    ClientId, NodeView, ReplyEvent, RouterConfig, RouterError, RouterInput, RouterOutput, RouterStats, Submit, Usage,
};
use ridge_protocol::wire::{
    DecodeRequest, FinishReason, NodeError, NodeHello, NodeToRouter, PrefillRequest, Receipt, RouterToNode,
};
use ridge_protocol::{Instant, Machine, ModelIdentity, NodeId, RequestId, Role, SamplingParams, Step, TokenOut};
use std::collections::{BTreeMap, VecDeque};

/// Dispatches after which a client is told that the cluster is overloaded.
const MAX_REFUSALS: u32 = 4;

/// The router's machine: one per cluster.
#[derive(Debug)]
pub struct Router {
    config: RouterConfig,
    nodes: BTreeMap<NodeId, Node>,
    sequences: BTreeMap<ClientId, Sequence>,
    /// Dispatches that are not over, by number.
    requests: BTreeMap<RequestId, ClientId>,
    next_request: u64,
    draining: bool,
    drained_said: bool,
    /// No deadline is earlier. Deadlines move on with every token, so the earliest is looked up only when it passes.
    next_check: Option<Instant>,
    stats: RouterStats,
    outputs: VecDeque<RouterOutput>,
}

impl Router {
    /// A router without nodes. `first_request` keeps the numbers of a restarted router apart from its predecessor's.
    pub fn new(config: RouterConfig, first_request: u64) -> Self {
        Self {
            config,
            nodes: BTreeMap::new(),
            sequences: BTreeMap::new(),
            requests: BTreeMap::new(),
            next_request: first_request,
            draining: false,
            drained_said: false,
            next_check: None,
            stats: RouterStats::default(),
            outputs: VecDeque::new(),
        }
    }

    /// Connected nodes.
    pub fn nodes(&self) -> Vec<NodeView> {
        let view = |(id, node): (&NodeId, &Node)| NodeView {
            node: *id,
            hello: node.hello.clone(),
            stats: node.stats,
            links: node.links.clone(),
            in_flight: node.in_flight.len() as u32,
            draining: node.draining,
        };
        self.nodes.iter().map(view).collect()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> RouterStats {
        RouterStats { in_flight: self.sequences.len() as u64, ..self.stats }
    }

    fn on_submit(&mut self, now: Instant, submit: Submit) {
        let client = submit.client;
        if let Err(error) = self.check(&submit) {
            self.stats.submitted += 1;
            self.stats.failed += 1;
            self.outputs.push_back(RouterOutput::Reply { client, event: ReplyEvent::Failed(error) });
            return;
        }
        self.stats.submitted += 1;
        let sequence = Sequence::new(submit, now + self.config.placement_deadline);
        self.expect_by(sequence.deadline);
        assert!(self.sequences.insert(client, sequence).is_none(), "client numbers are never reused");
        self.dispatch(now, client);
    }

    fn check(&self, submit: &Submit) -> Result<(), RouterError> {
        if self.draining {
            return Err(RouterError::Unavailable("the router is shutting down".into()));
        }
        if submit.tokens.is_empty() {
            return Err(RouterError::Invalid("the prompt is empty".into()));
        }
        submit.params.check().map_err(RouterError::Invalid)?;
        if self.sequences.len() >= self.config.max_in_flight {
            return Err(RouterError::Overloaded(format!("{} sequences are in flight", self.sequences.len())));
        }
        Ok(())
    }

    fn expect_by(&mut self, deadline: Instant) {
        self.next_check = Some(self.next_check.map_or(deadline, |check| check.min(deadline)));
    }

    /// Sends a sequence to nodes, both at once, or leaves it waiting for one (rule C-3).
    fn dispatch(&mut self, now: Instant, client: ClientId) {
        let sequence = self.sequences.get_mut(&client).expect("a dispatched sequence is kept");
        assert!(sequence.dispatch.is_none(), "a sequence has one dispatch at a time");
        let prompt = PromptHashes::new(self.nodes.values(), sequence.salt, &sequence.tokens);
        // What was taken on is brought to its end where it can be, on a node that drains too; what is new waits for another.
        let begun = sequence.attempts > 0;
        let placement = place(&self.nodes, &prompt, &sequence.avoid, sequence.whole_path, begun);
        let Some(placement) = placement else { return };
        let chosen = placement.prefill.into_iter().chain([placement.decode]);
        if sequence.pause.is_some_and(|until| now < until) && chosen.clone().any(|id| sequence.avoid.contains(&id)) {
            return; // Nobody else can be asked, and whoever had no room needs time to make some.
        }
        // Both nodes must come to the same end: the shorter context counts, and it counts for both.
        let context = chosen.map(|id| self.nodes[&id].hello.max_model_len).min().expect("a decode node is chosen");
        if sequence.tokens.len() >= context as usize {
            let (given, started) = (sequence.tokens.len(), sequence.next_index() > 0);
            return if started {
                self.finish(client, None, FinishReason::Length)
            } else {
                let error = format!("a prompt of {given} tokens leaves no room in a context of {context}");
                self.fail(client, RouterError::Invalid(error))
            };
        }
        let could_choose = self.nodes.values().any(|node| node.hello.role == Role::Prefill && !node.draining);
        self.stats.local_prefills += u64::from(placement.prefill.is_none() && could_choose);
        let request = RequestId(self.next_request);
        self.next_request += 1;
        sequence.attempts += 1;
        sequence.drop_early();
        sequence.pause = None;
        sequence.deadline = now + self.config.progress_deadline;
        let max_tokens = sequence.params.max_tokens.min(context - sequence.prompt_len);
        let only_first = sequence.next_index() + 1 >= max_tokens;
        let decode = (placement.prefill.is_none() || !only_first).then_some(placement.decode);
        let tokens = sequence.tokens.clone();
        let (prompt_len, salt) = (sequence.prompt_len, sequence.salt);
        let params = SamplingParams { max_tokens, ..sequence.params.clone() };
        if let Some(decode) = decode {
            let from = placement.prefill.map(|id| self.nodes[&id].hello.name.clone());
            let last_resort = self.nodes[&decode].draining;
            let (tokens, params) = (tokens.clone(), params.clone());
            let request = DecodeRequest { request, from, tokens, prompt_len, salt, params, last_resort };
            let message = RouterToNode::Decode(request);
            self.outputs.push_back(RouterOutput::Send { node: decode, message });
        }
        if let Some(prefill) = placement.prefill {
            let to = decode.map(|id| self.nodes[&id].kv_peer());
            let (tokens, params) = (tokens.clone(), params.clone());
            let message = RouterToNode::Prefill(PrefillRequest { request, to, tokens, prompt_len, salt, params });
            self.outputs.push_back(RouterOutput::Send { node: prefill, message });
        }
        for id in placement.prefill.into_iter().chain(decode) {
            let node = self.nodes.get_mut(&id).expect("placed on a connected node");
            let computes = id == placement.prefill.unwrap_or(placement.decode);
            let work = if computes { node.missing_tokens(&prompt) } else { 0 };
            node.in_flight.insert(request, work);
        }
        let prefill = placement.prefill;
        let conversion = prefill.zip(decode).and_then(|(from, to)| self.nodes[&from].conversion(&self.nodes[&to]));
        let phase = match (prefill, decode) {
            (Some(_), None) => Phase::FirstOnly,
            (Some(_), Some(_)) => Phase::HandOff,
            (None, _) => Phase::Alone,
        };
        sequence.dispatch = Some(Dispatch { request, prefill, decode, phase, moving: None, conversion });
        let deadline = sequence.deadline;
        self.expect_by(deadline);
        self.requests.insert(request, client);
    }

    /// Ends a sequence's dispatch: the nodes that may still work on it are told to forget it.
    fn recall(&mut self, client: ClientId) {
        let sequence = self.sequences.get_mut(&client).expect("a recalled sequence is kept");
        let Some(dispatch) = sequence.dispatch.take() else { return };
        self.leave(&dispatch);
        for id in dispatch.prefill.into_iter().chain(dispatch.decode) {
            if !self.nodes.contains_key(&id) {
                continue;
            }
            // A decode node may have begun to move it, and knows it by the next number then.
            let next = dispatch.moving.filter(|_| dispatch.decode == Some(id)).map(|moving| moving.next);
            for request in [dispatch.request].into_iter().chain(next) {
                let message = RouterToNode::Cancel { request };
                self.outputs.push_back(RouterOutput::Send { node: id, message });
            }
        }
    }

    /// Takes the prefill node out of a sequence's dispatch: the decode node computes the prompt.
    fn release_prefill(&mut self, client: ClientId, tell: bool) {
        let sequence = self.sequences.get_mut(&client).expect("a sequence in flight is kept");
        let dispatch = sequence.dispatch.as_mut().expect("a dispatch in flight is kept");
        let (request, Some(prefill)) = (dispatch.request, dispatch.prefill.take()) else { return };
        if let Some(node) = self.nodes.get_mut(&prefill) {
            node.in_flight.remove(&request);
        }
        if tell {
            let message = RouterToNode::Cancel { request };
            self.outputs.push_back(RouterOutput::Send { node: prefill, message });
        }
    }

    /// Recalls a sequence and dispatches it again, away from `failed`, or fails it when it was tried often enough.
    fn retry(&mut self, now: Instant, client: ClientId, failed: Option<NodeId>, reason: &str) {
        self.recall(client);
        let sequence = self.sequences.get_mut(&client).expect("a retried sequence is kept");
        sequence.avoid.extend(failed);
        if sequence.attempts >= self.config.max_attempts {
            let attempts = sequence.attempts;
            let error = RouterError::Failed(format!("gave up after {attempts} attempts: {reason}"));
            return self.fail(client, error);
        }
        sequence.deadline = sequence.pause.unwrap_or(now) + self.config.placement_deadline;
        let due = sequence.due();
        self.expect_by(due);
        self.stats.redispatched += 1;
        self.dispatch(now, client);
    }

    fn fail(&mut self, client: ClientId, error: RouterError) {
        self.recall(client);
        self.sequences.remove(&client);
        self.stats.failed += 1;
        self.outputs.push_back(RouterOutput::Reply { client, event: ReplyEvent::Failed(error) });
    }

    /// Ends a sequence whose last token came from node `by`, which is done with it; the others are told.
    fn finish(&mut self, client: ClientId, by: Option<NodeId>, reason: FinishReason) {
        let dispatch = self.sequences.get_mut(&client).and_then(|s| s.dispatch.as_mut());
        if let Some(dispatch) = dispatch
            && let Some(by) = by
        {
            // A decode node that has spoken has settled with the prefill node. Until then the prefill node holds blocks
            // for it, even if it said the last token itself; and the decode node may never have heard of the request,
            // so both must be told that nobody wants them.
            let holds_nothing = dispatch.phase != Phase::HandOff;
            let decoded = dispatch.decode == Some(by);
            for (side, done) in [(&mut dispatch.prefill, holds_nothing), (&mut dispatch.decode, decoded)] {
                if let Some(id) = side.filter(|_| done) {
                    *side = None;
                    if let Some(node) = self.nodes.get_mut(&id) {
                        node.in_flight.remove(&dispatch.request);
                    }
                }
            }
        }
        self.recall(client);
        let mut sequence = self.sequences.remove(&client).expect("a finished sequence is kept");
        sequence.usage.completion_tokens = sequence.next_index();
        let usage = sequence.usage;
        self.stats.finished += 1;
        self.stats.prompt_tokens += u64::from(usage.prompt_tokens);
        self.stats.completion_tokens += u64::from(usage.completion_tokens);
        self.stats.cached_tokens += u64::from(usage.cached_tokens);
        self.outputs.push_back(RouterOutput::Reply { client, event: ReplyEvent::Finished { reason, usage } });
    }

    fn on_node_up(&mut self, now: Instant, node: NodeId, hello: NodeHello) {
        let refusal = match &hello {
            NodeHello { role: Role::Router, .. } => Some("a router cannot join as a node".to_string()),
            NodeHello { role: Role::Decode, kv_addr: None, .. } => {
                Some("a decode node must say where it takes KV".into())
            }
            NodeHello { identity, .. } if identity.block_bytes() == 0 => {
                Some("a model has layers, heads and blocks: the identity says none".into())
            }
            NodeHello { identity, .. } => self.mismatch(&hello, identity),
        };
        if let Some(reason) = refusal {
            let message = RouterToNode::Refuse { reason: reason.clone() };
            self.outputs.push_back(RouterOutput::Send { node, message });
            self.outputs.push_back(RouterOutput::Close { node, reason });
            return;
        }
        // A node that comes back before its old connection was seen to end replaces it.
        let replaced: Vec<NodeId> =
            self.nodes.iter().filter(|(_, n)| n.hello.name == hello.name).map(|(id, _)| *id).collect();
        for old in replaced {
            let reason = "replaced by a new connection of the same name".to_string();
            self.outputs.push_back(RouterOutput::Close { node: old, reason: reason.clone() });
            self.on_node_lost(now, old, &reason);
        }
        assert!(self.nodes.insert(node, Node::new(hello)).is_none(), "node numbers are never reused");
        self.outputs.push_back(RouterOutput::Send { node, message: RouterToNode::Welcome { node } });
        self.dispatch_waiting(now);
        self.move_sequences();
    }

    /// What keeps a node out of this cluster, if anything: another model, or KV that could not pass (rule P-4).
    fn mismatch(&self, hello: &NodeHello, identity: &ModelIdentity) -> Option<String> {
        let ours = self.config.model.map(|model| ModelIdentity {
            weights: model.weights,
            config: model.config,
            tokenizer: model.tokenizer,
            ..identity.clone()
        });
        // A node that comes back may come back changed: its own old entry does not count.
        let others = || self.nodes.values().map(|node| &node.hello).filter(|other| other.name != hello.name);
        let known = others().map(|other| &other.identity);
        if let Some(mismatch) = ours.iter().chain(known).find_map(|known| known.mismatch(identity)) {
            return Some(format!("this cluster serves another model than {}: {mismatch}", hello.name));
        }
        // Any prefill node may be asked to send to any decode node. Between decode nodes it is a matter of placement.
        let partners = others().filter(|other| other.role != hello.role);
        let mut pairs = partners.map(|other| if hello.role == Role::Prefill { (hello, other) } else { (other, hello) });
        pairs.find_map(|(sender, receiver)| {
            let refusal = receiver.identity.refusal(&sender.identity)?;
            Some(format!("{} takes no KV from {}: {refusal}", receiver.name, sender.name))
        })
    }

    fn dispatch_waiting(&mut self, now: Instant) {
        let waiting: Vec<ClientId> =
            self.sequences.values().filter(|s| s.dispatch.is_none()).map(|s| s.client).collect();
        for client in waiting {
            self.dispatch(now, client);
        }
    }

    fn on_node_lost(&mut self, now: Instant, id: NodeId, reason: &str) {
        let Some(node) = self.nodes.remove(&id) else { return };
        for request in node.in_flight.into_keys() {
            let client = self.requests[&request];
            let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
            let dispatch = sequence.dispatch.as_mut().expect("a dispatch in flight is kept");
            let word = dispatch.word(id, Word::PrefillLost, Word::DecodeLost);
            if word.is_some_and(|word| dispatch.hear(word) == Step::End) {
                self.retry(now, client, Some(id), &format!("node {} was lost: {reason}", node.hello.name));
            }
        }
    }

    fn on_node(&mut self, now: Instant, id: NodeId, message: NodeToRouter) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        match message {
            NodeToRouter::Token { request, index, out, finish } => self.on_token(now, id, request, index, out, finish),
            NodeToRouter::Receipt { request, receipt } => {
                let Some(&client) = self.requests.get(&request) else { return };
                let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
                let dispatch = sequence.dispatch.as_mut().expect("a dispatch in flight is kept");
                let (from_prefill, from_decode) = (dispatch.prefill == Some(id), dispatch.decode == Some(id));
                if !from_prefill && !from_decode {
                    return; // It has no part in this.
                }
                let recomputed = from_decode && receipt.recomputed > 0;
                let transferred = from_decode && receipt.transferred > 0;
                let converted = dispatch.conversion.filter(|_| transferred);
                let alone = recomputed && dispatch.hear(Word::Recomputed) == Step::Enter(Phase::Alone);
                sequence.on_receipt(from_decode, Receipt { converted, ..receipt });
                if alone {
                    // The decode node did not wait for the hand-off: nobody needs it any more.
                    self.release_prefill(client, true);
                }
            }
            NodeToRouter::Failed { request, error } => self.on_failed(now, id, request, error),
            NodeToRouter::Stats(stats) => node.stats = stats,
            NodeToRouter::Links(links) => node.links = links,
            NodeToRouter::CacheChanged { added, removed } => {
                node.on_cache_changed(added, removed, self.config.max_prefix_hashes);
            }
            NodeToRouter::Drained => node.draining = true,
            NodeToRouter::Draining => {
                node.draining = true;
                self.move_sequences();
            }
            NodeToRouter::Shipped { request, times } => {
                let Some(&client) = self.requests.get(&request) else { return };
                let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
                let Some(dispatch) = sequence.dispatch.as_mut().filter(|dispatch| dispatch.prefill == Some(id)) else {
                    return; // It has no part in this.
                };
                dispatch.hear(Word::Shipped);
                node.in_flight.remove(&request);
                sequence.usage.receipt.times = sequence.usage.receipt.times + times;
            }
            NodeToRouter::Moving { request, len } => self.on_moving(now, id, request, len),
            NodeToRouter::Hello(_) => {
                let reason = "a second hello on one connection".to_string();
                self.outputs.push_back(RouterOutput::Close { node: id, reason: reason.clone() });
                self.on_node_lost(now, id, &reason);
            }
        }
    }

    fn on_token(
        &mut self,
        now: Instant,
        id: NodeId,
        request: RequestId,
        index: u32,
        out: TokenOut,
        finish: Option<FinishReason>,
    ) {
        let Some(&client) = self.requests.get(&request) else { return }; // Of a dispatch that is over.
        let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
        let dispatch = sequence.dispatch.as_mut().expect("a dispatch in flight is kept");
        let Some(word) = dispatch.word(id, Word::PrefillToken, Word::DecodeToken) else { return };
        dispatch.hear(word);
        sequence.deadline = now + self.config.progress_deadline;
        for node in dispatch.prefill.iter().chain(&dispatch.decode) {
            if let Some(work) = self.nodes.get_mut(node).and_then(|node| node.in_flight.get_mut(&request)) {
                *work = 0; // The prompt is computed.
            }
        }
        if dispatch.phase == Phase::HandedOver
            && let Some(node) = dispatch.prefill.and_then(|prefill| self.nodes.get_mut(&prefill))
        {
            node.in_flight.remove(&request);
        }
        let rounds = dispatch.rounds();
        match sequence.arrive(id, index, out, finish) {
            Arrival::Nothing => {}
            Arrival::Ends(reason) => self.finish(client, Some(id), reason),
            Arrival::InOrder(tokens) => {
                sequence.attempts = 1; // It moves: only failures without a token between them are counted.
                let so_far = sequence.usage;
                for (index, Early { out, by, finish }) in tokens {
                    let usage = Usage { completion_tokens: index + 1, ..so_far };
                    let event = ReplyEvent::Token { index, out, usage };
                    self.outputs.push_back(RouterOutput::Reply { client, event });
                    if let Some(reason) = finish {
                        return self.finish(client, Some(by), reason);
                    }
                }
            }
            Arrival::Diverged { .. } if rounds => {
                // A prompt computed again in another KV type may well be answered otherwise. What the client has stands,
                // and is part of the prompt from now on (rule C-4).
                self.retry(now, client, None, "its nodes keep KV in different types");
            }
            Arrival::Diverged { index, had } => {
                // Never paper over it: a client must not get an answer that two nodes disagree about.
                let error = format!("nodes disagree about token {index} of the answer (the client has {had})");
                self.fail(client, RouterError::Failed(error));
            }
        }
    }

    fn on_failed(&mut self, now: Instant, id: NodeId, request: RequestId, error: NodeError) {
        let Some(&client) = self.requests.get(&request) else { return };
        let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
        let dispatch = sequence.dispatch.as_mut().expect("a dispatch in flight is kept");
        let of_prefill = if matches!(error, NodeError::Transfer(_)) { Word::Unshipped } else { Word::PrefillFailed };
        let Some(word) = dispatch.word(id, of_prefill, Word::DecodeFailed) else { return };
        match dispatch.hear(word) {
            Step::End => {}
            Step::Enter(_) => {
                // The decode node computes the prompt itself; it may not have heard (rule C-8).
                let decode = dispatch.decode.expect("somebody goes on alone");
                let NodeError::Transfer(reason) = error else {
                    unreachable!("only a hand-off that failed leaves it to the decode node")
                };
                let message = RouterToNode::TransferFailed { request, reason };
                self.outputs.push_back(RouterOutput::Send { node: decode, message });
                return self.release_prefill(client, false);
            }
            _ => return, // Its part is over.
        }
        match error {
            NodeError::Invalid(reason) => self.fail(client, RouterError::Invalid(reason)),
            NodeError::Draining => {
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.draining = true;
                }
                self.retry(now, client, Some(id), "the node is draining");
            }
            NodeError::Overloaded(reason) => {
                let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
                // A client that has nothing yet is told soon; one whose answer has begun is worth more patience.
                let begun = sequence.next_index() > 0;
                let most = if begun { self.config.max_attempts } else { self.config.max_attempts.min(MAX_REFUSALS) };
                if sequence.attempts >= most {
                    self.fail(client, RouterError::Overloaded(reason));
                } else {
                    let doublings = (sequence.attempts - 1).min(5);
                    sequence.pause = Some(now + self.config.overload_backoff * (1 << doublings));
                    self.retry(now, client, Some(id), &reason);
                }
            }
            NodeError::Transfer(reason) => self.retry(now, client, Some(id), &reason),
        }
    }

    fn on_drain_node(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.draining = true;
        self.outputs.push_back(RouterOutput::Send { node: id, message: RouterToNode::Drain });
        self.move_sequences();
    }

    /// Tells draining decode nodes to move what they have, as far as there is another node to take it. What cannot
    /// move ends where it is.
    fn move_sequences(&mut self) {
        let draining = |(_, node): &(&NodeId, &Node)| node.draining && node.hello.role == Role::Decode;
        let from: Vec<(NodeId, Vec<RequestId>)> = self
            .nodes
            .iter()
            .filter(draining)
            .map(|(id, node)| (*id, node.in_flight.keys().copied().collect()))
            .collect();
        // Moves under way count as load, so that not all of them choose the same node.
        let mut coming: BTreeMap<NodeId, u64> = BTreeMap::new();
        for moving in self.sequences.values().filter_map(|s| s.dispatch.as_ref()?.moving) {
            *coming.entry(moving.to).or_default() += 1;
        }
        for (from, requests) in from {
            for request in requests {
                let client = self.requests[&request];
                let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
                let dispatch = sequence.dispatch.as_mut().expect("a dispatch in flight is kept");
                if dispatch.decode != Some(from) || dispatch.moving.is_some() {
                    continue;
                }
                let Some(to) = place_move(&self.nodes, from, &coming) else { break };
                let next = RequestId(self.next_request);
                self.next_request += 1;
                dispatch.moving = Some(Moving { next, to });
                *coming.entry(to).or_default() += 1;
                let message = RouterToNode::Move { request, next, to: self.nodes[&to].kv_peer() };
                self.outputs.push_back(RouterOutput::Send { node: from, message });
            }
        }
    }

    /// A sequence has left its decode node, which now plays the prefill node's part towards the next one.
    fn on_moving(&mut self, now: Instant, id: NodeId, request: RequestId, len: u32) {
        let Some(&client) = self.requests.get(&request) else { return };
        let sequence = self.sequences.get_mut(&client).expect("a dispatch in flight is kept");
        let dispatch = sequence.dispatch.as_mut().expect("a dispatch in flight is kept");
        let Some(Moving { next, to }) = dispatch.moving.filter(|_| dispatch.decode == Some(id)) else { return };
        // A node says its tokens and this on one stream, in order: whatever it generated is here.
        let known = sequence.tokens.len() as u32 == len && sequence.next_index() > 0;
        let Some(target) = self.nodes.get(&to).filter(|node| known && !node.draining) else {
            return self.retry(now, client, Some(id), "its decode node drains");
        };
        let context = target.hello.max_model_len.min(self.nodes[&id].hello.max_model_len);
        let from = self.nodes[&id].hello.name.clone();
        let conversion = self.nodes[&id].conversion(target);
        let mut dispatch = sequence.dispatch.take().expect("looked up above");
        dispatch.hear(Word::Moves);
        sequence.drop_early();
        let message = RouterToNode::Decode(DecodeRequest {
            request: next,
            from: Some(from),
            // As after a prefill: the KV that comes, then the first token, which is said again.
            tokens: sequence.tokens[..len as usize - 1].to_vec(),
            prompt_len: sequence.prompt_len,
            salt: sequence.salt,
            params: SamplingParams {
                max_tokens: sequence.params.max_tokens.min(context - sequence.prompt_len),
                ..sequence.params.clone()
            },
            last_resort: false,
        });
        sequence.deadline = now + self.config.progress_deadline;
        sequence.dispatch = Some(Dispatch {
            request: next,
            prefill: Some(id),
            decode: Some(to),
            phase: dispatch.phase,
            moving: None,
            conversion,
        });
        self.leave(&dispatch);
        self.requests.insert(next, client);
        for node in [id, to] {
            self.nodes.get_mut(&node).expect("both are connected").in_flight.insert(next, 0);
        }
        self.stats.moved += 1;
        self.outputs.push_back(RouterOutput::Send { node: to, message });
    }

    /// Takes a dispatch that is over out of the accounts.
    fn leave(&mut self, dispatch: &Dispatch) {
        self.requests.remove(&dispatch.request);
        for id in dispatch.prefill.iter().chain(&dispatch.decode) {
            if let Some(node) = self.nodes.get_mut(id) {
                node.in_flight.remove(&dispatch.request);
            }
        }
    }

    fn on_client_gone(&mut self, client: ClientId) {
        if self.sequences.contains_key(&client) {
            self.recall(client);
            self.sequences.remove(&client);
            self.stats.gone += 1;
        }
    }

    fn say_drained(&mut self) {
        if self.draining && self.sequences.is_empty() && !self.drained_said {
            self.drained_said = true;
            self.outputs.push_back(RouterOutput::Drained);
        }
    }
}

impl Machine for Router {
    type Input = RouterInput;
    type Output = RouterOutput;

    fn handle(&mut self, now: Instant, input: RouterInput) {
        match input {
            RouterInput::Submit(submit) => self.on_submit(now, submit),
            RouterInput::ClientGone(client) => self.on_client_gone(client),
            RouterInput::NodeUp { node, hello } => self.on_node_up(now, node, hello),
            RouterInput::NodeLost { node, reason } => self.on_node_lost(now, node, &reason),
            RouterInput::Node { node, message } => self.on_node(now, node, message),
            RouterInput::Drain => self.draining = true,
            RouterInput::DrainNode(node) => self.on_drain_node(node),
        }
        self.say_drained();
    }

    fn handle_timeout(&mut self, now: Instant) {
        if self.next_check.is_none_or(|check| now < check) {
            return;
        }
        let late: Vec<ClientId> = self.sequences.values().filter(|s| s.due() <= now).map(|s| s.client).collect();
        for client in late {
            let sequence = self.sequences.get_mut(&client).expect("it was found late");
            if sequence.pause.take().is_some() {
                self.dispatch(now, client);
            } else if let Some(dispatch) = &mut sequence.dispatch {
                let owing = dispatch.owing();
                assert_eq!(dispatch.hear(Word::Silence), Step::End);
                self.retry(now, client, owing, "no sign of life from its nodes");
            } else {
                let waited = self.config.placement_deadline.as_secs();
                let error = format!("no decode node could be had for {waited} s");
                self.fail(client, RouterError::Unavailable(error));
            }
        }
        self.next_check = self.sequences.values().map(Sequence::due).min();
        self.say_drained();
    }

    fn poll_output(&mut self) -> Option<RouterOutput> {
        self.outputs.pop_front()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.next_check
    }

    fn check_integrity(&self) {
        for (request, client) in &self.requests {
            let dispatch = self.sequences.get(client).and_then(|s| s.dispatch.as_ref());
            assert_eq!(dispatch.map(|d| d.request), Some(*request), "{request} belongs to nobody");
            dispatch.into_iter().for_each(Dispatch::check_integrity);
        }
        for (id, node) in &self.nodes {
            for request in node.in_flight.keys() {
                assert!(self.requests.contains_key(request), "node {id:?} is charged for {request}, which is over");
            }
        }
        assert!(self.sequences.len() <= self.config.max_in_flight, "more in flight than allowed");
    }
}
