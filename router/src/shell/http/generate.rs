//! All answers to one request: submitted together, read as they come, forgotten together.
//!
//! Dropping a [`Generation`] drops its submissions, and with them the work in the cluster. That is all there is to a
//! client's disconnect: hyper drops the handler's future, or the body's stream, and either owns the generation.

use super::App;
use super::answer::{Answer, Delta};
use super::error::ApiError;
use super::metrics::Metrics;
use super::params::GenerateOptions;
use super::response::{PromptTokensDetails, UsageBody};
use crate::machine::{ReplyEvent, Usage};
use crate::shell::gateway::Submission;
use futures_util::stream::{self, AbortHandle, BoxStream, SelectAll, StreamExt};
use ridge_protocol::TokenId;
use ridge_protocol::transfer::TransferTimes;
use ridge_protocol::wire::Receipt;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// A tokenized prompt.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct PromptTokens {
    /// At least one, and fewer than the context holds.
    pub(super) tokens: Vec<TokenId>,
    /// The text to put before the answers.
    pub(super) echo: Option<String>,
}

/// The answers to one request as they are being made. Answer `i` belongs to prompt `i / n`.
pub(super) struct Generation {
    choices: Vec<Choice>,
    events: SelectAll<BoxStream<'static, (usize, ReplyEvent)>>,
    /// Turns true when the server no longer waits for answers.
    closing: watch::Receiver<bool>,
    metrics: Arc<Metrics>,
    arrived: Instant,
    prompt_tokens: u32,
    n: usize,
}

struct Choice {
    answer: Answer,
    /// Takes the submission out of `events`, which drops it.
    abort: AbortHandle,
    over: bool,
    usage: Option<Usage>,
    last_token: Option<Instant>,
}

impl Generation {
    /// Submits every answer to every prompt, or none.
    pub(super) fn start(
        app: &App,
        prompts: Vec<PromptTokens>,
        options: &GenerateOptions,
        salt: u64,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let mut choices = Vec::with_capacity(prompts.len() * options.n as usize);
        let mut events = SelectAll::new();
        let prompt_tokens = prompts.iter().map(|prompt| prompt.tokens.len() as u32).sum();
        for PromptTokens { tokens, echo } in prompts {
            for choice in 0..options.n {
                let params = options.fit(choice, tokens.len(), app.max_model_len());
                let answer = Answer::new(app.model.as_ref(), &tokens, &params, options, echo.clone());
                let submission = app.gateway.submit(tokens.clone(), params, salt)?;
                let (reply, abort) = stream::abortable(replies(choices.len(), submission));
                events.push(reply.boxed());
                choices.push(Choice { answer, abort, over: false, usage: None, last_token: None });
            }
        }
        Ok(Self {
            choices,
            events,
            closing: app.closing.clone(),
            metrics: app.metrics.clone(),
            arrived,
            prompt_tokens,
            n: options.n as usize,
        })
    }

    /// How many answers there are.
    pub(super) fn len(&self) -> usize {
        self.choices.len()
    }

