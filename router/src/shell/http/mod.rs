//! The OpenAI-compatible HTTP server: text at one side, tokens at the other.
//!
//! It reads requests, tokenizes prompts, submits sequences through the [`Gateway`] and turns the tokens that come
//! back into text. It does not know which node does the work, and decides nothing about it.
//!
//! A request passes through `edge` (who is it), `chat` or `completions` (what is asked, by way of `request`, `params`
//! and `messages`), `respond` and `generate` (submit, and read all answers), `answer` and `stop` (text that may be
//! shown), and leaves by `response` or `sse`; `resume` keeps streams whose connection broke. Read [`HttpConfig`] and
//! [`TextModel`] first, then `respond.rs`.

mod answer;
mod auth;
mod chat;
mod completions;
mod edge;
mod error;
mod fields;
mod generate;
mod grammar;
mod health;
mod logprobs;
mod messages;
mod metrics;
mod models;
mod nodes;
mod params;
mod request;
mod respond;
mod response;
mod resume;
mod server;
mod sse;
mod stop;
mod text_model;
mod tokenize;
mod tools;

pub use error::ApiError;
pub use resume::ResumeConfig;
pub use server::serve;
pub use stop::StopMatcher;
pub use text_model::{Defaults, TextModel, TextStream};

use crate::shell::gateway::Gateway;
use auth::Keys;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use axum::{Router, middleware};
use metrics::Metrics;
use resume::Streams;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, watch};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;

/// How to serve.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpConfig {
    /// Where the listener is bound; only looked at to warn about an open door.
    pub bind: SocketAddr,
    /// What clients may call the model; at least one name, the first is its id.
    pub served_model_names: Vec<String>,
    /// Keys that are let in; none lets everybody in.
    pub api_keys: Vec<String>,
    /// Keys of those who may see and drain nodes.
    pub admin_keys: Vec<String>,
    /// `/metrics` needs a key too.
    pub guard_metrics: bool,
    /// Browsers on any site may call.
    pub cors_any_origin: bool,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: u32,
    /// Longest request body; one such body may be in memory per connection.
    pub max_body_bytes: usize,
    /// Open connections; more wait to be accepted.
    pub max_connections: usize,
    /// Prompts tokenized at a time, one thread each.
    pub max_tokenizing: usize,
    /// Silence before the first token after which a stream sends a comment.
    pub keep_alive: Duration,
    /// Streams that outlive their connection.
    pub resume: ResumeConfig,
    /// How long answers may go on after a shutdown began.
    pub drain_deadline: Duration,
    /// Shown by `/version`, `/metrics` and `system_fingerprint`.
    pub version: String,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            bind: (Ipv4Addr::LOCALHOST, 8000).into(),
            served_model_names: vec!["default".into()],
            api_keys: Vec::new(),
            admin_keys: Vec::new(),
            guard_metrics: false,
            cors_any_origin: false,
            max_model_len: 4096,
            max_body_bytes: 16 << 20,
            max_connections: 4096,
            max_tokenizing: std::thread::available_parallelism().map_or(2, usize::from),
            keep_alive: Duration::from_secs(15),
            resume: ResumeConfig::default(),
            drain_deadline: Duration::from_secs(30),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// What the handlers share.
struct App {
    config: HttpConfig,
    model: Arc<dyn TextModel>,
    gateway: Gateway,
    keys: Keys,
    admins: Keys,
    metrics: Arc<Metrics>,
    streams: Arc<Streams>,
    /// Turns true when answers are no longer waited for.
    closing: watch::Receiver<bool>,
    /// Bounds the threads that tokenize.
    tokenizing: Arc<Semaphore>,
    started_at: u64,
    fingerprint: String,
}

type Shared = Arc<App>;

impl App {
    fn new(
        config: HttpConfig,
        model: Arc<dyn TextModel>,
        gateway: Gateway,
        closing: watch::Receiver<bool>,
    ) -> io::Result<Self> {
        let refuse = |message: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, message.to_owned()));
        if config.served_model_names.is_empty() {
            return refuse("at least one served model name is needed");
        }
        if config.max_connections == 0 || config.max_tokenizing == 0 {
            return refuse("max_connections and max_tokenizing must be at least 1");
        }
        // An empty key would be matched by an empty header.
        if config.api_keys.iter().chain(&config.admin_keys).any(|key| key.is_empty()) {
            return refuse("an API key must not be empty");
        }
        Ok(Self {
            keys: Keys::new(&config.api_keys),
            admins: Keys::new(&config.admin_keys),
            metrics: Arc::default(),
            streams: Arc::new(Streams::new(config.resume.clone(), config.api_keys.len())),
            tokenizing: Arc::new(Semaphore::new(config.max_tokenizing)),
            started_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            fingerprint: format!("ridge-{}", config.version),
            config,
            model,
            gateway,
            closing,
        })
    }

    /// Longest prompt plus answer: the model's, or the shortest that a connected node has memory for.
    fn max_model_len(&self) -> u32 {
        let view = self.gateway.view();
        let nodes = view.nodes.iter().map(|node| node.hello.max_model_len);
        nodes.chain([self.config.max_model_len]).min().expect("one is always there")
    }

    /// The name a request used for the model, or the first one.
    fn resolve(&self, model: Option<String>) -> Result<String, ApiError> {
        let names = &self.config.served_model_names;
        match model {
            None => Ok(names[0].clone()),
            Some(model) if names.contains(&model) => Ok(model),
            Some(model) => Err(ApiError::model_not_found(&model)),
        }
    }
}

/// Every route.
fn router(app: Shared) -> Router {
    let cors = app.config.cors_any_origin.then(CorsLayer::permissive);
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/streams/{*id}", get(resume::resume).delete(resume::forget))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/nodes", get(nodes::list))
        .route("/v1/nodes/{name}/drain", post(nodes::drain))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::ready))
        .route("/live", get(health::live))
        .route("/version", get(health::version))
        .route("/metrics", get(metrics::show))
        .fallback(edge::not_found)
        .method_not_allowed_fallback(edge::method_not_allowed)
        .layer(DefaultBodyLimit::max(app.config.max_body_bytes))
        .layer(CatchPanicLayer::custom(edge::on_panic))
        .layer(middleware::from_fn_with_state(app.clone(), edge::guard))
        .layer(tower::util::option_layer(cors))
        .with_state(app)
}
