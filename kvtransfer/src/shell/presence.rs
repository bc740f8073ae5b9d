//! Whether a silent peer's process is still there, asked of its host.
//!
//! A process that is killed says no goodbye, and its connections would be missed only when their idle timeout passes: a busy or
//! stalled process is silent too, and must be given that time. But a host answers for a port that nobody has bound any more ("port
//! unreachable", ICMP), and a connected UDP socket reports that as a refusal. So a connection that has heard nothing for a
//! tenth of a second tries its peer's port from a socket of its own, with a byte that no QUIC endpoint takes for anything.
//!
//! ```text
//! while the peer is known to live:  a port that is refused now is refused by something between us: never ask again
//! every tick without a datagram:    refused twice in a row, and still nothing heard: the process is gone
//! ```
//!
//! What is between two hosts may drop the answer; then the idle timeout is the bound, as it is for a host that is gone (rule P-5).

use quinn::Connection;
use ridge_protocol::Duration;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use tokio::net::UdpSocket;

/// A packet whose first bit says that it is none of QUIC's version 1, and which is too short for any.
const PROBE: [u8; 1] = [0];
/// Between two refusals: long enough for a datagram that was on its way.
const CONFIRM_AFTER: Duration = Duration::from_millis(20);
/// Time without a datagram that counts as silence. A byte ten times a second costs nothing; half a keep-alive interval is enough
/// where that is shorter.
const TICK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(100));

/// Until the connection is closed, or until its peer's process is found to be gone. `keep_alive` is how often an idle peer shows
/// itself.
pub(crate) async fn watch(conn: &Connection, keep_alive: Duration) -> Gone {
    let tick = (keep_alive / 2).clamp(TICK.0, TICK.1);
    tokio::select! {
        _ = conn.closed() => Gone::No,
        () = refused_for_good(conn, tick) => Gone::Yes,
    }
}

/// What [`watch`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Gone {
    /// The connection ended otherwise.
    No,
    /// Nobody has the peer's port.
    Yes,
}

async fn refused_for_good(conn: &Connection, tick: Duration) {
    // What comes back comes within a round trip or two.
    let patience = conn.rtt() * 4 + CONFIRM_AFTER;
    let Ok(port) = Port::of(conn.remote_address()).await else { return std::future::pending().await };
    if port.is_refused(patience).await {
        tracing::debug!(peer = %conn.remote_address(), "the port of a living peer seems closed: its death is seen by silence");
        return std::future::pending().await;
    }
    let mut heard = datagrams(conn);
    loop {
        tokio::time::sleep(tick).await;
        let now = datagrams(conn);
        if std::mem::replace(&mut heard, now) != now || !port.is_refused(patience).await {
            continue;
        }
        tokio::time::sleep(CONFIRM_AFTER).await;
        if port.is_refused(patience).await && datagrams(conn) == heard {
            return;
        }
    }
}

fn datagrams(conn: &Connection) -> u64 {
    conn.stats().udp_rx.datagrams
}

/// Somebody else's UDP port.
struct Port(UdpSocket);

impl Port {
    async fn of(addr: SocketAddr) -> io::Result<Self> {
        let any: SocketAddr = match addr {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(addr).await?;
        Ok(Self(socket))
    }

    /// Tries it once. An answer is an error of the socket, of which its readiness to read says nothing: it is asked for, first
    /// at once, as the answer of this very host is there by then.
    async fn is_refused(&self, patience: Duration) -> bool {
        if let Err(error) = self.0.send(&PROBE).await {
            return refuses(&error); // The answer to an earlier one.
        }
        if self.has_answer() {
            return true;
        }
        tokio::time::sleep(patience).await;
        self.has_answer()
    }

    fn has_answer(&self) -> bool {
        self.0.take_error().is_ok_and(|error| error.is_some_and(|error| refuses(&error)))
    }
}

fn refuses(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_is_refused_when_nobody_has_it() {
        let patience = Duration::from_millis(500);
        for host in [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), (Ipv6Addr::LOCALHOST, 0).into()] {
            let Ok(peer) = std::net::UdpSocket::bind(host) else {
                println!("skipped: this machine has no {host}");
                continue;
            };
            let port = Port::of(peer.local_addr().expect("it is bound")).await.expect("a socket");
            for _ in 0..3 {
                assert!(!port.is_refused(Duration::from_millis(20)).await, "{host}: somebody has it");
            }
            drop(peer);
            for _ in 0..3 {
                assert!(port.is_refused(patience).await, "{host}: nobody has it");
            }
        }
    }
}
