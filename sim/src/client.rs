//! What clients send, and what they must get.

use ridge_protocol::wire::{FinishReason, Receipt};
use ridge_protocol::{Instant, TokenId};
use ridge_router::machine::{ReplyEvent, RouterError};

/// One client's view of its answer.
#[derive(Debug)]
pub struct Client {
    pub prompt_len: usize,
    /// An answer may end for length when the shortest context is full.
    pub shortest_context: usize,
    /// What it must get.
    pub wanted: Vec<TokenId>,
    /// The last of that ends the answer by itself.
    pub stops: bool,
    pub submitted: Instant,
    pub got: usize,
    pub end: Option<Result<(), RouterError>>,
    pub gone: bool,
}

impl Client {
    /// Takes an event; panics on a gap, a duplicate, a wrong token, a wrong end, or anything after the end.
    pub fn take(&mut self, event: ReplyEvent) {
        assert!(!self.is_over(), "an event after the end: {event:?}");
        match event {
            ReplyEvent::Token { index, out, .. } => {
                assert_eq!(index as usize, self.got, "a gap or a duplicate in the stream");
                assert_eq!(
                    Some(&out.token),
                    self.wanted.get(self.got),
                    "the stream diverged from the oracle at {index}"
                );
                self.got += 1;
            }
            ReplyEvent::Finished { usage, reason } => {
                let full = self.got == self.wanted.len();
                let no_room = self.prompt_len + self.got >= self.shortest_context;
                assert!(self.got > 0 && (full || no_room), "the stream ended early, at {}", self.got);
                let stopped = full && self.stops;
                assert_eq!(reason, if stopped { FinishReason::Stop } else { FinishReason::Length }, "the wrong end");
                assert_eq!(usage.prompt_tokens as usize, self.prompt_len);
                assert_eq!(usage.completion_tokens as usize, self.got);
                assert!(usage.cached_tokens <= usage.prompt_tokens);
                let Receipt { transferred, converted, .. } = usage.receipt;
                let needless = converted.is_some_and(|it| it.from == it.to || transferred == 0);
                assert!(!needless, "the receipt tells of a conversion that was none: {converted:?}");
                self.end = Some(Ok(()));
            }
            ReplyEvent::Failed(error) => self.end = Some(Err(error)),
        }
    }

    pub fn is_over(&self) -> bool {
        self.gone || self.end.is_some()
    }
}
