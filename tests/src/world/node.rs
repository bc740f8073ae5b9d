//! A node: the machines that its shell would drive, and its KV.

use super::kv::SimKv;
use super::run::Scenario;
use ridge_decode_node::machine::{DecodeConfig, DecodeNode};
use ridge_kvtransfer::{Receiver, ReceiverConfig, Sender, SenderConfig};
use ridge_prefill_node::machine::{PrefillConfig, PrefillNode};
use ridge_protocol::wire::NodeHello;
use ridge_protocol::{BatchPlan, Duration, Instant, Machine, ModelIdentity, NodeId, NodeName, Role};
use std::net::SocketAddr;

#[allow(clippy::large_enum_variant, reason = "a handful of them")]
pub enum Machines {
    Prefill(PrefillNode, Sender),
    Decode(DecodeNode, Receiver),
}

/// Where a decode node takes KV. A restarted node has another address.
pub fn kv_addr(id: NodeId) -> SocketAddr {
    ([127, 0, 0, 1], 1000 + id.0 as u16).into()
}

pub struct SimNode {
    pub id: NodeId,
    pub name: NodeName,
    pub machines: Machines,
    pub kv: SimKv,
    /// The pass in the engine.
    pub plan: Option<BatchPlan>,
    pub alive: bool,
}

impl SimNode {
    pub fn new(id: NodeId, name: &str, role: Role, scenario: &Scenario) -> Self {
        let seconds = Duration::from_secs;
        let machines = match role {
            Role::Prefill => Machines::Prefill(
                PrefillNode::new(PrefillConfig {
                    blocks: scenario.prefill_blocks,
                    block_size: scenario.block_size,
                    layers: scenario.layers,
                    vocab: super::client::VOCAB,
                    max_model_len: scenario.max_model_len,
                    max_batched_tokens: scenario.chunk,
                    max_running: 4,
                    max_waiting: 1000,
                    prefix_caching: scenario.prefix_caching,
                    report_interval: seconds(1),
                }),
                Sender::new(SenderConfig {
                    offer_deadline: seconds(5),
                    progress_deadline: seconds(5),
                    page_bytes: 1,
                    ..SenderConfig::default()
                }),
            ),
            _ => Machines::Decode(
                DecodeNode::new(DecodeConfig {
                    blocks: scenario.decode_blocks,
                    block_size: scenario.block_size,
                    layers: scenario.layers,
                    vocab: super::client::VOCAB,
                    max_model_len: scenario.max_model_len,
                    max_num_seqs: scenario.max_num_seqs,
                    max_prefill_tokens: 7,
                    max_waiting: 1000,
                    headroom_blocks: 1,
                    prefix_caching: scenario.prefix_caching,
                    report_interval: seconds(1),
                }),
                Receiver::new(ReceiverConfig {
                    expect_deadline: seconds(5),
                    offer_deadline: seconds(5),
                    progress_deadline: seconds(5),
                    credit_pages: 3,
                    max_sessions: 1000,
                }),
            ),
        };
        let kv = SimKv::new(scenario.block_size);
        Self { id, name: NodeName(name.into()), machines, kv, plan: None, alive: true }
    }

    pub fn role(&self) -> Role {
        match self.machines {
            Machines::Prefill(..) => Role::Prefill,
            Machines::Decode(..) => Role::Decode,
        }
    }

    pub fn hello(&self, scenario: &Scenario) -> NodeHello {
        let decode = self.role() == Role::Decode;
        NodeHello {
            name: self.name.clone(),
            role: self.role(),
            kv_addr: decode.then(|| kv_addr(self.id)),
            identity: ModelIdentity {
                weights: [1; 32],
                config: [2; 32],
                tokenizer: [3; 32],
                layers: scenario.layers,
                kv_heads: 1,
                head_dim: 1,
                block_size: scenario.block_size,
                kv_dtype: "f32".into(),
                kv_layout: String::new(),
                rope: "none".into(),
            },
            max_model_len: scenario.max_model_len,
            blocks: if decode { scenario.decode_blocks } else { scenario.prefill_blocks },
            pid: 0,
        }
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        let both = match &self.machines {
            Machines::Prefill(node, sender) => [node.poll_timeout(), sender.poll_timeout()],
            Machines::Decode(node, receiver) => [node.poll_timeout(), receiver.poll_timeout()],
        };
        both.into_iter().flatten().min()
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        match &mut self.machines {
            Machines::Prefill(node, sender) => {
                node.handle_timeout(now);
                sender.handle_timeout(now);
            }
            Machines::Decode(node, receiver) => {
                node.handle_timeout(now);
                receiver.handle_timeout(now);
            }
        }
    }

    pub fn check_integrity(&self) {
        match &self.machines {
            Machines::Prefill(node, sender) => {
                node.check_integrity();
                sender.check_integrity();
            }
            Machines::Decode(node, receiver) => {
                node.check_integrity();
                receiver.check_integrity();
            }
        }
    }

    /// Panics unless every block is free or cached and no request is left.
    pub fn check_idle(&self) {
        let (idle, stats) = match &self.machines {
            Machines::Prefill(node, _) => (node.is_idle(), node.stats()),
            Machines::Decode(node, _) => (node.is_idle(), node.stats()),
        };
        let counts = stats.blocks;
        assert!(idle, "{} is not idle at the end: {stats:?}", self.name);
        assert_eq!(counts.used + counts.reserved + counts.held, 0, "{} holds blocks: {counts:?}", self.name);
        assert_eq!(stats.orphaned_blocks, 0);
    }
}
