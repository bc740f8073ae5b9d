//! What the decode node's machine does, case by case; gauges and cache reports are left out except where they are the
//! point. Read `bench` first.

mod admission;
mod bench;
mod moves;

use super::{DecodeConfig, DecodeInput, DecodeOutput};
use bench::*;
use ridge_protocol::stats::NodeStats;
use ridge_protocol::transfer::{ReceiveCommand, ReceiveEvent};
use ridge_protocol::wire::{DecodeRequest, NodeError, NodeToRouter, PrefillRequest, RouterToNode};
use ridge_protocol::{Duration, Machine, NoToken, RequestId, SamplingParams, TokenId, TokenOut};

// The hand-off.

#[test]
fn a_sequence_is_reserved_lands_and_is_continued() {
    let mut bench = Bench::new(config());
    bench.send(short(remote(1, 9), 3));
    bench.says(&["expect r1: 9 tokens in [0, 1, 2], have 0"]);
    bench.blocks([5, 0, 0, 3]);
    bench.lands(1);
    // The first token is said again: whoever is first is shown.
    bench.says(&["receipt r1: 9 transferred, 99 bytes", "token r1 #0 41", "run r1 9..10*"]);
    bench.blocks([5, 0, 3, 0]);
    bench.step();
    bench.says(&["token r1 #1 42", "run r1 10..11*"]);
    bench.step();
    bench.says(&["token r1 #2 42, Length"]);
    bench.blocks([6, 2, 0, 0]);
    assert!(bench.node.is_idle());
}

/// After a prompt of `before` tokens was here: how much of one of `len` is not asked for.
fn check_have(config: DecodeConfig, before: u32, len: u32, want: u32) {
    let mut bench = Bench::new(config);
    bench.send(short(shared(remote(1, before)), 1));
    bench.lands(1);
    bench.seen.clear();
    bench.send(shared(remote(2, len)));
    let have = bench.seen.iter().find_map(|output| match output {
        DecodeOutput::Transfer(ReceiveCommand::Expect(job)) => Some(job.have),
        _ => None,
    });
    assert_eq!(have, Some(want), "{before} then {len}");
}

#[test]
fn only_what_is_not_cached_is_asked_for() {
    check_have(config(), 9, 10, 2);
    check_have(config(), 12, 10, 2);
    check_have(config(), 7, 10, 1);
    check_have(config(), 3, 10, 0);
    // A prompt that is cached as a whole: its first token still has to come.
    check_have(config(), 8, 8, 2);
    check_have(DecodeConfig { prefix_caching: false, ..config() }, 9, 10, 0);
}

#[test]
fn a_receipt_tells_cached_from_transferred() {
    let check = |len: u32, want: &str| {
        let mut bench = Bench::new(config());
        bench.send(short(shared(remote(1, 8)), 1));
        bench.lands(1);
        bench.send(shared(remote(2, len)));
        bench.seen.clear();
        bench.lands(2);
        bench.says(&[want, "token r2 #0 41", &format!("run r2 {len}..{}*", len + 1)]);
    };
    check(11, "receipt r2: 8 cached, 3 transferred, 99 bytes");
    check(8, "receipt r2: 8 cached, 99 bytes");
}

#[test]
fn what_lands_during_a_pass_joins_the_next() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 5));
    bench.send(remote(2, 5));
    bench.lands(2);
    bench.lands(1);
    bench.runs("r2 5..6*");
    bench.step();
    bench.runs("r2 6..7*, r1 5..6*");
}

#[test]
fn events_of_a_forgotten_transfer_are_ignored() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 5));
    bench.cancel(1);
    bench.seen.clear();
    bench.lands(1);
    bench.transfer_fails(1);
    bench.says(&[]);
}

// A hand-off that fails.

#[test]
fn after_a_failed_transfer_the_prompt_is_computed_here() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 9));
    bench.seen.clear();
    bench.transfer_fails(1);
    bench.says(&["run r1 0..8"]);
    bench.blocks([5, 0, 3, 0]);
    bench.step();
    bench.says(&["run r1 8..9*"]);
    bench.step();
    bench.says(&["receipt r1: 9 recomputed", "token r1 #0 42", "run r1 9..10*"]);
    assert_eq!(bench.node.stats().recomputed_tokens, 9);
    assert_eq!(bench.node.stats().computed_tokens, 0);
    bench.step();
    assert_eq!(bench.node.stats().recomputed_tokens, 9, "a decode step is not a recomputation");
}

