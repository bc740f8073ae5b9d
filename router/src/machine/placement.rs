//! Where a sequence goes. Pure functions of what the router knows; lower cost wins, ties go to the lower number.

use super::node::{Node, PromptHashes};
use ridge_protocol::{NodeId, Role};
use std::collections::BTreeMap;

/// What one more decoding sequence costs the others, in prompt tokens: about the time that one decode step of a
/// batch takes next to a token of prefill.
const SEQUENCE_COST_TOKENS: u64 = 64;

/// How many times faster a prompt must be computed on the decode node to be computed there although there is a prefill
/// node: what comes next would rather find the decode node free.
const LOCAL_MARGIN: u64 = 4;
/// Prompt tokens that a batch hardly notices: a pass waits for the weights anyway.
const UNNOTICED_TOKENS: u64 = 8;

/// A prefill node (none if there is none to be had) and a decode node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Placement {
    pub prefill: Option<NodeId>,
    pub decode: NodeId,
}

/// Chooses nodes for a prompt, leaving out `avoid` as long as another can be had. With `whole_path`, a prefill node takes
/// part if there is one, whatever it costs. With `last_resort`, a decode node that drains is better than none.
pub(super) fn place(
    nodes: &BTreeMap<NodeId, Node>,
    prompt: &PromptHashes,
    avoid: &[NodeId],
    whole_path: bool,
    last_resort: bool,
) -> Option<Placement> {
    let pick = |role: Role, draining: bool, cost: &dyn Fn(&Node) -> u64| {
        let usable = nodes.iter().filter(|(_, n)| n.hello.role == role && n.draining == draining);
        usable.min_by_key(|(id, node)| (avoid.contains(id), cost(node), **id)).map(|(id, _)| *id)
    };
    let decoding = |draining| pick(Role::Decode, draining, &|node| decode_cost(node, prompt));
    let decode = decoding(false).or_else(|| decoding(true).filter(|_| last_resort))?;
    let prefill = pick(Role::Prefill, false, &|node| prefill_cost(node, prompt));
    let prefill = prefill.filter(|id| whole_path || !local_pays(&nodes[id], &nodes[&decode], prompt));
    Some(Placement { prefill, decode })
}

/// Whether the decode node would have computed a prompt long before the prefill node has: because that one has a queue, or
/// because this one has most of it in its cache. Everybody in the batch waits for each prompt token computed here.
fn local_pays(prefill: &Node, decode: &Node, prompt: &PromptHashes) -> bool {
    let (there, here) = (prefill.stats.pace.prompt_token_ns, decode.stats.pace.prompt_token_ns);
    if there == 0 {
        return false; // It has not shown yet how fast it is.
    }
    let missing = decode.missing_tokens(prompt);
    if !decode.in_flight.is_empty() && missing > UNNOTICED_TOKENS {
        return false; // Keeping prompts away from those who decode is what prefill nodes are for.
    }
    let here = if here == 0 { there } else { here };
    let waiting = 1 + decode.in_flight.len() as u64;
    // Saturating: the paces are what the nodes say.
    let local = (decode.pending_tokens() + missing).saturating_mul(here).saturating_mul(waiting);
    let remote = prefill_cost(prefill, prompt).saturating_mul(there);
    local.saturating_mul(LOCAL_MARGIN) < remote
}

/// Chooses who continues a sequence of a decode node that drains: the smallest batch, moves under way (`coming`)
/// included. Its context must not be shorter, or the answer would end earlier than it was to, and it must take the KV.
pub(super) fn place_move(
    nodes: &BTreeMap<NodeId, Node>,
    from: NodeId,
    coming: &BTreeMap<NodeId, u64>,
) -> Option<NodeId> {
    let (context, blocks) = (nodes[&from].hello.max_model_len, nodes[&from].blocks());
    let takes = |node: &Node| node.hello.max_model_len >= context && blocks.refusal(node.blocks()).is_none();
    let fits = |node: &Node| node.hello.role == Role::Decode && !node.draining && takes(node);
    let load = |id: &NodeId, node: &Node| node.in_flight.len() as u64 + coming.get(id).copied().unwrap_or(0);
    let usable = nodes.iter().filter(|(id, node)| **id != from && fits(node));
    usable.min_by_key(|(id, node)| (load(id, node), **id)).map(|(id, _)| *id)
}

