//! The run: events in time order, invariants after every step.

use super::chaos::Fault;
use super::client::Client;
use super::kv::{VOCAB, oracle};
use super::network::{Conn, End, KvItem, Network, PageFrame};
use super::node::{Machines, SimNode};
use super::observer::Handoffs;
use super::random::Random;
use super::scenario::{Sabotage, Scenario};
use super::trace::Trace;
use ridge_decode_node::machine::{DecodeInput, DecodeOutput};
use ridge_kvtransfer::{ReceiverInput, ReceiverOutput, SenderInput, SenderOutput};
use ridge_prefill_node::machine::{PrefillInput, PrefillOutput};
use ridge_protocol::transfer::SendCommand;
use ridge_protocol::wire::{NodeToRouter, ReceiverMsg, RouterToNode, SenderMsg};
use ridge_protocol::{
    BatchPlan, Duration, Grammar, GrammarKind, Instant, Machine, NodeId, NodeName, RequestId, Role, SamplingParams,
    TokenId,
};
use ridge_router::machine::{
    ClientId, ReplyEvent, Router, RouterConfig, RouterError, RouterInput, RouterOutput, Submit,
};
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How long a cluster may take to come to rest once everybody has come and every fault is over and noticed: the work
/// of a burst on slow machines with few blocks.
const REST: Duration = Duration::from_secs(30);

/// What a run came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Clients that got their whole answer.
    pub finished: u64,
    /// Clients that were told of a failure.
    pub failed: u64,
    /// Clients that left.
    pub gone: u64,
    /// Preemptions on decode nodes.
    pub preemptions: u64,
    /// Dispatches after the first.
    pub redispatched: u64,
    /// Sequences that went from one decode node to another with their KV, as the last router counts them.
    pub moved: u64,
    /// Pages that were made from blocks of another size.
    pub converted: u64,
    /// Prompts that the last router left to a decode node although there was a prefill node.
    pub local_prefills: u64,
    /// Tokens computed again.
    pub recomputed: u64,
    /// Prompt tokens found in a cache.
    pub cached: u64,
    /// Hand-offs that were committed, on the senders' side.
    pub committed: u64,
    /// Hand-offs that were aborted, on the senders' side.
    pub aborted: u64,
    /// Events.
    pub events: u64,
    /// Faults, and what else is worth counting, that really happened.
    pub happened: BTreeMap<&'static str, u64>,
    /// From the end of the last fault, or the last client's arrival, until everything was at rest.
    pub settled_in: Duration,
    /// Hash over every event in order: two runs of one seed agree in it.
    pub trace: u64,
}

/// A run that broke an invariant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What was simulated.
    pub seed: u64,
    /// The invariant, in the words of its assertion.
    pub invariant: String,
    /// The last events before, or all of them.
    pub lines: Vec<String>,
}

/// One life of one node's process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Life {
    /// Which node: prefill nodes first.
    pub place: usize,
    /// How often it has died.
    pub count: u64,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}.{}", self.place, self.count)
    }
}

/// What can happen next.
#[derive(Debug)]
pub enum Event {
    Submit,
    Leave(ClientId),
    Dial(Life),
    Hello(NodeId),
    ControlTimeout(NodeId),
    ToRouter(NodeId, NodeToRouter),
    ToNode(NodeId, RouterToNode),
    RouterNotices(NodeId),
    NodeNotices(NodeId),
    KvArrives(Conn),
    KvWelcomed(Conn),
    KvTimeout(Conn),
    ToReceiver(Conn, SenderMsg),
    ToSender(Conn, ReceiverMsg),
    Page(Conn, Box<PageFrame>),
    SenderNotices(Conn),
    ReceiverNotices(Conn),
    Layer { life: Life, step: u64, layer: u32 },
    Step { life: Life, step: u64 },
    Fault(Fault),
    Silent(Life),
    CutBreaks(End, End),
    Resume(Life),
    Faster(Life),
    Left(Life),
    Restart(usize),
    RouterTimer(Instant),
    Timer(Life, Instant),
}

