//! Senders and receivers against each other over a link that delays, interleaves and breaks, on a virtual clock.
//!
//! Control messages keep their order, pages keep theirs within a transfer, and the two overtake each other freely.
//! The world watches from outside and checks what no single machine can see: pages against readiness and credit,
//! commits against landed pages, and that every transfer ends once on each side.

use super::{Receiver, ReceiverConfig, ReceiverInput, ReceiverOutput, Sender, SenderConfig, SenderInput, SenderOutput};
use ridge_protocol::transfer::{
    KvPeer, Outcome, PageSource, ReceiveCommand, ReceiveEvent, ReceiveJob, SendCommand, SendEvent, SendJob,
};
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{
    BlockHash, BlockId, BlockShape, CacheDtype, Duration, Instant, Machine, NodeName, RequestId, TokenOut,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Tokens in a sender's block, and in a block of each receiver: one takes pages as they are, one made of pieces.
const SENDER_BLOCK: u32 = 16;
const RECEIVER_BLOCKS: [u32; NODES] = [16, 24];
const NODES: usize = 2;

/// What may go wrong in a run, in chances per thousand steps or transfers.
#[derive(Clone, Copy, Debug)]
struct Faults {
    cancel: u64,
    kill: u64,
    mismatch: u64,
    corrupt: u64,
    missing_side: u64,
    long_wait: u64,
}

const NONE: Faults = Faults { cancel: 0, kill: 0, mismatch: 0, corrupt: 0, missing_side: 0, long_wait: 0 };
const SOME: Faults = Faults { cancel: 4, kill: 2, mismatch: 50, corrupt: 5, missing_side: 50, long_wait: 2 };

/// splitmix64: small, seeded, the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.next() % 1000 < per_mille
    }
}

/// One transfer as the schedulers and the observer see it.
#[derive(Debug)]
struct Transfer {
    from: usize,
    to: usize,
    tokens: u32,
    blocks: u32,
    layers: u32,
    have: u32,
    offered: Vec<BlockHash>,
    expected: Vec<BlockHash>,
    /// What the prefill scheduler will still say, in order; empty when it says nothing more.
    script: VecDeque<SendCommand>,
    begun: bool,
    expect: Option<ReceiveJob>,
    expect_said: bool,
    ready: BTreeSet<(u32, u32)>,
    shipped: BTreeSet<(u32, u32)>,
    credit: u64,
    landed: BTreeSet<(u32, u32)>,
    sender_ends: u32,
    receiver_ends: u32,
    has_landed: bool,
    committed: bool,
}

#[derive(Default)]
struct Link {
    to_receiver: VecDeque<SenderMsg>,
    to_sender: VecDeque<ReceiverMsg>,
    pages: BTreeMap<RequestId, VecDeque<(u32, u32)>>,
    sender_must_hear: bool,
    receiver_must_hear: bool,
}

struct World {
    rng: Rng,
    now: Instant,
    faults: Faults,
    senders: Vec<Sender>,
    receivers: Vec<Receiver>,
    links: BTreeMap<(usize, usize), Link>,
    transfers: BTreeMap<RequestId, Transfer>,
}

fn sender_name(at: usize) -> NodeName {
    NodeName(format!("prefill-{at}"))
}

fn receiver_peer(at: usize) -> KvPeer {
    let addr = "127.0.0.1:1".parse().expect("an address");
    KvPeer { name: receiver_name(at), addr, blocks: shape(RECEIVER_BLOCKS[at]) }
}

fn shape(block_size: u32) -> BlockShape {
    BlockShape::new(block_size, CacheDtype::F32).expect("a block holds a token")
}

/// Bytes of a page of one head of one element.
fn page_bytes(receiver: usize) -> u32 {
    2 * 4 * RECEIVER_BLOCKS[receiver]
}

fn receiver_name(at: usize) -> NodeName {
    NodeName(format!("decode-{at}"))
}

fn first() -> TokenOut {
    TokenOut { token: 7, logprob: None, top: vec![], ends: false }
}

