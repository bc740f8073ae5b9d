//! [`PrefillNode`].

use super::PrefillConfig;
use super::phase::{Cause, Phase, step};
use ridge_blocks::{BlockPool, CacheChange, Claim, Lease, hash_blocks};
use ridge_protocol::stats::NodeStats;
use ridge_protocol::transfer::{Outcome, SendCommand, SendEvent, SendJob};
use ridge_protocol::wire::{FinishReason, NodeError, NodeToRouter, PrefillRequest, Receipt, RouterToNode};
use ridge_protocol::{
    BatchPlan, BlockHash, Duration, Instant, Machine, NoToken, PlanItem, Reader, RequestId, SampleSpec, SamplingParams,
    Step, TokenId, TokenOut,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Hashes in one message about the prefix cache.
const MAX_REPORTED_HASHES: usize = 1 << 15;
/// Between two reports.
const MIN_REPORT_INTERVAL: Duration = Duration::from_millis(20);
/// A pass of fewer prompt tokens is none to judge the node's speed by.
const MIN_PACE_TOKENS: u32 = 64;

/// What can happen to a prefill node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum PrefillInput {
    /// The router said something.
    Router(RouterToNode),
    /// The router has taken the node in: it knows nothing of the prefix cache.
    RouterUp,
    /// The router's connection is gone: every request of its belongs to nobody.
    RouterLost,
    /// The process is to stop: as [`RouterToNode::Drain`], and no router can call it off.
    Shutdown,
    /// The running pass has written one layer's KV.
    LayerDone {
        /// The pass.
        step: u64,
        /// The layer, from 0.
        layer: u32,
    },
    /// The running pass is over.
    StepDone {
        /// The pass.
        step: u64,
        /// Sampled tokens of the items that asked for one, or why there is none.
        outputs: Vec<(RequestId, Result<TokenOut, NoToken>)>,
        /// How long it took.
        busy: Duration,
    },
    /// The KV sender said something.
    Transfer(SendEvent),
}

/// What a prefill node wants done.
#[derive(Clone, Debug, Serialize)]
pub enum PrefillOutput {
    /// Tell the router.
    ToRouter(NodeToRouter),
    /// Run a pass. At most one runs at a time.
    Run(BatchPlan),
    /// Tell the KV sender.
    Transfer(SendCommand),
}

/// One prompt on its way through the node.
#[derive(Debug)]
struct Prompt {
    request: PrefillRequest,
    params: Arc<SamplingParams>,
    hashes: Vec<BlockHash>,
    /// `None` while waiting.
    lease: Option<Lease>,
    /// Tokens whose KV is in the blocks, cached ones included.
    computed: u32,
    /// Tokens found in the prefix cache.
    cached: u32,
    phase: Phase,
}

impl Prompt {
    fn len(&self) -> u32 {
        self.request.tokens.len() as u32
    }

    fn remaining(&self) -> u32 {
        self.len() - self.computed
    }

    /// Who gets its KV, if anybody.
    fn reader(&self) -> Option<Reader> {
        self.request.to.as_ref().map(|to| Reader { blocks: to.blocks, tokens: self.len() })
    }

    /// Hashes of its full blocks, were they of `size` tokens; this node's own hold `own`.
    fn hashes_in(&self, size: u32, own: u32) -> Vec<BlockHash> {
        if size == own {
            self.hashes.clone()
        } else {
            hash_blocks(self.request.salt, size as usize, &self.request.tokens)
        }
    }
}

/// The part of one prompt that the running pass computes.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    request: RequestId,
    start: u32,
    end: u32,
}

/// The scheduling machine of a prefill node.
#[derive(Debug)]
pub struct PrefillNode {
    config: PrefillConfig,
    pool: BlockPool,
    prompts: BTreeMap<RequestId, Prompt>,
    waiting: VecDeque<RequestId>,
    /// Admitted and not finished, oldest first.
    running: VecDeque<RequestId>,
    /// The pass in the engine.
    pass: Option<(u64, Vec<Chunk>)>,
    next_step: u64,
    draining: bool,
    stopping: bool,
    next_report: Instant,
    last_report: Instant,
    stats: NodeStats,
    outputs: VecDeque<PrefillOutput>,
}

