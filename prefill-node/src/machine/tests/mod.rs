//! What the prefill node's machine does, case by case; gauges and cache reports are left out except where they are
//! the point. Read `bench` first.

mod bench;
mod blocks;

use super::{PrefillConfig, PrefillInput, PrefillOutput};
use bench::*;
use ridge_protocol::stats::NodeStats;
use ridge_protocol::transfer::SendCommand;
use ridge_protocol::wire::{DecodeRequest, FinishReason, NodeError, NodeToRouter, PrefillRequest, RouterToNode};
use ridge_protocol::{Duration, Machine, NoToken, RequestId, SamplingParams, TokenOut};

// Chunks.

/// Prompts of these lengths arrive together, while another one is being computed.
fn check_passes(config: PrefillConfig, lens: &[u32], want: &[&str]) {
    let mut bench = Bench::new(PrefillConfig { max_waiting: 9, ..config });
    bench.send(alone(prompt(0, 1)));
    for (at, len) in lens.iter().enumerate() {
        bench.send(alone(prompt(at as u64 + 1, *len)));
    }
    assert_eq!(bench.passes()[1..], *want, "{lens:?}");
    assert!(bench.node.is_idle());
}

#[test]
fn a_prompt_is_computed_in_chunks_under_the_budget() {
    check_passes(config(), &[1], &["r1 0..1*"]);
    check_passes(config(), &[7], &["r1 0..7*"]);
    check_passes(config(), &[8], &["r1 0..8*"]);
    check_passes(config(), &[9], &["r1 0..8", "r1 8..9*"]);
    check_passes(config(), &[31], &["r1 0..8", "r1 8..16", "r1 16..24", "r1 24..31*"]);
}

#[test]
fn chunks_end_on_block_boundaries() {
    let with = |max_batched_tokens| PrefillConfig { max_batched_tokens, ..config() };
    check_passes(with(10), &[21], &["r1 0..8", "r1 8..16", "r1 16..21*"]);
    check_passes(with(7), &[12], &["r1 0..4", "r1 4..8", "r1 8..12*"]);
    check_passes(with(4), &[6], &["r1 0..4", "r1 4..6*"]);
    check_passes(with(100), &[21], &["r1 0..21*"]);
}

#[test]
fn short_prompts_share_a_pass() {
    check_passes(config(), &[3, 3], &["r1 0..3*, r2 0..3*"]);
    check_passes(config(), &[2, 2, 2, 2], &["r1 0..2*, r2 0..2*, r3 0..2*, r4 0..2*"]);
    // What is left of the budget goes to the next one in whole blocks.
    check_passes(config(), &[4, 9], &["r1 0..4*, r2 0..4", "r2 4..9*"]);
    check_passes(config(), &[3, 9], &["r1 0..3*, r2 0..4", "r2 4..9*"]);
    check_passes(config(), &[6, 6], &["r1 0..6*", "r2 0..6*"]);
    check_passes(config(), &[9, 3], &["r1 0..8", "r1 8..9*, r2 0..3*"]);
}

#[test]
fn prompts_are_computed_in_the_order_of_arrival() {
    // r3 would fit beside r1, but r2 was first.
    check_passes(config(), &[6, 6, 2], &["r1 0..6*", "r2 0..6*, r3 0..2*"]);
    let two = PrefillConfig { max_running: 2, ..config() };
    check_passes(two, &[2, 2, 2], &["r1 0..2*, r2 0..2*", "r3 0..2*"]);
}

#[test]
fn a_prompt_waits_for_blocks_and_nobody_overtakes_it() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 20));
    bench.send(prompt(2, 16));
    bench.send(prompt(3, 1));
    bench.queues(2, 1, 37);
    bench.blocks([3, 0, 5, 0]);
    assert_eq!(bench.passes(), ["r1 0..8", "r1 8..16", "r1 16..20*"]);
    // Held blocks are not free.
    bench.queues(2, 0, 17);
    bench.blocks([3, 0, 0, 5]);
    bench.committed(1);
    bench.queues(0, 2, 17);
    bench.blocks([0, 3, 5, 0]);
}

