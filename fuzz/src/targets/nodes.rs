//! The machines of both nodes, joined as their shells join them, with an honest engine and hostile peers.
//!
//! After everything that a peer can say the invariants hold, and when all peers are gone every block is free or cached.

use super::peers;
use crate::draw::Draw;
use ridge_decode_node::machine::{DecodeConfig, DecodeInput, DecodeNode, DecodeOutput};
use ridge_kvtransfer::{
    Receiver, ReceiverConfig, ReceiverInput, ReceiverOutput, Sender, SenderConfig, SenderInput, SenderOutput,
};
use ridge_prefill_node::machine::{PrefillConfig, PrefillInput, PrefillNode, PrefillOutput};
use ridge_protocol::stats::NodeStats;
use ridge_protocol::transfer::{ReceiveCommand, ReceiveJob};
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{
    BatchPlan, BlockShape, CacheDtype, Duration, Instant, Machine, NoToken, NodeName, RequestId, SampleSpec, TokenOut,
};
use std::collections::BTreeMap;

const BLOCKS: u32 = 24;
pub(super) const BLOCK_SIZE: u32 = 4;
const LAYERS: u32 = 2;
const MAX_MODEL_LEN: u32 = 64;
/// A pass takes this long, and whoever waits this often gives up.
const PASS: Duration = Duration::from_millis(1);
const DEADLINE: Duration = Duration::from_millis(40);
/// Passes after which a node without peers must be at rest.
const SETTLE: usize = 10_000;

/// What the engine answers: a token for everybody who asked for one. A grammar ends some answers, and cannot go on with
/// others.
fn compute(plan: &BatchPlan) -> Vec<(RequestId, Result<TokenOut, NoToken>)> {
    let token = |request: RequestId, sample: &SampleSpec| {
        let constrained = sample.params.grammar.is_some();
        if constrained && sample.position % 5 == 4 {
            return Err(NoToken("the grammar allows nothing".into()));
        }
        Ok(TokenOut {
            token: (request.0 % u64::from(peers::VOCAB)) as u32,
            logprob: None,
            top: Vec::new(),
            ends: constrained && sample.position % 3 == 2,
        })
    };
    let sampling = plan.items.iter().filter_map(|item| Some((item.request, item.sample.as_ref()?)));
    sampling.map(|(request, sample)| (request, token(request, sample))).collect()
}

fn assert_at_rest(stats: &NodeStats) {
    let counts = stats.blocks;
    assert_eq!(counts.used + counts.reserved + counts.held, 0, "an idle node holds blocks: {counts:?}");
    assert_eq!(stats.orphaned_blocks, 0, "blocks were lost");
}

fn sender() -> Sender {
    let (lease, patience) = (DEADLINE, 4 * DEADLINE);
    let blocks = BlockShape::new(BLOCK_SIZE, CacheDtype::F32).expect("a block holds a token");
    Sender::new(SenderConfig { lease, patience, max_sessions: 4, max_credit: 16, blocks, kv_heads: 1, head_dim: 2 })
}

struct Decode {
    now: Instant,
    machine: DecodeNode,
    receiver: Receiver,
    /// By which sequences leave when the node drains.
    sender: Sender,
    plan: Option<BatchPlan>,
    /// What the receiver was told to expect, and how far an honest prefill node has come with it.
    expected: BTreeMap<RequestId, Incoming>,
}

/// A hand-off as an honest prefill node sees it. Random messages alone would never complete one.
struct Incoming {
    job: ReceiveJob,
    offered: bool,
    /// The first block that was asked for.
    granted: Option<u32>,
    /// Pages sent, layer by layer.
    sent: u32,
    finished: bool,
}

impl Decode {
    fn tell(&mut self, input: DecodeInput) {
        self.machine.handle(self.now, input);
        self.pump();
    }

    fn hear(&mut self, input: ReceiverInput) {
        self.receiver.handle(self.now, input);
        self.pump();
    }

