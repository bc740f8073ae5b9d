//! Streams that outlive their connection, for clients that ask for it: `X-Ridge-Resumable: SECONDS`.
//!
//! The events of such a stream are numbered, and a task of its own reads them into a bounded buffer, whether or not
//! somebody is connected. A client that comes back within its grace names the last event it saw and gets the ones after
//! it. Nobody else pays for this: without the header there are no numbers (clients are known that read nothing but `data`
//! lines) and no buffer, and an answer ends with its connection.
//!
//! Read [`Streams`], then [`produce`], which owns a stream from its first event until it is forgotten.

use super::Shared;
use super::auth::Tenant;
use super::edge::Caller;
use super::error::ApiError;
use super::sse::{self, EventStream};
use axum::Extension;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream as EventSource, StreamExt, stream};
use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Asks for a stream to be kept, in seconds; in the answer, for how long it will be.
pub(super) const RESUMABLE: HeaderName = HeaderName::from_static("x-ridge-resumable");
/// The standard's name for what a client saw last.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// What an event in the buffer takes besides its bytes.
const EVENT_OVERHEAD: usize = 64;

/// Bounds of what is kept for clients that may come back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResumeConfig {
    /// Longest time without a connection before a stream is forgotten; with zero, none is kept.
    pub max_grace: Duration,
    /// Streams kept at a time. Where there are several API keys, each has half of them at most.
    pub max_streams: usize,
    /// Bytes of events kept for one stream, with 64 more for each event.
    pub max_bytes: usize,
}

impl Default for ResumeConfig {
    fn default() -> Self {
        Self { max_grace: Duration::from_secs(60), max_streams: 512, max_bytes: 1 << 20 }
    }
}

/// Every stream that is kept.
#[derive(Debug)]
pub(super) struct Streams {
    config: ResumeConfig,
    max_per_tenant: usize,
    table: Mutex<HashMap<Key, Arc<Stream>>>,
    resumed: AtomicU64,
    expired: AtomicU64,
}

/// A client names a stream by the completion's id. Two tenants may use the same one and never meet.
type Key = (Tenant, String);

/// For `/metrics`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct StreamCounts {
    /// Connections that continued a stream.
    pub(super) resumed: u64,
    /// Streams forgotten before their client had everything.
    pub(super) expired: u64,
    /// Streams that nobody reads now, although there is or will be something to read.
    pub(super) detached: u64,
}

/// One stream, shared by the task that fills it and the connection that reads it.
#[derive(Debug)]
struct Stream {
    id: String,
    grace: Duration,
    /// Silence before the first event after which a reader gets a comment, if ever.
    keep_alive: Option<Duration>,
    state: watch::Sender<Buffer>,
}

/// The events of a stream that are kept, and who reads them.
#[derive(Debug, Default)]
struct Buffer {
    /// Each complete, without its id.
    events: VecDeque<Bytes>,
    /// What `events` count against the limit.
    bytes: usize,
    /// Number of the first one that is kept.
    first: u64,
    /// Number of the next one to be handed to the reader.
    next: u64,
    /// The connection that reads, if one does. Later ones have higher numbers.
    reader: Option<u64>,
    readers: u64,
    /// No event follows.
    over: bool,
    /// When the stream is forgotten, unless its client comes back before.
    deadline: Option<Instant>,
    /// It is forgotten: nobody can come back any more.
    forgotten: bool,
}

impl Streams {
    /// None yet.
    pub(super) fn new(config: ResumeConfig, api_keys: usize) -> Self {
        let max_per_tenant = if api_keys > 1 { config.max_streams.div_ceil(2) } else { config.max_streams };
        let zero = || AtomicU64::new(0);
        Self { config, max_per_tenant, table: Mutex::default(), resumed: zero(), expired: zero() }
    }

