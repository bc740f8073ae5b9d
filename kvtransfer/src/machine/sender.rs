//! The sending half of a hand-off, for all transfers of a prefill node.
//!
//! The prefill scheduler says what is ready; this machine says when it may leave. It never ships a page that is not
//! ready, that the receiver did not ask for, or for which it has no credit. Pages are the receiver's: where its blocks are
//! not the sender's, each names the blocks that it is made from (rule K-12). Read [`SenderInput`], then `step`.

use super::upkeep::{Aborts, MAX_ALIVE, Pulse};
use super::{PageSet, TransferStats};
use ridge_protocol::transfer::{KvPeer, Outcome, PageSource, SendCommand, SendEvent, SendJob, TransferTimes};
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{
    BlockId, BlockShape, CacheDtype, Duration, Instant, Machine, ModelIdentity, NodeName, RequestId, Step, TokenOut,
    limits,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Limits and deadlines of a [`Sender`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SenderConfig {
    /// How long the sender waits for a receiver that shows neither progress nor a sign of life (rule K-11).
    pub lease: Duration,
    /// How long an offer waits for its grant at most, however alive the receiver is: as long as a sequence may wait
    /// there for blocks.
    pub patience: Duration,
    /// Most transfers at once; one more is settled as aborted at once.
    pub max_sessions: usize,
    /// Most credit one transfer may hold. More is a violation: it bounds the pages queued towards one peer.
    pub max_credit: u32,
    /// This node's blocks. The model's like the next two, which say how large a receiver's pages are.
    pub blocks: BlockShape,
    /// KV heads per layer.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
}

impl SenderConfig {
    /// The same for a node of this model, whose blocks hold at least one token.
    pub fn of_model(self, identity: &ModelIdentity) -> Self {
        let blocks = identity.block_shape().expect("a node's own blocks hold a token");
        Self { blocks, kv_heads: identity.kv_heads, head_dim: identity.head_dim, ..self }
    }
}

impl Default for SenderConfig {
    /// The model's fields are the smallest there can be and must be filled in.
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            patience: Duration::from_secs(600),
            max_sessions: 1 << 14,
            max_credit: 1024,
            blocks: BlockShape::new(1, CacheDtype::F32).expect("a block holds a token"),
            kv_heads: 1,
            head_dim: 1,
        }
    }
}

/// What can happen to a sender.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum SenderInput {
    /// The scheduler speaks.
    Command(SendCommand),
    /// The receiver on `from` speaks.
    Message {
        /// The peer's verified name.
        from: NodeName,
        /// What it said.
        message: ReceiverMsg,
    },
    /// The connection to this peer is up: offers that waited for it are on their way now.
    PeerUp(NodeName),
    /// The connection to this peer is gone, and everything that was said on it. Transfers to a node of the same name
    /// at another address are not touched: it came back.
    PeerLost {
        /// Which peer.
        peer: KvPeer,
        /// Why.
        reason: String,
    },
}

/// What a sender wants done.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub enum SenderOutput {
    /// Say this to a peer.
    Send {
        /// To whom.
        to: KvPeer,
        /// What.
        message: SenderMsg,
    },
    /// Say this to a peer if there is a connection: it would mean nothing on another.
    Answer {
        /// To whom.
        to: NodeName,
        /// What.
        message: SenderMsg,
    },
    /// Make this page of the peer's from the pool and write it to the peer's page stream.
    Ship {
        /// To whom.
        to: KvPeer,
        /// The transfer.
        request: RequestId,
        /// Layer, from 0.
        layer: u32,
        /// Index of the receiver's block within the sequence.
        index: u32,
        /// What it is made from.
        source: PageSource,
    },
    /// Tell the scheduler.
    Event(SendEvent),
}

/// The sending half of all hand-offs of a node.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    sessions: BTreeMap<RequestId, Session>,
    outputs: VecDeque<SenderOutput>,
    stats: TransferStats,
    pulse: Pulse,
    aborts: Aborts,
    /// `Announce`s seen and how they ended, for `check_integrity`.
    begun: u64,
    ended: u64,
}

#[derive(Debug)]
struct Session {
    to: KvPeer,
    /// Prompt length.
    tokens: u32,
    /// This node's blocks of the prompt.
    blocks: Vec<BlockId>,
    layers: u32,
    /// Pages the scheduler has declared complete.
    ready: PageSet,
    /// Ready ranges not yet shipped, oldest first: (layer, first, end).
    queue: VecDeque<(u32, u32, u32)>,
    /// The scheduler's last word, once it has said it, and when.
    first: Option<(TokenOut, Instant)>,
    /// When the first page left.
    began: Option<Instant>,
    state: State,
    /// When to give up waiting for the peer. `None` while the next move is the scheduler's.
    deadline: Option<Instant>,
    /// No sign of life renews an offer's lease beyond this.
    patient_until: Instant,
}

