//! A prefill node on a bench: requests to give it, an engine that answers at once, and its outputs as text, one line
//! each.

use crate::machine::{PrefillConfig, PrefillInput, PrefillNode, PrefillOutput};
use ridge_protocol::stats::{BlockCounts, NodeStats};
use ridge_protocol::transfer::{KvPeer, Outcome, SendCommand, SendEvent, TransferTimes};
use ridge_protocol::wire::{NodeToRouter, PrefillRequest, RouterToNode};
use ridge_protocol::{
    BatchPlan, BlockShape, CacheDtype, Duration, Instant, Machine, NoToken, NodeName, PlanItem, RequestId,
    SamplingParams, TokenId, TokenOut,
};

/// Eight blocks of four tokens, two layers, a context that fills the pool, eight tokens a pass.
pub(super) fn config() -> PrefillConfig {
    PrefillConfig {
        blocks: 8,
        block_size: 4,
        layers: 2,
        vocab: 100,
        max_model_len: 32,
        max_batched_tokens: 8,
        max_running: 4,
        max_waiting: 2,
        ..PrefillConfig::default()
    }
}

pub(super) fn peer() -> KvPeer {
    peer_with(4)
}

/// A decode node whose blocks hold so many tokens.
pub(super) fn peer_with(block_size: u32) -> KvPeer {
    let blocks = BlockShape::new(block_size, CacheDtype::F32).expect("a block holds a token");
    KvPeer { name: NodeName("d1".into()), addr: "127.0.0.1:1".parse().expect("an address"), blocks }
}

/// A prompt that shares no block with a prompt of another number.
pub(super) fn prompt(id: u64, len: u32) -> PrefillRequest {
    let tokens: Vec<TokenId> = (0..len).map(|at| (id as u32 * 32 + at) % 90).collect();
    PrefillRequest {
        request: RequestId(id),
        to: Some(peer()),
        prompt_len: len,
        tokens,
        salt: 0,
        params: SamplingParams::greedy(10),
    }
}

/// A prompt that agrees with every other one as far as both go.
pub(super) fn shared(id: u64, len: u32) -> PrefillRequest {
    PrefillRequest { tokens: (0..len).collect(), ..prompt(id, len) }
}

