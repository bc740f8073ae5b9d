//! The receiving process of a measurement: a decode node without an engine, told by lines on its stdin what comes.
//!
//! Everything from the wire to the KV pages is a decode node's own; only the scheduler, which reserves blocks, is played here.
//! It answers every [`Order`] with one line of JSON on stdout and ends when stdin does.

use super::args::{LoadArgs, ReceiverArgs};
use super::usage::{Since, Usage};
use super::{RECEIVER, SENDER, load, reference};
use crate::roles;
use anyhow::{Context, bail};
use ridge_decode_node::shell::{KV_BURST, land_page};
use ridge_kvtransfer::shell::process::Clock;
use ridge_kvtransfer::shell::{Endpoint, KvServer, KvServerEvent, NodeTls};
use ridge_kvtransfer::{Receiver, ReceiverConfig, ReceiverInput, ReceiverOutput};
use ridge_model::kv::KvMemory;
use ridge_protocol::transfer::{ReceiveCommand, ReceiveEvent, ReceiveJob};
use ridge_protocol::{Machine, NodeName};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Pages and messages that wait for the loop, as many as in a decode node.
const KV_EVENTS: usize = 256;

/// What the receiving process is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Take the prompts of this round.
    Round(usize),
    /// Take this many bytes over plaintext TCP.
    Tcp(u64),
}

/// Where to send to: the first line, and the first answer to [`Order::Tcp`].
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Listening {
    /// An address on this machine.
    pub addr: SocketAddr,
}

/// What arrived in a round.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Received {
    /// From the order to the last landed page.
    pub usage: Usage,
    /// Pages that landed intact.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Pages that did not match their digest.
    pub digest_failures: u64,
    /// One digest over everything that landed, in the prompts' order.
    pub content: String,
    /// Cost of the pages' digests on this side, in seconds per byte.
    pub digest_s_per_byte: f64,
}

/// Runs the receiving process until its stdin ends.
pub fn run(args: &ReceiverArgs) -> anyhow::Result<()> {
    let kv = load::memory(&args.load)?;
    load::clear(&kv);
    let orders = orders()?;
    roles::node_runtime()?.block_on(serve(args, kv, orders))
}

/// A thread of its own reads stdin, as it can be neither cancelled nor waited for by the runtime.
fn orders() -> anyhow::Result<mpsc::Receiver<Order>> {
    let (to_orders, orders) = mpsc::channel(1);
    let read = move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let Ok(order) = serde_json::from_str(&line) else { return eprintln!("{line:?} is not an order") };
            if to_orders.blocking_send(order).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("stdin".into()).spawn(read).context("cannot start a thread")?;
    Ok(orders)
}

async fn serve(args: &ReceiverArgs, kv: Arc<KvMemory>, mut orders: mpsc::Receiver<Order>) -> anyhow::Result<()> {
    let tls = NodeTls::read(&args.tls_dir.join("ca.pem"), &args.tls_dir)?;
    let endpoint = Endpoint::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), &tls, &args.network.transport())?;
    let (to_events, events) = mpsc::channel(KV_EVENTS);
    let server = KvServer::new(endpoint.clone(), args.load.identity(), to_events);
    answer(&Listening { addr: endpoint.local_addr() })?;
    let machine = Receiver::new(ReceiverConfig::default());
    let mut side = ReceivingSide { load: args.load.clone(), kv, clock: Clock::start(), machine, server, events };
    while let Some(order) = orders.recv().await {
        match order {
            Order::Round(round) => answer(&side.round(round).await?)?,
            Order::Tcp(bytes) => {
                let listener = reference::listen()?;
                answer(&Listening { addr: listener.local_addr()? })?;
                tokio::task::spawn_blocking(move || reference::receive(&listener, bytes)).await??;
            }
        }
    }
    Ok(())
}

fn answer(answer: &impl Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer)?)?;
    Ok(out.flush()?)
}

