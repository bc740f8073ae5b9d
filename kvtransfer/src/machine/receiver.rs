//! The receiving half of a hand-off, for all transfers of a decode node.
//!
//! The decode scheduler reserves blocks (`Expect`), a prefill node offers (`Offer`), in either order. When both are
//! here and agree, the missing blocks are granted. A transfer is good only when every granted page landed once and
//! verified; anything else gives the reservation back. Read [`ReceiverInput`], then `step`.

use super::upkeep::{Aborts, MAX_ALIVE, Pulse};
use super::{PageSet, TransferStats};
use ridge_protocol::transfer::{ReceiveCommand, ReceiveEvent, ReceiveJob};
use ridge_protocol::wire::{ReceiverMsg, SenderMsg};
use ridge_protocol::{BlockHash, BlockId, Duration, Instant, Machine, NodeName, RequestId, Step, TokenOut, limits};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Limits and deadlines of a [`Receiver`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReceiverConfig {
    /// How long the receiver waits for a sender that shows neither progress nor a sign of life (rule K-11).
    pub lease: Duration,
    /// How long a transfer stays in one phase at most, however alive the sender is: as long as a prompt may queue or be
    /// computed there, or a sequence wait here for blocks.
    pub patience: Duration,
    /// Pages in flight per transfer: bounds the memory and bandwidth one transfer can claim.
    pub credit_pages: u32,
    /// Most transfers at once, and most remembered failures; one more is refused.
    pub max_sessions: usize,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            patience: Duration::from_secs(600),
            credit_pages: 256,
            max_sessions: 1 << 14,
        }
    }
}

/// What can happen to a receiver.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ReceiverInput {
    /// The scheduler speaks.
    Command(ReceiveCommand),
    /// The sender on `from` speaks.
    Message {
        /// The peer's verified name.
        from: NodeName,
        /// What it said.
        message: SenderMsg,
    },
    /// A page came in. If [`Receiver::destination`] named a block, the bytes are there.
    PageLanded {
        /// The peer's verified name.
        from: NodeName,
        /// The transfer.
        request: RequestId,
        /// Layer, from 0.
        layer: u32,
        /// Index of the block within the sequence.
        index: u32,
        /// Bytes of the page.
        bytes: u32,
        /// Whether the digest matched.
        intact: bool,
    },
    /// The connection from this peer is gone, and everything that was said on it.
    PeerLost {
        /// Which peer.
        peer: NodeName,
        /// Why.
        reason: String,
    },
}

/// What a receiver wants done.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub enum ReceiverOutput {
    /// Say this to a peer.
    Send {
        /// To whom.
        to: NodeName,
        /// What.
        message: ReceiverMsg,
    },
    /// Tell the scheduler.
    Event(ReceiveEvent),
}

/// The receiving half of all hand-offs of a node.
#[derive(Debug)]
pub struct Receiver {
    config: ReceiverConfig,
    sessions: BTreeMap<RequestId, Session>,
    outputs: VecDeque<ReceiverOutput>,
    stats: TransferStats,
    pulse: Pulse,
    aborts: Aborts,
    /// `Expect`s seen and how they ended, for `check_integrity`.
    expected: u64,
    ended: u64,
}

#[derive(Debug)]
struct Session {
    state: State,
    /// When to give up waiting. Every phase waits for somebody.
    deadline: Instant,
    /// No sign of life renews the lease beyond this.
    patient_until: Instant,
}

#[derive(Debug)]
enum State {
    /// Blocks are reserved, no offer yet.
    Expected(ReceiveJob),
    /// An offer without a reservation.
    Offered(Offer),
    /// Granted; pages come in.
    Landing(Landing),
    /// `Finish` came before the last page did.
    Closing(Landing, TokenOut),
    /// One side gave up before the other was heard of; the other side will be told at once.
    Gone(String),
}

#[derive(Clone, Debug)]
struct Offer {
    from: NodeName,
    tokens: u32,
    hashes: Vec<BlockHash>,
}

#[derive(Debug)]
struct Landing {
    job: ReceiveJob,
    landed: PageSet,
    bytes: u64,
    /// Credit given so far; the sender may have sent no more pages than this.
    granted: u64,
}

