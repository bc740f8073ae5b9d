//! A decode node on a bench: requests to give it, an engine that answers at once, and its outputs as text, one line
//! each.

use crate::machine::{DecodeConfig, DecodeInput, DecodeNode, DecodeOutput};
use ridge_protocol::stats::{BlockCounts, NodeStats};
use ridge_protocol::transfer::{KvPeer, Outcome, ReceiveCommand, ReceiveEvent, SendCommand, SendEvent, TransferTimes};
use ridge_protocol::wire::{DecodeRequest, NodeToRouter, Receipt, RouterToNode};
use ridge_protocol::{
    BatchPlan, BlockShape, CacheDtype, Duration, Instant, Machine, NoToken, NodeName, PlanItem, RequestId,
    SamplingParams, TokenId, TokenOut,
};

/// Eight blocks of four tokens, a context that fills the pool, eight prompt tokens a pass, no headroom.
pub(super) fn config() -> DecodeConfig {
    DecodeConfig {
        blocks: 8,
        block_size: 4,
        layers: 2,
        vocab: 100,
        max_model_len: 32,
        max_num_seqs: 4,
        max_prefill_tokens: 8,
        max_waiting: 3,
        headroom_blocks: 0,
        ..DecodeConfig::default()
    }
}

/// A prompt to be computed here; shares no block with one of another number.
pub(super) fn local(id: u64, len: u32) -> DecodeRequest {
    let tokens: Vec<TokenId> = (0..len).map(|at| (id as u32 * 32 + at) % 90).collect();
    DecodeRequest {
        request: RequestId(id),
        from: None,
        prompt_len: len,
        tokens,
        salt: 0,
        params: SamplingParams::greedy(20),
        last_resort: false,
    }
}

/// The same, to come by transfer.
pub(super) fn remote(id: u64, len: u32) -> DecodeRequest {
    DecodeRequest { from: Some(NodeName("p1".into())), ..local(id, len) }
}

/// As `request`, but agreeing with every other one as far as both go.
pub(super) fn shared(request: DecodeRequest) -> DecodeRequest {
    DecodeRequest { tokens: (0..request.prompt_len).collect(), ..request }
}

/// Ends after `max_tokens`.
pub(super) fn short(request: DecodeRequest, max_tokens: u32) -> DecodeRequest {
    DecodeRequest { params: SamplingParams::greedy(max_tokens), ..request }
}

pub(super) fn out(token: TokenId) -> TokenOut {
    TokenOut { token, logprob: None, top: vec![], ends: false }
}

pub(super) fn show_item(item: &PlanItem) -> String {
    let end = item.start as usize + item.tokens.len();
    let star = if item.sample.is_some() { "*" } else { "" };
    format!("{} {}..{end}{star}", item.request, item.start)
}

/// `r1 0..8` computes those positions; a star samples after them.
pub(super) fn show_plan(plan: &BatchPlan) -> String {
    plan.items.iter().map(show_item).collect::<Vec<_>>().join(", ")
}

/// The parts that are not zero.
pub(super) fn show_receipt(receipt: Receipt) -> String {
    let Receipt { cached, computed, transferred, recomputed, transfer_bytes, .. } = receipt;
    let parts = [
        (u64::from(cached), "cached"),
        (u64::from(computed), "computed"),
        (u64::from(transferred), "transferred"),
        (u64::from(recomputed), "recomputed"),
        (transfer_bytes, "bytes"),
    ];
    let parts = parts.into_iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}"));
    parts.collect::<Vec<_>>().join(", ")
}