    /// The next part of some answer, with the answer's index; `None` when all are complete. After an error there is
    /// nothing more. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, Delta), ApiError>> {
        loop {
            let event = tokio::select! {
                event = self.events.next() => Some(event),
                // A server that is gone without a word is closing too.
                _ = self.closing.wait_for(|closing| *closing) => None,
            };
            let Some(event) = event else { return Some(Err(self.fail(ApiError::shutting_down()))) };
            let Some((index, event)) = event else {
                assert!(self.choices.iter().all(|choice| choice.over), "every answer ends with an event");
                return None;
            };
            match self.on_event(index, event) {
                Ok(None) => {}
                Ok(Some(delta)) => return Some(Ok((index, delta))),
                Err(error) => return Some(Err(self.fail(error))),
            }
        }
    }

    fn on_event(&mut self, index: usize, event: ReplyEvent) -> Result<Option<Delta>, ApiError> {
        let choice = &mut self.choices[index];
        if choice.over {
            // It was aborted with an event already on its way.
            return Ok(None);
        }
        let delta = match event {
            ReplyEvent::Token { out, usage, .. } => {
                choice.usage = Some(usage);
                let now = Instant::now();
                match choice.last_token.replace(now) {
                    None => self.metrics.first_token.observe(now - self.arrived),
                    Some(last) => self.metrics.inter_token.observe(now - last),
                }
                choice.answer.on_token(out)
            }
            ReplyEvent::Finished { reason, usage } => {
                choice.usage = Some(usage);
                Some(choice.answer.on_finished(reason))
            }
            ReplyEvent::Failed(error) => return Err(error.into()),
        };
        if delta.as_ref().is_some_and(|delta| delta.finish.is_some()) {
            choice.over = true;
            choice.abort.abort();
            if self.choices.iter().all(|choice| choice.over) {
                self.metrics.end_to_end.observe(self.arrived.elapsed());
            }
        }
        Ok(delta)
    }

    fn fail(&mut self, error: ApiError) -> ApiError {
        self.events.clear();
        for choice in &mut self.choices {
            choice.over = true;
        }
        error
    }

    /// Token counts so far.
    pub(super) fn usage(&self) -> UsageBody {
        let completion_tokens = self.choices.iter().map(|choice| choice.answer.tokens()).sum();
        let cached =
            |answers: &[Choice]| answers.iter().find_map(|choice| choice.usage).map(|usage| usage.cached_tokens);
        let cached_tokens: Option<u32> = self.choices.chunks(self.n).map(cached).sum();
        UsageBody {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            total_tokens: self.prompt_tokens + completion_tokens,
            prompt_tokens_details: cached_tokens.map(|cached_tokens| PromptTokensDetails { cached_tokens }),
        }
    }

    /// How the decode nodes came by the prompts' KV, summed over the answers that say so.
    pub(super) fn receipt(&self) -> Option<Receipt> {
        self.choices.iter().filter_map(|choice| choice.usage).map(|usage| usage.receipt).reduce(sum)
    }

    /// Says in the log how the prompts' KV came, for whoever looks into one answer.
    pub(super) fn log_receipt(&self, id: &str) {
        let Some(receipt) = self.receipt() else { return };
        let Receipt { cached, computed, transferred, recomputed, transfer_bytes, times, converted } = receipt;
        let converted = converted.map(|conversion| conversion.to_string());
        let TransferTimes { hidden_us, exposed_us } = times;
        tracing::info!(
            id,
            cached,
            computed,
            transferred,
            recomputed,
            transfer_bytes,
            hidden_us,
            exposed_us,
            converted,
            "answer complete"
        );
    }
}

fn replies(index: usize, submission: Submission) -> impl futures_util::Stream<Item = (usize, ReplyEvent)> + Send {
    stream::unfold(submission, move |mut submission| async move {
        let event = submission.next().await?;
        Some(((index, event), submission))
    })
}

/// Saturating, because these are the nodes' own words.
fn sum(a: Receipt, b: Receipt) -> Receipt {
    Receipt {
        cached: a.cached.saturating_add(b.cached),
        computed: a.computed.saturating_add(b.computed),
        transferred: a.transferred.saturating_add(b.transferred),
        recomputed: a.recomputed.saturating_add(b.recomputed),
        transfer_bytes: a.transfer_bytes.saturating_add(b.transfer_bytes),
        times: a.times + b.times,
        // The answers of one request may have come by different nodes; one is named.
        converted: a.converted.or(b.converted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_protocol::{BlockShape, CacheDtype, Conversion};

    #[test]
    fn receipts_of_lying_nodes_do_not_overflow() {
        let edge = Receipt {
            cached: u32::MAX,
            computed: u32::MAX,
            transferred: u32::MAX,
            recomputed: u32::MAX,
            transfer_bytes: u64::MAX,
            times: TransferTimes { hidden_us: u64::MAX, exposed_us: u64::MAX },
            converted: None,
        };
        assert_eq!(sum(edge, edge), edge);
        let times = |n: u64| TransferTimes { hidden_us: 6 * n, exposed_us: 7 * n };
        let few = |n: u32| Receipt {
            cached: n,
            computed: 2 * n,
            transferred: 3 * n,
            recomputed: 4 * n,
            transfer_bytes: 5 * u64::from(n),
            times: times(n.into()),
            converted: None,
        };
        assert_eq!(sum(few(1), few(1)), few(2));
        let blocks = |size| BlockShape::new(size, CacheDtype::F32).expect("a block holds a token");
        let converted = Some(Conversion { from: blocks(16), to: blocks(32) });
        let other = Receipt { converted, ..few(1) };
        assert_eq!(
            (sum(few(1), other), sum(other, few(1))),
            (Receipt { converted, ..few(2) }, Receipt { converted, ..few(2) })
        );
    }
}
