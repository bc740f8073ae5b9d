//! What happens to every request before and after its handler: who is calling, are they allowed to, how did it end.

use super::Shared;
use super::auth::Tenant;
use super::error::ApiError;
use super::params::random_u64;
use super::resume::RESUMABLE;
use axum::body::Bytes;
use axum::extract::{FromRequest, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const RECEIPT: HeaderName = HeaderName::from_static("x-ridge-receipt");
/// Longest `X-Request-Id` that is taken over.
const MAX_REQUEST_ID_BYTES: usize = 128;
/// nginx's status for a client that left before the answer.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// Who is calling.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// Theirs or ours.
    pub(super) request_id: Arc<str>,
    /// Whose cache they may use.
    pub(super) tenant: Tenant,
    /// They want to know where the prompt's KV came from.
    pub(super) wants_receipt: bool,
    /// For how long they want a stream to be kept.
    pub(super) resumable: Option<HeaderValue>,
    /// When the request's head was read.
    pub(super) arrived: Instant,
}

/// Identifies, authorizes, counts and logs.
pub(super) async fn guard(State(app): State<Shared>, mut request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let request_id = request_id(request.headers());
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = matched.unwrap_or_else(|| "unknown".into());
    let mut outcome = Outcome { app: app.clone(), route, status: CLIENT_CLOSED_REQUEST };
    let open = match outcome.route.as_str() {
        "/health" | "/live" => true,
        // They ask for a key of their own.
        "/v1/nodes" | "/v1/nodes/{name}/drain" => true,
        "/metrics" => !app.config.guard_metrics,
        _ => false,
    };
    let tenant = app.keys.check(request.headers()).or(open.then(Tenant::default));
    let mut response = match tenant {
        None => ApiError::unauthorized().into_response(),
        Some(tenant) => {
            let wants_receipt = request.headers().get(RECEIPT).is_some_and(|value| value == "1");
            let resumable = request.headers().get(RESUMABLE).cloned();
            let caller = Caller { request_id: request_id.clone(), tenant, wants_receipt, resumable, arrived };
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
    };
    outcome.status = response.status().as_u16();
    let id = HeaderValue::from_str(&request_id).expect("checked to be printable ASCII");
    response.headers_mut().insert(REQUEST_ID, id);
    tracing::debug!(
        route = outcome.route,
        status = outcome.status,
        elapsed_ms = arrived.elapsed().as_millis() as u64,
        %request_id,
        "answered"
    );
    response
}

/// Counts the request when it goes out of scope, whether it was answered or dropped.
struct Outcome {
    app: Shared,
    route: String,
    status: u16,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.app.metrics.on_request(&self.route, self.status);
    }
}

/// The client's id if it can stand in a header and in a log, else a fresh one.
fn request_id(headers: &HeaderMap) -> Arc<str> {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match given.filter(|id| (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()))
    {
        Some(id) => id.into(),
        None => format!("{:016x}{:016x}", random_u64(), random_u64()).into(),
    }
}

/// A body in memory, whatever its content type: `curl -d` says it is a form.
pub(super) struct RequestBody(pub(super) Bytes);

impl FromRequest<Shared> for RequestBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Shared) -> Result<Self, ApiError> {
        match Bytes::from_request(request, app).await {
            Ok(body) => Ok(Self(body)),
            Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                Err(ApiError::too_large(app.config.max_body_bytes))
            }
            Err(rejection) => Err(ApiError::bad_request(format!("The body could not be read: {rejection}"))),
        }
    }
}

/// No such path.
pub(super) async fn not_found(request: Request) -> ApiError {
    ApiError::unknown_path(request.method().as_str(), request.uri().path())
}

/// No such method there.
pub(super) async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::wrong_method(request.method().as_str(), request.uri().path())
}

/// A handler broke one of our own assertions.
pub(super) fn on_panic(panic: Box<dyn Any + Send>) -> Response {
    let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = message.unwrap_or("unknown"), "a request handler panicked");
    ApiError::internal("internal error").into_response()
}
