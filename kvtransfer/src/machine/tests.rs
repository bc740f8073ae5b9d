//! Cases of each machine on its own, and the snapshot of both transition tables.

use super::{Receiver, ReceiverConfig, ReceiverInput, ReceiverOutput, Sender, SenderConfig, SenderInput, SenderOutput};
use ridge_protocol::step::check_table;
use ridge_protocol::transfer::{
    KvPeer, Outcome, PageSource, ReceiveCommand, ReceiveEvent, ReceiveJob, SendCommand, SendEvent, SendJob,
    TransferTimes,
};
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{
    BlockHash, BlockId, BlockShape, CacheDtype, Duration, Instant, Machine, NodeName, RequestId, TokenOut,
};

const R: RequestId = RequestId(1);

#[test]
fn transitions_are_as_recorded() {
    let table = super::sender::table() + &super::receiver::table();
    check_table(concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/transitions.txt"), &table);
}

fn peer() -> KvPeer {
    peer_with(16, CacheDtype::F32)
}

/// A receiver with these blocks.
fn peer_with(block_size: u32, dtype: CacheDtype) -> KvPeer {
    let blocks = BlockShape::new(block_size, dtype).expect("a block holds a token");
    KvPeer { name: NodeName("decode-0".into()), addr: "127.0.0.1:1".parse().expect("an address"), blocks }
}

fn from() -> NodeName {
    NodeName("prefill-0".into())
}

fn first() -> TokenOut {
    TokenOut { token: 3, logprob: None, top: vec![], ends: false }
}

fn hashes(n: u8) -> Vec<BlockHash> {
    (0..n).map(|at| BlockHash([at; 16])).collect()
}

fn announce(request: RequestId) -> SenderInput {
    SenderInput::Command(SendCommand::Announce { request, to: peer() })
}

/// Four blocks, two layers.
fn begin(request: RequestId) -> SenderInput {
    let blocks = (10..14).map(BlockId).collect();
    SenderInput::Command(SendCommand::Begin(SendJob {
        request,
        to: peer(),
        tokens: 60,
        blocks,
        hashes: hashes(3),
        layers: 2,
    }))
}

fn expect(request: RequestId, have: u32) -> ReceiverInput {
    let blocks = (20..24).map(BlockId).collect();
    ReceiverInput::Command(ReceiveCommand::Expect(ReceiveJob {
        request,
        from: from(),
        tokens: 60,
        blocks,
        hashes: hashes(3),
        have,
        layers: 2,
    }))
}

fn ready(layer: u32, first: u32, end: u32) -> SenderInput {
    SenderInput::Command(SendCommand::Ready { request: R, layer, first, end })
}

fn says(message: ReceiverMsg) -> SenderInput {
    SenderInput::Message { from: peer().name, message }
}

fn hears(message: SenderMsg) -> ReceiverInput {
    ReceiverInput::Message { from: from(), message }
}

fn offer(tokens: u32, hashes: Vec<BlockHash>) -> ReceiverInput {
    hears(SenderMsg::Offer { request: R, tokens, hashes })
}

fn page(layer: u32, index: u32) -> ReceiverInput {
    ReceiverInput::PageLanded { from: from(), request: R, layer, index, bytes: 8, intact: true }
}

fn at(ms: u64) -> Instant {
    Instant(ms * 1_000_000)
}

fn sender() -> Sender {
    let config = SenderConfig {
        lease: Duration::from_millis(40),
        patience: Duration::from_millis(100),
        max_sessions: 2,
        max_credit: 16,
        blocks: peer().blocks,
        kv_heads: 1,
        head_dim: 1,
    };
    Sender::new(config)
}

fn receiver() -> Receiver {
    let config = ReceiverConfig {
        lease: Duration::from_millis(40),
        patience: Duration::from_millis(100),
        credit_pages: 4,
        max_sessions: 2,
    };
    Receiver::new(config)
}

/// Feeds inputs at 0 ms and returns all outputs.
fn run<M: Machine>(machine: &mut M, inputs: impl IntoIterator<Item = M::Input>) -> Vec<M::Output> {
    for input in inputs {
        machine.handle(at(0), input);
    }
    outputs(machine)
}

fn outputs<M: Machine>(machine: &mut M) -> Vec<M::Output> {
    machine.check_integrity();
    std::iter::from_fn(|| machine.poll_output()).collect()
}

/// Fires the sender's alarms from one time to another; only signs of life may come of them, and are counted.
fn lives(sender: &mut Sender, from: Instant, to: Instant) -> usize {
    let mut now = from;
    let mut beats = 0;
    while let Some(next) = sender.poll_timeout().map(|next| next.max(now)).filter(|next| *next <= to) {
        now = next;
        sender.handle_timeout(now);
        for output in outputs(sender) {
            assert!(matches!(output, SenderOutput::Send { message: SenderMsg::Alive { .. }, .. }), "{output:?}");
            beats += 1;
        }
    }
    beats
}

fn pages_of(outputs: &[SenderOutput]) -> Vec<(u32, u32)> {
    let page = |output: &SenderOutput| match output {
        SenderOutput::Ship { layer, index, .. } => Some((*layer, *index)),
        _ => None,
    };
    outputs.iter().filter_map(page).collect()
}

fn aborted(outputs: &[SenderOutput]) -> &str {
    match outputs.last() {
        Some(SenderOutput::Event(SendEvent::Settled { outcome: Outcome::Aborted(reason), .. })) => reason,
        _ => panic!("not aborted: {outputs:?}"),
    }
}

fn failed(outputs: &[ReceiverOutput]) -> &str {
    match outputs {
        [
            ..,
            ReceiverOutput::Send { message: ReceiverMsg::Abort { .. }, .. },
            ReceiverOutput::Event(ReceiveEvent::Failed { reason, .. }),
        ] => reason,
        _ => panic!("not failed: {outputs:?}"),
    }
}

#[test]
fn pages_leave_in_ready_order_from_the_first_wanted_block() {
    let mut sender = sender();
    let out = run(&mut sender, [announce(R), begin(R), ready(0, 0, 2), ready(1, 0, 2)]);
    assert!(matches!(
        &out[..],
        [
            SenderOutput::Send { message: SenderMsg::Alive { .. }, .. },
            SenderOutput::Send { message: SenderMsg::Offer { tokens: 60, .. }, .. }
        ]
    ));
    let out = run(&mut sender, [says(ReceiverMsg::Grant { request: R, first_block: 1, credit: 3 })]);
    assert_eq!(pages_of(&out), [(0, 1), (1, 1)]);
    assert_eq!(lives(&mut sender, at(0), at(39)), 3, "the next move is the scheduler's");
    let finish = SenderInput::Command(SendCommand::Finish { request: R, first: first() });
    let out = run(&mut sender, [ready(0, 2, 4), ready(1, 2, 4), finish]);
    assert_eq!(pages_of(&out), [(0, 2)], "credit is used up");
    let out = run(&mut sender, [says(ReceiverMsg::Credit { request: R, pages: 3 })]);
    assert_eq!(pages_of(&out), [(0, 3), (1, 2), (1, 3)]);
    assert!(matches!(out.last(), Some(SenderOutput::Send { message: SenderMsg::Finish { pages: 6, .. }, .. })));
    let out = run(&mut sender, [says(ReceiverMsg::Commit { request: R })]);
    let committed = Outcome::Committed { pages: 6, bytes: 6 * 128, times: TransferTimes::default() };
    assert_eq!(out, [SenderOutput::Event(SendEvent::Settled { request: R, outcome: committed })]);
    assert_eq!(sender.stats().committed, 1);
}

/// Sixty tokens in blocks of sixteen, for a receiver of other blocks: which of the sender's each page is made from, as
/// `first block..end, tokens skipped, tokens`.
#[test]
fn pages_are_made_from_the_blocks_that_hold_their_tokens() {
    let check = |block_size: u32, want: &[(std::ops::Range<u32>, u32, u32)]| {
        let to = peer_with(block_size, CacheDtype::F32);
        let mut sender = sender();
        let job = SendJob {
            request: R,
            to: to.clone(),
            tokens: 60,
            blocks: (10..14).map(BlockId).collect(),
            hashes: hashes((60 / block_size) as u8),
            layers: 1,
        };
        let announce = SenderInput::Command(SendCommand::Announce { request: R, to });
        let begin = SenderInput::Command(SendCommand::Begin(job));
        let grant = says(ReceiverMsg::Grant { request: R, first_block: 0, credit: 16 });
        let finish = SenderInput::Command(SendCommand::Finish { request: R, first: first() });
        let inputs = [announce, begin, grant, ready(0, 0, want.len() as u32), finish];
        let out = run(&mut sender, inputs);
        let sources: Vec<PageSource> = out
            .iter()
            .filter_map(|output| match output {
                SenderOutput::Ship { source, .. } => Some(source.clone()),
                _ => None,
            })
            .collect();
        let want: Vec<PageSource> = want
            .iter()
            .map(|(blocks, skip, tokens)| {
                let blocks = blocks.clone().map(|block| BlockId(10 + block)).collect();
                PageSource { blocks, skip: *skip, tokens: *tokens }
            })
            .collect();
        assert_eq!(sources, want, "blocks of {block_size}");
        assert_eq!(sender.stats().converted, if block_size == 16 { 0 } else { want.len() as u64 });
        assert_eq!(sender.stats().bytes, want.len() as u64 * u64::from(block_size) * 8);
    };
    check(16, &[(0..1, 0, 16), (1..2, 0, 16), (2..3, 0, 16), (3..4, 0, 12)]);
    check(32, &[(0..2, 0, 32), (2..4, 0, 28)]);
    check(24, &[(0..2, 0, 24), (1..3, 8, 24), (3..4, 0, 12)]);
    check(
        8,
        &[
            (0..1, 0, 8),
            (0..1, 8, 8),
            (1..2, 0, 8),
            (1..2, 8, 8),
            (2..3, 0, 8),
            (2..3, 8, 8),
            (3..4, 0, 8),
            (3..4, 8, 4),
        ],
    );
    check(100, &[(0..4, 0, 60)]);
}

#[test]
fn what_cannot_be_converted_is_never_begun() {
    let check = |to: KvPeer, reason: &str| {
        let mut sender =
            Sender::new(SenderConfig { blocks: peer_with(16, CacheDtype::Fp8).blocks, ..SenderConfig::default() });
        let announce = SenderInput::Command(SendCommand::Announce { request: R, to });
        assert!(aborted(&run(&mut sender, [announce])).contains(reason));
        assert!(run(&mut sender, [begin(R)]).is_empty(), "what the scheduler says meanwhile is ignored");
    };
    check(
        peer_with(16, CacheDtype::Bf16),
        "kv_dtype differs: bf16 here, fp8 there, and fp8 is not converted into bf16",
    );
    check(peer_with(u32::MAX, CacheDtype::Fp8), "pages of 8589934590 bytes where 16777216 are allowed");
}

#[test]
fn a_receiver_that_breaks_the_protocol_is_told_and_settled() {
    let grant = |first_block, credit| says(ReceiverMsg::Grant { request: R, first_block, credit });
    let check = |messages: Vec<SenderInput>, reason: &str| {
        let mut sender = sender();
        run(&mut sender, [announce(R), begin(R)]);
        let out = run(&mut sender, messages);
        assert!(aborted(&out).contains(reason), "{out:?}");
        assert!(matches!(&out[..], [SenderOutput::Send { message: SenderMsg::Abort { .. }, .. }, _]));
    };
    check(vec![grant(5, 1)], "block 5 of 4");
    check(vec![grant(0, 17)], "limit of 16");
    check(vec![grant(0, 16), says(ReceiverMsg::Credit { request: R, pages: u32::MAX })], "limit of 16");
    check(vec![grant(0, 1), grant(0, 1)], "Grant while Shipping");
    check(vec![says(ReceiverMsg::Commit { request: R })], "Commit while Offered");
    check(vec![says(ReceiverMsg::Credit { request: R, pages: 1 })], "Credit while Offered");
}

#[test]
fn a_sender_ignores_other_peers_and_the_dead() {
    let mut sender = sender();
    run(&mut sender, [announce(R), begin(R)]);
    let message = ReceiverMsg::Abort { request: R, reason: "mine".into() };
    let stranger = SenderInput::Message { from: NodeName("decode-9".into()), message: message.clone() };
    assert!(matches!(&run(&mut sender, [stranger])[..], [SenderOutput::Answer { to, .. }] if to.0 == "decode-9"));
    assert!(aborted(&run(&mut sender, [says(message.clone())])).contains("mine"));
    let cancel = SenderInput::Command(SendCommand::Cancel { request: R, reason: "late".into() });
    let out = run(&mut sender, [says(message), ready(0, 0, 4), cancel]);
    assert!(matches!(&out[..], [SenderOutput::Answer { .. }]), "an abort is acknowledged, and nothing else happens");
    assert_eq!(sender.stats().strays, 2);
}

#[test]
fn a_sender_waits_for_a_lease_from_when_its_peer_comes_up() {
    let mut sender = sender();
    run(&mut sender, [announce(R), begin(R)]);
    sender.handle(at(30), SenderInput::PeerUp(peer().name));
    lives(&mut sender, at(30), Instant(at(70).0 - 1));
    sender.handle_timeout(at(70));
    assert!(aborted(&outputs(&mut sender)).contains("no sign of life"));
}

#[test]
fn signs_of_life_renew_an_offer_as_long_as_patience_lasts() {
    let mut sender = sender();
    run(&mut sender, [announce(R), begin(R)]);
    for ms in [30, 60, 90] {
        lives(&mut sender, at(ms - 30), at(ms));
        sender.handle(at(ms), says(ReceiverMsg::Alive { requests: vec![R] }));
    }
    lives(&mut sender, at(90), Instant(at(100).0 - 1));
    sender.handle_timeout(at(100));
    assert!(aborted(&outputs(&mut sender)).contains("no grant within 100ms"));
}

#[test]
fn another_peers_signs_of_life_renew_nothing() {
    let mut sender = sender();
    run(&mut sender, [announce(R), begin(R)]);
    let message = ReceiverMsg::Alive { requests: vec![R] };
    sender.handle(at(30), SenderInput::Message { from: NodeName("decode-9".into()), message });
    sender.handle_timeout(at(40));
    assert!(aborted(&outputs(&mut sender)).contains("no sign of life"));
}

#[test]
fn a_prompt_that_waits_is_kept_alive_and_ends_with_its_peer() {
    let mut sender = sender();
    run(&mut sender, [announce(R)]);
    assert_eq!(lives(&mut sender, at(0), at(1000)), 100, "it has no deadline of its own");
    let lost = SenderInput::PeerLost { peer: peer(), reason: "killed".into() };
    assert!(aborted(&run(&mut sender, [lost])).contains("killed"));
    assert_eq!(run(&mut sender, [begin(R), ready(0, 0, 4)]), [], "what was on its way is ignored");
}

#[test]
fn an_abort_is_acknowledged_in_every_state() {
    let abort = || says(ReceiverMsg::Abort { request: R, reason: "mine".into() });
    let acknowledges = |inputs: Vec<SenderInput>| {
        let mut sender = sender();
        run(&mut sender, inputs);
        for _ in 0..2 {
            let out = run(&mut sender, [abort()]);
            assert_eq!(
                out.first(),
                Some(&SenderOutput::Answer { to: peer().name, message: SenderMsg::Aborted { request: R } })
            );
        }
    };
    acknowledges(vec![]);
    acknowledges(vec![announce(R)]);
    acknowledges(vec![announce(R), begin(R)]);
    acknowledges(vec![announce(R), begin(R), says(ReceiverMsg::Grant { request: R, first_block: 0, credit: 1 })]);
    let abort = || hears(SenderMsg::Abort { request: R, reason: "mine".into() });
    let acknowledges = |inputs: Vec<ReceiverInput>| {
        let mut receiver = receiver();
        run(&mut receiver, inputs);
        for _ in 0..2 {
            let message = ReceiverMsg::Aborted { request: R };
            assert_eq!(run(&mut receiver, [abort()]).first(), Some(&ReceiverOutput::Send { to: from(), message }));
        }
    };
    acknowledges(vec![]);
    acknowledges(vec![expect(R, 0)]);
    acknowledges(vec![offer(60, hashes(3))]);
    acknowledges(vec![expect(R, 0), offer(60, hashes(3))]);
}

#[test]
fn aborts_that_nobody_acknowledges_are_counted() {
    let mut sender = sender();
    let cancel = || SenderInput::Command(SendCommand::Cancel { request: R, reason: "gone".into() });
    run(&mut sender, [announce(R), cancel()]);
    assert_eq!(sender.open_aborts(), 1);
    run(&mut sender, [says(ReceiverMsg::Aborted { request: R })]);
    assert_eq!((sender.open_aborts(), sender.stats().unacknowledged), (0, 0));
    run(&mut sender, [announce(R), cancel()]);
    lives(&mut sender, at(0), at(40));
    assert_eq!((sender.open_aborts(), sender.stats().unacknowledged), (0, 1));
    run(&mut sender, [announce(R), cancel(), SenderInput::PeerLost { peer: peer(), reason: "killed".into() }]);
    assert_eq!((sender.open_aborts(), sender.stats().unacknowledged), (0, 1), "the dead have forgotten it");
}

#[test]
fn a_full_sender_settles_at_once() {
    let mut sender = sender();
    run(&mut sender, [announce(RequestId(1)), begin(RequestId(1)), announce(RequestId(2)), begin(RequestId(2))]);
    assert!(aborted(&run(&mut sender, [announce(RequestId(3)), begin(RequestId(3))])).contains("full: 2"));
}

#[test]
fn a_cancel_reaches_the_peer_and_nobody_else() {
    let mut sender = sender();
    run(&mut sender, [announce(R), begin(R)]);
    let out = run(&mut sender, [SenderInput::Command(SendCommand::Cancel { request: R, reason: "gone".into() })]);
    assert!(matches!(&out[..], [SenderOutput::Send { message: SenderMsg::Abort { .. }, .. }]));
    assert_eq!(sender.stats().aborted, 1);
}

#[test]
#[should_panic(expected = "was ready before")]
fn a_page_that_is_ready_twice_is_our_own_mistake() {
    run(&mut sender(), [announce(R), begin(R), ready(0, 0, 2), ready(0, 1, 3)]);
}

#[test]
fn either_side_may_come_first() {
    for inputs in [[expect(R, 3), offer(60, hashes(3))], [offer(60, hashes(3)), expect(R, 3)]] {
        let mut receiver = receiver();
        let out = run(&mut receiver, inputs);
        let message = ReceiverMsg::Grant { request: R, first_block: 3, credit: 2 };
        assert_eq!(out, [ReceiverOutput::Send { to: from(), message }]);
        assert_eq!(receiver.destination(&from(), R, 1, 3), Some(BlockId(23)));
        for (peer, layer, index) in [(peer().name, 1, 3), (from(), 1, 2), (from(), 2, 3), (from(), 1, 4)] {
            assert_eq!(receiver.destination(&peer, R, layer, index), None);
        }
    }
}

#[test]
fn finish_may_overtake_pages() {
    let mut receiver = receiver();
    run(&mut receiver, [expect(R, 3), offer(60, hashes(3)), page(0, 3)]);
    assert_eq!(receiver.destination(&from(), R, 0, 3), None, "here already");
    assert_eq!(run(&mut receiver, [hears(SenderMsg::Finish { request: R, pages: 2, first: first() })]), []);
    let out = run(&mut receiver, [page(1, 3)]);
    let landed = ReceiveEvent::Landed { request: R, first: first(), pages: 2, bytes: 16 };
    let commit = ReceiverOutput::Send { to: from(), message: ReceiverMsg::Commit { request: R } };
    assert_eq!(out, [commit, ReceiverOutput::Event(landed)]);
}

#[test]
fn a_prompt_that_is_all_here_needs_no_page() {
    let mut receiver = receiver();
    let out = run(&mut receiver, [expect(R, 4), offer(60, hashes(3))]);
    let message = ReceiverMsg::Grant { request: R, first_block: 4, credit: 0 };
    assert_eq!(out, [ReceiverOutput::Send { to: from(), message }]);
    let out = run(&mut receiver, [hears(SenderMsg::Finish { request: R, pages: 0, first: first() })]);
    assert!(matches!(out.last(), Some(ReceiverOutput::Event(ReceiveEvent::Landed { pages: 0, .. }))));
}

#[test]
fn credit_comes_back_in_steps_of_half_the_window() {
    let mut receiver = receiver();
    run(&mut receiver, [expect(R, 0), offer(60, hashes(3))]);
    let credit = |pages| [ReceiverOutput::Send { to: from(), message: ReceiverMsg::Credit { request: R, pages } }];
    assert_eq!(run(&mut receiver, [page(0, 0)]), []);
    assert_eq!(run(&mut receiver, [page(0, 1)]), credit(2));
    assert_eq!(run(&mut receiver, [page(0, 2)]), []);
    assert_eq!(run(&mut receiver, [page(0, 3)]), credit(2), "8 pages in all: nothing is left to give");
    assert_eq!(run(&mut receiver, [page(1, 0), page(1, 1), page(1, 2), page(1, 3)]), []);
}

#[test]
fn what_does_not_agree_fails() {
    let check = |inputs: Vec<ReceiverInput>, reason: &str| {
        let mut receiver = receiver();
        let out = run(&mut receiver, inputs);
        assert!(failed(&out).contains(reason), "{out:?}");
        assert_eq!(receiver.sessions(), 0);
    };
    let met = |more: Vec<ReceiverInput>| {
        let mut inputs = vec![expect(R, 2), offer(60, hashes(3))];
        inputs.extend(more);
        inputs
    };
    let finish = |pages| hears(SenderMsg::Finish { request: R, pages, first: first() });
    check(vec![expect(R, 0), offer(61, hashes(3))], "61 tokens where 60");
    check(vec![expect(R, 0), offer(60, hashes(2))], "2 full blocks where 3");
    check(vec![offer(60, vec![BlockHash([9; 16]); 3]), expect(R, 0)], "hash of block 0 differs");
    check(met(vec![page(0, 1)]), "outside");
    check(met(vec![page(2, 2)]), "outside");
    check(met(vec![page(0, 4)]), "outside");
    check(met(vec![page(0, 2), page(0, 2)]), "came twice");
    check(met(vec![finish(3)]), "3 pages of 4");
    check(met(vec![finish(4), finish(4)]), "Finish while Closing");
    check(met(vec![offer(60, hashes(3))]), "offered while Landing");
    check(vec![expect(R, 2), page(0, 2)], "Page while Expected");
}

#[test]
fn a_bad_digest_is_counted_and_fails() {
    let mut receiver = receiver();
    run(&mut receiver, [expect(R, 0), offer(60, hashes(3))]);
    let bad = ReceiverInput::PageLanded { from: from(), request: R, layer: 0, index: 0, bytes: 8, intact: false };
    assert!(failed(&run(&mut receiver, [bad])).contains("digest"));
    assert_eq!(receiver.stats().digest_failures, 1);
    assert_eq!(run(&mut receiver, [page(0, 1)]), [], "late pages are ignored");
}

#[test]
fn the_other_side_of_a_failure_is_told_at_once() {
    let mut late_offer = receiver();
    late_offer.handle(at(0), expect(R, 0));
    assert_eq!(late_offer.poll_timeout(), Some(at(40)));
    late_offer.handle_timeout(at(40));
    let out = outputs(&mut late_offer);
    assert!(matches!(&out[..], [ReceiverOutput::Event(ReceiveEvent::Failed { .. })]));
    let out = run(&mut late_offer, [offer(60, hashes(3))]);
    assert!(matches!(&out[..], [ReceiverOutput::Send { message: ReceiverMsg::Abort { .. }, .. }]));
    assert_eq!(run(&mut late_offer, [hears(SenderMsg::Aborted { request: R })]), []);
    assert_eq!(late_offer.poll_timeout(), None, "and forgotten");

    let mut late_expect = receiver();
    let lost = ReceiverInput::PeerLost { peer: from(), reason: "killed".into() };
    assert_eq!(run(&mut late_expect, [offer(60, hashes(3)), lost]), []);
    let out = run(&mut late_expect, [expect(R, 0)]);
    assert!(
        matches!(&out[..], [ReceiverOutput::Event(ReceiveEvent::Failed { reason, .. })] if reason.contains("killed"))
    );
}

#[test]
fn another_nodes_offer_is_refused_and_keeps_nobody_out() {
    let stranger = |message| ReceiverInput::Message { from: NodeName("prefill-9".into()), message };
    let theirs = || stranger(SenderMsg::Offer { request: R, tokens: 60, hashes: hashes(3) });
    for inputs in [[expect(R, 0), theirs()], [theirs(), expect(R, 0)]] {
        let mut receiver = receiver();
        let out = run(&mut receiver, inputs);
        assert!(
            matches!(&out[..], [ReceiverOutput::Send { to, message: ReceiverMsg::Abort { .. } }] if to.0 == "prefill-9")
        );
        let out = run(&mut receiver, [offer(60, hashes(3))]);
        assert!(matches!(&out[..], [ReceiverOutput::Send { message: ReceiverMsg::Grant { .. }, .. }]));
    }
}

#[test]
fn a_full_receiver_refuses() {
    let mut receiver = receiver();
    run(&mut receiver, [expect(RequestId(1), 0), expect(RequestId(2), 0)]);
    let out = run(&mut receiver, [expect(RequestId(3), 0)]);
    assert!(
        matches!(&out[..], [ReceiverOutput::Event(ReceiveEvent::Failed { reason, .. })] if reason.contains("full"))
    );
    let out = run(&mut receiver, [hears(SenderMsg::Offer { request: RequestId(4), tokens: 1, hashes: vec![] })]);
    assert!(
        matches!(&out[..], [ReceiverOutput::Send { message: ReceiverMsg::Abort { reason, .. }, .. }] if reason.contains("full"))
    );
}

#[test]
fn a_lease_is_renewed_by_pages_and_by_signs_of_life() {
    let mut receiver = receiver();
    run(&mut receiver, [expect(R, 0), offer(60, hashes(3))]);
    receiver.handle(at(30), page(0, 0));
    assert_eq!(receiver.poll_timeout(), Some(at(70)));
    for ms in [60, 90, 120] {
        receiver.handle(at(ms), hears(SenderMsg::Alive { requests: vec![R] }));
    }
    assert_eq!(receiver.poll_timeout(), Some(at(130)), "patience is measured from the last page");
    receiver.handle_timeout(Instant(at(130).0 - 1));
    assert_eq!(outputs(&mut receiver), []);
    receiver.handle_timeout(at(130));
    assert!(failed(&outputs(&mut receiver)).contains("no page within 100ms, 1 of 8"));
}

#[test]
fn after_finish_only_pages_count() {
    let mut receiver = receiver();
    let finish = hears(SenderMsg::Finish { request: R, pages: 8, first: first() });
    run(&mut receiver, [expect(R, 0), offer(60, hashes(3)), finish]);
    receiver.handle(at(30), hears(SenderMsg::Alive { requests: vec![R] }));
    receiver.handle_timeout(at(40));
    assert!(failed(&outputs(&mut receiver)).contains("no sign of life"));
}

#[test]
fn a_receiver_that_looks_for_blocks_says_so() {
    let mut receiver = receiver();
    run(&mut receiver, [offer(60, hashes(3))]);
    assert_eq!(receiver.poll_timeout(), Some(at(10)));
    receiver.handle_timeout(at(10));
    let message = ReceiverMsg::Alive { requests: vec![R] };
    assert_eq!(outputs(&mut receiver), [ReceiverOutput::Send { to: from(), message }]);
    receiver.handle(at(15), expect(R, 0));
    outputs(&mut receiver);
    receiver.handle_timeout(at(20));
    assert_eq!(outputs(&mut receiver), [], "it is granted: pages are the next sign");
}
