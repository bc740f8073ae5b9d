//! The router's loop.

use super::gateway::{ClusterView, Gateway, GatewayRequest};
use super::http::{self, HttpConfig};
use super::probe::Probe;
use super::served::Served;
use crate::machine::{ClientId, ModelDigests, ReplyEvent, Router, RouterConfig, RouterInput, RouterOutput};
use ridge_kvtransfer::shell::process::{Clock, Status};
use ridge_kvtransfer::shell::record::{RecordError, RecordOptions, Recorded};
use ridge_kvtransfer::shell::{
    ConnId, ControlServer, ControlServerEvent, Endpoint, EndpointError, NodeTls, TlsError, TransportOptions,
};
use ridge_model::checkpoint::{Checkpoint, LoadError, LoadOptions, ModelSource, load};
use ridge_protocol::wire::NodeHello;
use ridge_protocol::{Duration, Machine, NodeId, NodeName, Role, TokenId};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};

/// Submissions that wait for the loop.
const REQUESTS: usize = 4096;
/// Node messages that wait for the loop.
const NODE_EVENTS: usize = 4096;
/// How often the cluster's state is republished.
const VIEW_INTERVAL: Duration = Duration::from_millis(100);
/// Longest golden prompt, in tokens.
const PROBE_TOKENS: usize = 8;

/// How a router is set up.
#[derive(Clone)]
pub struct RouterOptions {
    /// Its name, as in its certificate.
    pub name: NodeName,
    /// UDP address for the nodes; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Folder with `ca.pem`, `node.pem` and `node.key`.
    pub tls_dir: PathBuf,
    /// QUIC settings.
    pub transport: TransportOptions,
    /// The served model: only its tokenizer and template are used here.
    pub model: String,
    /// Longest prompt plus answer; `None` takes what the model was made for.
    pub max_model_len: Option<usize>,
    /// HTTP settings. `served_model_names` may be empty, `max_model_len` is overwritten.
    pub http: HttpConfig,
    /// Limits and deadlines.
    pub machine: RouterConfig,
    /// The cluster is meant to have prefill nodes: without one it is degraded.
    pub expect_prefill: bool,
    /// Where its machine is recorded, if it is.
    pub record: Option<RecordOptions>,
}

/// Why a router stopped.
#[derive(Debug, thiserror::Error)]
pub enum RouterRunError {
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The certificates could not be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The UDP socket could not be had.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The recording that was asked for could not be begun.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The HTTP port could not be had.
    #[error("cannot listen on {addr}: {error}; choose another with --port, or stop what uses it")]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The HTTP server failed.
    #[error("HTTP server: {0}")]
    Http(std::io::Error),
}

/// Everything that can wake the loop.
enum Event {
    Gateway(GatewayRequest),
    Node(ControlServerEvent),
    Timer,
    View,
    HttpOver(Result<std::io::Result<()>, tokio::task::JoinError>),
    Shutdown,
}

