//! What hostile peers say, spelled by a fuzzer's bytes: messages that are well-formed and mean anything.
//!
//! A tenth of them are decoded from raw bytes, so that nothing the wire lets through is missing here.

use super::nodes::BLOCK_SIZE;
use crate::draw::Draw;
use ridge_protocol::stats::NodeStats;
use ridge_protocol::transfer::{KvPeer, TransferTimes};
use ridge_protocol::wire::{
    self, DecodeRequest, FinishReason, Message, NodeError, NodeHello, NodeToRouter, PrefillRequest, Receipt,
    ReceiverMsg, RouterToNode, SenderMsg,
};
use ridge_protocol::{
    BlockHash, BlockShape, CacheDtype, Grammar, GrammarKind, ModelIdentity, NodeName, RequestId, Role, SamplingParams,
    TokenId, TokenOut,
};

/// Tokens of the model that the machines believe in.
pub(super) const VOCAB: u32 = 8;

fn raw<M: Message>(draw: &mut Draw<'_>) -> Option<M> {
    let len = draw.byte().into();
    wire::decode(draw.bytes(len)).ok()
}

/// One of a few requests, so that messages meet.
pub(super) fn request(draw: &mut Draw<'_>) -> RequestId {
    RequestId(match draw.byte() {
        0xff => u64::MAX,
        other => u64::from(other % 5),
    })
}

/// One of two peers, or nobody's name.
pub(super) fn peer(draw: &mut Draw<'_>) -> NodeName {
    NodeName(["a", "b", "nobody"][draw.below(3) as usize].into())
}

/// Mostly one whose blocks are the node's own.
pub(super) fn kv_peer(draw: &mut Draw<'_>) -> KvPeer {
    let (size, dtype) = match draw.below(8) {
        0 => (3, CacheDtype::F32),
        1 => (16, CacheDtype::Int8),
        2 => (u32::MAX, CacheDtype::F16),
        _ => (BLOCK_SIZE, CacheDtype::F32),
    };
    let blocks = BlockShape::new(size, dtype).expect("a block holds a token");
    KvPeer { name: peer(draw), addr: ([127, 0, 0, 1], draw.below(2) as u16).into(), blocks }
}

pub(super) fn tokens(draw: &mut Draw<'_>) -> Vec<TokenId> {
    let len = if draw.byte() == 0xff { 500 } else { draw.below(40) };
    // Mostly one of two tokens, so that prompts share prefixes.
    (0..len)
        .map(|_| match draw.byte() {
            0xff => u32::MAX,
            other => u32::from(other % 2),
        })
        .collect()
}

pub(super) fn token_out(draw: &mut Draw<'_>) -> TokenOut {
    let token = if draw.byte() == 0xff { u32::MAX } else { draw.below(VOCAB) };
    let top = (0..draw.below(3)).map(|id| (id, draw.float())).collect();
    TokenOut { token, logprob: draw.coin().then(|| draw.float()), top, ends: draw.one_in(8) }
}

pub(super) fn params(draw: &mut Draw<'_>) -> SamplingParams {
    let plain = SamplingParams { max_tokens: draw.number(), ..SamplingParams::greedy(1) };
    if !draw.one_in(4) {
        return plain;
    }
    SamplingParams {
        temperature: draw.float(),
        top_p: draw.float(),
        top_k: draw.number(),
        min_p: draw.float(),
        repetition_penalty: draw.float(),
        presence_penalty: draw.float(),
        frequency_penalty: draw.float(),
        logit_bias: (0..draw.below(3)).map(|_| (draw.number(), draw.float())).collect(),
        seed: draw.wide(),
        logprobs: draw.coin().then(|| draw.byte()),
        stop_tokens: (0..draw.below(3)).map(|_| draw.number()).collect(),
        ignore_eos: draw.coin(),
        max_tokens: draw.number(),
        grammar: draw.coin().then(|| Box::new(Grammar { kind: GrammarKind::Regex, text: text(draw) })),
    }
}

fn prompt_len(draw: &mut Draw<'_>, tokens: usize) -> u32 {
    if draw.one_in(4) { draw.number() } else { tokens as u32 }
}

fn text(draw: &mut Draw<'_>) -> String {
    ["", "x", "\u{0}\n", "é"][draw.below(4) as usize].into()
}

/// From a router that says anything.
pub(super) fn router_to_node(draw: &mut Draw<'_>) -> Option<RouterToNode> {
    let request = request(draw);
    Some(match draw.below(20) {
        0 => return raw(draw),
        1 => RouterToNode::Drain,
        2 => RouterToNode::Welcome { node: ridge_protocol::NodeId(draw.number()) },
        3 => RouterToNode::Refuse { reason: text(draw) },
        4 | 5 => RouterToNode::TransferFailed { request, reason: text(draw) },
        6 | 7 => RouterToNode::Cancel { request },
        8 => RouterToNode::Move { request, next: self::request(draw), to: kv_peer(draw) },
        kind => {
            let (tokens, salt, params) = (tokens(draw), draw.below(2).into(), params(draw));
            let prompt_len = prompt_len(draw, tokens.len());
            if kind % 2 == 0 {
                let to = draw.coin().then(|| kv_peer(draw));
                RouterToNode::Prefill(PrefillRequest { request, to, tokens, prompt_len, salt, params })
            } else {
                let from = draw.coin().then(|| peer(draw));
                RouterToNode::Decode(DecodeRequest {
                    request,
                    from,
                    tokens,
                    prompt_len,
                    salt,
                    params,
                    last_resort: draw.one_in(4),
                })
            }
        }
    })
}

