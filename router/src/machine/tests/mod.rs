//! What the router's machine does, case by case. Placement has tests of its own beside it. Read `bench` first.

mod bench;
mod blocks;
mod moves;
mod nodes;

use super::{ClientId, ReplyEvent, RouterConfig, RouterInput, RouterOutput, RouterStats, Submit, Usage};
use bench::*;
use ridge_blocks::hash_blocks;
use ridge_protocol::wire::{FinishReason, NodeError, NodeToRouter, Receipt};

// Dispatch.

#[test]
fn both_nodes_are_told_at_once() {
    let mut bench = Bench::new(&["p1", "d1"]);
    bench.submit(1, &[7, 8, 9], 5);
    bench.says(&["d1 <- decode r1 from p1: [7, 8, 9] of 3", "p1 <- prefill r1 to d1: [7, 8, 9] of 3"]);
    bench.in_flight(&[("p1", 1), ("d1", 1)]);
}

#[test]
fn nobody_decodes_when_the_first_token_is_the_last() {
    let mut bench = Bench::new(&["p1", "d1"]);
    bench.submit(1, &[7], 1);
    bench.says(&["p1 <- prefill r1: [7] of 1"]);
    bench.in_flight(&[("p1", 1), ("d1", 0)]);
    bench.token_ends("p1", 1, 0, 5, Some(FinishReason::Length));
    bench.says(&["c1: token #0 5", "c1: finished, Length"]);
}

#[test]
fn without_a_prefill_node_the_decode_node_computes_the_prompt() {
    for max_tokens in [1, 5] {
        let mut bench = Bench::new(&["d1"]);
        bench.submit(1, &[7], max_tokens);
        bench.says(&["d1 <- decode r1: [7] of 1"]);
    }
}

#[test]
fn a_sequence_waits_for_a_decode_node() {
    let mut bench = Bench::new(&["p1"]);
    bench.submit(1, &[7], 5);
    bench.submit(2, &[8], 5);
    bench.says(&[]);
    bench.joins("d1");
    bench.says(&[
        "d1 <- welcome d1",
        "d1 <- decode r1 from p1: [7] of 1",
        "p1 <- prefill r1 to d1: [7] of 1",
        "d1 <- decode r2 from p1: [8] of 1",
        "p1 <- prefill r2 to d1: [8] of 1",
    ]);
}

#[test]
fn load_is_spread() {
    let mut bench = Bench::new(&["p1", "p2", "d1", "d2"]);
    bench.submit(1, &[7], 5);
    bench.submit(2, &[8], 5);
    bench.in_flight(&[("p1", 1), ("p2", 1), ("d1", 1), ("d2", 1)]);
    // A prompt that is computed no longer burdens its prefill node.
    bench.token("p1", 1, 0, 5);
    bench.seen.clear();
    bench.submit(3, &[9], 1);
    bench.says(&["p1 <- prefill r3: [9] of 1"]);
}

#[test]
fn a_prompt_goes_where_its_prefix_is() {
    let mut bench = Bench::new(&["p1", "p2", "d1", "d2"]);
    let tokens = [1, 2, 3, 4, 5];
    let added = hash_blocks(0, 4, &tokens);
    for node in ["p2", "d2"] {
        bench.node(node, NodeToRouter::CacheChanged { added: added.clone(), removed: vec![] });
    }
    bench.submit(1, &tokens, 5);
    bench.in_flight(&[("p1", 0), ("p2", 1), ("d1", 0), ("d2", 1)]);
    bench.feed(RouterInput::ClientGone(ClientId(1)));
    for node in ["p2", "d2"] {
        bench.node(node, NodeToRouter::CacheChanged { added: vec![], removed: added.clone() });
    }
    bench.submit(2, &tokens, 5);
    bench.in_flight(&[("p1", 1), ("p2", 0), ("d1", 1), ("d2", 0)]);
}

#[test]
fn bad_submissions_are_refused() {
    let check = |submission: Submit, want: &str| {
        let mut bench = Bench::new(&["p1", "d1"]);
        bench.feed(RouterInput::Submit(submission));
        bench.says(&[want]);
    };
    check(submit(1, &[], 5), "c1: invalid: the prompt is empty");
    check(submit(1, &[7], 0), "c1: invalid: max_tokens must be at least 1");
}