    fn pump(&mut self) {
        loop {
            if let Some(output) = self.machine.poll_output() {
                match output {
                    DecodeOutput::Run(plan) => assert!(self.plan.replace(plan).is_none(), "two passes at once"),
                    DecodeOutput::Transfer(command) => {
                        if let ReceiveCommand::Expect(job) = &command {
                            let job = job.clone();
                            let fresh = Incoming { job, offered: false, granted: None, sent: 0, finished: false };
                            self.expected.insert(fresh.job.request, fresh);
                        }
                        self.receiver.handle(self.now, ReceiverInput::Command(command));
                    }
                    DecodeOutput::Send(command) => self.sender.handle(self.now, SenderInput::Command(command)),
                    DecodeOutput::ToRouter(_) => {}
                }
            } else if let Some(output) = self.receiver.poll_output() {
                match output {
                    ReceiverOutput::Event(event) => self.machine.handle(self.now, DecodeInput::Transfer(event)),
                    ReceiverOutput::Send { message: ReceiverMsg::Grant { request, first_block, .. }, .. } => {
                        if let Some(incoming) = self.expected.get_mut(&request) {
                            incoming.granted = Some(first_block);
                        }
                    }
                    ReceiverOutput::Send { .. } => {}
                }
            } else if let Some(output) = self.sender.poll_output() {
                if let SenderOutput::Event(event) = output {
                    self.machine.handle(self.now, DecodeInput::Sent(event));
                }
            } else {
                break;
            }
        }
        self.machine.check_integrity();
        self.receiver.check_integrity();
        self.sender.check_integrity();
    }

    fn pass(&mut self) {
        self.now = self.now + PASS;
        if let Some(plan) = self.plan.take() {
            let outputs = compute(&plan);
            self.tell(DecodeInput::StepDone { step: plan.step, outputs, busy: PASS });
        }
        self.machine.handle_timeout(self.now);
        self.receiver.handle_timeout(self.now);
        self.sender.handle_timeout(self.now);
        self.pump();
    }

    /// What an honest prefill node says next about one of the transfers.
    fn honest(&mut self, draw: &mut Draw<'_>) {
        let count = self.expected.len().clamp(1, 256) as u32;
        let at = draw.below(count) as usize;
        let Some((&request, incoming)) = self.expected.iter_mut().nth(at) else { return };
        let job = &incoming.job;
        let from = job.from.clone();
        let message = match incoming.granted {
            None if incoming.offered => return,
            None => {
                incoming.offered = true;
                SenderMsg::Offer { request, tokens: job.tokens, hashes: job.hashes.clone() }
            }
            Some(first) => {
                let blocks = job.blocks.len() as u32 - first;
                if incoming.sent < LAYERS * blocks {
                    let (layer, index) = (incoming.sent / blocks, first + incoming.sent % blocks);
                    incoming.sent += 1;
                    let intact = !draw.one_in(64);
                    let landed = ReceiverInput::PageLanded { from, request, layer, index, bytes: 64, intact };
                    return self.hear(landed);
                }
                if incoming.finished {
                    return;
                }
                incoming.finished = true;
                SenderMsg::Finish { request, pages: incoming.sent.into(), first: peers::token_out(draw) }
            }
        };
        self.hear(ReceiverInput::Message { from, message });
    }

    /// As the shell lands a page: only where the receiver wants it.
    fn page(&mut self, draw: &mut Draw<'_>) {
        let (from, request) = (peers::peer(draw), peers::request(draw));
        let coordinate = |draw: &mut Draw<'_>, usual| if draw.byte() == 0xff { u32::MAX } else { draw.below(usual) };
        let (layer, index) = (coordinate(draw, LAYERS + 1), coordinate(draw, 10));
        if let Some(block) = self.receiver.destination(&from, request, layer, index) {
            assert!(layer < LAYERS && block.0 < BLOCKS, "a page was to land at layer {layer}, block {block:?}");
        }
        let intact = !draw.one_in(16);
        self.hear(ReceiverInput::PageLanded { from, request, layer, index, bytes: 64, intact });
    }
}

pub(super) fn decode(bytes: &[u8]) {
    run_decode(bytes);
}