#[derive(Debug)]
enum State {
    /// The prompt waits for its turn here.
    Announced,
    /// The offer was sent.
    Offered,
    /// The receiver wants `first_block..`; pages leave as they become ready and credit allows.
    Shipping { first_block: u32, credit: u32, shipped: u64 },
    /// Everything was shipped and `Finish` was said.
    Finished { pages: u64 },
}

/// [`State`] without its data, and `Absent` for a request that has no session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Absent,
    Announced,
    Offered,
    Shipping,
    Finished,
}

/// What can happen to one session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cause {
    Announce,
    Begin,
    Ready,
    Finish,
    Cancel,
    Grant,
    Credit,
    Commit,
    PeerAbort,
    PeerLost,
    Deadline,
    /// Every granted page was shipped and the scheduler has finished.
    AllShipped,
}

/// The transition table: every legal step of a sending session, and what the others mean.
fn step(phase: Phase, cause: Cause) -> Step<Phase> {
    use Cause::*;
    match (phase, cause) {
        (Phase::Absent, Announce) => Step::Enter(Phase::Announced),
        // The session ended while these were on their way.
        (Phase::Absent, Begin | Ready | Finish | Cancel) => Step::Ignore,
        (Phase::Absent, Grant | Credit | Commit | PeerAbort) => Step::Ignore,
        (Phase::Absent, PeerLost | Deadline | AllShipped) => Step::Bug,

        (Phase::Announced, Begin) => Step::Enter(Phase::Offered),
        (Phase::Announced, Ready | Finish | AllShipped | Deadline) => Step::Bug,
        (Phase::Announced, Grant | Credit | Commit) => Step::Violation,

        (_, Announce | Begin) => Step::Bug,
        (_, Cancel | PeerAbort | PeerLost | Deadline) => Step::End,

        // Before the grant the scheduler already computes: ready pages and the first token are noted.
        (Phase::Offered, Ready | Finish) => Step::Enter(Phase::Offered),
        (Phase::Offered, Grant) => Step::Enter(Phase::Shipping),
        (Phase::Offered, Credit | Commit) => Step::Violation,
        (Phase::Offered, AllShipped) => Step::Bug,

        (Phase::Shipping, Ready | Finish | Credit) => Step::Enter(Phase::Shipping),
        (Phase::Shipping, AllShipped) => Step::Enter(Phase::Finished),
        (Phase::Shipping, Grant | Commit) => Step::Violation,

        (Phase::Finished, Ready | Finish | AllShipped) => Step::Bug,
        // Credit for the last pages crosses `Finish` on the wire; it shows that the receiver is alive.
        (Phase::Finished, Credit) => Step::Enter(Phase::Finished),
        (Phase::Finished, Commit) => Step::End,
        (Phase::Finished, Grant) => Step::Violation,
    }
}

impl Sender {
    /// A sender without transfers.
    pub fn new(config: SenderConfig) -> Self {
        Self {
            pulse: Pulse::new(config.lease),
            aborts: Aborts::default(),
            config,
            sessions: BTreeMap::new(),
            outputs: VecDeque::new(),
            stats: TransferStats::default(),
            begun: 0,
            ended: 0,
        }
    }

    /// Counters since the start.
    pub fn stats(&self) -> TransferStats {
        self.stats
    }

    /// Transfers announced or under way.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Aborts that the peer has not acknowledged yet.
    pub fn open_aborts(&self) -> usize {
        self.aborts.len()
    }

    fn on_command(&mut self, now: Instant, command: SendCommand) {
        match command {
            SendCommand::Announce { request, to } => self.on_announce(now, request, to),
            SendCommand::Begin(job) => self.on_begin(now, job),
            SendCommand::Ready { request, layer, first, end } => {
                let Some(session) = self.step_own(request, Cause::Ready) else { return };
                session.on_ready(layer, first, end);
                self.advance(now, request);
            }
            SendCommand::Finish { request, first } => {
                let Some(session) = self.step_own(request, Cause::Finish) else { return };
                assert!(session.first.is_none(), "{request}: finished twice");
                assert_eq!(session.ready.len, session.pages(), "{request}: finished before every page was ready");
                session.first = Some((first, now));
                self.advance(now, request);
            }
            SendCommand::Cancel { request, reason } => {
                if self.step_own(request, Cause::Cancel).is_none() {
                    return;
                }
                let session = self.end(request);
                self.stats.aborted += 1;
                self.abort(now, session.to, request, reason);
            }
        }
    }