#[test]
fn too_much_in_flight_is_refused() {
    let mut bench = Bench::with(RouterConfig { max_in_flight: 1, ..RouterConfig::default() }, &["p1", "d1"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.submit(2, &[7], 5);
    bench.says(&["c2: overloaded: the cluster is overloaded: 1 sequences are in flight"]);
    bench.feed(RouterInput::ClientGone(ClientId(1)));
    bench.submit(3, &[7], 5);
    bench.in_flight(&[("p1", 1), ("d1", 1)]);
}

// The context.

/// A prompt of three tokens on nodes with these contexts: the answer's length as nodes are told.
fn check_context(prefill: u32, decode: u32, max_tokens: u32, want: &[u32]) {
    let mut bench = Bench::new(&[]);
    bench.joins_with("p1", prefill);
    bench.joins_with("d1", decode);
    bench.submit(1, &[7, 8, 9], max_tokens);
    assert_eq!(bench.max_tokens(), want, "contexts of {prefill} and {decode}, at most {max_tokens}");
}

#[test]
fn the_shorter_context_bounds_the_answer_on_both_nodes() {
    check_context(64, 64, 61, &[61, 61]);
    check_context(64, 64, 62, &[61, 61]);
    check_context(8, 64, 10, &[5, 5]);
    check_context(64, 8, 10, &[5, 5]);
    check_context(64, 8, 4, &[4, 4]);
    check_context(64, 8, u32::MAX, &[5, 5]);
    // One token fits: nobody decodes.
    check_context(64, 4, 10, &[1]);
}

#[test]
fn only_the_chosen_nodes_contexts_count() {
    let mut bench = Bench::new(&[]);
    for (node, context) in [("p1", 16), ("p2", 4), ("d1", 8), ("d2", 4)] {
        bench.joins_with(node, context);
    }
    bench.submit(1, &[7, 8, 9], 20);
    assert_eq!(bench.max_tokens(), [5, 5]);
    let mut bench = Bench::new(&[]);
    bench.joins_with("d1", 8);
    bench.submit(1, &[7, 8, 9], 20);
    assert_eq!(bench.max_tokens(), [5]);
}

#[test]
fn a_prompt_that_leaves_no_room_is_invalid() {
    for len in [8, 9] {
        let mut bench = Bench::new(&["p1"]);
        bench.submit(1, &vec![7; len], 1);
        bench.joins_with("d1", 8);
        let want = format!("c1: invalid: a prompt of {len} tokens leaves no room in a context of 8");
        bench.says(&["d1 <- welcome d1", &want]);
        bench.in_flight(&[("p1", 0), ("d1", 0)]);
    }
}

#[test]
fn an_answer_that_fills_a_shorter_context_after_a_failover_is_complete() {
    let mut bench = Bench::new(&["p1", "d1"]);
    bench.joins_with("d2", 4);
    bench.submit(1, &[7, 8], 9);
    bench.token("d1", 1, 0, 5);
    bench.token("d1", 1, 1, 6);
    bench.seen.clear();
    bench.lost("d1");
    bench.says(&["p1 <- cancel r1", "c1: finished, Length"]);
    let RouterStats { finished, completion_tokens, .. } = bench.router.stats();
    assert_eq!((finished, completion_tokens), (1, 2));
}

// One stream out of two.

#[test]
fn tokens_of_both_nodes_make_one_stream() {
    let mut bench = Bench::serving(3);
    bench.token("p1", 1, 0, 5);
    bench.token("d1", 1, 0, 5);
    bench.token("d1", 1, 1, 6);
    bench.token_ends("d1", 1, 2, 7, Some(FinishReason::Length));
    bench.says(&["c1: token #0 5", "c1: token #1 6", "c1: token #2 7", "c1: finished, Length"]);
    bench.in_flight(&[("p1", 0), ("d1", 0)]);
}

#[test]
fn tokens_out_of_order_are_stitched() {
    let mut bench = Bench::serving(5);
    bench.token("d1", 1, 1, 6);
    bench.token("d1", 1, 2, 7);
    bench.says(&[]);
    bench.token("p1", 1, 0, 5);
    bench.says(&["c1: token #0 5", "c1: token #1 6", "c1: token #2 7"]);
}

#[test]
fn an_early_end_waits_for_its_turn() {
    let mut bench = Bench::serving(2);
    bench.token_ends("d1", 1, 1, 6, Some(FinishReason::Stop));
    bench.says(&[]);
    bench.token("d1", 1, 0, 5);
    bench.says(&["c1: token #0 5", "c1: token #1 6", "c1: finished, Stop"]);
}

#[test]
fn duplicates_are_dropped() {
    let mut bench = Bench::serving(5);
    bench.token("d1", 1, 0, 5);
    bench.token("d1", 1, 1, 6);
    bench.seen.clear();
    bench.token("p1", 1, 0, 5);
    bench.token("d1", 1, 0, 5);
    bench.token("d1", 1, 1, 6);
    bench.says(&[]);
}

#[test]
fn a_duplicate_of_the_latest_token_may_end_the_answer() {
    let mut bench = Bench::serving(5);
    bench.token("p1", 1, 0, 5);
    bench.token_ends("d1", 1, 0, 5, Some(FinishReason::Length));
    bench.says(&["c1: token #0 5", "c1: finished, Length"]);
    bench.in_flight(&[("p1", 0), ("d1", 0)]);
}

#[test]
fn a_duplicate_of_an_older_token_ends_nothing() {
    let mut bench = Bench::serving(5);
    bench.token("d1", 1, 0, 5);
    bench.token("d1", 1, 1, 6);
    bench.seen.clear();
    bench.token_ends("p1", 1, 0, 5, Some(FinishReason::Length));
    bench.says(&[]);
    bench.token("d1", 1, 2, 7);
    bench.says(&["c1: token #2 7"]);
}

/// The prefill node says the first token, the decode node the first and one more; who is told when it ends.
fn check_told(script: &[(&str, u32, bool)], want: &[&str]) {
    let mut bench = Bench::serving(5);
    for (node, index, ends) in script {
        bench.token_ends(node, 1, *index, 5 + index, ends.then_some(FinishReason::Stop));
    }
    bench.seen.retain(|output| matches!(output, RouterOutput::Send { .. }));
    bench.says(want);
    bench.in_flight(&[("p1", 0), ("d1", 0)]);
    assert_eq!(bench.router.stats().finished, 1, "{script:?}");
}

#[test]
fn who_did_not_say_the_last_token_is_told_unless_it_is_settled() {
    // The decode node waits for its KV, or never heard of it: the prefill node must not hold that for it.
    check_told(&[("p1", 0, true)], &["p1 <- cancel r1", "d1 <- cancel r1"]);
    // The prefill node is done already.
    check_told(&[("d1", 0, false), ("p1", 0, true)], &["d1 <- cancel r1"]);
    // The decode node has taken the KV: both are done.
    check_told(&[("d1", 0, true)], &[]);
    check_told(&[("p1", 0, false), ("d1", 0, true)], &[]);
    check_told(&[("p1", 0, false), ("d1", 0, false), ("d1", 1, true)], &[]);
    check_told(&[("d1", 1, true), ("d1", 0, false)], &[]);
}

#[test]
fn who_said_the_last_token_before_its_turn_is_not_told() {
    check_told(&[("d1", 1, true), ("p1", 0, false)], &[]);
}

#[test]
fn tokens_beyond_the_answer_are_dropped() {
    let mut bench = Bench::serving(2);
    bench.token("d1", 1, 2, 5);
    bench.token("d1", 1, u32::MAX, 5);
    bench.says(&[]);
    bench.in_flight(&[("p1", 0), ("d1", 1)]);
}

#[test]
fn nodes_that_disagree_fail_the_request() {
    let mut bench = Bench::serving(5);
    bench.token("p1", 1, 0, 5);
    bench.token("d1", 1, 0, 6);
    bench.says(&[
        "c1: token #0 5",
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "c1: failed: nodes disagree about token 0 of the answer (the client has 5)",
    ]);
}

#[test]
fn nodes_that_disagree_before_their_turn_fail_the_request() {
    let mut bench = Bench::serving(5);
    bench.token("d1", 1, 1, 6);
    bench.token("d1", 1, 1, 6);
    bench.says(&[]);
    bench.token("d1", 1, 1, 7);
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "c1: failed: nodes disagree about token 1 of the answer (the client has 6)",
    ]);
}

