//! The golden prompt: `/health` says what a real prompt has shown, not what is connected.
//!
//! Ready is a cluster through which one has passed by way of prefill, transfer and decode. A decode node serves without
//! the others too: then the cluster is degraded.

use super::gateway::Health;
use crate::machine::{ClientId, NodeView, ReplyEvent, RouterError, Submit};
use ridge_protocol::{Role, SamplingParams, TokenId};

/// Said until the first answer.
const NOT_YET: &str = "no golden prompt has passed yet";

/// Decides when to send a golden prompt and what its answer means.
#[derive(Debug)]
pub struct Probe {
    tokens: Vec<TokenId>,
    expect_prefill: bool,
    /// A kind of node of which there is none.
    missing: Option<Role>,
    /// A prompt was answered since there is a decode node.
    serves: bool,
    /// A prompt passed through every kind of node since none is missing.
    whole: bool,
    /// Why the last prompt did not.
    shortfall: String,
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
            missing: Some(Role::Decode),
            serves: false,
            whole: false,
            shortfall: NOT_YET.into(),
            in_flight: None,
            next: u64::MAX,
        }
    }

    /// Whether the cluster serves, and what is wrong.
    pub fn health(&self) -> Health {
        match self.missing {
            Some(Role::Decode) => Health::Unavailable("no decode node is connected".into()),
            _ if self.serves && self.whole => Health::Ready,
            _ if !self.serves => Health::Unavailable(self.shortfall.clone()),
            Some(role) => Health::Degraded(format!("no {role} node is connected: decode nodes compute prompts")),
            None => Health::Degraded(self.shortfall.clone()),
        }
    }

    /// Whether a reply is for a probe.
    pub fn owns(&self, client: ClientId) -> bool {
        client.0 > self.next
    }

    /// A probe to submit now, if one is due; called when a node joins and about every 100 ms. `salt` must be fresh, so
    /// that no prefix cache can answer for the wire.
    pub fn poll(&mut self, nodes: &[NodeView], salt: u64) -> Option<Submit> {
        let has = |role: Role| nodes.iter().any(|n| n.hello.role == role && !n.draining);
        let missing = if !has(Role::Decode) {
            Some(Role::Decode)
        } else if self.expect_prefill && !has(Role::Prefill) {
            Some(Role::Prefill)
        } else {
            None
        };
        if missing != self.missing {
            self.shortfall = NOT_YET.into();
        }
        self.missing = missing;
        self.serves &= missing != Some(Role::Decode);
        self.whole &= missing.is_none();
        let nothing_to_learn = match missing {
            Some(Role::Decode) => true,
            Some(_) => self.serves,
            None => self.serves && self.whole,
        };
        if nothing_to_learn || self.in_flight.is_some() {
            return None;
        }
        let client = ClientId(self.next);
        self.next -= 1;
        self.in_flight = Some(client);
        let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(2) };
        Some(Submit { client, tokens: self.tokens.clone(), params, salt, whole_path: true })
    }

    /// Takes a reply to a probe. Says whether the cluster has just become ready.
    pub fn on_reply(&mut self, client: ClientId, event: &ReplyEvent) -> bool {
        if self.in_flight != Some(client) {
            return false;
        }
        match event {
            ReplyEvent::Token { .. } => return false,
            ReplyEvent::Finished { usage, .. } => {
                self.serves = true;
                self.whole = usage.receipt.transferred > 0 || !self.expect_prefill;
                self.shortfall = "the last golden prompt was answered without a KV transfer".into();
            }
            // A cluster that is full of other people's prompts does serve.
            ReplyEvent::Failed(RouterError::Overloaded(_)) if self.serves => {}
            ReplyEvent::Failed(error) => {
                self.serves = false;
                self.shortfall = format!("the last golden prompt failed: {error}");
            }
        }
        self.in_flight = None;
        self.serves && self.whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Usage;
    use ridge_protocol::stats::NodeStats;
    use ridge_protocol::wire::{FinishReason, NodeHello, Receipt};
    use ridge_protocol::{CacheDtype, ModelIdentity, NodeId, NodeName, TokenOut};

    fn node(role: Role) -> NodeView {
        let identity = ModelIdentity {
            weights: [0; 32],
            config: [0; 32],
            tokenizer: [0; 32],
            layers: 1,
            kv_heads: 1,
            head_dim: 1,
            block_size: 2,
            kv_dtype: CacheDtype::F32,
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

    fn unavailable(reason: &str) -> Health {
        Health::Unavailable(reason.into())
    }

    fn degraded(reason: &str) -> Health {
        Health::Degraded(reason.into())
    }

    const NO_PREFILL: &str = "no prefill node is connected: decode nodes compute prompts";
    const NO_TRANSFER: &str = "the last golden prompt was answered without a KV transfer";

    #[test]
    fn no_prompt_is_sent_before_a_decode_node_is_there() {
        let check = |expect_prefill: bool, nodes: &[NodeView], sent: bool| {
            let mut probe = Probe::new(vec![1], expect_prefill);
            assert_eq!(probe.health(), unavailable("no decode node is connected"));
            assert_eq!(probe.poll(nodes, 7).is_some(), sent);
            assert_eq!(probe.health(), unavailable(if sent { NOT_YET } else { "no decode node is connected" }));
        };
        let draining = |role| NodeView { draining: true, ..node(role) };
        check(true, &[], false);
        check(true, &[node(Role::Prefill)], false);
        check(true, &[node(Role::Prefill), draining(Role::Decode)], false);
        check(true, &[node(Role::Decode)], true);
        check(true, &[draining(Role::Prefill), node(Role::Decode)], true);
        check(true, &both(), true);
        check(false, &[node(Role::Decode)], true);
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
        let check = |expect_prefill: bool, event: ReplyEvent, want: Health| {
            let (mut probe, client) = sent(expect_prefill);
            let out = TokenOut { token: 1, logprob: None, top: vec![], ends: false };
            assert!(!probe.on_reply(client, &ReplyEvent::Token { index: 0, out, usage: Usage::default() }));
            assert_eq!(probe.on_reply(client, &event), want == Health::Ready);
            assert_eq!(probe.health(), want);
            // Another try follows unless it passed, and the reason stays until that has an answer.
            assert_eq!(probe.poll(&both(), 8).is_none(), want == Health::Ready);
            assert_eq!(probe.health(), want);
        };
        check(true, finished(3), Health::Ready);
        check(true, finished(0), degraded(NO_TRANSFER));
        check(false, finished(0), Health::Ready);
        let failed = ReplyEvent::Failed(RouterError::Failed("gave up".into()));
        check(true, failed, unavailable("the last golden prompt failed: gave up"));
    }

    #[test]
    fn a_lost_decode_node_ends_service_until_a_prompt_passes_again() {
        let (mut probe, client) = sent(true);
        probe.on_reply(client, &finished(3));
        assert!(probe.poll(&[node(Role::Prefill)], 8).is_none());
        assert_eq!(probe.health(), unavailable("no decode node is connected"));
        let again = probe.poll(&both(), 9).expect("every node is there").client;
        assert_ne!(again, client);
        assert_eq!(probe.health(), unavailable(NOT_YET));
        assert!(probe.on_reply(again, &finished(3)));
    }

    #[test]
    fn without_its_prefill_node_a_cluster_is_degraded() {
        let (mut probe, client) = sent(true);
        probe.on_reply(client, &finished(3));
        // It was served a moment ago: no prompt is needed to know that it still is.
        assert!(probe.poll(&[node(Role::Decode)], 8).is_none());
        assert_eq!(probe.health(), degraded(NO_PREFILL));
        let again = probe.poll(&both(), 9).expect("every node is there").client;
        assert_eq!(probe.health(), degraded(NOT_YET));
        assert!(probe.on_reply(again, &finished(3)));
        assert_eq!(probe.health(), Health::Ready);
    }

    #[test]
    fn a_decode_node_alone_serves_when_a_prompt_says_so() {
        let alone = [node(Role::Decode)];
        let mut probe = Probe::new(vec![1], true);
        let first = probe.poll(&alone, 7).expect("a decode node is there").client;
        assert!(!probe.on_reply(first, &finished(0)));
        assert_eq!(probe.health(), degraded(NO_PREFILL));
        assert!(probe.poll(&alone, 8).is_none());
        // A prompt that went past the prefill node because that came late says nothing about it.
        let mut probe = Probe::new(vec![1], true);
        let first = probe.poll(&alone, 7).expect("a decode node is there").client;
        assert!(probe.poll(&both(), 8).is_none());
        probe.on_reply(first, &finished(0));
        assert!(probe.poll(&both(), 9).is_some());
    }

    #[test]
    fn a_full_cluster_goes_on_serving() {
        let (mut probe, client) = sent(true);
        probe.on_reply(client, &finished(0));
        let again = probe.poll(&both(), 8).expect("it is not whole").client;
        probe.on_reply(again, &ReplyEvent::Failed(RouterError::Overloaded("full".into())));
        assert_eq!(probe.health(), degraded(NO_TRANSFER));
        let again = probe.poll(&both(), 9).expect("it is not whole").client;
        probe.on_reply(again, &ReplyEvent::Failed(RouterError::Failed("gave up".into())));
        assert_eq!(probe.health(), unavailable("the last golden prompt failed: gave up"));
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
