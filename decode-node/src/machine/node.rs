//! [`DecodeNode`].

use super::DecodeConfig;
use super::phase::{Cause, Phase, step};
use super::sequence::{Move, Sequence};
use ridge_blocks::{BlockPool, CacheChange, Claim, Lease};
use ridge_protocol::stats::NodeStats;
use ridge_protocol::transfer::{
    KvPeer, Outcome, ReceiveCommand, ReceiveEvent, ReceiveJob, SendCommand, SendEvent, SendJob,
};
use ridge_protocol::wire::{DecodeRequest, FinishReason, NodeError, NodeToRouter, RouterToNode};
use ridge_protocol::{BatchPlan, Duration, Instant, Machine, NoToken, RequestId, Step, TokenOut};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Hashes in one message about the prefix cache.
const MAX_REPORTED_HASHES: usize = 1 << 15;
/// Between two reports.
const MIN_REPORT_INTERVAL: Duration = Duration::from_millis(20);
/// Between a node's last sequence and the word that it is drained: what the router called off here may come back as a last resort.
const DRAINED_AFTER: Duration = Duration::from_millis(100);
/// The same after a move that failed: its next node may be dead, and the router hears of that at its own time.
const DRAINED_AFTER_FAILED_MOVE: Duration = Duration::from_secs(2);
/// Prompt tokens beside decoding sequences in a pass, while it is not known what they cost.
const FIRST_PROMPT_TOKENS: u32 = 16;

/// What can happen to a decode node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum DecodeInput {
    /// The router said something.
    Router(RouterToNode),
    /// The router has taken the node in: it knows nothing of the prefix cache.
    RouterUp,
    /// The router's connection is gone: every sequence of its belongs to nobody.
    RouterLost,
    /// The process is to stop: as [`RouterToNode::Drain`], and no router can call it off.
    Shutdown,
    /// The running pass is over.
    StepDone {
        /// The pass.
        step: u64,
        /// Sampled tokens of the items that asked for one, or why there is none.
        outputs: Vec<(RequestId, Result<TokenOut, NoToken>)>,
        /// How long it took.
        busy: Duration,
    },
    /// The KV receiver said something.
    Transfer(ReceiveEvent),
    /// The KV sender said something: sequences leave a node that drains.
    Sent(SendEvent),
}

/// What a decode node wants done.
#[derive(Clone, Debug, Serialize)]
pub enum DecodeOutput {
    /// Tell the router.
    ToRouter(NodeToRouter),
    /// Run a pass. At most one runs at a time.
    Run(BatchPlan),
    /// Tell the KV receiver.
    Transfer(ReceiveCommand),
    /// Tell the KV sender.
    Send(SendCommand),
}

/// The scheduling machine of a decode node.
#[derive(Debug)]
pub struct DecodeNode {
    config: DecodeConfig,
    pool: BlockPool,
    sequences: BTreeMap<RequestId, Sequence>,
    /// Without blocks; preempted ones first, then by arrival.
    waiting: VecDeque<RequestId>,
    /// In the batch, by admission: the last is preempted first.
    running: Vec<RequestId>,
    /// The pass in the engine: what it computes of whom.
    pass: Option<(u64, Vec<(RequestId, u32)>)>,
    next_step: u64,
    draining: bool,
    stopping: bool,
    /// Before that, a node that drains and has nothing does not say so.
    drained_at: Instant,
    next_report: Instant,
    last_report: Instant,
    stats: NodeStats,
    outputs: VecDeque<DecodeOutput>,
}

