//! The golden prompt: `/health` says ready only after a real prompt has passed through prefill, transfer and decode.

use crate::machine::{ClientId, NodeView, ReplyEvent, Submit};
use ridge_protocol::{Role, SamplingParams, TokenId};

/// Decides when to send a golden prompt and what its answer means.
#[derive(Debug)]
pub struct Probe {
    tokens: Vec<TokenId>,
    expect_prefill: bool,
    ready: bool,
    reason: String,
    in_flight: Option<ClientId>,
    /// Probes count down from the top, clients up from one.
    next: u64,
}

impl Probe {
    /// `tokens` is the prompt; `expect_prefill` is false for a cluster that has no prefill nodes by design.
    pub fn new(tokens: Vec<TokenId>, expect_prefill: bool) -> Self {
        Self {
            tokens,
            expect_prefill,
            ready: false,
            reason: "no node has joined".into(),
            in_flight: None,
            next: u64::MAX,
        }
    }

    /// Whether the cluster serves, and why not.
    pub fn state(&self) -> (bool, &str) {
        (self.ready, &self.reason)
    }

    /// Whether a reply is for a probe.
    pub fn owns(&self, client: ClientId) -> bool {
        client.0 > self.next
    }

    /// A probe to submit now, if one is due; called when a node joins and about every 100 ms. `salt` must be fresh, so that no prefix cache can answer for the wire.
    pub fn poll(&mut self, nodes: &[NodeView], salt: u64) -> Option<Submit> {
        let has = |role: Role| nodes.iter().any(|n| n.hello.role == role && !n.draining);
        let missing = if !has(Role::Decode) {
            Some(Role::Decode)
        } else if self.expect_prefill && !has(Role::Prefill) {
            Some(Role::Prefill)
        } else {
            None
        };
        if let Some(role) = missing {
            self.ready = false;
            self.reason = format!("no {role} node is connected");
            return None;
        }
        if self.ready || self.in_flight.is_some() {
            return None;
        }
        self.reason = "the first prompt has not passed yet".into();
        let client = ClientId(self.next);
        self.next -= 1;
        self.in_flight = Some(client);
        let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(2) };
        Some(Submit { client, tokens: self.tokens.clone(), params, salt })
    }

    /// Takes a reply to a probe. Says whether the cluster has just become ready.
    pub fn on_reply(&mut self, client: ClientId, event: &ReplyEvent) -> bool {
        if self.in_flight != Some(client) {
            return false;
        }
        match event {
            ReplyEvent::Token { .. } => return false,
            ReplyEvent::Finished { usage, .. } if usage.receipt.transferred > 0 || !self.expect_prefill => {
                self.ready = true;
                self.reason.clear();
            }
            ReplyEvent::Finished { .. } => {
                self.reason = "the first prompt was answered without a KV transfer".into();
            }
            ReplyEvent::Failed(error) => self.reason = format!("the first prompt failed: {error}"),
        }
        self.in_flight = None;
        self.ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{RouterError, Usage};
    use ridge_protocol::stats::NodeStats;
    use ridge_protocol::wire::{FinishReason, NodeHello, Receipt};
    use ridge_protocol::{ModelIdentity, NodeId, NodeName, TokenOut};

    fn node(role: Role) -> NodeView {
        let identity = ModelIdentity {
            weights: [0; 32],
            config: [0; 32],
            tokenizer: [0; 32],
            layers: 1,
            kv_heads: 1,
            head_dim: 1,
            block_size: 2,
            kv_dtype: "f32".into(),
            kv_layout: String::new(),
            rope: String::new(),
        };
        let (name, max_model_len) = (NodeName("some".into()), 64);
        let hello = NodeHello { name, role, kv_addr: None, identity, max_model_len, blocks: 8, pid: 1 };
        NodeView {
            node: NodeId(1),
            hello,
            stats: NodeStats::default(),
            links: Vec::new(),
            in_flight: 0,
            draining: false,
        }
    }

    fn both() -> Vec<NodeView> {
        vec![node(Role::Prefill), node(Role::Decode)]
    }

    fn finished(transferred: u32) -> ReplyEvent {
        let usage = Usage { receipt: Receipt { transferred, ..Receipt::default() }, ..Usage::default() };
        ReplyEvent::Finished { reason: FinishReason::Length, usage }
    }

    /// A probe whose first prompt is on its way.
    fn sent(expect_prefill: bool) -> (Probe, ClientId) {
        let mut probe = Probe::new(vec![1, 2, 3], expect_prefill);
        let submit = probe.poll(&both(), 7).expect("every node is there");
        (probe, submit.client)
    }

    #[test]
    fn no_prompt_is_sent_before_the_nodes_are_there() {
        let check = |expect_prefill: bool, nodes: &[NodeView], want: Option<&str>| {
            let mut probe = Probe::new(vec![1], expect_prefill);
            assert_eq!(probe.state(), (false, "no node has joined"));
            assert_eq!(probe.poll(nodes, 7).is_none(), want.is_some());
            assert_eq!(probe.state(), (false, want.unwrap_or("the first prompt has not passed yet")));
        };
        let draining = |role| NodeView { draining: true, ..node(role) };
        check(true, &[], Some("no decode node is connected"));
        check(true, &[node(Role::Prefill)], Some("no decode node is connected"));
        check(true, &[node(Role::Decode)], Some("no prefill node is connected"));
        check(true, &[node(Role::Prefill), draining(Role::Decode)], Some("no decode node is connected"));
        check(true, &[draining(Role::Prefill), node(Role::Decode)], Some("no prefill node is connected"));
        check(true, &both(), None);
        check(false, &[node(Role::Decode)], None);
    }

    #[test]
    fn a_probe_is_an_ordinary_prompt_with_a_salt_of_its_own() {
        let mut probe = Probe::new(vec![1, 2, 3], true);
        let submit = probe.poll(&both(), 7).expect("every node is there");
        assert_eq!((&submit.tokens[..], submit.salt), (&[1, 2, 3][..], 7));
        // Two tokens: one from each node.
        assert_eq!((submit.params.max_tokens, submit.params.ignore_eos), (2, true));
        assert_eq!(submit.params.check(), Ok(()));
    }

    #[test]
    fn one_prompt_at_a_time_and_none_once_ready() {
        let (mut probe, client) = sent(true);
        assert!(probe.poll(&both(), 8).is_none());
        probe.on_reply(client, &finished(3));
        assert!(probe.poll(&both(), 9).is_none());
    }

    #[test]
    fn a_prompt_that_passed_makes_ready() {
        let check = |expect_prefill: bool, event: ReplyEvent, want: (bool, &str)| {
            let (mut probe, client) = sent(expect_prefill);
            let out = TokenOut { token: 1, logprob: None, top: vec![] };
            assert!(!probe.on_reply(client, &ReplyEvent::Token { index: 0, out, usage: Usage::default() }));
            assert_eq!(probe.on_reply(client, &event), want.0);
            assert_eq!(probe.state(), want);
            // Another try follows unless it passed.
            assert_eq!(probe.poll(&both(), 8).is_none(), want.0);
        };
        check(true, finished(3), (true, ""));
        check(true, finished(0), (false, "the first prompt was answered without a KV transfer"));
        check(false, finished(0), (true, ""));
        let failed = ReplyEvent::Failed(RouterError::Failed("gave up".into()));
        check(true, failed, (false, "the first prompt failed: gave up"));
    }

    #[test]
    fn a_lost_node_ends_readiness_until_a_prompt_passes_again() {
        let (mut probe, client) = sent(true);
        probe.on_reply(client, &finished(3));
        assert!(probe.poll(&[node(Role::Prefill)], 8).is_none());
        assert_eq!(probe.state(), (false, "no decode node is connected"));
        let again = probe.poll(&both(), 9).expect("every node is there").client;
        assert_ne!(again, client);
        assert!(!probe.state().0);
        assert!(probe.on_reply(again, &finished(3)));
    }

    #[test]
    fn only_its_own_replies_count() {
        let (mut probe, client) = sent(true);
        assert!(!probe.on_reply(ClientId(1), &finished(3)));
        assert!(!probe.on_reply(ClientId(client.0 - 1), &finished(3)));
        assert!(probe.owns(client));
        assert!(!probe.owns(ClientId(1)));
        assert!(!probe.owns(ClientId(client.0 - 1)));
        assert!(probe.on_reply(client, &finished(3)));
        assert!(!probe.on_reply(client, &finished(3)), "said once");
    }
}
