//! A run as a table for people and as JSON for `bench/results`, and what held a transfer up.

use super::args::TransferArgs;
use super::receiver::Received;
use super::sender::Sent;
use super::usage::Usage;
use crate::bench::host;
use crate::bench::measure::Spread;
use clap::ValueEnum;
use ridge_kvtransfer::shell::Link;
use serde_json::{Value, json};
use std::fmt::{Display, Write};

const GIGA: f64 = 1e9;
/// From this share of a core on, a thread counts as what holds the others up.
const BUSY: f64 = 0.9;
/// From this share of the time on, a wait counts as what holds a transfer up.
const WAITS: f64 = 0.5;

/// One size of datagrams.
pub struct Cell {
    /// Largest UDP payload that was allowed.
    pub mtu: u16,
    /// Bytes of the pages of a repetition.
    pub bytes: u64,
    /// At least one.
    pub repetitions: Vec<Repetition>,
    /// The sender's connection at the end, warm-up included.
    pub link: Link,
}

/// One round, and the references around it.
pub struct Repetition {
    /// The sender's part.
    pub sent: Sent,
    /// The receiver's.
    pub received: Received,
    /// Cost of the pages' digests on the sender's side, in seconds per byte.
    pub digest_s_per_byte: f64,
    /// Plaintext TCP between the same processes.
    pub tcp_bytes_per_s: f64,
    /// iperf3 over loopback TCP, if it is installed.
    pub iperf3_bytes_per_s: Option<f64>,
}

/// What a transfer ran into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// A thread of the sending process was busy all the time.
    SenderCore,
    /// A thread of the receiving process was.
    ReceiverCore,
    /// Together the processes used all cores of the machine.
    AllCores,
    /// Congestion control, or its pacing, let no more be in flight.
    CongestionWindow,
    /// The sender mostly had pages and no credit, while nobody's core was full.
    Credit,
    /// Nothing was used up: the time went into waiting for one another.
    Latency,
}

impl Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::SenderCore => "sender core",
            Self::ReceiverCore => "receiver core",
            Self::AllCores => "all cores",
            Self::CongestionWindow => "congestion window",
            Self::Credit => "credit",
            Self::Latency => "latency",
        })
    }
}

impl Cell {
    fn spread(&self, of: impl Fn(&Repetition) -> f64) -> Spread {
        Spread::of(self.repetitions.iter().map(of))
    }

    /// Bytes of pages per second, from the first offer to the last commit.
    pub fn rate(&self) -> Spread {
        self.spread(|r| self.bytes as f64 / r.sent.usage.seconds)
    }

    /// iperf3 where it is installed, else the TCP reference of this program.
    fn reference(&self) -> Spread {
        self.spread(|r| r.iperf3_bytes_per_s.unwrap_or(r.tcp_bytes_per_s))
    }

    /// The transfer's rate over the reference's, each repetition beside its own.
    pub fn over_tcp(&self) -> Spread {
        self.spread(|r| self.bytes as f64 / r.sent.usage.seconds / r.iperf3_bytes_per_s.unwrap_or(r.tcp_bytes_per_s))
    }

    /// Share of the transfer's time that the digest adds on the side where it costs more.
    pub fn digest_share(&self) -> f64 {
        let cost = self.spread(|r| r.digest_s_per_byte.max(r.received.digest_s_per_byte)).median;
        cost * self.rate().median
    }

    /// Share of the time in which pages were ready and had no credit.
    fn starved(&self) -> f64 {
        self.spread(|r| r.sent.starved_s / r.sent.usage.seconds).median
    }

    fn sender(&self) -> Usage {
        sum(self.repetitions.iter().map(|r| r.sent.usage))
    }

    fn receiver(&self) -> Usage {
        sum(self.repetitions.iter().map(|r| r.received.usage))
    }

    /// CPU seconds per 10^9 bytes.
    fn cpu_s_per_gb(&self, usage: &Usage) -> f64 {
        usage.cpu_s / (self.bytes as f64 * self.repetitions.len() as f64 / GIGA)
    }