impl PrefillNode {
    /// A node with an empty pool.
    pub fn new(config: PrefillConfig) -> Self {
        assert!(config.block_size > 0, "blocks hold at least one token");
        assert!(config.max_batched_tokens >= config.block_size, "a pass holds at least one block");
        assert!(config.max_running > 0, "at least one prompt is computed at a time");
        assert!(
            u64::from(config.blocks) * u64::from(config.block_size) >= u64::from(config.max_model_len),
            "the pool holds at least one sequence of max_model_len"
        );
        Self {
            pool: BlockPool::new(config.blocks, config.prefix_caching),
            config,
            prompts: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: VecDeque::new(),
            pass: None,
            next_step: 0,
            draining: false,
            stopping: false,
            next_report: Instant(0),
            last_report: Instant(0),
            stats: NodeStats::default(),
            outputs: VecDeque::new(),
        }
    }

    /// Whether no prompt is in the node.
    pub fn is_idle(&self) -> bool {
        self.prompts.is_empty() && self.pass.is_none()
    }

    fn on_router(&mut self, message: RouterToNode) {
        match message {
            RouterToNode::Prefill(request) => self.on_prefill(request),
            RouterToNode::Cancel { request } => self.cancel(request, "cancelled by the router"),
            RouterToNode::Drain => self.draining = true,
            RouterToNode::Decode(request) => {
                self.refuse(request.request, NodeError::Invalid("a prefill node cannot take a decode request".into()))
            }
            // Greetings are the shell's business; the others are about a decode node's sequences.
            RouterToNode::Welcome { .. } | RouterToNode::Refuse { .. } => {}
            RouterToNode::TransferFailed { .. } | RouterToNode::Move { .. } => {}
        }
    }

    fn on_prefill(&mut self, request: PrefillRequest) {
        let id = request.request;
        if self.step(id, Cause::Submit) == Step::Ignore {
            return;
        }
        if let Err(error) = self.check(&request) {
            return self.refuse(id, error);
        }
        let hashes = hash_blocks(request.salt, self.config.block_size as usize, &request.tokens);
        let prompt = Prompt {
            params: Arc::new(request.params.clone()),
            request,
            hashes,
            lease: None,
            computed: 0,
            cached: 0,
            phase: Phase::Waiting,
        };
        if let Some(to) = prompt.request.to.clone() {
            self.outputs.push_back(PrefillOutput::Transfer(SendCommand::Announce { request: id, to }));
        }
        self.prompts.insert(id, prompt);
        self.waiting.push_back(id);
    }

    fn check(&self, request: &PrefillRequest) -> Result<(), NodeError> {
        if self.draining {
            return Err(NodeError::Draining);
        }
        let (vocab, context) = (self.config.vocab, self.config.max_model_len);
        NodeError::check_request(&request.tokens, request.prompt_len, &request.params, vocab, context)?;
        if self.waiting.len() >= self.config.max_waiting {
            return Err(NodeError::Overloaded(format!("{} prompts are waiting", self.waiting.len())));
        }
        Ok(())
    }

    fn refuse(&mut self, request: RequestId, error: NodeError) {
        self.outputs.push_back(PrefillOutput::ToRouter(NodeToRouter::Failed { request, error }));
    }

    /// What an event means for a prompt now; a phase that it brings about is entered.
    ///
    /// # Panics
    ///
    /// If only a bug of ours can have brought it about.
    fn step(&mut self, id: RequestId, cause: Cause) -> Step<Phase> {
        let prompt = self.prompts.get_mut(&id);
        let phase = prompt.as_ref().map_or(Phase::Absent, |prompt| prompt.phase);
        let step = step(phase, cause);
        match step {
            Step::Enter(next) => {
                if let Some(prompt) = prompt {
                    prompt.phase = next;
                }
            }
            Step::End | Step::Ignore => {}
            Step::Violation | Step::Bug => panic!("{id}: {cause:?} while {phase:?}"),
        }
        step
    }

    /// Forgets a prompt; its blocks go now, or after the running pass if that writes them. Idempotent.
    fn cancel(&mut self, id: RequestId, reason: &str) {
        let step = self.step(id, if self.is_in_pass(id) { Cause::CancelInPass } else { Cause::Cancel });
        if step == Step::Ignore {
            return;
        }
        if self.prompts[&id].request.to.is_some() {
            let command = SendCommand::Cancel { request: id, reason: reason.into() };
            self.outputs.push_back(PrefillOutput::Transfer(command));
        }
        if step == Step::End {
            self.remove(id);
        }
    }

    fn is_in_pass(&self, id: RequestId) -> bool {
        self.pass.as_ref().is_some_and(|(_, chunks)| chunks.iter().any(|c| c.request == id))
    }

    fn remove(&mut self, id: RequestId) {
        if let Some(prompt) = self.prompts.remove(&id)
            && let Some(lease) = prompt.lease
        {
            self.pool.release(lease);
        }
        self.waiting.retain(|&r| r != id);
        self.running.retain(|&r| r != id);
    }

