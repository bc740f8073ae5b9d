//! The run: events in time order, faults by chance, invariants after every step.

use super::client::{Client, VOCAB};
use super::kv::Page;
use super::node::{Machines, SimNode, kv_addr};
use ridge_decode_node::machine::{DecodeInput, DecodeOutput};
use ridge_kvtransfer::{ReceiverInput, ReceiverOutput, SenderInput, SenderOutput};
use ridge_prefill_node::machine::{PrefillInput, PrefillOutput};
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::{NodeToRouter, ReceiverMsg, RouterToNode, SenderMsg};
use ridge_protocol::{Duration, Instant, Machine, NodeId, NodeName, RequestId, Role, SamplingParams, TokenId};
use ridge_router::machine::{ClientId, Router, RouterConfig, RouterInput, RouterOutput, Submit};
use std::collections::BTreeMap;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Everything random follows from it.
    pub seed: u64,
    /// Prefill nodes.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
    /// Blocks per prefill node.
    pub prefill_blocks: u32,
    /// Blocks per decode node.
    pub decode_blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Layers.
    pub layers: u32,
    /// Prompt tokens per prefill pass.
    pub chunk: u32,
    /// Sequences per decode batch.
    pub max_num_seqs: usize,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Whether prefixes are reused.
    pub prefix_caching: bool,
    /// Clients in all.
    pub clients: usize,
    /// Of 100 clients, how many leave early.
    pub leave_percent: u64,
    /// Nodes that die and come back.
    pub crashes: usize,
    /// Of 1000 pages, how many arrive damaged.
    pub damage_permille: u64,
}

/// What a run came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Clients that got their whole answer.
    pub finished: usize,
    /// Clients that were told of a failure.
    pub failed: usize,
    /// Clients that left.
    pub gone: usize,
    /// Preemptions on decode nodes.
    pub preemptions: u64,
    /// Dispatches after the first.
    pub redispatched: u64,
    /// Tokens computed again.
    pub recomputed: u64,
    /// Prompt tokens found in a cache.
    pub cached: u64,
    /// Hash over every event in order: two runs of one seed agree in it.
    pub trace: u64,
}

#[derive(Debug)]
enum Event {
    Submit,
    Leave(ClientId),
    ToRouter(NodeId, NodeToRouter),
    ToNode(NodeId, RouterToNode),
    ToReceiver { from: NodeId, to: NodeId, message: SenderMsg },
    ToSender { from: NodeId, to: NodeId, message: ReceiverMsg },
    Page { from: NodeId, to: NodeId, request: RequestId, layer: u32, index: u32, page: Page, intact: bool },
    Layer { node: NodeId, step: u64, layer: u32 },
    Step { node: NodeId, step: u64 },
    Crash,
    Restart(NodeName, Role),
    Timer,
}

/// Runs a scenario to its end. Panics when an invariant is broken.
pub fn run(scenario: &Scenario) -> Outcome {
    let mut world = World::new(scenario.clone());
    while let Some(((at, _), event)) = world.events.pop_first() {
        world.now = at;
        assert!(at.0 < 3_600_000_000_000, "the cluster did not come to rest within an hour");
        world.note(&format!("{at:?} {event:?}"));
        world.step(event);
        world.pump();
        world.check();
        if world.is_over() {
            break;
        }
    }
    world.finish()
}

struct World {
    scenario: Scenario,
    now: Instant,
    random: u64,
    events: BTreeMap<(Instant, u64), Event>,
    next_event: u64,
    /// When the last message of a link arrives: streams do not reorder.
    links: BTreeMap<(u32, u32, bool), Instant>,
    router: Router,
    nodes: BTreeMap<NodeId, SimNode>,
    next_node: u32,
    clients: BTreeMap<ClientId, Client>,
    crashes_left: usize,
    timer_at: Option<Instant>,
    outcome: Outcome,
}

const ROUTER: u32 = u32::MAX;

impl World {
    fn new(scenario: Scenario) -> Self {
        let config = RouterConfig {
            placement_deadline: Duration::from_secs(60),
            progress_deadline: Duration::from_secs(60),
            max_attempts: 20,
            ..RouterConfig::default()
        };
        let mut world = Self {
            now: Instant(0),
            random: scenario.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            events: BTreeMap::new(),
            next_event: 0,
            links: BTreeMap::new(),
            router: Router::new(config, 1),
            nodes: BTreeMap::new(),
            next_node: 0,
            clients: BTreeMap::new(),
            crashes_left: scenario.crashes,
            timer_at: None,
            outcome: Outcome::default(),
            scenario,
        };
        for i in 0..world.scenario.prefill {
            world.start(&format!("prefill-{i}"), Role::Prefill);
        }
        for i in 0..world.scenario.decode {
            world.start(&format!("decode-{i}"), Role::Decode);
        }
        for _ in 0..world.scenario.clients {
            let delay = Duration::from_micros(world.pick(3_000_000));
            world.at(delay, Event::Submit);
        }
        for _ in 0..world.scenario.crashes {
            let delay = Duration::from_micros(world.pick(4_000_000));
            world.at(delay, Event::Crash);
        }
        world
    }