/// From a prefill node that says anything. `hashes` are those of a request that the receiver may know.
pub(super) fn sender(
    draw: &mut Draw<'_>,
    known: impl Fn(RequestId) -> Option<(u32, Vec<BlockHash>)>,
) -> Option<SenderMsg> {
    let request = request(draw);
    Some(match draw.below(10) {
        0 => return raw(draw).filter(|message| !matches!(message, SenderMsg::Hello { .. })),
        1 => match draw.below(3) {
            0 => SenderMsg::Abort { request, reason: text(draw) },
            1 => SenderMsg::Aborted { request },
            _ => SenderMsg::Alive { requests: vec![request, RequestId(draw.wide())] },
        },
        2 | 3 => SenderMsg::Finish { request, pages: draw.wide(), first: token_out(draw) },
        kind => match known(request).filter(|_| kind > 4) {
            Some((tokens, hashes)) => SenderMsg::Offer { request, tokens, hashes },
            None => {
                let hashes = (0..draw.below(40)).map(|_| BlockHash([draw.byte(); 16])).collect();
                SenderMsg::Offer { request, tokens: draw.number(), hashes }
            }
        },
    })
}

/// From a decode node that says anything.
pub(super) fn receiver(draw: &mut Draw<'_>) -> Option<ReceiverMsg> {
    let request = request(draw);
    Some(match draw.below(10) {
        0 => {
            return raw(draw).filter(|message| !matches!(message, ReceiverMsg::Welcome | ReceiverMsg::Refuse { .. }));
        }
        1 => match draw.below(3) {
            0 => ReceiverMsg::Abort { request, reason: text(draw) },
            1 => ReceiverMsg::Aborted { request },
            _ => ReceiverMsg::Alive { requests: vec![request, RequestId(draw.wide())] },
        },
        2 | 3 => ReceiverMsg::Commit { request },
        4 | 5 => ReceiverMsg::Credit { request, pages: draw.number() },
        _ => ReceiverMsg::Grant { request, first_block: draw.number(), credit: draw.number() },
    })
}

fn times(draw: &mut Draw<'_>) -> TransferTimes {
    TransferTimes { hidden_us: draw.wide(), exposed_us: draw.wide() }
}

/// Says hello as some node.
pub(super) fn hello(draw: &mut Draw<'_>) -> NodeHello {
    let odd = draw.one_in(4);
    let mut size = |usual: u32| if odd && draw.coin() { draw.number() } else { usual };
    let identity = ModelIdentity {
        weights: [0; 32],
        config: [0; 32],
        tokenizer: [0; 32],
        layers: size(2),
        kv_heads: size(1),
        head_dim: size(2),
        block_size: size(4),
        kv_dtype: CacheDtype::ALL[size(0) as usize % CacheDtype::ALL.len()],
        kv_layout: ridge_protocol::KV_LAYOUT.into(),
        rope: String::new(),
    };
    let (max_model_len, blocks) = (size(64), size(32));
    NodeHello {
        name: NodeName(format!("n{}", draw.below(6))),
        role: [Role::Prefill, Role::Decode, Role::Decode, Role::Router][draw.below(4) as usize],
        kv_addr: (!draw.one_in(8)).then(|| ([127, 0, 0, 1], draw.byte().into()).into()),
        identity,
        max_model_len,
        blocks,
        pid: 1,
    }
}

/// From a node that says anything about one of these requests.
pub(super) fn node_to_router(draw: &mut Draw<'_>, requests: &[RequestId]) -> Option<NodeToRouter> {
    let request = match requests.len() {
        0 => request(draw),
        n if !draw.one_in(8) => requests[draw.below(n.min(200) as u32) as usize],
        _ => request(draw),
    };
    Some(match draw.below(16) {
        0 => return raw(draw),
        1 => NodeToRouter::Drained,
        2 => {
            let hashes = |draw: &mut Draw<'_>| (0..draw.below(20)).map(|_| BlockHash([draw.byte(); 16])).collect();
            NodeToRouter::CacheChanged { added: hashes(draw), removed: hashes(draw) }
        }
        3 => {
            let edge = draw.wide();
            let stats = NodeStats { queued_tokens: edge, computed_tokens: edge, busy_us: edge, ..NodeStats::default() };
            NodeToRouter::Stats(NodeStats { waiting: draw.number(), running: draw.number(), ..stats })
        }
        4 => NodeToRouter::Failed {
            request,
            error: match draw.below(4) {
                0 => NodeError::Invalid(text(draw)),
                1 => NodeError::Overloaded(text(draw)),
                2 => NodeError::Transfer(text(draw)),
                _ => NodeError::Draining,
            },
        },
        5 => NodeToRouter::Receipt {
            request,
            receipt: Receipt {
                cached: draw.number(),
                computed: draw.number(),
                transferred: draw.number(),
                recomputed: draw.number(),
                transfer_bytes: draw.wide(),
                times: times(draw),
                converted: None,
            },
        },
        6 => NodeToRouter::Hello(hello(draw)),
        7 => match draw.below(3) {
            0 => NodeToRouter::Draining,
            1 => NodeToRouter::Shipped { request, times: times(draw) },
            _ => NodeToRouter::Moving { request, len: draw.below(40) },
        },
        _ => NodeToRouter::Token {
            request,
            index: if !draw.one_in(4) { draw.below(6) } else { draw.number() },
            out: token_out(draw),
            finish: match draw.below(12) {
                0 => Some(FinishReason::Stop),
                1 => Some(FinishReason::Length),
                _ => None,
            },
        },
    })
}
