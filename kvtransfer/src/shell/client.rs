//! The sending side's KV connections: one per decode node, dialed when first needed.

use super::buffers::Buffers;
use super::control::{CONTROL_QUEUE, Control, ControlError, ControlHandle};
use super::endpoint::{CLOSE_DONE, CLOSE_PROTOCOL, Endpoint};
use super::offences::Offence;
use super::pages::{PageItem, write_pages};
use super::path::Link;
use crate::machine::{SenderInput, SenderOutput};
use bytes::Bytes;
use ridge_protocol::page::{PageHeader, page_seed};
use ridge_protocol::transfer::{KvPeer, PageSource, SendEvent};
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{BlockShape, ModelIdentity, NodeName, RequestId};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use tokio::sync::{mpsc, oneshot};

/// Pages waiting for one peer. Credit bounds them long before: sessions times credit.
const PAGE_QUEUE: usize = 1 << 16;

/// Bytes of pages that are made before the connections may send them. With more, they wait in slower caches until they are; with
/// less, a connection sends fewer packets at a time. Of 32 to 512 KiB measured, 256 and 512 are the fastest, by a quarter over all
/// that credit allows.
const TURN_BYTES: usize = 256 << 10;

/// What the connections report.
#[derive(Clone, PartialEq, Debug)]
pub enum KvClientEvent {
    /// The identities agree; what was queued is on its way.
    Up {
        /// The decode node.
        peer: NodeName,
    },
    /// The receiver spoke. Never `Welcome` or `Refuse`.
    Message {
        /// The decode node, verified.
        from: NodeName,
        /// What it said.
        message: ReceiverMsg,
    },
    /// The connection is gone, or never came to be. Said once per connection, after its last message; answer with
    /// [`KvClient::forget`].
    Lost {
        /// The decode node, at the address where it was.
        peer: KvPeer,
        /// Why.
        reason: String,
    },
}

/// A page that is to be sent.
#[derive(Clone, Copy, Debug)]
pub struct OutgoingPage<'a> {
    /// The transfer.
    pub request: RequestId,
    /// Layer, from 0.
    pub layer: u32,
    /// Index of the receiver's block within the sequence.
    pub index: u32,
    /// The receiver's blocks.
    pub blocks: BlockShape,
    /// What the page is made from.
    pub source: &'a PageSource,
}

impl OutgoingPage<'_> {
    /// Of its digest.
    pub fn seed(&self) -> u64 {
        page_seed(self.request, self.layer, self.index)
    }
}

/// All KV connections of a node that sends. Its methods never block.
///
/// After a `Lost`, messages and pages for that peer are dropped until [`forget`](Self::forget) is called: they
/// belong to transfers that ended with the connection. [`heard`](Self::heard) calls it, and says what the node's loop then tells its machine.
#[derive(Debug)]
pub struct KvClient {
    endpoint: Endpoint,
    name: NodeName,
    identity: ModelIdentity,
    events: mpsc::Sender<KvClientEvent>,
    peers: BTreeMap<NodeName, Peer>,
    buffers: Buffers,
    /// Bytes of pages made in this turn.
    shipped: usize,
}

#[derive(Debug)]
struct Peer {
    to: KvPeer,
    messages: mpsc::Sender<SenderMsg>,
    pages: mpsc::Sender<PageItem>,
    /// Set once it is there.
    conn: Arc<OnceLock<quinn::Connection>>,
    /// Ends the connection with a reason; dropped unused, it ends it without an event.
    fail: Option<oneshot::Sender<String>>,
}

impl KvClient {
    /// No connection yet. `name` is the one in this node's certificate.
    pub fn new(
        endpoint: Endpoint,
        name: NodeName,
        identity: ModelIdentity,
        events: mpsc::Sender<KvClientEvent>,
    ) -> Self {
        Self { endpoint, name, identity, events, peers: BTreeMap::new(), buffers: Buffers::default(), shipped: 0 }
    }

    /// What an event means to the sender's machine. A peer that was lost is forgotten first.
    pub fn heard(&mut self, event: KvClientEvent) -> SenderInput {
        match event {
            KvClientEvent::Up { peer } => SenderInput::PeerUp(peer),
            KvClientEvent::Message { from, message } => SenderInput::Message { from, message },
            KvClientEvent::Lost { peer, reason } => {
                tracing::warn!(peer = %peer.name, %reason, "KV connection lost");
                self.forget(&peer);
                SenderInput::PeerLost { peer, reason }
            }
        }
    }