/// Runs a router until `shutdown`, then lets answers finish.
pub async fn run(options: RouterOptions, shutdown: impl Future<Output = ()>) -> Result<(), RouterRunError> {
    let tls = NodeTls::read(&options.tls_dir.join("ca.pem"), &options.tls_dir)?;
    let bind = options.http.bind;
    let listener = TcpListener::bind(bind).await.map_err(|error| RouterRunError::Listen { addr: bind, error })?;
    let http_addr = listener.local_addr().map_err(|error| RouterRunError::Listen { addr: bind, error })?;
    let endpoint = Endpoint::bind(options.listen, &tls, &options.transport)?;
    let checkpoint = load(&ModelSource::parse(&options.model)?, &LoadOptions::default(), &mut |_| {})?;
    let mut config = options.http;
    config.bind = http_addr;
    config.max_model_len = options.max_model_len.unwrap_or(checkpoint.spec.context).min(checkpoint.spec.context) as u32;
    if config.served_model_names.is_empty() {
        config.served_model_names.push(checkpoint.name.clone());
    }
    let machine = RouterConfig {
        model: Some(ModelDigests {
            weights: checkpoint.weights_digest,
            config: checkpoint.config_digest,
            tokenizer: checkpoint.tokenizer_digest,
        }),
        ..options.machine
    };
    // Dispatch numbers of a restarted router lie above its predecessor's: one per nanosecond cannot be reached.
    let first_request = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    let machine = Recorded::start(&options.name, (machine, first_request), options.record.as_ref())?;
    let probe = Probe::new(golden_prompt(&checkpoint), options.expect_prefill);

    let (requests, mut from_gateway) = mpsc::channel(REQUESTS);
    let (view, view_receiver) = watch::channel(Arc::new(ClusterView::default()));
    let gateway = Gateway::new(requests, view_receiver);
    let (stop_http, http_stopped) = oneshot::channel::<()>();
    let served = Arc::new(Served::new(checkpoint));
    let mut http_task = tokio::spawn(http::serve(listener, config, served, gateway, async move {
        // The sender is dropped only with the loop, and then the server must stop too.
        let _ = http_stopped.await;
    }));
    let (node_events, mut from_nodes) = mpsc::channel(NODE_EVENTS);
    let server = ControlServer::new(endpoint.clone(), node_events);
    let addr = endpoint.local_addr();
    Status::Ready { role: Role::Router, name: &options.name, addr, http: Some(http_addr) }.print();

    let mut shell = Shell {
        clock: Clock::start(),
        machine,
        endpoint: endpoint.clone(),
        server,
        connections: BTreeMap::new(),
        next_node: 0,
        readers: BTreeMap::new(),
        probe,
        salt: first_request,
    };
    let mut shutdown = std::pin::pin!(shutdown);
    let mut stop_http = Some(stop_http);
    let mut ticks = tokio::time::interval(VIEW_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        shell.pump();
        let deadline = shell.machine.poll_timeout();
        let event = tokio::select! {
            Some(request) = from_gateway.recv() => Event::Gateway(request),
            Some(event) = from_nodes.recv() => Event::Node(event),
            () = shell.clock.sleep_until(deadline) => Event::Timer,
            _ = ticks.tick() => Event::View,
            over = &mut http_task => Event::HttpOver(over),
            () = &mut shutdown, if stop_http.is_some() => Event::Shutdown,
        };
        match event {
            Event::Gateway(request) => shell.on_gateway(request),
            Event::Node(event) => shell.on_node(event),
            Event::Timer => shell.machine.handle_timeout(shell.clock.now()),
            Event::View => {
                shell.probe();
                let _ = view.send(Arc::new(shell.view()));
            }
            Event::Shutdown => stop_http = None,
            Event::HttpOver(result) => {
                drop(shell);
                endpoint.close("the router is shutting down");
                let _ = tokio::time::timeout(Duration::from_millis(300), endpoint.wait_idle()).await;
                return match result {
                    Ok(result) => result.map_err(RouterRunError::Http),
                    Err(panic) => Err(RouterRunError::Http(std::io::Error::other(panic))),
                };
            }
        }
    }
}

/// A few ordinary tokens.
fn golden_prompt(checkpoint: &Checkpoint) -> Vec<TokenId> {
    let mut tokens = checkpoint.tokenizer.encode("Hello, world", true).unwrap_or_default();
    tokens.truncate(PROBE_TOKENS.min(checkpoint.spec.context.saturating_sub(3)).max(1));
    if tokens.is_empty() {
        tokens.push(0);
    }
    tokens
}

/// The machine and what its outputs act on.
struct Shell {
    clock: Clock,
    machine: Recorded<Router>,
    endpoint: Endpoint,
    server: ControlServer,
    /// Connections by node number.
    connections: BTreeMap<NodeId, ConnId>,
    next_node: u32,
    /// Where each client's events go.
    readers: BTreeMap<ClientId, mpsc::Sender<ReplyEvent>>,
    probe: Probe,
    /// Fresh for every probe.
    salt: u64,
}

