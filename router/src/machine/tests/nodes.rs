//! What the router does when nodes are lost, say nothing, fail or join. Read `bench` first.

use super::bench::*;
use crate::machine::{ClientId, ModelDigests, RouterConfig, RouterInput, RouterOutput};
use ridge_protocol::wire::{FinishReason, NodeError, NodeHello, NodeToRouter, Receipt};
use ridge_protocol::{Duration, Instant, Machine, ModelIdentity, NodeId, Role};

// Nodes that are lost.

#[test]
fn a_lost_decode_node_is_replaced_and_the_answer_goes_on() {
    let mut bench = Bench::new(&["p1", "d1", "d2"]);
    bench.submit(1, &[7, 8], 5);
    bench.token("p1", 1, 0, 5);
    bench.token("d1", 1, 1, 6);
    bench.seen.clear();
    bench.lost("d1");
    bench.says(&[
        "p1 <- cancel r1",
        "d2 <- decode r2 from p1: [7, 8, 5, 6] of 2",
        "p1 <- prefill r2 to d2: [7, 8, 5, 6] of 2",
    ]);
    bench.token("p1", 2, 2, 9);
    bench.says(&["c1: token #2 9"]);
    assert_eq!(bench.router.stats().redispatched, 1);
}

#[test]
fn a_prefill_node_lost_before_the_hand_over_is_replaced() {
    let mut bench = Bench::new(&["p1", "p2", "d1"]);
    bench.submit(1, &[7, 8], 5);
    bench.token("p1", 1, 0, 5);
    bench.seen.clear();
    bench.lost("p1");
    bench.says(&[
        "d1 <- cancel r1",
        "d1 <- decode r2 from p2: [7, 8, 5] of 2",
        "p2 <- prefill r2 to d1: [7, 8, 5] of 2",
    ]);
}

#[test]
fn a_prefill_node_lost_after_the_hand_over_is_not_missed() {
    let mut bench = Bench::serving(5);
    bench.token("d1", 1, 0, 5);
    bench.in_flight(&[("p1", 0), ("d1", 1)]);
    bench.seen.clear();
    bench.lost("p1");
    bench.says(&[]);
    bench.token("d1", 1, 1, 6);
    bench.says(&["c1: token #1 6"]);
}

#[test]
fn when_only_one_token_is_left_nobody_decodes() {
    let mut bench = Bench::new(&["p1", "d1", "d2"]);
    bench.submit(1, &[7], 3);
    bench.token("d1", 1, 0, 5);
    bench.token("d1", 1, 1, 6);
    bench.seen.clear();
    bench.lost("d1");
    bench.says(&["p1 <- cancel r1", "p1 <- prefill r2: [7, 5, 6] of 1"]);
}

#[test]
fn early_tokens_of_a_lost_dispatch_are_forgotten() {
    let mut bench = Bench::new(&["p1", "d1", "d2"]);
    bench.submit(1, &[7], 5);
    bench.token("d1", 1, 1, 6);
    bench.lost("d1");
    bench.seen.clear();
    bench.token("p1", 2, 0, 5);
    bench.says(&["c1: token #0 5"]);
}

#[test]
fn a_sequence_is_tried_a_limited_number_of_times() {
    let mut bench = Bench::with(RouterConfig { max_attempts: 2, ..RouterConfig::default() }, &["d1", "d2"]);
    bench.submit(1, &[7], 5);
    bench.lost("d1");
    bench.joins("d1");
    bench.seen.clear();
    bench.lost("d2");
    bench.says(&["c1: failed: gave up after 2 attempts: node d2 was lost: idle timeout"]);
}

#[test]
fn a_token_is_worth_another_try() {
    let mut bench = Bench::with(RouterConfig { max_attempts: 2, ..RouterConfig::default() }, &["d1", "d2"]);
    bench.submit(1, &[7], 9);
    bench.lost("d1");
    bench.joins("d1");
    bench.token("d2", 2, 0, 5);
    bench.seen.clear();
    bench.lost("d2");
    bench.says(&["d1 <- decode r3: [7, 5] of 1"]);
    bench.lost("d1");
    bench.says(&["c1: failed: gave up after 2 attempts: node d1 was lost: idle timeout"]);
}