    fn on_layer(&mut self, step: u64, layer: u32) {
        let Some((_, chunks)) = self.pass.as_ref().filter(|(running, _)| *running == step) else {
            panic!("layer of pass {step} reported, which is not running");
        };
        for chunk in chunks {
            let prompt = &self.prompts[&chunk.request];
            let Some(reader) = prompt.reader().filter(|_| prompt.phase == Phase::Running) else { continue };
            // A chunk ends on one of this node's block boundaries unless it ends the prompt: of the receiver's blocks the
            // last one that it touches may be finished by a later chunk.
            let Range { start: first, end } = reader.completed(chunk.start, chunk.end);
            let request = chunk.request;
            if first < end {
                let ready = SendCommand::Ready { request, layer, first, end };
                self.outputs.push_back(PrefillOutput::Transfer(ready));
            }
        }
    }

    fn on_step(&mut self, step: u64, outputs: Vec<(RequestId, Result<TokenOut, NoToken>)>, busy: Duration) {
        let (running, chunks) = self.pass.take().expect("a pass that ends was started");
        assert_eq!(running, step, "the pass that ended is the one that ran");
        self.stats.steps += 1;
        self.stats.busy_us += busy.as_micros() as u64;
        let tokens = chunks.iter().map(|chunk| chunk.end - chunk.start).sum();
        // Short passes say little about prompts: they wait for the weights.
        if tokens >= MIN_PACE_TOKENS || self.stats.pace.prompt_token_ns == 0 {
            self.stats.pace.learn(tokens, 0, busy);
        }
        let mut outputs: BTreeMap<_, _> = outputs.into_iter().collect();
        for chunk in chunks {
            let prompt = self.prompts.get_mut(&chunk.request).expect("a prompt in a pass is kept");
            assert_eq!(prompt.computed, chunk.start, "chunks are computed in order");
            self.stats.computed_tokens += u64::from(chunk.end - chunk.start);
            prompt.computed = chunk.end;
            let lease = prompt.lease.as_ref().expect("a running prompt has blocks");
            let full = (chunk.end / self.config.block_size) as usize;
            let first = (chunk.start / self.config.block_size) as usize;
            for at in first..full {
                self.pool.publish(lease.blocks()[at], prompt.hashes[at]);
            }
            if prompt.phase == Phase::Doomed {
                assert_eq!(self.step(chunk.request, Cause::PassOver), Step::End);
                outputs.remove(&chunk.request);
                self.remove(chunk.request);
            } else if prompt.remaining() == 0 {
                match outputs.remove(&chunk.request).expect("the last chunk samples") {
                    Ok(first) => self.finish(chunk.request, first),
                    Err(reason) => self.give_up(chunk.request, reason),
                }
            }
        }
        assert!(outputs.is_empty(), "the engine sampled for a prompt that did not ask");
    }

    /// The prompt is computed, and no token may follow it. It would be the same elsewhere: the request itself cannot go on.
    fn give_up(&mut self, id: RequestId, NoToken(reason): NoToken) {
        self.step(id, Cause::NoToken);
        if self.prompts[&id].request.to.is_some() {
            let command = SendCommand::Cancel { request: id, reason: reason.clone() };
            self.outputs.push_back(PrefillOutput::Transfer(command));
        }
        self.remove(id);
        self.refuse(id, NodeError::Invalid(reason));
    }

    /// The prompt is computed: report, and hold its blocks until the hand-off is settled.
    fn finish(&mut self, id: RequestId, out: TokenOut) {
        let prompt = self.prompts.get_mut(&id).expect("a prompt in a pass is kept");
        self.running.retain(|&r| r != id);
        self.stats.generated_tokens += 1;
        let receipt = Receipt { cached: prompt.cached, computed: prompt.len() - prompt.cached, ..Receipt::default() };
        let index = prompt.len() - prompt.request.prompt_len;
        let finish = if out.ends || prompt.params.is_stop(out.token) {
            Some(FinishReason::Stop)
        } else if index + 1 >= prompt.params.max_tokens || prompt.len() + 1 >= self.config.max_model_len {
            Some(FinishReason::Length)
        } else {
            None
        };
        let wanted = prompt.request.to.is_some();
        self.outputs.push_back(PrefillOutput::ToRouter(NodeToRouter::Receipt { request: id, receipt }));
        self.outputs.push_back(PrefillOutput::ToRouter(NodeToRouter::Token {
            request: id,
            index,
            out: out.clone(),
            finish,
        }));
        if self.step(id, if wanted { Cause::Finish } else { Cause::FinishAlone }) == Step::Enter(Phase::Held) {
            let prompt = self.prompts.get_mut(&id).expect("a held prompt is kept");
            let lease = prompt.lease.as_mut().expect("a finished prompt has blocks");
            self.pool.reclaim(lease, Claim::Held);
            self.outputs.push_back(PrefillOutput::Transfer(SendCommand::Finish { request: id, first: out }));
        } else {
            self.remove(id);
        }
    }

