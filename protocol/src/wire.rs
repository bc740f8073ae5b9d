//! Control messages and their framing. The only user of bincode in the workspace.
//!
//! A frame is a 16-byte header (magic `RDG1`, version, message class, body length, reserved) and a bincode body in
//! fixed-int little-endian layout. [`FrameHeader::decode`] refuses a length above its class's limit before a byte of the body is
//! read; [`decode`] refuses trailing bytes. Rules W-1 to W-6 in docs/protocol.md.

use crate::ids::{BlockHash, NodeId, NodeName, RequestId, Role, TokenId};
use crate::limits;
use crate::model::{BlockShape, Conversion, ModelIdentity};
use crate::plan::TokenOut;
use crate::sampling::SamplingParams;
use crate::stats::{LinkStats, NodeStats};
use crate::transfer::{KvPeer, TransferTimes};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// From a node to the router, on the control stream that the node opens.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum NodeToRouter {
    /// Who this is. Always first, and only once (rule C-1).
    Hello(NodeHello),
    /// A generated token. `index` counts the answer's tokens from 0; duplicates are dropped by index.
    Token {
        /// Whose.
        request: RequestId,
        /// Position within the answer.
        index: u32,
        /// The token.
        out: TokenOut,
        /// Set on the last one.
        finish: Option<FinishReason>,
    },
    /// Where the prompt's KV came from on this node. At most once per request and node.
    Receipt {
        /// Whose.
        request: RequestId,
        /// The figures.
        receipt: Receipt,
    },
    /// The request ended without an answer on this node.
    Failed {
        /// Whose.
        request: RequestId,
        /// Why.
        error: NodeError,
    },
    /// Gauges and counters, about once a second and whenever the node goes idle.
    Stats(NodeStats),
    /// Changes of the node's prefix cache since the last report.
    CacheChanged {
        /// Blocks that can now be matched.
        added: Vec<BlockHash>,
        /// Blocks that no longer can.
        removed: Vec<BlockHash>,
    },
    /// No request is left after a `Drain`.
    Drained,
    /// A hand-off was committed. At most once per request and sender; may come after the answer's end.
    Shipped {
        /// Whose.
        request: RequestId,
        /// How much of it somebody waited for.
        times: TransferTimes,
    },
    /// The process is about to stop: its sequences want to be moved, and it takes no new ones.
    Draining,
    /// The answer to `Move`: this dispatch has said its last token, and its KV is on offer (rule C-12).
    Moving {
        /// The dispatch that ended.
        request: RequestId,
        /// Prompt and answer so far, in tokens. KV of all but the last is on offer.
        len: u32,
    },
    /// The prefill node's connections to decode nodes, with every `Stats`.
    Links(Vec<LinkStats>),
}

/// From the router to a node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum RouterToNode {
    /// The node is part of the cluster under this number.
    Welcome {
        /// Its number.
        node: NodeId,
    },
    /// The node may not join.
    Refuse {
        /// Names the reason and the fix.
        reason: String,
    },
    /// Compute a prompt, ship it, sample the first token. Prefill nodes only.
    Prefill(PrefillRequest),
    /// Reserve blocks for a sequence, take its KV and continue it. Decode nodes only.
    Decode(DecodeRequest),
    /// Forget a request and free everything it holds. Idempotent (rule C-6).
    Cancel {
        /// Which.
        request: RequestId,
    },
    /// Accept nothing new, finish what runs, then say `Drained`.
    Drain,
    /// The prefill node cannot hand this request over, and this decode node may not have heard (rule C-8).
    TransferFailed {
        /// Which.
        request: RequestId,
        /// Why.
        reason: String,
    },
    /// Ship a sequence's KV to another decode node and generate no more of it: this node drains (rule C-12). Decode
    /// nodes only. One that has no KV of it yet refuses with [`NodeError::Draining`].
    Move {
        /// The dispatch under which it runs here.
        request: RequestId,
        /// The dispatch under which it goes on there, which is also the transfer's.
        next: RequestId,
        /// Who continues.
        to: KvPeer,
    },
}