#[test]
fn offers_do_not_wait_for_the_end_of_a_pass() {
    let mut bench = Bench::new(config());
    bench.send(alone(shared(1, 9)));
    bench.passes();
    bench.send(prompt(2, 8));
    bench.seen.clear();
    bench.send(shared(3, 9));
    bench.says(&[
        "begin r3 to d1: 9 tokens in [0, 1, 5], 2 hashes, 2 layers",
        "ready r3 layer 0: 0..2",
        "ready r3 layer 1: 0..2",
    ]);
    bench.queues(0, 2, 9);
    bench.blocks([3, 0, 5, 0]);
    bench.layer(0);
    bench.says(&["ready r2 layer 0: 0..2"]);
    assert_eq!(bench.passes(), ["r2 0..8*", "r3 8..9*"]);
}

#[test]
fn blocks_that_come_back_during_a_pass_are_given_at_once() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 16));
    bench.passes();
    bench.send(prompt(2, 4));
    bench.send(prompt(3, 16));
    bench.queues(1, 1, 20);
    bench.seen.clear();
    bench.committed(1);
    bench.says(&["shipped r1", "begin r3 to d1: 16 tokens in [5, 6, 7, 3], 4 hashes, 2 layers"]);
    bench.queues(0, 2, 20);
    assert_eq!(bench.passes(), ["r2 0..4*", "r3 0..8", "r3 8..16*"]);
}

/// What constrains an answer is the engine's business: it says that the first token is the last, or that there is none.
#[test]
fn a_grammar_may_end_an_answer_at_once() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 6));
    bench.step_gives(&Ok(TokenOut { ends: true, ..out(7) }));
    let first = |output: &PrefillOutput| match output {
        PrefillOutput::ToRouter(NodeToRouter::Token { out, finish, .. }) => Some((out.ends, *finish)),
        _ => None,
    };
    assert_eq!(bench.seen.iter().find_map(first), Some((true, Some(FinishReason::Stop))));
    // The decode node hears the same token, and ends with it too.
    bench.committed(1);
    assert!(bench.node.is_idle());

    for request in [prompt(2, 6), alone(prompt(3, 6))] {
        let (id, sends) = (request.request, request.to.is_some());
        bench.send(request);
        bench.seen.clear();
        bench.step_gives(&Err(NoToken("nothing is allowed".into())));
        let cancelled = bench.seen.iter().any(
            |output| matches!(output, PrefillOutput::Transfer(SendCommand::Cancel { request, .. }) if *request == id),
        );
        assert_eq!(cancelled, sends, "the decode node's wait ends: {:?}", bench.seen);
        let failed = NodeToRouter::Failed { request: id, error: NodeError::Invalid("nothing is allowed".into()) };
        let told = |output: &PrefillOutput| matches!(output, PrefillOutput::ToRouter(message) if *message == failed);
        assert!(bench.seen.iter().any(told), "{:?}", bench.seen);
        assert!(bench.node.is_idle(), "its blocks are free");
    }
}

#[test]
fn sampling_gets_position_and_history() {
    let check = |params: SamplingParams, want: (u32, u32, usize)| {
        let mut bench = Bench::new(config());
        bench.send(PrefillRequest { prompt_len: 5, params, ..prompt(1, 7) });
        let plan = bench.pass.expect("a pass runs");
        let sample = plan.items[0].sample.as_ref().expect("the last chunk samples");
        assert_eq!((sample.position, sample.prompt_len, sample.history.len()), want);
    };
    check(SamplingParams::greedy(9), (7, 5, 0));
    check(SamplingParams { presence_penalty: 1.0, ..SamplingParams::greedy(9) }, (7, 5, 7));
    check(SamplingParams { repetition_penalty: 1.5, ..SamplingParams::greedy(9) }, (7, 5, 7));
}

