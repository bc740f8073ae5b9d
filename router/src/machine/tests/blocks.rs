//! Nodes of one model whose blocks are not alike.

use super::bench::{Bench, hello, identity, number, submit};
use crate::machine::{ReplyEvent, RouterInput, RouterOutput};
use ridge_blocks::hash_blocks;
use ridge_protocol::wire::{NodeHello, NodeToRouter, Receipt, RouterToNode};
use ridge_protocol::{BlockShape, CacheDtype, Conversion, ModelIdentity};

fn shape(block_size: u32, dtype: CacheDtype) -> BlockShape {
    BlockShape::new(block_size, dtype).expect("a block holds a token")
}

impl Bench {
    /// A node joins with these blocks.
    fn joins_in(&mut self, node: &str, block_size: u32, kv_dtype: CacheDtype) {
        let identity = ModelIdentity { block_size, kv_dtype, ..identity() };
        self.feed(RouterInput::NodeUp { node: number(node), hello: NodeHello { identity, ..hello(node) } });
    }

    /// What the last token's client was told about its KV.
    fn told(&self) -> Receipt {
        let usage = self.seen.iter().rev().find_map(|output| match output {
            RouterOutput::Reply { event: ReplyEvent::Token { usage, .. }, .. } => Some(*usage),
            _ => None,
        });
        usage.expect("a token was given").receipt
    }
}

/// A prefill node of blocks of 16, a decode node of blocks of 4 in another type, and `[7, 8, 9]` dispatched to both as r1.
fn serving(prefill: CacheDtype, decode: CacheDtype) -> Bench {
    let mut bench = Bench::new(&[]);
    bench.joins_in("p1", 16, prefill);
    bench.joins_in("d1", 4, decode);
    bench.submit(1, &[7, 8, 9], 5);
    bench
}

#[test]
fn a_prefill_node_is_told_the_receivers_blocks() {
    let bench = serving(CacheDtype::F32, CacheDtype::Int8);
    let to = bench.seen.iter().find_map(|output| match output {
        RouterOutput::Send { message: RouterToNode::Prefill(request), .. } => request.to.clone(),
        _ => None,
    });
    assert_eq!(to.expect("it was told to whom").blocks, shape(4, CacheDtype::Int8));
}

#[test]
fn the_receipt_says_what_was_converted() {
    let conversion = Some(Conversion { from: shape(16, CacheDtype::F32), to: shape(4, CacheDtype::Int8) });
    let check = |prefill, decode, said: Receipt, want: Option<Conversion>| {
        let mut bench = serving(prefill, decode);
        bench.receipt("d1", 1, said);
        bench.token("d1", 1, 0, 5);
        assert_eq!(bench.told(), Receipt { converted: want, ..said });
    };
    let transferred = Receipt { transferred: 3, transfer_bytes: 9, ..Receipt::default() };
    check(CacheDtype::F32, CacheDtype::Int8, transferred, conversion);
    check(CacheDtype::F32, CacheDtype::Int8, Receipt { recomputed: 3, ..Receipt::default() }, None);
    // What a node says of it is not asked.
    let mut alike = Bench::serving(5);
    alike.receipt("d1", 1, Receipt { converted: conversion, ..transferred });
    alike.token("d1", 1, 0, 5);
    assert_eq!(alike.told(), transferred);
}

#[test]
fn kv_that_could_not_pass_keeps_a_node_out() {
    let mut bench = Bench::new(&[]);
    bench.joins_in("d1", 4, CacheDtype::Bf16);
    bench.joins_in("d2", 32, CacheDtype::Int8);
    bench.seen.clear();
    bench.joins_in("p1", 4, CacheDtype::Int8);
    let reason = "d1 takes no KV from p1: kv_dtype differs: bf16 here, int8 there, and int8 is not converted into bf16";
    bench.says(&[&format!("p1 <- refuse: {reason}"), &format!("close p1: {reason}")]);
    bench.joins_in("p1", 16, CacheDtype::F32);
    bench.says(&["p1 <- welcome p1"]);
    let mut bench = Bench::new(&[]);
    bench.joins_in("p1", 16, CacheDtype::Fp8);
    bench.joins_in("d1", 4, CacheDtype::Fp8);
    bench.seen.clear();
    bench.joins_in("d2", 4, CacheDtype::F16);
    let reason = "d2 takes no KV from p1: kv_dtype differs: f16 here, fp8 there, and fp8 is not converted into f16";
    bench.says(&[&format!("d2 <- refuse: {reason}"), &format!("close d2: {reason}")]);
}

/// The prefill node's first token was given; then the hand-off failed, and the decode node's own rounding gives another.
#[test]
fn an_answer_goes_on_from_what_the_client_has() {
    let mut bench = serving(CacheDtype::F32, CacheDtype::Int8);
    bench.token("p1", 1, 0, 5);
    bench.seen.clear();
    bench.token("d1", 1, 0, 6);
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "d1 <- decode r2 from p1: [7, 8, 9, 5] of 3",
        "p1 <- prefill r2 to d1: [7, 8, 9, 5] of 3",
    ]);
    bench.token("p1", 2, 1, 6);
    bench.says(&["c1: token #1 6"]);
    // Blocks of another size round nothing: two answers are one too many.
    let mut bench = serving(CacheDtype::F32, CacheDtype::F32);
    bench.token("p1", 1, 0, 5);
    bench.seen.clear();
    bench.token("d1", 1, 0, 6);
    bench.says(&[
        "p1 <- cancel r1",
        "d1 <- cancel r1",
        "c1: failed: nodes disagree about token 0 of the answer (the client has 5)",
    ]);
}

/// Each node reports hashes of its own blocks: the prompt is hashed for both.
#[test]
fn a_prefix_is_found_in_blocks_of_any_size() {
    let mut bench = Bench::new(&["d1"]);
    bench.joins_in("p1", 16, CacheDtype::F32);
    bench.joins_in("p2", 8, CacheDtype::F32);
    let tokens: Vec<u32> = (0..40).collect();
    bench.node("p2", NodeToRouter::CacheChanged { added: hash_blocks(0, 8, &tokens)[..3].to_vec(), removed: vec![] });
    bench.seen.clear();
    bench.feed(RouterInput::Submit(submit(1, &tokens, 5)));
    let to = |output: &RouterOutput| match output {
        RouterOutput::Send { node, message: RouterToNode::Prefill(_) } => Some(*node),
        _ => None,
    };
    assert_eq!(bench.seen.iter().find_map(to), Some(number("p2")));
}
