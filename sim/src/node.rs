//! A node: the machines that its shell would drive, its KV, and what its shell would remember.

use super::kv::{SimKv, VOCAB};
use super::network::Conn;
use super::run::{Event, Life};
use super::scenario::Scenario;
use ridge_decode_node::machine::{DecodeConfig, DecodeNode};
use ridge_kvtransfer::{Receiver, ReceiverConfig, Sender, SenderConfig};
use ridge_prefill_node::machine::{PrefillConfig, PrefillNode};
use ridge_protocol::stats::NodeStats;
use ridge_protocol::wire::NodeHello;
use ridge_protocol::{
    BatchPlan, BlockShape, CacheDtype, Duration, Instant, Machine, ModelIdentity, NodeId, NodeName, Role,
};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

#[allow(clippy::large_enum_variant, reason = "a handful of them")]
pub enum Machines {
    Prefill(PrefillNode),
    Decode(DecodeNode, Receiver),
}

pub struct SimNode {
    /// Which life of it: a restarted node has another one.
    pub life: Life,
    pub name: NodeName,
    /// Where a decode node takes KV.
    pub addr: SocketAddr,
    pub machines: Machines,
    /// A decode node sends when it drains.
    pub sender: Sender,
    pub kv: SimKv,
    /// Blocks in it, per layer.
    blocks: u32,
    /// The pass in the engine.
    pub plan: Option<BatchPlan>,
    pub pass_began: Instant,
    pub alive: bool,
    /// It was asked to stop, and goes when it is drained.
    pub stopping: bool,
    /// Its connection to the router, once it was taken in.
    pub control: Option<NodeId>,
    /// KV connections that it dialed, as its shell knows them.
    pub dialed: BTreeMap<NodeName, Conn>,
    /// KV connections that a decode node accepted, as its shell knows them.
    pub seats: BTreeMap<NodeName, Conn>,
    /// It stands still, and this waits for it.
    pub stalled: bool,
    pub inbox: VecDeque<Event>,
    /// How many times slower its engine is than usual.
    pub slowness: u32,
    pub timer_at: Option<Instant>,
}

impl SimNode {
    pub fn new(life: Life, name: NodeName, role: Role, scenario: &Scenario) -> Self {
        let (max_model_len, block_size) = (scenario.context(life.place), scenario.block_size(life.place));
        let prefill_blocks = scenario.blocks(life.place, scenario.prefill_blocks);
        let decode_blocks = scenario.blocks(life.place, scenario.decode_blocks);
        let report_interval = Duration::from_secs(1);
        let (blocks, machines) = match role {
            Role::Prefill => {
                let node = PrefillNode::new(PrefillConfig {
                    blocks: prefill_blocks,
                    block_size,
                    layers: scenario.layers,
                    vocab: VOCAB,
                    max_model_len,
                    max_batched_tokens: scenario.chunk.max(block_size),
                    max_running: scenario.max_running,
                    max_waiting: scenario.max_waiting,
                    prefix_caching: scenario.prefix_caching,
                    report_interval,
                });
                (prefill_blocks, Machines::Prefill(node))
            }
            _ => {
                let node = DecodeNode::new(DecodeConfig {
                    blocks: decode_blocks,
                    block_size,
                    layers: scenario.layers,
                    vocab: VOCAB,
                    max_model_len,
                    max_num_seqs: scenario.max_num_seqs,
                    max_prefill_tokens: scenario.local_chunk,
                    max_step_stretch: 2,
                    max_waiting: scenario.max_waiting,
                    headroom_blocks: scenario.headroom_blocks,
                    prefix_caching: scenario.prefix_caching,
                    report_interval,
                });
                let receiver = Receiver::new(ReceiverConfig {
                    lease: scenario.lease,
                    patience: scenario.patience,
                    credit_pages: scenario.credit_pages,
                    max_sessions: scenario.max_sessions,
                });
                (decode_blocks, Machines::Decode(node, receiver))
            }
        };
        let sender = Sender::new(SenderConfig {
            lease: scenario.lease,
            patience: scenario.patience,
            max_sessions: scenario.max_sessions,
            max_credit: scenario.credit_pages,
            blocks: BlockShape::new(block_size, CacheDtype::F32).expect("a block holds a token"),
            kv_heads: 1,
            head_dim: 1,
        });
        let lives = if scenario.fixed_addresses { 0 } else { life.count };
        let port = 1000 + 100 * lives as u16 + life.place as u16;
        Self {
            life,
            name,
            addr: ([127, 0, 0, 1], port).into(),
            machines,
            sender,
            kv: SimKv::new(scenario.layers, blocks, block_size),
            blocks,
            plan: None,
            pass_began: Instant(0),
            alive: true,
            stopping: false,
            control: None,
            dialed: BTreeMap::new(),
            seats: BTreeMap::new(),
            stalled: false,
            inbox: VecDeque::new(),
            slowness: 1,
            timer_at: None,
        }
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
            kv_addr: decode.then_some(self.addr),
            identity: ModelIdentity {
                weights: [1; 32],
                config: [2; 32],
                tokenizer: [3; 32],
                layers: scenario.layers,
                kv_heads: 1,
                head_dim: 1,
                block_size: scenario.block_size(self.life.place),
                kv_dtype: CacheDtype::F32,
                kv_layout: String::new(),
                rope: "none".into(),
            },
            max_model_len: scenario.context(self.life.place),
            blocks: self.blocks,
            pid: 0,
        }
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        let others = match &self.machines {
            Machines::Prefill(node) => [node.poll_timeout(), None],
            Machines::Decode(node, receiver) => [node.poll_timeout(), receiver.poll_timeout()],
        };
        others.into_iter().chain([self.sender.poll_timeout()]).flatten().min()
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        match &mut self.machines {
            Machines::Prefill(node) => node.handle_timeout(now),
            Machines::Decode(node, receiver) => {
                node.handle_timeout(now);
                receiver.handle_timeout(now);
            }
        }
        self.sender.handle_timeout(now);
    }

    pub fn check_integrity(&self) {
        match &self.machines {
            Machines::Prefill(node) => node.check_integrity(),
            Machines::Decode(node, receiver) => {
                node.check_integrity();
                receiver.check_integrity();
            }
        }
        self.sender.check_integrity();
    }

    pub fn stats(&self) -> NodeStats {
        let mut stats = match &self.machines {
            Machines::Prefill(node) => node.stats(),
            Machines::Decode(node, _) => node.stats(),
        };
        let transfers = match &self.machines {
            Machines::Prefill(_) => self.sender.stats(),
            Machines::Decode(_, receiver) => self.sender.stats() + receiver.stats(),
        };
        transfers.report(&mut stats);
        stats
    }

    /// Up, taken in by the router, and without anything to do.
    pub fn is_at_rest(&self) -> bool {
        let idle = match &self.machines {
            Machines::Prefill(node) => node.is_idle(),
            Machines::Decode(node, receiver) => node.is_idle() && receiver.sessions() + receiver.open_aborts() == 0,
        };
        idle && self.sender.sessions() + self.sender.open_aborts() == 0
            && self.alive
            && !self.stalled
            && self.control.is_some()
    }

    /// Panics unless every block is free or cached.
    pub fn check_idle(&self) {
        let stats = self.stats();
        let counts = stats.blocks;
        assert_eq!(counts.used + counts.reserved + counts.held, 0, "{} holds blocks: {counts:?}", self.name);
        assert_eq!(stats.orphaned_blocks, 0, "{} lost blocks", self.name);
    }
}