/// Runs the program and says what happened in it.
fn run_decode(bytes: &[u8]) -> NodeStats {
    let mut draw = Draw::new(bytes);
    let mut node = Decode {
        now: Instant(0),
        machine: DecodeNode::new(DecodeConfig {
            blocks: BLOCKS,
            block_size: BLOCK_SIZE,
            layers: LAYERS,
            vocab: peers::VOCAB,
            max_model_len: MAX_MODEL_LEN,
            max_num_seqs: 3,
            max_prefill_tokens: 8,
            max_waiting: 4,
            report_interval: DEADLINE,
            ..DecodeConfig::default()
        }),
        receiver: Receiver::new(ReceiverConfig {
            lease: DEADLINE,
            patience: 4 * DEADLINE,
            credit_pages: 4,
            max_sessions: 4,
        }),
        sender: sender(),
        plan: None,
        expected: BTreeMap::new(),
    };
    node.tell(DecodeInput::RouterUp);
    while !draw.is_over() {
        match draw.below(16) {
            0..=3 => {
                if let Some(message) = peers::router_to_node(&mut draw) {
                    node.tell(DecodeInput::Router(message));
                }
            }
            4 => {
                let from = peers::peer(&mut draw);
                let known = |request| {
                    let incoming = node.expected.get(&request)?;
                    Some((incoming.job.tokens, incoming.job.hashes.clone()))
                };
                if let Some(message) = peers::sender(&mut draw, known) {
                    node.hear(ReceiverInput::Message { from, message });
                }
            }
            6 => node.page(&mut draw),
            5 => {
                let from = peers::peer(&mut draw);
                if let Some(message) = peers::receiver(&mut draw) {
                    node.sender.handle(node.now, SenderInput::Message { from, message });
                    node.pump();
                }
            }
            7..=10 => (0..draw.below(32)).for_each(|_| node.honest(&mut draw)),
            11..=13 => node.pass(),
            14 => node.now = node.now + PASS * draw.below(32),
            _ => match draw.below(16) {
                0 => node.tell(DecodeInput::RouterLost),
                1 => node.tell(DecodeInput::RouterUp),
                2 => node.tell(DecodeInput::Shutdown),
                _ => node.hear(ReceiverInput::PeerLost { peer: peers::peer(&mut draw), reason: "gone".into() }),
            },
        }
    }
    node.tell(DecodeInput::RouterLost);
    let rest = |node: &Decode| node.machine.is_idle() && node.receiver.sessions() + node.sender.sessions() == 0;
    for _ in 0..SETTLE {
        if rest(&node) {
            break;
        }
        node.pass();
    }
    assert!(rest(&node), "without peers the node does not come to rest");
    let mut stats = node.machine.stats();
    assert_at_rest(&stats);
    node.receiver.stats().report(&mut stats);
    stats
}

struct Prefill {
    now: Instant,
    machine: PrefillNode,
    sender: Sender,
    plan: Option<BatchPlan>,
    /// Offers that were made, and how far an honest decode node has come with them.
    offered: BTreeMap<RequestId, Outgoing>,
}

/// A hand-off as an honest decode node sees it.
struct Outgoing {
    to: NodeName,
    granted: bool,
    /// Pages that came and were not yet given credit for.
    owed: u32,
    finished: bool,
}

impl Prefill {
    fn tell(&mut self, input: PrefillInput) {
        self.machine.handle(self.now, input);
        self.pump();
    }

    fn hear(&mut self, input: SenderInput) {
        self.sender.handle(self.now, input);
        self.pump();
    }

    fn pump(&mut self) {
        loop {
            if let Some(output) = self.machine.poll_output() {
                match output {
                    PrefillOutput::Run(plan) => assert!(self.plan.replace(plan).is_none(), "two passes at once"),
                    PrefillOutput::Transfer(command) => self.sender.handle(self.now, SenderInput::Command(command)),
                    PrefillOutput::ToRouter(_) => {}
                }
            } else if let Some(output) = self.sender.poll_output() {
                match output {
                    SenderOutput::Event(event) => self.machine.handle(self.now, PrefillInput::Transfer(event)),
                    SenderOutput::Ship { request, layer, source, .. } => {
                        assert!(layer < LAYERS && source.tokens > 0, "{source:?} of layer {layer} was to be shipped");
                        assert!(source.blocks.iter().all(|block| block.0 < BLOCKS), "{source:?} was to be shipped");
                        self.offered.get_mut(&request).expect("shipped after its offer").owed += 1;
                    }
                    SenderOutput::Send { to, message: SenderMsg::Offer { request, .. } } => {
                        let fresh = Outgoing { to: to.name, granted: false, owed: 0, finished: false };
                        self.offered.insert(request, fresh);
                    }
                    SenderOutput::Send { message: SenderMsg::Finish { request, .. }, .. } => {
                        self.offered.get_mut(&request).expect("finished after its offer").finished = true;
                    }
                    SenderOutput::Send { .. } | SenderOutput::Answer { .. } => {}
                }
            } else {
                break;
            }
        }
        self.machine.check_integrity();
        self.sender.check_integrity();
    }

    /// What an honest decode node says next about one of the transfers.
    fn honest(&mut self, draw: &mut Draw<'_>) {
        let count = self.offered.len().clamp(1, 256) as u32;
        let at = draw.below(count) as usize;
        let Some((&request, outgoing)) = self.offered.iter_mut().nth(at) else { return };
        let from = outgoing.to.clone();
        let message = if !outgoing.granted {
            outgoing.granted = true;
            ReceiverMsg::Grant { request, first_block: 0, credit: 8 }
        } else if outgoing.finished {
            ReceiverMsg::Commit { request }
        } else if outgoing.owed > 0 {
            ReceiverMsg::Credit { request, pages: std::mem::take(&mut outgoing.owed) }
        } else {
            return;
        };
        self.hear(SenderInput::Message { from, message });
    }