#[test]
fn after_a_failed_transfer_the_cached_part_is_used() {
    let mut bench = Bench::new(config());
    bench.send(short(shared(remote(1, 8)), 1));
    bench.lands(1);
    bench.send(shared(remote(2, 11)));
    bench.transfer_fails(2);
    bench.runs("r2 8..11*");
    bench.seen.clear();
    bench.step();
    bench.says(&["receipt r2: 8 cached, 3 recomputed", "token r2 #0 42", "run r2 11..12*"]);
    bench.computed((0, 3));
}

#[test]
fn a_block_that_others_read_is_not_written_again() {
    let mut bench = Bench::new(config());
    bench.send(shared(remote(1, 8)));
    bench.lands(1);
    bench.send(shared(remote(2, 8)));
    bench.blocks([4, 0, 3, 1]);
    bench.seen.clear();
    // All of it was cached: its last token must be run for its logits, in a block of its own.
    bench.transfer_fails(2);
    bench.says(&[]);
    bench.queues(0, 2);
    bench.blocks([3, 0, 5, 0]);
    bench.step();
    bench.runs("r1 9..10*, r2 4..8*");
    let (first, second) = (bench.table(0), bench.table(1));
    assert_eq!((first[0], first.len(), second.len()), (second[0], 3, 2));
    assert!(!first.contains(&second[1]), "{first:?} {second:?}");
    bench.seen.clear();
    bench.step();
    let receipt = "receipt r2: 8 cached, 4 recomputed";
    bench.says(&["token r1 #2 42", receipt, "token r2 #0 42", "run r1 10..11*, r2 8..9*"]);
    bench.computed((0, 4));
}

#[test]
fn without_a_block_of_its_own_it_waits_and_is_the_first_to_have_one() {
    let mut bench = Bench::new(config());
    bench.send(shared(remote(1, 16)));
    bench.lands(1);
    bench.send(shared(remote(2, 16)));
    bench.send(remote(3, 7));
    bench.blocks([0, 0, 5, 3]);
    bench.send(remote(4, 1));
    bench.seen.clear();
    bench.transfer_fails(2);
    bench.says(&[]);
    bench.queues(2, 1);
    bench.blocks([1, 0, 5, 2]);
    bench.cancel(3);
    bench.says(&["cancel r3: cancelled by the router", "expect r4: 1 tokens in [6], have 0"]);
    bench.step();
    bench.runs("r1 17..18*, r2 12..16*");
}

#[test]
fn the_routers_word_ends_a_transfer() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 9));
    bench.seen.clear();
    bench.no_transfer(1);
    bench.says(&["cancel r1: link down", "run r1 0..8"]);
    bench.blocks([5, 0, 3, 0]);
    bench.no_transfer(1);
    bench.says(&[]);
    bench.step();
    bench.step();
    bench.says(&["run r1 8..9*", "receipt r1: 9 recomputed", "token r1 #0 42", "run r1 9..10*"]);
    bench.computed((0, 9));
}

#[test]
fn the_routers_word_ends_a_transfer_of_what_is_cached() {
    let mut bench = Bench::new(config());
    bench.send(short(shared(remote(1, 8)), 1));
    bench.lands(1);
    bench.send(shared(remote(2, 8)));
    bench.seen.clear();
    bench.no_transfer(2);
    bench.says(&["cancel r2: link down", "run r2 4..8*"]);
}

#[test]
fn a_transfer_that_the_router_called_off_is_not_expected() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 1, ..config() });
    bench.send(remote(1, 9));
    bench.send(remote(2, 9));
    bench.seen.clear();
    bench.no_transfer(2);
    bench.says(&["run r2 0..8"]);
    bench.step();
    bench.step();
    bench.says(&["run r2 8..9*", "receipt r2: 9 recomputed", "token r2 #0 42", "run r2 9..10*"]);
    bench.computed((0, 9));
}

