//! Bodies of HTTP requests, sent to the real server over a socket, with a cluster behind it that says anything.

use super::folder::{Folder, VOCAB};
use ridge_model::checkpoint::ModelSource;
use ridge_protocol::TokenOut;
use ridge_protocol::transfer::TransferTimes;
use ridge_protocol::wire::{FinishReason, Receipt};
use ridge_router::machine::{ReplyEvent, Submit, Usage};
use ridge_router::shell::Served;
use ridge_router::shell::gateway::{ClusterView, Gateway, GatewayRequest, Health};
use ridge_router::shell::http::{HttpConfig, serve};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Far beyond what any answer takes.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn chat(body: &[u8]) {
    post("/v1/chat/completions", body);
}

pub(super) fn completions(body: &[u8]) {
    post("/v1/completions", body);
}

pub(super) fn tokenize(body: &[u8]) {
    post("/tokenize", body);
    post("/detokenize", body);
}

/// Whatever the body, there is a whole answer, and none that blames the server.
fn post(path: &str, body: &[u8]) {
    static SERVER: OnceLock<SocketAddr> = OnceLock::new();
    let mut stream = TcpStream::connect(SERVER.get_or_init(start)).expect("the server accepts");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: ridge\r\nConnection: close\r\nContent-Type: application/json\r\n\
         X-Ridge-Receipt: 1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let shown = String::from_utf8_lossy(&answer);
    // A body that is too long is answered before it is read.
    assert!(read.is_ok() || sent.is_err(), "{path}: no whole answer: {read:?}, {shown}");
    assert!(shown.starts_with("HTTP/1.1 ") || sent.is_err(), "{path}: no answer: {shown}");
    assert!(!shown.starts_with("HTTP/1.1 5"), "{path}: {shown}");
    if shown.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        assert!(shown.ends_with("0\r\n\r\n"), "{path}: the stream was cut off: {shown}");
    }
}

/// Starts a server for the life of the process.
fn start() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a socket can be made non-blocking");
    let addr = listener.local_addr().expect("it is bound");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let folder = Folder::new();
            let checkpoint = folder.load(ModelSource::Folder(folder.path(""))).expect("a good model");
            let config = HttpConfig {
                served_model_names: vec!["fuzz".into()],
                max_model_len: 64,
                max_body_bytes: 100_000,
                ..HttpConfig::default()
            };
            let (requests, inbox) = mpsc::channel(1024);
            let (_view, views) =
                watch::channel(Arc::new(ClusterView { health: Health::Ready, ..ClusterView::default() }));
            tokio::spawn(cluster(inbox));
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            let served = Arc::new(Served::new(checkpoint));
            serve(listener, config, served, Gateway::new(requests, views), std::future::pending()).await
        })
    });
    addr
}

async fn cluster(mut inbox: mpsc::Receiver<GatewayRequest>) {
    while let Some(request) = inbox.recv().await {
        if let GatewayRequest::Submit(submit, events) = request {
            // The buffer holds more events than an answer has.
            answer(&submit).into_iter().for_each(|event| drop(events.try_send(event)));
        }
    }
}

/// Every token of the vocabulary and some that are not in it, and accounts at the edge of their types.
fn answer(submit: &Submit) -> Vec<ReplyEvent> {
    let edge = u32::MAX;
    let times = TransferTimes { hidden_us: u64::MAX, exposed_us: u64::MAX };
    let receipt = Receipt {
        cached: edge,
        computed: edge,
        transferred: edge,
        recomputed: edge,
        transfer_bytes: u64::MAX,
        times,
        converted: None,
    };
    // The router's machine vouches for these, and for nothing else of what a node says.
    let prompt_tokens = submit.tokens.len() as u32;
    let usage = |completion_tokens| Usage { prompt_tokens, completion_tokens, cached_tokens: prompt_tokens, receipt };
    let tokens = (0..VOCAB as u32).chain([VOCAB as u32, edge]).take(submit.params.max_tokens as usize);
    let event = |(index, token)| {
        let logprob = submit.params.logprobs.map(|_| if token % 2 == 0 { f32::NAN } else { -0.5 });
        let top = submit.params.logprobs.map_or(0, u32::from);
        let top = (0..top).map(|id| (id.wrapping_mul(edge / 7), f32::NEG_INFINITY)).collect();
        let index = index as u32;
        ReplyEvent::Token { index, out: TokenOut { token, logprob, top, ends: false }, usage: usage(index + 1) }
    };
    let mut events: Vec<ReplyEvent> = tokens.enumerate().map(event).collect();
    let usage = usage(events.len() as u32);
    events.push(ReplyEvent::Finished { reason: FinishReason::Length, usage });
    events
}

fn bytes_of(values: &[Value]) -> Vec<Vec<u8>> {
    values.iter().map(|value| value.to_string().into_bytes()).collect()
}

pub(super) fn chat_seeds() -> Vec<Vec<u8>> {
    let tools =
        json!([{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]);
    bytes_of(&[
        json!({"model": "fuzz", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 60, "n": 2,
            "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": -1, "stop": ["xyz", "q"],
            "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1,
            "logit_bias": {"5": 1.5, "07": -100}, "logprobs": true, "top_logprobs": 3, "stop_token_ids": [7],
            "ignore_eos": true, "skip_special_tokens": false, "user": "u", "cache_salt": "s"}),
        json!({"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
                "function": {"name": "f", "arguments": "{\"x\": [1, null]}"}}]},
            {"role": "tool", "content": "4", "tool_call_id": "1"}], "tools": tools, "tool_choice": "auto",
            "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true},
            "max_completion_tokens": 50, "chat_template_kwargs": {"enable_thinking": false, "bos_token": 3},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}}),
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab", "reasoning": "r"}],
            "continue_final_message": true, "add_generation_prompt": false, "stream": true, "logprobs": true}),
    ])
}

pub(super) fn completions_seeds() -> Vec<Vec<u8>> {
    bytes_of(&[
        json!({"model": "fuzz", "prompt": "ab ab", "max_tokens": 60, "echo": true, "n": 3, "best_of": 3, "suffix": ""}),
        json!({"prompt": ["a", "b"], "logprobs": 5, "stream": true, "stream_options": {"include_usage": true}}),
        json!({"prompt": [1, 2, 3], "add_special_tokens": false, "stop": "b", "temperature": 0,
            "structured_outputs": {"choice": ["a", "b"]}}),
        json!({"prompt": [[1, 2], [3]], "stream": true, "logprobs": 0, "max_tokens": 40}),
    ])
}

pub(super) fn tokenize_seeds() -> Vec<Vec<u8>> {
    bytes_of(&[
        json!({"model": "fuzz", "prompt": "ab é", "add_special_tokens": true, "return_token_strs": true}),
        json!({"messages": [{"role": "user", "content": "ab"}], "add_generation_prompt": true}),
        json!({"tokens": [1, 2, 39, 4]}),
    ])
}