    fn pick(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % bound
    }

    fn note(&mut self, line: &str) {
        for byte in line.bytes() {
            self.outcome.trace = (self.outcome.trace ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn at(&mut self, delay: Duration, event: Event) {
        self.next_event += 1;
        self.events.insert((self.now + delay, self.next_event), event);
    }

    /// Delivers over a link that keeps order and delays by chance, now and then for long.
    fn deliver(&mut self, from: u32, to: u32, pages: bool, event: Event) {
        let delay = if self.pick(50) == 0 { self.pick(200_000) } else { 50 + self.pick(2_000) };
        let last = self.links.get(&(from, to, pages)).copied().unwrap_or_default();
        let arrival = (self.now + Duration::from_micros(delay)).max(last + Duration::from_nanos(1));
        self.links.insert((from, to, pages), arrival);
        self.next_event += 1;
        self.events.insert((arrival, self.next_event), event);
    }

    fn start(&mut self, name: &str, role: Role) {
        let id = NodeId(self.next_node);
        self.next_node += 1;
        let node = SimNode::new(id, name, role, &self.scenario);
        let hello = node.hello(&self.scenario);
        self.nodes.insert(id, node);
        self.router.handle(self.now, RouterInput::NodeUp { node: id, hello });
    }

    fn node_named(&self, name: &NodeName) -> Option<NodeId> {
        self.nodes.values().find(|n| n.alive && n.name == *name).map(|n| n.id)
    }

    /// The node that a sender reaches: not a later one of the same name.
    fn node_at(&self, peer: &KvPeer) -> Option<NodeId> {
        self.node_named(&peer.name).filter(|id| kv_addr(*id) == peer.addr)
    }

    fn alive(&mut self, id: NodeId) -> Option<&mut SimNode> {
        self.nodes.get_mut(&id).filter(|n| n.alive)
    }

    fn step(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Submit => self.submit(),
            Event::Leave(client) => {
                let left = self.clients.get_mut(&client).expect("a client that leaves came");
                if !left.is_over() {
                    left.gone = true;
                    self.router.handle(now, RouterInput::ClientGone(client));
                }
            }
            Event::ToRouter(node, message) => {
                if self.alive(node).is_some() {
                    self.router.handle(now, RouterInput::Node { node, message });
                }
            }
            Event::ToNode(id, message) => {
                let Some(node) = self.alive(id) else { return };
                match &mut node.machines {
                    Machines::Prefill(machine, _) => machine.handle(now, PrefillInput::Router(message)),
                    Machines::Decode(machine, _) => machine.handle(now, DecodeInput::Router(message)),
                }
            }
            Event::ToReceiver { from, to, message } => {
                let Some(name) = self.alive(from).map(|n| n.name.clone()) else { return };
                if let Some(SimNode { machines: Machines::Decode(_, receiver), .. }) = self.alive(to) {
                    receiver.handle(now, ReceiverInput::Message { from: name, message });
                }
            }
            Event::ToSender { from, to, message } => {
                let Some(name) = self.alive(from).map(|n| n.name.clone()) else { return };
                if let Some(SimNode { machines: Machines::Prefill(_, sender), .. }) = self.alive(to) {
                    sender.handle(now, SenderInput::Message { from: name, message });
                }
            }
            Event::Page { from, to, request, layer, index, page, intact } => {
                let Some(name) = self.alive(from).map(|n| n.name.clone()) else { return };
                let Some(SimNode { machines: Machines::Decode(_, receiver), kv, .. }) = self.alive(to) else { return };
                let Some(block) = receiver.destination(&name, request, layer, index) else { return };
                kv.land(layer, block, if intact { page } else { vec![0] });
                let landed = ReceiverInput::PageLanded { from: name, request, layer, index, bytes: 1, intact };
                receiver.handle(now, landed);
            }
            Event::Layer { node, step, layer } => {
                let Some(node) = self.alive(node) else { return };
                node.kv.write_layer(node.plan.as_ref().expect("a pass is running"), layer);
                if let Machines::Prefill(machine, _) = &mut node.machines {
                    machine.handle(now, PrefillInput::LayerDone { step, layer });
                }
            }
            Event::Step { node, step } => {
                let layers = self.scenario.layers;
                let Some(node) = self.alive(node) else { return };
                let plan = node.plan.take().expect("a pass is running");
                let outputs = node.kv.sample(&plan, layers);
                let busy = Duration::from_micros(1);
                match &mut node.machines {
                    Machines::Prefill(m, _) => m.handle(now, PrefillInput::StepDone { step, outputs, busy }),
                    Machines::Decode(m, _) => m.handle(now, DecodeInput::StepDone { step, outputs, busy }),
                }
            }
            Event::Crash => self.crash(),
            Event::Restart(name, role) => self.start(&name.0, role),
            Event::Timer => {
                self.timer_at = None;
                self.router.handle_timeout(now);
                for node in self.nodes.values_mut().filter(|n| n.alive) {
                    node.handle_timeout(now);
                }
            }
        }
    }

    fn submit(&mut self) {
        let client = ClientId(self.clients.len() as u64 + 1);
        // A few shared beginnings, so that prefixes are found again.
        let family = self.pick(3) as u32;
        let shared = self.pick(u64::from(self.scenario.max_model_len) / 2) as u32;
        let own = 1 + self.pick(u64::from(self.scenario.max_model_len) / 4) as u32;
        let mut prompt: Vec<TokenId> = (0..shared).map(|i| (i * 7 + family * 1000) % VOCAB).collect();
        for _ in 0..own {
            let token = self.pick(u64::from(VOCAB)) as TokenId;
            prompt.push(token);
        }
        let params = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(1 + self.pick(20) as u32) };
        let salt = self.pick(2);
        let submit = Submit { client, tokens: prompt.clone(), params: params.clone(), salt };
        self.clients.insert(client, Client { prompt, params, got: Vec::new(), end: None, gone: false });
        self.router.handle(self.now, RouterInput::Submit(submit));
        if self.pick(100) < self.scenario.leave_percent {
            let delay = Duration::from_micros(self.pick(300_000));
            self.at(delay, Event::Leave(client));
        }
    }

    /// A node dies: its messages in flight are lost, its peers and the router notice after a while, it comes back.
    fn crash(&mut self) {
        self.crashes_left -= 1;
        let alive: Vec<NodeId> = self.nodes.values().filter(|n| n.alive).map(|n| n.id).collect();
        if alive.is_empty() {
            return;
        }
        let id = alive[self.pick(alive.len() as u64) as usize];
        let node = self.nodes.get_mut(&id).expect("chosen among them");
        node.alive = false;
        let (name, role) = (node.name.clone(), node.role());
        let reason = "crashed".to_string();
        self.router.handle(self.now, RouterInput::NodeLost { node: id, reason: reason.clone() });
        for other in self.nodes.values_mut().filter(|n| n.alive) {
            let (peer, reason) = (name.clone(), reason.clone());
            match &mut other.machines {
                Machines::Prefill(_, sender) => {
                    let peer = KvPeer { name: peer, addr: kv_addr(id) };
                    sender.handle(self.now, SenderInput::PeerLost { peer, reason });
                }
                Machines::Decode(_, receiver) => receiver.handle(self.now, ReceiverInput::PeerLost { peer, reason }),
            }
        }
        let delay = Duration::from_micros(1000 + self.pick(1_000_000));
        self.at(delay, Event::Restart(name, role));
    }

    /// Does what all machines want done, until none wants anything.
    fn pump(&mut self) {
        loop {
            let mut quiet = true;
            while let Some(output) = self.router.poll_output() {
                quiet = false;
                self.on_router(output);
            }
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                quiet &= !self.pump_node(id);
            }
            if quiet {
                break;
            }
        }
        let nodes = self.nodes.values().filter(|n| n.alive).filter_map(SimNode::poll_timeout);
        let next = nodes.chain(self.router.poll_timeout()).min();
        if let Some(next) = next.map(|n| n.max(self.now))
            && self.timer_at.is_none_or(|at| next < at)
        {
            self.timer_at = Some(next);
            self.next_event += 1;
            self.events.insert((next, self.next_event), Event::Timer);
        }
    }