/// A node introduces itself.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeHello {
    /// Must be the name in the node's certificate.
    pub name: NodeName,
    /// Prefill or decode.
    pub role: Role,
    /// Where it takes KV (decode nodes).
    pub kv_addr: Option<SocketAddr>,
    /// What it serves.
    pub identity: ModelIdentity,
    /// Longest sequence it accepts, in tokens.
    pub max_model_len: u32,
    /// Blocks in its pool.
    pub blocks: u32,
    /// Operating system process id, shown in the topology.
    pub pid: u32,
}

/// Work for a prefill node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PrefillRequest {
    /// The dispatch.
    pub request: RequestId,
    /// Who continues; `None` when the first token is also the last.
    pub to: Option<KvPeer>,
    /// The prompt, and whatever was already generated before a failover.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are the client's prompt; the rest was generated before a failover.
    pub prompt_len: u32,
    /// Salt of the prefix hashes: sequences with different salts share nothing.
    pub salt: u64,
    /// Sampling.
    pub params: SamplingParams,
}

/// Work for a decode node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DecodeRequest {
    /// The dispatch.
    pub request: RequestId,
    /// Who sends the KV; `None` asks the decode node to compute the prompt itself.
    pub from: Option<NodeName>,
    /// As in [`PrefillRequest`].
    pub tokens: Vec<TokenId>,
    /// As in [`PrefillRequest`].
    pub prompt_len: u32,
    /// As in [`PrefillRequest`].
    pub salt: u64,
    /// Sampling.
    pub params: SamplingParams,
    /// There is no other node for it: it is to be taken although this one drains (rule C-12).
    pub last_resort: bool,
}

/// Why a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FinishReason {
    /// A stop token (or, at the router, a stop string).
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
}

/// Where a prompt's KV came from on one node, in tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Receipt {
    /// Found in the node's prefix cache.
    pub cached: u32,
    /// Computed here as planned.
    pub computed: u32,
    /// Came by KV transfer.
    pub transferred: u32,
    /// Computed here although it was to come by transfer, or computed a second time.
    pub recomputed: u32,
    /// Bytes that came by transfer.
    pub transfer_bytes: u64,
    /// What of the transfer lay behind the computing and what did not, as the sender measured it. The router's to fill
    /// in; zero in a node's own receipt.
    pub times: TransferTimes,
    /// What the blocks that came by transfer were converted from and to. The router's to fill in; `None` if they were
    /// taken as they were.
    pub converted: Option<Conversion>,
}

/// Why a node could not do its part.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum NodeError {
    /// The request itself can never run here.
    #[error("{0}")]
    Invalid(String),
    /// Full; try elsewhere or later.
    #[error("overloaded: {0}")]
    Overloaded(String),
    /// The hand-off failed.
    #[error("KV transfer failed: {0}")]
    Transfer(String),
    /// The node is draining.
    #[error("draining")]
    Draining,
}

impl NodeError {
    /// Names what keeps a node of this vocabulary and context from running a request, whatever its load.
    pub fn check_request(
        tokens: &[TokenId],
        prompt_len: u32,
        params: &SamplingParams,
        vocab: u32,
        max_model_len: u32,
    ) -> Result<(), NodeError> {
        let len = tokens.len();
        if len == 0 || prompt_len == 0 || prompt_len as usize > len {
            return Err(NodeError::Invalid("the prompt is empty".into()));
        }
        if len >= max_model_len as usize {
            let reason = format!("a prompt of {len} tokens leaves no room in a context of {max_model_len}");
            return Err(NodeError::Invalid(reason));
        }
        if let Some(token) = tokens.iter().find(|&&token| token >= vocab) {
            return Err(NodeError::Invalid(format!("token {token} is outside the vocabulary of {vocab}")));
        }
        params.check().map_err(NodeError::Invalid)
    }
}

