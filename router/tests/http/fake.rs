//! A byte-level model, a scripted cluster, and a server between them.

use ridge_protocol::stats::{BlockCounts, DeviceStats, LinkStats, NodeStats, ProtocolErrors};
use ridge_protocol::transfer::TransferTimes;
use ridge_protocol::wire::{FinishReason, NodeHello, Receipt};
use ridge_protocol::{
    BlockShape, CacheDtype, Conversion, Grammar, ModelIdentity, NodeId, NodeName, Role, SamplingParams, TokenId,
    TokenOut,
};
use ridge_router::machine::{NodeView, ReplyEvent, RouterError, RouterStats, Submit, Usage};
use ridge_router::shell::gateway::{ClusterView, Gateway, GatewayRequest, Health};
use ridge_router::shell::http::{Defaults, HttpConfig, TextModel, TextStream, serve};
use serde_json::{Map, Value};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};

pub const EOS: TokenId = 256;
pub const BOS: TokenId = 257;
pub const CONTEXT: u32 = 64;

/// Token `b` is byte `b`; three more tokens follow: EOS, BOS and one of four characters.
pub struct Bytes(Defaults);

struct ByteStream {
    skip_special: bool,
    pending: Vec<u8>,
}

fn bytes_of(token: TokenId) -> Vec<u8> {
    match token {
        0..=255 => vec![token as u8],
        EOS => b"<eos>".to_vec(),
        BOS => b"<bos>".to_vec(),
        _ => b"word".to_vec(),
    }
}

impl TextModel for Bytes {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        if text.contains('\0') {
            return Err("the text has a NUL".into());
        }
        assert!(!text.contains('\u{1}'), "a bug in the tokenizer");
        Ok(add_special.then_some(BOS).into_iter().chain(text.bytes().map(TokenId::from)).collect())
    }

    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        let tokens = tokens.iter().filter(|token| !skip_special || !matches!(**token, EOS | BOS));
        String::from_utf8_lossy(&tokens.flat_map(|token| bytes_of(*token)).collect::<Vec<_>>()).into_owned()
    }

    fn stream_decoder(&self, _prompt: &[TokenId], skip_special: bool) -> Box<dyn TextStream> {
        Box::new(ByteStream { skip_special, pending: Vec::new() })
    }

    fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        bytes_of(token)
    }

    fn vocab_size(&self) -> u32 {
        259
    }

    fn render_chat(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, String> {
        let mut out = tools.map(|tools| format!("[{} tools]", tools.as_array().unwrap().len())).unwrap_or_default();
        for message in messages.as_array().unwrap() {
            let role = message["role"].as_str().unwrap();
            if role == "alien" {
                return Err("unknown role".into());
            }
            out.push_str(&format!("{}:{}|", &role[..1], message["content"].as_str().unwrap()));
            if let Some(calls) = message.get("tool_calls") {
                out.push_str(&calls[0]["function"]["arguments"]["x"].to_string());
            }
        }
        out.push_str(extra.get("suffix").and_then(Value::as_str).unwrap_or_default());
        if add_generation_prompt {
            out.push_str("a:");
        }
        Ok(out)
    }

    fn check_grammar(&self, grammar: &Grammar) -> Result<(), String> {
        if grammar.text.contains("bad") { Err("it is bad".into()) } else { Ok(()) }
    }

    fn defaults(&self) -> &Defaults {
        &self.0
    }
}

impl TextStream for ByteStream {
    fn push(&mut self, token: TokenId) -> Option<String> {
        if self.skip_special && matches!(token, EOS | BOS) {
            return None;
        }
        self.pending.extend(bytes_of(token));
        let text = String::from_utf8(self.pending.clone()).ok()?;
        self.pending.clear();
        Some(text)
    }

    fn flush(&mut self) -> Option<String> {
        let rest = std::mem::take(&mut self.pending);
        (!rest.is_empty()).then(|| String::from_utf8_lossy(&rest).into_owned())
    }
}