    /// For how long a client wants its stream to be kept, and may have it; `None` if it did not ask.
    pub(super) fn grace(&self, asked: Option<&HeaderValue>) -> Result<Option<Duration>, ApiError> {
        let Some(asked) = asked else { return Ok(None) };
        let seconds = asked.to_str().ok().and_then(|text| text.trim().parse().ok());
        let grace = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).ok_or_else(|| {
            let message = format!("'{RESUMABLE}' must be a number of seconds, such as 30; got {asked:?}");
            ApiError::invalid(RESUMABLE.as_str(), message)
        })?;
        Ok(Some(grace.min(self.config.max_grace)))
    }

    /// Answers with a stream that its client may come back to within `grace`, or with an ordinary one if there is no room
    /// for another: the answer's header says which.
    pub(super) fn respond(
        self: &Arc<Self>,
        tenant: Tenant,
        grace: Duration,
        mut events: EventStream,
    ) -> Result<Response, ApiError> {
        let (id, keep_alive) = (events.head.id.clone(), events.keep_alive);
        let stream = Arc::new(Stream { id, grace, keep_alive, state: watch::Sender::default() });
        let key = (tenant, stream.id.clone());
        if grace.is_zero() || !self.admit(&key, &stream)? {
            return Ok(granted(events.into_response(), Duration::ZERO));
        }
        let tenure = Tenure { streams: self.clone(), key, stream: stream.clone() };
        let reader = stream.attach(None)?;
        // Keeping a connection alive is its own reader's business.
        events.keep_alive = None;
        tokio::spawn(produce(tenure, events.into_events()));
        Ok(granted(reader.into_response(), grace))
    }

    /// Finds a place for a stream, if there is one.
    fn admit(&self, key: &Key, stream: &Arc<Stream>) -> Result<bool, ApiError> {
        let mut table = self.table();
        if table.contains_key(key) {
            return Err(ApiError::stream_exists(&key.1));
        }
        let theirs = table.keys().filter(|(tenant, _)| *tenant == key.0).count();
        let full_for_them = theirs >= self.max_per_tenant;
        if full_for_them || table.len() >= self.config.max_streams {
            // One that was read to its end has most likely arrived.
            let done = |(key, stream): (&Key, &Arc<Stream>)| {
                let buffer = stream.state.borrow();
                buffer.is_delivered().then(|| (buffer.deadline, key.clone()))
            };
            let own = table.iter().filter(|(other, _)| !full_for_them || other.0 == key.0);
            let Some((_, oldest)) = own.filter_map(done).min_by_key(|(deadline, _)| *deadline) else {
                return Ok(false);
            };
            table.remove(&oldest).expect("it was found there").dismiss();
        }
        table.insert(key.clone(), stream.clone());
        Ok(true)
    }

    fn find(&self, tenant: Tenant, id: &str) -> Result<Arc<Stream>, ApiError> {
        self.table().get(&(tenant, id.to_owned())).cloned().ok_or_else(|| ApiError::stream_not_found(id))
    }

    /// What has happened, and how many are waited for.
    pub(super) fn counts(&self) -> StreamCounts {
        StreamCounts {
            resumed: self.resumed.load(Ordering::Relaxed),
            expired: self.expired.load(Ordering::Relaxed),
            detached: self.table().values().filter(|stream| stream.state.borrow().is_detached()).count() as u64,
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Key, Arc<Stream>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `GET /v1/streams/{id}`: the events after the last one that the client saw.
pub(super) async fn resume(
    State(app): State<Shared>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let last = last_event(&id, &headers, query.get("last_event_id"))?;
    let stream = app.streams.find(caller.tenant, &id)?;
    let reader = stream.attach(last)?;
    app.streams.resumed.fetch_add(1, Ordering::Relaxed);
    if stream.state.borrow().is_delivered() {
        // An `EventSource` that is told so does not come back for more.
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Ok(granted(reader.into_response(), stream.grace))
}

/// `DELETE /v1/streams/{id}`: the client wants no more of it, now or later.
pub(super) async fn forget(
    State(app): State<Shared>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    app.streams.find(caller.tenant, &id)?.dismiss();
    Ok(StatusCode::NO_CONTENT)
}

/// The number of the last event that the client saw, if it saw any. The query is for clients that cannot set a header; if
/// both are there, the header counts, because it is the one that browsers renew.
fn last_event(id: &str, headers: &HeaderMap, query: Option<&String>) -> Result<Option<u64>, ApiError> {
    let header = headers.get(LAST_EVENT_ID).map(|value| value.to_str().unwrap_or("?"));
    let Some(given) = header.or(query.map(String::as_str)).filter(|given| !given.is_empty()) else { return Ok(None) };
    let number = given.strip_prefix(id).and_then(|rest| rest.strip_prefix(':')).and_then(|number| number.parse().ok());
    number.map(Some).ok_or_else(|| {
        let message =
            format!("'Last-Event-ID' must be the id of an event of this stream, such as '{id}:0'; got {given:?}");
        ApiError::invalid("Last-Event-ID", message)
    })
}

/// Says for how long a stream is kept.
fn granted(mut response: Response, grace: Duration) -> Response {
    let seconds = HeaderValue::from_str(&grace.as_secs_f64().to_string()).expect("a number is ASCII");
    response.headers_mut().insert(RESUMABLE, seconds);
    response
}

/// Reads the events of a stream until the last one, or until nobody wants them, and keeps them until the client had its
/// time to come back. Dropping `events` frees what the cluster holds for them.
async fn produce(tenure: Tenure, events: impl EventSource<Item = Bytes>) {
    let stream = &tenure.stream;
    let max_bytes = tenure.streams.config.max_bytes;
    let mut forgotten = pin!(stream.forgotten());
    {
        let mut events = pin!(events);
        loop {
            let some = tokio::select! {
                biased;
                () = &mut forgotten => return,
                some = events.next() => some,
            };
            let Some(some) = some else { break };
            if !stream.push(&some, max_bytes) {
                tracing::warn!(id = stream.id, max_bytes, "a resumable stream was not read in time");
                break;
            }
        }
    }
    stream.end();
    forgotten.await;
}

/// A stream's place in the table, given up when dropped, however that comes about.
struct Tenure {
    streams: Arc<Streams>,
    key: Key,
    stream: Arc<Stream>,
}

impl Drop for Tenure {
    fn drop(&mut self) {
        let mut table = self.streams.table();
        if table.get(&self.key).is_some_and(|kept| Arc::ptr_eq(kept, &self.stream)) {
            table.remove(&self.key);
        }
        drop(table);
        let buffer = self.stream.state.borrow();
        if buffer.is_detached() {
            self.streams.expired.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(id = self.stream.id, "nobody came back for a stream");
        }
        drop(buffer);
        self.stream.forget();
    }
}

impl Stream {
    /// Takes some complete events. False if they are more than may wait for a reader: then the stream has ended with an
    /// error.
    fn push(&self, some: &[u8], max_bytes: usize) -> bool {
        let mut fits = true;
        self.state.send_modify(|buffer| {
            if buffer.forgotten {
                return;
            }
            for event in split(some) {
                buffer.push(event);
            }
            buffer.shrink(max_bytes);
            if buffer.bytes > max_bytes {
                fits = false;
                buffer.push(&sse::event(&ApiError::stream_not_read(max_bytes).envelope()));
            }
        });
        fits
    }

    /// Nothing follows. What is there is kept for the grace, since a connection may swallow what it was given last.
    fn end(&self) {
        self.state.send_modify(|buffer| {
            buffer.over = true;
            buffer.deadline.get_or_insert(Instant::now() + self.grace);
        });
    }

    /// Nobody can come back any more. Who reads now may read on to the end of what there is.
    fn forget(&self) {
        self.state.send_modify(|buffer| (buffer.over, buffer.forgotten) = (true, true));
    }

    /// Nobody wants what there is, or what may follow.
    fn dismiss(&self) {
        self.state.send_modify(|buffer| {
            (buffer.first, buffer.next) = (buffer.end(), buffer.end());
            (buffer.over, buffer.forgotten) = (true, true);
            (buffer.events, buffer.bytes) = Default::default();
        });
    }

    /// Resolves when nobody will come back: the grace is over, or the client said so.
    async fn forgotten(&self) {
        let mut changes = self.state.subscribe();
        loop {
            let deadline = {
                let buffer = changes.borrow_and_update();
                if buffer.forgotten {
                    return;
                }
                buffer.deadline
            };
            // The sender is `self.state`: a change is the only thing to wait for.
            match deadline {
                None => _ = changes.changed().await,
                Some(deadline) => {
                    if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() && self.expire() {
                        return;
                    }
                }
            }
        }
    }

    /// Whether the grace is over; from then on nobody can attach.
    fn expire(&self) -> bool {
        self.state.send_if_modified(|buffer| {
            let over = buffer.deadline.is_some_and(|deadline| deadline <= Instant::now());
            buffer.forgotten |= over;
            over
        })
    }

    /// A reader of everything after event `last`. Whoever read until now is told that it is over.
    fn attach(self: &Arc<Self>, last: Option<u64>) -> Result<Reader, ApiError> {
        let next = last.map_or(0, |last| last.saturating_add(1));
        let mut outcome = Err(ApiError::stream_not_found(&self.id));
        self.state.send_modify(|buffer| {
            if !buffer.forgotten {
                outcome = buffer.attach(next, self);
            }
        });
        let number = outcome?;
        Ok(Reader { changes: self.state.subscribe(), stream: self.clone(), number })
    }
}

impl Buffer {
    fn end(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    /// The last event was handed to a reader.
    fn is_delivered(&self) -> bool {
        self.over && self.next == self.end()
    }

    fn is_detached(&self) -> bool {
        self.reader.is_none() && !self.is_delivered()
    }

    fn push(&mut self, event: &[u8]) {
        // A copy takes what it counts for; a slice would keep all of its origin.
        self.events.push_back(Bytes::copy_from_slice(event));
        self.bytes += event.len() + EVENT_OVERHEAD;
    }

    /// Drops what was handed out, oldest first, until the rest is within the limit.
    fn shrink(&mut self, max_bytes: usize) {
        while self.bytes > max_bytes && self.first < self.next {
            let event = self.events.pop_front().expect("what was handed out was kept until now");
            self.bytes -= event.len() + EVENT_OVERHEAD;
            self.first += 1;
        }
    }

    fn attach(&mut self, next: u64, stream: &Stream) -> Result<u64, ApiError> {
        if next > self.end() {
            return Err(ApiError::event_not_sent(&stream.id, next - 1));
        }
        if next < self.first {
            return Err(ApiError::event_gone(&stream.id, next, self.first));
        }
        self.next = next;
        self.readers += 1;
        self.reader = Some(self.readers);
        self.deadline = self.over.then(|| Instant::now() + stream.grace);
        Ok(self.readers)
    }
}

/// A connection that reads a stream. Dropping it starts the grace.
struct Reader {
    stream: Arc<Stream>,
    changes: watch::Receiver<Buffer>,
    number: u64,
}

impl Reader {
    fn into_response(self) -> Response {
        let events = stream::unfold(Some(self), |reader| async move {
            let mut reader = reader?;
            match reader.next().await {
                Read::Some(bytes) => Some((bytes, Some(reader))),
                Read::Last(bytes) => Some((bytes, None)),
                Read::End => None,
            }
        });
        sse::response(events)
    }

    async fn next(&mut self) -> Read {
        loop {
            // Before looking: what comes while looking must wake this reader.
            self.changes.mark_unchanged();
            let (mut read, mut silent) = (None, false);
            self.stream.state.send_if_modified(|buffer| {
                read = self.read(buffer);
                silent = buffer.end() == 0;
                false
            });
            if let Some(read) = read {
                return read;
            }
            let change = self.changes.changed();
            match self.stream.keep_alive.filter(|_| silent) {
                // The sender is the stream's, which this reader keeps alive: it is a change that ends the wait.
                None => _ = change.await,
                Some(keep_alive) => {
                    if tokio::time::timeout(keep_alive, change).await.is_err() {
                        return Read::Some(Bytes::from_static(sse::KEEP_ALIVE));
                    }
                }
            }
        }
    }

    /// What there is for this reader now, if anything.
    fn read(&self, buffer: &mut Buffer) -> Option<Read> {
        if buffer.reader != Some(self.number) {
            return Some(Read::Last(sse::event(&ApiError::stream_taken_over().envelope()).into()));
        }
        if buffer.next == buffer.end() {
            return buffer.over.then_some(Read::End);
        }
        let mut out = Vec::new();
        for event in buffer.events.range((buffer.next - buffer.first) as usize..) {
            out.extend_from_slice(format!("id: {}:{}\n", self.stream.id, buffer.next).as_bytes());
            out.extend_from_slice(event);
            buffer.next += 1;
        }
        Some(Read::Some(out.into()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stream.state.send_if_modified(|buffer| {
            let is_read_by_this = buffer.reader == Some(self.number);
            if is_read_by_this {
                buffer.reader = None;
                buffer.deadline = Some(Instant::now() + self.stream.grace);
            }
            is_read_by_this
        });
    }
}

/// What a reader gets next.
enum Read {
    Some(Bytes),
    /// Nothing follows.
    Last(Bytes),
    End,
}

/// Cuts bytes into events. An event's JSON has no line breaks, so an empty line is an end.
fn split(mut some: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let end = some.windows(2).position(|pair| pair == b"\n\n")? + 2;
        let (event, rest) = some.split_at(end);
        some = rest;
        Some(event)
    })
}
