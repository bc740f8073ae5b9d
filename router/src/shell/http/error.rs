//! Errors as OpenAI clients expect them: a status and `{"error": {message, type, param, code}}`.

use crate::machine::RouterError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// Seconds a refused client is told to wait.
const RETRY_AFTER_S: u32 = 1;

/// A request that was not served, and what to tell the client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiError {
    /// The HTTP status, unless the answer has already begun.
    pub status: StatusCode,
    /// For people.
    pub message: String,
    /// The parameter at fault, as the client spells it.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
}

/// The `{"error": …}` envelope.
#[derive(Serialize)]
pub(super) struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>, code: Option<&'static str>) -> Self {
        Self { status, message: message.into(), param: None, code }
    }

    /// 400: the parameter `param` cannot be used as it stands.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::bad_request(message) }
    }

    /// 400 that is not about one parameter.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message, None)
    }

    /// 400: prompt and answer do not fit the context.
    pub fn context_length(prompt_tokens: usize, max_model_len: u32, param: &str) -> Self {
        Self {
            param: Some(param.to_owned()),
            code: Some("context_length_exceeded"),
            ..Self::bad_request(format!(
                "This model's maximum context length is {max_model_len} tokens, prompt and answer together, but the \
                 prompt alone has {prompt_tokens} tokens. Please reduce the length of the prompt."
            ))
        }
    }

    /// 401: no key, or none that is known.
    pub fn unauthorized() -> Self {
        let message = "Incorrect or missing API key. Send it as 'Authorization: Bearer <key>'.";
        Self::new(StatusCode::UNAUTHORIZED, message, Some("invalid_api_key"))
    }

    /// 404: no such model is served here.
    pub fn model_not_found(model: &str) -> Self {
        Self {
            param: Some("model".into()),
            ..Self::new(
                StatusCode::NOT_FOUND,
                format!("The model `{model}` does not exist or is not served here."),
                Some("model_not_found"),
            )
        }
    }

    /// 403: a router that has keys, or can be reached from elsewhere, shows its nodes to admins only.
    pub fn no_admin_key() -> Self {
        let message = "This router has no admin key. Start it with --admin-key (or RIDGE_ADMIN_KEY) to allow this.";
        Self::new(StatusCode::FORBIDDEN, message, Some("no_admin_key"))
    }

    /// 404: no node of that name is connected.
    pub fn node_not_found(name: &str) -> Self {
        let message = format!("No node `{name}` is connected. GET /v1/nodes lists those that are.");
        Self::new(StatusCode::NOT_FOUND, message, Some("node_not_found"))
    }

    /// 404: no such path.
    pub fn unknown_path(method: &str, path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("Unknown path: {method} {path}"), Some("unknown_url"))
    }

    /// 404: no such stream is kept, or it is another tenant's.
    pub fn stream_not_found(id: &str) -> Self {
        let message = format!(
            "No stream {id:?} is kept for this API key: it was not asked to be (X-Ridge-Resumable), or its time is over"
        );
        Self::new(StatusCode::NOT_FOUND, message, Some("stream_not_found"))
    }

    /// 409: a stream of that name is kept.
    pub fn stream_exists(id: &str) -> Self {
        let message = format!(
            "A stream {id:?} is kept already: continue it with GET /v1/streams/{id}, or send another X-Request-Id"
        );
        Self::new(StatusCode::CONFLICT, message, Some("stream_exists"))
    }

    /// 400: the client cannot have seen that event.
    pub fn event_not_sent(id: &str, last: u64) -> Self {
        Self::invalid("Last-Event-ID", format!("Stream {id:?} has had no event {last} yet"))
    }

    /// 410: the stream goes on, but not from there.
    pub fn event_gone(id: &str, wanted: u64, first: u64) -> Self {
        let message = format!(
            "Event {wanted} of stream {id:?} is no longer kept: its buffer was needed for later ones and starts at {first}"
        );
        Self::new(StatusCode::GONE, message, Some("event_gone"))
    }

    /// In a stream: more waits for a reader than may.
    pub fn stream_not_read(max_bytes: usize) -> Self {
        let message = format!(
            "The answer was cancelled: its events were not read, and no more than {max_bytes} bytes are kept (--resume-buffer)"
        );
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message, Some("stream_not_read"))
    }

    /// In a stream: it goes on elsewhere.
    pub fn stream_taken_over() -> Self {
        Self::new(StatusCode::CONFLICT, "The stream is continued on another connection", Some("stream_taken_over"))
    }

    /// 405: the path exists, but not for this method.
    pub fn wrong_method(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("Method {method} is not allowed for {path}"),
            Some("method_not_allowed"),
        )
    }

    /// 413: the body is above the configured limit.
    pub fn too_large(max_bytes: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The request body is larger than the limit of {max_bytes} bytes"),
            Some("request_too_large"),
        )
    }

    /// 503: this server is going away.
    pub fn shutting_down() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down", Some("shutting_down"))
    }

    /// 500: a fault of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message, Some("internal_error"))
    }

    /// What clients may see inside an SSE event, once the status line has gone.
    pub(super) fn envelope(&self) -> Envelope<'_> {
        let r#type = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        Envelope { error: Body { message: &self.message, r#type, param: self.param.as_deref(), code: self.code } }
    }
}

impl From<RouterError> for ApiError {
    fn from(error: RouterError) -> Self {
        let (status, code) = match &error {
            RouterError::Invalid(_) => (StatusCode::BAD_REQUEST, None),
            RouterError::Overloaded(_) => (StatusCode::TOO_MANY_REQUESTS, Some("overloaded")),
            RouterError::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, Some("unavailable")),
            RouterError::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error")),
        };
        Self::new(status, error.to_string(), code)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.envelope())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
