//! From prompts to an HTTP response: what chat and completions do alike.

use super::answer::Delta;
use super::edge::Caller;
use super::error::ApiError;
use super::generate::{Generation, PromptTokens};
use super::params::GenerateOptions;
use super::request::Delivery;
use super::response::{Dialect, Head, RidgeBody};
use super::sse::EventStream;
use super::tools::Calls;
use super::{App, Shared};
use axum::Json;
use axum::response::{IntoResponse, Response};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bodies up to this long are read and tokenized on the spot (about a millisecond); longer ones would hold up every
/// stream on the same thread.
const INLINE_BYTES: usize = 8 << 10;

/// A request ready to be submitted.
pub(super) struct Prepared {
    /// Which endpoint.
    pub(super) dialect: Dialect,
    /// As the client named it.
    pub(super) model: String,
    /// Each at least one token and below the context length.
    pub(super) prompts: Vec<PromptTokens>,
    /// How to generate.
    pub(super) options: GenerateOptions,
    /// What every answer must be, if it must be calls.
    pub(super) calls: Option<Calls>,
    /// How to answer.
    pub(super) delivery: Delivery,
}

/// Runs `work`, which takes time in proportion to `bytes`, where it holds up nobody.
pub(super) async fn blocking<T: Send + 'static>(
    app: &Shared,
    bytes: usize,
    work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= INLINE_BYTES {
        return work(app);
    }
    let permit = app.tokenizing.clone().acquire_owned().await.expect("the semaphore is never closed");
    let app = app.clone();
    let result = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work(&app)
    });
    result.await.map_err(|_| ApiError::internal("tokenizing failed"))?
}

/// Refuses prompts that leave no room for an answer, or that are empty.
pub(super) fn check_prompt(app: &App, param: &str, tokens: usize) -> Result<(), ApiError> {
    if tokens == 0 {
        return Err(ApiError::invalid(param, format!("'{param}' must have at least one token")));
    }
    if tokens >= app.max_model_len() as usize {
        return Err(ApiError::context_length(tokens, app.max_model_len(), param));
    }
    Ok(())
}

/// Submits a request and answers it, whole or as a stream.
pub(super) async fn respond(app: &Shared, caller: &Caller, prepared: Prepared) -> Result<Response, ApiError> {
    let Prepared { dialect, model, prompts, options, calls, delivery } = prepared;
    if let Some(constraint) = &options.constraint {
        constraint.check(app).await?;
    }
    let grace = app.streams.grace(caller.resumable.as_ref())?;
    let salt = caller.tenant.salt(options.cache_salt.as_deref());
    let generation = Generation::start(app, prompts, &options, salt, caller.arrived)?;
    let prefix = if dialect == Dialect::Chat { "chatcmpl" } else { "cmpl" };
    let head = Head {
        dialect,
        id: format!("{prefix}-{}", caller.request_id),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        model,
        fingerprint: app.fingerprint.clone(),
        scored: options.params.logprobs.is_some(),
        calls,
    };
    if delivery.stream {
        stream(app, caller, generation, head, delivery, grace).await
    } else {
        whole(app, caller, generation, head).await
    }
}

async fn whole(app: &App, caller: &Caller, mut generation: Generation, head: Head) -> Result<Response, ApiError> {
    let mut answers = vec![Delta::default(); generation.len()];
    while let Some(step) = generation.next().await {
        let (index, delta) = step?;
        answers[index].text.push_str(&delta.text);
        answers[index].scored.extend(delta.scored);
        answers[index].finish = delta.finish;
    }
    generation.log_receipt(&head.id);
    let ridge = caller.wants_receipt.then(|| RidgeBody { receipt: generation.receipt() });
    Ok(Json(head.whole(app.model.as_ref(), &answers, generation.usage(), ridge)).into_response())
}

/// The status line waits for the first token, so that a refusal by the cluster is still a status of its own; but not
/// for longer than a keep-alive interval.
async fn stream(
    app: &App,
    caller: &Caller,
    mut generation: Generation,
    head: Head,
    delivery: Delivery,
    grace: Option<Duration>,
) -> Result<Response, ApiError> {
    let first = tokio::time::timeout(app.config.keep_alive, generation.next()).await.ok();
    if let Some(Some(Err(error))) = first {
        return Err(error);
    }
    let events = EventStream {
        generation,
        model: app.model.clone(),
        head,
        delivery,
        wants_receipt: caller.wants_receipt,
        keep_alive: Some(app.config.keep_alive),
        first,
    };
    match grace {
        None => Ok(events.into_response()),
        Some(grace) => app.streams.respond(caller.tenant, grace, events),
    }
}