    fn on_transfer(&mut self, event: SendEvent) {
        let SendEvent::Settled { request, outcome } = event;
        let cause = match outcome {
            Outcome::Committed { .. } => Cause::Commit,
            Outcome::Aborted(_) if self.is_in_pass(request) => Cause::AbortInPass,
            Outcome::Aborted(_) => Cause::Abort,
        };
        let step = self.step(request, cause);
        if step == Step::Ignore {
            return;
        }
        self.outputs.push_back(PrefillOutput::ToRouter(match outcome {
            Outcome::Committed { times, .. } => NodeToRouter::Shipped { request, times },
            // The decode node decides what becomes of the sequence; what is computed so far stays cached.
            Outcome::Aborted(reason) => NodeToRouter::Failed { request, error: NodeError::Transfer(reason) },
        }));
        if step == Step::End {
            self.remove(request);
        }
    }

    /// Admits waiting prompts, oldest first, while blocks and places last.
    fn admit(&mut self) {
        while self.running.len() < self.config.max_running {
            let Some(&id) = self.waiting.front() else { return };
            let block_size = self.config.block_size;
            let prompt = self.prompts.get_mut(&id).expect("a waiting prompt is kept");
            // The last token is always computed: its logits are what the prompt is run for.
            let reusable = ((prompt.len() - 1) / block_size) as usize;
            let blocks = prompt.len().div_ceil(block_size) as usize;
            let Ok((lease, cached)) = self.pool.lease(Claim::Used, &prompt.hashes, reusable, blocks) else { return };
            prompt.cached = cached as u32 * block_size;
            prompt.computed = prompt.cached;
            self.stats.cached_tokens += u64::from(prompt.cached);
            if let Some(to) = prompt.request.to.clone() {
                let end = to.blocks.filled_blocks(prompt.cached, prompt.len());
                self.outputs.push_back(PrefillOutput::Transfer(SendCommand::Begin(SendJob {
                    request: id,
                    tokens: prompt.len(),
                    blocks: lease.blocks().to_vec(),
                    hashes: prompt.hashes_in(to.blocks.block_size(), block_size),
                    layers: self.config.layers,
                    to,
                })));
                for layer in (0..self.config.layers).filter(|_| end > 0) {
                    let ready = SendCommand::Ready { request: id, layer, first: 0, end };
                    self.outputs.push_back(PrefillOutput::Transfer(ready));
                }
            }
            prompt.lease = Some(lease);
            self.step(id, Cause::Admit);
            self.waiting.pop_front();
            self.running.push_back(id);
        }
    }

    /// Fills one pass with chunks of the running prompts, oldest first, under the token budget.
    fn plan(&mut self) {
        self.admit(); // Offers need not wait for the end of a pass.
        if self.pass.is_some() {
            return;
        }
        let block_size = self.config.block_size;
        let mut budget = self.config.max_batched_tokens;
        let mut chunks = Vec::new();
        let mut items = Vec::new();
        for &id in &self.running {
            let prompt = &self.prompts[&id];
            let mut take = prompt.remaining().min(budget);
            if take < prompt.remaining() {
                take -= (prompt.computed + take) % block_size; // End on a block boundary.
            }
            if take == 0 || take > budget {
                break;
            }
            budget -= take;
            let (start, end) = (prompt.computed, prompt.computed + take);
            chunks.push(Chunk { request: id, start, end });
            items.push(item(prompt, start, end, block_size));
        }
        if items.is_empty() {
            return;
        }
        self.next_step += 1;
        self.pass = Some((self.next_step, chunks));
        self.outputs.push_back(PrefillOutput::Run(BatchPlan { step: self.next_step, items }));
    }

    fn report(&mut self, now: Instant) {
        self.last_report = now;
        self.next_report = now + self.config.report_interval;
        for CacheChange { added, removed } in self.pool.take_changes().split(MAX_REPORTED_HASHES) {
            let message = NodeToRouter::CacheChanged { added, removed };
            self.outputs.push_back(PrefillOutput::ToRouter(message));
        }
        let stats = self.stats();
        self.outputs.push_back(PrefillOutput::ToRouter(NodeToRouter::Stats(stats)));
        if self.draining && self.is_idle() {
            self.outputs.push_back(PrefillOutput::ToRouter(NodeToRouter::Drained));
        }
    }

