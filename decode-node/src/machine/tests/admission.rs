//! Who is admitted to the decode node, who computes in a pass, and who makes room. Read `bench` first.

use super::bench::*;
use crate::machine::DecodeConfig;

// Admission.

#[test]
fn a_sequence_waits_for_blocks_and_nobody_overtakes_it() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 20));
    bench.send(remote(2, 12));
    bench.send(remote(3, 1));
    bench.says(&["expect r1: 20 tokens in [0, 1, 2, 3, 4], have 0"]);
    bench.queues(2, 0);
    bench.cancel(1);
    bench.queues(0, 0);
    bench.blocks([3, 0, 0, 5]);
}

#[test]
fn transfers_have_a_largest_number_of_their_own() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 2, ..config() });
    for id in 1..=3 {
        bench.send(remote(id, 2));
    }
    bench.queues(1, 0);
    bench.blocks([6, 0, 0, 2]);
    bench.seen.clear();
    bench.lands(1);
    bench.says(&[
        "receipt r1: 2 transferred, 99 bytes",
        "token r1 #0 41",
        "expect r3: 2 tokens in [2], have 0",
        "run r1 2..3*",
    ]);
    bench.queues(0, 1);
    bench.blocks([5, 0, 1, 2]);
}

#[test]
fn prompts_computed_here_have_a_largest_number_of_their_own() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 2, ..config() });
    for id in 1..=2 {
        bench.send(remote(id, 2));
    }
    // Those in transfer do not keep these out.
    for id in 3..=5 {
        bench.send(short(local(id, 2), id as u32 - 2));
    }
    bench.queues(1, 2);
    bench.step();
    bench.runs("r4 0..2*, r5 0..2*");
    bench.queues(0, 2);
}

#[test]
fn a_pass_has_a_largest_number_of_sequences_and_the_oldest_go_first() {
    let mut bench = Bench::new(DecodeConfig { max_num_seqs: 2, ..config() });
    for id in 1..=2 {
        bench.send(short(remote(id, 2), 4));
    }
    bench.send(short(local(3, 2), 4));
    bench.lands(1);
    bench.lands(2);
    assert_eq!(
        bench.passes(),
        [
            "r3 0..2*",
            "r3 2..3*, r1 2..3*",
            "r3 3..4*, r1 3..4*",
            "r3 4..5*, r1 4..5*",
            "r2 2..3*",
            "r2 3..4*",
            "r2 4..5*",
        ]
    );
}

#[test]
fn reservations_do_not_wait_for_the_end_of_a_pass() {
    let mut bench = Bench::new(config());
    bench.send(remote(1, 15));
    bench.lands(1);
    bench.seen.clear();
    bench.send(remote(2, 4));
    bench.says(&["expect r2: 4 tokens in [4], have 0"]);
    bench.send(remote(3, 11));
    bench.queues(1, 1);
    bench.cancel(2);
    bench.says(&["cancel r2: cancelled by the router", "expect r3: 11 tokens in [6, 7, 5], have 0"]);
    bench.send(local(4, 3));
    bench.queues(0, 2);
    bench.blocks([0, 0, 5, 3]);
    bench.says(&[]);
}

#[test]
fn what_is_not_admitted_costs_no_cache() {
    let mut bench = Bench::new(DecodeConfig { headroom_blocks: 1, ..config() });
    bench.send(short(shared(remote(1, 16)), 1));
    bench.lands(1);
    bench.blocks([4, 4, 0, 0]);
    bench.send(remote(2, 15));
    bench.blocks([0, 4, 0, 4]);
    // It would fit but for the headroom.
    bench.send(remote(3, 15));
    bench.queues(1, 0);
    bench.blocks([0, 4, 0, 4]);
    bench.cancel(3);
    bench.seen.clear();
    // A prefix that is taken is not evictable: what is left must be enough.
    bench.send(shared(remote(4, 14)));
    bench.says(&[]);
    bench.cancel(4);
    bench.send(shared(remote(5, 11)));
    bench.says(&["expect r5: 11 tokens in [0, 1, 3], have 2"]);
}

#[test]
fn headroom_is_left_for_those_who_run() {
    let check = |headroom_blocks: usize, len: u32, admitted: bool| {
        let mut bench = Bench::new(DecodeConfig { headroom_blocks, ..config() });
        bench.send(remote(1, 7)); // Two blocks.
        bench.send(remote(2, len));
        assert_eq!(bench.node.stats().waiting == 0, admitted, "{headroom_blocks} blocks of headroom, {len} tokens");
    };
    check(0, 23, true);
    check(0, 24, false);
    check(1, 19, true);
    check(1, 20, false);
    check(3, 11, true);
    check(3, 12, false);
    // For each that runs.
    let mut bench = Bench::new(DecodeConfig { headroom_blocks: 2, ..config() });
    for id in 1..=3 {
        bench.send(remote(id, 7));
    }
    bench.queues(1, 0);
    bench.blocks([4, 0, 0, 4]);
}