/// Tokens that stand before this prompt's first token, its own included.
fn prefill_cost(node: &Node, prompt: &PromptHashes) -> u64 {
    node.pending_tokens() + node.missing_tokens(prompt)
}

/// Sequences that share the batch, and the tokens whose KV must travel.
fn decode_cost(node: &Node, prompt: &PromptHashes) -> u64 {
    node.in_flight.len() as u64 * SEQUENCE_COST_TOKENS + node.missing_tokens(prompt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_blocks::hash_blocks;
    use ridge_protocol::wire::NodeHello;
    use ridge_protocol::{CacheDtype, ModelIdentity, NodeName, RequestId, TokenId};

    const PROMPT: [TokenId; 5] = [1, 2, 3, 4, 5];

    /// In blocks of two tokens.
    fn node(role: Role) -> Node {
        let identity = ModelIdentity {
            weights: [0; 32],
            config: [0; 32],
            tokenizer: [0; 32],
            layers: 1,
            kv_heads: 1,
            head_dim: 1,
            block_size: 2,
            kv_dtype: CacheDtype::F32,
            kv_layout: String::new(),
            rope: String::new(),
        };
        let (name, max_model_len) = (NodeName("some".into()), 64);
        Node::new(NodeHello { name, role, kv_addr: None, identity, max_model_len, blocks: 8, pid: 1 })
    }

    /// In blocks of so many tokens.
    fn blocks_of(mut node: Node, block_size: u32) -> Node {
        node.hello.identity.block_size = block_size;
        node
    }

    fn hashed(nodes: &BTreeMap<NodeId, Node>) -> PromptHashes {
        PromptHashes::new(nodes.values(), 0, &PROMPT)
    }

    /// With one dispatch per entry, each of so many prompt tokens.
    fn busy(mut node: Node, work: &[u64]) -> Node {
        node.in_flight = work.iter().enumerate().map(|(at, tokens)| (RequestId(at as u64), *tokens)).collect();
        node
    }

    /// Having the first `blocks` blocks of the prompt.
    fn warm(mut node: Node, blocks: usize) -> Node {
        let size = node.blocks().block_size() as usize;
        node.on_cache_changed(hash_blocks(0, size, &PROMPT)[..blocks].to_vec(), vec![], usize::MAX);
        node
    }

    fn draining(mut node: Node) -> Node {
        node.draining = true;
        node
    }

    fn prefill() -> Node {
        node(Role::Prefill)
    }

    fn decode() -> Node {
        node(Role::Decode)
    }

    fn numbered(nodes: impl IntoIterator<Item = Node>) -> BTreeMap<NodeId, Node> {
        nodes.into_iter().enumerate().map(|(at, node)| (NodeId(at as u32), node)).collect()
    }

    /// Nodes are numbered from 0. Wanted: the prefill and the decode node.
    fn check(nodes: Vec<Node>, avoid: &[u32], want: Option<(Option<u32>, u32)>) {
        let nodes = numbered(nodes);
        let avoid: Vec<NodeId> = avoid.iter().copied().map(NodeId).collect();
        let placement = place(&nodes, &hashed(&nodes), &avoid, false, false);
        assert_eq!(placement.map(|p| (p.prefill.map(|id| id.0), p.decode.0)), want);
    }

    #[test]
    fn a_decode_node_is_needed_and_a_prefill_node_is_not() {
        check(vec![], &[], None);
        check(vec![prefill()], &[], None);
        check(vec![decode()], &[], Some((None, 0)));
        check(vec![decode(), prefill()], &[], Some((Some(1), 0)));
    }

    #[test]
    fn a_draining_decode_node_is_the_last_resort() {
        let check = |nodes: Vec<Node>, last_resort, want: Option<u32>| {
            let nodes = numbered(nodes);
            let placement = place(&nodes, &hashed(&nodes), &[NodeId(1)], false, last_resort);
            assert_eq!(placement.map(|p| p.decode.0), want);
        };
        check(vec![draining(decode())], false, None);
        check(vec![draining(decode())], true, Some(0));
        // Even one that has failed it is better.
        check(vec![draining(decode()), decode()], true, Some(1));
        check(vec![draining(busy(decode(), &[0, 0])), draining(decode()), draining(decode())], true, Some(2));
    }

    #[test]
    fn equals_go_by_number() {
        check(vec![prefill(), prefill(), decode(), decode()], &[], Some((Some(0), 2)));
    }

    #[test]
    fn the_least_prompt_work_attracts_a_prompt() {
        check(vec![decode(), busy(prefill(), &[9]), busy(prefill(), &[4, 4])], &[], Some((Some(2), 0)));
        check(vec![decode(), busy(prefill(), &[0, 0, 0]), busy(prefill(), &[1])], &[], Some((Some(1), 0)));
    }

    #[test]
    fn the_smallest_batch_attracts_a_sequence() {
        check(vec![busy(decode(), &[0, 0]), busy(decode(), &[0])], &[], Some((None, 1)));
    }

    #[test]
    fn a_prefix_attracts_until_the_load_outweighs_it() {
        check(vec![decode(), prefill(), warm(prefill(), 2)], &[], Some((Some(2), 0)));
        check(vec![decode(), warm(prefill(), 1), warm(prefill(), 2)], &[], Some((Some(2), 0)));
        check(vec![decode(), prefill(), busy(warm(prefill(), 2), &[3])], &[], Some((Some(2), 0)));
        check(vec![decode(), prefill(), busy(warm(prefill(), 2), &[4])], &[], Some((Some(1), 0)));
        check(vec![decode(), warm(decode(), 2)], &[], Some((None, 1)));
        check(vec![decode(), busy(warm(decode(), 2), &[0])], &[], Some((None, 0)));
    }

    /// Needing so many nanoseconds for a prompt token.
    fn paced(mut node: Node, prompt_token_ns: u64) -> Node {
        node.stats.pace.prompt_token_ns = prompt_token_ns;
        node
    }

    #[test]
    fn a_decode_node_computes_a_prompt_where_that_is_much_faster() {
        let check_local = |prefill: Node, decode: Node, local: bool| {
            check(vec![decode, prefill], &[], Some(((!local).then_some(1), 0)));
        };
        // Five tokens here against a queue there: more than four times as long, or not.
        check_local(busy(paced(prefill(), 10), &[16]), decode(), true);
        check_local(busy(paced(prefill(), 10), &[15]), decode(), false);
        check_local(busy(paced(prefill(), 10), &[16]), paced(decode(), 11), false);
        check_local(busy(paced(prefill(), 10), &[99]), paced(decode(), 50), true);
        // Somebody in the batch would wait too.
        check_local(busy(paced(prefill(), 10), &[16]), busy(decode(), &[0]), false);
        check_local(busy(paced(prefill(), 10), &[36]), busy(decode(), &[0]), true);
        // One token is missing here, five there.
        check_local(paced(prefill(), 10), warm(decode(), 2), true);
        check_local(warm(paced(prefill(), 10), 1), warm(decode(), 2), false);
        // Nothing is known of its speed.
        check_local(busy(prefill(), &[999]), decode(), false);
        let nodes = numbered([decode(), busy(paced(prefill(), 10), &[999])]);
        let placement = place(&nodes, &hashed(&nodes), &[], true, false);
        assert_eq!(placement.and_then(|p| p.prefill), Some(NodeId(1)), "the whole path was asked for");
    }

    #[test]
    fn draining_nodes_are_left_out() {
        check(vec![draining(decode())], &[], None);
        check(vec![decode(), draining(prefill())], &[], Some((None, 0)));
        check(vec![draining(decode()), busy(decode(), &[0; 9])], &[], Some((None, 1)));
    }

    #[test]
    fn nodes_that_failed_are_the_last_resort() {
        check(vec![decode(), busy(decode(), &[0; 9])], &[0], Some((None, 1)));
        check(vec![decode(), prefill(), busy(prefill(), &[99])], &[1], Some((Some(2), 0)));
        check(vec![decode(), prefill()], &[0, 1], Some((Some(1), 0)));
    }

    /// Tokens of the prompt's first `len` that this node lacks.
    fn check_missing(node: Node, len: usize, want: u64) {
        let prompt = PromptHashes::new([&node].into_iter(), 0, &PROMPT[..len]);
        assert_eq!(node.missing_tokens(&prompt), want);
    }

    #[test]
    fn what_a_node_has_is_not_missing() {
        check_missing(prefill(), 5, 5);
        check_missing(warm(prefill(), 1), 5, 3);
        check_missing(warm(prefill(), 2), 5, 1);
        check_missing(warm(prefill(), 2), 4, 0);
        check_missing(warm(blocks_of(prefill(), 3), 1), 5, 2);
        check_missing(warm(blocks_of(prefill(), 5), 1), 5, 0);
    }

    #[test]
    fn prefixes_attract_in_blocks_of_any_size() {
        let (threes, ones) = (|| blocks_of(prefill(), 3), || blocks_of(prefill(), 1));
        // Two tokens there, three, four here: the most cached one wins whatever its blocks are.
        check(vec![decode(), warm(prefill(), 1), warm(threes(), 1)], &[], Some((Some(2), 0)));
        check(vec![decode(), warm(prefill(), 2), warm(threes(), 1)], &[], Some((Some(1), 0)));
        check(vec![decode(), warm(ones(), 5), warm(prefill(), 2)], &[], Some((Some(1), 0)));
        check(vec![warm(blocks_of(decode(), 3), 1), warm(decode(), 2)], &[], Some((None, 1)));
    }

    #[test]
    fn a_sequence_moves_where_its_kv_is_taken() {
        let with = |kv_dtype| {
            let mut node = decode();
            node.hello.identity.kv_dtype = kv_dtype;
            node
        };
        let check = |nodes: [CacheDtype; 2], want: Option<u32>| {
            let to = place_move(&numbered(nodes.map(with)), NodeId(0), &BTreeMap::new());
            assert_eq!(to.map(|id| id.0), want, "{nodes:?}");
        };
        check([CacheDtype::F32, CacheDtype::F32], Some(1));
        check([CacheDtype::Bf16, CacheDtype::Int8], Some(1));
        check([CacheDtype::Int8, CacheDtype::Bf16], None);
    }

    #[test]
    fn a_prefix_ends_at_the_first_block_that_is_missing() {
        let mut node = warm(prefill(), 2);
        node.on_cache_changed(vec![], vec![hash_blocks(0, 2, &PROMPT)[0]], usize::MAX);
        check_missing(node, 5, 5);
    }

    #[test]
    fn only_so_many_hashes_are_remembered() {
        let mut node = prefill();
        let hashes = hash_blocks(0, 2, &PROMPT);
        node.on_cache_changed(hashes.clone(), vec![], 1);
        let missing = |node: &Node| node.missing_tokens(&PromptHashes::new([node].into_iter(), 0, &PROMPT));
        assert_eq!(missing(&node), 3);
        node.on_cache_changed(vec![hashes[0]], vec![hashes[0]], 1);
        assert_eq!(missing(&node), 3);
    }
}