#[test]
fn a_pass_gets_the_blocks_of_the_sequence_so_far() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 9));
    let table = |bench: &Bench| -> Vec<u32> {
        bench.pass.as_ref().expect("a pass runs").items[0].block_table.iter().map(|b| b.0).collect()
    };
    assert_eq!(table(&bench), [0, 1]);
    bench.step();
    assert_eq!(table(&bench), [0, 1, 2]);
}

// The hand-off.

#[test]
fn each_layer_is_shipped_when_it_is_done() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 9));
    bench.says(&["begin r1 to d1: 9 tokens in [0, 1, 2], 2 hashes, 2 layers", "run r1 0..8"]);
    bench.layer(0);
    bench.says(&["ready r1 layer 0: 0..2"]);
    bench.layer(1);
    bench.says(&["ready r1 layer 1: 0..2"]);
    bench.step();
    bench.says(&["run r1 8..9*"]);
    bench.layer(0);
    bench.layer(1);
    bench.says(&["ready r1 layer 0: 2..3", "ready r1 layer 1: 2..3"]);
    bench.step();
    bench.says(&["receipt r1: 0 cached, 9 computed", "token r1 #0 42", "finish r1 with 42"]);
    bench.committed(1);
    bench.says(&["shipped r1"]);
    assert!(bench.node.is_idle());
}

#[test]
fn every_prompt_of_a_pass_is_shipped() {
    let mut bench = Bench::new(PrefillConfig { max_waiting: 3, ..config() });
    bench.send(alone(prompt(1, 1)));
    bench.send(prompt(2, 3));
    bench.send(alone(prompt(3, 1)));
    bench.send(prompt(4, 8));
    bench.step();
    bench.seen.clear();
    bench.layer(1);
    bench.says(&["ready r2 layer 1: 0..1", "ready r4 layer 1: 0..1"]);
    bench.step();
    bench.seen.clear();
    bench.layer(0);
    bench.says(&["ready r4 layer 0: 1..2"]);
}

#[test]
fn nothing_is_shipped_when_nobody_continues() {
    let mut bench = Bench::new(config());
    bench.send(alone(prompt(1, 9)));
    bench.layer(0);
    bench.layer(1);
    bench.step();
    bench.layer(0);
    bench.step();
    bench.says(&["run r1 0..8", "run r1 8..9*", "receipt r1: 0 cached, 9 computed", "token r1 #0 42"]);
    bench.blocks([6, 2, 0, 0]);
}

#[test]
fn blocks_are_held_until_the_hand_off_is_settled() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 7));
    bench.blocks([6, 0, 2, 0]);
    bench.step();
    bench.blocks([6, 0, 0, 2]);
    bench.report();
    bench.blocks([6, 0, 0, 2]);
    assert!(!bench.node.is_idle());
    bench.committed(1);
    bench.blocks([7, 1, 0, 0]);
}

// Reuse of cached prefixes.

/// After a prompt of `before` tokens: what is computed of one of `len`.
fn check_reuse(config: PrefillConfig, before: u32, len: u32, want: &[&str]) {
    let mut bench = Bench::new(config);
    bench.send(alone(shared(1, before)));
    bench.passes();
    bench.send(alone(shared(2, len)));
    assert_eq!(bench.passes(), want, "{before} then {len}");
}

#[test]
fn a_cached_prefix_is_not_computed() {
    check_reuse(config(), 9, 10, &["r2 8..10*"]);
    check_reuse(config(), 8, 12, &["r2 8..12*"]);
    check_reuse(config(), 12, 6, &["r2 4..6*"]);
    // Only full blocks are kept.
    check_reuse(config(), 7, 9, &["r2 4..9*"]);
    check_reuse(config(), 3, 5, &["r2 0..5*"]);
    check_reuse(PrefillConfig { prefix_caching: false, ..config() }, 8, 8, &["r2 0..8*"]);
}

