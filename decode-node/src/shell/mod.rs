//! The process around the decode machine: loads the model, then one loop over one closed set of events.

use crate::machine::{DecodeConfig, DecodeInput, DecodeNode, DecodeOutput};
use ridge_kvtransfer::shell::link::{self, LinkEvent, LinkOptions};
use ridge_kvtransfer::shell::process::{Clock, Status};
use ridge_kvtransfer::shell::record::{RecordError, RecordOptions, Recorded};
use ridge_kvtransfer::shell::{
    ControlHandle, Endpoint, EndpointError, KvClient, KvClientEvent, KvServer, KvServerEvent, NodeTls, OutgoingPage,
    PageBytes, TlsError,
};
use ridge_kvtransfer::{Receiver, ReceiverConfig, ReceiverInput, ReceiverOutput, Sender, SenderConfig, SenderInput};
use ridge_model::checkpoint::LoadProgress;
use ridge_model::cuda::monitor::Monitor;
use ridge_model::kv::KvMemory;
use ridge_model::memory::PassLimits;
use ridge_model::worker::{EngineOptions, SetupError, Worker, WorkerDied, WorkerEvent, load_engine};
use ridge_protocol::page::{PageHeader, page_seed};
use ridge_protocol::wire::{NodeHello, NodeToRouter};
use ridge_protocol::{BlockId, Duration, Machine, NodeName, Role};
use std::future::Future;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Pages and messages that wait for the loop: bounds the memory of KV that has arrived and not yet landed.
const KV_EVENTS: usize = 256;
/// Pages and messages taken in one go, if they are there: setting timers anew for each of them would cost more than landing it.
pub const KV_BURST: usize = 32;
/// How long a node that was asked to stop goes on with what it has.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// How a decode node is set up. The model decides the machine's block count, layers, vocabulary and context.
#[derive(Clone, PartialEq, Debug)]
pub struct DecodeOptions {
    /// Its place in the network.
    pub link: LinkOptions,
    /// Its engine.
    pub engine: EngineOptions,
    /// Its scheduler.
    pub machine: DecodeConfig,
    /// The half of the hand-off by which sequences come.
    pub receiver: ReceiverConfig,
    /// The half by which they leave when the node drains.
    pub sender: SenderConfig,
    /// Where its machines are recorded, if they are.
    pub record: Option<RecordOptions>,
}

/// Why a decode node stopped.
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
    Kv(KvServerEvent),
    Sent(KvClientEvent),
    Timer,
    Shutdown,
}

