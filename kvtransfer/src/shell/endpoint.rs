//! One QUIC endpoint per process: it dials, it accepts, and it hands accepted connections to whoever serves their ALPN.

use super::ca::dns_name;
use super::offences::{Offence, Offences};
use super::path::Metering;
use super::presence::{self, Gone};
use super::socket::CappedSocket;
use super::tls::{NodeTls, PeerError, TlsError, verify_peer};
use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig};
use quinn::{Connection, EndpointConfig, Runtime, TokioRuntime, TransportConfig, VarInt};
use ridge_protocol::stats::ProtocolErrors;
use ridge_protocol::{Duration, NodeName, Role, limits};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Semaphore, mpsc};

/// Nothing is wrong; the peer is no longer needed.
pub(crate) const CLOSE_DONE: VarInt = VarInt::from_u32(0);
/// The peer may not do what it wants to do.
pub(crate) const CLOSE_REFUSED: VarInt = VarInt::from_u32(1);
/// The peer broke the protocol.
pub(crate) const CLOSE_PROTOCOL: VarInt = VarInt::from_u32(2);
/// A queue towards the peer is full.
pub(crate) const CLOSE_OVERLOAD: VarInt = VarInt::from_u32(3);
/// The peer's process is gone: nobody will read this.
const CLOSE_GONE: VarInt = VarInt::from_u32(4);

/// Handshakes under way at once; one more is refused.
const MAX_HANDSHAKES: usize = 64;
/// Accepted connections waiting for their server's task.
const ACCEPT_QUEUE: usize = 16;
/// Unidirectional streams a peer may have open: at most this many transfers interleave on one connection.
pub(crate) const MAX_PAGE_STREAMS: u32 = 64;
/// The control stream and one to spare.
const MAX_CONTROL_STREAMS: u32 = 2;

/// Least that a peer may have in flight, in bytes, however small the socket's buffer is: congestion control copes with what
/// is lost then, and nothing copes with a window that is too small for a long path.
const MIN_CONNECTION_WINDOW: u32 = 4 << 20;

/// Congestion control of an endpoint's connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Congestion {
    /// The safe choice on a shared network.
    #[default]
    Cubic,
    /// The textbook one.
    NewReno,
    /// Version 1 of BBR, as quinn ports it.
    Bbr,
}

/// How an endpoint's connections behave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransportOptions {
    /// Largest UDP payload that is tried. `None`: 65000 when bound to loopback, else 8952, which fits jumbo frames;
    /// the path's real limit is discovered below it.
    pub mtu: Option<u16>,
    /// Congestion control.
    pub congestion: Congestion,
    /// Congestion window at the start, in bytes. `None`: 64 MiB when bound to loopback, where nothing is congested and pacing
    /// would only wait for timers, else 4 MiB, large because these links are short and owned.
    pub initial_window: Option<u64>,
    /// Unread bytes the peer may have in flight per stream.
    pub stream_window: u32,
    /// Unread bytes the peer may have in flight per connection: bounds receive memory. Cut to what the socket's receive
    /// buffer holds.
    pub connection_window: u32,
    /// Unacknowledged bytes kept per connection: bounds send memory.
    pub send_window: u64,
    /// Kernel buffer asked for each way. Raise net.core.rmem_max and wmem_max to get it.
    pub socket_buffer: usize,
    /// How often an idle connection shows that it lives.
    pub keep_alive: Duration,
    /// After how long a silent peer is lost.
    pub idle_timeout: Duration,
    /// How long TLS, ALPN and the first message of a connection may take together.
    pub handshake_deadline: Duration,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            mtu: None,
            congestion: Congestion::Cubic,
            initial_window: None,
            stream_window: 64 << 20,
            connection_window: 256 << 20,
            send_window: 64 << 20,
            socket_buffer: 32 << 20,
            keep_alive: Duration::from_millis(200),
            idle_timeout: Duration::from_secs(1),
            handshake_deadline: Duration::from_secs(5),
        }
    }
}

