//! Connections as QUIC gives them: streams in order, no order between streams, and a loss that each side notices in its
//! own time. What the shells of `kvtransfer` do around a connection (dial, seat, forget) is done here the same way.

use super::kv::Cell;
use super::node::Machines;
use super::run::{Event, Life, World};
use super::scenario::Sabotage;
use ridge_decode_node::machine::DecodeInput;
use ridge_kvtransfer::{ReceiverInput, SenderInput};
use ridge_prefill_node::machine::PrefillInput;
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::{NodeToRouter, ReceiverMsg, RouterToNode, SenderMsg};
use ridge_protocol::{Duration, Instant, Machine, NodeId, NodeName, RequestId};
use ridge_router::machine::RouterInput;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A peer that is silent for so long is lost.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that is not agreed on by then is none.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// A KV connection; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Conn(u32);

impl fmt::Display for Conn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kv{}", self.0)
    }
}

/// One process, however often it restarts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum End {
    Router,
    Node(usize),
}

/// What keeps its order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Stream {
    ToRouter(NodeId),
    ToNode(NodeId),
    ToReceiver(Conn),
    ToSender(Conn),
    /// Rule K-4: pages of one transfer.
    Pages(Conn, RequestId),
}

/// A page on its way.
#[derive(Debug)]
pub struct PageFrame {
    pub request: RequestId,
    pub layer: u32,
    pub index: u32,
    pub cells: Vec<Cell>,
    pub digest: u64,
}

#[derive(Debug)]
pub enum KvItem {
    Message(SenderMsg),
    Page(PageFrame),
}

/// A node's connection to the router.
#[derive(Debug)]
pub struct Control {
    pub life: Life,
    pub broken: bool,
}

/// A prefill node's connection to a decode node.
#[derive(Debug)]
pub struct Kv {
    pub from: Life,
    pub to: KvPeer,
    /// Who answered, once it has.
    pub seated: Option<Life>,
    welcomed: bool,
    pub broken: bool,
    receiver_told: bool,
    /// What was said before the welcome.
    queue: Vec<KvItem>,
    /// Transfers whose page stream was reset: what was in flight on it need not arrive.
    resets: BTreeSet<RequestId>,
}

/// Every connection there was.
#[derive(Debug, Default)]
pub struct Network {
    pub control: BTreeMap<NodeId, Control>,
    pub kv: BTreeMap<Conn, Kv>,
    /// When the last message of a stream arrives.
    streams: BTreeMap<Stream, Instant>,
    /// Processes that do not reach each other, and until when.
    pub cuts: BTreeMap<(End, End), Instant>,
}

impl World {
    /// Sends over a stream that keeps order and delays by chance, now and then for long.
    fn deliver(&mut self, (a, b): (End, End), stream: Stream, event: Event) {
        let usual = self.scenario.latency.as_micros() as u64;
        let delay = if self.random.chance(20) { self.random.pick(200_000) } else { 50 + self.random.pick(usual) };
        let cut = self.network.cuts.get(&(a.min(b), a.max(b))).copied().unwrap_or_default();
        let last = self.network.streams.get(&stream).copied().unwrap_or_default();
        let arrival = (self.now.max(cut) + Duration::from_micros(delay)).max(last + Duration::from_nanos(1));
        self.network.streams.insert(stream, arrival);
        self.at(arrival, event);
    }

    /// When a side of a broken connection notices: told by the other side, or by silence.
    fn notice(&mut self) -> Instant {
        let soon = self.random.chance(500);
        let most = if soon { Duration::from_millis(20) } else { IDLE_TIMEOUT };
        self.now + Duration::from_micros(self.random.pick(most.as_micros() as u64))
    }

    /// Whether one in a hundred control messages is to vanish, and this is one.
    fn is_sabotaged_message(&mut self) -> bool {
        self.scenario.sabotage == Some(Sabotage::LoseMessages) && self.random.chance(10)
    }

    // Control connections.