/// From the KV sender (a prefill node, or a decode node that drains) to the receiver, on the connection's control stream.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum SenderMsg {
    /// Always first (rule K-5): who sends, and for which model.
    Hello {
        /// Must be the name in the sender's certificate.
        name: NodeName,
        /// Compared field by field.
        identity: ModelIdentity,
        /// The blocks in which it will send: the receiver's, as the router told it.
        blocks: BlockShape,
    },
    /// Blocks on offer.
    Offer {
        /// The transfer.
        request: RequestId,
        /// Prompt length in tokens.
        tokens: u32,
        /// Chain hashes of the full ones of the receiver's blocks.
        hashes: Vec<BlockHash>,
    },
    /// Every granted page has been written to a stream.
    Finish {
        /// The transfer.
        request: RequestId,
        /// How many pages were sent in all.
        pages: u64,
        /// The token sampled after the prompt.
        first: TokenOut,
    },
    /// The sender gives up. Idempotent, and acknowledged in every state (rule K-10).
    Abort {
        /// The transfer.
        request: RequestId,
        /// Why.
        reason: String,
    },
    /// The receiver's `Abort` was heard.
    Aborted {
        /// The transfer.
        request: RequestId,
    },
    /// The sender still means to serve these: their leases are renewed (rule K-11).
    Alive {
        /// The transfers.
        requests: Vec<RequestId>,
    },
}

/// From the KV receiver (decode node) to the sender.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ReceiverMsg {
    /// The identities agree; offers may follow.
    Welcome,
    /// No KV may pass.
    Refuse {
        /// Names the field that differs and both values.
        reason: String,
    },
    /// Send the blocks from `first_block` on.
    Grant {
        /// The transfer.
        request: RequestId,
        /// Blocks before this one are already here.
        first_block: u32,
        /// Pages that may be in flight before more credit comes.
        credit: u32,
    },
    /// More pages may be sent.
    Credit {
        /// The transfer.
        request: RequestId,
        /// How many more.
        pages: u32,
    },
    /// Every page landed and verified. The sender may let go.
    Commit {
        /// The transfer.
        request: RequestId,
    },
    /// The receiver gives up. Idempotent, and acknowledged in every state (rule K-10).
    Abort {
        /// The transfer.
        request: RequestId,
        /// Why.
        reason: String,
    },
    /// The sender's `Abort` was heard.
    Aborted {
        /// The transfer.
        request: RequestId,
    },
    /// The receiver still looks for blocks for these offers: their leases are renewed (rule K-11).
    Alive {
        /// The transfers.
        requests: Vec<RequestId>,
    },
}

/// A message type with a class number and a size limit.
pub trait Message: Serialize + DeserializeOwned {
    /// Distinguishes the streams' languages: a frame of another class is refused.
    const CLASS: u16;
    /// Longest body in bytes.
    const MAX_BYTES: usize;
}

impl Message for NodeToRouter {
    const CLASS: u16 = 1;
    const MAX_BYTES: usize = limits::MAX_PROMPT_BYTES;
}
impl Message for RouterToNode {
    const CLASS: u16 = 2;
    const MAX_BYTES: usize = limits::MAX_PROMPT_BYTES;
}
impl Message for SenderMsg {
    const CLASS: u16 = 3;
    const MAX_BYTES: usize = limits::MAX_PROMPT_BYTES;
}
impl Message for ReceiverMsg {
    const CLASS: u16 = 4;
    const MAX_BYTES: usize = limits::MAX_CONTROL_BYTES;
}

/// Bytes of an encoded [`FrameHeader`].
pub const FRAME_HEADER_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"RDG1";

/// What stands before every control message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// [`Message::CLASS`].
    pub class: u16,
    /// Bytes of the body.
    pub len: u32,
}

/// Why a frame was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// The first four bytes are not `RDG1`.
    #[error("frame does not start with RDG1")]
    Magic,
    /// The peer speaks another version.
    #[error("frame has protocol version {0}, this node speaks {ours}", ours = limits::PROTOCOL_VERSION)]
    Version(u16),
    /// A message of another stream.
    #[error("frame of class {got} where class {want} was expected")]
    Class {
        /// In the header.
        got: u16,
        /// Of this stream.
        want: u16,
    },
    /// The body is longer than its class allows.
    #[error("body of {len} bytes is above the limit of {max}")]
    TooLong {
        /// Announced or encoded length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A reserved byte is not zero.
    #[error("reserved bytes of a frame are not zero")]
    Reserved,
    /// The body does not decode.
    #[error("malformed body: {0}")]
    Body(String),
    /// The body decodes but goes on.
    #[error("{0} bytes after the message")]
    Trailing(usize),
}