#[test]
fn the_last_token_is_always_computed() {
    check_reuse(config(), 8, 8, &["r2 4..8*"]);
    check_reuse(config(), 9, 9, &["r2 8..9*"]);
    check_reuse(config(), 4, 4, &["r2 0..4*"]);
}

#[test]
fn a_cached_prefix_is_shipped_for_all_layers_at_once() {
    let mut bench = Bench::new(config());
    bench.send(alone(shared(1, 9)));
    bench.passes();
    bench.seen.clear();
    bench.send(shared(2, 10));
    bench.says(&[
        "begin r2 to d1: 10 tokens in [0, 1, 3], 2 hashes, 2 layers",
        "ready r2 layer 0: 0..2",
        "ready r2 layer 1: 0..2",
        "run r2 8..10*",
    ]);
    bench.layer(0);
    bench.says(&["ready r2 layer 0: 2..3"]);
    bench.step();
    bench.says(&["receipt r2: 8 cached, 2 computed", "token r2 #0 42", "finish r2 with 42"]);
    assert_eq!((bench.node.stats().cached_tokens, bench.node.stats().computed_tokens), (8, 11));
}

#[test]
fn tenants_share_nothing() {
    let mut bench = Bench::new(config());
    bench.send(alone(shared(1, 9)));
    bench.passes();
    bench.send(alone(PrefillRequest { salt: 1, ..shared(2, 9) }));
    assert_eq!(bench.passes(), ["r2 0..8", "r2 8..9*"]);
}

#[test]
fn what_a_cancelled_prompt_computed_is_reused() {
    let mut bench = Bench::new(config());
    bench.send(shared(1, 20));
    bench.step();
    bench.cancel(1);
    bench.step();
    bench.send(alone(shared(2, 20)));
    assert_eq!(bench.passes(), ["r2 16..20*"]);
}

#[test]
fn a_held_prefix_is_shared() {
    let mut bench = Bench::new(config());
    bench.send(shared(1, 8));
    bench.step();
    bench.blocks([6, 0, 0, 2]);
    bench.send(shared(2, 9));
    bench.blocks([5, 0, 3, 0]);
    bench.committed(1);
    bench.blocks([5, 0, 3, 0]);
}

#[test]
fn changes_of_the_cache_are_reported_once() {
    let mut bench = Bench::new(config());
    bench.wait(1000);
    bench.send(alone(prompt(1, 24)));
    bench.passes();
    assert_eq!(bench.reports(), (1, vec![(6, 0)]));
    bench.report();
    assert_eq!(bench.reports(), (1, vec![]));
    // Two free blocks, then the tail of what is cached.
    bench.wait(1000);
    bench.send(alone(prompt(2, 16)));
    bench.passes();
    assert_eq!(bench.reports(), (1, vec![(4, 0), (0, 2)]), "added and removed apart");
}

#[test]
fn of_several_changes_the_last_is_reported() {
    let mut bench = Bench::new(config());
    bench.report();
    bench.seen.clear();
    // The second evicts the tail of the first; the first, come again, that of the second.
    for (id, len) in [(1, 24), (2, 16)] {
        bench.send(alone(prompt(id, len)));
        bench.passes();
    }
    bench.send(alone(PrefillRequest { request: RequestId(3), ..prompt(1, 24) }));
    assert_eq!(bench.passes(), ["r3 16..24*"]);
    assert_eq!(bench.reports(), (0, vec![]));
    bench.report();
    assert_eq!(bench.reports(), (1, vec![(8, 0), (0, 2)]));
}