/// [`State`] without its data, and `Absent` for a request that has no session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Absent,
    Expected,
    Offered,
    Landing,
    Closing,
    Gone,
}

/// What can happen to one session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cause {
    Expect,
    Cancel,
    Offer,
    Finish,
    PeerAbort,
    Page,
    PeerLost,
    Deadline,
    /// `Finish` was seen and every granted page landed.
    AllLanded,
}

/// The transition table: every legal step of a receiving session, and what the others mean.
fn step(phase: Phase, cause: Cause) -> Step<Phase> {
    use Cause::*;
    match (phase, cause) {
        (Phase::Absent, Expect) => Step::Enter(Phase::Expected),
        (Phase::Absent, Offer) => Step::Enter(Phase::Offered),
        // The session ended while these were on their way.
        (Phase::Absent, Cancel | Finish | PeerAbort | Page) => Step::Ignore,
        (Phase::Absent, PeerLost | Deadline | AllLanded) => Step::Bug,

        (Phase::Expected, Offer) => Step::Enter(Phase::Landing),
        // The sender may still come: it will then be told at once, not after a deadline.
        (Phase::Expected, Cancel | PeerAbort | Deadline) => Step::Enter(Phase::Gone),
        // Nothing of it was said on the lost connection: the sender may be back already, under a new one. If it is
        // not, the router knows and cancels.
        (Phase::Expected, PeerLost) => Step::Ignore,
        (Phase::Expected, Finish | Page) => Step::Violation,
        (Phase::Expected, Expect | AllLanded) => Step::Bug,

        (Phase::Offered, Expect) => Step::Enter(Phase::Landing),
        // The scheduler may still come: it will then be told at once, not after a deadline.
        (Phase::Offered, Cancel | PeerAbort | PeerLost | Deadline) => Step::Enter(Phase::Gone),
        (Phase::Offered, Offer | Finish | Page) => Step::Violation,
        (Phase::Offered, AllLanded) => Step::Bug,

        (Phase::Landing, Page) => Step::Enter(Phase::Landing),
        (Phase::Landing, Finish) => Step::Enter(Phase::Closing),
        (Phase::Closing, Page) => Step::Enter(Phase::Closing),
        (Phase::Closing, AllLanded) => Step::End,
        (Phase::Landing | Phase::Closing, Cancel | PeerAbort | PeerLost | Deadline) => Step::End,
        (Phase::Landing | Phase::Closing, Offer) | (Phase::Closing, Finish) => Step::Violation,
        (Phase::Landing | Phase::Closing, Expect) | (Phase::Landing, AllLanded) => Step::Bug,

        (Phase::Gone, Expect | Offer | Deadline) => Step::End,
        (Phase::Gone, Cancel | Finish | PeerAbort | Page) => Step::Ignore,
        (Phase::Gone, PeerLost | AllLanded) => Step::Bug,
    }
}

impl Receiver {
    /// A receiver without transfers.
    pub fn new(config: ReceiverConfig) -> Self {
        Self {
            pulse: Pulse::new(config.lease),
            aborts: Aborts::default(),
            config,
            sessions: BTreeMap::new(),
            outputs: VecDeque::new(),
            stats: TransferStats::default(),
            expected: 0,
            ended: 0,
        }
    }

    /// Counters since the start.
    pub fn stats(&self) -> TransferStats {
        self.stats
    }

    /// Transfers under way, remembered failures not counted.
    pub fn sessions(&self) -> usize {
        self.sessions.values().filter(|session| session.phase() != Phase::Gone).count()
    }

    /// Aborts that the peer has not acknowledged yet.
    pub fn open_aborts(&self) -> usize {
        self.aborts.len()
    }

    /// Enters a phase: its lease and the patience with it begin now.
    fn enter(&mut self, now: Instant, request: RequestId, state: State) {
        let (deadline, patient_until) = (now + self.config.lease, now + self.config.patience);
        if matches!(state, State::Offered(_)) {
            self.pulse.wake(now);
        }
        self.sessions.insert(request, Session { state, deadline, patient_until });
    }