impl FrameHeader {
    /// Reads the header of a message of type `M`.
    pub fn decode<M: Message>(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, WireError> {
        if bytes[0..4] != MAGIC {
            return Err(WireError::Magic);
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != limits::PROTOCOL_VERSION {
            return Err(WireError::Version(version));
        }
        let class = u16::from_le_bytes([bytes[6], bytes[7]]);
        if class != M::CLASS {
            return Err(WireError::Class { got: class, want: M::CLASS });
        }
        let len = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if len as usize > M::MAX_BYTES {
            return Err(WireError::TooLong { len: len as usize, max: M::MAX_BYTES });
        }
        if bytes[12..16] != [0; 4] {
            return Err(WireError::Reserved);
        }
        Ok(Self { class, len })
    }
}

/// Encodes a message as one frame, header included.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, WireError> {
    let mut out = vec![0; FRAME_HEADER_BYTES];
    let config = bincode::config::standard().with_little_endian().with_fixed_int_encoding();
    bincode::serde::encode_into_std_write(message, &mut out, config).map_err(|e| WireError::Body(e.to_string()))?;
    let len = out.len() - FRAME_HEADER_BYTES;
    if len > M::MAX_BYTES {
        return Err(WireError::TooLong { len, max: M::MAX_BYTES });
    }
    out[0..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&limits::PROTOCOL_VERSION.to_le_bytes());
    out[6..8].copy_from_slice(&M::CLASS.to_le_bytes());
    out[8..12].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(out)
}

/// Decodes a frame's body.
pub fn decode<M: Message>(body: &[u8]) -> Result<M, WireError> {
    // The largest limit of any class bounds bincode's allocations; the class's own limit was checked on the header.
    let config = bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<{ limits::MAX_PROMPT_BYTES }>();
    let (message, used) =
        bincode::serde::decode_from_slice(body, config).map_err(|e| WireError::Body(e.to_string()))?;
    if used != body.len() {
        return Err(WireError::Trailing(body.len() - used));
    }
    Ok(message)
}

/// Appends any value, for a file: integers take the bytes they need. What crosses a wire goes through [`encode`].
pub fn pack<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    bincode::serde::encode_into_std_write(value, out, bincode::config::standard())
        .expect("derived types can be packed, and a Vec takes everything");
}