    fn on_router(&mut self, output: RouterOutput) {
        match output {
            RouterOutput::Send { node, message } => self.deliver(ROUTER, node.0, false, Event::ToNode(node, message)),
            RouterOutput::Close { node, reason } => panic!("node {node:?} was turned away: {reason}"),
            RouterOutput::Reply { client, event } => {
                let max = self.scenario.max_model_len as usize;
                self.clients.get_mut(&client).expect("a reply has a client").take(event, max);
            }
            RouterOutput::Drained => {}
        }
    }

    /// Says whether the node wanted anything.
    fn pump_node(&mut self, id: NodeId) -> bool {
        let now = self.now;
        let mut busy = false;
        while let Some(node) = self.nodes.get_mut(&id).filter(|n| n.alive) {
            match &mut node.machines {
                Machines::Prefill(machine, sender) => {
                    if let Some(output) = machine.poll_output() {
                        match output {
                            PrefillOutput::Transfer(command) => sender.handle(now, SenderInput::Command(command)),
                            PrefillOutput::ToRouter(m) => self.deliver(id.0, ROUTER, false, Event::ToRouter(id, m)),
                            PrefillOutput::Run(plan) => self.start_pass(id, plan),
                        }
                    } else if let Some(output) = sender.poll_output() {
                        match output {
                            SenderOutput::Event(event) => machine.handle(now, PrefillInput::Transfer(event)),
                            SenderOutput::Send { to, message } => {
                                if let Some(to) = self.node_at(&to) {
                                    let event = Event::ToReceiver { from: id, to, message };
                                    self.deliver(id.0, to.0, false, event);
                                } else {
                                    self.lost_to_sender(id, to);
                                }
                            }
                            SenderOutput::Ship { to, request, layer, index, block } => {
                                let page = node.kv.read(layer, block);
                                let intact = self.pick(1000) >= self.scenario.damage_permille;
                                if let Some(to) = self.node_at(&to) {
                                    let event = Event::Page { from: id, to, request, layer, index, page, intact };
                                    self.deliver(id.0, to.0, true, event);
                                }
                            }
                        }
                    } else {
                        return busy;
                    }
                }
                Machines::Decode(machine, receiver) => {
                    if let Some(output) = machine.poll_output() {
                        match output {
                            DecodeOutput::Transfer(command) => receiver.handle(now, ReceiverInput::Command(command)),
                            DecodeOutput::ToRouter(m) => self.deliver(id.0, ROUTER, false, Event::ToRouter(id, m)),
                            DecodeOutput::Run(plan) => self.start_pass(id, plan),
                        }
                    } else if let Some(output) = receiver.poll_output() {
                        match output {
                            ReceiverOutput::Event(event) => machine.handle(now, DecodeInput::Transfer(event)),
                            ReceiverOutput::Send { to, message } => {
                                if let Some(to) = self.node_named(&to) {
                                    let event = Event::ToSender { from: id, to, message };
                                    self.deliver(id.0, to.0, false, event);
                                }
                            }
                        }
                    } else {
                        return busy;
                    }
                }
            }
            busy = true;
        }
        busy
    }