#[test]
fn an_end_that_came_before_its_turn_is_not_forgotten() {
    let mut bench = Bench::serving(5);
    bench.token_ends("d1", 1, 1, 6, Some(FinishReason::Stop));
    bench.token("d1", 1, 1, 6);
    bench.token("d1", 1, 0, 5);
    bench.says(&["c1: token #0 5", "c1: token #1 6", "c1: finished, Stop"]);
}

/// r1 goes to the first node of each kind.
fn with_strangers() -> Bench {
    let mut bench = Bench::new(&["p1", "p2", "d1", "d2"]);
    bench.submit(1, &[7, 8, 9], 5);
    bench.seen.clear();
    bench
}

#[test]
fn nodes_without_a_part_in_it_have_no_say() {
    let mut bench = with_strangers();
    for node in ["p2", "d2"] {
        bench.token(node, 1, 0, 6);
        bench.token_ends(node, 1, 0, 6, Some(FinishReason::Stop));
        for error in [
            NodeError::Draining,
            NodeError::Overloaded("full".into()),
            NodeError::Invalid("odd".into()),
            NodeError::Transfer("link down".into()),
        ] {
            bench.fails(node, 1, error);
        }
    }
    bench.says(&[]);
    assert!(bench.router.nodes().iter().all(|node| !node.draining));
    // The hand-over has not happened: the prefill node is still needed.
    bench.lost("p1");
    bench.says(&[
        "d1 <- cancel r1",
        "d1 <- decode r2 from p2: [7, 8, 9] of 3",
        "p2 <- prefill r2 to d1: [7, 8, 9] of 3",
    ]);
}