impl World {
    fn new(seed: u64, faults: Faults) -> Self {
        let mut rng = Rng(seed);
        let sender = SenderConfig { blocks: shape(SENDER_BLOCK), ..SenderConfig::default() };
        let receiver = ReceiverConfig { credit_pages: 1 + rng.below(6) as u32, ..ReceiverConfig::default() };
        let mut world = World {
            now: Instant(1),
            faults,
            senders: (0..NODES).map(|_| Sender::new(sender.clone())).collect(),
            receivers: (0..NODES).map(|_| Receiver::new(receiver.clone())).collect(),
            links: (0..NODES * NODES).map(|at| ((at / NODES, at % NODES), Link::default())).collect(),
            transfers: BTreeMap::new(),
            rng,
        };
        for id in 0..12 {
            let transfer = world.transfer(RequestId(id));
            world.transfers.insert(RequestId(id), transfer);
        }
        world
    }

    fn transfer(&mut self, request: RequestId) -> Transfer {
        let rng = &mut self.rng;
        let blocks = 1 + rng.below(6) as u32;
        let layers = 1 + rng.below(3) as u32;
        let (from, to) = (rng.below(NODES), rng.below(NODES));
        let tokens = blocks * RECEIVER_BLOCKS[to] - rng.below(RECEIVER_BLOCKS[to] as usize) as u32;
        let offered: Vec<BlockHash> = (1..blocks).map(|at| BlockHash([at as u8; 16])).collect();
        let mut expected = offered.clone();
        if rng.chance(self.faults.mismatch) {
            expected.push(BlockHash([0xff; 16]));
        }
        let mut script = VecDeque::new();
        script.push_back(SendCommand::Announce { request, to: receiver_peer(to) });
        script.push_back(SendCommand::Begin(SendJob {
            request,
            to: receiver_peer(to),
            tokens,
            blocks: (0..tokens.div_ceil(SENDER_BLOCK)).map(|at| BlockId(100 + at)).collect(),
            hashes: offered.clone(),
            layers,
        }));
        let mut done = 0;
        while done < blocks {
            let end = (done + 1 + rng.below(3) as u32).min(blocks);
            script.extend((0..layers).map(|layer| SendCommand::Ready { request, layer, first: done, end }));
            done = end;
        }
        script.push_back(SendCommand::Finish { request, first: first() });
        let have = rng.below(blocks as usize + 1) as u32;
        let expect = ReceiveJob {
            request,
            from: sender_name(from),
            tokens,
            blocks: (0..blocks).map(|at| BlockId(200 + at)).collect(),
            hashes: expected.clone(),
            have,
            layers,
        };
        if rng.chance(self.faults.missing_side) {
            script.clear();
        }
        let expect = (!rng.chance(self.faults.missing_side)).then_some(expect);
        Transfer {
            from,
            to,
            tokens,
            blocks,
            layers,
            have,
            offered,
            expected,
            script,
            begun: false,
            expect,
            expect_said: false,
            ready: BTreeSet::new(),
            shipped: BTreeSet::new(),
            credit: 0,
            landed: BTreeSet::new(),
            sender_ends: 0,
            receiver_ends: 0,
            has_landed: false,
            committed: false,
        }
    }

    /// One random event.
    fn step(&mut self) {
        let ids: Vec<RequestId> = self.transfers.keys().copied().collect();
        let request = ids[self.rng.below(ids.len())];
        let faults = self.faults;
        match self.rng.below(8) {
            0 | 1 => self.prefill_speaks(request),
            2 => self.decode_speaks(request),
            3 if self.rng.chance(faults.cancel * 8) => self.cancel(request),
            4 if self.rng.chance(faults.kill * 8) => self.kill(),
            5 => {
                let most = if self.rng.chance(faults.long_wait) { 70_000 } else { 20 };
                let wait = Duration::from_millis(self.rng.below(most) as u64);
                self.wait(wait);
            }
            _ => {
                self.deliver();
            }
        }
        self.check();
    }