/// Whose event it is.
enum Target {
    Node(usize),
    Router,
    World,
    /// It is about something that is over.
    Nobody,
}

/// Runs a scenario to its end. Panics when an invariant is broken.
pub fn run(scenario: &Scenario) -> Outcome {
    let mut world = World::new(scenario.clone(), false);
    world.run();
    world.outcome()
}

/// Runs a scenario to its end or to the first broken invariant. The lines are the whole trace if it is wanted, and the
/// last events of a failure otherwise.
pub fn try_run(scenario: &Scenario, whole_trace: bool) -> Result<(Outcome, Vec<String>), Failure> {
    let mut world = World::new(scenario.clone(), whole_trace);
    match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(()) => {
            let outcome = world.outcome();
            Ok((outcome, if whole_trace { world.trace.into_lines() } else { Vec::new() }))
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(Failure {
                seed: scenario.seed,
                invariant: text.unwrap_or_else(|| "a panic without words".to_owned()),
                lines: world.trace.into_lines(),
            })
        }
    }
}

/// A router without nodes. The numbers of its requests are nobody else's.
fn new_router(scenario: &Scenario, life: u64) -> Router {
    let config = RouterConfig {
        max_in_flight: scenario.max_in_flight,
        placement_deadline: scenario.placement_deadline,
        progress_deadline: scenario.progress_deadline,
        max_attempts: scenario.max_attempts,
        ..RouterConfig::default()
    };
    Router::new(config, 1 + (life << 20))
}

/// The whole simulated cluster.
pub struct World {
    pub scenario: Scenario,
    pub now: Instant,
    pub random: Random,
    events: BTreeMap<(Instant, u64), Event>,
    next_event: u64,
    pub network: Network,
    pub router: Router,
    router_lives: u64,
    router_timer_at: Option<Instant>,
    pub nodes: Vec<SimNode>,
    pub next_node: u32,
    clients: BTreeMap<ClientId, Client>,
    /// Clients that wait for an answer, those that have not come yet included.
    open_clients: usize,
    last_arrival: Instant,
    /// Whose each request is.
    salts: BTreeMap<RequestId, u64>,
    pub handoffs: Handoffs,
    pub faults_left: u64,
    /// Until then faults may still be felt.
    pub disturbed_until: Instant,
    pub happened: BTreeMap<&'static str, u64>,
    trace: Trace,
}

impl World {
    fn new(scenario: Scenario, whole_trace: bool) -> Self {
        let named = |role: Role, at: usize| (NodeName(format!("{role}-{at}")), role);
        let prefill = (0..scenario.prefill).map(|at| named(Role::Prefill, at));
        let nodes = prefill.chain((0..scenario.decode).map(|at| named(Role::Decode, at))).enumerate();
        let nodes: Vec<SimNode> =
            nodes.map(|(place, (name, role))| SimNode::new(Life { place, count: 0 }, name, role, &scenario)).collect();
        let mut world = Self {
            now: Instant(0),
            random: Random::new(scenario.seed, 1),
            events: BTreeMap::new(),
            next_event: 0,
            network: Network::default(),
            router: new_router(&scenario, 0),
            router_lives: 0,
            router_timer_at: None,
            nodes,
            next_node: 0,
            clients: BTreeMap::new(),
            open_clients: scenario.clients,
            last_arrival: Instant(0),
            salts: BTreeMap::new(),
            handoffs: Handoffs::default(),
            faults_left: 0,
            disturbed_until: Instant(0),
            happened: BTreeMap::new(),
            trace: Trace::new(whole_trace),
            scenario,
        };
        for place in 0..world.nodes.len() {
            world.dial_router(world.nodes[place].life);
        }
        let arrivals = world.scenario.arrivals.as_micros() as u64;
        for _ in 0..world.scenario.clients {
            let at = world.now + Duration::from_micros(world.random.pick(arrivals));
            world.last_arrival = world.last_arrival.max(at);
            world.at(at, Event::Submit);
        }
        world.plan_faults();
        world
    }