    /// Does what the sender's machine wants done; an event is the scheduler's. `fill` puts a page into a buffer with arbitrary
    /// contents, so that what it is made from may go the moment the hand-off is settled, and gives its digest. `damage` gets it
    /// afterwards: tests break pages there.
    pub fn act(
        &mut self,
        output: SenderOutput,
        fill: impl FnOnce(OutgoingPage<'_>, &mut Vec<u8>) -> u128,
        damage: impl FnOnce(RequestId, Bytes) -> Bytes,
    ) -> Option<SendEvent> {
        match output {
            SenderOutput::Send { to, message } => self.send(&to, message),
            SenderOutput::Answer { to, message } => {
                if let Some(peer) = self.peers.get_mut(&to) {
                    peer.say(message);
                }
            }
            SenderOutput::Ship { to, request, layer, index, source } => {
                let page = OutgoingPage { request, layer, index, blocks: to.blocks, source: &source };
                let mut digest = 0;
                let bytes = self.buffers.fill(|buffer| digest = fill(page, buffer));
                self.shipped += bytes.len();
                let header = PageHeader { request, layer, index, len: bytes.len() as u32, digest };
                self.ship(&to, header, damage(request, bytes));
            }
            SenderOutput::Event(event) => return Some(event),
        }
        None
    }

    /// Lets the connections send what was made, if it is enough for a turn. To be awaited between two outputs of the machine, with
    /// the connections on the same runtime.
    pub async fn take_turns(&mut self) {
        if self.shipped >= TURN_BYTES {
            self.shipped = 0;
            tokio::task::yield_now().await;
        }
    }

    /// Queues a message, dialing the peer if there is no connection.
    pub fn send(&mut self, to: &KvPeer, message: SenderMsg) {
        let ended = match &message {
            SenderMsg::Finish { request, .. } => Some(PageItem::End(*request)),
            SenderMsg::Abort { request, .. } => Some(PageItem::Reset(*request)),
            _ => None,
        };
        let peer = self.peer(to);
        peer.say(message);
        if let Some(item) = ended {
            peer.page(item);
        }
    }

    /// Queues a page. Only a peer that grants absurd credit can fill the queue, and loses its connection.
    pub fn ship(&mut self, to: &KvPeer, header: PageHeader, bytes: Bytes) {
        self.peer(to).page(PageItem::Page(header, bytes));
    }

    /// The connections that are up.
    pub fn links(&self) -> Vec<Link> {
        let up = |(peer, known): (&NodeName, &Peer)| known.conn.get().map(|conn| Link::of(peer.clone(), conn));
        self.peers.iter().filter_map(up).collect()
    }

    /// Forgets a peer: closes its connection if there is one, without a `Lost`; the next message dials anew.
    /// A connection to another address or to other blocks of the same node is kept.
    pub fn forget(&mut self, peer: &KvPeer) {
        if self.peers.get(&peer.name).is_some_and(|known| known.to == *peer) {
            self.peers.remove(&peer.name);
        }
    }

    fn peer(&mut self, to: &KvPeer) -> &mut Peer {
        // A node that came back under another address, or with other blocks: the old connection leads nowhere.
        if self.peers.get(&to.name).is_some_and(|peer| peer.to != *to)
            && let Some(mut old) = self.peers.remove(&to.name)
        {
            old.fail(format!("{} is now at {}, {}", to.name, to.addr, to.blocks));
        }
        self.peers.entry(to.name.clone()).or_insert_with(|| {
            let (messages, from_messages) = mpsc::channel(CONTROL_QUEUE);
            let (pages, from_pages) = mpsc::channel(PAGE_QUEUE);
            let (fail, failed) = oneshot::channel();
            let conn = Arc::<OnceLock<_>>::default();
            let task = PeerTask {
                endpoint: self.endpoint.clone(),
                to: to.clone(),
                hello: SenderMsg::Hello { name: self.name.clone(), identity: self.identity.clone(), blocks: to.blocks },
                events: self.events.clone(),
                resets: pages.downgrade(),
                opened: conn.clone(),
            };
            tokio::spawn(task.run(from_messages, from_pages, failed));
            Peer { to: to.clone(), messages, pages, conn, fail: Some(fail) }
        })
    }
}

impl Peer {
    fn say(&mut self, message: SenderMsg) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.messages.try_send(message) {
            self.fail(ControlError::QueueFull.to_string());
        }
    }