pub(super) fn show(output: DecodeOutput) -> Option<String> {
    Some(match output {
        DecodeOutput::Run(plan) => format!("run {}", show_plan(&plan)),
        DecodeOutput::Transfer(ReceiveCommand::Expect(job)) => {
            assert_eq!((job.from.0.as_str(), job.layers), ("p1", 2));
            assert_eq!(job.hashes.len(), job.tokens as usize / 4);
            let blocks: Vec<u32> = job.blocks.iter().map(|b| b.0).collect();
            format!("expect {}: {} tokens in {blocks:?}, have {}", job.request, job.tokens, job.have)
        }
        DecodeOutput::Transfer(ReceiveCommand::Cancel { request, reason }) => format!("cancel {request}: {reason}"),
        DecodeOutput::ToRouter(NodeToRouter::Token { request, index, out, finish }) => {
            let finish = finish.map_or(String::new(), |reason| format!(", {reason:?}"));
            format!("token {request} #{index} {}{finish}", out.token)
        }
        DecodeOutput::ToRouter(NodeToRouter::Receipt { request, receipt }) => {
            format!("receipt {request}: {}", show_receipt(receipt))
        }
        DecodeOutput::ToRouter(NodeToRouter::Failed { request, error }) => format!("failed {request}: {error}"),
        DecodeOutput::ToRouter(NodeToRouter::Draining) => "draining".into(),
        DecodeOutput::ToRouter(NodeToRouter::Shipped { request, .. }) => format!("shipped {request}"),
        DecodeOutput::ToRouter(NodeToRouter::Drained) => "drained".into(),
        DecodeOutput::ToRouter(NodeToRouter::Moving { request, len }) => format!("moving {request} of {len} tokens"),
        DecodeOutput::Send(SendCommand::Announce { .. }) => return None,
        DecodeOutput::Send(SendCommand::Begin(job)) => {
            assert_eq!((job.layers, job.hashes.len()), (2, job.tokens as usize / 4));
            let blocks: Vec<u32> = job.blocks.iter().map(|b| b.0).collect();
            format!("offer {} to {}: {} tokens in {blocks:?}", job.request, job.to.name, job.tokens)
        }
        DecodeOutput::Send(SendCommand::Ready { request, layer, first, end }) => {
            format!("ready {request} layer {layer}: {first}..{end}")
        }
        DecodeOutput::Send(SendCommand::Finish { request, first }) => format!("sent {request} before {}", first.token),
        DecodeOutput::Send(SendCommand::Cancel { request, reason }) => format!("keep {request}: {reason}"),
        DecodeOutput::ToRouter(NodeToRouter::Stats(_) | NodeToRouter::CacheChanged { .. }) => return None,
        DecodeOutput::ToRouter(NodeToRouter::Hello(_) | NodeToRouter::Links(_)) => panic!("these are the shell's"),
    })
}

/// A node, an engine that samples 42 each time, and what the node said since it was last asked.
pub(super) struct Bench {
    pub node: DecodeNode,
    pub now: Instant,
    pub pass: Option<BatchPlan>,
    pub seen: Vec<DecodeOutput>,
}

impl Bench {
    pub fn new(config: DecodeConfig) -> Self {
        Self { node: DecodeNode::new(config), now: Instant(0), pass: None, seen: vec![] }
    }

    pub fn feed(&mut self, input: DecodeInput) {
        self.node.handle(self.now, input);
        self.drain_outputs();
    }

    pub fn drain_outputs(&mut self) {
        while let Some(output) = self.node.poll_output() {
            if let DecodeOutput::Run(plan) = &output {
                assert!(self.pass.replace(plan.clone()).is_none(), "one pass at a time");
            }
            self.seen.push(output);
        }
        self.node.check_integrity();
        let BlockCounts { total, free, cached, used, reserved, held } = self.node.stats().blocks;
        assert_eq!(free + cached + used + reserved + held, total, "blocks are conserved");
    }

    pub fn router(&mut self, message: RouterToNode) {
        self.feed(DecodeInput::Router(message));
    }

    pub fn send(&mut self, request: DecodeRequest) {
        self.router(RouterToNode::Decode(request));
    }

    pub fn cancel(&mut self, id: u64) {
        self.router(RouterToNode::Cancel { request: RequestId(id) });
    }

    pub fn lands(&mut self, id: u64) {
        self.lands_with(id, 41);
    }

    pub fn lands_with(&mut self, id: u64, first: TokenId) {
        let landed = ReceiveEvent::Landed { request: RequestId(id), first: out(first), pages: 2, bytes: 99 };
        self.feed(DecodeInput::Transfer(landed));
    }

    pub fn transfer_fails(&mut self, id: u64) {
        let failed = ReceiveEvent::Failed { request: RequestId(id), reason: "link down".into() };
        self.feed(DecodeInput::Transfer(failed));
    }

    /// The router says that the transfer failed.
    pub fn no_transfer(&mut self, id: u64) {
        self.router(RouterToNode::TransferFailed { request: RequestId(id), reason: "link down".into() });
    }

    /// The router wants `id` to go on elsewhere, as `next`.
    pub fn moves(&mut self, id: u64, next: u64) {
        self.moves_into(id, next, 4);
    }