impl DecodeNode {
    /// A node with an empty pool.
    pub fn new(config: DecodeConfig) -> Self {
        assert!(config.block_size > 0, "blocks hold at least one token");
        assert!(config.max_num_seqs > 0, "a batch holds at least one sequence");
        assert!(config.max_prefill_tokens > 0, "a prompt computed here must make progress");
        assert!(
            u64::from(config.blocks) * u64::from(config.block_size) >= u64::from(config.max_model_len),
            "the pool holds at least one sequence of max_model_len"
        );
        Self {
            pool: BlockPool::new(config.blocks, config.prefix_caching),
            config,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            pass: None,
            next_step: 0,
            draining: false,
            stopping: false,
            drained_at: Instant(0),
            next_report: Instant(0),
            last_report: Instant(0),
            stats: NodeStats::default(),
            outputs: VecDeque::new(),
        }
    }

    /// Whether no sequence is in the node.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.pass.is_none()
    }

    fn on_router(&mut self, message: RouterToNode) {
        match message {
            RouterToNode::Decode(request) => self.on_decode(request),
            RouterToNode::Cancel { request } => self.cancel(request, "cancelled by the router"),
            RouterToNode::TransferFailed { request, reason } => self.on_no_transfer(request, &reason),
            RouterToNode::Drain => self.draining = true,
            RouterToNode::Move { request, next, to } => self.on_move(request, next, to),
            RouterToNode::Prefill(request) => {
                let error = NodeError::Invalid("a decode node cannot take a prefill request".into());
                self.tell_router(NodeToRouter::Failed { request: request.request, error });
            }
            // Greetings are the shell's business.
            RouterToNode::Welcome { .. } | RouterToNode::Refuse { .. } => {}
        }
    }

    fn on_decode(&mut self, request: DecodeRequest) {
        let id = request.request;
        if self.step(id, Cause::Submit) == Step::Ignore {
            return;
        }
        if let Err(error) = self.check(&request) {
            return self.tell_router(NodeToRouter::Failed { request: id, error });
        }
        self.sequences.insert(id, Sequence::new(request, self.config.block_size));
        self.waiting.push_back(id);
    }

    fn check(&self, request: &DecodeRequest) -> Result<(), NodeError> {
        if self.draining && !request.last_resort {
            return Err(NodeError::Draining);
        }
        let (vocab, context) = (self.config.vocab, self.config.max_model_len);
        NodeError::check_request(&request.tokens, request.prompt_len, &request.params, vocab, context)?;
        if self.waiting.len() >= self.config.max_waiting {
            return Err(NodeError::Overloaded(format!("{} sequences are waiting", self.waiting.len())));
        }
        Ok(())
    }

    fn tell_router(&mut self, message: NodeToRouter) {
        self.outputs.push_back(DecodeOutput::ToRouter(message));
    }

    /// What an event means for a sequence now; a phase that it brings about is entered.
    ///
    /// # Panics
    ///
    /// If only a bug of ours can have brought it about.
    fn step(&mut self, id: RequestId, cause: Cause) -> Step<Phase> {
        let sequence = self.sequences.get_mut(&id);
        let phase = sequence.as_ref().map_or(Phase::Absent, |sequence| sequence.phase);
        let step = step(phase, cause);
        match step {
            Step::Enter(next) => {
                if let Some(sequence) = sequence {
                    sequence.phase = next;
                }
            }
            Step::End | Step::Ignore => {}
            Step::Violation | Step::Bug => panic!("{id}: {cause:?} while {phase:?}"),
        }
        step
    }

    fn phase(&self, id: RequestId) -> Phase {
        self.sequences.get(&id).map_or(Phase::Absent, |sequence| sequence.phase)
    }

    /// Forgets a sequence; its blocks go now, or after the running pass if that writes them. Idempotent.
    fn cancel(&mut self, id: RequestId, reason: &str) {
        let in_pass = self.pass.as_ref().is_some_and(|(_, items)| items.iter().any(|(r, _)| *r == id));
        let (phase, reason) = (self.phase(id), reason.to_owned());
        let step = self.step(id, if in_pass { Cause::CancelInPass } else { Cause::Cancel });
        if step != Step::End {
            return;
        }
        match phase {
            Phase::Transferring => {
                let command = ReceiveCommand::Cancel { request: id, reason };
                self.outputs.push_back(DecodeOutput::Transfer(command));
            }
            Phase::Moving => {
                let command = SendCommand::Cancel { request: id, reason };
                self.outputs.push_back(DecodeOutput::Send(command));
            }
            Phase::Absent | Phase::Waiting | Phase::Running | Phase::Doomed => {}
        }
        self.remove(id);
    }

    fn remove(&mut self, id: RequestId) {
        if let Some(sequence) = self.sequences.remove(&id)
            && let Some(lease) = sequence.lease
        {
            self.pool.release(lease);
        }
        self.waiting.retain(|&r| r != id);
        self.running.retain(|&r| r != id);
    }

    fn on_transfer(&mut self, event: ReceiveEvent) {
        match event {
            ReceiveEvent::Landed { request, first, bytes, .. } => self.on_landed(request, first, bytes),
            ReceiveEvent::Failed { request, reason: _ } => self.compute_here(request, Cause::Fail),
        }
    }

    /// The router knows of a failed hand-off that this node may not have heard of.
    fn on_no_transfer(&mut self, id: RequestId, reason: &str) {
        if self.phase(id) == Phase::Transferring {
            let command = ReceiveCommand::Cancel { request: id, reason: reason.into() };
            self.outputs.push_back(DecodeOutput::Transfer(command));
        }
        self.compute_here(id, Cause::FailAfar);
    }

    /// Gives up a hand-off, if there is one still, and computes the prompt here: the client sees a pause, not an error. The
    /// receipt and `recomputed_tokens` tell that it happened (rule C-8).
    fn compute_here(&mut self, id: RequestId, cause: Cause) {
        let transferring = self.phase(id) == Phase::Transferring;
        // All of it was cached, but its last token must be run for its logits, and that would write into a block
        // that others read. Admitted anew, it gets a block of its own.
        let whole = transferring && self.sequences[&id].remaining() == 0;
        if self.step(id, if whole { Cause::FailWhole } else { cause }) == Step::Ignore {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("a sequence that goes on is kept");
        if sequence.from.take().is_some() {
            sequence.again_until = sequence.given;
        }
        if whole {
            let lease = sequence.lease.take().expect("a sequence in transfer has blocks");
            self.pool.release(lease);
            self.waiting.push_front(id);
        } else if transferring {
            self.start(id);
        }
    }

    /// A reservation's KV is complete and verified: commit it.
    fn on_landed(&mut self, id: RequestId, first: TokenOut, bytes: u64) {
        if first.token >= self.config.vocab {
            // A peer's word is input like any other; what it sends is not believed further than this.
            return self.compute_here(id, Cause::Fail);
        }
        if self.step(id, Cause::Land) == Step::Ignore {
            return;
        }
        let sequence = self.sequences.get_mut(&id).expect("a sequence that landed is kept");
        sequence.receipt.transferred = sequence.given - sequence.receipt.cached;
        sequence.receipt.transfer_bytes = bytes;
        sequence.computed = sequence.given;
        self.start(id);
        self.publish(id);
        self.send_receipt(id);
        // The prefill node has reported this token too; whichever comes first is shown.
        self.on_token(id, first);
    }

    /// Puts a sequence that has its blocks into the batch.
    fn start(&mut self, id: RequestId) {
        let sequence = self.sequences.get_mut(&id).expect("a started sequence is kept");
        let lease = sequence.lease.as_mut().expect("a started sequence has blocks");
        self.pool.reclaim(lease, Claim::Used);
        self.running.push(id);
    }

    /// Offers the sequence's newly full blocks to the prefix index.
    fn publish(&mut self, id: RequestId) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is kept");
        let lease = sequence.lease.as_ref().expect("a running sequence has blocks");
        let full = (sequence.computed / self.config.block_size) as usize;
        for at in sequence.published..full {
            self.pool.publish(lease.blocks()[at], sequence.hashes[at]);
        }
        sequence.published = full.max(sequence.published);
    }

    fn send_receipt(&mut self, id: RequestId) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is kept");
        if !sequence.receipt_sent {
            sequence.receipt_sent = true;
            let message = NodeToRouter::Receipt { request: id, receipt: sequence.receipt };
            self.outputs.push_back(DecodeOutput::ToRouter(message));
        }
    }

    fn on_token(&mut self, id: RequestId, out: TokenOut) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is kept");
        let finish = sequence.push(out.clone(), self.config.max_model_len);
        let index = sequence.last_index();
        self.tell_router(NodeToRouter::Token { request: id, index, out, finish });
        if let Some(FinishReason::Stop | FinishReason::Length) = finish {
            self.step(id, Cause::Finish);
            self.remove(id);
        }
    }

    fn on_step(&mut self, step: u64, outputs: Vec<(RequestId, Result<TokenOut, NoToken>)>, busy: Duration) {
        let (running, items) = self.pass.take().expect("a pass that ends was started");
        assert_eq!(running, step, "the pass that ended is the one that ran");
        self.stats.steps += 1;
        self.stats.busy_us += busy.as_micros() as u64;
        self.learn_pace(&items, busy);
        let mut outputs: BTreeMap<_, _> = outputs.into_iter().collect();
        for (id, take) in items {
            let sequence = self.sequences.get_mut(&id).expect("a sequence in a pass is kept");
            let before = sequence.computed;
            sequence.computed += take;
            // Positions below `given` are prompt work; the others are the answer being continued.
            let again = sequence.computed.min(sequence.again_until).saturating_sub(before);
            let prompt = sequence.computed.min(sequence.given).saturating_sub(before);
            sequence.receipt.recomputed += again.min(prompt);
            sequence.receipt.computed += prompt - again.min(prompt);
            self.stats.recomputed_tokens += u64::from(again);
            self.stats.computed_tokens += u64::from(prompt - again.min(prompt));
            let finished = sequence.remaining() == 0;
            let doomed = sequence.phase == Phase::Doomed;
            self.publish(id);
            if doomed {
                self.step(id, Cause::PassOver);
                outputs.remove(&id);
                self.remove(id);
            } else if finished {
                self.send_receipt(id);
                match outputs.remove(&id).expect("an item that reaches the end samples") {
                    Ok(out) => {
                        self.stats.generated_tokens += 1;
                        self.on_token(id, out);
                    }
                    Err(NoToken(reason)) => {
                        // It would be the same elsewhere: the request itself cannot go on.
                        self.step(id, Cause::NoToken);
                        self.tell_router(NodeToRouter::Failed { request: id, error: NodeError::Invalid(reason) });
                        self.remove(id);
                    }
                }
            }
        }
        assert!(outputs.is_empty(), "the engine sampled for a sequence that did not ask");
    }

    /// Another node is to continue a sequence. It leaves when its KV is whole: between two passes, after a first token.
    fn on_move(&mut self, id: RequestId, next: RequestId, to: KvPeer) {
        match self.step(id, Cause::Move) {
            Step::End => {
                self.remove(id);
                self.tell_router(NodeToRouter::Failed { request: id, error: NodeError::Draining });
            }
            Step::Ignore => {}
            _ => {
                let sequence = self.sequences.get_mut(&id).expect("a sequence that is to move is kept");
                sequence.moving = Some(Move { next, to });
            }
        }
    }

    /// Offers the KV of sequences that can leave. No pass may be running.
    fn move_away(&mut self) {
        let leaving: Vec<RequestId> = self.running.iter().filter(|id| self.sequences[id].can_move()).copied().collect();
        for id in leaving {
            let sequence = self.sequences.get_mut(&id).expect("a running sequence is kept");
            let Move { next, to } = sequence.moving.take().expect("only what is to move can move");
            if self.sequences.contains_key(&next) {
                continue; // A router never uses a number twice. What it meant is unclear: the sequence stays.
            }
            self.step(id, Cause::Leave);
            self.running.retain(|&r| r != id);
            let mut sequence = self.sequences.remove(&id).expect("just seen");
            let first = sequence.last.clone().expect("a sequence that can move has said a token");
            self.tell_router(NodeToRouter::Moving { request: id, len: sequence.len() });
            // The last token's KV was never computed. The receiver gets the token as a prefill node would hand it over.
            let (tokens, block_size) = (sequence.computed, self.config.block_size);
            let lease = sequence.lease.as_mut().expect("a running sequence has blocks");
            self.pool.reclaim(lease, Claim::Held);
            let blocks = lease.blocks()[..Sequence::blocks_for(tokens, block_size)].to_vec();
            let (layers, end) = (self.config.layers, to.blocks.filled_blocks(tokens, tokens));
            let hashes = sequence.computed_hashes(to.blocks.block_size(), block_size);
            let announce = SendCommand::Announce { request: next, to: to.clone() };
            let job = SendJob { request: next, to, tokens, blocks, hashes, layers };
            let ready = (0..layers).map(|layer| SendCommand::Ready { request: next, layer, first: 0, end });
            let commands = [announce, SendCommand::Begin(job)].into_iter().chain(ready);
            let commands = commands.chain([SendCommand::Finish { request: next, first }]);
            self.outputs.extend(commands.map(DecodeOutput::Send));
            self.sequences.insert(next, sequence);
        }
    }

    /// A sequence that left has arrived, or has not: then its next node computes it again.
    fn on_sent(&mut self, now: Instant, event: SendEvent) {
        let SendEvent::Settled { request, outcome } = event;
        if self.step(request, Cause::Settle) == Step::Ignore {
            return;
        }
        let message = match outcome {
            Outcome::Committed { times, .. } => NodeToRouter::Shipped { request, times },
            Outcome::Aborted(reason) => {
                self.drained_at = now + DRAINED_AFTER_FAILED_MOVE;
                NodeToRouter::Failed { request, error: NodeError::Transfer(reason) }
            }
        };
        self.tell_router(message);
        self.remove(request);
    }

    fn learn_pace(&mut self, items: &[(RequestId, u32)], busy: Duration) {
        let prompt = items.iter().map(|(_, take)| *take).filter(|take| *take > 1).sum();
        let decoding = items.iter().filter(|(_, take)| *take == 1).count() as u32;
        self.stats.pace.learn(prompt, decoding, busy);
    }

    /// Prompt tokens that the next pass may compute: fewer beside others, who must not wait for their tokens much longer
    /// than without.
    fn prompt_budget(&self) -> u32 {
        let most = self.config.max_prefill_tokens;
        if self.running.iter().all(|id| self.sequences[id].remaining() > 1) {
            return most;
        }
        let within = self.stats.pace.tokens_within(self.config.max_step_stretch).unwrap_or(FIRST_PROMPT_TOKENS.into());
        within.clamp(1, most.into()) as u32
    }

    /// Admits waiting sequences, oldest first, while blocks and places last.
    fn admit(&mut self) {
        while let Some(&id) = self.waiting.front() {
            let placed = self.sequences.len() - self.waiting.len();
            let (running, transferring) = (self.running.len(), placed - self.running.len());
            let block_size = self.config.block_size;
            let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is kept");
            // Prompts that are still being computed elsewhere must not keep others out of the batch.
            let taken = if sequence.from.is_some() { transferring } else { running };
            if taken >= self.config.max_num_seqs {
                return;
            }
            // Room for the next token too: a sequence that could not take one step would only be preempted.
            let blocks = Sequence::blocks_for((sequence.len() + 1).min(self.config.max_model_len), block_size);
            let headroom = if placed == 0 { 0 } else { self.config.headroom_blocks * placed };
            // What arrives by transfer comes with its first token; what is computed here must compute the last one.
            let reusable = match sequence.from {
                Some(_) => sequence.hashes.len(),
                None => ((sequence.len() - 1) / block_size) as usize,
            };
            if !self.pool.can_lease(&sequence.hashes, reusable, blocks, headroom) {
                return;
            }
            let claim = if sequence.from.is_some() { Claim::Reserved } else { Claim::Used };
            let leased = self.pool.lease(claim, &sequence.hashes, reusable, blocks);
            let (lease, cached) = leased.expect("the pool said that it can");
            self.waiting.pop_front();
            sequence.computed = cached as u32 * block_size;
            sequence.published = cached;
            if !sequence.admitted {
                sequence.admitted = true;
                sequence.receipt.cached = sequence.computed.min(sequence.given);
                self.stats.cached_tokens += u64::from(sequence.receipt.cached);
            }
            let prompt_blocks = Sequence::blocks_for(sequence.len(), block_size);
            if let Some(from) = sequence.from.clone() {
                let job = ReceiveJob {
                    request: id,
                    from,
                    tokens: sequence.len(),
                    blocks: lease.blocks()[..prompt_blocks].to_vec(),
                    hashes: sequence.hashes.clone(),
                    have: cached as u32,
                    layers: self.config.layers,
                };
                sequence.lease = Some(lease);
                self.step(id, Cause::Reserve);
                self.outputs.push_back(DecodeOutput::Transfer(ReceiveCommand::Expect(job)));
            } else {
                sequence.lease = Some(lease);
                self.step(id, Cause::Admit);
                self.start(id);
            }
        }
    }

    /// Pushes the last admitted sequence out of the batch to make room. It will be computed again, from whatever
    /// of it is then still cached.
    fn preempt_last(&mut self) {
        let id = self.running.pop().expect("a batch that needs blocks is not empty");
        self.step(id, Cause::Preempt);
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is kept");
        let lease = sequence.lease.take().expect("a running sequence has blocks");
        self.pool.release(lease);
        sequence.from = None;
        sequence.again_until = sequence.again_until.max(sequence.computed);
        sequence.computed = 0;
        sequence.published = 0;
        self.waiting.push_front(id);
        self.stats.preemptions += 1;
    }

    /// Gives every decoding sequence the block that its next token needs, oldest first.
    fn grow(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            let sequence = self.sequences.get_mut(&self.running[at]).expect("a running sequence is kept");
            let needed = Sequence::blocks_for(sequence.len(), self.config.block_size);
            let lease = sequence.lease.as_mut().expect("a running sequence has blocks");
            let extra = needed.saturating_sub(lease.blocks().len());
            if self.pool.grow(lease, extra).is_ok() {
                at += 1;
            } else {
                // The youngest goes, which may be this one; then look again.
                self.preempt_last();
            }
        }
    }

    /// One decode step of every running sequence, and chunks of prompts to be computed here under their budget.
    fn plan(&mut self) {
        if self.pass.is_some() {
            return self.admit(); // Reservations need not wait for the end of a step.
        }
        self.move_away();
        self.grow();
        self.admit();
        let block_size = self.config.block_size;
        let mut budget = self.prompt_budget();
        let mut chosen = Vec::new();
        let mut items = Vec::new();
        for &id in &self.running {
            if items.len() == self.config.max_num_seqs {
                break;
            }
            let sequence = &self.sequences[&id];
            let take = if sequence.remaining() == 1 { 1 } else { sequence.remaining().min(budget) };
            if take == 0 {
                continue;
            }
            if sequence.remaining() > 1 {
                budget -= take;
            }
            chosen.push((id, take));
            items.push(sequence.item(take, block_size));
        }
        if items.is_empty() {
            return;
        }
        self.next_step += 1;
        self.pass = Some((self.next_step, chosen));
        self.outputs.push_back(DecodeOutput::Run(BatchPlan { step: self.next_step, items }));
    }

    fn report(&mut self, now: Instant) {
        self.last_report = now;
        self.next_report = now + self.config.report_interval;
        for CacheChange { added, removed } in self.pool.take_changes().split(MAX_REPORTED_HASHES) {
            let message = NodeToRouter::CacheChanged { added, removed };
            self.tell_router(message);
        }
        let stats = self.stats();
        self.tell_router(NodeToRouter::Stats(stats));
        if self.draining && self.is_idle() {
            if now >= self.drained_at {
                self.tell_router(NodeToRouter::Drained);
            } else {
                self.next_report = self.next_report.min(self.drained_at);
            }
        }
    }

    /// Counters and gauges now. Those of the KV transfer are the receiver's and left at zero.
    pub fn stats(&self) -> NodeStats {
        NodeStats {
            blocks: self.pool.counts(),
            orphaned_blocks: self.pool.check_integrity(self.leases()),
            waiting: self.waiting.len() as u32,
            running: self.running.len() as u32,
            queued_tokens: self.running.iter().map(|id| u64::from(self.sequences[id].remaining() - 1)).sum(),
            ..self.stats
        }
    }

    fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.sequences.values().filter_map(|s| s.lease.as_ref())
    }
}