    fn on_announce(&mut self, now: Instant, request: RequestId, to: KvPeer) {
        assert_eq!(step(self.phase(request), Cause::Announce), Step::Enter(Phase::Announced), "{request}: twice");
        self.begun += 1;
        if let Some(reason) = self.refusal(&to) {
            self.ended += 1;
            self.abort(now, to, request, reason.clone());
            self.settle(request, Outcome::Aborted(reason));
            return;
        }
        let session = Session {
            ready: PageSet::new(0, 0),
            to: to.clone(),
            tokens: 0,
            blocks: Vec::new(),
            layers: 0,
            queue: VecDeque::new(),
            first: None,
            began: None,
            state: State::Announced,
            deadline: None,
            patient_until: now,
        };
        self.sessions.insert(request, session);
        // At once: it dials the peer, if there is no connection, while the prompt waits or is computed.
        self.outputs.push_back(SenderOutput::Send { to, message: SenderMsg::Alive { requests: vec![request] } });
        self.pulse.wake(now);
    }

    /// Why nothing can be sent to this peer now.
    fn refusal(&self, to: &KvPeer) -> Option<String> {
        let SenderConfig { max_sessions, blocks, kv_heads, head_dim, .. } = self.config;
        if self.sessions.len() >= max_sessions {
            return Some(format!("sender is full: {max_sessions} transfers"));
        }
        let page_bytes = to.blocks.page_bytes(kv_heads, head_dim);
        let too_large = || format!("pages of {page_bytes} bytes where {} are allowed", limits::MAX_PAGE_BYTES);
        // Rule K-12. The receiver would refuse the first of these too; here it is known before anything is dialed.
        blocks.refusal(to.blocks).or_else(|| (page_bytes > limits::MAX_PAGE_BYTES).then(too_large))
    }

    fn on_begin(&mut self, now: Instant, job: SendJob) {
        let request = job.request;
        assert!(job.tokens > 0, "{request}: a prompt has at least one token");
        assert_eq!(
            job.blocks.len() as u32,
            job.tokens.div_ceil(self.config.blocks.block_size()),
            "{request}: blocks for {} tokens",
            job.tokens
        );
        assert!(job.layers > 0, "{request}: a model has layers");
        let (lease, patience) = (self.config.lease, self.config.patience);
        let Some(session) = self.step_own(request, Cause::Begin) else { return };
        assert_eq!(job.to, session.to, "{request}: announced to another");
        let blocks = job.tokens.div_ceil(job.to.blocks.block_size());
        assert!(job.hashes.len() <= blocks as usize, "{request}: more hashes than blocks");
        session.ready = PageSet::new(job.layers, blocks);
        session.tokens = job.tokens;
        session.blocks = job.blocks;
        session.layers = job.layers;
        session.state = State::Offered;
        session.deadline = Some(now + lease);
        session.patient_until = now + patience;
        let to = session.to.clone();
        let message = SenderMsg::Offer { request, tokens: job.tokens, hashes: job.hashes };
        self.outputs.push_back(SenderOutput::Send { to, message });
    }

    /// The receiver still looks for blocks for these.
    fn on_alive(&mut self, now: Instant, from: &NodeName, requests: Vec<RequestId>) {
        for request in requests {
            if let Some(session) = self.sessions.get_mut(&request)
                && session.to.name == *from
                && matches!(session.state, State::Offered)
            {
                session.deadline = Some((now + self.config.lease).min(session.patient_until));
            }
        }
    }

    /// Tells receivers of transfers for which this node still works.
    fn show_life(&mut self, now: Instant) {
        let mut alive: BTreeMap<&NodeName, (&KvPeer, Vec<RequestId>)> = BTreeMap::new();
        for (request, session) in &self.sessions {
            // After `Finish` only pages that land count.
            if !matches!(session.state, State::Finished { .. }) {
                alive.entry(&session.to.name).or_insert((&session.to, Vec::new())).1.push(*request);
            }
        }
        if !alive.is_empty() {
            self.pulse.wake(now);
        }
        for (to, requests) in alive.into_values() {
            for requests in requests.chunks(MAX_ALIVE) {
                let message = SenderMsg::Alive { requests: requests.to_vec() };
                self.outputs.push_back(SenderOutput::Send { to: to.clone(), message });
            }
        }
    }

