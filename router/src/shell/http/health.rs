//! `GET /health`, `/live` and `/version`: for load balancers, supervisors and people.

use super::Shared;
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// 200 if a real prompt has passed through the whole cluster since it last changed, else 503 with the reason.
pub(super) async fn ready(State(app): State<Shared>) -> Response {
    let view = app.gateway.view();
    if *app.closing.borrow() {
        return unavailable("the server is shutting down");
    }
    if !view.ready {
        return unavailable(&view.not_ready_reason);
    }
    Json(json!({ "status": "ready" })).into_response()
}

/// 200 as long as the process answers at all.
pub(super) async fn live() -> Json<Value> {
    Json(json!({ "status": "live" }))
}

/// The version of this server.
pub(super) async fn version(State(app): State<Shared>) -> Json<Value> {
    Json(json!({ "version": app.config.version }))
}

fn unavailable(reason: &str) -> Response {
    let body = Json(json!({ "status": "unavailable", "reason": reason }));
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], body).into_response()
}