    pub fn dial_router(&mut self, life: Life) {
        self.next_node += 1;
        let conn = NodeId(self.next_node);
        self.network.control.insert(conn, Control { life, broken: false });
        self.deliver((End::Node(life.place), End::Router), Stream::ToRouter(conn), Event::Hello(conn));
        self.at(self.now + HANDSHAKE_DEADLINE, Event::ControlTimeout(conn));
    }

    pub fn send_to_node(&mut self, conn: NodeId, message: RouterToNode) {
        let Some(control) = self.network.control.get(&conn).filter(|c| !c.broken) else { return };
        let place = control.life.place;
        if !self.is_sabotaged_message() {
            self.deliver((End::Router, End::Node(place)), Stream::ToNode(conn), Event::ToNode(conn, message));
        }
    }

    pub fn send_to_router(&mut self, place: usize, message: NodeToRouter) {
        if matches!(message, NodeToRouter::Drained) && self.nodes[place].stopping {
            self.at(self.now + Duration::from_millis(1), Event::Left(self.nodes[place].life));
        }
        // Without a router nobody waits for the message: its loss has cancelled every request.
        let Some(conn) = self.nodes[place].control.filter(|c| !self.network.control[c].broken) else { return };
        if !self.is_sabotaged_message() {
            self.deliver((End::Node(place), End::Router), Stream::ToRouter(conn), Event::ToRouter(conn, message));
        }
    }

    pub fn break_control(&mut self, conn: NodeId) {
        let control = self.network.control.get_mut(&conn).expect("connections are remembered");
        if !std::mem::replace(&mut control.broken, true) {
            let at = self.notice();
            self.at(at, Event::RouterNotices(conn));
            let at = self.notice();
            self.at(at, Event::NodeNotices(conn));
        }
    }

    pub fn on_hello(&mut self, conn: NodeId) {
        let life = self.network.control[&conn].life;
        let hello = self.nodes[life.place].hello(&self.scenario);
        self.router.handle(self.now, RouterInput::NodeUp { node: conn, hello });
    }

    /// What a node's link does with a message of the router.
    pub fn on_node_message(&mut self, conn: NodeId, message: RouterToNode) {
        let node = &mut self.nodes[self.network.control[&conn].life.place];
        let up = matches!(message, RouterToNode::Welcome { .. });
        if up {
            node.control = Some(conn);
        }
        match &mut node.machines {
            Machines::Prefill(machine) => {
                machine.handle(self.now, if up { PrefillInput::RouterUp } else { PrefillInput::Router(message) });
            }
            Machines::Decode(machine, _) => {
                machine.handle(self.now, if up { DecodeInput::RouterUp } else { DecodeInput::Router(message) });
            }
        }
    }

    pub fn on_node_notices(&mut self, conn: NodeId) {
        let life = self.network.control[&conn].life;
        let node = &mut self.nodes[life.place];
        if node.control == Some(conn) {
            node.control = None;
            match &mut node.machines {
                Machines::Prefill(machine) => machine.handle(self.now, PrefillInput::RouterLost),
                Machines::Decode(machine, _) => machine.handle(self.now, DecodeInput::RouterLost),
            }
        }
        let pause = Duration::from_millis(50 + self.random.pick(1950));
        self.at(self.now + pause, Event::Dial(life));
    }

    // KV connections.

    /// What a node's shell does with KV for a decode node: dials it if there is no connection.
    pub fn send_to_receiver(&mut self, place: usize, to: &KvPeer, item: KvItem) {
        let known = self.nodes[place].dialed.get(&to.name).copied();
        let conn = known.filter(|conn| self.network.kv[conn].to == *to);
        if conn.is_none()
            && let Some(old) = known
        {
            // A node that came back under another address, or with other blocks: the old connection leads nowhere.
            self.break_kv(old);
        }
        let conn = conn.unwrap_or_else(|| self.dial_decode(place, to));
        let kv = self.network.kv.get_mut(&conn).expect("connections are remembered");
        if kv.broken {
            return; // Dropped until the shell notices and forgets the peer.
        }
        if kv.welcomed { self.transmit(conn, item) } else { kv.queue.push(item) }
    }