    /// The sender still means to serve these.
    fn on_alive(&mut self, now: Instant, from: &NodeName, requests: Vec<RequestId>) {
        for request in requests {
            if let Some(session) = self.sessions.get_mut(&request)
                && session.peer() == Some(from)
                // After `Finish` only pages that land count.
                && matches!(session.state, State::Expected(_) | State::Offered(_) | State::Landing(_))
            {
                session.deadline = (now + self.config.lease).min(session.patient_until);
            }
        }
    }

    /// Tells senders of offers for which this node still looks for blocks.
    fn show_life(&mut self, now: Instant) {
        let mut alive: BTreeMap<NodeName, Vec<RequestId>> = BTreeMap::new();
        for (request, session) in &self.sessions {
            if let State::Offered(offer) = &session.state {
                alive.entry(offer.from.clone()).or_default().push(*request);
            }
        }
        if !alive.is_empty() {
            self.pulse.wake(now);
        }
        for (to, requests) in alive {
            for requests in requests.chunks(MAX_ALIVE) {
                self.send(to.clone(), ReceiverMsg::Alive { requests: requests.to_vec() });
            }
        }
    }

    fn abort(&mut self, now: Instant, to: NodeName, request: RequestId, reason: String) {
        self.aborts.said(to.clone(), request, now + self.config.lease, self.config.max_sessions);
        self.send(to, ReceiverMsg::Abort { request, reason });
    }

    /// Where a page must be written, or `None` if it is not wanted: an unknown or aborted transfer, another peer's,
    /// outside the granted range, beyond credit, or here already.
    ///
    /// The shell writes a page only where this says, then reports it with [`ReceiverInput::PageLanded`] in any case.
    pub fn destination(&self, from: &NodeName, request: RequestId, layer: u32, index: u32) -> Option<BlockId> {
        let (State::Landing(landing) | State::Closing(landing, _)) = &self.sessions.get(&request)?.state else {
            return None;
        };
        let wanted = landing.job.from == *from && landing.refusal(layer, index).is_none();
        wanted.then(|| landing.job.blocks[index as usize])
    }

    fn on_expect(&mut self, now: Instant, job: ReceiveJob) {
        let request = job.request;
        let blocks = u32::try_from(job.blocks.len()).expect("a prompt's blocks are counted in u32");
        assert!(blocks > 0, "{request}: a prompt has at least one block");
        assert!(job.have <= blocks, "{request}: has {} of {blocks} blocks", job.have);
        assert!(job.layers > 0, "{request}: a model has layers");
        self.expected += 1;
        let phase = self.phase(request);
        match step(phase, Cause::Expect) {
            Step::Enter(Phase::Expected) => {
                if self.sessions() >= self.config.max_sessions {
                    let reason = format!("receiver is full: {} transfers", self.config.max_sessions);
                    self.fail(request, reason.clone());
                    self.remember(now, request, reason);
                    return;
                }
                self.enter(now, request, State::Expected(job));
            }
            Step::Enter(Phase::Landing) => {
                let State::Offered(offer) = self.remove(request) else { unreachable!("{request}: {phase:?}") };
                if offer.from == job.from {
                    self.on_met(now, job, &offer);
                    return;
                }
                // Somebody else's offer must not keep the right one out.
                let reason = format!("expected from {}, not from {}", job.from, offer.from);
                self.abort(now, offer.from, request, reason);
                self.enter(now, request, State::Expected(job));
            }
            Step::End => {
                let State::Gone(reason) = self.remove(request) else { unreachable!("{request}: {phase:?}") };
                self.fail(request, reason);
            }
            other => panic!("{request}: expected while {phase:?} ({other:?})"),
        }
    }

    fn on_cancel(&mut self, now: Instant, request: RequestId, reason: String) {
        let phase = self.phase(request);
        match step(phase, Cause::Cancel) {
            Step::Ignore => {}
            Step::Enter(Phase::Gone) => {
                if let State::Offered(offer) = self.remove(request) {
                    self.abort(now, offer.from, request, reason.clone());
                } else {
                    self.on_cancelled();
                }
                self.remember(now, request, reason);
            }
            Step::End => {
                let (State::Landing(landing) | State::Closing(landing, _)) = self.remove(request) else {
                    unreachable!("{request}: {phase:?}")
                };
                self.on_cancelled();
                self.abort(now, landing.job.from, request, reason);
            }
            other => panic!("{request}: cancelled while {phase:?} ({other:?})"),
        }
    }

