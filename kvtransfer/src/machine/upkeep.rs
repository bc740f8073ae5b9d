//! What both machines do on the side: signs of life for transfers that wait for somebody of ours, and aborts that the
//! peer has not yet acknowledged.

use ridge_protocol::{Duration, Instant, NodeName, RequestId};
use std::collections::BTreeMap;

/// Transfers named in one sign of life: well below the limit of a message.
pub(super) const MAX_ALIVE: usize = 4096;
/// Signs of life within a lease: three may be late or lost in a stall before it ends.
const BEATS_PER_LEASE: u32 = 4;

/// When the next sign of life is due.
#[derive(Debug)]
pub(super) struct Pulse {
    every: Duration,
    next: Option<Instant>,
}

impl Pulse {
    pub fn new(lease: Duration) -> Self {
        Self { every: lease / BEATS_PER_LEASE, next: None }
    }

    /// Something waits: the pulse beats until [`beat`](Self::beat) finds nothing that does.
    pub fn wake(&mut self, now: Instant) {
        self.next.get_or_insert(now + self.every);
    }

    /// Whether signs of life are due now. The next ones are asked for with [`wake`](Self::wake).
    pub fn beat(&mut self, now: Instant) -> bool {
        self.next.take_if(|next| *next <= now).is_some()
    }

    pub fn next(&self) -> Option<Instant> {
        self.next
    }
}

/// Aborts that the peer was told of and has not acknowledged.
#[derive(Debug, Default)]
pub(super) struct Aborts {
    open: BTreeMap<(NodeName, RequestId), Instant>,
}

impl Aborts {
    /// One was said. Beyond `limit` it is not waited for: the list must not grow with what a peer leaves unanswered.
    pub fn said(&mut self, to: NodeName, request: RequestId, until: Instant, limit: usize) {
        if self.open.len() < limit {
            self.open.insert((to, request), until);
        }
    }

    pub fn acknowledged(&mut self, by: &NodeName, request: RequestId) {
        self.open.remove(&(by.clone(), request));
    }

    /// The connection is gone, and the peer has forgotten everything that was said on it.
    pub fn lost(&mut self, peer: &NodeName) {
        self.open.retain(|(to, _), _| to != peer);
    }

    /// Gives up on the overdue ones; says how many there were.
    pub fn expire(&mut self, now: Instant) -> u64 {
        let before = self.open.len();
        self.open.retain(|_, until| *until > now);
        (before - self.open.len()) as u64
    }

    pub fn next(&self) -> Option<Instant> {
        self.open.values().min().copied()
    }

    pub fn len(&self) -> usize {
        self.open.len()
    }
}
