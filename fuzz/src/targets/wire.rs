//! Frames and page headers: what a peer's bytes may be before anything else has looked at them.

use ridge_protocol::page::{PAGE_HEADER_BYTES, PageHeader};
use ridge_protocol::transfer::KvPeer;
use ridge_protocol::wire::{
    self, DecodeRequest, FRAME_HEADER_BYTES, FinishReason, FrameHeader, Message, NodeError, NodeHello, NodeToRouter,
    PrefillRequest, Receipt, ReceiverMsg, RouterToNode, SenderMsg,
};
use ridge_protocol::{
    BlockHash, BlockShape, CacheDtype, Grammar, GrammarKind, ModelIdentity, NodeId, NodeName, RequestId, Role,
    SamplingParams, TokenOut, limits, stats::NodeStats,
};
use std::fmt::Debug;

/// One or more frames of one class, as they come on a control stream. What decodes must encode to the same bytes:
/// two spellings of one message would be two protocols.
fn frames<M: Message + Debug>(mut bytes: &[u8]) {
    while let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() {
        let Ok(FrameHeader { len, .. }) = FrameHeader::decode::<M>(header) else { return };
        assert!(len as usize <= M::MAX_BYTES, "a length above the class's limit passed");
        let Some((body, rest)) = rest.split_at_checked(len as usize) else { return };
        if let Ok(message) = wire::decode::<M>(body) {
            assert_eq!(wire::encode(&message).expect("it came in a frame")[FRAME_HEADER_BYTES..], *body, "{message:?}");
        }
        bytes = rest;
    }
}

/// The same without the header, which random bytes rarely pass.
fn body<M: Message + Debug>(bytes: &[u8]) {
    frames::<M>(bytes);
    if let Ok(message) = wire::decode::<M>(bytes) {
        assert_eq!(wire::encode(&message).expect("it is as short as its bytes")[FRAME_HEADER_BYTES..], *bytes);
    }
}

pub(super) fn node_to_router(bytes: &[u8]) {
    body::<NodeToRouter>(bytes);
}

pub(super) fn router_to_node(bytes: &[u8]) {
    body::<RouterToNode>(bytes);
}

pub(super) fn sender(bytes: &[u8]) {
    body::<SenderMsg>(bytes);
}

pub(super) fn receiver(bytes: &[u8]) {
    body::<ReceiverMsg>(bytes);
}

/// A page's header, which is the only part of it that is decoded.
pub(super) fn page(bytes: &[u8]) {
    let Some(header) = bytes.first_chunk::<PAGE_HEADER_BYTES>() else { return };
    if let Ok(page) = PageHeader::decode(header) {
        assert!((1..=limits::MAX_PAGE_BYTES).contains(&(page.len as usize)), "{} bytes passed", page.len);
        assert_eq!(page.encode(), *header, "a header has one spelling");
    }
}

/// Every message with its header, and without.
fn seeds<M: Message>(messages: &[M]) -> Vec<Vec<u8>> {
    let frames: Vec<Vec<u8>> = messages.iter().map(|message| wire::encode(message).expect("encodes")).collect();
    let bodies = frames.iter().map(|frame| frame[FRAME_HEADER_BYTES..].to_vec());
    bodies.chain(frames.iter().cloned()).chain([frames.concat()]).collect()
}

fn token_out() -> TokenOut {
    TokenOut { token: 5, logprob: Some(-0.5), top: vec![(5, -0.5), (6, -1.5)], ends: false }
}

fn identity() -> ModelIdentity {
    ModelIdentity {
        weights: [1; 32],
        config: [2; 32],
        tokenizer: [3; 32],
        layers: 2,
        kv_heads: 2,
        head_dim: 16,
        block_size: 16,
        kv_dtype: CacheDtype::Bf16,
        kv_layout: ridge_protocol::KV_LAYOUT.into(),
        rope: "theta=1e4".into(),
    }
}

fn blocks() -> BlockShape {
    BlockShape::new(32, CacheDtype::Int8).expect("a block holds a token")
}