    /// A reservation ended by its owner: no event, but counted.
    fn on_cancelled(&mut self) {
        self.ended += 1;
        self.stats.aborted += 1;
    }

    fn on_message(&mut self, now: Instant, from: NodeName, message: SenderMsg) {
        match message {
            // The shell answers the handshake; it carries nothing for a session.
            SenderMsg::Hello { .. } => {}
            SenderMsg::Offer { request, tokens, hashes } => {
                self.on_offer(now, request, Offer { from, tokens, hashes });
            }
            SenderMsg::Finish { request, pages, first } => {
                if !self.admit(now, &from, request, Cause::Finish) {
                    return;
                }
                let State::Landing(landing) = self.remove(request) else { unreachable!("{request}: Finish") };
                if pages != landing.total() {
                    let reason = format!("finished after {pages} pages of {}", landing.total());
                    self.give_up(now, request, from, reason);
                    return;
                }
                self.enter(now, request, State::Closing(landing, first));
                self.settle_if_landed(request);
            }
            SenderMsg::Aborted { request } => self.aborts.acknowledged(&from, request),
            SenderMsg::Alive { requests } => self.on_alive(now, &from, requests),
            SenderMsg::Abort { request, reason } => {
                self.send(from.clone(), ReceiverMsg::Aborted { request });
                if !self.admit(now, &from, request, Cause::PeerAbort) {
                    return;
                }
                self.on_peer_gone(now, request, Cause::PeerAbort, format!("sender gave up: {reason}"));
            }
        }
    }

    fn on_offer(&mut self, now: Instant, request: RequestId, offer: Offer) {
        let phase = self.phase(request);
        // A live transfer of another peer is not disturbed by this one's offer.
        if self.peer(request).is_some_and(|peer| *peer != offer.from) {
            let reason = "another node's transfer".to_owned();
            self.abort(now, offer.from, request, reason);
            return;
        }
        match step(phase, Cause::Offer) {
            Step::Enter(Phase::Offered) => {
                if offer.tokens as usize > limits::MAX_TOKENS || offer.hashes.len() > offer.tokens as usize {
                    let reason = format!("offer of {} tokens with {} hashes", offer.tokens, offer.hashes.len());
                    self.abort(now, offer.from, request, reason);
                } else if self.sessions() >= self.config.max_sessions {
                    let reason = format!("receiver is full: {} transfers", self.config.max_sessions);
                    self.abort(now, offer.from, request, reason.clone());
                    self.remember(now, request, reason);
                } else {
                    self.enter(now, request, State::Offered(offer));
                }
            }
            Step::Enter(_) => {
                let State::Expected(job) = self.remove(request) else { unreachable!("{request}: {phase:?}") };
                self.on_met(now, job, &offer);
            }
            Step::End => {
                let State::Gone(reason) = self.remove(request) else { unreachable!("{request}: {phase:?}") };
                self.abort(now, offer.from, request, reason);
            }
            Step::Violation => self.violate(now, request, offer.from, format!("offered while {phase:?}")),
            other => unreachable!("{request}: offered while {phase:?} ({other:?})"),
        }
    }

    /// Reservation and offer are both here: compare them and grant what is missing.
    fn on_met(&mut self, now: Instant, job: ReceiveJob, offer: &Offer) {
        let request = job.request;
        let differs = if offer.tokens != job.tokens {
            Some(format!("offer of {} tokens where {} are expected", offer.tokens, job.tokens))
        } else if offer.hashes.len() != job.hashes.len() {
            Some(format!("offer of {} full blocks where {} are expected", offer.hashes.len(), job.hashes.len()))
        } else {
            let at = offer.hashes.iter().zip(&job.hashes).position(|(theirs, ours)| theirs != ours);
            at.map(|at| format!("hash of block {at} differs: {:?} here, {:?} there", job.hashes[at], offer.hashes[at]))
        };
        if let Some(reason) = differs {
            self.give_up(now, request, job.from, reason);
            return;
        }
        let missing = job.blocks.len() as u32 - job.have;
        let mut landing =
            Landing { landed: PageSet::new(job.layers, job.blocks.len() as u32), job, bytes: 0, granted: 0 };
        let credit = u64::from(self.config.credit_pages).min(landing.total()) as u32;
        landing.granted = u64::from(credit);
        assert!(credit > 0 || missing == 0, "{request}: a grant without credit");
        let message = ReceiverMsg::Grant { request, first_block: landing.job.have, credit };
        self.send(landing.job.from.clone(), message);
        self.enter(now, request, State::Landing(landing));
    }