/// Reads a value that [`pack`] has written; every byte string yields a value or an error.
pub fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    // Bounds bincode's allocations, as in `decode`.
    let config = bincode::config::standard().with_limit::<{ crate::record::MAX_FRAME_BYTES }>();
    let (value, used) = bincode::serde::decode_from_slice(bytes, config).map_err(|e| WireError::Body(e.to_string()))?;
    if used != bytes.len() {
        return Err(WireError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CacheDtype;

    fn round_trip<M: Message + PartialEq + std::fmt::Debug>(message: M) {
        let frame = encode(&message).expect("encodes");
        let mut header = [0; FRAME_HEADER_BYTES];
        header.copy_from_slice(&frame[..FRAME_HEADER_BYTES]);
        let header = FrameHeader::decode::<M>(&header).expect("own header");
        assert_eq!(header.len as usize, frame.len() - FRAME_HEADER_BYTES);
        assert_eq!(decode::<M>(&frame[FRAME_HEADER_BYTES..]), Ok(message));
    }

    #[test]
    fn messages_round_trip() {
        round_trip(RouterToNode::Cancel { request: RequestId(9) });
        round_trip(NodeToRouter::Token {
            request: RequestId(1),
            index: 3,
            out: TokenOut { token: 5, logprob: Some(-0.5), top: vec![(5, -0.5), (6, -1.5)], ends: false },
            finish: Some(FinishReason::Length),
        });
        round_trip(SenderMsg::Offer { request: RequestId(2), tokens: 17, hashes: vec![BlockHash([7; 16])] });
        round_trip(ReceiverMsg::Grant { request: RequestId(2), first_block: 1, credit: 64 });
    }

    /// The layout is part of the protocol: another encoder must produce these bytes.
    #[test]
    fn golden_bytes() {
        let frame =
            encode(&ReceiverMsg::Grant { request: RequestId(0x0102), first_block: 3, credit: 4 }).expect("encodes");
        let want: [u8; 36] = [
            b'R', b'D', b'G', b'1', 5, 0, 4, 0, 20, 0, 0, 0, 0, 0, 0, 0, // header
            2, 0, 0, 0, // variant
            2, 1, 0, 0, 0, 0, 0, 0, // request
            3, 0, 0, 0, 4, 0, 0, 0,
        ];
        assert_eq!(frame, want);
    }

    /// A receiver's blocks as the router tells a sender: size and number of the type.
    #[test]
    fn golden_bytes_of_a_peer() {
        let blocks = BlockShape::new(32, CacheDtype::Int8).expect("a block holds a token");
        let to = KvPeer { name: NodeName("d".into()), addr: ([127, 0, 0, 1], 0x0102).into(), blocks };
        let message = RouterToNode::Move { request: RequestId(1), next: RequestId(2), to };
        let frame = encode(&message).expect("encodes");
        let want: [u8; 47] = [
            7, 0, 0, 0, // variant
            1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, // requests
            1, 0, 0, 0, 0, 0, 0, 0, b'd', // name
            0, 0, 0, 0, 127, 0, 0, 1, 2, 1, // address: v4, port
            32, 0, 0, 0, 4, 0, 0, 0, // blocks
        ];
        assert_eq!(frame[FRAME_HEADER_BYTES..], want);
        let mut none = frame[FRAME_HEADER_BYTES..].to_vec();
        none[39] = 0;
        assert!(matches!(decode::<RouterToNode>(&none), Err(WireError::Body(_))), "no block holds no token");
    }

    #[test]
    fn hostile_frames_are_refused() {
        let good = encode(&ReceiverMsg::Welcome).expect("encodes");
        let header = |edit: &dyn Fn(&mut [u8; FRAME_HEADER_BYTES])| {
            let mut bytes = [0; FRAME_HEADER_BYTES];
            bytes.copy_from_slice(&good[..FRAME_HEADER_BYTES]);
            edit(&mut bytes);
            FrameHeader::decode::<ReceiverMsg>(&bytes)
        };
        assert_eq!(header(&|b| b[0] = 0), Err(WireError::Magic));
        assert_eq!(header(&|b| b[4] = 7), Err(WireError::Version(7)));
        assert_eq!(header(&|b| b[6] = 1), Err(WireError::Class { got: 1, want: 4 }));
        assert!(matches!(header(&|b| b[11] = 0x7f), Err(WireError::TooLong { .. })));
        assert_eq!(header(&|b| b[12] = 1), Err(WireError::Reserved));
        // A string of 2^62 bytes must not be allocated.
        let mut body = vec![1, 0, 0, 0];
        body.extend_from_slice(&(1u64 << 62).to_le_bytes());
        assert!(matches!(decode::<ReceiverMsg>(&body), Err(WireError::Body(_))));
        assert_eq!(decode::<ReceiverMsg>(&[0, 0, 0, 0, 9]), Err(WireError::Trailing(1)));
    }

    /// No byte string panics the decoder: every prefix and every single-byte change of a frame.
    #[test]
    fn mutated_bodies_never_panic() {
        let message = NodeToRouter::Failed { request: RequestId(1), error: NodeError::Invalid("too long".into()) };
        let frame = encode(&message).expect("encodes");
        let body = &frame[FRAME_HEADER_BYTES..];
        for end in 0..body.len() {
            let _ = decode::<NodeToRouter>(&body[..end]);
        }
        for at in 0..body.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = body.to_vec();
                changed[at] = value;
                let _ = decode::<NodeToRouter>(&changed);
            }
        }
    }
}
