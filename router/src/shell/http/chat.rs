//! `POST /v1/chat/completions`

use super::edge::{Caller, RequestBody};
use super::error::ApiError;
use super::generate::PromptTokens;
use super::request::ChatRequest;
use super::respond::{Prepared, blocking, check_prompt, respond};
use super::response::Dialect;
use super::{App, Shared};
use axum::Extension;
use axum::extract::State;
use axum::response::Response;

/// Renders the conversation with the model's template and continues it.
pub(super) async fn create(
    State(app): State<Shared>,
    Extension(caller): Extension<Caller>,
    RequestBody(body): RequestBody,
) -> Result<Response, ApiError> {
    let prepared = blocking(&app, body.len(), move |app| prepare(app, &body)).await?;
    respond(&app, &caller, prepared).await
}

fn prepare(app: &App, body: &[u8]) -> Result<Prepared, ApiError> {
    let request = ChatRequest::parse(body, app.model.as_ref())?;
    let model = app.resolve(request.model)?;
    let prompt = request.conversation.render(app.model.as_ref())?;
    // The template writes the special tokens itself.
    let tokens = app.model.encode(&prompt, false).map_err(|error| ApiError::invalid("messages", error))?;
    check_prompt(app, "messages", tokens.len())?;
    Ok(Prepared {
        dialect: Dialect::Chat,
        model,
        prompts: vec![PromptTokens { tokens, echo: None }],
        options: request.options,
        calls: request.calls,
        delivery: request.delivery,
    })
}