    fn on_page(&mut self, now: Instant, from: NodeName, request: RequestId, page: Page) {
        if !page.intact {
            self.stats.digest_failures += 1;
        }
        if !self.admit(now, &from, request, Cause::Page) {
            return;
        }
        let session = self.sessions.get_mut(&request).expect("admitted");
        let (State::Landing(landing) | State::Closing(landing, _)) = &mut session.state else {
            unreachable!("{request}: a page")
        };
        let refusal = landing.refusal(page.layer, page.index).or_else(|| {
            (!page.intact).then(|| format!("page {}/{} does not match its digest", page.layer, page.index))
        });
        if let Some(reason) = refusal {
            self.remove(request);
            self.give_up(now, request, from, reason);
            return;
        }
        landing.landed.insert(page.layer, page.index);
        landing.bytes += u64::from(page.bytes);
        self.stats.pages += 1;
        self.stats.bytes += u64::from(page.bytes);
        session.deadline = now + self.config.lease;
        session.patient_until = now + self.config.patience;
        if let Some(pages) = landing.take_credit(self.config.credit_pages) {
            self.send(from, ReceiverMsg::Credit { request, pages });
        }
        self.settle_if_landed(request);
    }

    fn settle_if_landed(&mut self, request: RequestId) {
        let State::Closing(landing, _) = &self.sessions[&request].state else { return };
        if landing.landed.len < landing.total() {
            return;
        }
        assert_eq!(step(Phase::Closing, Cause::AllLanded), Step::End, "{request}");
        let State::Closing(landing, first) = self.remove(request) else { unreachable!("{request}: just seen") };
        self.ended += 1;
        self.stats.committed += 1;
        let pages = landing.landed.len;
        self.send(landing.job.from, ReceiverMsg::Commit { request });
        self.outputs.push_back(ReceiverOutput::Event(ReceiveEvent::Landed {
            request,
            first,
            pages,
            bytes: landing.bytes,
        }));
    }

    /// Whether a peer's word about a session may be acted upon; strays are counted, violations end the session.
    fn admit(&mut self, now: Instant, from: &NodeName, request: RequestId, cause: Cause) -> bool {
        let own = self.peer(request).is_some_and(|peer| peer == from);
        let phase = if own { self.phase(request) } else { Phase::Absent };
        match step(phase, cause) {
            Step::Enter(_) | Step::End => true,
            Step::Ignore => {
                self.stats.strays += 1;
                false
            }
            Step::Violation => {
                self.violate(now, request, from.clone(), format!("{cause:?} while {phase:?}"));
                false
            }
            Step::Bug => unreachable!("{request}: a message is never our own mistake"),
        }
    }

    /// The sender is gone, for this request or altogether.
    fn on_peer_gone(&mut self, now: Instant, request: RequestId, cause: Cause, reason: String) {
        let phase = self.phase(request);
        let over = step(phase, cause);
        assert!(matches!(over, Step::End | Step::Enter(Phase::Gone)), "{request}: {cause:?} while {phase:?}");
        match self.remove(request) {
            State::Offered(_) => self.remember(now, request, reason),
            State::Expected(_) => {
                self.fail(request, reason.clone());
                self.remember(now, request, reason);
            }
            State::Landing(_) | State::Closing(..) => self.fail(request, reason),
            State::Gone(_) => unreachable!("{request}: nobody is left to go"),
        }
    }