    pub fn at(&mut self, at: Instant, event: Event) {
        self.next_event += 1;
        self.events.insert((at, self.next_event), event);
    }

    pub fn place_named(&self, name: &NodeName) -> usize {
        self.nodes.iter().position(|node| node.name == *name).expect("names are the scenario's")
    }

    /// When everything must be at rest. Deadlines of minutes are for peers that are alive and busy: what a fault broke
    /// must be noticed by its connection, so they do not count here.
    fn rest_by(&self) -> Instant {
        self.last_arrival.max(self.disturbed_until) + REST
    }

    fn run(&mut self) {
        while !self.is_over() {
            let Some(((at, _), event)) = self.events.pop_first() else {
                panic!("nothing is left to happen, but: {}", self.unrest());
            };
            self.now = at;
            assert!(at <= self.rest_by(), "the cluster did not come to rest: {}", self.unrest());
            self.step(event);
        }
        self.check_rest();
    }

    fn step(&mut self, event: Event) {
        match self.target(&event) {
            Target::Nobody => {}
            Target::World => {
                self.trace.note(self.now, event.is_routine(), &event);
                self.on_world(event);
                self.settle_router();
            }
            Target::Router => {
                self.trace.note(self.now, event.is_routine(), &event);
                self.on_router(event);
                self.settle_router();
            }
            Target::Node(place) if self.nodes[place].stalled => self.nodes[place].inbox.push_back(event),
            Target::Node(place) => {
                self.trace.note(self.now, event.is_routine(), &event);
                self.on_node(event);
                self.settle_node(place);
            }
        }
    }

    fn target(&self, event: &Event) -> Target {
        let living = |life: &Life| {
            let node = &self.nodes[life.place];
            if node.alive && node.life == *life { Target::Node(life.place) } else { Target::Nobody }
        };
        let control = |conn: &NodeId| &self.network.control[conn];
        let kv = |conn: &Conn| &self.network.kv[conn];
        match event {
            Event::Submit | Event::Leave(_) | Event::Fault(_) | Event::Restart(_) | Event::CutBreaks(..) => {
                Target::World
            }
            Event::Silent(life) | Event::Resume(life) | Event::Faster(life) | Event::Left(life) => match living(life) {
                Target::Node(_) => Target::World,
                _ => Target::Nobody,
            },
            Event::Hello(conn) | Event::ToRouter(conn, _) if control(conn).broken => Target::Nobody,
            Event::Hello(_) | Event::ToRouter(..) | Event::RouterNotices(_) => Target::Router,
            Event::RouterTimer(at) if self.router_timer_at == Some(*at) => Target::Router,
            Event::RouterTimer(_) => Target::Nobody,
            Event::ToNode(conn, _) | Event::ControlTimeout(conn) if control(conn).broken => Target::Nobody,
            Event::ToNode(conn, _) | Event::ControlTimeout(conn) | Event::NodeNotices(conn) => {
                living(&control(conn).life)
            }
            Event::Dial(life) | Event::Layer { life, .. } | Event::Step { life, .. } => living(life),
            Event::Timer(life, at) if self.nodes[life.place].timer_at == Some(*at) => living(life),
            Event::Timer(..) => Target::Nobody,
            Event::KvArrives(conn)
            | Event::KvWelcomed(conn)
            | Event::KvTimeout(conn)
            | Event::ToReceiver(conn, _)
            | Event::ToSender(conn, _)
            | Event::Page(conn, _)
                if kv(conn).broken =>
            {
                Target::Nobody
            }
            // It may find nobody there.
            Event::KvArrives(conn) => Target::Node(self.place_named(&kv(conn).to.name)),
            Event::KvWelcomed(conn)
            | Event::KvTimeout(conn)
            | Event::ToSender(conn, _)
            | Event::SenderNotices(conn) => living(&kv(conn).from),
            Event::ToReceiver(conn, _) | Event::Page(conn, _) | Event::ReceiverNotices(conn) => {
                kv(conn).seated.as_ref().map_or(Target::Nobody, living)
            }
        }
    }