/// What the scripted cluster does with a sequence.
#[derive(Clone, Debug)]
pub enum Do {
    Token(TokenOut),
    Sleep(u64),
    Finish(FinishReason),
    Fail(RouterError),
    /// Say nothing more until the client is gone.
    Hang,
}

pub type Script = Arc<dyn Fn(&Submit) -> Vec<Do> + Send + Sync>;

pub fn token(token: TokenId) -> Do {
    Do::Token(TokenOut { token, logprob: None, top: Vec::new(), ends: false })
}

/// The bytes of `text`.
pub fn tokens(text: &str) -> Vec<Do> {
    text.bytes().map(|byte| token(byte.into())).collect()
}

pub fn script(actions: Vec<Do>) -> Script {
    Arc::new(move |_| actions.clone())
}

/// Says `text` and ends with EOS, or with the length limit if that comes first.
pub fn say(text: &str) -> Script {
    let text = text.to_owned();
    Arc::new(move |submit| {
        let mut actions = tokens(&text);
        if actions.len() >= submit.params.max_tokens as usize {
            actions.truncate(submit.params.max_tokens as usize);
            actions.push(Do::Finish(FinishReason::Length));
        } else {
            actions.extend([token(EOS), Do::Finish(FinishReason::Stop)]);
        }
        actions
    })
}

/// Says `text` and then nothing.
pub fn hang_after(text: &str) -> Script {
    script(tokens(text).into_iter().chain([Do::Hang]).collect())
}

pub fn fail(error: RouterError) -> Script {
    script(vec![Do::Fail(error)])
}

/// What every answer's KV came by.
pub fn receipt() -> Receipt {
    let blocks = |size, dtype| BlockShape::new(size, dtype).expect("a block holds a token");
    Receipt {
        cached: 2,
        computed: 1,
        transferred: 3,
        recomputed: 0,
        transfer_bytes: 4096,
        times: TransferTimes { hidden_us: 70, exposed_us: 5 },
        converted: Some(Conversion { from: blocks(16, CacheDtype::Bf16), to: blocks(32, CacheDtype::Int8) }),
    }
}

#[derive(Default)]
pub struct Log {
    pub submitted: Vec<Submit>,
    pub gone: usize,
    pub finished: usize,
}

/// A server over a scripted cluster.
pub struct Server {
    pub addr: SocketAddr,
    pub log: Arc<Mutex<Log>>,
    pub view: watch::Sender<Arc<ClusterView>>,
    pub stop: Option<oneshot::Sender<()>>,
    pub task: tokio::task::JoinHandle<std::io::Result<()>>,
}

pub fn config() -> HttpConfig {
    HttpConfig {
        served_model_names: vec!["org/fake".into(), "alias".into()],
        max_model_len: CONTEXT,
        max_body_bytes: 100_000,
        version: "9.9".into(),
        ..HttpConfig::default()
    }
}

impl Server {
    pub async fn start(script: Script) -> Self {
        Self::with(config(), Defaults { eos: vec![EOS], ..Defaults::default() }, script).await
    }