    fn prefill_speaks(&mut self, request: RequestId) {
        let transfer = self.transfers.get_mut(&request).expect("one of ours");
        let Some(command) = transfer.script.pop_front() else { return };
        match &command {
            SendCommand::Announce { .. } => transfer.begun = true,
            SendCommand::Ready { layer, first, end, .. } => {
                transfer.ready.extend((*first..*end).map(|index| (*layer, index)));
            }
            _ => {}
        }
        let from = transfer.from;
        self.senders[from].handle(self.now, SenderInput::Command(command));
        self.drain_sender(from);
    }

    fn decode_speaks(&mut self, request: RequestId) {
        let transfer = self.transfers.get_mut(&request).expect("one of ours");
        let Some(job) = transfer.expect.take() else { return };
        transfer.expect_said = true;
        let to = transfer.to;
        self.receivers[to].handle(self.now, ReceiverInput::Command(ReceiveCommand::Expect(job)));
        self.drain_receiver(to);
    }

    fn cancel(&mut self, request: RequestId) {
        let prefill = self.rng.chance(500);
        let transfer = self.transfers.get_mut(&request).expect("one of ours");
        let reason = "the client went away".to_owned();
        if prefill {
            // A scheduler that cancels says nothing more; one that hears of the end first cancels in vain.
            if transfer.begun && transfer.sender_ends == 0 {
                transfer.sender_ends = 1;
            }
            transfer.script.clear();
            let from = transfer.from;
            self.senders[from].handle(self.now, SenderInput::Command(SendCommand::Cancel { request, reason }));
            self.drain_sender(from);
        } else {
            if transfer.expect_said && transfer.receiver_ends == 0 {
                transfer.receiver_ends = 1;
            }
            transfer.expect = None;
            let to = transfer.to;
            let command = ReceiveCommand::Cancel { request, reason };
            self.receivers[to].handle(self.now, ReceiverInput::Command(command));
            self.drain_receiver(to);
        }
    }

    /// A connection dies; each side will hear of it in its own time.
    fn kill(&mut self) {
        let at = (self.rng.below(NODES), self.rng.below(NODES));
        let link = self.links.get_mut(&at).expect("every pair has a link");
        *link = Link { sender_must_hear: true, receiver_must_hear: true, ..Link::default() };
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
        for at in 0..NODES {
            if self.senders[at].poll_timeout().is_some_and(|deadline| deadline <= self.now) {
                self.senders[at].handle_timeout(self.now);
                self.drain_sender(at);
            }
            if self.receivers[at].poll_timeout().is_some_and(|deadline| deadline <= self.now) {
                self.receivers[at].handle_timeout(self.now);
                self.drain_receiver(at);
            }
        }
    }

    /// Delivers one thing that some link holds; false if none holds any.
    fn deliver(&mut self) -> bool {
        let mut choices = Vec::new();
        for (at, link) in &self.links {
            if link.sender_must_hear {
                choices.push((*at, 0, RequestId(0)));
            } else if !link.to_sender.is_empty() {
                choices.push((*at, 1, RequestId(0)));
            }
            if link.receiver_must_hear {
                choices.push((*at, 2, RequestId(0)));
                continue;
            }
            if !link.to_receiver.is_empty() {
                choices.push((*at, 3, RequestId(0)));
            }
            choices.extend(link.pages.keys().map(|request| (*at, 4, *request)));
        }
        if choices.is_empty() {
            return false;
        }
        let (at, what, request) = choices[self.rng.below(choices.len())];
        let link = self.links.get_mut(&at).expect("every pair has a link");
        let reason = "killed".to_owned();
        match what {
            0 => {
                link.sender_must_hear = false;
                self.senders[at.0].handle(self.now, SenderInput::PeerLost { peer: receiver_peer(at.1), reason });
                self.drain_sender(at.0);
            }
            1 => {
                let message = link.to_sender.pop_front().expect("not empty");
                match &message {
                    ReceiverMsg::Grant { request, credit, .. } => self.pay(*request, *credit),
                    ReceiverMsg::Credit { request, pages } => self.pay(*request, *pages),
                    _ => {}
                }
                let input = SenderInput::Message { from: receiver_name(at.1), message };
                self.senders[at.0].handle(self.now, input);
                self.drain_sender(at.0);
            }
            2 => {
                link.receiver_must_hear = false;
                self.receivers[at.1].handle(self.now, ReceiverInput::PeerLost { peer: sender_name(at.0), reason });
                self.drain_receiver(at.1);
            }
            3 => {
                let message = link.to_receiver.pop_front().expect("not empty");
                let input = ReceiverInput::Message { from: sender_name(at.0), message };
                self.receivers[at.1].handle(self.now, input);
                self.drain_receiver(at.1);
            }
            _ => {
                let queue = link.pages.get_mut(&request).expect("chosen");
                let (layer, index) = queue.pop_front().expect("never kept empty");
                if queue.is_empty() {
                    link.pages.remove(&request);
                }
                self.land(at, request, layer, index);
            }
        }
        true
    }

