//! What a node reports to the router about itself, for placement and for `/metrics`.

use crate::ids::NodeName;
use crate::pace::Pace;
use crate::transfer::TransferTimes;
use serde::{Deserialize, Serialize};

/// Blocks of a pool by state. `free + cached + used + reserved + held == total` at all times.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct BlockCounts {
    /// In the pool.
    pub total: u32,
    /// With no content worth keeping.
    pub free: u32,
    /// Kept for prefix reuse, evictable.
    pub cached: u32,
    /// Part of a sequence that is being computed.
    pub used: u32,
    /// Waiting for KV to land.
    pub reserved: u32,
    /// Computed, waiting for the hand-off to be acknowledged.
    pub held: u32,
}

/// What peers did wrong on a process's endpoint since it started. Each is answered by a closed session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ProtocolErrors {
    /// Strangers: connections that did not get through TLS, or said nothing after it.
    pub handshake: u64,
    /// Nodes of this cluster that wanted what they may not: another's name, another role, another model.
    pub refused: u64,
    /// Control streams on which something else came than messages in their turn.
    pub control: u64,
    /// Page streams on which something else came than whole pages of the agreed size.
    pub page: u64,
}

/// The state of the device that a node computes on, as its driver says it. What it does not say is `None`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Power that the board draws, in milliwatts.
    pub power_mw: Option<u32>,
    /// Part of the last moments in which a kernel ran, in percent.
    pub busy_percent: Option<u32>,
    /// Part of them in which memory was read or written, in percent.
    pub memory_busy_percent: Option<u32>,
    /// Memory taken, by all processes, in bytes.
    pub memory_used_bytes: Option<u64>,
    /// Memory that there is, in bytes.
    pub memory_total_bytes: Option<u64>,
    /// Clock of the multiprocessors, in MHz.
    pub clock_mhz: Option<u32>,
    /// Clock of the memory, in MHz.
    pub memory_clock_mhz: Option<u32>,
    /// Temperature of the chip, in degrees Celsius.
    pub temperature_c: Option<u32>,
}

/// A node's counters since it started, and its gauges now.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct NodeStats {
    /// Blocks by state.
    pub blocks: BlockCounts,
    /// Blocks owned by no request and no cache: must read 0.
    pub orphaned_blocks: u32,
    /// Requests waiting for blocks or for a batch.
    pub waiting: u32,
    /// Requests in the running batch (decode) or being prefilled.
    pub running: u32,
    /// Prompt tokens waiting to be computed.
    pub queued_tokens: u64,
    /// Prompt tokens computed on this node.
    pub computed_tokens: u64,
    /// Prompt tokens found in this node's prefix cache.
    pub cached_tokens: u64,
    /// Prompt tokens computed again on a decode node because of preemption or a failed transfer.
    pub recomputed_tokens: u64,
    /// Tokens sampled.
    pub generated_tokens: u64,
    /// Sequences pushed out of the batch for want of blocks.
    pub preemptions: u64,
    /// KV page bytes that went out or came in, headers not counted.
    pub transfer_bytes: u64,
    /// KV pages that went out or came in.
    pub transfer_pages: u64,
    /// Of those that went out, the ones that were made from other blocks than the receiver's.
    pub converted_pages: u64,
    /// Of these, the ones that the node's device had made while it computed.
    pub device_converted_pages: u64,
    /// Hand-offs that were committed.
    pub transfers_committed: u64,
    /// Hand-offs that were aborted, by either side.
    pub transfers_aborted: u64,
    /// Aborts of hand-offs that the peer, though connected, did not acknowledge in time.
    pub aborts_unacknowledged: u64,
    /// What of those hand-offs that this node sent lay behind its computing, and what did not.
    pub transfer_times: TransferTimes,
    /// Pages whose digest did not match.
    pub digest_failures: u64,
    /// What peers did wrong.
    pub protocol_errors: ProtocolErrors,
    /// Engine passes run.
    pub steps: u64,
    /// Time spent in engine passes, in microseconds.
    pub busy_us: u64,
    /// How fast the node is.
    pub pace: Pace,
    /// Recordings of this process (`--record`) that were given up.
    pub recordings_stopped: u32,
    /// Its device, if it computes on one whose driver says how it is.
    pub device: Option<DeviceStats>,
}

/// What a prefill node knows of the network towards a decode node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LinkStats {
    /// The decode node.
    pub peer: NodeName,
    /// Round-trip time, smoothed, in microseconds.
    pub rtt_us: u64,
    /// The highest rate of the last half minute or so at which bytes were acknowledged; 0 if little was sent.
    pub bytes_per_s: u64,
    /// Largest UDP payload that was found to pass, in bytes.
    pub mtu: u16,
    /// Packets sent on the present connection.
    pub sent_packets: u64,
    /// Of them, those that were lost.
    pub lost_packets: u64,
}
