//! The HTTP side's handle on the router's loop: submit a sequence, read its events, see the cluster.

use crate::machine::{ClientId, NodeView, ReplyEvent, RouterError, RouterStats, Submit};
use ridge_protocol::stats::ProtocolErrors;
use ridge_protocol::{NodeName, SamplingParams, TokenId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, oneshot, watch};

/// Events buffered per sequence before the router's loop drops a reader that does not keep up.
pub const REPLY_BUFFER: usize = 4096;

/// What the HTTP side asks of the router's loop.
#[derive(Debug)]
pub enum GatewayRequest {
    /// Serve a sequence and send its events here.
    Submit(Submit, mpsc::Sender<ReplyEvent>),
    /// Nobody reads that sequence's events any more.
    Gone(ClientId),
    /// Drain the node of that name; says whether there is one.
    DrainNode(NodeName, oneshot::Sender<bool>),
}

/// The state of the cluster, republished by the router's loop about every 100 ms.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    /// What `/health` says.
    pub health: Health,
    /// Connected nodes, by name.
    pub nodes: Vec<NodeView>,
    /// The router's own counters.
    pub router: RouterStats,
    /// Recordings of the router (`--record`) that were given up.
    pub recordings_stopped: u32,
    /// What peers did wrong at the router's endpoint.
    pub protocol_errors: ProtocolErrors,
}

/// Whether a prompt would be answered now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Health {
    /// Yes, by way of every kind of node that the cluster is meant to have.
    Ready,
    /// Yes, but this is missing.
    Degraded(String),
    /// No, for this reason.
    Unavailable(String),
}

impl Default for Health {
    fn default() -> Self {
        Self::Unavailable("the router has only just started".into())
    }
}

/// A cloneable handle on the router's loop.
#[derive(Clone, Debug)]
pub struct Gateway {
    requests: mpsc::Sender<GatewayRequest>,
    view: watch::Receiver<Arc<ClusterView>>,
    next_client: Arc<AtomicU64>,
}

impl Gateway {
    /// Connects to a loop that reads `requests` and publishes `view`.
    pub fn new(requests: mpsc::Sender<GatewayRequest>, view: watch::Receiver<Arc<ClusterView>>) -> Self {
        Self { requests, view, next_client: Arc::new(AtomicU64::new(1)) }
    }

    /// Submits one sequence. Dropping the submission tells the cluster to forget it.
    pub fn submit(&self, tokens: Vec<TokenId>, params: SamplingParams, salt: u64) -> Result<Submission, RouterError> {
        let client = ClientId(self.next_client.fetch_add(1, Ordering::Relaxed));
        let (sender, events) = mpsc::channel(REPLY_BUFFER);
        self.requests
            .try_send(GatewayRequest::Submit(Submit { client, tokens, params, salt, whole_path: false }, sender))
            .map_err(|_| RouterError::Overloaded("the router's queue is full".into()))?;
        Ok(Submission { client, events, requests: self.requests.clone(), over: false })
    }

    /// Asks for a node to be drained. `false`: no node of that name is connected.
    pub async fn drain_node(&self, node: NodeName) -> Result<bool, RouterError> {
        let (answer, answered) = oneshot::channel();
        self.requests
            .try_send(GatewayRequest::DrainNode(node, answer))
            .map_err(|_| RouterError::Overloaded("the router's queue is full".into()))?;
        answered.await.map_err(|_| RouterError::Unavailable("the router stopped".into()))
    }

    /// The cluster as last published.
    pub fn view(&self) -> Arc<ClusterView> {
        self.view.borrow().clone()
    }
}

/// The answer to one sequence as it is being made.
#[derive(Debug)]
pub struct Submission {
    client: ClientId,
    events: mpsc::Receiver<ReplyEvent>,
    requests: mpsc::Sender<GatewayRequest>,
    over: bool,
}

impl Submission {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<ReplyEvent> {
        if self.over {
            return None;
        }
        let event = self.events.recv().await.unwrap_or_else(|| {
            ReplyEvent::Failed(RouterError::Unavailable(
                "the router stopped, or the answer was not read in time".into(),
            ))
        });
        self.over = !matches!(event, ReplyEvent::Token { .. });
        Some(event)
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let gone = GatewayRequest::Gone(self.client);
        if let Err(mpsc::error::TrySendError::Full(gone)) = self.requests.try_send(gone) {
            // The queue is full: hand the message to a task, so that the sequence is forgotten all the same.
            let requests = self.requests.clone();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { requests.send(gone).await });
            }
        }
    }
}