#[test]
fn waiting_for_a_node_is_no_attempt() {
    let mut bench = Bench::with(RouterConfig { max_attempts: 2, ..RouterConfig::default() }, &["d1"]);
    bench.submit(1, &[7], 5);
    bench.lost("d1");
    bench.joins("p1");
    bench.seen.clear();
    bench.joins("d2");
    bench.says(&["d2 <- welcome d2", "d2 <- decode r2 from p1: [7] of 1", "p1 <- prefill r2 to d2: [7] of 1"]);
}

// Deadlines.

#[test]
fn waiting_for_a_node_has_a_deadline() {
    let mut bench = Bench::new(&["p1"]);
    assert_eq!(bench.router.poll_timeout(), None);
    bench.submit(1, &[7], 5);
    assert_eq!(bench.router.poll_timeout(), Some(Instant(0) + Duration::from_secs(30)));
    bench.at(29);
    bench.says(&[]);
    bench.at(30);
    bench.says(&["c1: unavailable: no node is available: no decode node could be had for 30 s"]);
    assert_eq!(bench.router.poll_timeout(), None);
}

#[test]
fn a_lost_node_starts_the_wait_anew() {
    let mut bench = Bench::new(&["d1"]);
    bench.submit(1, &[7], 5);
    bench.at(50);
    bench.lost("d1");
    bench.at(79);
    bench.says(&["d1 <- decode r1: [7] of 1"]);
    bench.at(80);
    bench.says(&["c1: unavailable: no node is available: no decode node could be had for 30 s"]);
}

/// Sequences without a token for two minutes are tried again.
fn impatient() -> RouterConfig {
    RouterConfig { progress_deadline: Duration::from_secs(120), max_attempts: 4, ..RouterConfig::default() }
}

#[test]
fn a_silent_dispatch_is_recalled_and_tried_again() {
    let mut bench = Bench::with(impatient(), &["p1", "d1"]);
    bench.submit(1, &[7, 8, 9], 5);
    bench.at(100);
    bench.token("p1", 1, 0, 5);
    bench.seen.clear();
    bench.at(219);
    bench.says(&[]);
    bench.at(220);
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "d1 <- decode r2 from p1: [7, 8, 9, 5] of 3",
        "p1 <- prefill r2 to d1: [7, 8, 9, 5] of 3",
    ]);
    bench.at(340);
    bench.at(460);
    bench.seen.clear();
    bench.at(580);
    bench.says(&[
        "p1 <- cancel r4",
        "d1 <- cancel r4",
        "c1: failed: gave up after 4 attempts: no sign of life from its nodes",
    ]);
}

#[test]
fn the_node_that_owed_progress_is_avoided() {
    let names = ["p1", "p2", "d1", "d2"];
    let check = |names: &[&str], told: &[(&str, u32)], want: [&str; 2]| {
        let mut bench = Bench::with(impatient(), names);
        bench.submit(1, &[7], 5);
        for (node, token) in told {
            bench.token(node, 1, 0, *token);
        }
        bench.at(120);
        bench.seen.retain(|output| matches!(output, RouterOutput::Send { .. }));
        assert_eq!(bench.router.stats().redispatched, 1);
        let seen: Vec<String> = bench.seen.drain(..).map(show).collect();
        for who in want {
            assert!(seen.iter().any(|line| line.starts_with(who)), "{who}: {seen:?}");
        }
    };
    // Before the hand-over the prefill node, whether or not the prompt is computed.
    check(&names, &[], ["p2 <- prefill r2", "d1 <- decode r2"]);
    check(&names, &[("p1", 5)], ["p2 <- prefill r2", "d1 <- decode r2"]);
    check(&names, &[("d1", 5)], ["p1 <- prefill r2", "d2 <- decode r2"]);
    check(&["d1", "d2"], &[], ["d1 <- cancel r1", "d2 <- decode r2"]);
}

#[test]
fn a_deadline_that_moved_on_is_looked_up_when_it_passes() {
    let mut bench = Bench::with(impatient(), &["p1", "d1"]);
    bench.submit(1, &[7], 9);
    for (seconds, index) in [(10, 0), (20, 1), (30, 2)] {
        bench.at(seconds);
        bench.token("d1", 1, index, 5);
    }
    bench.seen.clear();
    let due = Instant(0) + Duration::from_secs(150);
    for _ in 0..2 {
        let poll = bench.router.poll_timeout().expect("a sequence is in flight");
        assert!(poll <= due);
        bench.router.handle_timeout(poll);
        bench.drain_outputs();
        if poll < due {
            bench.says(&[]);
        }
    }
    assert_eq!(bench.router.stats().redispatched, 1, "two calls are enough");
}