    /// Nobody answers under that name.
    fn lost_to_sender(&mut self, id: NodeId, peer: KvPeer) {
        if let Some(SimNode { machines: Machines::Prefill(_, sender), .. }) = self.nodes.get_mut(&id) {
            sender.handle(self.now, SenderInput::PeerLost { peer, reason: "cannot be reached".into() });
        }
    }

    fn start_pass(&mut self, id: NodeId, plan: ridge_protocol::BatchPlan) {
        let step = plan.step;
        let mut delay = 0;
        for layer in 0..self.scenario.layers {
            delay += 1 + self.pick(3_000);
            self.at(Duration::from_micros(delay), Event::Layer { node: id, step, layer });
        }
        delay += 1 + self.pick(500);
        self.at(Duration::from_micros(delay), Event::Step { node: id, step });
        let node = self.nodes.get_mut(&id).expect("it has just spoken");
        assert!(node.plan.replace(plan).is_none(), "two passes at a time");
    }

    fn check(&self) {
        self.router.check_integrity();
        for node in self.nodes.values().filter(|n| n.alive) {
            node.check_integrity();
        }
    }

    /// Everybody is served and the nodes have had time to notice.
    fn is_over(&self) -> bool {
        let served = self.clients.len() == self.scenario.clients && self.clients.values().all(Client::is_over);
        let whole = self.nodes.values().filter(|n| n.alive).count() == self.scenario.prefill + self.scenario.decode;
        let quiet = self.nodes.values().filter(|n| n.alive).all(|n| match &n.machines {
            Machines::Prefill(m, s) => m.is_idle() && s.sessions() == 0,
            Machines::Decode(m, r) => m.is_idle() && r.sessions() == 0,
        });
        served && whole && quiet && self.crashes_left == 0
    }

    fn finish(mut self) -> Outcome {
        assert!(self.is_over(), "nothing is left to happen, but somebody waits");
        for node in self.nodes.values().filter(|n| n.alive) {
            node.check_idle();
            let stats = match &node.machines {
                Machines::Prefill(m, _) => m.stats(),
                Machines::Decode(m, _) => m.stats(),
            };
            self.outcome.preemptions += stats.preemptions;
            self.outcome.recomputed += stats.recomputed_tokens;
            self.outcome.cached += stats.cached_tokens;
        }
        self.outcome.redispatched = self.router.stats().redispatched;
        for client in self.clients.values() {
            match &client.end {
                _ if client.gone => self.outcome.gone += 1,
                Some(Ok(())) => self.outcome.finished += 1,
                Some(Err(_)) => self.outcome.failed += 1,
                None => unreachable!("everybody is served"),
            }
        }
        self.outcome
    }
}
