//! Prompts for a decode node whose blocks are not this node's: what is offered and said to be ready are the receiver's blocks.

use super::bench::{Bench, alone, config, peer_with, prompt, shared};
use ridge_blocks::hash_blocks;
use ridge_protocol::Reader;
use ridge_protocol::transfer::SendCommand;
use ridge_protocol::wire::PrefillRequest;

use crate::machine::PrefillOutput;

fn to_blocks_of(block_size: u32, request: PrefillRequest) -> PrefillRequest {
    PrefillRequest { to: Some(peer_with(block_size)), ..request }
}

/// A prompt of 14 tokens in chunks of 8 and 6, in blocks of four here: what is ready after each layer of them.
fn check_ready(block_size: u32, want: [&[&str]; 2]) {
    let mut bench = Bench::new(config());
    bench.send(to_blocks_of(block_size, prompt(1, 14)));
    bench.seen.clear();
    for want in want {
        let plan = bench.pass.clone().expect("a pass runs");
        assert_eq!(plan.items.len(), 1);
        // The engine is told the same, and may make the pages while it computes.
        let blocks = peer_with(block_size).blocks;
        assert_eq!(plan.items[0].reader, Some(Reader { blocks, tokens: 14 }));
        bench.layer(0);
        bench.layer(1);
        bench.says(want);
        bench.step();
        bench.seen.clear();
    }
    bench.committed(1);
    assert!(bench.node.is_idle());
}

#[test]
fn a_receivers_block_is_ready_with_its_last_token() {
    check_ready(
        4,
        [&["ready r1 layer 0: 0..2", "ready r1 layer 1: 0..2"], &["ready r1 layer 0: 2..4", "ready r1 layer 1: 2..4"]],
    );
    check_ready(
        2,
        [&["ready r1 layer 0: 0..4", "ready r1 layer 1: 0..4"], &["ready r1 layer 0: 4..7", "ready r1 layer 1: 4..7"]],
    );
    // The second of these blocks begins in the first chunk and ends in the other.
    check_ready(
        6,
        [&["ready r1 layer 0: 0..1", "ready r1 layer 1: 0..1"], &["ready r1 layer 0: 1..3", "ready r1 layer 1: 1..3"]],
    );
    check_ready(16, [&[], &["ready r1 layer 0: 0..1", "ready r1 layer 1: 0..1"]]);
}

#[test]
fn a_cached_prefix_is_ready_as_far_as_it_fills_the_receivers_blocks() {
    let mut bench = Bench::new(config());
    bench.send(shared(1, 9));
    bench.passes();
    bench.committed(1);
    bench.seen.clear();
    // Eight tokens are cached: one block of six, and two tokens of the next, whose others are computed first.
    bench.send(to_blocks_of(6, shared(2, 14)));
    bench.says(&[
        "begin r2 to d1: 14 tokens in [0, 1, 3, 4], 2 hashes, 2 layers",
        "ready r2 layer 0: 0..1",
        "ready r2 layer 1: 0..1",
        "run r2 8..14*",
    ]);
    bench.layer(0);
    bench.says(&["ready r2 layer 0: 1..3"]);
    bench.layer(1);
    bench.step();
    bench.committed(2);
    bench.seen.clear();
    // None of sixteen is full.
    bench.send(to_blocks_of(16, shared(3, 14)));
    let ready = |output: &PrefillOutput| matches!(output, PrefillOutput::Transfer(SendCommand::Ready { .. }));
    assert!(!bench.seen.iter().any(ready), "{:?}", bench.seen);
}

#[test]
fn what_nobody_continues_has_no_reader() {
    let mut bench = Bench::new(config());
    bench.send(alone(prompt(1, 14)));
    assert!(bench.pass.clone().expect("a pass runs").items.iter().all(|item| item.reader.is_none()));
}

#[test]
fn hashes_are_of_the_receivers_blocks() {
    let request = to_blocks_of(6, prompt(1, 14));
    let want = hash_blocks(request.salt, 6, &request.tokens);
    let mut bench = Bench::new(config());
    bench.send(request);
    let offered = bench.seen.iter().find_map(|output| match output {
        PrefillOutput::Transfer(SendCommand::Begin(job)) => Some(job.hashes.clone()),
        _ => None,
    });
    assert_eq!(offered, Some(want));
}
