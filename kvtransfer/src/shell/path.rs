//! What a KV connection knows about the network under it.

use quinn::Connection;
use ridge_protocol::{Duration, NodeName};

/// A KV connection as it is now; counters run from its start.
#[derive(Clone, PartialEq, Debug)]
pub struct Link {
    /// At its other end.
    pub peer: NodeName,
    /// Round-trip time, smoothed.
    pub rtt: Duration,
    /// Largest UDP payload that was found to pass, in bytes.
    pub mtu: u16,
    /// Bytes that congestion control lets be in flight.
    pub congestion_window: u64,
    /// Times that congestion control saw a loss.
    pub congestion_events: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Of them, those that were lost; probes of larger datagrams do not count.
    pub lost_packets: u64,
}

impl Link {
    pub(crate) fn of(peer: NodeName, conn: &Connection) -> Self {
        let path = conn.stats().path;
        Self {
            peer,
            rtt: path.rtt,
            mtu: path.current_mtu,
            congestion_window: path.cwnd,
            congestion_events: path.congestion_events,
            sent_packets: path.sent_packets,
            lost_packets: path.lost_packets,
        }
    }
}
