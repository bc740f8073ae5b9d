//! The process around the prefill machine: loads the model, then one loop over one closed set of events.

mod damage;

use crate::machine::{PrefillConfig, PrefillInput, PrefillNode, PrefillOutput};
use damage::Damage;
use ridge_kvtransfer::shell::link::{self, LinkEvent, LinkOptions};
use ridge_kvtransfer::shell::process::{Clock, Status};
use ridge_kvtransfer::shell::record::{RecordError, RecordOptions, Recorded};
use ridge_kvtransfer::shell::{
    ControlHandle, Endpoint, EndpointError, KvClient, KvClientEvent, Link, NodeTls, OutgoingPage, TlsError,
};
use ridge_kvtransfer::{Sender, SenderConfig, SenderInput};
use ridge_model::checkpoint::LoadProgress;
use ridge_model::cuda::monitor::Monitor;
use ridge_model::kv::KvMemory;
use ridge_model::memory::PassLimits;
use ridge_model::worker::{EngineOptions, SetupError, Worker, WorkerDied, WorkerEvent, load_engine};
use ridge_protocol::page::seeded_digest;
use ridge_protocol::stats::LinkStats;
use ridge_protocol::transfer::{SendCommand, SendEvent};
use ridge_protocol::wire::{NodeHello, NodeToRouter};
use ridge_protocol::{Duration, Machine, Role};
use std::future::Future;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Events of the KV connections that wait for the loop.
const KV_EVENTS: usize = 1024;
/// How long a node that was asked to stop goes on with what it has.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// How a prefill node is set up. The model decides the machine's block count, layers, vocabulary and context.
#[derive(Clone, PartialEq, Debug)]
pub struct PrefillOptions {
    /// Its place in the network.
    pub link: LinkOptions,
    /// Its engine.
    pub engine: EngineOptions,
    /// Its scheduler.
    pub machine: PrefillConfig,
    /// Its half of the hand-off.
    pub sender: SenderConfig,
    /// Where its machines are recorded, if they are.
    pub record: Option<RecordOptions>,
    /// For tests: damage one page of so many on its way out.
    pub corrupt_pages: Option<u32>,
}

/// Why a prefill node stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeRunError {
    /// The engine could not be set up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The certificates could not be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The socket could not be had.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The recording that was asked for could not be begun.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The engine is gone.
    #[error(transparent)]
    Worker(#[from] WorkerDied),
    /// The router will not have this node.
    #[error("the router refused this node: {0}")]
    Refused(String),
}

/// Everything that can wake the loop.
enum Event {
    Engine(WorkerEvent),
    Link(LinkEvent),
    Kv(KvClientEvent),
    Timer,
    Shutdown,
}

/// Runs a prefill node until `shutdown`, then drains.
pub async fn run(options: PrefillOptions, shutdown: impl Future<Output = ()>) -> Result<(), NodeRunError> {
    let tls = NodeTls::read(&options.link.tls_dir.join("ca.pem"), &options.link.tls_dir)?;
    let endpoint = Endpoint::bind(options.link.listen, &tls, &options.link.transport)?;
    let max_batched_tokens = options.machine.max_batched_tokens.max(options.engine.block_size as u32);
    let pass = PassLimits { tokens: max_batched_tokens as usize, sequences: options.machine.max_running };
    let loaded = load_engine(&options.engine, pass, &mut |progress| {
        if let LoadProgress::Download { done, total, .. } = progress {
            Status::Loading(done as f32 / total.max(1) as f32).print();
        }
    })?;
    let config = PrefillConfig {
        blocks: loaded.kv.blocks() as u32,
        block_size: options.engine.block_size as u32,
        layers: loaded.kv.layers() as u32,
        vocab: loaded.checkpoint.spec.vocab as u32,
        max_model_len: loaded.max_model_len as u32,
        max_batched_tokens,
        ..options.machine
    };
    let hello = NodeHello {
        name: options.link.name.clone(),
        role: Role::Prefill,
        kv_addr: None,
        identity: loaded.identity.clone(),
        max_model_len: config.max_model_len,
        blocks: config.blocks,
        pid: std::process::id(),
    };
    // A pass reports each layer and its end before the next one starts, so the engine never waits for the loop.
    let (engine_events, mut from_engine) = mpsc::channel(loaded.kv.layers() + 2);
    let worker = Worker::spawn(loaded.engine, &options.engine.placement, true, move |event| {
        // The loop is gone only when the process is about to be.
        let _ = engine_events.blocking_send(event);
    });
    let (kv_events, mut from_kv) = mpsc::channel(KV_EVENTS);
    let sender = options.sender.of_model(&loaded.identity);
    let client = KvClient::new(endpoint.clone(), options.link.name.clone(), loaded.identity, kv_events);
    let (name, record) = (&options.link.name, options.record.as_ref());
    let machine = Recorded::start(name, config, record)?;
    let sender = Recorded::start(name, sender, record)?;
    let mut from_link = link::start(endpoint.clone(), &options.link, hello);
    Status::Ready { role: Role::Prefill, name: &options.link.name, addr: endpoint.local_addr(), http: None }.print();
    let mut shell = Shell {
        clock: Clock::start(),
        machine,
        sender,
        worker,
        client,
        kv: loaded.kv,
        monitor: loaded.monitor,
        endpoint: endpoint.clone(),
        router: None,
        drained: false,
        damage: options.corrupt_pages.map(Damage::new),
    };
    let mut shutdown = std::pin::pin!(shutdown);
    let mut drain_until = None;
    loop {
        shell.pump().await?;
        if drain_until.is_some_and(|until| shell.drained || shell.clock.now() >= until) {
            break;
        }
        let deadline =
            [shell.machine.poll_timeout(), shell.sender.poll_timeout(), drain_until].into_iter().flatten().min();
        let event = tokio::select! {
            event = from_engine.recv() => Event::Engine(event.ok_or(WorkerDied)?),
            Some(event) = from_kv.recv() => Event::Kv(event),
            Some(event) = from_link.recv() => Event::Link(event),
            () = shell.clock.sleep_until(deadline) => Event::Timer,
            () = &mut shutdown, if drain_until.is_none() => Event::Shutdown,
        };
        let now = shell.clock.now();
        match event {
            Event::Engine(WorkerEvent::LayerDone { step, layer }) => {
                shell.machine.handle(now, PrefillInput::LayerDone { step, layer });
            }
            Event::Engine(WorkerEvent::StepDone { step, outputs, busy }) => {
                shell.machine.handle(now, PrefillInput::StepDone { step, outputs, busy });
            }
            Event::Kv(event) => {
                let input = shell.client.heard(event);
                shell.sender.handle(now, input);
            }
            Event::Link(LinkEvent::Up(node, handle)) => {
                tracing::info!(node = node.0, "joined the cluster");
                shell.router = Some(handle);
                shell.machine.handle(now, PrefillInput::RouterUp);
            }
            Event::Link(LinkEvent::Message(message)) => shell.machine.handle(now, PrefillInput::Router(message)),
            Event::Link(LinkEvent::Down(_)) => {
                shell.router = None;
                shell.machine.handle(now, PrefillInput::RouterLost);
            }
            Event::Link(LinkEvent::Refused(reason)) => return Err(NodeRunError::Refused(reason)),
            Event::Timer => {
                shell.machine.handle_timeout(now);
                shell.sender.handle_timeout(now);
            }
            Event::Shutdown => {
                drain_until = Some(now + DRAIN_DEADLINE);
                shell.machine.handle(now, PrefillInput::Shutdown);
                shell.drained = shell.machine.is_idle();
            }
        }
    }
    link::leave(&endpoint, shell.router.take(), &mut from_link).await;
    Ok(())
}

