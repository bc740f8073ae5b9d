//! The production machines of a whole cluster under virtual time, with faults: streams equal the oracle, blocks are
//! conserved, every request ends exactly once.

use ridge_protocol::Duration;
use ridge_sim::{Faults, Outcome, Scenario, run};

/// Runs many seeds and adds up what happened.
fn check(seeds: u64, mut make: impl FnMut(u64) -> Scenario) -> Outcome {
    let mut sum = Outcome::default();
    for seed in 1..=seeds {
        let scenario = make(seed);
        let outcome = std::panic::catch_unwind(|| run(&scenario))
            .unwrap_or_else(|panic| panic!("{scenario:?} failed: {:?}", panic.downcast_ref::<String>()));
        let too_long = outcome.happened.get("prompt refused as too long").copied().unwrap_or_default();
        // Both are the right answer.
        sum.finished += outcome.finished + too_long;
        sum.failed += outcome.failed - too_long;
        sum.gone += outcome.gone;
        sum.preemptions += outcome.preemptions;
        sum.redispatched += outcome.redispatched;
        sum.moved += outcome.moved;
        sum.recomputed += outcome.recomputed;
        sum.cached += outcome.cached;
        sum.converted += outcome.converted;
    }
    sum
}

#[test]
fn healthy_clusters_serve_everybody() {
    let sum = check(60, |seed| Scenario {
        prefill: 1 + (seed % 3) as usize,
        decode: 1 + (seed % 2) as usize,
        block_size: [1, 2, 4, 8, 16][(seed % 5) as usize],
        prefill_blocks: 1024,
        decode_blocks: 1024,
        chunk: [16, 24, 64][(seed % 3) as usize],
        ..Scenario::calm(seed)
    });
    assert_eq!((sum.finished, sum.failed, sum.gone), (60 * 20, 0, 0));
    assert!(sum.cached > 0, "no prefix was ever reused");
    assert_eq!((sum.redispatched, sum.recomputed), (0, 0), "a healthy cluster does nothing twice");
}

/// Every other node has blocks of another size, larger, smaller, or no multiple of the others': no token changes, and
/// prefixes are still found where they are.
#[test]
fn blocks_of_different_sizes_serve_everybody() {
    let check = |prefill: usize, decode: usize| {
        let sum = check(60, |seed| Scenario {
            prefill,
            decode,
            block_size: [4, 8, 3][(seed % 3) as usize],
            other_block_size: [16, 1, 6, 5][(seed % 4) as usize],
            prefill_blocks: 1024,
            decode_blocks: 1024,
            chunk: [16, 24, 64][(seed % 3) as usize],
            faults: Faults { restarts: u64::from(decode > 1), ..Faults::default() },
            ..Scenario::calm(seed)
        });
        assert_eq!((sum.finished, sum.failed, sum.gone), (60 * 20, 0, 0));
        assert!(sum.converted > 0, "no page was converted");
        assert!(sum.cached > 0, "no prefix was ever reused");
        sum
    };
    assert_eq!(check(1, 1).recomputed, 0, "a healthy cluster does nothing twice");
    assert!(check(1, 3).moved > 0, "no sequence moved");
}

#[test]
fn scarce_blocks_cause_preemption_and_change_no_token() {
    let sum = check(60, |seed| Scenario { decode_blocks: 20, prefill_blocks: 20, ..Scenario::calm(seed) });
    assert_eq!((sum.finished, sum.failed), (60 * 20, 0));
    assert!(sum.preemptions > 0, "the pool was never scarce");
}

#[test]
fn without_prefix_caching_nothing_is_reused() {
    let sum = check(10, |seed| Scenario { prefix_caching: false, ..Scenario::calm(seed) });
    assert_eq!((sum.finished, sum.cached), (10 * 20, 0));
}

#[test]
fn without_prefill_nodes_the_decode_node_computes_prompts() {
    let sum = check(20, |seed| Scenario { prefill: 0, ..Scenario::calm(seed) });
    assert_eq!(sum.finished, 20 * 20);
}

#[test]
fn clients_that_leave_free_their_blocks() {
    let sum = check(60, |seed| Scenario { leave_percent: 60, decode_blocks: 32, ..Scenario::calm(seed) });
    assert_eq!(sum.failed, 0);
    assert!(sum.gone > 200, "too few clients left: {}", sum.gone);
}

#[test]
fn crashes_lose_no_request_and_change_no_token() {
    let sum = check(100, |seed| Scenario {
        prefill: 1 + (seed % 2) as usize,
        decode: 1 + (seed % 3) as usize,
        faults: Faults { crashes: 3, ..Faults::default() },
        leave_percent: 20,
        ..Scenario::calm(seed)
    });
    assert_eq!(sum.failed, 0, "a crash must cost no request");
    assert!(sum.redispatched > 0, "no crash hit a request");
}

#[test]
fn nodes_that_are_asked_to_stop_move_their_sequences() {
    let sum = check(60, |seed| Scenario {
        prefill: 1 + (seed % 2) as usize,
        decode: 2 + (seed % 2) as usize,
        faults: Faults { restarts: 3, ..Faults::default() },
        ..Scenario::calm(seed)
    });
    assert_eq!(sum.failed, 0, "a restart must cost no request");
    assert!(sum.moved > 20, "too few sequences moved: {}", sum.moved);
}

/// One decode node is told to stop while the other is dead for longer than anybody waits for a node: what it has goes on there.
#[test]
fn a_draining_node_goes_on_when_nobody_else_is_left() {
    let mut continued = 0;
    check(200, |seed| {
        let scenario = Scenario {
            decode: 2,
            faults: Faults { restarts: 2, crashes: 2, ..Faults::default() },
            arrivals: Duration::from_millis(500),
            placement_deadline: Duration::from_millis(500),
            ..Scenario::calm(seed)
        };
        continued += run(&scenario).happened.get("continued where it drains").copied().unwrap_or_default();
        scenario
    });
    assert!(continued > 0, "it was never needed");
}

#[test]
fn damaged_pages_are_never_read() {
    let sum = check(60, |seed| Scenario {
        faults: Faults { damage_permille: 30, ..Faults::default() },
        ..Scenario::calm(seed)
    });
    assert_eq!((sum.finished, sum.failed), (60 * 20, 0));
    assert!(sum.recomputed > 0, "no page was damaged");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let faults = Faults { crashes: 2, damage_permille: 10, ..Faults::default() };
    let faulty = Scenario { faults, leave_percent: 30, ..Scenario::calm(7) };
    let first = run(&faulty);
    assert_eq!(first, run(&faulty));
    assert_ne!(first.trace, run(&Scenario { seed: 8, ..faulty }).trace);
}
