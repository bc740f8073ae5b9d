//! Sequences that go from a draining decode node to another.

use super::bench::Bench;
use ridge_protocol::RequestId;
use ridge_protocol::transfer::TransferTimes;
use ridge_protocol::wire::{FinishReason, NodeError, NodeToRouter, Receipt};

/// One prefill and two decode nodes; `[7, 8, 9]` runs on the first and has said 10 and 11.
fn running() -> Bench {
    let mut bench = Bench::new(&["p1", "d1", "d2"]);
    bench.submit(1, &[7, 8, 9], 8);
    bench.token("p1", 1, 0, 10);
    bench.token("d1", 1, 0, 10);
    bench.token("d1", 1, 1, 11);
    bench.seen.clear();
    bench
}

#[test]
fn a_sequence_moves_with_its_kv() {
    let mut bench = running();
    bench.node("d1", NodeToRouter::Draining);
    bench.says(&["d1 <- move r1 to d2 as r2"]);
    bench.token("d1", 1, 2, 12);
    bench.says(&["c1: token #2 12"]);
    bench.moving("d1", 1, 6);
    bench.says(&["d2 <- decode r2 from d1: [7, 8, 9, 10, 11] of 3"]);
    bench.in_flight(&[("p1", 0), ("d1", 1), ("d2", 1)]);
    // The token whose KV is still to be computed comes with the others' and is said again.
    bench.token("d2", 2, 2, 12);
    bench.in_flight(&[("p1", 0), ("d1", 0), ("d2", 1)]);
    bench.token_ends("d2", 2, 3, 13, Some(FinishReason::Stop));
    bench.says(&["c1: token #3 13", "c1: finished, Stop"]);
    assert_eq!((bench.router.stats().moved, bench.router.stats().redispatched), (1, 0));
}

/// Its last word and its end come on another connection than the next node's first token: which is first is chance.
#[test]
fn who_has_handed_over_may_leave_before_the_next_node_speaks() {
    let mut bench = running();
    bench.node("d1", NodeToRouter::Draining);
    bench.moving("d1", 1, 5);
    bench.node("d1", NodeToRouter::Shipped { request: RequestId(2), times: TransferTimes::default() });
    bench.in_flight(&[("p1", 0), ("d1", 0), ("d2", 1)]);
    bench.seen.clear();
    bench.lost("d1");
    bench.says(&[]);
    bench.token_ends("d2", 2, 2, 12, Some(FinishReason::Stop));
    bench.says(&["c1: token #2 12", "c1: finished, Stop"]);
    assert_eq!(bench.router.stats().redispatched, 0);
}

#[test]
fn who_has_not_handed_over_is_missed() {
    let mut bench = running();
    bench.node("d1", NodeToRouter::Draining);
    bench.moving("d1", 1, 5);
    // Of the dispatch before: not about this one.
    bench.node("d1", NodeToRouter::Shipped { request: RequestId(1), times: TransferTimes::default() });
    bench.lost("d1");
    assert_eq!(bench.router.stats().redispatched, 1);
}

#[test]
fn an_operator_may_ask_for_it() {
    let mut bench = running();
    bench.drains("d1");
    bench.says(&["d1 <- drain", "d1 <- move r1 to d2 as r2"]);
    bench.submit(2, &[5, 6], 4);
    bench.says(&["d2 <- decode r3 from p1: [5, 6] of 2", "p1 <- prefill r3 to d2: [5, 6] of 2"]);
}

#[test]
fn without_another_node_it_ends_where_it_is_or_moves_when_one_comes() {
    let mut bench = Bench::serving(8);
    bench.token("d1", 1, 0, 10);
    bench.seen.clear();
    bench.drains("d1");
    bench.says(&["d1 <- drain"]);
    bench.token("d1", 1, 1, 11);
    bench.seen.clear();
    bench.joins("d2");
    bench.says(&["d2 <- welcome d2", "d1 <- move r1 to d2 as r2"]);
}

#[test]
fn a_shorter_context_is_no_place_to_go_to() {
    let mut bench = Bench::serving(8);
    bench.joins_with("d2", 32);
    bench.seen.clear();
    bench.drains("d1");
    bench.says(&["d1 <- drain"]);
}

#[test]
fn moves_spread_over_the_nodes() {
    let mut bench = Bench::new(&["p1", "d1"]);
    for client in 1..=4 {
        bench.submit(client, &[7, 8, client as u32], 8);
    }
    bench.joins("d2");
    bench.joins("d3");
    bench.seen.clear();
    bench.drains("d1");
    bench.says(&[
        "d1 <- drain",
        "d1 <- move r1 to d2 as r5",
        "d1 <- move r2 to d3 as r6",
        "d1 <- move r3 to d2 as r7",
        "d1 <- move r4 to d3 as r8",
    ]);
}