/// Why an endpoint could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The socket could not be bound or configured.
    #[error("UDP socket {addr}: {error}")]
    Socket {
        /// The address asked for.
        addr: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The TLS part was refused.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An option is out of range.
    #[error("transport option {0} is out of range")]
    Option(&'static str),
}

/// Why a peer could not be reached.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConnectFailure {
    /// quinn would not start.
    #[error("cannot dial {name} at {addr}: {reason}")]
    Dial {
        /// Whom.
        name: NodeName,
        /// Where.
        addr: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Nobody answered, or TLS failed.
    #[error("no connection to {name} at {addr}: {reason}")]
    Handshake {
        /// Whom.
        name: NodeName,
        /// Where.
        addr: SocketAddr,
        /// Why.
        reason: String,
    },
    /// It answered and is somebody else.
    #[error(transparent)]
    Peer(#[from] PeerError),
}

type Services = BTreeMap<Vec<u8>, mpsc::Sender<Connection>>;

/// A process's one QUIC endpoint. Clones share it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    control: quinn::ClientConfig,
    kv: quinn::ClientConfig,
    services: Arc<Mutex<Services>>,
    options: Arc<TransportOptions>,
    offences: Offences,
}

impl Endpoint {
    /// Binds `addr` and starts accepting. Needs a running tokio runtime, which then drives all its connections.
    pub fn bind(addr: SocketAddr, tls: &NodeTls, options: &TransportOptions) -> Result<Self, EndpointError> {
        let loopback = addr.ip().is_loopback();
        let mtu = options.mtu.unwrap_or(if loopback { 65_000 } else { 8_952 }).max(1200);
        let initial_window = options.initial_window.unwrap_or(if loopback { 64 << 20 } else { 4 << 20 });
        let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime);
        let socket_error = |error| EndpointError::Socket { addr, error };
        let socket = CappedSocket::bind(addr, mtu, options.socket_buffer, &*runtime).map_err(socket_error)?;
        // What a peer has in flight may all wait in the socket at once: more than fits there would be lost.
        let buffer = u32::try_from(socket.receive_buffer()).unwrap_or(u32::MAX).max(MIN_CONNECTION_WINDOW);
        let transport =
            Arc::new(transport_config(mtu, options, initial_window, options.connection_window.min(buffer))?);
        let client = |crypto: QuicClientConfig| {
            let mut config = quinn::ClientConfig::new(Arc::new(crypto));
            config.transport_config(transport.clone());
            config
        };
        let control = client(tls.client(limits::ALPN_CONTROL)?);
        let kv = client(tls.client(limits::ALPN_KV)?);
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls.server()?));
        server.transport_config(transport.clone());
        // Nodes do not change their address; a packet from elsewhere is not theirs.
        server.migration(false);
        let mut endpoint_config = EndpointConfig::default();
        endpoint_config.max_udp_payload_size(mtu).map_err(|_| EndpointError::Option("mtu"))?;
        let inner = quinn::Endpoint::new_with_abstract_socket(endpoint_config, Some(server), Arc::new(socket), runtime)
            .map_err(socket_error)?;
        let services = Arc::new(Mutex::new(Services::new()));
        let offences = Offences::default();
        tokio::spawn(accept_loop(inner.clone(), services.clone(), options.clone(), offences.clone()));
        Ok(Self { inner, control, kv, services, options: Arc::new(options.clone()), offences })
    }

    /// The address it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.local_addr().expect("a bound UDP socket has an address")
    }

    /// The options it was made with.
    pub fn options(&self) -> &TransportOptions {
        &self.options
    }

    /// What peers did wrong so far.
    pub fn protocol_errors(&self) -> ProtocolErrors {
        self.offences.report()
    }

    pub(crate) fn offences(&self) -> &Offences {
        &self.offences
    }

    /// Closes every connection and stops accepting; give [`wait_idle`](Self::wait_idle) a moment after it.
    pub fn close(&self, reason: &str) {
        self.inner.close(CLOSE_DONE, reason.as_bytes());
    }

    /// Until every peer was told that its connection is closed.
    pub async fn wait_idle(&self) {
        self.inner.wait_idle().await;
    }

    /// Dials a decode node's KV service.
    pub(crate) async fn connect_kv(&self, addr: SocketAddr, name: &NodeName) -> Result<Connection, ConnectFailure> {
        self.connect(self.kv.clone(), addr, name, Role::Decode).await
    }

    /// Dials the router's control service.
    pub(crate) async fn connect_router(&self, addr: SocketAddr, name: &NodeName) -> Result<Connection, ConnectFailure> {
        self.connect(self.control.clone(), addr, name, Role::Router).await
    }

    /// TLS checks that the peer's certificate carries `<name>.ridge`; the role is checked after it.
    async fn connect(
        &self,
        config: quinn::ClientConfig,
        addr: SocketAddr,
        name: &NodeName,
        role: Role,
    ) -> Result<Connection, ConnectFailure> {
        let handshake = |reason: String| ConnectFailure::Handshake { name: name.clone(), addr, reason };
        let connecting = self.inner.connect_with(config, addr, &dns_name(name)).map_err(|e| ConnectFailure::Dial {
            name: name.clone(),
            addr,
            reason: e.to_string(),
        })?;
        let deadline = self.options.handshake_deadline;
        let conn = tokio::time::timeout(deadline, connecting)
            .await
            .map_err(|_| handshake(format!("no answer within {deadline:?}")))?
            .map_err(|e| {
                // Whoever is there is not of this cluster, or not the one that was dialed. A peer that is not there is no
                // offender.
                if let quinn::ConnectionError::TransportError(_) = e {
                    self.offences.count(Offence::Handshake);
                }
                handshake(e.to_string())
            })?;
        if let Err(e) = verify_peer(&conn, name, role) {
            self.offences.count(Offence::Refused);
            conn.close(CLOSE_REFUSED, e.to_string().as_bytes());
            return Err(e.into());
        }
        tokio::spawn(watch(conn.clone(), self.options.keep_alive));
        Ok(conn)
    }

    /// From now on, accepted connections of this ALPN come out here. The latest caller gets them.
    pub(crate) fn serve(&self, alpn: &[u8]) -> mpsc::Receiver<Connection> {
        let (to, from) = mpsc::channel(ACCEPT_QUEUE);
        lock(&self.services).insert(alpn.to_vec(), to);
        from
    }
}

