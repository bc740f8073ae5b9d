//! `GET /v1/nodes` and `POST /v1/nodes/{name}/drain`: the cluster's nodes, for those who run it.
//!
//! Clients' keys do not open these doors. Without an admin key they are open on loopback to a router that has no keys
//! at all, which is what somebody trying Ridge on a laptop has.

use super::Shared;
use super::error::ApiError;
use crate::machine::NodeView;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use ridge_protocol::NodeName;
use serde_json::{Value, json};

/// Every connected node, by name.
pub(super) async fn list(State(app): State<Shared>, headers: HeaderMap) -> Result<Json<Value>, ApiError> {
    admit(&app, &headers)?;
    let view = app.gateway.view();
    Ok(Json(json!({ "object": "list", "data": view.nodes.iter().map(show).collect::<Vec<_>>() })))
}

/// Gives a node nothing new and moves a decode node's sequences elsewhere, with their KV. 202: it goes on, `list` shows
/// how far it is.
pub(super) async fn drain(
    State(app): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    admit(&app, &headers)?;
    match app.gateway.drain_node(NodeName(name.clone())).await? {
        true => Ok((StatusCode::ACCEPTED, Json(json!({ "name": name, "draining": true }))).into_response()),
        false => Err(ApiError::node_not_found(&name)),
    }
}

fn admit(app: &Shared, headers: &HeaderMap) -> Result<(), ApiError> {
    let keys_wanted = !app.config.admin_keys.is_empty();
    let laptop = app.config.api_keys.is_empty() && app.config.bind.ip().is_loopback();
    match app.admins.check(headers) {
        Some(_) if keys_wanted || laptop => Ok(()),
        Some(_) => Err(ApiError::no_admin_key()),
        None => Err(ApiError::unauthorized()),
    }
}

fn show(node: &NodeView) -> Value {
    let NodeView { hello, stats, in_flight, draining, .. } = node;
    json!({
        "name": hello.name.0,
        "role": hello.role.to_string(),
        "pid": hello.pid,
        "kv_address": hello.kv_addr,
        "block_size": hello.identity.block_size,
        "kv_dtype": hello.identity.kv_dtype,
        "draining": draining,
        "in_flight": in_flight,
        "blocks": stats.blocks,
        "orphaned_blocks": stats.orphaned_blocks,
    })
}