fn params() -> SamplingParams {
    SamplingParams {
        logit_bias: vec![(1, 0.5)],
        stop_tokens: vec![2, 3],
        logprobs: Some(2),
        grammar: Some(Box::new(Grammar { kind: GrammarKind::JsonSchema, text: "{}".into() })),
        ..SamplingParams::greedy(7)
    }
}

pub(super) fn node_to_router_seeds() -> Vec<Vec<u8>> {
    let request = RequestId(1);
    let hello = NodeHello {
        name: NodeName("decode-0".into()),
        role: Role::Decode,
        kv_addr: Some(([127, 0, 0, 1], 4433).into()),
        identity: identity(),
        max_model_len: 4096,
        blocks: 256,
        pid: 7,
    };
    seeds(&[
        NodeToRouter::Hello(hello.clone()),
        NodeToRouter::Hello(NodeHello { kv_addr: Some("[::1]:4433".parse().expect("an address")), ..hello }),
        NodeToRouter::Token { request, index: 3, out: token_out(), finish: Some(FinishReason::Length) },
        NodeToRouter::Receipt { request, receipt: Receipt { cached: 1, computed: 2, ..Receipt::default() } },
        NodeToRouter::Failed { request, error: NodeError::Overloaded("full".into()) },
        NodeToRouter::Failed { request, error: NodeError::Draining },
        NodeToRouter::Stats(NodeStats { steps: 9, ..NodeStats::default() }),
        NodeToRouter::CacheChanged { added: vec![BlockHash([1; 16])], removed: vec![BlockHash([2; 16]); 2] },
        NodeToRouter::Drained,
    ])
}

pub(super) fn router_to_node_seeds() -> Vec<Vec<u8>> {
    let request = RequestId(1);
    let (tokens, salt) = (vec![1, 2, 3], 9);
    let to = KvPeer { name: NodeName("decode-0".into()), addr: ([127, 0, 0, 1], 4433).into(), blocks: blocks() };
    let prefill =
        PrefillRequest { request, to: Some(to), tokens: tokens.clone(), prompt_len: 3, salt, params: params() };
    let from = Some(NodeName("prefill-0".into()));
    seeds(&[
        RouterToNode::Welcome { node: NodeId(3) },
        RouterToNode::Refuse { reason: "full".into() },
        RouterToNode::Prefill(prefill),
        RouterToNode::Decode(DecodeRequest {
            request,
            from,
            tokens,
            prompt_len: 3,
            salt,
            params: params(),
            last_resort: true,
        }),
        RouterToNode::Cancel { request },
        RouterToNode::Drain,
        RouterToNode::TransferFailed { request, reason: "gone".into() },
    ])
}

pub(super) fn sender_seeds() -> Vec<Vec<u8>> {
    let request = RequestId(1);
    seeds(&[
        SenderMsg::Hello { name: NodeName("prefill-0".into()), identity: identity(), blocks: blocks() },
        SenderMsg::Offer { request, tokens: 17, hashes: vec![BlockHash([7; 16])] },
        SenderMsg::Finish { request, pages: 4, first: token_out() },
        SenderMsg::Abort { request, reason: "cancelled".into() },
    ])
}

pub(super) fn receiver_seeds() -> Vec<Vec<u8>> {
    let request = RequestId(1);
    seeds(&[
        ReceiverMsg::Welcome,
        ReceiverMsg::Refuse { reason: "layers differs: 2 here, 3 there".into() },
        ReceiverMsg::Grant { request, first_block: 1, credit: 64 },
        ReceiverMsg::Credit { request, pages: 8 },
        ReceiverMsg::Commit { request },
        ReceiverMsg::Abort { request, reason: "cancelled".into() },
    ])
}

pub(super) fn page_seeds() -> Vec<Vec<u8>> {
    vec![PageHeader { request: RequestId(7), layer: 3, index: 9, len: 4096, digest: 1 << 100 }.encode().to_vec()]
}
