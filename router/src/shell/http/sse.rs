//! Server-sent events: one answer, or several interleaved, as a body that ends with `data: [DONE]`.

use super::answer::Delta;
use super::error::ApiError;
use super::generate::Generation;
use super::request::Delivery;
use super::response::{Head, RidgeBody, UsageBody};
use super::text_model::TextModel;
use super::tools::CallReader;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

const DONE: &[u8] = b"data: [DONE]\n\n";
/// A comment. Some OpenAI clients choke on comments, some proxies on silence: only sent before the first token, the
/// one silence that can be long.
pub(super) const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// The next part of some answer, as [`Generation::next`] returns it.
pub(super) type Step = Option<Result<(usize, Delta), ApiError>>;

/// A stream that a client is reading.
pub(super) struct EventStream {
    pub(super) generation: Generation,
    pub(super) model: Arc<dyn TextModel>,
    pub(super) head: Head,
    pub(super) delivery: Delivery,
    pub(super) wants_receipt: bool,
    /// Silence before the first token after which a comment is sent, if ever.
    pub(super) keep_alive: Option<Duration>,
    /// What came before the headers went out, if anything did.
    pub(super) first: Option<Step>,
}

/// An [`EventStream`] under way.
struct Writer {
    stream: EventStream,
    /// Which choices have had their opening chunk.
    opened: Vec<bool>,
    /// One for each choice if answers are calls.
    readers: Vec<CallReader>,
    over: bool,
}

impl EventStream {
    /// The HTTP response. Dropping its body drops the generation.
    pub(super) fn into_response(self) -> Response {
        response(self.into_events())
    }

    /// The events, some at a time, each complete. Dropping them drops the generation.
    pub(super) fn into_events(self) -> impl Stream<Item = Bytes> + Send + 'static {
        let choices = self.generation.len();
        let calls = self.head.calls.iter();
        let readers = calls.flat_map(|calls| (0..choices).map(|_| CallReader::new(calls.clone()))).collect();
        let writer = Writer { stream: self, opened: vec![false; choices], readers, over: false };
        stream::unfold(writer, |mut writer| async move { Some((writer.next().await?, writer)) })
    }
}

/// A response whose body is `events`.
pub(super) fn response(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let mut response = Response::new(Body::from_stream(events.map(Ok::<_, std::convert::Infallible>)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// One event.
pub(super) fn event(body: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::new();
    write_event(&mut out, body);
    out
}

impl Writer {
    async fn next(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        let mut out = Vec::new();
        match self.step().await {
            None => return Some(Bytes::from_static(KEEP_ALIVE)),
            Some(Some(Ok((index, delta)))) => self.write_delta(&mut out, index, &delta),
            Some(Some(Err(error))) => {
                tracing::debug!(id = self.stream.head.id, %error.message, "a stream ended with an error");
                self.over = true;
                write_event(&mut out, &error.envelope());
            }
            Some(None) => {
                self.over = true;
                self.write_tail(&mut out);
            }
        }
        Some(out.into())
    }

    /// The next step, or `None` when a keep-alive is due.
    async fn step(&mut self) -> Option<Step> {
        if let Some(step) = self.stream.first.take() {
            return Some(step);
        }
        let next = self.stream.generation.next();
        match self.stream.keep_alive {
            Some(keep_alive) if !self.opened.contains(&true) => tokio::time::timeout(keep_alive, next).await.ok(),
            _ => Some(next.await),
        }
    }

    fn write_delta(&mut self, out: &mut Vec<u8>, index: usize, delta: &Delta) {
        let usage = self.chunk_usage();
        let EventStream { head, model, .. } = &self.stream;
        if !std::mem::replace(&mut self.opened[index], true)
            && let Some(opening) = head.opening(index, usage)
        {
            write_event(out, &opening);
        }
        let calls = self.readers.get_mut(index).map(|reader| reader.push(&delta.text)).unwrap_or_default();
        for part in head.parts(model.as_ref(), index, delta, calls, usage) {
            write_event(out, &part);
        }
    }

    fn write_tail(&mut self, out: &mut Vec<u8>) {
        let EventStream { generation, head, delivery, wants_receipt, .. } = &self.stream;
        generation.log_receipt(&head.id);
        let usage = delivery.include_usage.then(|| generation.usage());
        let ridge = wants_receipt.then(|| RidgeBody { receipt: generation.receipt() });
        if usage.is_some() || ridge.is_some() {
            write_event(out, &head.tail(usage, ridge));
        }
        out.extend_from_slice(DONE);
    }

    /// What `usage` says in a chunk with choices: nothing, `null`, or the counts so far.
    fn chunk_usage(&self) -> Option<Option<UsageBody>> {
        let Delivery { include_usage, continuous_usage, .. } = self.stream.delivery;
        include_usage.then(|| continuous_usage.then(|| self.stream.generation.usage()))
    }
}

fn write_event(out: &mut Vec<u8>, body: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, body).expect("bodies have string keys and a vector takes everything");
    out.extend_from_slice(b"\n\n");
}
