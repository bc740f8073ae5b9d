//! Where a sequence goes. Pure functions of what the router knows; lower cost wins, ties go to the lower number.

use super::node::Node;
use ridge_protocol::{BlockHash, NodeId, Role};
use std::collections::BTreeMap;

/// What one more decoding sequence costs the others, in prompt tokens: about the time that one decode step of a
/// batch takes next to a token of prefill.
const SEQUENCE_COST_TOKENS: u64 = 64;

/// A prefill node (none if there is none to be had) and a decode node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Placement {
    pub prefill: Option<NodeId>,
    pub decode: NodeId,
}

/// Chooses nodes for a prompt, leaving out `avoid` as long as another can be had.
pub(super) fn place(
    nodes: &BTreeMap<NodeId, Node>,
    tokens: usize,
    hashes: &[BlockHash],
    avoid: &[NodeId],
) -> Option<Placement> {
    let pick = |role: Role, cost: &dyn Fn(&Node) -> u64| {
        let usable = nodes.iter().filter(|(_, n)| n.hello.role == role && !n.draining);
        usable.min_by_key(|(id, node)| (avoid.contains(id), cost(node), **id)).map(|(id, _)| *id)
    };
    let decode = pick(Role::Decode, &|node| decode_cost(node, tokens, hashes))?;
    let prefill = pick(Role::Prefill, &|node| prefill_cost(node, tokens, hashes));
    Some(Placement { prefill, decode })
}

/// Tokens that stand before this prompt's first token, its own included.
fn prefill_cost(node: &Node, tokens: usize, hashes: &[BlockHash]) -> u64 {
    node.pending_tokens() + missing_tokens(node, tokens, hashes)
}

/// Sequences that share the batch, and the tokens whose KV must travel.
fn decode_cost(node: &Node, tokens: usize, hashes: &[BlockHash]) -> u64 {
    node.in_flight.len() as u64 * SEQUENCE_COST_TOKENS + missing_tokens(node, tokens, hashes)
}

/// Prompt tokens that the node does not have.
pub(super) fn missing_tokens(node: &Node, tokens: usize, hashes: &[BlockHash]) -> u64 {
    let cached = node.overlap(hashes) * node.hello.identity.block_size as usize;
    tokens.saturating_sub(cached) as u64
}