#[test]
fn a_router_that_takes_the_node_in_is_told_the_whole_cache() {
    let mut bench = Bench::new(config());
    bench.wait(1000);
    bench.send(alone(prompt(1, 24)));
    bench.passes();
    bench.seen.clear();
    bench.feed(PrefillInput::RouterLost);
    bench.feed(PrefillInput::RouterUp);
    assert_eq!(bench.reports(), (0, vec![]));
    bench.report();
    assert_eq!(bench.reports(), (1, vec![(6, 0)]));
    bench.report();
    assert_eq!(bench.reports(), (1, vec![]));
    // What went before it came is none of its business.
    bench.send(prompt(2, 16));
    bench.feed(PrefillInput::RouterUp);
    bench.report();
    assert_eq!(bench.reports(), (1, vec![(4, 0)]));
}

#[test]
fn a_message_about_the_cache_has_a_largest_size() {
    const HASHES: usize = 32_768;
    let len = HASHES as u32 + 2;
    let mut bench = Bench::new(PrefillConfig {
        blocks: len,
        block_size: 1,
        max_model_len: len,
        max_batched_tokens: len,
        ..config()
    });
    bench.wait(1000);
    bench.send(alone(prompt(1, len - 1)));
    bench.passes();
    assert_eq!(bench.reports(), (1, vec![(HASHES, 0), (1, 0)]));
    bench.wait(1000);
    bench.send(alone(PrefillRequest { salt: 1, ..prompt(2, len - 1) }));
    bench.passes();
    assert_eq!(bench.reports(), (1, vec![(HASHES, 0), (1, 0), (0, HASHES)]));
}

// The first token, which may be the last.

fn check_finish(request: PrefillRequest, want: &str) {
    let mut bench = Bench::new(config());
    bench.send(request);
    bench.passes();
    let tokens = bench.seen.drain(..).filter_map(show).filter(|line| line.starts_with("token"));
    assert_eq!(tokens.collect::<Vec<_>>(), [want]);
}

#[test]
fn the_first_token_may_end_the_answer() {
    let stop = |max_tokens| SamplingParams { stop_tokens: vec![42], ..SamplingParams::greedy(max_tokens) };
    let with = |params| PrefillRequest { params, ..prompt(1, 5) };
    check_finish(with(SamplingParams::greedy(2)), "token r1 #0 42");
    check_finish(with(SamplingParams::greedy(1)), "token r1 #0 42, Length");
    check_finish(with(stop(2)), "token r1 #0 42, Stop");
    check_finish(with(stop(1)), "token r1 #0 42, Stop");
    check_finish(with(SamplingParams { ignore_eos: true, ..stop(2) }), "token r1 #0 42");
    check_finish(with(SamplingParams { stop_tokens: vec![41], ..stop(2) }), "token r1 #0 42");
}

#[test]
fn the_context_ends_the_answer() {
    check_finish(prompt(1, 30), "token r1 #0 42");
    check_finish(prompt(1, 31), "token r1 #0 42, Length");
}

#[test]
fn after_a_failover_generated_tokens_count_as_answer() {
    let with =
        |max_tokens| PrefillRequest { prompt_len: 3, params: SamplingParams::greedy(max_tokens), ..prompt(1, 5) };
    check_finish(with(4), "token r1 #2 42");
    check_finish(with(3), "token r1 #2 42, Length");
}

#[test]
fn a_last_token_is_still_handed_over() {
    let mut bench = Bench::new(config());
    bench.send(PrefillRequest { params: SamplingParams::greedy(1), ..prompt(1, 2) });
    bench.seen.clear();
    bench.step();
    bench.says(&["receipt r1: 0 cached, 2 computed", "token r1 #0 42, Length", "finish r1 with 42"]);
    bench.blocks([7, 0, 0, 1]);
}

// Cancelling.

#[test]
fn cancelled_while_waiting() {
    let mut bench = Bench::new(PrefillConfig { max_running: 1, ..config() });
    bench.send(prompt(1, 5));
    bench.send(prompt(2, 5));
    bench.seen.clear();
    bench.cancel(2);
    bench.says(&["cancel r2: cancelled by the router"]);
    bench.queues(0, 1, 5);
    assert_eq!(bench.passes(), ["r1 0..5*"]);
}