    fn abort(&mut self, now: Instant, to: KvPeer, request: RequestId, reason: String) {
        self.aborts.said(to.name.clone(), request, now + self.config.lease, self.config.max_sessions);
        self.outputs.push_back(SenderOutput::Send { to, message: SenderMsg::Abort { request, reason } });
    }

    fn on_message(&mut self, now: Instant, from: &NodeName, message: ReceiverMsg) {
        let (request, cause) = match &message {
            // The shell answers the handshake; these carry nothing for a session.
            ReceiverMsg::Welcome | ReceiverMsg::Refuse { .. } => return,
            ReceiverMsg::Grant { request, .. } => (*request, Cause::Grant),
            ReceiverMsg::Credit { request, .. } => (*request, Cause::Credit),
            ReceiverMsg::Commit { request } => (*request, Cause::Commit),
            ReceiverMsg::Abort { request, .. } => {
                let message = SenderMsg::Aborted { request: *request };
                self.outputs.push_back(SenderOutput::Answer { to: from.clone(), message });
                (*request, Cause::PeerAbort)
            }
            ReceiverMsg::Aborted { request } => return self.aborts.acknowledged(from, *request),
            ReceiverMsg::Alive { .. } => {
                let ReceiverMsg::Alive { requests } = message else { unreachable!("just matched") };
                return self.on_alive(now, from, requests);
            }
        };
        // A peer can only speak about its own transfers.
        let own = self.sessions.get(&request).is_some_and(|session| session.to.name == *from);
        let phase = if own { self.phase(request) } else { Phase::Absent };
        match step(phase, cause) {
            Step::Ignore => self.stats.strays += 1,
            Step::Violation => self.violate(now, request, format!("{cause:?} while {phase:?}")),
            Step::Bug => unreachable!("{request}: a message is never our own mistake"),
            Step::End => match message {
                ReceiverMsg::Abort { reason, .. } => {
                    self.end(request);
                    self.settle(request, Outcome::Aborted(format!("receiver gave up: {reason}")));
                }
                _ => self.on_commit(now, request),
            },
            Step::Enter(_) => {
                let session = self.sessions.get_mut(&request).expect("checked above");
                let taken = match message {
                    ReceiverMsg::Grant { first_block, credit, .. } => {
                        session.on_grant(first_block, credit, self.config.max_credit)
                    }
                    ReceiverMsg::Credit { pages, .. } => session.on_credit(pages, self.config.max_credit),
                    _ => unreachable!("{request}: only Grant and Credit keep a session"),
                };
                match taken {
                    Ok(()) => {
                        // The peer showed life: whatever is waited for next is waited for anew.
                        session.deadline = None;
                        self.advance(now, request);
                    }
                    Err(reason) => self.violate(now, request, reason),
                }
            }
        }
    }

    fn on_commit(&mut self, now: Instant, request: RequestId) {
        let session = self.end(request);
        let State::Finished { pages } = session.state else { unreachable!("{request}: committed before Finish") };
        let bytes = pages * self.page_bytes(session.to.blocks);
        let times = session.times(now);
        self.stats.times = self.stats.times + times;
        self.settle(request, Outcome::Committed { pages, bytes, times });
    }

    /// Ships what may be shipped, says `Finish` when nothing is left, and sets the deadline of what is waited for.
    fn advance(&mut self, now: Instant, request: RequestId) {
        let own = self.config.blocks;
        let page_bytes = self.page_bytes(self.sessions[&request].to.blocks);
        let session = self.sessions.get_mut(&request).expect("advanced while it lives");
        if matches!(session.state, State::Announced | State::Offered) {
            return;
        }
        while let Some((layer, index)) = session.next_page() {
            let (size, own_size) = (session.to.blocks.block_size(), own.block_size());
            let source = PageSource::of(index, size, session.tokens, &session.blocks, own_size);
            session.began.get_or_insert(now);
            self.stats.pages += 1;
            self.stats.bytes += page_bytes;
            self.stats.converted += u64::from(session.to.blocks != own);
            self.outputs.push_back(SenderOutput::Ship { to: session.to.clone(), request, layer, index, source });
        }
        if let Some(pages) = session.all_shipped() {
            assert_eq!(step(session.phase(), Cause::AllShipped), Step::Enter(Phase::Finished), "{request}");
            let (first, _) = session.first.clone().expect("all_shipped needs it");
            session.state = State::Finished { pages };
            self.outputs.push_back(SenderOutput::Send {
                to: session.to.clone(),
                message: SenderMsg::Finish { request, pages, first },
            });
        }
        if !session.waits_for_peer() {
            session.deadline = None;
        } else if session.deadline.is_none() {
            session.deadline = Some(now + self.config.lease);
        }
    }

