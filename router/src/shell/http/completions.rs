//! `POST /v1/completions`

use super::edge::{Caller, RequestBody};
use super::error::ApiError;
use super::generate::PromptTokens;
use super::request::{CompletionRequest, Prompt};
use super::respond::{Prepared, blocking, check_prompt, respond};
use super::response::Dialect;
use super::{App, Shared};
use axum::Extension;
use axum::extract::State;
use axum::response::Response;

/// Continues one or more prompts.
pub(super) async fn create(
    State(app): State<Shared>,
    Extension(caller): Extension<Caller>,
    RequestBody(body): RequestBody,
) -> Result<Response, ApiError> {
    let prepared = blocking(&app, body.len(), move |app| prepare(app, &body)).await?;
    respond(&app, &caller, prepared).await
}

fn prepare(app: &App, body: &[u8]) -> Result<Prepared, ApiError> {
    let request = CompletionRequest::parse(body, app.model.as_ref())?;
    let model = app.resolve(request.model)?;
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for prompt in request.prompts {
        let (tokens, echo) = match prompt {
            Prompt::Text(text) => {
                let tokens = app.model.encode(&text, request.add_special);
                (tokens.map_err(|error| ApiError::invalid("prompt", error))?, request.echo.then_some(text))
            }
            Prompt::Tokens(tokens) => {
                let echo = request.echo.then(|| app.model.decode(&tokens, request.options.skip_special));
                (tokens, echo)
            }
        };
        check_prompt(app, "prompt", tokens.len())?;
        prompts.push(PromptTokens { tokens, echo });
    }
    Ok(Prepared {
        dialect: Dialect::Completion,
        model,
        prompts,
        options: request.options,
        calls: None,
        delivery: request.delivery,
    })
}
