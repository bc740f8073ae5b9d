//! What many runs came to.

use super::run::Outcome;
use ridge_protocol::Duration;
use std::collections::BTreeMap;

/// Outcomes of many seeds, added up.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sum {
    /// Seeds run.
    pub seeds: u64,
    /// Everything that was counted, by name: a simulation that finds nothing must at least have been somewhere.
    pub counts: BTreeMap<&'static str, u64>,
    /// Longest time that a cluster took to come to rest after the last fault and the last arrival.
    pub settled_in_max: Duration,
    /// Hash of all traces in order.
    pub trace: u64,
}

impl Sum {
    /// Adds a run.
    pub fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        let always = [
            ("client served", outcome.finished),
            ("client failed", outcome.failed),
            ("client left", outcome.gone),
            ("preemption", outcome.preemptions),
            ("dispatch repeated", outcome.redispatched),
            ("sequence moved", outcome.moved),
            ("prompt left to its decode node", outcome.local_prefills),
            ("token recomputed", outcome.recomputed),
            ("prompt token cached", outcome.cached),
            ("hand-off committed", outcome.committed),
            ("page converted", outcome.converted),
            ("hand-off aborted", outcome.aborted),
            ("event", outcome.events),
        ];
        for (what, count) in always.into_iter().chain(outcome.happened.iter().map(|(what, count)| (*what, *count))) {
            *self.counts.entry(what).or_default() += count;
        }
        self.settled_in_max = self.settled_in_max.max(outcome.settled_in);
        self.trace = self.trace.rotate_left(1) ^ outcome.trace;
    }
}