struct ReceivingSide {
    load: LoadArgs,
    kv: Arc<KvMemory>,
    clock: Clock,
    machine: Receiver,
    server: KvServer,
    events: mpsc::Receiver<KvServerEvent>,
}

impl ReceivingSide {
    /// Reserves blocks for all prompts of a round and takes them in.
    async fn round(&mut self, round: usize) -> anyhow::Result<Received> {
        let since = Since::now();
        let before = self.machine.stats();
        for prompt in 0..self.load.prompts {
            let job = self.job(round, prompt);
            self.machine.handle(self.clock.now(), ReceiverInput::Command(ReceiveCommand::Expect(job)));
        }
        let mut landed = self.pump()?;
        while landed < self.load.prompts {
            self.wait().await?;
            landed += self.pump()?;
            // As a decode node does.
            for _ in 0..KV_BURST {
                let Ok(event) = self.events.try_recv() else { break };
                self.on_event(event)?;
                landed += self.pump()?;
            }
        }
        self.machine.check_integrity();
        let usage = since.usage();
        let stats = self.machine.stats();
        let (load, kv) = (self.load.clone(), self.kv.clone());
        // In a thread of its own, so that the connection stays alive.
        let checked = tokio::task::spawn_blocking(move || {
            let content = load::content(&load, &kv, load::receiver_blocks);
            let digest_s_per_byte = load::receiver_digest_s_per_byte(&kv);
            load::clear(&kv);
            (content, digest_s_per_byte)
        });
        let (content, digest_s_per_byte) = checked.await?;
        Ok(Received {
            usage,
            pages: stats.pages - before.pages,
            bytes: stats.bytes - before.bytes,
            digest_failures: stats.digest_failures - before.digest_failures,
            content,
            digest_s_per_byte,
        })
    }

    fn job(&self, round: usize, prompt: usize) -> ReceiveJob {
        ReceiveJob {
            request: load::request(&self.load, round, prompt),
            from: NodeName(SENDER.into()),
            tokens: self.load.prompt_tokens as u32,
            blocks: load::receiver_blocks(&self.load, prompt),
            hashes: load::hashes(&self.load, round, prompt),
            have: 0,
            layers: self.load.layers() as u32,
        }
    }

    /// Does what the machine wants done; returns the number of prompts that landed.
    fn pump(&mut self) -> anyhow::Result<usize> {
        let mut landed = 0;
        while let Some(output) = self.machine.poll_output() {
            match output {
                ReceiverOutput::Send { to, message } => self.server.send(&to, message),
                ReceiverOutput::Event(ReceiveEvent::Landed { .. }) => landed += 1,
                ReceiverOutput::Event(ReceiveEvent::Failed { request, reason }) => {
                    bail!("{RECEIVER}: the transfer of prompt {request} failed: {reason}")
                }
            }
        }
        Ok(landed)
    }

    async fn wait(&mut self) -> anyhow::Result<()> {
        let timeout = self.machine.poll_timeout();
        tokio::select! {
            event = self.events.recv() => return self.on_event(event.context("the KV server has ended")?),
            () = self.clock.sleep_until(timeout) => self.machine.handle_timeout(self.clock.now()),
        }
        Ok(())
    }

    fn on_event(&mut self, event: KvServerEvent) -> anyhow::Result<()> {
        match event {
            KvServerEvent::Message { from, message } => {
                self.machine.handle(self.clock.now(), ReceiverInput::Message { from, message });
            }
            KvServerEvent::Page { from, header, bytes } => {
                let destination = self.machine.destination(&from, header.request, header.layer, header.index);
                let intact = destination.is_none_or(|block| land_page(&self.kv, block, &header, &bytes));
                let (request, layer, index, bytes) = (header.request, header.layer, header.index, header.len);
                let landed = ReceiverInput::PageLanded { from, request, layer, index, bytes, intact };
                self.machine.handle(self.clock.now(), landed);
            }
            KvServerEvent::Lost { reason, .. } => bail!("{RECEIVER}: the connection is lost: {reason}"),
        }
        Ok(())
    }
}
