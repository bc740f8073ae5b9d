//! `GET /metrics` in Prometheus' text format, written by hand: every node's last report, the router's counters and
//! the latencies that clients see.

use super::Shared;
use super::resume::StreamCounts;
use crate::machine::NodeView;
use crate::shell::gateway::{ClusterView, Health};
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use dashmap::DashMap;
use ridge_protocol::Role;
use ridge_protocol::stats::{DeviceStats, LinkStats, ProtocolErrors};
use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of the time to a first token: from a warm cache to a prompt of a million tokens on CPUs.
const FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
];
/// Buckets of the time between tokens.
const INTER_TOKEN_S: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5,
];
/// Buckets of the time to a whole answer.
const END_TO_END_S: &[f64] = &[
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
];

/// What the HTTP side counts itself.
#[derive(Debug)]
pub(super) struct Metrics {
    /// From the arrival of a request to each answer's first token.
    pub(super) first_token: Histogram,
    /// Between two tokens of an answer.
    pub(super) inter_token: Histogram,
    /// From the arrival of a request to the end of its last answer.
    pub(super) end_to_end: Histogram,
    /// By route (never by raw path, which clients choose) and status. Every handler counts here, so it is sharded.
    requests: DashMap<(String, u16), u64>,
}

/// A histogram with fixed buckets.
#[derive(Debug)]
pub(super) struct Histogram {
    bounds_s: &'static [f64],
    /// One per bound, and one for what is above them all. Not cumulative.
    counts: Vec<AtomicU64>,
    sum_us: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            first_token: Histogram::new(FIRST_TOKEN_S),
            inter_token: Histogram::new(INTER_TOKEN_S),
            end_to_end: Histogram::new(END_TO_END_S),
            requests: DashMap::new(),
        }
    }
}

impl Metrics {
    /// Counts a request that was answered, or (status 499, as nginx has it) whose client left before.
    pub(super) fn on_request(&self, route: &str, status: u16) {
        *self.requests.entry((route.to_owned(), status)).or_default() += 1;
    }
}

impl Histogram {
    fn new(bounds_s: &'static [f64]) -> Self {
        let counts = (0..=bounds_s.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds_s, counts, sum_us: AtomicU64::new(0) }
    }

    /// Adds one observation.
    pub(super) fn observe(&self, value: Duration) {
        let bucket = self.bounds_s.partition_point(|bound| *bound < value.as_secs_f64());
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(value.as_micros() as u64, Ordering::Relaxed);
    }
}

