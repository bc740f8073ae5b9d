//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use super::edge::RequestBody;
use super::error::ApiError;
use super::fields::Fields;
use super::messages::Conversation;
use super::params::check_vocabulary;
use super::respond::blocking;
use super::{App, Shared};
use axum::Json;
use axum::extract::State;
use ridge_protocol::TokenId;
use serde::Serialize;

#[derive(Serialize)]
pub(super) struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
pub(super) struct Detokenized {
    prompt: String,
}

/// The tokens of a `prompt`, or of `messages` as the chat endpoint would send them to the model.
pub(super) async fn tokenize(
    State(app): State<Shared>,
    RequestBody(body): RequestBody,
) -> Result<Json<Tokenized>, ApiError> {
    blocking(&app, body.len(), move |app| encode(app, &body)).await.map(Json)
}

/// The text of `tokens`, special ones included.
pub(super) async fn detokenize(
    State(app): State<Shared>,
    RequestBody(body): RequestBody,
) -> Result<Json<Detokenized>, ApiError> {
    blocking(&app, body.len(), move |app| decode(app, &body)).await.map(Json)
}

fn encode(app: &App, body: &[u8]) -> Result<Tokenized, ApiError> {
    let mut fields = Fields::parse(body)?;
    app.resolve(fields.take("model")?)?;
    let chat = fields.has("messages");
    let add_special = fields.take("add_special_tokens")?.unwrap_or(!chat);
    let return_strings = fields.take("return_token_strs")?.unwrap_or(false);
    let (param, text) = if chat {
        ("messages", Conversation::take(&mut fields)?.render(app.model.as_ref())?)
    } else {
        ("prompt", fields.require("prompt")?)
    };
    fields.ignore_rest();
    let tokens = app.model.encode(&text, add_special).map_err(|error| ApiError::invalid(param, error))?;
    let string = |token: &TokenId| String::from_utf8_lossy(&app.model.token_bytes(*token)).into_owned();
    let token_strs = return_strings.then(|| tokens.iter().map(string).collect());
    Ok(Tokenized { count: tokens.len(), max_model_len: app.max_model_len(), tokens, token_strs })
}

fn decode(app: &App, body: &[u8]) -> Result<Detokenized, ApiError> {
    let mut fields = Fields::parse(body)?;
    app.resolve(fields.take("model")?)?;
    let tokens: Vec<TokenId> = fields.require("tokens")?;
    fields.ignore_rest();
    check_vocabulary(&tokens, app.model.as_ref(), "tokens")?;
    Ok(Detokenized { prompt: app.model.decode(&tokens, false) })
}