#[test]
fn the_routers_word_about_anything_else_is_ignored() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 1, ..config() });
    bench.send(remote(1, 5));
    bench.lands(1);
    bench.send(short(local(2, 5), 1));
    bench.seen.clear();
    for id in [1, 2, 3] {
        bench.no_transfer(id);
    }
    bench.says(&[]);
    bench.queues(1, 1);
    bench.cancel(1);
    bench.step();
    bench.step();
    bench.says(&["run r2 0..5*", "receipt r2: 5 computed", "token r2 #0 42, Length"]);
    bench.computed((5, 0));
}

#[test]
fn a_first_token_that_cannot_be_is_not_believed() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 5));
    bench.seen.clear();
    bench.lands_with(1, 100);
    bench.says(&["run r1 0..5*"]);
    bench.step();
    bench.says(&["receipt r1: 5 recomputed", "token r1 #0 42", "run r1 5..6*"]);
    bench.send(remote(2, 5));
    bench.lands_with(2, 99);
    bench.seen.retain(|output| matches!(output, DecodeOutput::ToRouter(_)));
    bench.says(&["receipt r2: 5 transferred, 99 bytes", "token r2 #0 99"]);
}

// Prompts to be computed here.

#[test]
fn a_prompt_is_computed_here_if_nobody_sends_it() {
    let mut bench = Bench::new(config());
    bench.send(short(local(1, 20), 2));
    bench.says(&["run r1 0..8"]);
    bench.step();
    bench.says(&["run r1 8..16"]);
    bench.step();
    bench.says(&["run r1 16..20*"]);
    bench.step();
    bench.says(&["receipt r1: 20 computed", "token r1 #0 42", "run r1 20..21*"]);
    bench.step();
    bench.says(&["token r1 #1 42, Length"]);
    let NodeStats { computed_tokens, recomputed_tokens, generated_tokens, steps, busy_us, .. } = bench.node.stats();
    assert_eq!((computed_tokens, recomputed_tokens, generated_tokens), (20, 0, 2));
    assert_eq!((steps, busy_us), (4, 20));
}

#[test]
fn a_local_prompt_computes_at_least_its_last_token() {
    let check = |len: u32, want: &str| {
        let mut bench = Bench::new(config());
        bench.send(short(shared(local(1, 8)), 1));
        bench.finish();
        bench.send(shared(local(2, len)));
        bench.runs(want);
    };
    check(8, "r2 4..8*");
    check(9, "r2 8..9*");
    check(12, "r2 8..12*");
}

#[test]
fn prompt_work_beside_decode_steps_is_bounded() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 5));
    bench.lands(1);
    bench.send(local(2, 18));
    bench.step();
    bench.runs("r1 6..7*, r2 0..8");
    bench.step();
    bench.runs("r1 7..8*, r2 8..16");
    bench.step();
    bench.runs("r1 8..9*, r2 16..18*");
    bench.step();
    bench.runs("r1 9..10*, r2 18..19*");
}

#[test]
fn beside_others_a_prompt_gets_what_keeps_their_tokens_coming() {
    let mut bench = Bench::new(DecodeConfig { max_prefill_tokens: 20, blocks: 16, ..config() });
    bench.batch(1, 4);
    bench.step_in(Duration::from_millis(100));
    bench.send(local(2, 31));
    bench.runs("r1 5..6*");
    bench.step_in(Duration::from_millis(100));
    bench.runs("r1 6..7*, r2 0..16"); // Nothing is known of prompts yet.
    bench.step_in(Duration::from_millis(420)); // 20 ms each: in twice the time of a step there is room for five.
    bench.runs("r1 7..8*, r2 16..21");
    bench.cancel(1);
    bench.step_in(Duration::from_millis(200));
    bench.runs("r2 21..31*"); // Nobody waits.
}