    fn on_world(&mut self, event: Event) {
        match event {
            Event::Submit => self.submit(),
            Event::Leave(client) => self.leave(client),
            Event::Fault(fault) => self.strike(fault),
            Event::Left(life) => self.on_left(life),
            Event::Restart(place) => self.restart(place),
            Event::CutBreaks(a, b) => self.on_cut_breaks(a, b),
            Event::Silent(life) => self.on_silent(life),
            Event::Faster(life) => self.nodes[life.place].slowness = 1,
            Event::Resume(life) => {
                self.nodes[life.place].stalled = false;
                for event in std::mem::take(&mut self.nodes[life.place].inbox) {
                    self.step(event);
                }
            }
            other => unreachable!("{other} is not the world's"),
        }
    }

    fn on_router(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Hello(conn) => self.on_hello(conn),
            Event::ToRouter(node, message) => self.router.handle(now, RouterInput::Node { node, message }),
            Event::RouterNotices(node) => {
                self.router.handle(now, RouterInput::NodeLost { node, reason: "connection lost".into() });
            }
            Event::RouterTimer(_) => {
                self.router_timer_at = None;
                self.router.handle_timeout(now);
            }
            other => unreachable!("{other} is not the router's"),
        }
    }

    fn on_node(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Dial(life) => self.dial_router(life),
            Event::ControlTimeout(conn) => {
                if self.nodes[self.network.control[&conn].life.place].control != Some(conn) {
                    self.break_control(conn);
                }
            }
            Event::ToNode(conn, message) => self.on_node_message(conn, message),
            Event::NodeNotices(conn) => self.on_node_notices(conn),
            Event::KvArrives(conn) => self.on_kv_arrives(conn),
            Event::KvWelcomed(conn) => self.on_kv_welcomed(conn),
            Event::KvTimeout(conn) => self.on_kv_timeout(conn),
            Event::ToReceiver(conn, message) => self.on_receiver_message(conn, message),
            Event::ToSender(conn, message) => self.on_sender_message(conn, message),
            Event::Page(conn, page) => self.on_page(conn, *page),
            Event::SenderNotices(conn) => self.on_sender_notices(conn),
            Event::ReceiverNotices(conn) => self.on_receiver_notices(conn),
            Event::Layer { life, step, layer } => {
                let node = &mut self.nodes[life.place];
                node.kv.write_layer(node.plan.as_ref().expect("a pass is running"), layer, &self.salts);
                if let Machines::Prefill(machine) = &mut node.machines {
                    machine.handle(now, PrefillInput::LayerDone { step, layer });
                }
            }
            Event::Step { life, step } => {
                let node = &mut self.nodes[life.place];
                let plan = node.plan.take().expect("a pass is running");
                let outputs = node.kv.sample(&plan);
                let busy = now.since(node.pass_began);
                match &mut node.machines {
                    Machines::Prefill(m) => m.handle(now, PrefillInput::StepDone { step, outputs, busy }),
                    Machines::Decode(m, _) => m.handle(now, DecodeInput::StepDone { step, outputs, busy }),
                }
            }
            Event::Timer(life, _) => {
                let node = &mut self.nodes[life.place];
                node.timer_at = None;
                node.handle_timeout(now);
            }
            other => unreachable!("{other} is not a node's"),
        }
    }

    fn submit(&mut self) {
        let id = ClientId(self.clients.len() as u64 + 1);
        let r = &mut self.random;
        let longest = u64::from(self.scenario.max_model_len);
        // A few shared beginnings, so that prefixes are found again.
        let family = r.pick(3) as u32;
        let shared = r.pick(longest / 2) as u32;
        // Now and then one that is too long.
        let own = if r.chance(20) { longest } else { 1 + r.pick(longest / 4) };
        let mut tokens: Vec<TokenId> = (0..shared).map(|i| (i * 7 + family * 100) % VOCAB).collect();
        tokens.extend((0..own).map(|_| r.pick(u64::from(VOCAB)) as TokenId));
        let stops = if r.chance(self.scenario.stop_permille) { 1 + r.pick(20) } else { 0 };
        let params = SamplingParams {
            seed: r.pick(5),
            stop_tokens: (0..stops).map(|_| r.pick(u64::from(VOCAB)) as TokenId).collect(),
            ignore_eos: r.chance(200),
            presence_penalty: if r.chance(200) { 0.5 } else { 0.0 },
            // A function of what was drawn, so that a seed's cluster is otherwise what it was before there were grammars.
            grammar: (self.scenario.stop_permille > 0 && tokens.last().is_some_and(|token| token % 4 == 0))
                .then(|| Box::new(Grammar { kind: GrammarKind::Regex, text: "any".into() })),
            ..SamplingParams::greedy(1 + r.pick(self.scenario.max_answer) as u32)
        };
        let salt = r.pick(2);
        if r.pick(100) < self.scenario.leave_percent {
            let delay = Duration::from_micros(r.pick(300_000));
            self.at(self.now + delay, Event::Leave(id));
        }
        let (wanted, stops) = oracle(&tokens, &params, salt, self.scenario.layers, longest as usize);
        let client = Client {
            prompt_len: tokens.len(),
            shortest_context: self.scenario.short_model_len as usize,
            wanted,
            stops,
            submitted: self.now,
            got: 0,
            end: None,
            gone: false,
        };
        self.clients.insert(id, client);
        self.router
            .handle(self.now, RouterInput::Submit(Submit { client: id, tokens, params, salt, whole_path: false }));
    }

    fn leave(&mut self, id: ClientId) {
        let client = self.clients.get_mut(&id).expect("a client that leaves came");
        if !client.is_over() {
            client.gone = true;
            self.open_clients -= 1;
            self.router.handle(self.now, RouterInput::ClientGone(id));
        }
    }

    /// Another router takes the place of one that died: its clients' connections died with it.
    pub fn replace_router(&mut self) {
        for client in self.clients.values_mut().filter(|client| !client.is_over()) {
            client.gone = true;
            self.open_clients -= 1;
        }
        self.router_lives += 1;
        self.router = new_router(&self.scenario, self.router_lives);
        self.router_timer_at = None;
    }

    /// Does what the router wants done, checks it, and sets its alarm.
    fn settle_router(&mut self) {
        while let Some(output) = self.router.poll_output() {
            match output {
                RouterOutput::Send { node, message } => {
                    if matches!(&message, RouterToNode::Decode(request) if request.last_resort) {
                        *self.happened.entry("continued where it drains").or_default() += 1;
                    }
                    let message = self.note_salt(message);
                    self.send_to_node(node, message);
                }
                RouterOutput::Close { node, .. } => self.break_control(node),
                RouterOutput::Reply { client, event } => self.reply(client, event),
                RouterOutput::Drained => {}
            }
        }
        self.router.check_integrity();
        if let Some(next) = self.router.poll_timeout().map(|next| next.max(self.now))
            && self.router_timer_at.is_none_or(|at| next < at)
        {
            self.router_timer_at = Some(next);
            self.at(next, Event::RouterTimer(next));
        }
    }

    fn note_salt(&mut self, mut message: RouterToNode) -> RouterToNode {
        let noted = match &mut message {
            RouterToNode::Prefill(request) => Some((request.request, &mut request.salt)),
            RouterToNode::Decode(request) => Some((request.request, &mut request.salt)),
            _ => None,
        };
        if let Some((request, salt)) = noted {
            self.salts.insert(request, *salt);
            if self.scenario.sabotage == Some(Sabotage::IgnoreSalts) {
                *salt = 0;
            }
        }
        message
    }

    fn reply(&mut self, id: ClientId, event: ReplyEvent) {
        match &event {
            ReplyEvent::Token { index, out, .. } => {
                self.trace.note(self.now, false, format_args!("  client {} gets token {index}: {}", id.0, out.token));
            }
            other => self.trace.note(self.now, false, format_args!("  client {} gets {other:?}", id.0)),
        }
        let client = self.clients.get_mut(&id).expect("a reply has a client");
        client.take(event);
        if client.is_over() {
            self.open_clients -= 1;
        }
        if let Some(Err(error)) = &client.end {
            let (submitted, too_long) = (client.submitted, client.prompt_len >= client.shortest_context);
            let disturbed = self.disturbed_until > submitted;
            let (permitted, what) = match error {
                RouterError::Invalid(_) => (too_long, "prompt refused as too long"),
                RouterError::Overloaded(_) => (self.scenario.may_overload(), "refused as overloaded"),
                RouterError::Unavailable(_) => (disturbed, "failed for want of a node"),
                RouterError::Failed(reason) => (disturbed && !reason.contains("disagree"), "failed after its attempts"),
            };
            assert!(permitted, "client {} failed without a reason: {error}", id.0);
            *self.happened.entry(what).or_default() += 1;
        }
    }

    /// Does what a node wants done, checks it, and sets its alarm.
    pub fn settle_node(&mut self, place: usize) {
        if !self.nodes[place].alive {
            return;
        }
        match self.nodes[place].role() {
            Role::Prefill => while self.pump_prefill(place) {},
            _ => while self.pump_decode(place) {},
        }
        let node = &mut self.nodes[place];
        node.check_integrity();
        if let Some(next) = node.poll_timeout().map(|next| next.max(self.now))
            && self.scenario.sabotage != Some(Sabotage::StopTimers)
            && node.timer_at.is_none_or(|at| next < at)
        {
            node.timer_at = Some(next);
            let life = node.life;
            self.at(next, Event::Timer(life, next));
        }
    }

    /// Does one thing that a prefill node wants done, if there is one.
    fn pump_prefill(&mut self, place: usize) -> bool {
        let node = &mut self.nodes[place];
        let Machines::Prefill(machine) = &mut node.machines else { unreachable!("a prefill node") };
        match machine.poll_output() {
            None => return self.pump_sender(place),
            Some(PrefillOutput::Transfer(command)) => self.command_sender(place, command),
            Some(PrefillOutput::ToRouter(message)) => self.send_to_router(place, message),
            Some(PrefillOutput::Run(plan)) => self.start_pass(place, plan),
        }
        true
    }

    /// Does one thing that a decode node wants done, if there is one.
    fn pump_decode(&mut self, place: usize) -> bool {
        let (now, node) = (self.now, &mut self.nodes[place]);
        let Machines::Decode(machine, receiver) = &mut node.machines else { unreachable!("a decode node") };
        match machine.poll_output() {
            None => {}
            Some(output) => {
                match output {
                    DecodeOutput::Transfer(command) => {
                        self.handoffs.on_receive_command(node.life, &command);
                        receiver.handle(now, ReceiverInput::Command(command));
                    }
                    DecodeOutput::Send(command) => self.command_sender(place, command),
                    DecodeOutput::ToRouter(message) => self.send_to_router(place, message),
                    DecodeOutput::Run(plan) => self.start_pass(place, plan),
                }
                return true;
            }
        }
        match receiver.poll_output() {
            None => return self.pump_sender(place),
            Some(ReceiverOutput::Event(event)) => {
                self.handoffs.on_receive_event(node.life, &event);
                machine.handle(now, DecodeInput::Transfer(event));
            }
            Some(ReceiverOutput::Send { to, message }) => self.send_to_sender(place, &to, message),
        }
        true
    }

    fn command_sender(&mut self, place: usize, command: SendCommand) {
        let node = &mut self.nodes[place];
        self.handoffs.on_send_command(node.life, &command);
        node.sender.handle(self.now, SenderInput::Command(command));
    }

    /// Does one thing that a node's sender wants done, if there is one.
    fn pump_sender(&mut self, place: usize) -> bool {
        let (now, node) = (self.now, &mut self.nodes[place]);
        match node.sender.poll_output() {
            None => return false,
            Some(SenderOutput::Event(event)) => {
                self.handoffs.on_send_event(node.life, &event);
                match &mut node.machines {
                    Machines::Prefill(machine) => machine.handle(now, PrefillInput::Transfer(event)),
                    Machines::Decode(machine, _) => machine.handle(now, DecodeInput::Sent(event)),
                }
            }
            Some(SenderOutput::Send { to, message }) => self.send_to_receiver(place, &to, KvItem::Message(message)),
            Some(SenderOutput::Answer { to, message }) => {
                // Only over a connection that is there.
                if let Some(conn) = node.dialed.get(&to) {
                    let peer = self.network.kv[conn].to.clone();
                    self.send_to_receiver(place, &peer, KvItem::Message(message));
                }
            }
            Some(SenderOutput::Ship { to, request, layer, index, source }) => {
                let page = node.kv.page_from(layer, &source);
                let digest = page.digest(request, layer, index);
                let mut frame = PageFrame { request, layer, index, cells: page.cells, digest };
                self.damage(&mut frame);
                self.send_to_receiver(place, &to, KvItem::Page(frame));
            }
        }
        true
    }

    fn start_pass(&mut self, place: usize, plan: BatchPlan) {
        let usual = self.scenario.layer_time.as_micros() as u64;
        let (life, slowness, step) = (self.nodes[place].life, self.nodes[place].slowness, plan.step);
        let mut at = self.now;
        for layer in 0..self.scenario.layers {
            at = at + Duration::from_micros(1 + self.random.pick(usual)) * slowness;
            self.at(at, Event::Layer { life, step, layer });
        }
        at = at + Duration::from_micros(1 + self.random.pick(500)) * slowness;
        self.at(at, Event::Step { life, step });
        self.nodes[place].pass_began = self.now;
        assert!(self.nodes[place].plan.replace(plan).is_none(), "two passes at a time");
    }

    /// Everybody is served, nothing more will strike, and nobody has anything to do.
    fn is_over(&self) -> bool {
        self.open_clients == 0
            && self.faults_left == 0
            && self.now >= self.disturbed_until
            && self.nodes.iter().all(SimNode::is_at_rest)
    }

    /// What is still going on.
    fn unrest(&self) -> String {
        let waiting: Vec<u64> = self.clients.iter().filter(|(_, c)| !c.is_over()).map(|(id, _)| id.0).collect();
        let busy: Vec<&str> = self.nodes.iter().filter(|n| !n.is_at_rest()).map(|n| n.name.0.as_str()).collect();
        format!("clients {waiting:?} wait, nodes {busy:?} are busy")
    }

    fn check_rest(&self) {
        self.handoffs.check_over();
        for node in &self.nodes {
            node.check_idle();
        }
        let stats = self.router.stats();
        assert_eq!(stats.in_flight, 0, "the router follows a sequence that is over");
        if self.scenario.is_calm() && !self.scenario.may_overload() {
            assert_eq!(stats.redispatched, 0, "a healthy cluster does nothing twice");
        }
    }

    fn outcome(&mut self) -> Outcome {
        let over = self.last_arrival.max(self.disturbed_until);
        let mut outcome = Outcome {
            redispatched: self.router.stats().redispatched,
            moved: self.router.stats().moved,
            local_prefills: self.router.stats().local_prefills,
            events: self.next_event,
            happened: std::mem::take(&mut self.happened),
            settled_in: self.now.since(over),
            trace: self.trace.hash(),
            ..Outcome::default()
        };
        for node in &self.nodes {
            let stats = node.stats();
            outcome.preemptions += stats.preemptions;
            outcome.recomputed += stats.recomputed_tokens;
            outcome.cached += stats.cached_tokens;
            outcome.converted += stats.converted_pages;
            if node.role() == Role::Prefill {
                outcome.committed += stats.transfers_committed;
                outcome.aborted += stats.transfers_aborted;
            }
        }
        for client in self.clients.values() {
            match &client.end {
                _ if client.gone => outcome.gone += 1,
                Some(Ok(())) => outcome.finished += 1,
                Some(Err(_)) => outcome.failed += 1,
                None => unreachable!("everybody is served"),
            }
        }
        outcome
    }
}