#[test]
fn cancelled_in_a_pass_blocks_go_when_it_ends() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 5));
    bench.seen.clear();
    bench.layer(0);
    bench.says(&["ready r1 layer 0: 0..2"]);
    bench.cancel(1);
    bench.says(&["cancel r1: cancelled by the router"]);
    bench.blocks([6, 0, 2, 0]);
    bench.layer(1);
    bench.cancel(1);
    bench.says(&[]);
    bench.step();
    bench.says(&[]);
    bench.blocks([7, 1, 0, 0]);
    assert!(bench.node.is_idle());
}

#[test]
fn cancelled_between_its_passes() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 16));
    bench.send(prompt(2, 9));
    bench.step();
    // r1 fills the pass, r2 has its blocks and waits for its turn.
    bench.blocks([1, 0, 7, 0]);
    bench.seen.clear();
    bench.cancel(2);
    bench.says(&["cancel r2: cancelled by the router"]);
    bench.blocks([4, 0, 4, 0]);
    assert_eq!(bench.passes(), ["r1 8..16*"]);
}

#[test]
fn cancelled_while_holding() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 3));
    bench.step();
    bench.seen.clear();
    bench.cancel(1);
    bench.says(&["cancel r1: cancelled by the router"]);
    bench.blocks([8, 0, 0, 0]);
    bench.committed(1);
    bench.says(&[]);
}

#[test]
fn cancelling_what_is_unknown_or_over_does_nothing() {
    let mut bench = Bench::new(config());
    bench.cancel(1);
    bench.send(alone(prompt(1, 3)));
    bench.step();
    bench.seen.clear();
    bench.cancel(1);
    bench.says(&[]);
}

// A hand-off that fails.

#[test]
fn aborted_in_a_pass() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 9));
    bench.layer(0);
    bench.seen.clear();
    bench.aborted(1);
    bench.says(&["failed r1: KV transfer failed: link down"]);
    bench.blocks([5, 0, 3, 0]);
    bench.layer(1);
    bench.step();
    // What was computed stays cached; the rest is not computed.
    bench.says(&[]);
    bench.blocks([6, 2, 0, 0]);
    assert!(bench.node.is_idle());
}

#[test]
fn aborted_between_its_passes() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 16));
    bench.send(prompt(2, 9));
    bench.step();
    bench.seen.clear();
    bench.aborted(2);
    bench.says(&["failed r2: KV transfer failed: link down"]);
    bench.blocks([4, 0, 4, 0]);
}

#[test]
fn aborted_while_holding() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 4));
    bench.step();
    bench.seen.clear();
    bench.aborted(1);
    bench.says(&["failed r1: KV transfer failed: link down"]);
    bench.blocks([7, 1, 0, 0]);
    bench.aborted(1);
    bench.says(&[]);
}

// Refusals and duplicates.

#[test]
fn duplicates_are_ignored() {
    let mut bench = Bench::new(PrefillConfig { max_running: 1, ..config() });
    bench.send(prompt(1, 3));
    bench.send(prompt(2, 3));
    bench.seen.clear();
    bench.send(prompt(1, 3));
    bench.send(prompt(2, 3));
    bench.says(&[]);
    bench.queues(1, 1, 6);
    bench.step();
    bench.seen.clear();
    // Holding, and in a pass.
    bench.send(prompt(1, 3));
    bench.send(prompt(2, 3));
    bench.says(&[]);
    assert_eq!(bench.passes(), ["r2 0..3*"]);
}

fn check_refused(request: PrefillRequest, want: &str) {
    let mut bench = Bench::new(config());
    bench.send(request);
    bench.says(&[want]);
    assert!(bench.node.is_idle());
}