/// A panic while the map was locked leaves it whole: it is only ever inserted into or read.
fn lock(services: &Mutex<Services>) -> MutexGuard<'_, Services> {
    services.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept_loop(
    endpoint: quinn::Endpoint,
    services: Arc<Mutex<Services>>,
    options: TransportOptions,
    offences: Offences,
) {
    let (deadline, keep_alive) = (options.handshake_deadline, options.keep_alive);
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        let from = incoming.remote_address();
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            tracing::warn!(%from, "connection refused: {MAX_HANDSHAKES} handshakes are under way");
            incoming.refuse();
            continue;
        };
        let (services, offences) = (services.clone(), offences.clone());
        tokio::spawn(async move {
            let shaken = tokio::time::timeout(deadline, async { incoming.await }).await;
            drop(permit);
            let shaken = match shaken {
                Ok(Ok(conn)) => Ok(conn),
                Ok(Err(e)) => Err(format!("handshake failed: {e}")),
                Err(_) => Err(format!("handshake took more than {deadline:?}")),
            };
            let conn = match shaken {
                Ok(conn) => conn,
                Err(reason) => {
                    offences.count(Offence::Handshake);
                    return tracing::warn!(%from, "{reason}");
                }
            };
            tokio::spawn(watch(conn.clone(), keep_alive));
            let alpn = alpn_of(&conn).unwrap_or_default();
            let service = lock(&services).get(&alpn).cloned();
            match service {
                // A full queue waits here, in this connection's own task.
                Some(service) if service.send(conn.clone()).await.is_ok() => {}
                _ => {
                    offences.count(Offence::Refused);
                    let what = String::from_utf8_lossy(&alpn).into_owned();
                    conn.close(CLOSE_REFUSED, format!("this node does not serve {what:?}").as_bytes());
                }
            }
        });
    }
}

/// Closes a connection as soon as its peer's process is known to be gone.
async fn watch(conn: Connection, keep_alive: Duration) {
    if presence::watch(&conn, keep_alive).await == Gone::Yes {
        tracing::info!(peer = %conn.remote_address(), "the peer's process is gone: its port is closed");
        conn.close(CLOSE_GONE, b"the peer's process is gone");
    }
}

fn alpn_of(conn: &Connection) -> Option<Vec<u8>> {
    conn.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

fn transport_config(
    mtu: u16,
    options: &TransportOptions,
    initial_window: u64,
    connection_window: u32,
) -> Result<TransportConfig, EndpointError> {
    let mut config = TransportConfig::default();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(mtu);
    let idle = options.idle_timeout.try_into().map_err(|_| EndpointError::Option("idle_timeout"))?;
    let congestion: Arc<dyn ControllerFactory + Send + Sync> = match options.congestion {
        Congestion::Cubic => {
            let mut cubic = CubicConfig::default();
            cubic.initial_window(initial_window);
            Arc::new(cubic)
        }
        Congestion::NewReno => {
            let mut reno = NewRenoConfig::default();
            reno.initial_window(initial_window);
            Arc::new(reno)
        }
        Congestion::Bbr => {
            let mut bbr = BbrConfig::default();
            bbr.initial_window(initial_window);
            Arc::new(bbr)
        }
    };
    config
        .max_concurrent_uni_streams(MAX_PAGE_STREAMS.into())
        .max_concurrent_bidi_streams(MAX_CONTROL_STREAMS.into())
        .stream_receive_window(options.stream_window.into())
        .receive_window(connection_window.into())
        .send_window(options.send_window)
        // One transfer after the other completes sooner than all of them at the same late time.
        .send_fairness(false)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(options.keep_alive))
        .mtu_discovery_config(Some(discovery))
        .initial_rtt(Duration::from_millis(5))
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(Metering(congestion)));
    Ok(config)
}
