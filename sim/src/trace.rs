//! What happened, a line per event: hashed all of it, kept the last of it, shown on demand.

use super::run::Event;
use ridge_protocol::Instant;
use ridge_protocol::wire::{NodeToRouter, ReceiverMsg, RouterToNode, SenderMsg};
use std::collections::VecDeque;
use std::fmt::{self, Write};

/// Lines kept for a failure's report.
const KEPT: usize = 40;

/// The run as text.
#[derive(Debug, Default)]
pub struct Trace {
    /// FNV-1a over all lines.
    hash: u64,
    /// The line being made.
    line: String,
    last: VecDeque<String>,
    /// Every line, if wanted.
    all: Option<Vec<String>>,
}

impl Trace {
    /// An empty trace, which keeps every line if `whole`.
    pub fn new(whole: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, line: String::new(), last: VecDeque::new(), all: whole.then(Vec::new) }
    }

    /// Adds a line. A `routine` one is not kept among the last, where it would push out what matters.
    pub fn note(&mut self, now: Instant, routine: bool, what: impl fmt::Display) {
        self.line.clear();
        write!(self.line, "{:>12.6} {what}", now.0 as f64 / 1e9).expect("strings take everything");
        for byte in self.line.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if let Some(all) = &mut self.all {
            all.push(self.line.clone());
        } else if !routine {
            let full = self.last.len() == KEPT;
            let mut kept = if full { self.last.pop_front().expect("it is full") } else { String::new() };
            kept.clone_from(&self.line);
            self.last.push_back(kept);
        }
    }

    /// Two runs of one seed agree in it.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Every line if they were kept, the last ones otherwise.
    pub fn into_lines(self) -> Vec<String> {
        self.all.unwrap_or_else(|| self.last.into())
    }
}

impl Event {
    /// Whether it happens every second, whatever else does.
    pub fn is_routine(&self) -> bool {
        matches!(
            self,
            Event::Timer(..)
                | Event::RouterTimer(_)
                | Event::ToRouter(_, NodeToRouter::Stats(_))
                | Event::ToReceiver(_, SenderMsg::Alive { .. })
                | Event::ToSender(_, ReceiverMsg::Alive { .. })
        )
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Submit => write!(f, "a client comes"),
            Event::Leave(client) => write!(f, "client {} leaves", client.0),
            Event::Dial(life) => write!(f, "{life} dials the router"),
            Event::Hello(conn) => write!(f, "router <- n{}: hello", conn.0),
            Event::ControlTimeout(conn) => write!(f, "n{}: time to be taken in is over", conn.0),
            Event::ToRouter(conn, message) => write!(f, "router <- n{}: {}", conn.0, Short(message)),
            Event::ToNode(conn, message) => write!(f, "n{} <- router: {}", conn.0, Short(message)),
            Event::RouterNotices(conn) => write!(f, "router notices that n{} is gone", conn.0),
            Event::NodeNotices(conn) => write!(f, "n{} notices that the router is gone", conn.0),
            Event::KvArrives(conn) => write!(f, "{conn}: arrives"),
            Event::KvWelcomed(conn) => write!(f, "{conn}: welcomed"),
            Event::KvTimeout(conn) => write!(f, "{conn}: time to be welcomed is over"),
            Event::ToReceiver(conn, message) => write!(f, "{conn} receiver <- {}", Short(message)),
            Event::ToSender(conn, message) => write!(f, "{conn} sender <- {}", Short(message)),
            Event::Page(conn, page) => write!(f, "{conn} page {} {}/{}", page.request, page.layer, page.index),
            Event::SenderNotices(conn) => write!(f, "{conn}: sender notices the loss"),
            Event::ReceiverNotices(conn) => write!(f, "{conn}: receiver notices the loss"),
            Event::Layer { life, step, layer } => write!(f, "{life} pass {step} layer {layer}"),
            Event::Step { life, step } => write!(f, "{life} pass {step} over"),
            Event::Fault(fault) => write!(f, "fault: {fault:?}"),
            Event::Silent(life) => write!(f, "{life} was silent for too long"),
            Event::CutBreaks(a, b) => write!(f, "{a:?} and {b:?} were apart for too long"),
            Event::Resume(life) => write!(f, "{life} goes on"),
            Event::Faster(life) => write!(f, "{life} is as fast as usual"),
            Event::Left(life) => write!(f, "{life} has drained and goes"),
            Event::Restart(place) => write!(f, "place {place} restarts"),
            Event::RouterTimer(_) => write!(f, "router timer"),
            Event::Timer(life, _) => write!(f, "{life} timer"),
        }
    }
}

/// A message without its tokens and hashes.
struct Short<'a, M>(&'a M);

impl fmt::Display for Short<'_, RouterToNode> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            RouterToNode::Prefill(r) => write!(f, "prefill {} of {} tokens", r.request, r.tokens.len()),
            RouterToNode::Decode(r) => write!(f, "decode {} of {} tokens", r.request, r.tokens.len()),
            other => write!(f, "{other:?}"),
        }
    }
}

impl fmt::Display for Short<'_, NodeToRouter> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            NodeToRouter::Token { request, index, out, finish } => {
                write!(f, "{request} token {index} is {} {finish:?}", out.token)
            }
            NodeToRouter::Stats(stats) => write!(f, "stats {} running {} waiting", stats.running, stats.waiting),
            NodeToRouter::CacheChanged { added, removed } => write!(f, "cache +{} -{}", added.len(), removed.len()),
            NodeToRouter::Hello(_) => write!(f, "hello"),
            other => write!(f, "{other:?}"),
        }
    }
}

impl fmt::Display for Short<'_, SenderMsg> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            SenderMsg::Hello { .. } => write!(f, "hello"),
            SenderMsg::Offer { request, tokens, .. } => write!(f, "offer {request} of {tokens} tokens"),
            SenderMsg::Finish { request, pages, .. } => write!(f, "finish {request} after {pages} pages"),
            other => write!(f, "{other:?}"),
        }
    }
}

impl fmt::Display for Short<'_, ReceiverMsg> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
