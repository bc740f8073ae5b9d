//! Sequences that leave a draining node with their KV.

use super::bench::{Bench, config, local, remote};
use crate::machine::DecodeInput;
use ridge_protocol::Duration;
use ridge_protocol::wire::RouterToNode;

/// A sequence of six tokens that has landed and said two, with its third in the running pass.
fn decoding() -> Bench {
    let mut bench = Bench::new(config());
    bench.batch(1, 6);
    bench.step();
    bench.runs("r1 7..8*");
    bench.seen.clear();
    bench
}

#[test]
fn a_sequence_leaves_when_its_pass_ends() {
    let mut bench = decoding();
    bench.moves(1, 9);
    bench.says(&[]);
    bench.step();
    bench.says(&[
        "token r1 #2 42",
        "moving r1 of 9 tokens",
        "offer r9 to d2: 8 tokens in [0, 1]",
        "ready r9 layer 0: 0..2",
        "ready r9 layer 1: 0..2",
        "sent r9 before 42",
    ]);
    bench.runs("");
    assert_eq!(bench.node.stats().blocks.held, 2, "its blocks are held until they have arrived");
    bench.settles(9, true);
    bench.says(&["shipped r9"]);
    assert!(bench.node.is_idle());
}

/// Eight tokens in two blocks of four, for a node whose blocks hold three: the pages and their hashes are that node's.
#[test]
fn a_sequence_leaves_in_its_receivers_blocks() {
    let mut bench = decoding();
    bench.moves_into(1, 9, 3);
    bench.step();
    bench.says(&[
        "token r1 #2 42",
        "moving r1 of 9 tokens",
        "offer r9 to d2: 8 tokens in [0, 1]",
        "ready r9 layer 0: 0..3",
        "ready r9 layer 1: 0..3",
        "sent r9 before 42",
    ]);
    bench.settles(9, true);
    assert!(bench.node.is_idle());
}

#[test]
fn what_does_not_arrive_is_computed_there() {
    let mut bench = decoding();
    bench.moves(1, 9);
    bench.step();
    bench.seen.clear();
    bench.settles(9, false);
    bench.says(&["failed r9: KV transfer failed: link down"]);
    assert!(bench.node.is_idle());
    bench.settles(9, false);
    bench.says(&[]);
}

/// The next node may be dead, and the router hear of it later than this one: the sequence may come back.
#[test]
fn after_a_failed_move_a_draining_node_waits_a_little_longer() {
    let mut bench = decoding();
    bench.router(RouterToNode::Drain);
    bench.moves(1, 9);
    bench.step();
    bench.settles(9, false);
    bench.seen.clear();
    let failed_at = bench.now;
    bench.report();
    bench.says(&[]);
    while bench.now < failed_at + Duration::from_secs(2) {
        bench.says(&[]);
        bench.report();
    }
    bench.says(&["drained"]);
}

#[test]
fn a_sequence_in_transfer_lands_first() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 5));
    bench.moves(1, 9);
    bench.seen.clear();
    bench.lands(1);
    bench.says(&[
        "receipt r1: 5 transferred, 99 bytes",
        "token r1 #0 41",
        "moving r1 of 6 tokens",
        "offer r9 to d2: 5 tokens in [0, 1]",
        "ready r9 layer 0: 0..2",
        "ready r9 layer 1: 0..2",
        "sent r9 before 41",
    ]);
}

#[test]
fn a_prompt_that_is_computed_here_is_computed_first() {
    let mut bench = Bench::new(config());
    bench.send(local(1, 10));
    bench.runs("r1 0..8");
    bench.moves(1, 9);
    bench.step();
    bench.runs("r1 8..10*");
    bench.seen.clear();
    bench.step();
    bench.says(&[
        "receipt r1: 10 computed",
        "token r1 #0 42",
        "moving r1 of 11 tokens",
        "offer r9 to d2: 10 tokens in [0, 1, 2]",
        "ready r9 layer 0: 0..3",
        "ready r9 layer 1: 0..3",
        "sent r9 before 42",
    ]);
}

#[test]
fn what_waits_is_sent_away() {
    let mut bench = Bench::new(config());
    bench.send(local(1, 28));
    bench.send(local(2, 28));
    bench.seen.clear();
    bench.moves(2, 9);
    bench.says(&["failed r2: draining"]);
    bench.queues(0, 1);
}

#[test]
fn an_answer_that_ends_does_not_move() {
    let mut bench = Bench::new(config());
    bench.send(super::bench::short(remote(1, 5), 2));
    bench.lands(1);
    bench.moves(1, 9);
    bench.seen.clear();
    bench.step();
    bench.says(&["token r1 #1 42, Length"]);
    bench.moves(1, 9);
    bench.says(&[]);
    assert!(bench.node.is_idle());
}

#[test]
fn a_move_can_be_cancelled_under_either_number() {
    for early in [true, false] {
        let mut bench = decoding();
        bench.moves(1, 9);
        if early {
            bench.cancel(1);
            bench.step();
            bench.says(&[]);
        } else {
            bench.step();
            bench.seen.clear();
            bench.cancel(1);
            bench.says(&[]);
            bench.cancel(9);
            bench.says(&["keep r9: cancelled by the router"]);
        }
        assert!(bench.node.is_idle());
    }
}

#[test]
fn a_node_that_stops_says_so_and_is_drained_when_all_have_left() {
    let mut bench = decoding();
    bench.feed(DecodeInput::Shutdown);
    bench.says(&["draining"]);
    bench.moves(1, 9);
    bench.step();
    bench.seen.clear();
    bench.settles(9, true);
    bench.says(&["shipped r9"]);
    bench.report();
    bench.says(&["drained"]);
}

#[test]
fn others_go_on() {
    let mut bench = Bench::new(config());
    bench.batch(2, 4);
    bench.step();
    bench.step();
    bench.runs("r1 6..7*, r2 5..6*");
    bench.router(RouterToNode::Drain);
    bench.moves(1, 9);
    bench.step();
    bench.runs("r2 6..7*");
}

#[test]
fn a_number_that_is_taken_moves_nothing() {
    let mut bench = Bench::new(config());
    bench.batch(2, 4);
    bench.moves(1, 2);
    bench.step();
    bench.runs("r1 5..6*, r2 4..5*");
}