#[test]
fn a_timer_that_fires_early_or_for_nothing_does_no_harm() {
    let mut bench = Bench::new(&["p1", "d1"]);
    bench.at(5);
    bench.submit(1, &[7], 2);
    bench.seen.clear();
    for seconds in [5, 6, 35, 36, 904] {
        bench.at(seconds);
    }
    bench.says(&[]);
    bench.token("d1", 1, 0, 5);
    bench.token_ends("d1", 1, 1, 6, Some(FinishReason::Length));
    bench.seen.clear();
    bench.at(5000);
    bench.says(&[]);
    assert_eq!(bench.router.poll_timeout(), None);
}

#[test]
fn no_deadline_is_overlooked() {
    let progress_deadline = Duration::from_secs(10);
    let config = RouterConfig { progress_deadline, ..RouterConfig::default() };
    assert!(progress_deadline < config.placement_deadline);
    let mut bench = Bench::with(config, &["d1", "d2"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    assert!(bench.router.poll_timeout() <= Some(Instant(0) + progress_deadline), "{:?}", bench.router.poll_timeout());
    bench.at(10);
    bench.says(&["d1 <- cancel r1", "d2 <- decode r2: [7] of 1"]);
}

// Nodes that fail.

#[test]
fn an_invalid_request_is_not_tried_again() {
    let mut bench = Bench::serving(5);
    bench.fails("p1", 1, NodeError::Invalid("too long".into()));
    bench.says(&["p1 <- cancel r1", "d1 <- cancel r1", "c1: invalid: too long"]);
}

#[test]
fn an_overloaded_node_is_avoided() {
    let mut bench = Bench::new(&["p1", "p2", "d1"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.fails("p1", 1, NodeError::Overloaded("full".into()));
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "d1 <- decode r2 from p2: [7] of 1",
        "p2 <- prefill r2 to d1: [7] of 1",
    ]);
}

/// A node without room is asked again after a second, then two.
fn patient(max_attempts: u32) -> RouterConfig {
    RouterConfig { max_attempts, overload_backoff: Duration::from_secs(1), ..RouterConfig::default() }
}

#[test]
fn who_had_no_room_gets_time_to_make_some() {
    let mut bench = Bench::with(patient(4), &["d1"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    let mut now = 0;
    for (attempt, pause) in [(1, 1), (2, 2), (3, 4)] {
        bench.fails("d1", attempt, NodeError::Overloaded("full".into()));
        bench.says(&[&format!("d1 <- cancel r{attempt}")]);
        assert_eq!(bench.router.poll_timeout(), Some(Instant(0) + Duration::from_secs(now + pause)));
        bench.at(now + pause - 1);
        bench.says(&[]);
        now += pause;
        bench.at(now);
        bench.says(&[&format!("d1 <- decode r{}: [7] of 1", attempt + 1)]);
    }
    bench.fails("d1", 4, NodeError::Overloaded("full".into()));
    bench.says(&["d1 <- cancel r4", "c1: overloaded: the cluster is overloaded: full"]);
}

#[test]
fn a_node_that_was_not_asked_yet_is_asked_at_once() {
    let mut bench = Bench::with(patient(9), &["d1", "d2"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.fails("d1", 1, NodeError::Overloaded("full".into()));
    bench.says(&["d1 <- cancel r1", "d2 <- decode r2: [7] of 1"]);
    bench.fails("d2", 2, NodeError::Overloaded("full".into()));
    bench.says(&["d2 <- cancel r2"]);
    // Nor does one that joins during the pause wait for its end.
    bench.feed(RouterInput::NodeUp { node: NodeId(13), hello: hello("d3") });
    bench.says(&["d3 <- welcome d3", "d3 <- decode r3: [7] of 1"]);
    bench.at(2);
    bench.says(&[]);
}

#[test]
fn a_node_lost_during_the_pause_is_waited_for_like_any_other() {
    let mut bench = Bench::with(patient(4), &["d1"]);
    bench.submit(1, &[7], 5);
    bench.fails("d1", 1, NodeError::Overloaded("full".into()));
    bench.lost("d1");
    bench.seen.clear();
    bench.at(30);
    bench.says(&[]);
    bench.at(31);
    bench.says(&["c1: unavailable: no node is available: no decode node could be had for 30 s"]);
}

#[test]
fn a_client_that_leaves_during_the_pause_is_forgotten() {
    let mut bench = Bench::with(patient(4), &["d1"]);
    bench.submit(1, &[7], 5);
    bench.fails("d1", 1, NodeError::Overloaded("full".into()));
    bench.seen.clear();
    bench.feed(RouterInput::ClientGone(ClientId(1)));
    bench.at(1);
    bench.says(&[]);
    assert_eq!(bench.router.poll_timeout(), None);
}

#[test]
fn a_draining_node_gets_nothing_new() {
    let mut bench = Bench::new(&["d1", "d2"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.fails("d1", 1, NodeError::Draining);
    bench.says(&["d1 <- cancel r1", "d2 <- decode r2: [7] of 1"]);
    bench.node("d2", NodeToRouter::Drained);
    bench.submit(2, &[8], 5);
    bench.says(&[]);
    assert!(bench.router.nodes().iter().all(|node| node.draining));
}

#[test]
fn a_failed_transfer_is_the_decode_nodes_business() {
    let mut bench = Bench::serving(5);
    bench.fails("p1", 1, NodeError::Transfer("link down".into()));
    bench.says(&["d1 <- transfer of r1 failed: link down"]);
    // It has no part in the request any more: its loss would cost nothing.
    bench.in_flight(&[("p1", 0), ("d1", 1)]);
    bench.token("d1", 1, 0, 5);
    bench.says(&["c1: token #0 5"]);
    // Its part is over.
    bench.fails("p1", 1, NodeError::Transfer("link down".into()));
    bench.says(&[]);
}

#[test]
fn a_prompt_that_the_decode_node_computes_is_nobody_elses() {
    let mut bench = Bench::serving(5);
    bench.receipt("d1", 1, Receipt { cached: 2, recomputed: 1, ..Receipt::default() });
    bench.says(&["p1 <- cancel r1"]);
    bench.token("d1", 1, 0, 5);
    bench.says(&["c1: token #0 5"]);
    // Nothing to call off.
    let mut bench = Bench::serving(5);
    bench.receipt("p1", 1, Receipt { computed: 3, ..Receipt::default() });
    bench.receipt("d1", 1, Receipt { transferred: 3, ..Receipt::default() });
    bench.says(&[]);
    let mut bench = Bench::new(&["d1"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.receipt("d1", 1, Receipt { computed: 1, recomputed: 1, ..Receipt::default() });
    bench.says(&[]);
}

#[test]
fn a_decode_node_that_gives_up_is_replaced() {
    let mut bench = Bench::new(&["p1", "d1", "d2"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.fails("d1", 1, NodeError::Transfer("link down".into()));
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "d2 <- decode r2 from p1: [7] of 1",
        "p1 <- prefill r2 to d2: [7] of 1",
    ]);
}

#[test]
fn a_prefill_node_that_fails_after_the_hand_over_is_ignored() {
    for error in [NodeError::Draining, NodeError::Overloaded("full".into()), NodeError::Invalid("odd".into())] {
        let mut bench = Bench::serving(5);
        bench.token("d1", 1, 0, 5);
        bench.seen.clear();
        bench.fails("p1", 1, error);
        bench.says(&[]);
    }
}

// Nodes that join.

#[test]
fn another_model_is_refused_by_field() {
    let mut bench = Bench::new(&["p1"]);
    let identity = ModelIdentity { head_dim: 16, ..identity() };
    bench.feed(RouterInput::NodeUp { node: number("d1"), hello: NodeHello { identity, ..hello("d1") } });
    let reason = "this cluster serves another model than d1: head_dim differs: 8 here, 16 there";
    bench.says(&[&format!("d1 <- refuse: {reason}"), &format!("close d1: {reason}")]);
    bench.in_flight(&[("p1", 0)]);
}

#[test]
fn another_model_than_the_routers_is_refused_by_field() {
    let ModelIdentity { weights, config, tokenizer, .. } = identity();
    let ours = ModelDigests { weights, config, tokenizer };
    let check = |model: ModelDigests, want: Option<&str>| {
        let mut bench = Bench::with(RouterConfig { model: Some(model), ..RouterConfig::default() }, &[]);
        bench.joins("p1");
        let Some(want) = want else { return bench.says(&["p1 <- welcome p1"]) };
        let reason = format!("this cluster serves another model than p1: {want}");
        bench.says(&[&format!("p1 <- refuse: {reason}"), &format!("close p1: {reason}")]);
        bench.in_flight(&[]);
    };
    let (nine, hex) = ([9; 32], "0909090909090909 here,");
    check(ours, None);
    check(ModelDigests { weights: nine, ..ours }, Some(&format!("weights differs: {hex} 0101010101010101 there")));
    check(ModelDigests { config: nine, ..ours }, Some(&format!("config differs: {hex} 0202020202020202 there")));
    check(ModelDigests { tokenizer: nine, ..ours }, Some(&format!("tokenizer differs: {hex} 0303030303030303 there")));
}

#[test]
fn a_node_may_come_back_with_another_model_if_it_is_alone() {
    let other = |name: &str| NodeHello { identity: ModelIdentity { rope: "1".into(), ..identity() }, ..hello(name) };
    let mut bench = Bench::new(&["d1"]);
    bench.feed(RouterInput::NodeUp { node: number("d2"), hello: other("d1") });
    bench.says(&["close d1: replaced by a new connection of the same name", "d2 <- welcome d2"]);
    let mut bench = Bench::new(&["p1", "d1"]);
    bench.feed(RouterInput::NodeUp { node: number("d2"), hello: other("d1") });
    let reason = "this cluster serves another model than d1: rope differs: 10000 here, 1 there";
    bench.says(&[&format!("d2 <- refuse: {reason}"), &format!("close d2: {reason}")]);
    bench.in_flight(&[("p1", 0), ("d1", 0)]);
}

#[test]
fn a_model_of_absurd_size_is_refused_by_field() {
    let huge = u32::MAX;
    let identity = ModelIdentity { kv_heads: huge, head_dim: huge, block_size: huge, ..identity() };
    let mut bench = Bench::new(&["p1"]);
    bench.feed(RouterInput::NodeUp { node: number("d1"), hello: NodeHello { identity, ..hello("d1") } });
    let reason = "this cluster serves another model than d1: kv_heads differs: 1 here, 4294967295 there";
    bench.says(&[&format!("d1 <- refuse: {reason}"), &format!("close d1: {reason}")]);
}

#[test]
fn who_cannot_serve_is_refused() {
    let check = |hello: NodeHello, reason: &str| {
        let mut bench = Bench::new(&[]);
        bench.feed(RouterInput::NodeUp { node: number("d1"), hello });
        bench.says(&[&format!("d1 <- refuse: {reason}"), &format!("close d1: {reason}")]);
    };
    check(NodeHello { role: Role::Router, ..hello("d1") }, "a router cannot join as a node");
    check(NodeHello { kv_addr: None, ..hello("d1") }, "a decode node must say where it takes KV");
    for identity in [
        ModelIdentity { layers: 0, ..identity() },
        ModelIdentity { kv_heads: 0, ..identity() },
        ModelIdentity { head_dim: 0, ..identity() },
        ModelIdentity { block_size: 0, ..identity() },
    ] {
        let none = "a model has layers, heads and blocks: the identity says none";
        check(NodeHello { identity, ..hello("d1") }, none);
    }
}

#[test]
fn a_node_that_comes_back_replaces_itself() {
    let mut bench = Bench::new(&["d1"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.feed(RouterInput::NodeUp { node: number("d2"), hello: hello("d1") });
    bench.says(&[
        "close d1: replaced by a new connection of the same name",
        "d2 <- welcome d2",
        "d2 <- decode r2: [7] of 1",
    ]);
    // The old connection's end and last words change nothing.
    bench.token("d1", 1, 0, 5);
    bench.lost("d1");
    bench.says(&[]);
    bench.in_flight(&[("d2", 1)]);
}

#[test]
fn a_second_hello_closes_the_connection() {
    let mut bench = Bench::new(&["d1"]);
    bench.submit(1, &[7], 5);
    bench.seen.clear();
    bench.node("d1", NodeToRouter::Hello(hello("d1")));
    bench.says(&["close d1: a second hello on one connection"]);
    bench.in_flight(&[]);
}
