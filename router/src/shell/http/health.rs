//! `GET /health`, `/live` and `/version`: for load balancers, supervisors and people.

use super::Shared;
use crate::shell::gateway::Health;
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// 200 if a prompt would be answered, with the reason if the cluster is not what it is meant to be; else 503.
pub(super) async fn ready(State(app): State<Shared>) -> Response {
    if *app.closing.borrow() {
        return unavailable("the server is shutting down");
    }
    match &app.gateway.view().health {
        Health::Ready => Json(json!({ "status": "ready" })).into_response(),
        Health::Degraded(reason) => Json(json!({ "status": "degraded", "reason": reason })).into_response(),
        Health::Unavailable(reason) => unavailable(reason),
    }
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
