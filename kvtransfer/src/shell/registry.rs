//! The control connections between nodes and the router: who is in the cluster.

use super::control::{Control, ControlError, ControlHandle};
use super::endpoint::{CLOSE_REFUSED, ConnectFailure, Endpoint};
use super::offences::Offence;
use quinn::Connection;
use ridge_protocol::wire::{NodeHello, NodeToRouter, RouterToNode};
use ridge_protocol::{NodeName, Role, limits};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Nodes connected at once; one more is refused.
const MAX_NODES: usize = 1024;

/// A control connection as the router counts them. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnId(pub u64);

/// What the connections report.
#[derive(Clone, PartialEq, Debug)]
pub enum ControlServerEvent {
    /// A node introduced itself; its certificate agrees with the name and the role it claims. The router answers
    /// with `Welcome`, or with `Refuse` and [`ControlServer::close`].
    Joined {
        /// The connection.
        conn: ConnId,
        /// Where it dials from.
        addr: SocketAddr,
        /// What it says of itself.
        hello: NodeHello,
    },
    /// A node spoke. Never `Hello`.
    Message {
        /// The connection.
        conn: ConnId,
        /// What it said.
        message: NodeToRouter,
    },
    /// The connection is gone. Said once per `Joined`, after its last message.
    Closed {
        /// The connection.
        conn: ConnId,
        /// Why.
        reason: String,
    },
}

/// All control connections of a router. Its methods never block. Dropping it closes them.
#[derive(Debug)]
pub struct ControlServer {
    handles: Handles,
    accepting: JoinHandle<()>,
}

type Handles = Arc<Mutex<BTreeMap<ConnId, ControlHandle<RouterToNode>>>>;

impl ControlServer {
    /// Serves the control protocol on this endpoint.
    pub fn new(endpoint: Endpoint, events: mpsc::Sender<ControlServerEvent>) -> Self {
        let handles = Handles::default();
        let mut accepted = endpoint.serve(limits::ALPN_CONTROL);
        let service = Service { handles: handles.clone(), events, endpoint };
        let accepting = tokio::spawn(async move {
            let mut next = 0;
            while let Some(conn) = accepted.recv().await {
                next += 1;
                tokio::spawn(service.clone().run(ConnId(next), conn));
            }
        });
        Self { handles, accepting }
    }

    /// Queues a message; dropped if the node is gone, whose `Closed` is then on its way.
    pub fn send(&mut self, conn: ConnId, message: RouterToNode) {
        if let Some(handle) = lock(&self.handles).get_mut(&conn) {
            // A failure closes the connection, and that is reported as `Closed`.
            let _ = handle.try_send(message);
        }
    }

    /// Closes a connection after what is queued for it was delivered. Its `Closed` follows.
    pub fn close(&mut self, conn: ConnId, reason: &str) {
        if let Some(handle) = lock(&self.handles).get_mut(&conn) {
            handle.close(reason);
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.accepting.abort();
        for handle in lock(&self.handles).values_mut() {
            handle.close("the router stops");
        }
    }
}

/// A panic while the map was locked leaves it whole: every change is one insertion or removal.
fn lock(handles: &Handles) -> MutexGuard<'_, BTreeMap<ConnId, ControlHandle<RouterToNode>>> {
    handles.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone)]
struct Service {
    handles: Handles,
    events: mpsc::Sender<ControlServerEvent>,
    endpoint: Endpoint,
}

impl Service {
    async fn run(self, id: ConnId, conn: Connection) {
        let addr = conn.remote_address();
        let mut control = match Control::<RouterToNode, NodeToRouter>::accept(&self.endpoint, conn.clone()).await {
            Ok(control) => control,
            Err(e) => {
                tracing::warn!(%addr, "control connection without a control stream: {e}");
                return conn.close(CLOSE_REFUSED, e.to_string().as_bytes());
            }
        };
        let hello = match self.hello(&mut control).await {
            Ok(hello) => hello,
            Err(reason) => {
                tracing::warn!(%addr, "node refused: {reason}");
                return control.refuse(&RouterToNode::Refuse { reason: reason.clone() }, CLOSE_REFUSED, &reason).await;
            }
        };
        let (handle, queue) = ControlHandle::new(conn);
        lock(&self.handles).insert(id, handle);
        let (writer, reader) = control.into_halves();
        let event = |message| {
            if let NodeToRouter::Hello(_) = message {
                return Err("a second Hello".to_owned());
            }
            Ok(ControlServerEvent::Message { conn: id, message })
        };
        if self.events.send(ControlServerEvent::Joined { conn: id, addr, hello }).await.is_err() {
            return;
        }
        let reason = tokio::select! {
            reason = reader.run(&self.events, event) => reason,
            reason = writer.run(queue) => reason,
        };
        lock(&self.handles).remove(&id);
        let _ = self.events.send(ControlServerEvent::Closed { conn: id, reason }).await;
    }

    /// Who joins, as its certificate confirms.
    async fn hello(&self, control: &mut Control<RouterToNode, NodeToRouter>) -> Result<NodeHello, String> {
        let deadline = self.endpoint.options().handshake_deadline;
        let NodeToRouter::Hello(hello) = control.recv(deadline).await.map_err(|e| e.to_string())? else {
            self.endpoint.offences().count(Offence::Control);
            return Err("the first message is not Hello".to_owned());
        };
        match self.objection(control, &hello) {
            None => Ok(hello),
            Some(reason) => {
                self.endpoint.offences().count(Offence::Refused);
                Err(reason)
            }
        }
    }

    fn objection(&self, control: &Control<RouterToNode, NodeToRouter>, hello: &NodeHello) -> Option<String> {
        if hello.role == Role::Router {
            return Some("a router cannot join as a node".to_owned());
        }
        if let Err(e) = control.verify_peer(&hello.name, hello.role) {
            return Some(e.to_string());
        }
        let full = lock(&self.handles).len() >= MAX_NODES;
        full.then(|| format!("{MAX_NODES} nodes are connected already"))
    }
}

/// Dials the router and opens the control stream. The node then says `Hello` and hears `Welcome` or `Refuse`.
pub async fn connect_control(
    endpoint: &Endpoint,
    router: SocketAddr,
    name: &NodeName,
) -> Result<Control<NodeToRouter, RouterToNode>, JoinError> {
    let conn = endpoint.connect_router(router, name).await?;
    Ok(Control::open(endpoint, conn).await?)
}

/// Why the router could not be reached.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JoinError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectFailure),
    /// No control stream.
    #[error(transparent)]
    Control(#[from] ControlError),
}