#[test]
fn prompts_share_the_budget() {
    let mut bench = Bench::new(config());
    bench.send(local(1, 1));
    for (id, len) in [(2, 5), (3, 6), (4, 4)] {
        bench.send(local(id, len));
    }
    bench.step();
    bench.runs("r1 1..2*, r2 0..5*, r3 0..3");
    bench.step();
    bench.runs("r1 2..3*, r2 5..6*, r3 3..6*, r4 0..4*");
}

#[test]
fn sampling_gets_position_and_history() {
    let check = |params: SamplingParams, want: (u32, u32, usize)| {
        let mut bench = Bench::new(config());
        bench.send(DecodeRequest { prompt_len: 5, params, ..remote(1, 7) });
        bench.lands(1);
        let plan = bench.pass.expect("a pass runs");
        let sample = plan.items[0].sample.as_ref().expect("a decode step samples");
        assert_eq!((sample.position, sample.prompt_len, sample.history.len()), want);
    };
    check(SamplingParams::greedy(9), (8, 5, 0));
    check(SamplingParams { frequency_penalty: 1.0, ..SamplingParams::greedy(9) }, (8, 5, 8));
}

// Decoding.

#[test]
fn a_sequence_grows_by_a_block_when_it_needs_one() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 6));
    bench.lands(1);
    for (len, blocks) in [(7, 2), (8, 2), (9, 3), (10, 3), (11, 3), (12, 3), (13, 4)] {
        assert_eq!(bench.node.stats().blocks.used, blocks, "{len} tokens");
        bench.step();
    }
}

fn check_ends(request: DecodeRequest, want: &str) {
    let mut bench = Bench::new(config());
    let sent = request.from.is_some();
    bench.send(request);
    if sent {
        bench.lands(1);
    }
    bench.finish();
    let tokens: Vec<String> = bench.seen.drain(..).filter_map(show).filter(|line| line.starts_with("token")).collect();
    assert_eq!(tokens.last().map(String::as_str), Some(want));
    assert!(tokens[..tokens.len() - 1].iter().all(|line| !line.contains(',')), "only the last token ends: {tokens:?}");
    assert!(bench.node.is_idle());
}

#[test]
fn an_answer_ends() {
    let stop = |tokens: &[TokenId]| SamplingParams { stop_tokens: tokens.to_vec(), ..SamplingParams::greedy(4) };
    let with = |params| DecodeRequest { params, ..remote(1, 5) };
    check_ends(with(SamplingParams::greedy(1)), "token r1 #0 41, Length");
    check_ends(with(SamplingParams::greedy(4)), "token r1 #3 42, Length");
    check_ends(with(stop(&[41])), "token r1 #0 41, Stop");
    check_ends(with(stop(&[9, 42])), "token r1 #1 42, Stop");
    check_ends(with(SamplingParams { max_tokens: 2, ..stop(&[42]) }), "token r1 #1 42, Stop");
    check_ends(with(SamplingParams { ignore_eos: true, ..stop(&[41, 42]) }), "token r1 #3 42, Length");
    check_ends(short(local(1, 5), 1), "token r1 #0 42, Length");
}

/// What constrains an answer is the engine's business: it says that a token is the last, or that there is none.
#[test]
fn a_grammar_ends_an_answer() {
    let busy = Duration::from_micros(5);
    let mut bench = Bench::new(config());
    let ignoring = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(9) };
    bench.send(DecodeRequest { params: ignoring, ..local(1, 5) });
    bench.step();
    bench.seen.clear();
    bench.step_gives(busy, &Ok(TokenOut { ends: true, ..out(42) }));
    bench.says(&["token r1 #1 42, Stop"]);
    assert!(bench.node.is_idle());

    bench.send(local(2, 5));
    bench.step();
    bench.seen.clear();
    bench.step_gives(busy, &Err(NoToken("nothing is allowed".into())));
    let failed = NodeToRouter::Failed { request: RequestId(2), error: NodeError::Invalid("nothing is allowed".into()) };
    let told = |output: &DecodeOutput| matches!(output, DecodeOutput::ToRouter(message) if *message == failed);
    assert!(bench.seen.iter().any(told), "{:?}", bench.seen);
    assert!(bench.node.is_idle(), "its blocks are free");

    // One that was given up during the pass owes nobody an answer.
    bench.send(local(3, 5));
    bench.step();
    bench.router(RouterToNode::Cancel { request: RequestId(3) });
    bench.seen.clear();
    bench.step_gives(busy, &Err(NoToken("nothing is allowed".into())));
    bench.says(&[]);
    assert!(bench.node.is_idle());
}