    fn on_deadline(&mut self, now: Instant, request: RequestId) {
        let phase = self.phase(request);
        assert!(matches!(step(phase, Cause::Deadline), Step::End | Step::Enter(Phase::Gone)), "{request}: {phase:?}");
        let session = self.sessions.remove(&request).expect("a session ends once");
        let within = if now >= session.patient_until {
            format!("within {:?}", self.config.patience)
        } else {
            format!("and no sign of life within {:?}", self.config.lease)
        };
        match session.state {
            State::Expected(_) => {
                let reason = format!("no offer {within}");
                self.fail(request, reason.clone());
                self.remember(now, request, reason);
            }
            State::Offered(offer) => {
                let reason = format!("no reservation {within}");
                self.abort(now, offer.from, request, reason.clone());
                self.remember(now, request, reason);
            }
            State::Landing(landing) | State::Closing(landing, _) => {
                let (landed, total) = (landing.landed.len, landing.total());
                let reason = format!("no page {within}, {landed} of {total} landed");
                self.give_up(now, request, landing.job.from, reason);
            }
            State::Gone(_) => {}
        }
    }

    /// The peer broke the protocol.
    fn violate(&mut self, now: Instant, request: RequestId, from: NodeName, reason: String) {
        let reason = format!("sender broke the protocol: {reason}");
        match self.remove(request) {
            State::Offered(_) => {
                self.abort(now, from, request, reason.clone());
                self.remember(now, request, reason);
            }
            _ => self.give_up(now, request, from, reason),
        }
    }

    /// Ends a transfer whose session is already removed: the peer is told, and the scheduler.
    fn give_up(&mut self, now: Instant, request: RequestId, from: NodeName, reason: String) {
        self.abort(now, from, request, reason.clone());
        self.fail(request, reason);
    }

    /// Keeps a failure for the side that has not been heard of yet. Beyond the limit it is told after its deadline.
    fn remember(&mut self, now: Instant, request: RequestId, reason: String) {
        if self.sessions.len() - self.sessions() < self.config.max_sessions {
            // The other side may take as long to come as it may to wait.
            let until = now + self.config.patience;
            self.sessions
                .insert(request, Session { state: State::Gone(reason), deadline: until, patient_until: until });
        }
    }

    fn fail(&mut self, request: RequestId, reason: String) {
        self.ended += 1;
        self.stats.aborted += 1;
        self.outputs.push_back(ReceiverOutput::Event(ReceiveEvent::Failed { request, reason }));
    }

    fn send(&mut self, to: NodeName, message: ReceiverMsg) {
        self.outputs.push_back(ReceiverOutput::Send { to, message });
    }

    fn remove(&mut self, request: RequestId) -> State {
        self.sessions.remove(&request).expect("a session ends once").state
    }

    fn phase(&self, request: RequestId) -> Phase {
        self.sessions.get(&request).map_or(Phase::Absent, Session::phase)
    }

    /// Whose transfer it is, as far as that is known.
    fn peer(&self, request: RequestId) -> Option<&NodeName> {
        self.sessions.get(&request)?.peer()
    }
}

/// A page that came in, without its place of origin.
struct Page {
    layer: u32,
    index: u32,
    bytes: u32,
    intact: bool,
}

impl Session {
    fn phase(&self) -> Phase {
        match self.state {
            State::Expected(_) => Phase::Expected,
            State::Offered(_) => Phase::Offered,
            State::Landing(_) => Phase::Landing,
            State::Closing(..) => Phase::Closing,
            State::Gone(_) => Phase::Gone,
        }
    }

    fn peer(&self) -> Option<&NodeName> {
        match &self.state {
            State::Expected(job) => Some(&job.from),
            State::Offered(offer) => Some(&offer.from),
            State::Landing(landing) | State::Closing(landing, _) => Some(&landing.job.from),
            State::Gone(_) => None,
        }
    }
}

impl Landing {
    /// Pages that were granted.
    fn total(&self) -> u64 {
        (self.job.blocks.len() as u64 - u64::from(self.job.have)) * u64::from(self.job.layers)
    }