    fn pay(&mut self, request: RequestId, pages: u32) {
        self.transfers.get_mut(&request).expect("one of ours").credit += u64::from(pages);
    }

    fn land(&mut self, at: (usize, usize), request: RequestId, layer: u32, index: u32) {
        let intact = !self.rng.chance(self.faults.corrupt);
        let from = sender_name(at.0);
        let destination = self.receivers[at.1].destination(&from, request, layer, index);
        if let Some(block) = destination {
            assert_eq!(block, BlockId(200 + index), "a page goes into its own block");
            if intact {
                self.transfers.get_mut(&request).expect("one of ours").landed.insert((layer, index));
            }
        }
        let input = ReceiverInput::PageLanded { from, request, layer, index, bytes: page_bytes(at.1), intact };
        self.receivers[at.1].handle(self.now, input);
        self.drain_receiver(at.1);
    }

    fn drain_sender(&mut self, at: usize) {
        while let Some(output) = self.senders[at].poll_output() {
            match output {
                SenderOutput::Send { to, message } => {
                    let link = self.link(at, &to.name);
                    if !link.sender_must_hear {
                        link.to_receiver.push_back(message);
                    }
                }
                SenderOutput::Answer { to, message } => {
                    let link = self.link(at, &to);
                    if !link.sender_must_hear {
                        link.to_receiver.push_back(message);
                    }
                }
                SenderOutput::Ship { to, request, layer, index, source } => {
                    let transfer = self.transfers.get_mut(&request).expect("one of ours");
                    let size = RECEIVER_BLOCKS[transfer.to];
                    let (first, end) = (index * size, ((index + 1) * size).min(transfer.tokens));
                    let blocks = (first / SENDER_BLOCK..end.div_ceil(SENDER_BLOCK)).map(|at| BlockId(100 + at));
                    let (skip, tokens) = (first % SENDER_BLOCK, end - first);
                    assert_eq!(source, PageSource { blocks: blocks.collect(), skip, tokens }, "{request}: {index}");
                    assert!(transfer.ready.contains(&(layer, index)), "{request}: shipped before it was ready");
                    assert!(index >= transfer.have, "{request}: shipped although the receiver has it");
                    assert!(transfer.shipped.insert((layer, index)), "{request}: shipped twice");
                    assert!(transfer.shipped.len() as u64 <= transfer.credit, "{request}: shipped without credit");
                    let link = self.link(at, &to.name);
                    if !link.sender_must_hear {
                        link.pages.entry(request).or_default().push_back((layer, index));
                    }
                }
                SenderOutput::Event(SendEvent::Settled { request, outcome }) => {
                    let transfer = self.transfers.get_mut(&request).expect("one of ours");
                    assert!(transfer.begun, "{request}: settled before it began");
                    transfer.sender_ends += 1;
                    transfer.script.clear();
                    if let Outcome::Committed { pages, bytes, .. } = outcome {
                        assert!(transfer.has_landed, "{request}: committed before it landed");
                        assert_eq!(pages, transfer.shipped.len() as u64);
                        assert_eq!(bytes, pages * u64::from(page_bytes(transfer.to)));
                        transfer.committed = true;
                    }
                }
            }
        }
    }