    fn dial_decode(&mut self, place: usize, to: &KvPeer) -> Conn {
        let conn = Conn(self.network.kv.len() as u32);
        let kv = Kv {
            from: self.nodes[place].life,
            to: to.clone(),
            seated: None,
            welcomed: false,
            broken: false,
            receiver_told: false,
            queue: Vec::new(),
            resets: BTreeSet::new(),
        };
        self.network.kv.insert(conn, kv);
        self.nodes[place].dialed.insert(to.name.clone(), conn);
        let ends = (End::Node(place), End::Node(self.place_named(&to.name)));
        self.deliver(ends, Stream::ToReceiver(conn), Event::KvArrives(conn));
        self.at(self.now + HANDSHAKE_DEADLINE, Event::KvTimeout(conn));
        conn
    }

    fn transmit(&mut self, conn: Conn, item: KvItem) {
        let ends = self.kv_ends(conn);
        match item {
            KvItem::Message(message) => {
                if let SenderMsg::Abort { request, .. } = message {
                    self.reset_pages(conn, request);
                }
                if !self.is_sabotaged_message() {
                    self.deliver(ends, Stream::ToReceiver(conn), Event::ToReceiver(conn, message));
                }
            }
            KvItem::Page(page) => {
                self.deliver(ends, Stream::Pages(conn, page.request), Event::Page(conn, Box::new(page)));
            }
        }
    }

    fn kv_ends(&self, conn: Conn) -> (End, End) {
        let kv = &self.network.kv[&conn];
        (End::Node(kv.from.place), End::Node(self.place_named(&kv.to.name)))
    }

    /// An aborted transfer's stream is reset: its pages in flight arrive or do not.
    fn reset_pages(&mut self, conn: Conn, request: RequestId) {
        if self.random.chance(500) {
            self.network.kv.get_mut(&conn).expect("connections are remembered").resets.insert(request);
        }
    }

    /// What a decode node's shell does with a message for a sender; dropped if there is no connection.
    pub fn send_to_sender(&mut self, place: usize, to: &NodeName, message: ReceiverMsg) {
        let Some(conn) = self.nodes[place].seats.get(to).copied() else { return };
        if !self.network.kv[&conn].broken && !self.is_sabotaged_message() {
            let (sender, receiver) = self.kv_ends(conn);
            self.deliver((receiver, sender), Stream::ToSender(conn), Event::ToSender(conn, message));
        }
    }

    pub fn break_kv(&mut self, conn: Conn) {
        let kv = self.network.kv.get_mut(&conn).expect("connections are remembered");
        if !std::mem::replace(&mut kv.broken, true) {
            kv.queue.clear();
            let at = self.notice();
            self.at(at, Event::SenderNotices(conn));
            let at = self.notice();
            self.at(at, Event::ReceiverNotices(conn));
        }
    }

    /// A dialed connection reaches the decode node's process, if there is one at that address.
    pub fn on_kv_arrives(&mut self, conn: Conn) {
        let kv = &self.network.kv[&conn];
        let (from, to) = (kv.from, kv.to.clone());
        let place = self.place_named(&to.name);
        let node = &self.nodes[place];
        if !node.alive || node.addr != to.addr {
            if self.random.chance(500) {
                self.break_kv(conn); // Refused by its host; otherwise nobody answers.
            }
            return;
        }
        // The second connection of a name waits until the first one's loss was told.
        let peer = self.nodes[from.place].name.clone();
        if let Some(old) = self.nodes[place].seats.get(&peer).copied() {
            self.break_kv(old);
            self.on_receiver_notices(old);
        }
        let life = self.nodes[place].life;
        self.nodes[place].seats.insert(peer, conn);
        self.network.kv.get_mut(&conn).expect("connections are remembered").seated = Some(life);
        let (sender, receiver) = self.kv_ends(conn);
        self.deliver((receiver, sender), Stream::ToSender(conn), Event::KvWelcomed(conn));
    }

