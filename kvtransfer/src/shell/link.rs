//! A node's link to the router: dials, says hello, carries messages, and dials again when it breaks.

use super::offences::Offence;
use super::{Control, ControlEvent, ControlHandle, Endpoint, TransportOptions, connect_control};
use ridge_protocol::wire::{NodeHello, NodeToRouter, RouterToNode};
use ridge_protocol::{Duration, NodeId, NodeName};
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::sync::mpsc;

/// Messages from the router that wait for the node's loop.
const EVENTS: usize = 1024;
/// How long a leaving node's last messages may take to reach the router.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);
/// How long peers may take to acknowledge that a connection is closed.
const GOODBYE_DEADLINE: Duration = Duration::from_millis(300);
/// First and longest pause between two attempts to reach the router.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How a node takes part in its cluster's network.
#[derive(Clone, PartialEq, Debug)]
pub struct LinkOptions {
    /// The node's name, as in its certificate.
    pub name: NodeName,
    /// UDP address of its one endpoint; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Where others reach it, if that is not the address of its endpoint.
    pub advertise: Option<SocketAddr>,
    /// Where the router listens.
    pub router: SocketAddr,
    /// The router's name, as in its certificate.
    pub router_name: NodeName,
    /// Folder with `ca.pem`, `node.pem` and `node.key`.
    pub tls_dir: PathBuf,
    /// QUIC settings.
    pub transport: TransportOptions,
}

/// What happens on the link.
#[derive(Debug)]
pub enum LinkEvent {
    /// The router took the node in; messages go through this handle from now on.
    Up(NodeId, ControlHandle<NodeToRouter>),
    /// The router said something.
    Message(RouterToNode),
    /// The connection ended; another `Up` may follow.
    Down(String),
    /// The router will not have this node; there is no use in trying again.
    Refused(String),
}

/// Starts dialing. Events end when the receiver is dropped.
pub fn start(endpoint: Endpoint, options: &LinkOptions, hello: NodeHello) -> mpsc::Receiver<LinkEvent> {
    let (events, receiver) = mpsc::channel(EVENTS);
    tokio::spawn(run(endpoint, options.router, options.router_name.clone(), hello, events));
    receiver
}

/// Leaves the cluster for good: what was said to the router arrives, then every connection is closed.
pub async fn leave(
    endpoint: &Endpoint,
    router: Option<ControlHandle<NodeToRouter>>,
    events: &mut mpsc::Receiver<LinkEvent>,
) {
    const REASON: &str = "the node is shutting down";
    if let Some(mut router) = router {
        router.close(REASON);
        let down = async { while !matches!(events.recv().await, None | Some(LinkEvent::Down(_))) {} };
        let _ = tokio::time::timeout(FLUSH_DEADLINE, down).await;
    }
    endpoint.close(REASON);
    let _ = tokio::time::timeout(GOODBYE_DEADLINE, endpoint.wait_idle()).await;
}

async fn run(
    endpoint: Endpoint,
    router: SocketAddr,
    router_name: NodeName,
    hello: NodeHello,
    events: mpsc::Sender<LinkEvent>,
) {
    let mut pause = BACKOFF.0;
    loop {
        match session(&endpoint, router, &router_name, &hello, &events).await {
            Ok(reason) => {
                pause = BACKOFF.0;
                tracing::info!(%reason, "the link to the router is down");
                if events.send(LinkEvent::Down(reason)).await.is_err() {
                    return;
                }
            }
            Err(Failure::Refused(reason)) => {
                let _ = events.send(LinkEvent::Refused(reason)).await;
                return;
            }
            Err(Failure::Unreachable(reason)) => {
                tracing::info!(%router, "the router cannot be reached: {reason}");
                if events.is_closed() {
                    return;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

enum Failure {
    Unreachable(String),
    Refused(String),
}

/// One connection from dialing to its end; `Ok` says why it ended.
async fn session(
    endpoint: &Endpoint,
    router: SocketAddr,
    router_name: &NodeName,
    hello: &NodeHello,
    events: &mpsc::Sender<LinkEvent>,
) -> Result<String, Failure> {
    let unreachable = |e: &dyn std::fmt::Display| Failure::Unreachable(e.to_string());
    let mut control: Control<NodeToRouter, RouterToNode> =
        connect_control(endpoint, router, router_name).await.map_err(|e| unreachable(&e))?;
    control.send(&NodeToRouter::Hello(hello.clone())).await.map_err(|e| unreachable(&e))?;
    let deadline = endpoint.options().handshake_deadline;
    let node = match control.recv(deadline).await.map_err(|e| unreachable(&e))? {
        RouterToNode::Welcome { node } => node,
        RouterToNode::Refuse { reason } => return Err(Failure::Refused(reason)),
        other => {
            endpoint.offences().count(Offence::Control);
            return Err(Failure::Unreachable(format!("the router answered a hello with {other:?}")));
        }
    };
    let (handle, mut incoming) = control.split(EVENTS);
    if events.send(LinkEvent::Up(node, handle)).await.is_err() {
        return Ok("the node is shutting down".into());
    }
    loop {
        match incoming.recv().await {
            Some(ControlEvent::Message(message)) => {
                if events.send(LinkEvent::Message(message)).await.is_err() {
                    return Ok("the node is shutting down".into());
                }
            }
            Some(ControlEvent::Closed(reason)) => return Ok(reason),
            None => return Ok("the control stream ended".into()),
        }
    }
}
