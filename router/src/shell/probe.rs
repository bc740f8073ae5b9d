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