    fn page_bytes(&self, blocks: BlockShape) -> u64 {
        blocks.page_bytes(self.config.kv_heads, self.config.head_dim) as u64
    }

    /// The session a scheduler's word is about, or `None` if it is over.
    fn step_own(&mut self, request: RequestId, cause: Cause) -> Option<&mut Session> {
        match step(self.phase(request), cause) {
            Step::Ignore => None,
            Step::Enter(_) | Step::End => self.sessions.get_mut(&request),
            Step::Violation | Step::Bug => panic!("{request}: {cause:?} while {:?}", self.phase(request)),
        }
    }

    fn phase(&self, request: RequestId) -> Phase {
        self.sessions.get(&request).map_or(Phase::Absent, Session::phase)
    }

    /// The peer broke the protocol: tell it, and settle.
    fn violate(&mut self, now: Instant, request: RequestId, reason: String) {
        let session = self.end(request);
        self.abort(now, session.to, request, reason.clone());
        self.settle(request, Outcome::Aborted(format!("receiver broke the protocol: {reason}")));
    }

    fn end(&mut self, request: RequestId) -> Session {
        self.ended += 1;
        self.sessions.remove(&request).expect("a session ends once")
    }

    fn settle(&mut self, request: RequestId, outcome: Outcome) {
        match outcome {
            Outcome::Committed { .. } => self.stats.committed += 1,
            Outcome::Aborted(_) => self.stats.aborted += 1,
        }
        self.outputs.push_back(SenderOutput::Event(SendEvent::Settled { request, outcome }));
    }
}

impl Session {
    fn phase(&self) -> Phase {
        match self.state {
            State::Announced => Phase::Announced,
            State::Offered => Phase::Offered,
            State::Shipping { .. } => Phase::Shipping,
            State::Finished { .. } => Phase::Finished,
        }
    }

    /// What of a transfer that is committed now lay behind the computing, and what did not.
    fn times(&self, now: Instant) -> TransferTimes {
        let (_, computed) = self.first.as_ref().expect("committed after Finish");
        let hidden = self.began.map_or(Duration::ZERO, |began| computed.since(began));
        TransferTimes { hidden_us: hidden.as_micros() as u64, exposed_us: now.since(*computed).as_micros() as u64 }
    }

    fn blocks_len(&self) -> u32 {
        self.ready.blocks
    }

    fn pages(&self) -> u64 {
        u64::from(self.blocks_len()) * u64::from(self.layers)
    }

    fn on_ready(&mut self, layer: u32, first: u32, end: u32) {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        assert!(first <= end, "range {first}..{end}");
        assert!(end <= self.blocks_len(), "block {end} of {}", self.blocks_len());
        for index in first..end {
            assert!(self.ready.insert(layer, index), "page {layer}/{index} was ready before");
        }
        self.queue.push_back((layer, first, end));
    }

    fn on_grant(&mut self, first_block: u32, credit: u32, max_credit: u32) -> Result<(), String> {
        if first_block > self.blocks_len() {
            return Err(format!("grant from block {first_block} of {}", self.blocks_len()));
        }
        self.state = State::Shipping { first_block, credit: 0, shipped: 0 };
        self.on_credit(credit, max_credit)
    }

    fn on_credit(&mut self, pages: u32, max_credit: u32) -> Result<(), String> {
        let State::Shipping { credit, .. } = &mut self.state else { return Ok(()) };
        let total = credit.saturating_add(pages);
        if total > max_credit {
            return Err(format!("credit of {total} pages is above the limit of {max_credit}"));
        }
        *credit = total;
        Ok(())
    }

    /// Takes the next page that is ready, wanted and paid for.
    fn next_page(&mut self) -> Option<(u32, u32)> {
        let State::Shipping { first_block, credit, shipped } = &mut self.state else { return None };
        loop {
            let (layer, first, end) = self.queue.front_mut()?;
            *first = (*first).max(*first_block);
            if *first >= *end {
                self.queue.pop_front();
                continue;
            }
            if *credit == 0 {
                return None;
            }
            let page = (*layer, *first);
            *first += 1;
            *credit -= 1;
            *shipped += 1;
            return Some(page);
        }
    }

