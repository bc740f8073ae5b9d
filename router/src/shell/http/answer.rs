//! One answer in the making: tokens in, text that may be shown out.
//!
//! Tokens pass through the detokenizer (which waits for whole characters) and the stop matcher (which waits while the
//! text may become a stop string). A token's log-probabilities go out with the text they belong to.

use super::params::GenerateOptions;
use super::stop::StopMatcher;
use super::text_model::{TextModel, TextStream};
use ridge_protocol::wire::FinishReason;
use ridge_protocol::{SamplingParams, TokenId, TokenOut};
use serde::Serialize;
use std::sync::Arc;

/// The next part of an answer.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Delta {
    /// Text to show.
    pub(super) text: String,
    /// The tokens whose text begins in `text`, if log-probabilities were asked for.
    pub(super) scored: Vec<Scored>,
    /// Set on the last part.
    pub(super) finish: Option<Finish>,
}

/// A token with its log-probabilities.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Scored {
    /// The token.
    pub(super) out: TokenOut,
    /// Characters of the answer before it, an echoed prompt included.
    pub(super) offset: usize,
    /// Bytes of the answer before it.
    start: usize,
}

/// How an answer ended.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Finish {
    /// `stop` or `length`.
    pub(super) reason: FinishReason,
    /// What stopped it, if that was the request's doing.
    pub(super) stop_reason: Option<StopReason>,
}

/// What of the request stopped an answer (vLLM's `stop_reason`).
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    /// One of `stop`.
    Text(String),
    /// One of `stop_token_ids`.
    Token(TokenId),
}

/// The state of one answer.
pub(super) struct Answer {
    decoder: Box<dyn TextStream>,
    matcher: StopMatcher,
    stop: Arc<[String]>,
    stop_tokens: Vec<TokenId>,
    eos: Vec<TokenId>,
    stopped_by: Option<TokenId>,
    wants_scores: bool,
    /// The echoed prompt, until it went out.
    echo: Option<String>,
    scored: Vec<Scored>,
    tokens: u32,
    decoded_bytes: usize,
    decoded_chars: usize,
    shown_bytes: usize,
}

impl Answer {
    /// An answer to `prompt` without tokens yet.
    pub(super) fn new(
        model: &dyn TextModel,
        prompt: &[TokenId],
        params: &SamplingParams,
        options: &GenerateOptions,
        echo: Option<String>,
    ) -> Self {
        Self {
            decoder: model.stream_decoder(prompt, options.skip_special),
            matcher: StopMatcher::new(&options.stop),
            stop: options.stop.clone(),
            stop_tokens: if params.ignore_eos { Vec::new() } else { params.stop_tokens.clone() },
            eos: model.defaults().eos.clone(),
            stopped_by: None,
            wants_scores: params.logprobs.is_some(),
            decoded_chars: echo.as_ref().map_or(0, |echo| echo.chars().count()),
            echo,
            scored: Vec::new(),
            tokens: 0,
            decoded_bytes: 0,
            shown_bytes: 0,
        }
    }

    /// Tokens so far, a stop token included.
    pub(super) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Takes the next token. Nothing may be ready to be shown; the answer may be over because of a stop string.
    pub(super) fn on_token(&mut self, out: TokenOut) -> Option<Delta> {
        self.tokens += 1;
        if self.stop_tokens.contains(&out.token) {
            // Its text is not part of the answer. The end itself comes with `Finished`.
            self.stopped_by = Some(out.token);
            return None;
        }
        let text = self.decoder.push(out.token).unwrap_or_default();
        if self.wants_scores {
            self.scored.push(Scored { out, offset: self.decoded_chars, start: self.decoded_bytes });
        }
        let text = self.show(&text);
        if self.matcher.matched().is_some() {
            return Some(self.last(text, FinishReason::Stop));
        }
        if text.is_empty() {
            return None;
        }
        let settled = self.scored.iter().take_while(|scored| scored.start < self.shown_bytes).count();
        let scored = self.scored.drain(..settled).collect();
        Some(Delta { text: self.with_echo(text), scored, finish: None })
    }

    /// Takes the end of the token stream.
    pub(super) fn on_finished(&mut self, reason: FinishReason) -> Delta {
        let rest = self.decoder.flush().unwrap_or_default();
        let mut text = self.show(&rest);
        if self.matcher.matched().is_none() {
            text.push_str(&self.matcher.finish());
            self.shown_bytes = self.decoded_bytes;
        }
        self.last(text, reason)
    }

    fn show(&mut self, decoded: &str) -> String {
        self.decoded_bytes += decoded.len();
        self.decoded_chars += decoded.chars().count();
        let text = self.matcher.push(decoded);
        self.shown_bytes += text.len();
        text
    }

    fn last(&mut self, text: String, reason: FinishReason) -> Delta {
        let mut scored = std::mem::take(&mut self.scored);
        let finish = match self.matcher.matched() {
            Some(stop) => {
                scored.retain(|scored| scored.start < self.shown_bytes);
                Finish { reason: FinishReason::Stop, stop_reason: Some(StopReason::Text(self.stop[stop].clone())) }
            }
            None => {
                let asked_for = self.stopped_by.filter(|token| !self.eos.contains(token));
                Finish { reason, stop_reason: asked_for.map(StopReason::Token) }
            }
        };
        Delta { text: self.with_echo(text), scored, finish: Some(finish) }
    }

    fn with_echo(&mut self, text: String) -> String {
        match self.echo.take() {
            Some(echo) => echo + &text,
            None => text,
        }
    }
}