impl Shell {
    fn on_gateway(&mut self, request: GatewayRequest) {
        let now = self.clock.now();
        match request {
            GatewayRequest::Submit(submit, reader) => {
                self.readers.insert(submit.client, reader);
                self.machine.handle(now, RouterInput::Submit(submit));
            }
            GatewayRequest::Gone(client) => {
                self.readers.remove(&client);
                self.machine.handle(now, RouterInput::ClientGone(client));
            }
            GatewayRequest::DrainNode(name, answer) => {
                let node = self.machine.nodes().into_iter().find(|node| node.hello.name == name);
                if let Some(node) = &node {
                    tracing::info!(%name, in_flight = node.in_flight, "draining a node");
                    self.machine.handle(now, RouterInput::DrainNode(node.node));
                }
                // Whoever asked may have left.
                let _ = answer.send(node.is_some());
            }
        }
    }

    fn on_node(&mut self, event: ControlServerEvent) {
        let now = self.clock.now();
        match event {
            ControlServerEvent::Joined { conn, addr, hello } => {
                let node = NodeId(self.next_node);
                self.next_node += 1;
                self.connections.insert(node, conn);
                let hello = reachable(hello, addr);
                tracing::info!(name = %hello.name, role = %hello.role, %addr, node = node.0, "node joined");
                self.machine.handle(now, RouterInput::NodeUp { node, hello });
                self.probe();
            }
            ControlServerEvent::Message { conn, message } => {
                if let Some(node) = self.node_of(conn) {
                    self.machine.handle(now, RouterInput::Node { node, message });
                }
            }
            ControlServerEvent::Closed { conn, reason } => {
                if let Some(node) = self.node_of(conn) {
                    tracing::warn!(node = node.0, %reason, "node lost");
                    self.connections.remove(&node);
                    self.machine.handle(now, RouterInput::NodeLost { node, reason });
                }
            }
        }
    }

    fn node_of(&self, conn: ConnId) -> Option<NodeId> {
        self.connections.iter().find(|(_, c)| **c == conn).map(|(node, _)| *node)
    }

    /// Does what the machine wants done, until it wants nothing.
    fn pump(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            self.act(output);
        }
    }

    /// Sends a golden prompt if one is due.
    fn probe(&mut self) {
        let nodes = self.machine.nodes();
        if let Some(submit) = self.probe.poll(&nodes, self.salt) {
            self.salt = self.salt.wrapping_add(1);
            self.machine.handle(self.clock.now(), RouterInput::Submit(submit));
        }
    }

    fn act(&mut self, output: RouterOutput) {
        match output {
            RouterOutput::Send { node, message } => {
                if let Some(conn) = self.connections.get(&node) {
                    self.server.send(*conn, message);
                }
            }
            RouterOutput::Close { node, reason } => {
                tracing::warn!(node = node.0, %reason, "node turned away");
                if let Some(conn) = self.connections.remove(&node) {
                    self.server.close(conn, &reason);
                }
            }
            RouterOutput::Reply { client, event } if self.probe.owns(client) => {
                if self.probe.on_reply(client, &event) {
                    Status::Serving.print();
                }
            }
            RouterOutput::Reply { client, event } => {
                let last = !matches!(event, ReplyEvent::Token { .. });
                let Some(reader) = self.readers.get(&client) else { return };
                let unread = reader.try_send(event).is_err();
                if last || unread {
                    self.readers.remove(&client);
                }
                if unread && !last {
                    // It reads too slowly or not at all; dropping the sender tells it so.
                    self.machine.handle(self.clock.now(), RouterInput::ClientGone(client));
                }
            }
            RouterOutput::Drained => {}
        }
    }

    fn view(&self) -> ClusterView {
        let mut nodes = self.machine.nodes();
        nodes.sort_by(|a, b| a.hello.name.cmp(&b.hello.name));
        ClusterView {
            health: self.probe.health(),
            nodes,
            router: self.machine.stats(),
            recordings_stopped: self.machine.recordings_stopped(),
            protocol_errors: self.endpoint.protocol_errors(),
        }
    }
}

/// A node bound to every address does not know which one others reach it by: the one it dialed from is good.
fn reachable(mut hello: NodeHello, from: SocketAddr) -> NodeHello {
    if let Some(addr) = &mut hello.kv_addr
        && addr.ip().is_unspecified()
    {
        addr.set_ip(from.ip());
    }
    hello
}