#[test]
fn bad_requests_are_refused() {
    check_refused(prompt(1, 0), "failed r1: the prompt is empty");
    check_refused(PrefillRequest { prompt_len: 0, ..prompt(1, 3) }, "failed r1: the prompt is empty");
    check_refused(PrefillRequest { prompt_len: 4, ..prompt(1, 3) }, "failed r1: the prompt is empty");
    check_refused(prompt(1, 32), "failed r1: a prompt of 32 tokens leaves no room in a context of 32");
    let tokens = vec![1, 100, 2];
    let outside = "failed r1: token 100 is outside the vocabulary of 100";
    check_refused(PrefillRequest { tokens, ..prompt(1, 3) }, outside);
    let none = "failed r1: max_tokens must be at least 1";
    check_refused(PrefillRequest { params: SamplingParams::greedy(0), ..prompt(1, 3) }, none);
    let params = SamplingParams { top_p: f32::NAN, ..SamplingParams::greedy(1) };
    let mut bench = Bench::new(config());
    bench.send(PrefillRequest { params, ..prompt(1, 3) });
    assert!(matches!(&bench.seen[..], [PrefillOutput::ToRouter(NodeToRouter::Failed { .. })]));
}

#[test]
fn a_full_queue_refuses() {
    let mut bench = Bench::new(PrefillConfig { max_running: 1, ..config() });
    for id in 1..=3 {
        bench.send(prompt(id, 3));
    }
    bench.seen.clear();
    bench.send(prompt(4, 3));
    bench.says(&["failed r4: overloaded: 2 prompts are waiting"]);
    bench.cancel(2);
    bench.send(prompt(4, 3));
    bench.says(&["cancel r2: cancelled by the router"]);
    bench.queues(2, 1, 9);
}

#[test]
fn a_decode_request_is_refused() {
    let PrefillRequest { request, tokens, prompt_len, salt, params, .. } = prompt(1, 3);
    let mut bench = Bench::new(config());
    bench.router(RouterToNode::Decode(DecodeRequest {
        request,
        from: None,
        tokens,
        prompt_len,
        salt,
        params,
        last_resort: false,
    }));
    bench.says(&["failed r1: a prefill node cannot take a decode request"]);
}

// The router.

#[test]
fn without_its_router_a_node_forgets_everything() {
    let mut bench = Bench::new(PrefillConfig { max_running: 1, ..config() });
    bench.send(prompt(1, 3));
    bench.step();
    bench.send(prompt(2, 3));
    bench.send(prompt(3, 3));
    bench.blocks([6, 0, 1, 1]);
    bench.seen.clear();
    bench.feed(PrefillInput::RouterLost);
    let cancelled = |id| format!("cancel r{id}: the router's connection is gone");
    bench.says(&[&cancelled(1), &cancelled(2), &cancelled(3)]);
    bench.queues(0, 1, 3);
    bench.blocks([7, 0, 1, 0]);
    bench.step();
    bench.says(&[]);
    bench.blocks([8, 0, 0, 0]);
    assert!(bench.node.is_idle());
}

#[test]
fn a_draining_node_finishes_what_it_has() {
    let mut bench = Bench::new(PrefillConfig { max_running: 1, ..config() });
    bench.send(prompt(1, 3));
    bench.send(alone(prompt(2, 3)));
    bench.seen.clear();
    bench.router(RouterToNode::Drain);
    bench.send(prompt(3, 3));
    bench.says(&["failed r3: draining"]);
    assert_eq!(bench.passes(), ["r1 0..3*", "r2 0..3*"]);
    bench.seen.clear();
    bench.report();
    bench.says(&[]); // r1 is still held.
    bench.committed(1);
    bench.says(&["shipped r1", "drained"]);
}

#[test]
fn an_idle_node_that_is_drained_says_so_with_its_next_report() {
    let mut bench = Bench::new(config());
    bench.router(RouterToNode::Drain);
    bench.says(&[]);
    bench.report();
    bench.says(&["drained"]);
}

