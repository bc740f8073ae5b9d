//! The sending side of a measurement: a prefill node without an engine, whose prompts are all computed.
//!
//! Everything from the sender's machine to the wire is a prefill node's own; only the scheduler, which says which pages are
//! ready, is played here. Read [`SendingSide::round`].

use super::args::LoadArgs;
use super::load;
use super::usage::{Since, Usage};
use anyhow::{Context, bail, ensure};
use ridge_kvtransfer::shell::process::Clock;
use ridge_kvtransfer::shell::{Endpoint, KvClient, KvClientEvent, Link, NodeTls, OutgoingPage, TransportOptions};
use ridge_kvtransfer::{Sender, SenderConfig, SenderInput};
use ridge_model::kv::KvMemory;
use ridge_protocol::transfer::{KvPeer, Outcome, SendCommand, SendEvent, SendJob};
use ridge_protocol::{Machine, NodeName, TokenOut};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Events of the connection that wait for the loop, as many as in a prefill node.
const KV_EVENTS: usize = 1024;
/// How long a round may take.
const ROUND_DEADLINE: Duration = Duration::from_secs(120);

/// One end of a KV connection that ships prompts.
pub struct SendingSide {
    load: LoadArgs,
    kv: Arc<KvMemory>,
    clock: Clock,
    machine: Sender,
    client: KvClient,
    events: mpsc::Receiver<KvClientEvent>,
    peer: KvPeer,
}

/// What a round took on the sending side.
pub struct Sent {
    /// From the first offer to the last commit.
    pub usage: Usage,
    /// Seconds in which pages were ready and none could leave for want of credit.
    pub starved_s: f64,
    /// Pages that the receiver has committed, and their bytes.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl SendingSide {
    /// Binds an endpoint; the connection is made with the first round.
    pub fn new(
        load: &LoadArgs,
        kv: Arc<KvMemory>,
        tls: &NodeTls,
        transport: &TransportOptions,
        name: &NodeName,
        peer: KvPeer,
    ) -> anyhow::Result<Self> {
        let endpoint = Endpoint::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), tls, transport)?;
        let (to_events, events) = mpsc::channel(KV_EVENTS);
        let client = KvClient::new(endpoint, name.clone(), load.identity(), to_events);
        let machine = Sender::new(SenderConfig::default().of_model(&load.identity()));
        Ok(Self { load: load.clone(), kv, clock: Clock::start(), machine, client, events, peer })
    }

    /// The connection as it is now.
    pub fn link(&self) -> anyhow::Result<Link> {
        self.client.links().pop().context("there is no connection to the receiving process")
    }

    /// Ships all prompts, a few at a time, and waits until the receiver has committed them.
    pub async fn round(&mut self, round: usize) -> anyhow::Result<Sent> {
        let since = Since::now();
        let deadline = Instant::now() + ROUND_DEADLINE;
        let before = self.machine.stats();
        let mut sent = Sent { usage: Usage::default(), starved_s: 0.0, pages: 0, bytes: 0 };
        let (mut begun, mut settled) = (0, 0);
        while settled < self.load.prompts {
            while begun < self.load.prompts && begun - settled < self.load.concurrent {
                self.begin(round, begun);
                begun += 1;
            }
            for (pages, bytes) in self.pump().await? {
                settled += 1;
                sent.pages += pages;
                sent.bytes += bytes;
            }
            let begun_pages = (begun * self.load.blocks_each() * self.load.layers()) as u64;
            let starved = self.machine.stats().pages - before.pages < begun_pages;
            let waiting = Instant::now();
            if settled < self.load.prompts {
                self.wait(deadline).await?;
            }
            if starved {
                sent.starved_s += waiting.elapsed().as_secs_f64();
            }
        }
        self.machine.check_integrity();
        sent.usage = since.usage();
        Ok(sent)
    }

    /// Offers a prompt of which every page is ready.
    fn begin(&mut self, round: usize, prompt: usize) {
        let request = load::request(&self.load, round, prompt);
        let (layers, end) = (self.load.layers() as u32, self.load.blocks_each() as u32);
        let announce = SendCommand::Announce { request, to: self.peer.clone() };
        let job = SendJob {
            request,
            to: self.peer.clone(),
            tokens: self.load.prompt_tokens as u32,
            blocks: load::sender_blocks(&self.load, prompt),
            hashes: load::hashes(&self.load, round, prompt),
            layers,
        };
        let first = TokenOut { token: 0, logprob: None, top: Vec::new(), ends: false };
        let ready = (0..layers).map(|layer| SendCommand::Ready { request, layer, first: 0, end });
        let commands = [announce, SendCommand::Begin(job)]
            .into_iter()
            .chain(ready)
            .chain([SendCommand::Finish { request, first }]);
        for command in commands {
            self.machine.handle(self.clock.now(), SenderInput::Command(command));
        }
    }

    /// Does what the machine wants done; returns pages and bytes of every prompt that was committed.
    async fn pump(&mut self) -> anyhow::Result<Vec<(u64, u64)>> {
        let mut committed = Vec::new();
        while let Some(output) = self.machine.poll_output() {
            let fill = |page: OutgoingPage<'_>, buffer: &mut _| {
                self.kv.digested_page_in(page.blocks, page.layer as usize, page.source, page.seed(), buffer)
            };
            match self.client.act(output, fill, |_, bytes| bytes) {
                None => {}
                Some(SendEvent::Settled { outcome: Outcome::Committed { pages, bytes, .. }, .. }) => {
                    committed.push((pages, bytes));
                }
                Some(SendEvent::Settled { request, outcome: Outcome::Aborted(reason) }) => {
                    bail!("the transfer of prompt {request} was aborted: {reason}");
                }
            }
            self.client.take_turns().await;
        }
        Ok(committed)
    }

    /// Takes one event, or fires a deadline of the machine.
    async fn wait(&mut self, deadline: Instant) -> anyhow::Result<()> {
        ensure!(Instant::now() < deadline, "a round did not end within {ROUND_DEADLINE:?}");
        let timeout = self.machine.poll_timeout();
        tokio::select! {
            event = self.events.recv() => {
                let now = self.clock.now();
                match event.context("the KV client has ended")? {
                    KvClientEvent::Up { peer } => self.machine.handle(now, SenderInput::PeerUp(peer)),
                    KvClientEvent::Message { from, message } => {
                        self.machine.handle(now, SenderInput::Message { from, message });
                    }
                    KvClientEvent::Lost { reason, .. } => bail!("the connection to the receiving process is lost: {reason}"),
                }
            }
            () = self.clock.sleep_until(timeout) => self.machine.handle_timeout(self.clock.now()),
            () = tokio::time::sleep_until(deadline.into()) => {}
        }
        Ok(())
    }
}
