//! What clients send, and what they must get.

use ridge_protocol::{SamplingParams, TokenId};
use ridge_router::machine::ReplyEvent;

/// Tokens of the simulated vocabulary.
pub const VOCAB: u32 = 50_000;

/// The simulated model: a hash of everything before.
pub fn next_token(tokens: &[TokenId]) -> TokenId {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for token in tokens {
        hash = (hash ^ u64::from(*token)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    ((hash ^ (hash >> 29)) % u64::from(VOCAB)) as TokenId
}

/// The answer that a prompt must get.
pub fn oracle(prompt: &[TokenId], params: &SamplingParams, max_model_len: usize) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    while tokens.len() < max_model_len && tokens.len() - prompt.len() < params.max_tokens as usize {
        tokens.push(next_token(&tokens));
        if params.is_stop(*tokens.last().expect("just pushed")) {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

/// One client's view of its answer.
#[derive(Debug)]
pub struct Client {
    pub prompt: Vec<TokenId>,
    pub params: SamplingParams,
    pub got: Vec<TokenId>,
    pub end: Option<Result<(), String>>,
    pub gone: bool,
}

impl Client {
    /// Takes an event; panics on a gap, a duplicate, a wrong token, or anything after the end.
    pub fn take(&mut self, event: ReplyEvent, max_model_len: usize) {
        assert!(self.end.is_none(), "an event after the end: {event:?}");
        match event {
            ReplyEvent::Token { index, out, .. } => {
                assert_eq!(index as usize, self.got.len(), "a gap or a duplicate in the stream");
                self.got.push(out.token);
                let wanted = oracle(&self.prompt, &self.params, max_model_len);
                assert_eq!(self.got, wanted[..self.got.len()], "the stream diverged from the oracle");
            }
            ReplyEvent::Finished { usage, .. } => {
                let wanted = oracle(&self.prompt, &self.params, max_model_len);
                assert_eq!(self.got, wanted, "the stream ended early");
                assert_eq!(usage.prompt_tokens as usize, self.prompt.len());
                assert_eq!(usage.completion_tokens as usize, self.got.len());
                assert!(usage.cached_tokens <= usage.prompt_tokens);
                self.end = Some(Ok(()));
            }
            ReplyEvent::Failed(error) => self.end = Some(Err(error.to_string())),
        }
    }

    pub fn is_over(&self) -> bool {
        self.gone || self.end.is_some()
    }
}