#[test]
fn the_only_sequence_needs_no_headroom() {
    let mut bench = Bench::new(DecodeConfig { headroom_blocks: 8, ..config() });
    bench.send(remote(1, 31));
    bench.blocks([0, 0, 0, 8]);
}

// Preemption.

#[test]
fn the_youngest_makes_room_and_is_computed_again_from_what_is_still_cached() {
    let mut bench = Bench::new(config());
    bench.batch(2, 15);
    bench.runs("r1 15..16*");
    bench.blocks([0, 0, 8, 0]);
    bench.seen.clear();
    bench.step();
    // r1 takes the one block of r2 that was not full; r2 would need five.
    bench.says(&["token r1 #1 42", "run r1 16..17*"]);
    bench.blocks([0, 3, 5, 0]);
    bench.queues(1, 1);
    assert_eq!(bench.node.stats().preemptions, 1);
    bench.cancel(1);
    bench.step();
    bench.says(&["run r2 12..16*"]);
    bench.step();
    // It is continued where it was, and its receipt was sent before.
    bench.says(&["token r2 #1 42", "run r2 16..17*"]);
    // Three positions had been computed before; the fourth is that of a token that was not.
    bench.computed((0, 3));
}

#[test]
fn the_youngest_gives_way_to_the_others_also_when_it_is_the_one_that_wants_a_block() {
    let mut bench = Bench::new(config());
    bench.batch(3, 7);
    bench.step();
    bench.runs("r1 8..9*, r2 7..8*, r3 7..8*");
    bench.blocks([1, 0, 7, 0]);
    bench.step();
    // r2 and r3 want a third block, and there is one.
    bench.runs("r1 9..10*, r2 8..9*");
    bench.queues(1, 2);
}

/// A local prompt of 19 tokens is pushed out after 16 of them and admitted again.
fn check_preempted_prompt(config: DecodeConfig, again: &[&str], receipt: &str, want: (u64, u64)) {
    let mut bench = Bench::new(config);
    bench.send(remote(1, 9));
    bench.lands(1);
    bench.send(short(local(2, 19), 1));
    while bench.node.stats().preemptions == 0 {
        bench.step();
    }
    bench.computed((16, 0));
    bench.cancel(1);
    bench.step();
    bench.seen.clear();
    assert_eq!(bench.passes(), again);
    let receipts = bench.seen.drain(..).filter_map(show).filter(|line| line.starts_with("receipt"));
    assert_eq!(receipts.collect::<Vec<_>>(), [receipt]);
    bench.computed(want);
    assert_eq!(bench.node.stats().cached_tokens, 0, "its own work is not the cache's merit");
}

#[test]
fn a_prompt_that_is_pushed_out_is_accounted_for() {
    check_preempted_prompt(config(), &["r2 16..19*"], "receipt r2: 19 computed", (19, 0));
    let uncached = DecodeConfig { prefix_caching: false, ..config() };
    let again = ["r2 0..8", "r2 8..16", "r2 16..19*"];
    check_preempted_prompt(uncached, &again, "receipt r2: 19 computed, 16 recomputed", (19, 16));
}

#[test]
fn the_preempted_come_back_by_age_and_before_newcomers() {
    let mut bench = Bench::new(config());
    bench.batch(3, 7);
    bench.step();
    bench.step();
    bench.send(remote(4, 3));
    // r3 left first, r2 later.
    while bench.node.stats().preemptions < 2 {
        bench.step();
    }
    bench.runs("r1 16..17*");
    bench.queues(3, 1);
    bench.seen.clear();
    bench.cancel(1);
    bench.step();
    bench.says(&["run r2 12..16*, r3 0..4"]);
    bench.queues(1, 2);
}

#[test]
fn a_preempted_prompt_is_not_asked_for_again() {
    let mut bench = Bench::new(DecodeConfig { prefix_caching: false, ..config() });
    bench.batch(2, 15);
    bench.step();
    bench.seen.clear();
    bench.cancel(1);
    bench.step();
    bench.says(&["run r2 0..8"]);
    bench.step();
    bench.says(&["run r2 8..16*"]);
}