/// A first token that came by transfer may be the last.
#[test]
fn a_grammar_may_end_with_the_token_that_came() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 5));
    bench.seen.clear();
    let first = TokenOut { ends: true, ..out(41) };
    bench.feed(DecodeInput::Transfer(ReceiveEvent::Landed { request: RequestId(1), first, pages: 4, bytes: 99 }));
    let lines: Vec<String> = bench.seen.drain(..).filter_map(show).collect();
    assert!(lines.contains(&"token r1 #0 41, Stop".to_owned()), "{lines:?}");
    assert!(bench.node.is_idle());
}

#[test]
fn the_context_ends_an_answer() {
    check_ends(remote(1, 31), "token r1 #0 41, Length");
    check_ends(remote(1, 29), "token r1 #2 42, Length");
    check_ends(local(1, 31), "token r1 #0 42, Length");
}

#[test]
fn after_a_failover_generated_tokens_count_as_answer() {
    let with = |max_tokens| DecodeRequest { prompt_len: 3, ..short(remote(1, 5), max_tokens) };
    check_ends(with(3), "token r1 #2 41, Length");
    check_ends(with(5), "token r1 #4 42, Length");
}

#[test]
fn an_answer_can_be_continued_from_the_cache() {
    let mut bench = Bench::new(config());
    bench.send(short(local(1, 6), 7));
    bench.finish();
    // Thirteen tokens, of which the last was never run: three full blocks.
    let mut tokens = local(1, 6).tokens;
    tokens.extend([42; 7]);
    tokens.push(9);
    bench.seen.clear();
    bench.send(DecodeRequest { tokens, prompt_len: 14, ..remote(2, 14) });
    bench.says(&["expect r2: 14 tokens in [0, 1, 2, 3], have 3"]);
}

// Refusals and duplicates.

#[test]
fn duplicates_are_ignored() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 2, ..config() });
    for id in 1..=4 {
        bench.send(remote(id, 3));
    }
    bench.lands(2);
    bench.seen.clear();
    // Transferring, running, waiting.
    for id in 1..=4 {
        bench.send(remote(id, 3));
    }
    bench.says(&[]);
    bench.queues(1, 1);
}

fn check_refused(request: DecodeRequest, want: &str) {
    let mut bench = Bench::new(config());
    bench.send(request);
    bench.says(&[want]);
    assert!(bench.node.is_idle());
}

#[test]
fn bad_requests_are_refused() {
    check_refused(remote(1, 0), "failed r1: the prompt is empty");
    check_refused(DecodeRequest { prompt_len: 0, ..remote(1, 3) }, "failed r1: the prompt is empty");
    check_refused(DecodeRequest { prompt_len: 4, ..remote(1, 3) }, "failed r1: the prompt is empty");
    check_refused(local(1, 32), "failed r1: a prompt of 32 tokens leaves no room in a context of 32");
    let tokens = vec![1, 100, 2];
    let outside = "failed r1: token 100 is outside the vocabulary of 100";
    check_refused(DecodeRequest { tokens, ..remote(1, 3) }, outside);
    check_refused(short(remote(1, 3), 0), "failed r1: max_tokens must be at least 1");
}

#[test]
fn a_full_queue_refuses() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 1, ..config() });
    for id in 1..=4 {
        bench.send(remote(id, 3));
    }
    bench.seen.clear();
    bench.send(remote(5, 3));
    bench.says(&["failed r5: overloaded: 3 sequences are waiting"]);
    bench.cancel(3);
    bench.send(remote(5, 3));
    bench.says(&[]);
    bench.queues(3, 0);
}

#[test]
fn a_prefill_request_is_refused() {
    let DecodeRequest { request, tokens, prompt_len, salt, params, .. } = remote(1, 3);
    let mut bench = Bench::new(config());
    bench.router(RouterToNode::Prefill(PrefillRequest { request, to: None, tokens, prompt_len, salt, params }));
    bench.says(&["failed r1: a decode node cannot take a prefill request"]);
}