/// `GET /metrics`
pub(super) async fn show(State(app): State<Shared>) -> impl IntoResponse {
    let text = render(&app.gateway.view(), &app.metrics, app.streams.counts(), &app.config.version);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

fn render(view: &ClusterView, metrics: &Metrics, resumable: StreamCounts, version: &str) -> String {
    let mut page = Page::default();
    page.family("ridge_build_info", "gauge", "Always 1; the label is the version.");
    page.sample("ridge_build_info", &[("version", version)], 1);
    nodes(&mut page, &view.nodes);
    devices(&mut page, &view.nodes);
    links(&mut page, &view.nodes);
    health(&mut page, &view.health);
    router(&mut page, view);
    protocol_errors(&mut page, view);
    http(&mut page, metrics);
    streams(&mut page, resumable);
    page.0
}

fn nodes(page: &mut Page, nodes: &[NodeView]) {
    type Read = fn(&NodeView) -> u64;
    let gauges: [(&str, &str, Read); 11] = [
        ("ridge_kv_blocks_total", "KV blocks in the pool.", |n| n.stats.blocks.total.into()),
        ("ridge_kv_blocks_free", "KV blocks without content.", |n| n.stats.blocks.free.into()),
        ("ridge_kv_blocks_cached", "KV blocks kept for prefix reuse, evictable.", |n| n.stats.blocks.cached.into()),
        ("ridge_kv_blocks_used", "KV blocks of sequences being computed.", |n| n.stats.blocks.used.into()),
        ("ridge_kv_blocks_reserved", "KV blocks waiting for a transfer to land.", |n| n.stats.blocks.reserved.into()),
        ("ridge_kv_blocks_held", "KV blocks waiting for a hand-off's acknowledgement.", |n| n.stats.blocks.held.into()),
        ("ridge_kv_orphaned_blocks", "KV blocks that nobody owns; anything but 0 is a leak.", |n| {
            n.stats.orphaned_blocks.into()
        }),
        ("ridge_requests_waiting", "Requests waiting for blocks or for a batch.", |n| n.stats.waiting.into()),
        ("ridge_requests_running", "Requests in the running batch.", |n| n.stats.running.into()),
        ("ridge_requests_in_flight", "Sequences dispatched to the node and not over.", |n| n.in_flight.into()),
        ("ridge_recordings_stopped", "Recordings of the node's machines (--record) that were given up.", |n| {
            n.stats.recordings_stopped.into()
        }),
    ];
    let counters: [(&str, &str, Read); 12] = [
        ("ridge_kv_transfers_committed_total", "Hand-offs committed.", |n| n.stats.transfers_committed),
        ("ridge_kv_transfers_aborted_total", "Hand-offs aborted by either side.", |n| n.stats.transfers_aborted),
        ("ridge_kv_digest_failures_total", "KV pages whose digest did not match.", |n| n.stats.digest_failures),
        ("ridge_kv_aborts_unacknowledged_total", "Aborted hand-offs that a connected peer never acknowledged.", |n| {
            n.stats.aborts_unacknowledged
        }),
        ("ridge_preemptions_total", "Sequences pushed out of the batch for want of blocks.", |n| n.stats.preemptions),
        ("ridge_recomputed_tokens_total", "Prompt tokens computed again after preemption or a failed transfer.", |n| {
            n.stats.recomputed_tokens
        }),
        ("ridge_prompt_tokens_total", "Prompt tokens computed.", |n| n.stats.computed_tokens),
        ("ridge_cached_tokens_total", "Prompt tokens found in the prefix cache.", |n| n.stats.cached_tokens),
        ("ridge_generation_tokens_total", "Tokens sampled.", |n| n.stats.generated_tokens),
        (
            "ridge_kv_converted_pages_total",
            "KV pages sent that were made from blocks of another size or type than the receiver's.",
            |n| n.stats.converted_pages,
        ),
        (
            "ridge_kv_device_converted_pages_total",
            "Of those, the ones that the node's device had made while it computed.",
            |n| n.stats.device_converted_pages,
        ),
        ("ridge_engine_steps_total", "Engine passes run.", |n| n.stats.steps),
    ];
    let gauges = gauges.into_iter().map(|gauge| (gauge, "gauge"));
    for ((name, help, read), kind) in gauges.chain(counters.into_iter().map(|counter| (counter, "counter"))) {
        page.family(name, kind, help);
        for node in nodes {
            page.sample(name, &labels(node), read(node));
        }
    }
    page.family("ridge_engine_busy_seconds_total", "counter", "Time spent in engine passes.");
    for node in nodes {
        page.sample("ridge_engine_busy_seconds_total", &labels(node), node.stats.busy_us as f64 / 1e6);
    }
    let name = "ridge_kv_transfer_seconds_total";
    page.family(name, "counter", "Time of hand-offs sent: hidden behind computing, and exposed after it.");
    for node in nodes {
        let [name_label, role] = labels(node);
        let times = node.stats.transfer_times;
        for (part, us) in [("hidden", times.hidden_us), ("exposed", times.exposed_us)] {
            page.sample(name, &[name_label, role, ("part", part)], us as f64 / 1e6);
        }
    }
    let transfers: [(&str, &str, Read); 2] = [
        ("ridge_kv_transfer_bytes_total", "KV page bytes sent or received.", |n| n.stats.transfer_bytes),
        ("ridge_kv_transfer_pages_total", "KV pages sent or received.", |n| n.stats.transfer_pages),
    ];
    for (name, help, read) in transfers {
        page.family(name, "counter", help);
        for node in nodes {
            let direction = if node.hello.role == Role::Prefill { "out" } else { "in" };
            let [name_label, role] = labels(node);
            page.sample(name, &[name_label, role, ("direction", direction)], read(node));
        }
    }
}

/// Devices of nodes that compute on one. A family that nobody has anything to say to is left out.
fn devices(page: &mut Page, nodes: &[NodeView]) {
    type Read = fn(&DeviceStats) -> Option<f64>;
    let families: [(&str, &str, Read); 8] = [
        ("ridge_device_power_watts", "Power that the node's device draws.", |d| d.power_mw.map(|n| f64::from(n) / 1e3)),
        ("ridge_device_busy_ratio", "Part of the last moments in which the device ran a kernel.", |d| {
            d.busy_percent.map(|n| f64::from(n) / 100.0)
        }),
        ("ridge_device_memory_busy_ratio", "Part of the last moments in which the device's memory was in use.", |d| {
            d.memory_busy_percent.map(|n| f64::from(n) / 100.0)
        }),
        ("ridge_device_memory_used_bytes", "Memory of the device that is taken, by all processes.", |d| {
            d.memory_used_bytes.map(|n| n as f64)
        }),
        ("ridge_device_memory_total_bytes", "Memory of the device.", |d| d.memory_total_bytes.map(|n| n as f64)),
        ("ridge_device_clock_hertz", "Clock of the device's multiprocessors.", |d| {
            d.clock_mhz.map(|n| f64::from(n) * 1e6)
        }),
        ("ridge_device_memory_clock_hertz", "Clock of the device's memory.", |d| {
            d.memory_clock_mhz.map(|n| f64::from(n) * 1e6)
        }),
        ("ridge_device_temperature_celsius", "Temperature of the device.", |d| d.temperature_c.map(f64::from)),
    ];
    for (name, help, read) in families {
        let of = |node: &NodeView| node.stats.device.as_ref().and_then(read);
        if nodes.iter().all(|node| of(node).is_none()) {
            continue;
        }
        page.family(name, "gauge", help);
        for (node, value) in nodes.iter().filter_map(|node| Some((node, of(node)?))) {
            page.sample(name, &labels(node), value);
        }
    }
}

fn links(page: &mut Page, nodes: &[NodeView]) {
    type Read = fn(&LinkStats) -> f64;
    let families: [(&str, &str, &str, Read); 5] = [
        ("ridge_kv_link_rtt_seconds", "gauge", "Round-trip time between two nodes.", |l| l.rtt_us as f64 / 1e6),
        ("ridge_kv_link_bytes_per_second", "gauge", "Highest rate of late at which a link carried KV.", |l| {
            l.bytes_per_s as f64
        }),
        ("ridge_kv_link_mtu_bytes", "gauge", "Largest UDP payload that passes.", |l| l.mtu.into()),
        ("ridge_kv_link_packets_sent_total", "counter", "Packets sent on the present connection.", |l| {
            l.sent_packets as f64
        }),
        ("ridge_kv_link_packets_lost_total", "counter", "Of them, lost ones.", |l| l.lost_packets as f64),
    ];
    for (name, kind, help, read) in families {
        page.family(name, kind, help);
        for node in nodes {
            for link in &node.links {
                page.sample(name, &[("node", &node.hello.name.0), ("peer", &link.peer.0)], read(link));
            }
        }
    }
}

fn labels(node: &NodeView) -> [(&'static str, &str); 2] {
    [("node", &node.hello.name.0), ("role", node.hello.role.name())]
}

fn health(page: &mut Page, health: &Health) {
    page.family("ridge_ready", "gauge", "Whether /health answers 200: a prompt would be answered.");
    page.sample("ridge_ready", &[], u8::from(!matches!(health, Health::Unavailable(_))));
    page.family("ridge_degraded", "gauge", "Whether prompts are answered although a part of the cluster is missing.");
    page.sample("ridge_degraded", &[], u8::from(matches!(health, Health::Degraded(_))));
}

fn router(page: &mut Page, view: &ClusterView) {
    let stats = &view.router;
    let name = "ridge_router_requests_total";
    page.family(name, "counter", "Sequences by how they ended.");
    for (outcome, count) in [("finished", stats.finished), ("failed", stats.failed), ("gone", stats.gone)] {
        page.sample(name, &[("outcome", outcome)], count);
    }
    page.family("ridge_router_requests_in_flight", "gauge", "Sequences in flight or waiting for a node.");
    page.sample("ridge_router_requests_in_flight", &[], stats.in_flight);
    page.family("ridge_router_redispatched_total", "counter", "Dispatches after the first of a sequence.");
    page.sample("ridge_router_redispatched_total", &[], stats.redispatched);
    let name = "ridge_router_local_prefills_total";
    page.family(name, "counter", "Prompts left to a decode node, because that was faster than the prefill nodes.");
    page.sample(name, &[], stats.local_prefills);
    page.family("ridge_router_moved_total", "counter", "Sequences moved between decode nodes with their KV.");
    page.sample("ridge_router_moved_total", &[], stats.moved);
    let name = "ridge_router_recordings_stopped";
    page.family(name, "gauge", "Recordings of the router's machine (--record) that were given up.");
    page.sample(name, &[], view.recordings_stopped);
}

/// What peers did wrong, at the router's endpoint and at every node's.
fn protocol_errors(page: &mut Page, view: &ClusterView) {
    let name = "ridge_protocol_errors_total";
    page.family(name, "counter", "Sessions closed because of what the peer sent or who it was not.");
    let router = Role::Router.name();
    let nodes = view.nodes.iter().map(|node| (labels(node), node.stats.protocol_errors));
    for ([node, role], errors) in nodes.chain([([("node", router), ("role", router)], view.protocol_errors)]) {
        let ProtocolErrors { handshake, refused, control, page: pages } = errors;
        for (kind, count) in [("handshake", handshake), ("refused", refused), ("control", control), ("page", pages)] {
            page.sample(name, &[node, role, ("kind", kind)], count);
        }
    }
}

fn http(page: &mut Page, metrics: &Metrics) {
    let name = "ridge_http_requests_total";
    page.family(name, "counter", "HTTP requests by route and status; 499 is a client that left before the answer.");
    let requests: BTreeMap<(String, u16), u64> =
        metrics.requests.iter().map(|entry| (entry.key().clone(), *entry.value())).collect();
    for ((path, status), count) in &requests {
        page.sample(name, &[("path", path), ("status", &status.to_string())], count);
    }
    let histograms = [
        ("ridge_time_to_first_token_seconds", "From request to first token.", &metrics.first_token),
        ("ridge_inter_token_latency_seconds", "Between two tokens of an answer.", &metrics.inter_token),
        ("ridge_e2e_request_latency_seconds", "From request to the end of the answer.", &metrics.end_to_end),
    ];
    for (name, help, histogram) in histograms {
        page.family(name, "histogram", help);
        page.histogram(name, histogram);
    }
}

fn streams(page: &mut Page, counts: StreamCounts) {
    let families = [
        ("ridge_streams_resumed_total", "counter", "Connections that continued a stream.", counts.resumed),
        ("ridge_streams_expired_total", "counter", "Streams nobody came back for in time.", counts.expired),
        ("ridge_streams_detached", "gauge", "Streams kept for clients that are not connected.", counts.detached),
    ];
    for (name, kind, help, value) in families {
        page.family(name, kind, help);
        page.sample(name, &[], value);
    }
}

/// A page of metrics.
#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let braces = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        self.line(format_args!("{name}{braces} {value}"));
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        let mut below = 0;
        let bounds = histogram.bounds_s.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&histogram.counts) {
            below += count.load(Ordering::Relaxed);
            self.sample(&format!("{name}_bucket"), &[("le", &bound)], below);
        }
        self.sample(&format!("{name}_sum"), &[], histogram.sum_us.load(Ordering::Relaxed) as f64 / 1e6);
        self.sample(&format!("{name}_count"), &[], below);
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a string takes everything");
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_labels_escaped() {
        let histogram = Histogram::new(&[0.1, 1.0]);
        for ms in [50, 100, 500, 5000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut page = Page::default();
        page.histogram("h", &histogram);
        page.sample("s", &[("l", "a\"b\\c\nd")], 1);
        let expected = "h_bucket{le=\"0.1\"} 2\nh_bucket{le=\"1\"} 3\nh_bucket{le=\"+Inf\"} 4\nh_sum 5.65\nh_count 4\n\
                        s{l=\"a\\\"b\\\\c\\nd\"} 1\n";
        assert_eq!(page.0, expected);
    }
}
