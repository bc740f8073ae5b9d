//! What a KV connection knows about the network under it.
//!
//! Congestion control sees every packet leave and every acknowledgement come, so that is where the rate is measured:
//! [`Metering`] puts a meter around the controller that was chosen.

use quinn::Connection;
use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;
use ridge_protocol::stats::LinkStats;
use ridge_protocol::{Duration, NodeName};
use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

/// Time with packets in flight over which a rate is taken: long beside a round trip within a data centre.
const INTERVAL: Duration = Duration::from_millis(10);
/// After how long the highest rate is forgotten, at the earliest; after twice as long it is.
const MEMORY: Duration = Duration::from_secs(15);

/// A KV connection as it is now; counters run from its start.
#[derive(Clone, PartialEq, Debug)]
pub struct Link {
    /// At its other end.
    pub peer: NodeName,
    /// Round-trip time, smoothed.
    pub rtt: Duration,
    /// What it carried at most, lately, in bytes acknowledged per second with something in flight. 0 before 10 ms of that.
    pub bytes_per_s: u64,
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
    /// Bytes acknowledged.
    pub acked_bytes: u64,
    /// Of them, those that came while there was nothing more to send.
    pub app_limited_bytes: u64,
}

impl Link {
    pub(crate) fn of(peer: NodeName, conn: &Connection) -> Self {
        let path = conn.stats().path;
        let meter = conn.congestion_state().into_any().downcast::<Metered>().map(|metered| metered.meter);
        let meter = meter.expect("every endpoint's connections are metered");
        Self {
            peer,
            rtt: path.rtt,
            bytes_per_s: meter.highest.max(meter.highest_before),
            mtu: path.current_mtu,
            congestion_window: path.cwnd,
            congestion_events: path.congestion_events,
            sent_packets: path.sent_packets,
            lost_packets: path.lost_packets,
            acked_bytes: meter.acked_bytes,
            app_limited_bytes: meter.app_limited_bytes,
        }
    }

    /// What the router is told.
    pub fn stats(&self) -> LinkStats {
        LinkStats {
            peer: self.peer.clone(),
            rtt_us: u64::try_from(self.rtt.as_micros()).unwrap_or(u64::MAX),
            bytes_per_s: self.bytes_per_s,
            mtu: self.mtu,
            sent_packets: self.sent_packets,
            lost_packets: self.lost_packets,
        }
    }
}

/// Makes metered controllers of another factory's.
pub(crate) struct Metering(pub(crate) Arc<dyn ControllerFactory + Send + Sync>);

impl ControllerFactory for Metering {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Metered { inner: self.0.clone().build(now, current_mtu), meter: Meter::new(now) })
    }
}

/// A controller and its meter.
struct Metered {
    inner: Box<dyn Controller>,
    meter: Meter,
}

impl Controller for Metered {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.meter.on_sent(now);
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.meter.on_ack(bytes, app_limited);
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.meter.on_end_acks(now, in_flight);
        self.inner.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.inner.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { inner: self.inner.clone_box(), meter: self.meter.clone() })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Measures a rate over time with something in flight, and keeps the highest: lower ones say more about the sender.
#[derive(Clone, Debug)]
struct Meter {
    /// Since when something is in flight.
    busy_since: Option<Instant>,
    /// Time and bytes of the interval being measured, up to `busy_since`.
    busy: Duration,
    bytes: u64,
    acked_bytes: u64,
    app_limited_bytes: u64,
    /// Highest rates since `since`, and in the time before it.
    highest: u64,
    highest_before: u64,
    since: Instant,
}

impl Meter {
    fn new(now: Instant) -> Self {
        Self {
            busy_since: None,
            busy: Duration::ZERO,
            bytes: 0,
            acked_bytes: 0,
            app_limited_bytes: 0,
            highest: 0,
            highest_before: 0,
            since: now,
        }
    }

    fn on_sent(&mut self, now: Instant) {
        self.busy_since.get_or_insert(now);
    }

    fn on_ack(&mut self, bytes: u64, app_limited: bool) {
        self.bytes += bytes;
        self.acked_bytes += bytes;
        self.app_limited_bytes += if app_limited { bytes } else { 0 };
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64) {
        if let Some(since) = self.busy_since {
            self.busy += now.saturating_duration_since(since);
            self.busy_since = (in_flight > 0).then_some(now);
        }
        if self.busy < INTERVAL {
            return;
        }
        if now.saturating_duration_since(self.since) >= MEMORY {
            self.highest_before = std::mem::take(&mut self.highest);
            self.since = now;
        }
        self.highest = self.highest.max((self.bytes as f64 / self.busy.as_secs_f64()) as u64);
        (self.busy, self.bytes) = (Duration::ZERO, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends and gets acknowledged `bytes` in `ms`, then is idle for a second.
    fn burst(meter: &mut Meter, now: &mut Instant, bytes: u64, ms: u64) {
        meter.on_sent(*now);
        *now += Duration::from_millis(ms);
        meter.on_ack(bytes, false);
        meter.on_end_acks(*now, 0);
        *now += Duration::from_secs(1);
    }

    #[test]
    fn idle_time_does_not_count() {
        let mut now = Instant::now();
        let mut meter = Meter::new(now);
        burst(&mut meter, &mut now, 4_000, 4);
        assert_eq!(meter.highest, 0, "4 ms are not enough");
        burst(&mut meter, &mut now, 6_000, 6);
        assert_eq!(meter.highest, 1_000_000);
    }

    #[test]
    fn the_highest_rate_counts_until_it_is_old() {
        let mut now = Instant::now();
        let mut meter = Meter::new(now);
        burst(&mut meter, &mut now, 50_000, 10);
        burst(&mut meter, &mut now, 10_000, 10);
        assert_eq!(meter.highest.max(meter.highest_before), 5_000_000);
        for _ in 0..40 {
            burst(&mut meter, &mut now, 10_000, 10);
        }
        assert_eq!(meter.highest.max(meter.highest_before), 1_000_000);
    }
}