/// Nobody continues it.
pub(super) fn alone(request: PrefillRequest) -> PrefillRequest {
    PrefillRequest { to: None, ..request }
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

pub(super) fn show_command(command: SendCommand) -> String {
    match command {
        SendCommand::Announce { .. } => unreachable!("not shown"),
        SendCommand::Begin(job) => {
            let blocks: Vec<u32> = job.blocks.iter().map(|b| b.0).collect();
            let (hashes, layers) = (job.hashes.len(), job.layers);
            let what = format!("{} tokens in {blocks:?}, {hashes} hashes, {layers} layers", job.tokens);
            format!("begin {} to {}: {what}", job.request, job.to.name)
        }
        SendCommand::Ready { request, layer, first, end } => format!("ready {request} layer {layer}: {first}..{end}"),
        SendCommand::Finish { request, first } => format!("finish {request} with {}", first.token),
        SendCommand::Cancel { request, reason } => format!("cancel {request}: {reason}"),
    }
}

pub(super) fn show(output: PrefillOutput) -> Option<String> {
    Some(match output {
        PrefillOutput::Run(plan) => format!("run {}", show_plan(&plan)),
        PrefillOutput::Transfer(SendCommand::Announce { .. }) => return None,
        PrefillOutput::Transfer(command) => show_command(command),
        PrefillOutput::ToRouter(NodeToRouter::Token { request, index, out, finish }) => {
            let finish = finish.map_or(String::new(), |reason| format!(", {reason:?}"));
            format!("token {request} #{index} {}{finish}", out.token)
        }
        PrefillOutput::ToRouter(NodeToRouter::Receipt { request, receipt }) => {
            assert_eq!((receipt.transferred, receipt.recomputed, receipt.transfer_bytes), (0, 0, 0));
            format!("receipt {request}: {} cached, {} computed", receipt.cached, receipt.computed)
        }
        PrefillOutput::ToRouter(NodeToRouter::Failed { request, error }) => format!("failed {request}: {error}"),
        PrefillOutput::ToRouter(NodeToRouter::Draining) => "draining".into(),
        PrefillOutput::ToRouter(NodeToRouter::Shipped { request, .. }) => format!("shipped {request}"),
        PrefillOutput::ToRouter(NodeToRouter::Drained) => "drained".into(),
        PrefillOutput::ToRouter(NodeToRouter::Stats(_) | NodeToRouter::CacheChanged { .. }) => return None,
        PrefillOutput::ToRouter(NodeToRouter::Moving { .. }) => panic!("only a decode node moves sequences"),
        PrefillOutput::ToRouter(NodeToRouter::Hello(_) | NodeToRouter::Links(_)) => panic!("these are the shell's"),
    })
}

/// A node, an engine that samples 42 each time, and what the node said since it was last asked.
pub(super) struct Bench {
    pub node: PrefillNode,
    pub now: Instant,
    pub pass: Option<BatchPlan>,
    pub seen: Vec<PrefillOutput>,
}

impl Bench {
    pub fn new(config: PrefillConfig) -> Self {
        Self { node: PrefillNode::new(config), now: Instant(0), pass: None, seen: vec![] }
    }

    pub fn feed(&mut self, input: PrefillInput) {
        self.node.handle(self.now, input);
        self.drain_outputs();
    }

    pub fn drain_outputs(&mut self) {
        while let Some(output) = self.node.poll_output() {
            if let PrefillOutput::Run(plan) = &output {
                assert!(self.pass.replace(plan.clone()).is_none(), "one pass at a time");
            }
            self.seen.push(output);
        }
        self.node.check_integrity();
        let BlockCounts { total, free, cached, used, reserved, held } = self.node.stats().blocks;
        assert_eq!(free + cached + used + reserved + held, total, "blocks are conserved");
    }

    pub fn router(&mut self, message: RouterToNode) {
        self.feed(PrefillInput::Router(message));
    }

    pub fn send(&mut self, request: PrefillRequest) {
        self.router(RouterToNode::Prefill(request));
    }

    pub fn cancel(&mut self, id: u64) {
        self.router(RouterToNode::Cancel { request: RequestId(id) });
    }

    pub fn layer(&mut self, layer: u32) {
        let step = self.pass.as_ref().expect("a pass runs").step;
        self.feed(PrefillInput::LayerDone { step, layer });
    }

    /// The running pass ends.
    pub fn step(&mut self) {
        self.step_gives(&Ok(out(42)));
    }

    /// The running pass ends, and gives everybody who samples this.
    pub fn step_gives(&mut self, given: &Result<TokenOut, NoToken>) {
        let plan = self.pass.take().expect("a pass runs");
        let sampled = plan.items.iter().filter(|item| item.sample.is_some());
        let outputs = sampled.map(|item| (item.request, given.clone())).collect();
        self.feed(PrefillInput::StepDone { step: plan.step, outputs, busy: Duration::from_micros(5) });
    }

    pub fn settled(&mut self, id: u64, outcome: Outcome) {
        self.feed(PrefillInput::Transfer(SendEvent::Settled { request: RequestId(id), outcome }));
    }

    pub fn committed(&mut self, id: u64) {
        self.settled(id, Outcome::Committed { pages: 1, bytes: 1, times: TransferTimes::default() });
    }

    pub fn aborted(&mut self, id: u64) {
        self.settled(id, Outcome::Aborted("link down".into()));
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
                PrefillOutput::ToRouter(NodeToRouter::Stats(_)) => reports += 1,
                PrefillOutput::ToRouter(NodeToRouter::CacheChanged { added, removed }) => {
                    changes.push((added.len(), removed.len()));
                }
                _ => {}
            }
        }
        (reports, changes)
    }

    /// Free, cached, used and held blocks.
    pub fn blocks(&self, want: [u32; 4]) {
        let BlockCounts { free, cached, used, held, .. } = self.node.stats().blocks;
        assert_eq!([free, cached, used, held], want, "free, cached, used, held");
    }

    /// Waiting and running prompts, and tokens still to compute.
    pub fn queues(&self, waiting: u32, running: u32, tokens: u64) {
        let NodeStats { waiting: w, running: r, queued_tokens, .. } = self.node.stats();
        assert_eq!((w, r, queued_tokens), (waiting, running, tokens), "waiting, running, tokens");
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
}
