//! The two session machines of a hand-off. Pure: no I/O, no clock, no threads.
//!
//! A transfer is one conversation about one request. The sender offers, the receiver grants the suffix of blocks it
//! lacks together with credit, pages flow, `Finish` says how many there were, `Commit` lets the sender let go.
//! Either side may abort at any time, aborting twice is harmless, and a lost connection aborts everything on it. Whoever
//! waits for the other side holds a lease of seconds, which progress renews, or a sign of life (`Alive`) from a side
//! that cannot progress yet: a prompt that still queues, blocks that are not free yet.
//!
//! ```text
//! sender    Announce -> Announced -Begin-> Offered -Grant-> Shipping -all shipped, first token known-> Finished -Commit-> over
//! receiver  Expect   -> Expected -+
//!                                 +-> Landing -Finish-> Closing -last page-> over
//!           Offer    -> Offered  -+
//! ```
//!
//! In each machine one function, `step`, lists what every event means in every phase; a test compares the whole
//! table with `transitions.txt` beside this file.

pub mod receiver;
mod record;
pub mod sender;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod upkeep;

pub use receiver::{Receiver, ReceiverConfig, ReceiverInput, ReceiverOutput};
use ridge_protocol::stats::NodeStats;
use ridge_protocol::transfer::TransferTimes;
pub use sender::{Sender, SenderConfig, SenderInput, SenderOutput};

/// Counters of one machine since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TransferStats {
    /// Transfers that ended with `Commit`.
    pub committed: u64,
    /// Transfers that ended any other way, cancelled ones included.
    pub aborted: u64,
    /// Pages shipped (sender) or landed intact (receiver).
    pub pages: u64,
    /// Their bytes, headers not counted.
    pub bytes: u64,
    /// Pages shipped that were made from other blocks than the receiver's. Sender only.
    pub converted: u64,
    /// Summed over committed transfers. Sender only.
    pub times: TransferTimes,
    /// Pages whose digest did not match. Receiver only.
    pub digest_failures: u64,
    /// Aborts that the peer did not acknowledge within a lease.
    pub unacknowledged: u64,
    /// Messages and pages that belonged to no transfer of that peer and were ignored.
    pub strays: u64,
}

impl std::ops::Add for TransferStats {
    type Output = Self;

    /// Both halves of a node that receives and sends.
    fn add(self, other: Self) -> Self {
        Self {
            committed: self.committed + other.committed,
            aborted: self.aborted + other.aborted,
            pages: self.pages + other.pages,
            bytes: self.bytes + other.bytes,
            converted: self.converted + other.converted,
            times: self.times + other.times,
            digest_failures: self.digest_failures + other.digest_failures,
            unacknowledged: self.unacknowledged + other.unacknowledged,
            strays: self.strays + other.strays,
        }
    }
}

impl TransferStats {
    /// Enters them into a node's report, whose scheduler knows nothing of transfers.
    pub fn report(&self, stats: &mut NodeStats) {
        stats.transfer_bytes = self.bytes;
        stats.transfer_pages = self.pages;
        stats.converted_pages = self.converted;
        stats.transfers_committed = self.committed;
        stats.transfers_aborted = self.aborted;
        stats.aborts_unacknowledged = self.unacknowledged;
        stats.transfer_times = self.times;
        stats.digest_failures = self.digest_failures;
    }
}

/// A set of pages of one transfer: `layers` x `blocks` bits.
#[derive(Clone, Debug)]
struct PageSet {
    blocks: u32,
    bits: Vec<u64>,
    len: u64,
}

impl PageSet {
    fn new(layers: u32, blocks: u32) -> Self {
        let pages = u64::from(layers) * u64::from(blocks);
        let words = usize::try_from(pages.div_ceil(64)).expect("a transfer's pages fit in memory");
        Self { blocks, bits: vec![0; words], len: 0 }
    }

    /// Adds a page; `false` if it was there already.
    fn insert(&mut self, layer: u32, index: u32) -> bool {
        let (word, mask) = self.place(layer, index);
        let new = self.bits[word] & mask == 0;
        self.bits[word] |= mask;
        self.len += u64::from(new);
        new
    }

    fn contains(&self, layer: u32, index: u32) -> bool {
        let (word, mask) = self.place(layer, index);
        self.bits[word] & mask != 0
    }

    fn place(&self, layer: u32, index: u32) -> (usize, u64) {
        assert!(index < self.blocks, "block index {index} of {}", self.blocks);
        let at = u64::from(layer) * u64::from(self.blocks) + u64::from(index);
        ((at / 64) as usize, 1 << (at % 64))
    }

    fn check_integrity(&self) {
        let ones: u64 = self.bits.iter().map(|word| u64::from(word.count_ones())).sum();
        assert_eq!(ones, self.len, "the page count is the number of bits");
    }
}