    pub async fn with(config: HttpConfig, defaults: Defaults, script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (requests, inbox) = mpsc::channel(64);
        let (view, watcher) = watch::channel(Arc::new(cluster()));
        let log: Arc<Mutex<Log>> = Arc::default();
        tokio::spawn(cluster_loop(inbox, script, log.clone()));
        let (stop, stopped) = oneshot::channel::<()>();
        let gateway = Gateway::new(requests, watcher);
        let shutdown = async move {
            stopped.await.ok();
        };
        let task = tokio::spawn(serve(listener, config, Arc::new(Bytes(defaults)), gateway, shutdown));
        Self { addr, log, view, stop: Some(stop), task }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    /// The parameters of the `index`th sequence.
    pub fn params(&self, index: usize) -> SamplingParams {
        self.log.lock().unwrap().submitted[index].params.clone()
    }

    /// Waits until so many submissions were dropped unfinished.
    pub async fn wait_gone(&self, count: usize) {
        for _ in 0..500 {
            if self.log.lock().unwrap().gone >= count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("only {} of {count} submissions were dropped", self.log.lock().unwrap().gone);
    }

    pub async fn wait_submitted(&self, count: usize) {
        for _ in 0..500 {
            if self.log.lock().unwrap().submitted.len() >= count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no {count} submissions");
    }
}

async fn cluster_loop(mut inbox: mpsc::Receiver<GatewayRequest>, script: Script, log: Arc<Mutex<Log>>) {
    while let Some(request) = inbox.recv().await {
        match request {
            GatewayRequest::Submit(submit, events) => {
                let actions = script(&submit);
                let prompt_tokens = submit.tokens.len() as u32;
                log.lock().unwrap().submitted.push(submit);
                tokio::spawn(act(actions, events, prompt_tokens, log.clone()));
            }
            GatewayRequest::Gone(_) => log.lock().unwrap().gone += 1,
            GatewayRequest::DrainNode(name, answer) => drop(answer.send(name.0 == "decode-0")),
        }
    }
}

async fn act(actions: Vec<Do>, events: mpsc::Sender<ReplyEvent>, prompt_tokens: u32, log: Arc<Mutex<Log>>) {
    let mut index = 0;
    for action in actions {
        let event = match action {
            Do::Token(out) => {
                index += 1;
                let usage = Usage { prompt_tokens, completion_tokens: index, cached_tokens: 2, receipt: receipt() };
                ReplyEvent::Token { index: index - 1, out, usage }
            }
            Do::Sleep(ms) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                continue;
            }
            Do::Finish(reason) => {
                log.lock().unwrap().finished += 1;
                let usage = Usage { prompt_tokens, completion_tokens: index, cached_tokens: 2, receipt: receipt() };
                ReplyEvent::Finished { reason, usage }
            }
            Do::Fail(error) => ReplyEvent::Failed(error),
            Do::Hang => return events.closed().await,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

fn cluster() -> ClusterView {
    let identity = ModelIdentity {
        weights: [0; 32],
        config: [0; 32],
        tokenizer: [0; 32],
        layers: 1,
        kv_heads: 1,
        head_dim: 1,
        block_size: 16,
        kv_dtype: CacheDtype::F32,
        kv_layout: String::new(),
        rope: String::new(),
    };
    let link = LinkStats {
        peer: NodeName("decode-0".into()),
        rtt_us: 250,
        bytes_per_s: 1_000_000_000,
        mtu: 8952,
        sent_packets: 9,
        lost_packets: 2,
    };
    let node = |number: u32, name: &str, role: Role| NodeView {
        node: NodeId(number),
        hello: NodeHello {
            name: NodeName(name.into()),
            role,
            kv_addr: None,
            identity: identity.clone(),
            max_model_len: 1 << 20,
            blocks: 10,
            pid: 1,
        },
        stats: NodeStats {
            blocks: BlockCounts { total: 10, free: 4, cached: 3, used: 2, reserved: 1, held: 0 },
            transfer_bytes: 77,
            busy_us: 1_500_000,
            protocol_errors: ProtocolErrors { page: 2, ..ProtocolErrors::default() },
            // Prompts are computed on a device, whose driver does not say how warm it is.
            device: (role == Role::Prefill).then_some(DeviceStats {
                power_mw: Some(321_500),
                busy_percent: Some(97),
                clock_mhz: Some(1980),
                ..DeviceStats::default()
            }),
            ..NodeStats::default()
        },
        links: if role == Role::Prefill { vec![link.clone()] } else { Vec::new() },
        in_flight: 0,
        draining: false,
    };
    ClusterView {
        health: Health::Ready,
        nodes: vec![node(1, "decode-0", Role::Decode), node(2, "prefill-0", Role::Prefill)],
        router: RouterStats { finished: 5, ..RouterStats::default() },
        recordings_stopped: 0,
        protocol_errors: ProtocolErrors { control: 3, ..ProtocolErrors::default() },
    }
}