    /// Why a page may not land.
    fn refusal(&self, layer: u32, index: u32) -> Option<String> {
        if layer >= self.job.layers || index < self.job.have || index as usize >= self.job.blocks.len() {
            Some(format!(
                "page {layer}/{index} is outside layers 0..{}, blocks {}..{}",
                self.job.layers,
                self.job.have,
                self.job.blocks.len()
            ))
        } else if self.landed.contains(layer, index) {
            Some(format!("page {layer}/{index} came twice"))
        } else if self.landed.len >= self.granted {
            Some(format!("page {layer}/{index} is beyond the credit of {}", self.granted))
        } else {
            None
        }
    }

    /// Credit to give back: whole steps of half the window, so that a message pays for many pages.
    fn take_credit(&mut self, window: u32) -> Option<u32> {
        let in_flight = self.granted - self.landed.len;
        let free = u64::from(window).saturating_sub(in_flight);
        let more = free.min(self.total() - self.granted);
        let step = u64::from(window / 2).max(1).min(self.total() - self.granted);
        if more == 0 || more < step {
            return None;
        }
        self.granted += more;
        Some(more as u32)
    }

    fn check_integrity(&self, window: u32) {
        self.landed.check_integrity();
        assert!(self.landed.len <= self.granted, "no page without credit");
        assert!(self.granted <= self.total(), "no credit beyond the grant");
        assert!(self.granted - self.landed.len <= u64::from(window), "credit in flight is bounded");
    }
}

impl Machine for Receiver {
    type Input = ReceiverInput;
    type Output = ReceiverOutput;

    fn handle(&mut self, now: Instant, input: ReceiverInput) {
        match input {
            ReceiverInput::Command(ReceiveCommand::Expect(job)) => self.on_expect(now, job),
            ReceiverInput::Command(ReceiveCommand::Cancel { request, reason }) => {
                self.on_cancel(now, request, reason);
            }
            ReceiverInput::Message { from, message } => self.on_message(now, from, message),
            ReceiverInput::PageLanded { from, request, layer, index, bytes, intact } => {
                self.on_page(now, from, request, Page { layer, index, bytes, intact });
            }
            ReceiverInput::PeerLost { peer, reason } => {
                self.aborts.lost(&peer);
                let lost: Vec<RequestId> = self
                    .sessions
                    .iter()
                    .filter(|(_, s)| s.peer() == Some(&peer) && !matches!(s.state, State::Expected(_)))
                    .map(|(request, _)| *request)
                    .collect();
                for request in lost {
                    self.on_peer_gone(now, request, Cause::PeerLost, format!("lost {peer}: {reason}"));
                }
            }
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.stats.unacknowledged += self.aborts.expire(now);
        if self.pulse.beat(now) {
            self.show_life(now);
        }
        let late: Vec<RequestId> =
            self.sessions.iter().filter(|(_, session)| session.deadline <= now).map(|(request, _)| *request).collect();
        for request in late {
            self.on_deadline(now, request);
        }
    }

    fn poll_output(&mut self) -> Option<ReceiverOutput> {
        self.outputs.pop_front()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let sessions = self.sessions.values().map(|session| session.deadline);
        sessions.chain(self.pulse.next()).chain(self.aborts.next()).min()
    }

    fn check_integrity(&self) {
        let live = self.sessions();
        assert!(live <= self.config.max_sessions, "the number of sessions is bounded");
        assert!(self.sessions.len() - live <= self.config.max_sessions, "the number of memories is bounded");
        let mut open = 0;
        for session in self.sessions.values() {
            match &session.state {
                State::Expected(_) => open += 1,
                State::Landing(landing) | State::Closing(landing, _) => {
                    open += 1;
                    landing.check_integrity(self.config.credit_pages);
                }
                State::Offered(_) | State::Gone(_) => {}
            }
        }
        assert_eq!(self.expected, self.ended + open, "every reservation ends exactly once");
        assert_eq!(self.ended, self.stats.committed + self.stats.aborted, "every end is counted");
    }
}

/// The transition table as text, for the snapshot.
#[cfg(test)]
pub(super) fn table() -> String {
    use Cause::*;
    let phases = [Phase::Absent, Phase::Expected, Phase::Offered, Phase::Landing, Phase::Closing, Phase::Gone];
    let causes = [Expect, Cause::Offer, Finish, Cancel, Page, PeerAbort, PeerLost, Deadline, AllLanded];
    ridge_protocol::step::table("receiver", &phases, &causes, step)
}