impl Machine for DecodeNode {
    type Input = DecodeInput;
    type Output = DecodeOutput;

    fn handle(&mut self, now: Instant, input: DecodeInput) {
        let was_idle = self.is_idle();
        match input {
            DecodeInput::Router(message) => self.on_router(message),
            DecodeInput::RouterLost => {
                for id in self.sequences.keys().copied().collect::<Vec<_>>() {
                    self.cancel(id, "the router's connection is gone");
                }
                self.draining = self.stopping;
            }
            DecodeInput::RouterUp => self.pool.announce_all(),
            DecodeInput::Shutdown => {
                self.draining = true;
                self.stopping = true;
                self.tell_router(NodeToRouter::Draining);
            }
            DecodeInput::StepDone { step, outputs, busy } => self.on_step(step, outputs, busy),
            DecodeInput::Transfer(event) => self.on_transfer(event),
            DecodeInput::Sent(event) => self.on_sent(now, event),
        }
        self.plan();
        if self.is_idle() && !was_idle {
            self.drained_at = self.drained_at.max(now + DRAINED_AFTER);
            // At once, so that an idle node's gauges are true; but a report costs a walk over all blocks.
            let earliest = self.last_report + MIN_REPORT_INTERVAL;
            if now >= earliest || self.draining {
                self.report(now);
            } else {
                self.next_report = self.next_report.min(earliest);
            }
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        if now >= self.next_report {
            self.report(now);
        }
    }

    fn poll_output(&mut self) -> Option<DecodeOutput> {
        self.outputs.pop_front()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.next_report)
    }

    fn check_integrity(&self) {
        assert_eq!(self.pool.check_integrity(self.leases()), 0, "orphaned blocks");
        for (id, sequence) in &self.sequences {
            let (waiting, running) = (self.waiting.contains(id), self.running.contains(id));
            let claim = sequence.lease.as_ref().map(Lease::claim);
            let want = match sequence.phase {
                Phase::Absent => panic!("{id} is kept although it is over"),
                Phase::Waiting => (true, false, None),
                Phase::Transferring => (false, false, Some(Claim::Reserved)),
                Phase::Running | Phase::Doomed => (false, true, Some(Claim::Used)),
                Phase::Moving => (false, false, Some(Claim::Held)),
            };
            assert_eq!((waiting, running, claim), want, "{id} is lost");
            assert!(sequence.phase != Phase::Running || sequence.remaining() > 0, "{id} has nothing left to compute");
        }
        assert!(self.waiting.len() + self.running.len() <= self.sequences.len(), "a queue holds a stranger");
        if self.is_idle() {
            let counts = self.pool.counts();
            assert_eq!(counts.used + counts.reserved + counts.held, 0, "an idle node refers to no block");
        }
    }
}