    /// The number of pages shipped, if that was all of them and the scheduler has finished.
    fn all_shipped(&self) -> Option<u64> {
        let State::Shipping { shipped, .. } = self.state else { return None };
        (self.first.is_some() && self.queue.is_empty()).then_some(shipped)
    }

    /// Whether the next move is the receiver's.
    fn waits_for_peer(&self) -> bool {
        match self.state {
            State::Announced => false,
            State::Offered | State::Finished { .. } => true,
            State::Shipping { credit, .. } => credit == 0 && !self.queue.is_empty(),
        }
    }

    fn check_integrity(&self, config: &SenderConfig) {
        self.ready.check_integrity();
        assert_eq!(self.deadline.is_some(), self.waits_for_peer(), "a wait for the peer has a deadline");
        match self.state {
            State::Announced | State::Offered => {}
            State::Shipping { first_block, credit, shipped } => {
                assert!(credit <= config.max_credit, "credit is bounded");
                assert!(shipped <= self.ready.len, "only ready pages are shipped");
                assert!(credit == 0 || self.queue.is_empty(), "nothing waits while there is credit");
                assert!(first_block <= self.blocks_len(), "the grant lies inside the offer");
            }
            State::Finished { pages } => {
                assert!(self.queue.is_empty(), "nothing waits after Finish");
                assert_eq!(pages % u64::from(self.layers), 0, "whole blocks were shipped");
            }
        }
    }
}

impl Machine for Sender {
    type Input = SenderInput;
    type Output = SenderOutput;

    fn handle(&mut self, now: Instant, input: SenderInput) {
        match input {
            SenderInput::Command(command) => self.on_command(now, command),
            SenderInput::Message { from, message } => self.on_message(now, &from, message),
            SenderInput::PeerUp(peer) => {
                for session in self.sessions.values_mut() {
                    if session.to.name == peer && matches!(session.state, State::Offered) {
                        session.deadline = Some(now + self.config.lease);
                    }
                }
            }
            SenderInput::PeerLost { peer, reason } => {
                self.aborts.lost(&peer.name);
                let lost: Vec<RequestId> =
                    self.sessions.iter().filter(|(_, s)| s.to == peer).map(|(request, _)| *request).collect();
                for request in lost {
                    assert_eq!(step(self.phase(request), Cause::PeerLost), Step::End, "{request}");
                    self.end(request);
                    self.settle(request, Outcome::Aborted(format!("lost {}: {reason}", peer.name)));
                }
            }
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.stats.unacknowledged += self.aborts.expire(now);
        if self.pulse.beat(now) {
            self.show_life(now);
        }
        let late: Vec<RequestId> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(request, _)| *request)
            .collect();
        for request in late {
            let phase = self.phase(request);
            assert_eq!(step(phase, Cause::Deadline), Step::End, "{request}");
            let session = self.end(request);
            let reason = match phase {
                Phase::Offered if now >= session.patient_until => format!("no grant within {:?}", self.config.patience),
                Phase::Offered => format!("no grant and no sign of life within {:?}", self.config.lease),
                _ => format!("no progress within {:?}", self.config.lease),
            };
            self.abort(now, session.to, request, reason.clone());
            self.settle(request, Outcome::Aborted(reason));
        }
    }

    fn poll_output(&mut self) -> Option<SenderOutput> {
        self.outputs.pop_front()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let sessions = self.sessions.values().filter_map(|session| session.deadline);
        sessions.chain(self.pulse.next()).chain(self.aborts.next()).min()
    }

    fn check_integrity(&self) {
        assert!(self.sessions.len() <= self.config.max_sessions, "the number of sessions is bounded");
        assert_eq!(self.begun, self.ended + self.sessions.len() as u64, "every transfer ends exactly once");
        assert_eq!(self.ended, self.stats.committed + self.stats.aborted, "every end is counted");
        for session in self.sessions.values() {
            session.check_integrity(&self.config);
        }
    }
}

/// The transition table as text, for the snapshot.
#[cfg(test)]
pub(super) fn table() -> String {
    use Cause::*;
    let causes =
        [Announce, Begin, Ready, Finish, Cancel, Grant, Credit, Commit, PeerAbort, PeerLost, Deadline, AllShipped];
    ridge_protocol::step::table(
        "sender",
        &[Phase::Absent, Phase::Announced, Phase::Offered, Phase::Shipping, Phase::Finished],
        &causes,
        step,
    )
}