    pub fn on_kv_welcomed(&mut self, conn: Conn) {
        let kv = self.network.kv.get_mut(&conn).expect("connections are remembered");
        kv.welcomed = true;
        let (place, peer, queue) = (kv.from.place, kv.to.name.clone(), std::mem::take(&mut kv.queue));
        self.nodes[place].sender.handle(self.now, SenderInput::PeerUp(peer));
        for item in queue {
            self.transmit(conn, item);
        }
    }

    pub fn on_kv_timeout(&mut self, conn: Conn) {
        if !self.network.kv[&conn].welcomed {
            self.break_kv(conn);
        }
    }

    pub fn on_sender_message(&mut self, conn: Conn, message: ReceiverMsg) {
        if let ReceiverMsg::Abort { request, .. } = message {
            self.reset_pages(conn, request);
        }
        let kv = &self.network.kv[&conn];
        let sender = &mut self.nodes[kv.from.place].sender;
        sender.handle(self.now, SenderInput::Message { from: kv.to.name.clone(), message });
    }

    pub fn on_receiver_message(&mut self, conn: Conn, message: SenderMsg) {
        let kv = &self.network.kv[&conn];
        let from = self.nodes[kv.from.place].name.clone();
        let place = kv.seated.expect("only a seated connection speaks").place;
        if let Machines::Decode(_, receiver) = &mut self.nodes[place].machines {
            receiver.handle(self.now, ReceiverInput::Message { from, message });
        }
    }

    /// Puts an arrived page where its transfer wants it and verifies it there, as the decode node's shell does.
    pub fn on_page(&mut self, conn: Conn, page: PageFrame) {
        let kv = &self.network.kv[&conn];
        if kv.resets.contains(&page.request) {
            return;
        }
        let PageFrame { request, layer, index, cells, digest } = page;
        let from = self.nodes[kv.from.place].name.clone();
        let node = &mut self.nodes[kv.seated.expect("only a seated connection speaks").place];
        let Machines::Decode(_, receiver) = &mut node.machines else { return };
        let mut intact = true;
        if let Some(block) = receiver.destination(&from, request, layer, index) {
            let in_pass = node.plan.iter().flat_map(|plan| &plan.items).any(|item| item.block_table.contains(&block));
            assert!(!in_pass, "a page lands in {block:?} while a pass uses it");
            let skipped = self.scenario.sabotage == Some(Sabotage::SkipPages) && self.random.chance(10);
            if !skipped {
                intact = node.kv.land(layer, block, cells, |page| page.digest(request, layer, index) == digest);
            }
            if !intact {
                *self.happened.entry("damaged page found").or_default() += 1;
            }
            intact |= self.scenario.sabotage == Some(Sabotage::TrustPages);
        }
        receiver.handle(self.now, ReceiverInput::PageLanded { from, request, layer, index, bytes: 1, intact });
    }

    pub fn on_sender_notices(&mut self, conn: Conn) {
        let kv = &self.network.kv[&conn];
        let (place, peer) = (kv.from.place, kv.to.clone());
        // Forgets the peer: whatever connection leads to it is closed.
        if let Some(known) = self.nodes[place].dialed.get(&peer.name).copied()
            && self.network.kv[&known].to == peer
        {
            self.nodes[place].dialed.remove(&peer.name);
            self.break_kv(known);
        }
        let lost = SenderInput::PeerLost { peer, reason: "connection lost".into() };
        self.nodes[place].sender.handle(self.now, lost);
    }

    pub fn on_receiver_notices(&mut self, conn: Conn) {
        let kv = self.network.kv.get_mut(&conn).expect("connections are remembered");
        let Some(life) = kv.seated.filter(|_| !std::mem::replace(&mut kv.receiver_told, true)) else { return };
        let peer = self.nodes[kv.from.place].name.clone();
        let node = &mut self.nodes[life.place];
        if node.seats.get(&peer) == Some(&conn) {
            node.seats.remove(&peer);
        }
        if let Machines::Decode(_, receiver) = &mut node.machines {
            receiver.handle(self.now, ReceiverInput::PeerLost { peer, reason: "connection lost".into() });
        }
    }
}
