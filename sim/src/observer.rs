//! What no single machine can see: that both sides of a hand-off come to the same end, once each.

use super::run::Life;
use ridge_protocol::RequestId;
use ridge_protocol::transfer::{Outcome, ReceiveCommand, ReceiveEvent, SendCommand, SendEvent};
use std::collections::BTreeSet;

/// All hand-offs, seen between schedulers and transfer machines.
#[derive(Debug, Default)]
pub struct Handoffs {
    /// Begun or expected once, never again.
    seen: BTreeSet<(Life, RequestId)>,
    /// Begun or expected, and not ended.
    open: BTreeSet<(Life, RequestId)>,
    /// Landed whole on a decode node.
    landed: BTreeSet<RequestId>,
}

impl Handoffs {
    fn begin(&mut self, life: Life, request: RequestId) {
        assert!(self.seen.insert((life, request)), "{life}: the hand-off of {request} begins a second time");
        self.open.insert((life, request));
    }

    fn end(&mut self, life: Life, request: RequestId, how: &str) {
        assert!(self.open.remove(&(life, request)), "{life}: the hand-off of {request} ends a second time: {how}");
    }

    pub fn on_send_command(&mut self, life: Life, command: &SendCommand) {
        match command {
            SendCommand::Announce { request, .. } => self.begin(life, *request),
            SendCommand::Cancel { request, reason } => self.end(life, *request, reason),
            SendCommand::Begin(_) | SendCommand::Ready { .. } | SendCommand::Finish { .. } => {}
        }
    }

    pub fn on_send_event(&mut self, life: Life, event: &SendEvent) {
        let SendEvent::Settled { request, outcome } = event;
        self.end(life, *request, "settled");
        if let Outcome::Committed { .. } = outcome {
            assert!(self.landed.contains(request), "{life}: {request} is committed and never landed");
        }
    }

    pub fn on_receive_command(&mut self, life: Life, command: &ReceiveCommand) {
        match command {
            ReceiveCommand::Expect(job) => self.begin(life, job.request),
            ReceiveCommand::Cancel { request, reason } => self.end(life, *request, reason),
        }
    }

    pub fn on_receive_event(&mut self, life: Life, event: &ReceiveEvent) {
        match event {
            ReceiveEvent::Landed { request, .. } => {
                self.end(life, *request, "landed");
                self.landed.insert(*request);
            }
            ReceiveEvent::Failed { request, reason } => self.end(life, *request, reason),
        }
    }

    /// A process died, and its hand-offs with it.
    pub fn forget(&mut self, life: Life) {
        self.open.retain(|(of, _)| *of != life);
    }

    /// Panics if one is open although nobody is in a transfer any more.
    pub fn check_over(&self) {
        assert!(self.open.is_empty(), "hand-offs never ended: {:?}", self.open);
    }
}