/// The machines and what their outputs act on.
struct Shell {
    clock: Clock,
    machine: Recorded<PrefillNode>,
    sender: Recorded<Sender>,
    worker: Worker,
    client: KvClient,
    kv: Arc<KvMemory>,
    /// Watches the device.
    monitor: Option<Monitor>,
    endpoint: Endpoint,
    router: Option<ControlHandle<NodeToRouter>>,
    drained: bool,
    damage: Option<Damage>,
}

impl Shell {
    /// Does what the machines want done, until neither wants anything.
    async fn pump(&mut self) -> Result<(), NodeRunError> {
        loop {
            if let Some(output) = self.machine.poll_output() {
                self.act(output)?;
            } else if let Some(output) = self.sender.poll_output() {
                let kv = &self.kv;
                let fill = |page: OutgoingPage<'_>, buffer: &mut _| {
                    // Made while it was computed, if there was room; else out of the node's own pages now.
                    if kv.outgoing().take(page.request, page.layer, page.index, buffer) {
                        return seeded_digest(page.seed(), buffer);
                    }
                    kv.digested_page_in(page.blocks, page.layer as usize, page.source, page.seed(), buffer)
                };
                let damage = |request, bytes| match &mut self.damage {
                    Some(damage) => damage.apply(request, bytes),
                    None => bytes,
                };
                if let Some(event) = self.client.act(output, fill, damage) {
                    let SendEvent::Settled { request, .. } = &event;
                    self.kv.outgoing().close(*request);
                    self.machine.handle(self.clock.now(), PrefillInput::Transfer(event));
                }
                self.client.take_turns().await;
            } else {
                return Ok(());
            }
        }
    }

    fn act(&mut self, output: PrefillOutput) -> Result<(), NodeRunError> {
        match output {
            PrefillOutput::Run(plan) => self.worker.run(plan)?,
            PrefillOutput::Transfer(command) => {
                match &command {
                    // Before the pass that makes its first pages.
                    SendCommand::Begin(job) => self.kv.outgoing().open(job.request),
                    SendCommand::Cancel { request, .. } => self.kv.outgoing().close(*request),
                    _ => {}
                }
                self.sender.handle(self.clock.now(), SenderInput::Command(command));
            }
            PrefillOutput::ToRouter(mut message) => {
                match &mut message {
                    NodeToRouter::Stats(stats) => {
                        self.sender.stats().report(stats);
                        stats.device_converted_pages = self.kv.outgoing().taken();
                        stats.protocol_errors = self.endpoint.protocol_errors();
                        stats.device = self.monitor.as_ref().map(Monitor::latest);
                        let stopped = [self.machine.recordings_stopped(), self.sender.recordings_stopped()];
                        stats.recordings_stopped = stopped.iter().sum();
                        let links: Vec<LinkStats> = self.client.links().iter().map(Link::stats).collect();
                        self.tell_router(NodeToRouter::Links(links));
                    }
                    NodeToRouter::Drained => self.drained = true,
                    _ => {}
                }
                self.tell_router(message);
            }
        }
        Ok(())
    }

    /// Without a router nobody waits for the message: its loss has cancelled every request.
    fn tell_router(&mut self, message: NodeToRouter) {
        if let Some(router) = &mut self.router
            && let Err(error) = router.try_send(message)
        {
            tracing::warn!("message to the router lost: {error}");
        }
    }
}