#[test]
fn a_strangers_receipt_changes_nothing() {
    let mut bench = with_strangers();
    bench.receipt("d2", 1, Receipt { cached: 3, recomputed: 1, ..Receipt::default() });
    bench.says(&[]);
}

#[test]
fn a_strangers_token_is_no_sign_of_life() {
    let mut bench = with_strangers();
    bench.at(800);
    bench.token("d2", 1, 0, 6);
    bench.at(900);
    assert_eq!(bench.router.stats().redispatched, 1);
}

#[test]
fn what_is_said_about_a_dispatch_that_is_over_is_ignored() {
    let mut bench = Bench::serving(1);
    bench.token_ends("p1", 1, 0, 5, Some(FinishReason::Length));
    bench.seen.clear();
    bench.token("d1", 1, 0, 6);
    bench.receipt("d1", 1, Receipt { cached: 1, ..Receipt::default() });
    bench.fails("d1", 1, NodeError::Draining);
    bench.token("d1", 99, 0, 6);
    bench.says(&[]);
}

// The client.

#[test]
fn a_client_that_leaves_cancels_both() {
    let mut bench = Bench::serving(5);
    bench.feed(RouterInput::ClientGone(ClientId(1)));
    bench.says(&["p1 <- cancel r1", "d1 <- cancel r1"]);
    bench.in_flight(&[("p1", 0), ("d1", 0)]);
    bench.feed(RouterInput::ClientGone(ClientId(1)));
    bench.token("p1", 1, 0, 5);
    bench.says(&[]);
    assert_eq!(bench.router.stats().gone, 1);
}

#[test]
fn a_client_that_leaves_while_waiting_is_forgotten() {
    let mut bench = Bench::new(&[]);
    bench.submit(1, &[7], 5);
    bench.feed(RouterInput::ClientGone(ClientId(1)));
    bench.joins("d1");
    bench.says(&["d1 <- welcome d1"]);
}

// Usage.

