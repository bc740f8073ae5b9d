//! `GET /v1/models` and `GET /v1/models/{id}`

use super::error::ApiError;
use super::{App, Shared};
use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

#[derive(Serialize)]
pub(super) struct Models {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The name that the others are aliases of.
    root: String,
    parent: Option<String>,
    max_model_len: u32,
}

/// Every name of the model.
pub(super) async fn list(State(app): State<Shared>) -> Json<Models> {
    let data = app.config.served_model_names.iter().map(|name| model(&app, name)).collect();
    Json(Models { object: "list", data })
}

/// One name; names may contain slashes.
pub(super) async fn retrieve(State(app): State<Shared>, Path(id): Path<String>) -> Result<Json<Model>, ApiError> {
    let name = app.resolve(Some(id))?;
    Ok(Json(model(&app, &name)))
}

fn model(app: &App, name: &str) -> Model {
    Model {
        id: name.to_owned(),
        object: "model",
        created: app.started_at,
        owned_by: "ridge",
        root: app.config.served_model_names[0].clone(),
        parent: None,
        max_model_len: app.max_model_len(),
    }
}