#[test]
fn what_is_lost_on_the_way_is_computed_where_it_goes() {
    let mut bench = running();
    bench.drains("d1");
    bench.moving("d1", 1, 5);
    bench.seen.clear();
    bench.fails("d1", 2, NodeError::Transfer("link down".into()));
    bench.says(&["d2 <- transfer of r2 failed: link down"]);
    bench.receipt("d2", 2, Receipt { recomputed: 4, ..Receipt::default() });
    bench.token("d2", 2, 2, 12);
    bench.says(&["c1: token #2 12"]);
}

#[test]
fn when_the_draining_node_dies_on_the_way_the_sequence_starts_anew() {
    let mut bench = running();
    bench.drains("d1");
    bench.moving("d1", 1, 5);
    bench.seen.clear();
    bench.lost("d1");
    bench.says(&[
        "d2 <- cancel r2",
        "d2 <- decode r3 from p1: [7, 8, 9, 10, 11] of 3",
        "p1 <- prefill r3 to d2: [7, 8, 9, 10, 11] of 3",
    ]);
}

#[test]
fn when_the_next_node_dies_before_it_the_sequence_starts_anew() {
    let mut bench = running();
    bench.joins("d3");
    bench.seen.clear();
    bench.drains("d1");
    bench.says(&["d1 <- drain", "d1 <- move r1 to d2 as r2"]);
    bench.lost("d2");
    bench.moving("d1", 1, 5);
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "d1 <- cancel r2",
        "d3 <- decode r3 from p1: [7, 8, 9, 10, 11] of 3",
        "p1 <- prefill r3 to d3: [7, 8, 9, 10, 11] of 3",
    ]);
}

/// Nobody else is left: the draining node goes on, rather than that the client waits for a node that may never come.
#[test]
fn when_no_other_node_is_left_a_sequence_goes_on_where_it_drains() {
    let mut bench = running();
    bench.drains("d1");
    bench.says(&["d1 <- drain", "d1 <- move r1 to d2 as r2"]);
    bench.lost("d2");
    bench.moving("d1", 1, 5);
    let again = [
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "d1 <- cancel r2",
        "d1 <- decode r3 from p1, as a last resort: [7, 8, 9, 10, 11] of 3",
        "p1 <- prefill r3 to d1: [7, 8, 9, 10, 11] of 3",
    ];
    bench.says(&again);
    // What is new is not for a node that drains.
    bench.submit(2, &[5, 6], 4);
    bench.says(&[]);
    // When a node comes, both go there: one with its KV.
    bench.token("p1", 3, 2, 12);
    bench.token("d1", 3, 2, 12);
    bench.seen.clear();
    bench.joins("d3");
    bench.says(&[
        "d3 <- welcome d3",
        "d3 <- decode r4 from p1: [5, 6] of 2",
        "p1 <- prefill r4 to d3: [5, 6] of 2",
        "d1 <- move r3 to d3 as r5",
    ]);
}

/// The next node dies with the KV on its way: back to where it comes from.
#[test]
fn a_move_into_a_dying_node_ends_where_it_began() {
    let mut bench = running();
    bench.drains("d1");
    bench.moving("d1", 1, 5);
    bench.seen.clear();
    bench.lost("d2");
    bench.says(&[
        "d1 <- cancel r2",
        "d1 <- decode r3 from p1, as a last resort: [7, 8, 9, 10, 11] of 3",
        "p1 <- prefill r3 to d1: [7, 8, 9, 10, 11] of 3",
    ]);
}

#[test]
fn a_client_that_leaves_ends_both_numbers() {
    let mut bench = running();
    bench.drains("d1");
    bench.seen.clear();
    bench.feed(crate::machine::RouterInput::ClientGone(crate::machine::ClientId(1)));
    bench.says(&["p1 <- cancel r1", "d1 <- cancel r1", "d1 <- cancel r2"]);
    bench.moving("d1", 1, 5);
    bench.says(&[]);
}

#[test]
fn a_node_that_says_more_than_it_said_tokens_is_not_believed() {
    let mut bench = running();
    bench.drains("d1");
    bench.seen.clear();
    bench.moving("d1", 1, 7);
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "d1 <- cancel r2",
        "d2 <- decode r3 from p1: [7, 8, 9, 10, 11] of 3",
        "p1 <- prefill r3 to d2: [7, 8, 9, 10, 11] of 3",
    ]);
}

#[test]
fn what_nobody_asked_to_move_does_not() {
    let mut bench = running();
    bench.moving("d1", 1, 5);
    bench.moving("d2", 1, 5);
    bench.moving("d1", 77, 5);
    bench.says(&[]);
}