    /// As `moves`, to a node whose blocks hold so many tokens.
    pub fn moves_into(&mut self, id: u64, next: u64, block_size: u32) {
        let blocks = BlockShape::new(block_size, CacheDtype::F32).expect("a block holds a token");
        let to = KvPeer { name: NodeName("d2".into()), addr: "127.0.0.1:1".parse().expect("an address"), blocks };
        self.router(RouterToNode::Move { request: RequestId(id), next: RequestId(next), to });
    }

    /// What was moved under this number has arrived, or has not.
    pub fn settles(&mut self, next: u64, arrived: bool) {
        let outcome = if arrived {
            Outcome::Committed { pages: 2, bytes: 99, times: TransferTimes::default() }
        } else {
            Outcome::Aborted("link down".into())
        };
        self.feed(DecodeInput::Sent(SendEvent::Settled { request: RequestId(next), outcome }));
    }

    /// The running pass ends.
    pub fn step(&mut self) {
        self.step_in(Duration::from_micros(5));
    }

    /// The same after so much time.
    pub fn step_in(&mut self, busy: Duration) {
        self.step_gives(busy, &Ok(out(42)));
    }

    /// The running pass ends, and gives everybody who samples this.
    pub fn step_gives(&mut self, busy: Duration, given: &Result<TokenOut, NoToken>) {
        let plan = self.pass.take().expect("a pass runs");
        let sampled = plan.items.iter().filter(|item| item.sample.is_some());
        let outputs = sampled.map(|item| (item.request, given.clone())).collect();
        self.feed(DecodeInput::StepDone { step: plan.step, outputs, busy });
    }

    /// Sequences of `len` tokens numbered up to `last`, the lower number older. The first is in the running pass.
    pub fn batch(&mut self, last: u64, len: u32) {
        (1..=last).for_each(|id| self.send(remote(id, len)));
        (1..=last).for_each(|id| self.lands(id));
    }

    /// Runs until no pass is left; says each.
    pub fn passes(&mut self) -> Vec<String> {
        let mut passes = Vec::new();
        while let Some(plan) = &self.pass {
            passes.push(show_plan(plan));
            self.step();
        }
        passes
    }

    /// Runs until no pass is left.
    pub fn finish(&mut self) {
        self.passes();
    }

    pub fn wait(&mut self, millis: u64) {
        self.now = self.now + Duration::from_millis(millis);
    }

    /// The next report is due.
    pub fn report(&mut self) {
        self.now = self.node.poll_timeout().expect("reports never end");
        self.node.handle_timeout(self.now);
        self.drain_outputs();
    }

    /// What was said since the last call.
    pub fn says(&mut self, want: &[&str]) {
        let seen: Vec<String> = self.seen.drain(..).filter_map(show).collect();
        assert_eq!(seen, want);
    }

    /// How many reports there were since the last call, and the hashes added and removed by each of their messages.
    pub fn reports(&mut self) -> (usize, Vec<(usize, usize)>) {
        let (mut reports, mut changes) = (0, vec![]);
        for output in self.seen.drain(..) {
            match output {
                DecodeOutput::ToRouter(NodeToRouter::Stats(_)) => reports += 1,
                DecodeOutput::ToRouter(NodeToRouter::CacheChanged { added, removed }) => {
                    changes.push((added.len(), removed.len()));
                }
                _ => {}
            }
        }
        (reports, changes)
    }

    /// The pass that runs now.
    pub fn runs(&self, want: &str) {
        assert_eq!(self.pass.as_ref().map(show_plan).unwrap_or_default(), want);
    }

    /// Prompt tokens computed, and computed again.
    pub fn computed(&self, want: (u64, u64)) {
        let NodeStats { computed_tokens, recomputed_tokens, .. } = self.node.stats();
        assert_eq!((computed_tokens, recomputed_tokens), want, "computed, recomputed");
    }

    /// The blocks of the sequence at `at` in the running pass.
    pub fn table(&self, at: usize) -> Vec<u32> {
        self.pass.as_ref().expect("a pass runs").items[at].block_table.iter().map(|b| b.0).collect()
    }

    /// Free, cached, used and reserved blocks.
    pub fn blocks(&self, want: [u32; 4]) {
        let BlockCounts { free, cached, used, reserved, .. } = self.node.stats().blocks;
        assert_eq!([free, cached, used, reserved], want, "free, cached, used, reserved");
    }

    /// Waiting and running sequences.
    pub fn queues(&self, waiting: u32, running: u32) {
        let NodeStats { waiting: w, running: r, .. } = self.node.stats();
        assert_eq!((w, r), (waiting, running), "waiting, running");
    }
}