    fn pass(&mut self) {
        self.now = self.now + PASS;
        if let Some(plan) = self.plan.take() {
            for layer in 0..LAYERS {
                self.tell(PrefillInput::LayerDone { step: plan.step, layer });
            }
            let outputs = compute(&plan);
            self.tell(PrefillInput::StepDone { step: plan.step, outputs, busy: PASS });
        }
        self.machine.handle_timeout(self.now);
        self.sender.handle_timeout(self.now);
        self.pump();
    }
}

pub(super) fn prefill(bytes: &[u8]) {
    run_prefill(bytes);
}

/// Runs the program and says what happened in it.
fn run_prefill(bytes: &[u8]) -> NodeStats {
    let mut draw = Draw::new(bytes);
    let mut node = Prefill {
        now: Instant(0),
        machine: PrefillNode::new(PrefillConfig {
            blocks: BLOCKS,
            block_size: BLOCK_SIZE,
            layers: LAYERS,
            vocab: peers::VOCAB,
            max_model_len: MAX_MODEL_LEN,
            max_batched_tokens: 8,
            max_running: 2,
            max_waiting: 4,
            report_interval: DEADLINE,
            ..PrefillConfig::default()
        }),
        sender: sender(),
        plan: None,
        offered: BTreeMap::new(),
    };
    node.tell(PrefillInput::RouterUp);
    while !draw.is_over() {
        match draw.below(16) {
            0..=4 => {
                if let Some(message) = peers::router_to_node(&mut draw) {
                    node.tell(PrefillInput::Router(message));
                }
            }
            5 | 6 => {
                let from = peers::peer(&mut draw);
                if let Some(message) = peers::receiver(&mut draw) {
                    node.hear(SenderInput::Message { from, message });
                }
            }
            7..=9 => (0..draw.below(8)).for_each(|_| node.honest(&mut draw)),
            10..=13 => node.pass(),
            14 => node.now = node.now + PASS * draw.below(32),
            _ => match draw.below(16) {
                0 => node.tell(PrefillInput::RouterLost),
                1 => node.tell(PrefillInput::RouterUp),
                2 => node.tell(PrefillInput::Shutdown),
                3 | 4 => node.hear(SenderInput::PeerUp(peers::peer(&mut draw))),
                _ => {
                    let peer = peers::kv_peer(&mut draw);
                    node.hear(SenderInput::PeerLost { peer, reason: "gone".into() });
                }
            },
        }
    }
    node.tell(PrefillInput::RouterLost);
    let rest = |node: &Prefill| node.machine.is_idle() && node.sender.sessions() == 0;
    for _ in 0..SETTLE {
        if rest(&node) {
            break;
        }
        node.pass();
    }
    assert!(rest(&node), "without peers the node does not come to rest");
    let mut stats = node.machine.stats();
    assert_at_rest(&stats);
    node.sender.stats().report(&mut stats);
    stats
}

/// Programs of some length; what they spell is as good as random.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut random = crate::random::Random::new(1);
    [64, 256, 1024, 4096].map(|len| (0..len).map(|_| random.word() as u8).collect()).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutate::{Mutator, Shape};

    /// What happened in some programs, one after the other.
    fn all(run: fn(&[u8]) -> NodeStats) -> Vec<NodeStats> {
        let mut mutator = Mutator::new(1, seeds(), Shape::Bytes);
        (0..500).map(|_| run(&mutator.next_input())).collect()
    }

    fn some(stats: &[NodeStats], what: &str, of: fn(&NodeStats) -> u64) {
        let sum: u64 = stats.iter().map(of).sum();
        assert!(sum > 0, "no program came to {what}");
    }

    #[test]
    fn programs_reach_every_end_of_a_hand_off() {
        for (name, stats) in [("decode", all(run_decode)), ("prefill", all(run_prefill))] {
            some(&stats, &format!("{name}: a commit"), |s| s.transfers_committed);
            some(&stats, &format!("{name}: an abort"), |s| s.transfers_aborted);
            some(&stats, &format!("{name}: a page"), |s| s.transfer_pages);
            some(&stats, &format!("{name}: a token"), |s| s.generated_tokens);
            some(&stats, &format!("{name}: a cached prefix"), |s| s.cached_tokens);
        }
        let stats = all(run_decode);
        some(&stats, "a damaged page", |s| s.digest_failures);
        some(&stats, "a preemption", |s| s.preemptions);
        some(&stats, "a prompt computed again", |s| s.recomputed_tokens);
    }
}
