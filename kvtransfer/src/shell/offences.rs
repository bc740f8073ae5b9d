//! Counts of what peers did wrong, kept by an endpoint and shared by its connections.

use ridge_protocol::stats::ProtocolErrors;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a peer did wrong, as [`ProtocolErrors`] counts it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Offence {
    Handshake,
    Refused,
    Control,
    Page,
}

/// The counts of one endpoint. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Offences(Arc<[AtomicU64; 4]>);

impl Offences {
    pub(crate) fn count(&self, offence: Offence) {
        self.0[offence as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn report(&self) -> ProtocolErrors {
        let count = |offence: Offence| self.0[offence as usize].load(Ordering::Relaxed);
        ProtocolErrors {
            handshake: count(Offence::Handshake),
            refused: count(Offence::Refused),
            control: count(Offence::Control),
            page: count(Offence::Page),
        }
    }
}