#[test]
fn a_new_router_ends_the_drain() {
    let mut bench = Bench::new(config());
    bench.router(RouterToNode::Drain);
    bench.feed(PrefillInput::RouterLost);
    bench.send(alone(prompt(1, 3)));
    bench.says(&["run r1 0..3*"]);
}

#[test]
fn no_router_calls_off_a_shutdown() {
    let mut bench = Bench::new(config());
    bench.send(alone(prompt(1, 3)));
    bench.seen.clear();
    bench.feed(PrefillInput::Shutdown);
    bench.send(prompt(2, 3));
    bench.says(&["draining", "failed r2: draining"]);
    bench.feed(PrefillInput::RouterLost);
    bench.feed(PrefillInput::RouterUp);
    bench.send(prompt(3, 3));
    bench.says(&["failed r3: draining"]);
    bench.step();
    bench.says(&["drained"]);
    bench.router(RouterToNode::Drain);
    bench.feed(PrefillInput::RouterLost);
    bench.send(prompt(4, 3));
    bench.says(&["failed r4: draining"]);
}

#[test]
fn a_failed_transfer_is_the_decode_nodes_business() {
    let mut bench = Bench::new(config());
    bench.send(prompt(1, 3));
    bench.seen.clear();
    bench.router(RouterToNode::TransferFailed { request: RequestId(1), reason: "link down".into() });
    bench.says(&[]);
    assert_eq!(bench.passes(), ["r1 0..3*"]);
}

// Reports.

#[test]
fn gauges_are_reported_in_intervals_and_when_idle() {
    let mut bench = Bench::new(config());
    bench.report();
    assert_eq!(bench.reports().0, 1);
    assert_eq!(bench.node.poll_timeout(), Some(bench.now + config().report_interval));
    bench.node.handle_timeout(bench.now);
    bench.drain_outputs();
    assert_eq!(bench.reports().0, 0, "not due");
    bench.wait(20);
    bench.send(alone(prompt(1, 9)));
    bench.step();
    assert_eq!(bench.reports().0, 0, "busy");
    bench.step();
    assert_eq!(bench.reports().0, 1, "idle");
    assert_eq!(bench.node.poll_timeout(), Some(bench.now + config().report_interval));
}

#[test]
fn a_node_that_is_idle_again_and_again_keeps_a_distance_between_reports() {
    let mut bench = Bench::new(config());
    bench.report();
    let due = bench.now + Duration::from_millis(20);
    bench.seen.clear();
    for id in 1..=2 {
        bench.wait(9);
        bench.send(alone(prompt(id, 3)));
        bench.step();
        assert_eq!(bench.reports().0, 0, "too early");
        assert_eq!(bench.node.poll_timeout(), Some(due));
    }
    bench.report();
    assert_eq!((bench.reports().0, bench.now), (1, due));
    // A node that is to stop does not keep its router waiting.
    bench.send(alone(prompt(3, 3)));
    bench.feed(PrefillInput::Shutdown);
    bench.step();
    assert_eq!(bench.reports().0, 1);
}

#[test]
fn stats_follow_a_prompt() {
    let mut bench = Bench::new(config());
    let counters = |bench: &Bench| {
        let NodeStats { computed_tokens, generated_tokens, steps, busy_us, .. } = bench.node.stats();
        (computed_tokens, generated_tokens, steps, busy_us)
    };
    bench.send(prompt(1, 9));
    bench.queues(0, 1, 9);
    bench.blocks([5, 0, 3, 0]);
    assert_eq!(counters(&bench), (0, 0, 0, 0));
    bench.step();
    bench.queues(0, 1, 1);
    assert_eq!(counters(&bench), (8, 0, 1, 5));
    bench.step();
    bench.queues(0, 0, 0);
    bench.blocks([5, 0, 0, 3]);
    assert_eq!(counters(&bench), (9, 1, 2, 10));
    bench.committed(1);
    bench.blocks([6, 2, 0, 0]);
    assert_eq!(bench.node.stats().orphaned_blocks, 0);
}