    fn page(&mut self, item: PageItem) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.pages.try_send(item) {
            self.fail(format!("page queue is full: {PAGE_QUEUE} pages wait"));
        }
    }

    fn fail(&mut self, reason: String) {
        if let Some(fail) = self.fail.take() {
            let _ = fail.send(reason);
        }
    }
}

struct PeerTask {
    endpoint: Endpoint,
    to: KvPeer,
    hello: SenderMsg,
    events: mpsc::Sender<KvClientEvent>,
    /// Weak, so that dropping the [`Peer`] ends the page writer.
    resets: mpsc::WeakSender<PageItem>,
    opened: Arc<OnceLock<quinn::Connection>>,
}

impl PeerTask {
    async fn run(
        self,
        messages: mpsc::Receiver<SenderMsg>,
        pages: mpsc::Receiver<PageItem>,
        failed: oneshot::Receiver<String>,
    ) {
        let ended = tokio::select! {
            ended = self.converse(messages, pages) => Some(ended),
            failed = failed => failed.ok(),
        };
        let reason = ended.as_deref().unwrap_or("no longer needed");
        if let Some(conn) = self.opened.get() {
            conn.close(CLOSE_DONE, reason.as_bytes());
        }
        if let Some(reason) = ended {
            tracing::info!(peer = %self.to.name, "KV connection lost: {reason}");
            let _ = self.events.send(KvClientEvent::Lost { peer: self.to, reason }).await;
        }
    }

    async fn converse(&self, messages: mpsc::Receiver<SenderMsg>, pages: mpsc::Receiver<PageItem>) -> String {
        let control = match self.shake_hands().await {
            Ok(control) => control,
            Err(reason) => return reason,
        };
        let conn = control.connection().clone();
        let peer = || self.to.name.clone();
        if self.events.send(KvClientEvent::Up { peer: peer() }).await.is_err() {
            return "nobody listens".to_owned();
        }
        let (writer, reader) = control.into_halves();
        let event = |message| {
            match &message {
                ReceiverMsg::Welcome | ReceiverMsg::Refuse { .. } => return Err("a second answer to Hello".to_owned()),
                // No page of it will be taken; the sender's machine hears of it too, and ships no more.
                ReceiverMsg::Abort { request, .. } => {
                    if let Some(pages) = self.resets.upgrade() {
                        let _ = pages.try_send(PageItem::Reset(*request));
                    }
                }
                _ => {}
            }
            Ok(KvClientEvent::Message { from: peer(), message })
        };
        tokio::select! {
            reason = reader.run(&self.events, event) => reason,
            reason = write_pages(conn, pages) => reason,
            reason = writer.run(ControlHandle::<SenderMsg>::queue_of(messages)) => reason,
        }
    }

    async fn shake_hands(&self) -> Result<Control<SenderMsg, ReceiverMsg>, String> {
        let conn = self.endpoint.connect_kv(self.to.addr, &self.to.name).await.map_err(|e| e.to_string())?;
        self.opened.set(conn.clone()).expect("a task opens one connection");
        let mut control = Control::open(&self.endpoint, conn.clone()).await.map_err(|e| e.to_string())?;
        control.send(&self.hello).await.map_err(|e| e.to_string())?;
        let deadline = self.endpoint.options().handshake_deadline;
        match control.recv(deadline).await {
            Ok(ReceiverMsg::Welcome) => Ok(control),
            Ok(ReceiverMsg::Refuse { reason }) => Err(format!("refused: {reason}")),
            Ok(other) => {
                self.endpoint.offences().count(Offence::Control);
                let reason = format!("{other:?} in answer to Hello");
                conn.close(CLOSE_PROTOCOL, reason.as_bytes());
                Err(reason)
            }
            Err(e) => Err(e.to_string()),
        }
    }
}
