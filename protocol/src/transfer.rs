//! What a node's scheduling machine and its half of the KV hand-off say to each other.
//!
//! The scheduler owns the blocks, the transfer machine owns the conversation with the peer. The shell carries
//! these values between them, so neither imports the other. Block numbers only; bytes stay in the shell.

use crate::ids::{BlockHash, BlockId, NodeName, RequestId};
use crate::model::BlockShape;
use crate::plan::TokenOut;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Where a decode node receives KV.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KvPeer {
    /// Its name, which its certificate must carry.
    pub name: NodeName,
    /// Its QUIC address.
    pub addr: SocketAddr,
    /// Its blocks: what is sent to it comes in these, whatever the sender's own are (rule K-12).
    pub blocks: BlockShape,
}

/// Where the tokens of one page lie in the sender's pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PageSource {
    /// The sender's blocks that hold them, in order; at least one.
    pub blocks: Vec<BlockId>,
    /// Tokens in front of them in the first block.
    pub skip: u32,
    /// How many they are; the slots after them stay zero (rule K-3).
    pub tokens: u32,
}

impl PageSource {
    /// Page `index` in blocks of `size` tokens of a sequence of `tokens`, which lies in `blocks` of `own` tokens each.
    ///
    /// # Panics
    ///
    /// If the sequence has no such page, or its tokens are not in `blocks`.
    pub fn of(index: u32, size: u32, tokens: u32, blocks: &[BlockId], own: u32) -> Self {
        let first = index * size;
        let end = first.saturating_add(size).min(tokens);
        let blocks = blocks[(first / own) as usize..end.div_ceil(own) as usize].to_vec();
        Self { blocks, skip: first % own, tokens: end - first }
    }
}

/// From the scheduler that has the KV to the sender.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum SendCommand {
    /// A prompt waits here that is to be sent: its peer learns that somebody works for it. Before every `Begin`.
    Announce {
        /// The transfer.
        request: RequestId,
        /// To whom.
        to: KvPeer,
    },
    /// Offer a prompt's blocks to a decode node.
    Begin(SendJob),
    /// The pages of the receiver's blocks `first..end` of the sequence are complete in `layer`.
    Ready {
        /// The transfer.
        request: RequestId,
        /// The layer, from 0.
        layer: u32,
        /// First block index.
        first: u32,
        /// One past the last block index.
        end: u32,
    },
    /// All pages are ready and the first token is known.
    Finish {
        /// The transfer.
        request: RequestId,
        /// The token sampled after the prompt.
        first: TokenOut,
    },
    /// Give up; the scheduler has already forgotten the request.
    Cancel {
        /// The transfer.
        request: RequestId,
        /// Said to the peer and logged.
        reason: String,
    },
}

/// What is offered.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SendJob {
    /// The transfer.
    pub request: RequestId,
    /// To whom.
    pub to: KvPeer,
    /// Prompt length in tokens.
    pub tokens: u32,
    /// The sender's blocks of the prompt in order, the last possibly part-filled.
    pub blocks: Vec<BlockId>,
    /// Chain hashes of the full ones of the receiver's blocks, in order.
    pub hashes: Vec<BlockHash>,
    /// Layers of the model.
    pub layers: u32,
}

/// From the sender to the scheduler that has the KV.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum SendEvent {
    /// The transfer is over and its blocks may go. Said exactly once per `Announce` that was not cancelled.
    Settled {
        /// The transfer.
        request: RequestId,
        /// How it ended.
        outcome: Outcome,
    },
}

/// From the decode scheduler to the receiver.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ReceiveCommand {
    /// Blocks are reserved for this transfer.
    Expect(ReceiveJob),
    /// Give up; the scheduler takes its blocks back at once.
    Cancel {
        /// The transfer.
        request: RequestId,
        /// Said to the peer and logged.
        reason: String,
    },
}

/// What is expected.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReceiveJob {
    /// The transfer.
    pub request: RequestId,
    /// From whom; an offer by anybody else is refused.
    pub from: NodeName,
    /// Prompt length in tokens.
    pub tokens: u32,
    /// Reserved blocks of the whole prompt, in order.
    pub blocks: Vec<BlockId>,
    /// Chain hashes of the full blocks as this node computed them; the offer must agree.
    pub hashes: Vec<BlockHash>,
    /// Leading blocks whose KV this node already has: only the others are granted.
    pub have: u32,
    /// Layers of the model.
    pub layers: u32,
}

/// From the receiver to the decode scheduler.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ReceiveEvent {
    /// Every granted page landed and verified: the reservation may be committed.
    Landed {
        /// The transfer.
        request: RequestId,
        /// The token sampled by the prefill node.
        first: TokenOut,
        /// Pages that came over the wire.
        pages: u64,
        /// Their bytes, headers not counted.
        bytes: u64,
    },
    /// The transfer failed; the reservation must be given up or filled some other way.
    Failed {
        /// The transfer.
        request: RequestId,
        /// Why.
        reason: String,
    },
}

/// How much of a transfer somebody had to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TransferTimes {
    /// From the first page until the scheduler had computed everything: hidden behind the computing, in microseconds.
    pub hidden_us: u64,
    /// From then until the receiver had verified the last page and said so, in microseconds.
    pub exposed_us: u64,
}

impl std::ops::Add for TransferTimes {
    type Output = Self;

    /// Saturates: the figures may be a peer's.
    fn add(self, other: Self) -> Self {
        Self {
            hidden_us: self.hidden_us.saturating_add(other.hidden_us),
            exposed_us: self.exposed_us.saturating_add(other.exposed_us),
        }
    }
}

/// How a transfer ended on the sender's side.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// The receiver verified and committed everything.
    Committed {
        /// Pages sent.
        pages: u64,
        /// Their bytes.
        bytes: u64,
        /// How it lay beside the computing.
        times: TransferTimes,
    },
    /// It failed or was aborted by the receiver.
    Aborted(String),
}
