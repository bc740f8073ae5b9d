//! The decode side's KV connections: nodes that have KV dial, say who they are, and send.

use super::control::{Control, ControlHandle};
use super::endpoint::{CLOSE_DONE, CLOSE_REFUSED, Endpoint};
use super::offences::Offence;
use super::pages::{PageBytes, read_pages};
use quinn::Connection;
use ridge_protocol::page::PageHeader;
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{BlockShape, ModelIdentity, NodeName, Role, limits};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Connected senders; one more is refused.
const MAX_PEERS: usize = 1024;

/// What the connections report.
#[derive(Clone, PartialEq, Debug)]
pub enum KvServerEvent {
    /// The sender spoke. Never `Hello`.
    Message {
        /// The sending node, verified.
        from: NodeName,
        /// What it said.
        message: SenderMsg,
    },
    /// A page came, of the agreed size; its digest is not checked yet.
    Page {
        /// The sending node, verified.
        from: NodeName,
        /// Where it belongs.
        header: PageHeader,
        /// Its bytes.
        bytes: PageBytes,
    },
    /// The connection is gone. Said once per connection, after everything that came on it and before anything that
    /// comes on the same node's next connection.
    Lost {
        /// The sending node.
        peer: NodeName,
        /// Why.
        reason: String,
    },
}

/// All KV connections of a decode node. Its methods never block. Dropping it closes them.
#[derive(Debug)]
pub struct KvServer {
    peers: Peers,
    accepting: JoinHandle<()>,
}

type Peers = Arc<Mutex<BTreeMap<NodeName, Seat>>>;

/// A sender's place. Two connections of one name never speak at the same time: the second closes the first and
/// waits for its `Lost`.
#[derive(Debug, Default)]
struct Seat {
    taken: Arc<tokio::sync::Mutex<()>>,
    handle: Option<ControlHandle<ReceiverMsg>>,
    conn: Option<Connection>,
}

impl KvServer {
    /// Serves the KV protocol on this endpoint. Pages wait in `events`, so its capacity times the page size is memory.
    pub fn new(endpoint: Endpoint, identity: ModelIdentity, events: mpsc::Sender<KvServerEvent>) -> Self {
        let peers = Peers::default();
        let mut accepted = endpoint.serve(limits::ALPN_KV);
        let service = Service { identity: Arc::new(identity), peers: peers.clone(), events, endpoint };
        let accepting = tokio::spawn(async move {
            while let Some(conn) = accepted.recv().await {
                tokio::spawn(service.clone().run(conn));
            }
        });
        Self { peers, accepting }
    }

    /// Queues a message; dropped if the peer is gone, whose `Lost` is then on its way.
    pub fn send(&mut self, to: &NodeName, message: ReceiverMsg) {
        if let Some(Seat { handle: Some(handle), .. }) = lock(&self.peers).get_mut(to) {
            // A failure closes the connection, and that is reported as `Lost`.
            let _ = handle.try_send(message);
        }
    }
}

impl Drop for KvServer {
    fn drop(&mut self) {
        self.accepting.abort();
        for seat in lock(&self.peers).values_mut() {
            if let Some(handle) = &mut seat.handle {
                handle.close("the decode node stops");
            }
        }
    }
}

/// A panic while the map was locked leaves it whole: every change is one assignment.
fn lock(peers: &Peers) -> MutexGuard<'_, BTreeMap<NodeName, Seat>> {
    peers.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone)]
struct Service {
    identity: Arc<ModelIdentity>,
    peers: Peers,
    events: mpsc::Sender<KvServerEvent>,
    endpoint: Endpoint,
}