    /// What was used up.
    pub fn limit(&self) -> Limit {
        let (sender, receiver) = (self.sender(), self.receiver());
        let (sending, receiving) = (sender.busiest_s / sender.seconds, receiver.busiest_s / receiver.seconds);
        if sending.max(receiving) >= BUSY {
            if sending > receiving { Limit::SenderCore } else { Limit::ReceiverCore }
        } else if sender.cpu_s / sender.seconds + receiver.cpu_s / receiver.seconds >= BUSY * host::cores() as f64 {
            Limit::AllCores
        } else if self.link.app_limited_bytes as f64 <= (1.0 - WAITS) * self.link.acked_bytes as f64 {
            Limit::CongestionWindow
        } else if self.starved() >= WAITS {
            Limit::Credit
        } else {
            Limit::Latency
        }
    }
}

fn sum(usages: impl Iterator<Item = Usage>) -> Usage {
    let mut total = Usage::default();
    usages.for_each(|usage| total += usage);
    total
}

/// Everything as one JSON object.
pub fn json(args: &TransferArgs, cells: &[Cell]) -> Value {
    let format = args.load.format();
    json!({
        "benchmark": "transfer",
        "date": host::date(),
        "command": host::command(),
        "version": env!("CARGO_PKG_VERSION"),
        "machine": {"cpu": host::cpu_name(), "cores": host::cores(), "system": std::env::consts::OS},
        "settings": {
            "preset": name(&args.load.preset),
            "kv_cache_dtype": format.dtype.name(),
            "page_bytes": format.page_bytes(),
            "prompt_tokens": args.load.prompt_tokens,
            "prompts": args.load.prompts,
            "concurrent": args.load.concurrent,
            "congestion": name(&args.congestion),
        },
        "repetitions": args.repeat,
        "cells": cells.iter().map(cell_json).collect::<Vec<_>>(),
    })
}

fn cell_json(cell: &Cell) -> Value {
    let mut out = json!({
        "mtu": cell.mtu,
        "path_mtu": cell.link.mtu,
        "pages": cell.repetitions[0].received.pages,
        "bytes": cell.bytes,
        "digest_failures": cell.repetitions.iter().map(|r| r.received.digest_failures).sum::<u64>(),
        "sent_packets": cell.link.sent_packets,
        "lost_packets": cell.link.lost_packets,
        "congestion_events": cell.link.congestion_events,
        "congestion_window": cell.link.congestion_window,
        "rtt_s": number(cell.link.rtt.as_secs_f64()),
        "link_bytes_per_s": cell.link.bytes_per_s,
        "app_limited_share": number(cell.link.app_limited_bytes as f64 / cell.link.acked_bytes.max(1) as f64),
    });
    let mut spread = |name: &str, Spread { median, min, max }: Spread| {
        for (name, value) in [(name.to_owned(), median), (format!("{name}_min"), min), (format!("{name}_max"), max)] {
            out[name] = number(value);
        }
    };
    spread("bytes_per_s", cell.rate());
    spread("tcp_bytes_per_s", cell.spread(|r| r.tcp_bytes_per_s));
    if cell.repetitions.iter().all(|r| r.iperf3_bytes_per_s.is_some()) {
        spread("iperf3_bytes_per_s", cell.spread(|r| r.iperf3_bytes_per_s.unwrap_or(f64::NAN)));
    }
    spread("over_tcp", cell.over_tcp());
    for (side, usage) in [("sender", cell.sender()), ("receiver", cell.receiver())] {
        out[side] = json!({
            "cpu_s_per_gb": number(cell.cpu_s_per_gb(&usage)),
            "cores": number(usage.cpu_s / usage.seconds),
            "busiest_thread": number(usage.busiest_s / usage.seconds),
        });
    }
    out["digest_share"] = number(cell.digest_share());
    out["starved_share"] = number(cell.starved());
    out["limit"] = cell.limit().to_string().into();
    out
}

/// Five digits: more would be noise.
fn number(value: f64) -> Value {
    let rounded = format!("{value:.4e}").parse::<f64>().ok();
    rounded.filter(|value| value.is_finite()).map_or(Value::Null, Value::from)
}

fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is skipped").get_name().to_owned()
}