// Cancelling.

#[test]
fn cancelled_while_waiting_or_transferring() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 1, ..config() });
    bench.send(remote(1, 3));
    bench.send(remote(2, 3));
    bench.seen.clear();
    bench.cancel(2);
    bench.says(&[]);
    bench.cancel(1);
    bench.cancel(1);
    bench.says(&["cancel r1: cancelled by the router"]);
    bench.blocks([8, 0, 0, 0]);
    assert!(bench.node.is_idle());
}

#[test]
fn cancelled_in_a_pass_blocks_go_when_it_ends() {
    let check = |request: DecodeRequest, after: [u32; 4]| {
        let mut bench = Bench::new(config());
        let sent = request.from.is_some();
        bench.send(request);
        if sent {
            bench.lands(1);
        }
        bench.seen.clear();
        bench.cancel(1);
        bench.cancel(1);
        bench.says(&[]);
        assert!(bench.node.stats().blocks.used > 0);
        bench.step();
        bench.says(&[]);
        bench.blocks(after);
        assert!(bench.node.is_idle());
    };
    check(remote(1, 5), [7, 1, 0, 0]);
    check(local(1, 5), [7, 1, 0, 0]);
    check(local(1, 20), [6, 2, 0, 0]);
}

#[test]
fn cancelled_between_its_passes() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 5));
    bench.send(remote(2, 5));
    bench.lands(1);
    bench.lands(2);
    bench.queues(0, 2);
    bench.cancel(2);
    bench.queues(0, 1);
    bench.blocks([5, 1, 2, 0]);
    bench.step();
    bench.runs("r1 6..7*");
}

#[test]
fn cancelling_what_is_unknown_or_over_does_nothing() {
    let mut bench = Bench::new(config());
    bench.cancel(1);
    bench.send(short(remote(1, 3), 1));
    bench.lands(1);
    bench.seen.clear();
    bench.cancel(1);
    bench.says(&[]);
}

// The router.

#[test]
fn without_its_router_a_node_forgets_everything() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 2, ..config() });
    for id in 1..=4 {
        bench.send(remote(id, 3));
    }
    bench.lands(1);
    bench.queues(1, 1);
    bench.seen.clear();
    bench.feed(DecodeInput::RouterLost);
    bench.says(&["cancel r2: the router's connection is gone", "cancel r3: the router's connection is gone"]);
    bench.queues(0, 1);
    bench.blocks([7, 0, 1, 0]);
    bench.step();
    bench.says(&[]);
    bench.blocks([7, 1, 0, 0]);
    assert!(bench.node.is_idle());
}

#[test]
fn a_draining_node_finishes_what_it_has() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 1, ..config() });
    bench.send(short(remote(1, 3), 2));
    bench.send(short(remote(2, 3), 1));
    bench.seen.clear();
    bench.router(RouterToNode::Drain);
    bench.send(remote(3, 3));
    bench.says(&["failed r3: draining"]);
    bench.lands(1);
    bench.step();
    bench.report();
    bench.seen.clear();
    bench.lands(2);
    bench.says(&["receipt r2: 3 transferred, 99 bytes", "token r2 #0 41, Length"]);
    // A moment later: what the router has called off elsewhere may come here yet.
    bench.report();
    bench.says(&["drained"]);
}

/// Of a sequence that has no other node left, the router says so.
#[test]
fn a_draining_node_takes_what_has_no_other_node() {
    let mut bench = Bench::new(config());
    bench.send(short(local(1, 3), 1));
    bench.feed(DecodeInput::Shutdown);
    bench.step();
    bench.seen.clear();
    bench.send(DecodeRequest { last_resort: true, prompt_len: 3, ..short(local(2, 5), 3) });
    bench.says(&["run r2 0..5*"]);
    bench.report();
    bench.says(&[]);
    bench.step();
    bench.says(&["receipt r2: 5 computed", "token r2 #2 42, Length"]);
    bench.report();
    bench.says(&["drained"]);
}