impl Service {
    async fn run(self, conn: Connection) {
        let remote = conn.remote_address();
        let mut control = match Control::<ReceiverMsg, SenderMsg>::accept(&self.endpoint, conn.clone()).await {
            Ok(control) => control,
            Err(e) => {
                tracing::warn!(%remote, "KV connection without a control stream: {e}");
                return conn.close(CLOSE_REFUSED, e.to_string().as_bytes());
            }
        };
        let peer = match self.hello(&mut control).await {
            Ok(peer) => peer,
            Err(reason) => {
                tracing::warn!(%remote, "KV connection refused: {reason}");
                return control.refuse(&ReceiverMsg::Refuse { reason: reason.clone() }, CLOSE_REFUSED, &reason).await;
            }
        };
        let seat = match self.take_seat(&peer, &conn) {
            Ok(seat) => seat,
            Err(reason) => {
                tracing::warn!(%remote, %peer, "KV connection refused: {reason}");
                return control.refuse(&ReceiverMsg::Refuse { reason: reason.clone() }, CLOSE_REFUSED, &reason).await;
            }
        };
        let seated = seat.lock().await;
        let reason = self.converse(&peer, control).await;
        conn.close(CLOSE_DONE, reason.as_bytes());
        if let Some(seat) = lock(&self.peers).get_mut(&peer) {
            seat.handle = None;
        }
        tracing::info!(%peer, "KV connection lost: {reason}");
        let _ = self.events.send(KvServerEvent::Lost { peer, reason }).await;
        drop(seated);
    }

    /// Who dials, and whether KV may pass.
    async fn hello(&self, control: &mut Control<ReceiverMsg, SenderMsg>) -> Result<NodeName, String> {
        let deadline = self.endpoint.options().handshake_deadline;
        let SenderMsg::Hello { name, identity, blocks } = control.recv(deadline).await.map_err(|e| e.to_string())?
        else {
            self.endpoint.offences().count(Offence::Control);
            return Err("the first message is not Hello".to_owned());
        };
        // Prefill nodes send what they computed, decode nodes that drain what they have.
        let verified = control.verify_peer(&name, Role::Prefill);
        let verified = verified.or_else(|e| control.verify_peer(&name, Role::Decode).map_err(|_| e.to_string()));
        let objection = verified.err().or_else(|| self.identity.refusal(&identity));
        let objection = objection.or_else(|| self.not_ours(blocks));
        match objection {
            None => Ok(name),
            Some(reason) => {
                self.endpoint.offences().count(Offence::Refused);
                Err(reason)
            }
        }
    }

    /// Rule K-12: pages come in this node's blocks. A sender may have been told of an earlier process at this address.
    fn not_ours(&self, blocks: BlockShape) -> Option<String> {
        let ours = self.identity.block_shape()?;
        (blocks != ours).then(|| format!("this node's blocks are {ours}, and pages would come as {blocks}"))
    }

    /// Closes the same node's earlier connection; the seat is free when its lock is.
    fn take_seat(&self, peer: &NodeName, conn: &Connection) -> Result<Arc<tokio::sync::Mutex<()>>, String> {
        let mut peers = lock(&self.peers);
        if peers.len() >= MAX_PEERS && !peers.contains_key(peer) {
            return Err(format!("{MAX_PEERS} senders are known already"));
        }
        let seat = peers.entry(peer.clone()).or_default();
        if let Some(earlier) = seat.conn.replace(conn.clone()) {
            earlier.close(CLOSE_DONE, b"the same node connected again");
        }
        Ok(seat.taken.clone())
    }

    async fn converse(&self, peer: &NodeName, mut control: Control<ReceiverMsg, SenderMsg>) -> String {
        if let Err(e) = control.send(&ReceiverMsg::Welcome).await {
            return e.to_string();
        }
        let conn = control.connection().clone();
        let (handle, queue) = ControlHandle::new(conn.clone());
        if let Some(seat) = lock(&self.peers).get_mut(peer) {
            seat.handle = Some(handle);
        }
        let (writer, reader) = control.into_halves();
        let event = |message| {
            if let SenderMsg::Hello { .. } = message {
                return Err("a second Hello".to_owned());
            }
            Ok(KvServerEvent::Message { from: peer.clone(), message })
        };
        let (page_bytes, offences) = (self.identity.page_bytes(), self.endpoint.offences());
        tokio::select! {
            reason = reader.run(&self.events, event) => reason,
            reason = read_pages(conn, peer.clone(), page_bytes, self.events.clone(), offences) => reason,
            reason = writer.run(queue) => reason,
        }
    }
}