/// Everything as lines of text.
pub fn table(args: &TransferArgs, cells: &[Cell]) -> String {
    let format = args.load.format();
    let mut out = String::new();
    let _ = writeln!(
        out,
        "KV of {}, {} in pages of {} bytes; {} prompts of {} tokens, {} at a time; {}",
        name(&args.load.preset),
        format.dtype.name(),
        format.page_bytes(),
        args.load.prompts,
        args.load.prompt_tokens,
        args.load.concurrent,
        name(&args.congestion)
    );
    let _ = writeln!(out, "{}, {} cores\n", host::cpu_name(), host::cores());
    let _ = writeln!(
        out,
        "{:>9} {:>7} {:>15} {:>7} {:>7} {:>15} {:>15} {:>7} {:>6}  limit",
        "datagrams", "GB/s", "(min .. max)", "TCP", "/ TCP", "CPU s/GB", "busiest thread", "digest", "lost"
    );
    for cell in cells {
        let (rate, sender, receiver) = (cell.rate(), cell.sender(), cell.receiver());
        let _ = writeln!(
            out,
            "{:>9} {:>7.2} {:>15} {:>7.2} {:>7.2} {:>15} {:>15} {:>6.1}% {:>6}  {}",
            cell.link.mtu,
            rate.median / GIGA,
            format!("({:.2} .. {:.2})", rate.min / GIGA, rate.max / GIGA),
            cell.reference().median / GIGA,
            cell.over_tcp().median,
            format!("{:.2} + {:.2}", cell.cpu_s_per_gb(&sender), cell.cpu_s_per_gb(&receiver)),
            format!(
                "{:.0}% + {:.0}%",
                100.0 * sender.busiest_s / sender.seconds,
                100.0 * receiver.busiest_s / receiver.seconds
            ),
            100.0 * cell.digest_share(),
            cell.link.lost_packets,
            cell.limit()
        );
    }
    let _ = writeln!(out, "\nFigures with + are the sender's and the receiver's.");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_protocol::{Duration, NodeName};

    fn usage(seconds: f64, cpu_s: f64, busiest_s: f64) -> Usage {
        Usage { seconds, cpu_s, busiest_s }
    }

    fn cell(sender: Usage, receiver: Usage, starved_s: f64) -> Cell {
        let sent = Sent { usage: sender, starved_s, pages: 2, bytes: 2_000_000_000 };
        let received = Received {
            usage: receiver,
            pages: 2,
            bytes: 2_000_000_000,
            digest_failures: 0,
            content: String::new(),
            digest_s_per_byte: 1e-11,
        };
        let repetition = Repetition {
            sent,
            received,
            digest_s_per_byte: 2e-11,
            tcp_bytes_per_s: 5e9,
            iperf3_bytes_per_s: Some(4e9),
        };
        let link = Link {
            peer: NodeName("decode-0".into()),
            rtt: Duration::from_millis(1),
            mtu: 1472,
            congestion_window: 1,
            congestion_events: 0,
            sent_packets: 9,
            lost_packets: 0,
            bytes_per_s: 0,
            acked_bytes: 100,
            app_limited_bytes: 90,
        };
        Cell { mtu: 1472, bytes: 2_000_000_000, repetitions: vec![repetition], link }
    }

    #[test]
    fn what_was_used_up_is_the_limit() {
        let idle = usage(1.0, 0.1, 0.1);
        assert_eq!(cell(usage(1.0, 1.0, 0.95), idle, 0.0).limit(), Limit::SenderCore);
        assert_eq!(cell(usage(1.0, 1.0, 0.92), usage(1.0, 1.0, 0.97), 0.9).limit(), Limit::ReceiverCore);
        let spread = usage(1.0, host::cores() as f64 / 2.0, 0.4);
        assert_eq!(cell(spread, spread, 0.9).limit(), Limit::AllCores);
        assert_eq!(cell(idle, idle, 0.9).limit(), Limit::Credit);
        assert_eq!(cell(idle, idle, 0.1).limit(), Limit::Latency);
        let mut waiting = cell(idle, idle, 0.9);
        waiting.link.app_limited_bytes = 10;
        assert_eq!(waiting.limit(), Limit::CongestionWindow);
    }

    #[test]
    fn figures_are_of_their_own_repetition() {
        let cell = cell(usage(0.5, 0.5, 0.5), usage(0.5, 0.3, 0.3), 0.0);
        let out = cell_json(&cell);
        assert_eq!((&out["bytes_per_s"], &out["over_tcp"]), (&json!(4e9), &json!(1.0)));
        assert_eq!((&out["sender"]["cpu_s_per_gb"], &out["receiver"]["cores"]), (&json!(0.25), &json!(0.6)));
        // The sender's digests cost more: 0.02 ns of the 0.25 ns that a byte takes.
        assert_eq!(out["digest_share"], json!(0.08));
    }
}