#[test]
fn an_idle_node_that_is_drained_says_so_with_its_next_report() {
    let mut bench = Bench::new(config());
    bench.router(RouterToNode::Drain);
    bench.says(&[]);
    bench.report();
    bench.says(&["drained"]);
    bench.feed(DecodeInput::RouterLost);
    bench.send(local(1, 3));
    bench.says(&["run r1 0..3*"]);
}

#[test]
fn no_router_calls_off_a_shutdown() {
    let mut bench = Bench::new(config());
    bench.send(short(local(1, 3), 1));
    bench.seen.clear();
    bench.feed(DecodeInput::Shutdown);
    bench.send(remote(2, 3));
    bench.says(&["draining", "failed r2: draining"]);
    bench.feed(DecodeInput::RouterLost);
    bench.feed(DecodeInput::RouterUp);
    bench.send(remote(3, 3));
    bench.says(&["failed r3: draining"]);
    bench.step();
    bench.report();
    bench.says(&["drained"]);
    bench.router(RouterToNode::Drain);
    bench.feed(DecodeInput::RouterLost);
    bench.send(remote(4, 3));
    bench.says(&["failed r4: draining"]);
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
    bench.send(short(local(1, 9), 1));
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
        bench.send(short(local(id, 3), 1));
        bench.step();
        assert_eq!(bench.reports().0, 0, "too early");
        assert_eq!(bench.node.poll_timeout(), Some(due));
    }
    bench.report();
    assert_eq!((bench.reports().0, bench.now), (1, due));
    // A node that is to stop does not keep its router waiting.
    bench.send(short(local(3, 3), 1));
    bench.feed(DecodeInput::Shutdown);
    bench.step();
    assert_eq!(bench.reports().0, 1);
}

#[test]
fn changes_of_the_cache_are_reported_once() {
    let mut bench = Bench::new(config());
    bench.wait(1000);
    bench.send(short(local(1, 24), 1));
    bench.finish();
    assert_eq!(bench.reports(), (1, vec![(6, 0)]));
    bench.report();
    assert_eq!(bench.reports(), (1, vec![]));
    bench.wait(1000);
    bench.send(short(local(2, 15), 2));
    bench.finish();
    assert_eq!(bench.reports(), (1, vec![(4, 0), (0, 2)]), "added and removed apart");
    // What came and went in between is told by its last state: r1's tail is gone again, r2's is back.
    for id in [1, 2] {
        bench.send(short(local(id, [24, 15][id as usize - 1]), id as u32));
        bench.finish();
    }
    bench.report();
    assert_eq!(bench.reports(), (1, vec![(3, 0), (0, 2)]));
}

#[test]
fn a_router_that_takes_the_node_in_is_told_the_whole_cache() {
    let mut bench = Bench::new(config());
    bench.wait(1000);
    bench.send(short(local(1, 24), 1));
    bench.finish();
    bench.seen.clear();
    bench.feed(DecodeInput::RouterLost);
    bench.feed(DecodeInput::RouterUp);
    assert_eq!(bench.reports(), (0, vec![]));
    bench.report();
    assert_eq!(bench.reports(), (1, vec![(6, 0)]));
    bench.report();
    assert_eq!(bench.reports(), (1, vec![]));
}

#[test]
fn a_message_about_the_cache_has_a_largest_size() {
    const HASHES: usize = 32_768;
    let len = HASHES as u32 + 2;
    let mut bench = Bench::new(DecodeConfig {
        blocks: len,
        block_size: 1,
        max_model_len: len,
        max_prefill_tokens: len,
        ..config()
    });
    bench.wait(1000);
    bench.send(short(local(1, len - 1), 1));
    bench.finish();
    assert_eq!(bench.reports(), (1, vec![(HASHES, 0), (1, 0)]));
    bench.wait(1000);
    bench.send(DecodeRequest { salt: 1, ..short(local(2, len - 1), 1) });
    bench.finish();
    assert_eq!(bench.reports(), (1, vec![(HASHES, 0), (1, 0), (0, HASHES), (0, 1)]));
}