/// Runs a decode node until `shutdown`, then drains.
pub async fn run(options: DecodeOptions, shutdown: impl Future<Output = ()>) -> Result<(), NodeRunError> {
    let tls = NodeTls::read(&options.link.tls_dir.join("ca.pem"), &options.link.tls_dir)?;
    let endpoint = Endpoint::bind(options.link.listen, &tls, &options.link.transport)?;
    // Prompt tokens computed here come beside the running sequences' one each.
    let sequences = options.machine.max_num_seqs;
    let pass = PassLimits { tokens: sequences + options.machine.max_prefill_tokens as usize, sequences };
    let loaded = load_engine(&options.engine, pass, &mut |progress| {
        if let LoadProgress::Download { done, total, .. } = progress {
            Status::Loading(done as f32 / total.max(1) as f32).print();
        }
    })?;
    let config = DecodeConfig {
        blocks: loaded.kv.blocks() as u32,
        block_size: options.engine.block_size as u32,
        layers: loaded.kv.layers() as u32,
        vocab: loaded.checkpoint.spec.vocab as u32,
        max_model_len: loaded.max_model_len as u32,
        ..options.machine
    };
    let hello = NodeHello {
        name: options.link.name.clone(),
        role: Role::Decode,
        kv_addr: Some(options.link.advertise.unwrap_or(endpoint.local_addr())),
        identity: loaded.identity.clone(),
        max_model_len: config.max_model_len,
        blocks: config.blocks,
        pid: std::process::id(),
    };
    let (engine_events, mut from_engine) = mpsc::channel(2);
    let worker = Worker::spawn(loaded.engine, &options.engine.placement, false, move |event| {
        // The loop is gone only when the process is about to be.
        let _ = engine_events.blocking_send(event);
    });
    let (kv_events, mut from_kv) = mpsc::channel(KV_EVENTS);
    let (sent_events, mut from_sent) = mpsc::channel(KV_EVENTS);
    let name = options.link.name.clone();
    let client = KvClient::new(endpoint.clone(), name, loaded.identity.clone(), sent_events);
    let sender = options.sender.of_model(&loaded.identity);
    let server = KvServer::new(endpoint.clone(), loaded.identity, kv_events);
    let (name, record) = (&options.link.name, options.record.as_ref());
    let machine = Recorded::start(name, config, record)?;
    let receiver = Recorded::start(name, options.receiver, record)?;
    let sender = Recorded::start(name, sender, record)?;
    let mut from_link = link::start(endpoint.clone(), &options.link, hello);
    Status::Ready { role: Role::Decode, name: &options.link.name, addr: endpoint.local_addr(), http: None }.print();
    let mut shell = Shell {
        clock: Clock::start(),
        machine,
        receiver,
        sender,
        worker,
        server,
        client,
        kv: loaded.kv,
        monitor: loaded.monitor,
        endpoint: endpoint.clone(),
        router: None,
        drained: false,
    };
    let mut shutdown = std::pin::pin!(shutdown);
    let mut drain_until = None;
    loop {
        shell.pump().await?;
        if drain_until.is_some_and(|until| shell.drained || shell.clock.now() >= until) {
            break;
        }
        let machines = [shell.machine.poll_timeout(), shell.receiver.poll_timeout(), shell.sender.poll_timeout()];
        let deadline = machines.into_iter().chain([drain_until]).flatten().min();
        let event = tokio::select! {
            event = from_engine.recv() => Event::Engine(event.ok_or(WorkerDied)?),
            Some(event) = from_link.recv() => Event::Link(event),
            Some(event) = from_kv.recv() => Event::Kv(event),
            Some(event) = from_sent.recv() => Event::Sent(event),
            () = shell.clock.sleep_until(deadline) => Event::Timer,
            () = &mut shutdown, if drain_until.is_none() => Event::Shutdown,
        };
        let now = shell.clock.now();
        match event {
            Event::Engine(WorkerEvent::LayerDone { .. }) => {}
            Event::Engine(WorkerEvent::StepDone { step, outputs, busy }) => {
                shell.machine.handle(now, DecodeInput::StepDone { step, outputs, busy });
            }
            Event::Kv(event) => {
                shell.on_kv(event);
                for _ in 0..KV_BURST {
                    let Ok(event) = from_kv.try_recv() else { break };
                    shell.pump().await?;
                    shell.on_kv(event);
                }
            }
            Event::Sent(event) => {
                let input = shell.client.heard(event);
                shell.sender.handle(now, input);
            }
            Event::Link(LinkEvent::Up(node, handle)) => {
                tracing::info!(node = node.0, "joined the cluster");
                shell.router = Some(handle);
                shell.machine.handle(now, DecodeInput::RouterUp);
            }
            Event::Link(LinkEvent::Message(message)) => shell.machine.handle(now, DecodeInput::Router(message)),
            Event::Link(LinkEvent::Down(_)) => {
                shell.router = None;
                shell.machine.handle(now, DecodeInput::RouterLost);
            }
            Event::Link(LinkEvent::Refused(reason)) => return Err(NodeRunError::Refused(reason)),
            Event::Timer => {
                shell.machine.handle_timeout(now);
                shell.receiver.handle_timeout(now);
                shell.sender.handle_timeout(now);
            }
            Event::Shutdown => {
                drain_until = Some(now + DRAIN_DEADLINE);
                shell.machine.handle(now, DecodeInput::Shutdown);
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
    machine: Recorded<DecodeNode>,
    receiver: Recorded<Receiver>,
    sender: Recorded<Sender>,
    worker: Worker,
    server: KvServer,
    client: KvClient,
    kv: Arc<KvMemory>,
    /// Watches the device.
    monitor: Option<Monitor>,
    endpoint: Endpoint,
    router: Option<ControlHandle<NodeToRouter>>,
    drained: bool,
}

impl Shell {
    fn on_kv(&mut self, event: KvServerEvent) {
        match event {
            KvServerEvent::Message { from, message } => {
                self.receiver.handle(self.clock.now(), ReceiverInput::Message { from, message });
            }
            KvServerEvent::Page { from, header, bytes } => self.land(from, header, &bytes),
            KvServerEvent::Lost { peer, reason } => {
                tracing::warn!(%peer, %reason, "KV connection lost");
                self.receiver.handle(self.clock.now(), ReceiverInput::PeerLost { peer, reason });
            }
        }
    }

    /// Puts an arrived page where its transfer wants it and verifies it there, before anything may read it.
    fn land(&mut self, from: NodeName, header: PageHeader, bytes: &PageBytes) {
        let PageHeader { request, layer, index, len, .. } = header;
        let destination = self.receiver.destination(&from, request, layer, index);
        // A page that nobody wants belongs to a transfer that is over; the receiver counts it.
        let intact = destination.is_none_or(|block| land_page(&self.kv, block, &header, bytes));
        let landed = ReceiverInput::PageLanded { from, request, layer, index, bytes: len, intact };
        self.receiver.handle(self.clock.now(), landed);
    }

    /// Does what the machines want done, until none wants anything.
    async fn pump(&mut self) -> Result<(), NodeRunError> {
        loop {
            if let Some(output) = self.machine.poll_output() {
                self.act(output)?;
            } else if let Some(output) = self.receiver.poll_output() {
                match output {
                    ReceiverOutput::Send { to, message } => self.server.send(&to, message),
                    ReceiverOutput::Event(event) => {
                        self.machine.handle(self.clock.now(), DecodeInput::Transfer(event));
                    }
                }
            } else if let Some(output) = self.sender.poll_output() {
                let fill = |page: OutgoingPage<'_>, buffer: &mut _| {
                    self.kv.digested_page_in(page.blocks, page.layer as usize, page.source, page.seed(), buffer)
                };
                if let Some(event) = self.client.act(output, fill, |_, bytes| bytes) {
                    self.machine.handle(self.clock.now(), DecodeInput::Sent(event));
                }
                self.client.take_turns().await;
            } else {
                return Ok(());
            }
        }
    }

    fn act(&mut self, output: DecodeOutput) -> Result<(), NodeRunError> {
        match output {
            DecodeOutput::Run(plan) => self.worker.run(plan)?,
            DecodeOutput::Transfer(command) => {
                self.receiver.handle(self.clock.now(), ReceiverInput::Command(command));
            }
            DecodeOutput::Send(command) => self.sender.handle(self.clock.now(), SenderInput::Command(command)),
            DecodeOutput::ToRouter(mut message) => {
                match &mut message {
                    NodeToRouter::Stats(stats) => {
                        (self.receiver.stats() + self.sender.stats()).report(stats);
                        stats.protocol_errors = self.endpoint.protocol_errors();
                        stats.device = self.monitor.as_ref().map(Monitor::latest);
                        let stopped = [
                            self.machine.recordings_stopped(),
                            self.receiver.recordings_stopped(),
                            self.sender.recordings_stopped(),
                        ];
                        stats.recordings_stopped = stopped.iter().sum();
                    }
                    NodeToRouter::Drained => self.drained = true,
                    _ => {}
                }
                // Without a router nobody waits for the message: its loss has cancelled every request.
                if let Some(router) = &mut self.router
                    && let Err(error) = router.try_send(message)
                {
                    tracing::warn!("message to the router lost: {error}");
                }
            }
        }
        Ok(())
    }
}

/// Writes an arrived page into its block and says whether it is intact there. The page has the pool's page size.
pub fn land_page(kv: &KvMemory, block: BlockId, header: &PageHeader, bytes: &PageBytes) -> bool {
    let seed = page_seed(header.request, header.layer, header.index);
    kv.land(header.layer as usize, block, seed, bytes.pieces()) == header.digest
}