    /// Counters and gauges now. Those of the KV transfer are the sender's and left at zero.
    pub fn stats(&self) -> NodeStats {
        NodeStats {
            blocks: self.pool.counts(),
            orphaned_blocks: self.pool.check_integrity(self.leases()),
            waiting: self.waiting.len() as u32,
            running: self.running.len() as u32,
            queued_tokens: self
                .prompts
                .values()
                .filter(|p| p.phase != Phase::Held)
                .map(|p| u64::from(p.remaining()))
                .sum(),
            ..self.stats
        }
    }

    fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.prompts.values().filter_map(|p| p.lease.as_ref())
    }

    /// After every event: start what can be started; say so when the last request is gone.
    fn settle(&mut self, now: Instant, was_idle: bool) {
        self.plan();
        if self.is_idle() && !was_idle {
            // At once, so that an idle node's gauges are true; but a report costs a walk over all blocks.
            let earliest = self.last_report + MIN_REPORT_INTERVAL;
            if now >= earliest || self.draining {
                self.report(now);
            } else {
                self.next_report = self.next_report.min(earliest);
            }
        }
    }
}

fn item(prompt: &Prompt, start: u32, end: u32, block_size: u32) -> PlanItem {
    let tokens: &[TokenId] = &prompt.request.tokens;
    let lease = prompt.lease.as_ref().expect("a running prompt has blocks");
    let sample = (end as usize == tokens.len()).then(|| SampleSpec {
        params: prompt.params.clone(),
        history: if prompt.params.needs_history() { tokens.to_vec() } else { Vec::new() },
        prompt_len: prompt.request.prompt_len,
        position: end,
    });
    PlanItem {
        request: prompt.request.request,
        tokens: tokens[start as usize..end as usize].to_vec(),
        start,
        block_table: lease.blocks()[..end.div_ceil(block_size) as usize].to_vec(),
        sample,
        reader: prompt.reader(),
    }
}

impl Machine for PrefillNode {
    type Input = PrefillInput;
    type Output = PrefillOutput;

    fn handle(&mut self, now: Instant, input: PrefillInput) {
        let was_idle = self.is_idle();
        match input {
            PrefillInput::Router(message) => self.on_router(message),
            PrefillInput::RouterLost => {
                for id in self.prompts.keys().copied().collect::<Vec<_>>() {
                    self.cancel(id, "the router's connection is gone");
                }
                self.draining = self.stopping;
            }
            PrefillInput::RouterUp => self.pool.announce_all(),
            PrefillInput::Shutdown => {
                self.draining = true;
                self.stopping = true;
                self.outputs.push_back(PrefillOutput::ToRouter(NodeToRouter::Draining));
            }
            PrefillInput::LayerDone { step, layer } => self.on_layer(step, layer),
            PrefillInput::StepDone { step, outputs, busy } => self.on_step(step, outputs, busy),
            PrefillInput::Transfer(event) => self.on_transfer(event),
        }
        self.settle(now, was_idle);
    }

    fn handle_timeout(&mut self, now: Instant) {
        if now >= self.next_report {
            self.report(now);
        }
    }

    fn poll_output(&mut self) -> Option<PrefillOutput> {
        self.outputs.pop_front()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.next_report)
    }

    fn check_integrity(&self) {
        assert_eq!(self.pool.check_integrity(self.leases()), 0, "orphaned blocks");
        for id in self.waiting.iter().chain(&self.running) {
            assert!(self.prompts.contains_key(id), "{id} is queued but unknown");
        }
        for (id, prompt) in &self.prompts {
            let (waiting, running) = (self.waiting.contains(id), self.running.contains(id));
            let claim = prompt.lease.as_ref().map(Lease::claim);
            let want = match prompt.phase {
                Phase::Absent => panic!("{id} is kept although it is over"),
                Phase::Waiting => (true, false, None),
                Phase::Running | Phase::Doomed => (false, true, Some(Claim::Used)),
                Phase::Held => (false, false, Some(Claim::Held)),
            };
            assert_eq!((waiting, running, claim), want, "{id} is lost");
            assert!(prompt.computed <= prompt.len(), "{id} computed more than it has");
        }
        if self.is_idle() {
            let counts = self.pool.counts();
            assert_eq!(counts.used + counts.reserved + counts.held, 0, "an idle node refers to no block");
        }
    }
}