    fn drain_receiver(&mut self, at: usize) {
        while let Some(output) = self.receivers[at].poll_output() {
            match output {
                ReceiverOutput::Send { to, message } => {
                    let from = (0..NODES).find(|from| sender_name(*from) == to).expect("one of ours");
                    let link = self.links.get_mut(&(from, at)).expect("every pair has a link");
                    if !link.receiver_must_hear && !link.sender_must_hear {
                        link.to_sender.push_back(message);
                    }
                }
                ReceiverOutput::Event(event) => {
                    let (ReceiveEvent::Landed { request, .. } | ReceiveEvent::Failed { request, .. }) = &event;
                    let transfer = self.transfers.get_mut(request).expect("one of ours");
                    assert!(transfer.expect_said, "{request}: ended before it was expected");
                    transfer.receiver_ends += 1;
                    if let ReceiveEvent::Landed { pages, bytes, .. } = event {
                        let all = (0..transfer.layers)
                            .flat_map(|layer| (transfer.have..transfer.blocks).map(move |index| (layer, index)));
                        assert_eq!(transfer.landed, all.collect(), "{request}: landed incomplete");
                        assert_eq!(pages, transfer.landed.len() as u64);
                        assert_eq!(bytes, pages * u64::from(page_bytes(at)));
                        assert_eq!(transfer.offered, transfer.expected, "{request}: landed for another prompt");
                        transfer.has_landed = true;
                    }
                }
            }
        }
    }

    fn link(&mut self, from: usize, to: &NodeName) -> &mut Link {
        let to = (0..NODES).find(|at| receiver_name(*at) == *to).expect("one of ours");
        self.links.get_mut(&(from, to)).expect("every pair has a link")
    }

    fn check(&self) {
        self.senders.iter().for_each(Sender::check_integrity);
        self.receivers.iter().for_each(Receiver::check_integrity);
        for (request, transfer) in &self.transfers {
            assert!(transfer.sender_ends <= 1, "{request}: the sender ended it twice");
            assert!(transfer.receiver_ends <= 1, "{request}: the receiver ended it twice");
        }
    }

    /// Lets everything that was begun come to its end.
    fn settle(&mut self) {
        loop {
            for request in self.transfers.keys().copied().collect::<Vec<_>>() {
                while !self.transfers[&request].script.is_empty() {
                    self.prefill_speaks(request);
                }
                self.decode_speaks(request);
            }
            while self.deliver() {
                self.check();
            }
            let next = self.senders.iter().filter_map(Sender::poll_timeout);
            let next = next.chain(self.receivers.iter().filter_map(Receiver::poll_timeout)).min();
            let Some(deadline) = next else { break };
            self.wait(deadline - self.now);
            self.check();
        }
        for (request, transfer) in &self.transfers {
            assert_eq!(transfer.sender_ends, u32::from(transfer.begun), "{request}: the sender's end");
            assert_eq!(transfer.receiver_ends, u32::from(transfer.expect_said), "{request}: the receiver's end");
        }
        assert!(self.senders.iter().all(|sender| sender.sessions() == 0));
        assert!(self.receivers.iter().all(|receiver| receiver.sessions() == 0));
        let unacknowledged = self.senders.iter().map(|s| s.stats()).chain(self.receivers.iter().map(|r| r.stats()));
        let unacknowledged: u64 = unacknowledged.map(|stats| stats.unacknowledged).sum();
        assert!(self.faults.kill > 0 || unacknowledged == 0, "an abort was never acknowledged");
    }
}

#[test]
fn without_faults_everything_commits() {
    for seed in 0..100 {
        let mut world = World::new(seed, NONE);
        for _ in 0..400 {
            world.step();
        }
        world.settle();
        assert!(world.transfers.values().all(|transfer| transfer.committed), "seed {seed}");
    }
}

#[test]
fn with_faults_everything_ends_once() {
    let (mut committed, mut aborted) = (0, 0);
    for seed in 0..400 {
        let mut world = World::new(seed, SOME);
        for _ in 0..400 {
            world.step();
        }
        world.settle();
        for transfer in world.transfers.values() {
            committed += u32::from(transfer.committed);
            aborted += u32::from(!transfer.committed);
        }
    }
    assert!(committed > 500 && aborted > 500, "both ends are exercised: {committed} and {aborted}");
}