/// Receipts of the prefill and the decode node, for a prompt of three tokens; what the client is told was cached.
fn check_cached(prefill: Option<Receipt>, decode: Option<Receipt>, want: u32) {
    let mut bench = Bench::serving(2);
    if let Some(receipt) = prefill {
        bench.receipt("p1", 1, receipt);
    }
    if let Some(receipt) = decode {
        bench.receipt("d1", 1, receipt);
    }
    bench.token("p1", 1, 0, 5);
    let Some(RouterOutput::Reply { event: ReplyEvent::Token { usage, .. }, .. }) = bench.seen.pop() else {
        panic!("the first token is next");
    };
    assert_eq!((usage.completion_tokens, usage.cached_tokens), (1, want), "known with every token");
    bench.token_ends("d1", 1, 1, 6, Some(FinishReason::Stop));
    let Some(RouterOutput::Reply { event: ReplyEvent::Finished { usage, .. }, .. }) = bench.seen.pop() else {
        panic!("the answer is complete");
    };
    let receipt = decode.unwrap_or_default();
    assert_eq!(usage, Usage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: want, receipt });
    let RouterStats { prompt_tokens, completion_tokens, cached_tokens, finished, .. } = bench.router.stats();
    assert_eq!((prompt_tokens, completion_tokens, cached_tokens, finished), (3, 2, u64::from(want), 1));
}

#[test]
fn usage_counts_what_was_not_computed_as_cached() {
    let cached = |cached, computed| Some(Receipt { cached, computed, ..Receipt::default() });
    let sent = |cached, transferred| Some(Receipt { cached, transferred, transfer_bytes: 9, ..Receipt::default() });
    check_cached(None, None, 0);
    check_cached(cached(2, 1), sent(0, 3), 2);
    // The prefill node computed what the decode node would have had.
    check_cached(cached(0, 3), sent(2, 1), 0);
    // Nothing came by transfer: the decode node's cache counts.
    check_cached(None, cached(2, 1), 2);
    check_cached(cached(0, 3), cached(3, 0), 3);
    // After a failover answers count as prompt on the nodes, not here.
    check_cached(cached(5, 1), sent(0, 6), 3);
}

/// r1 gave `given` tokens before its decode node was lost; then r2's receipts and tokens arrive. What is told as cached.
fn check_cached_after_failover(given: u32, want: u32) {
    let mut bench = Bench::new(&["p1", "d1", "d2"]);
    bench.submit(1, &[7, 8, 9], 9);
    bench.receipt("p1", 1, Receipt { cached: 1, computed: 2, ..Receipt::default() });
    for index in 0..given {
        bench.token("p1", 1, index, 5);
    }
    bench.lost("d1");
    // It finds what it computed itself, and so does the decode node.
    bench.receipt("p1", 2, Receipt { cached: 2, computed: 1 + given, ..Receipt::default() });
    bench.token("p1", 2, given, 5);
    bench.receipt("d2", 2, Receipt { cached: 3 + given, ..Receipt::default() });
    bench.token_ends("d2", 2, given, 5, Some(FinishReason::Stop));
    let Some(RouterOutput::Reply { event: ReplyEvent::Finished { usage, .. }, .. }) = bench.seen.pop() else {
        panic!("the answer is complete");
    };
    assert_eq!((usage.completion_tokens, usage.cached_tokens), (given + 1, want));
}

#[test]
fn what_a_failover_finds_in_caches_is_no_saving() {
    check_cached_after_failover(1, 1);
    check_cached_after_failover(2, 1);
}

#[test]
fn before_the_first_token_another_try_counts() {
    check_cached_after_failover(0, 3);
}

// Shutting down.

#[test]
fn a_draining_router_finishes_what_it_has() {
    let mut bench = Bench::serving(5);
    bench.feed(RouterInput::Drain);
    bench.submit(2, &[7], 5);
    bench.says(&["c2: unavailable: no node is available: the router is shutting down"]);
    bench.token_ends("p1", 1, 0, 5, Some(FinishReason::Stop));
    bench.says(&["c1: token #0 5", "p1 <- cancel r1", "d1 <- cancel r1", "c1: finished, Stop", "drained"]);
    bench.feed(RouterInput::Drain);
    bench.says(&[]);
}

#[test]
fn an_idle_router_is_drained_at_once() {
    let mut bench = Bench::new(&["p1", "d1"]);
    bench.feed(RouterInput::Drain);
    bench.says(&["drained"]);
}

#[test]
fn a_deadline_can_end_the_drain() {
    let mut bench = Bench::new(&[]);
    bench.submit(1, &[7], 5);
    bench.feed(RouterInput::Drain);
    bench.at(30);
    bench.says(&["c1: unavailable: no node is available: no decode node could be had for 30 s", "drained"]);
}
