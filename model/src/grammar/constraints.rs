//! The grammars of the sequences that an engine runs: a mask of tokens before each draw, the token drawn after it.
//!
//! A matcher is kept from pass to pass. It says the same as one that begins anew and takes all tokens of the answer, which
//! is what happens to a sequence that comes with some: after a failover, a move or a preemption.

use super::{GrammarError, Grammars, STACK_BYTES, guarded, say};
use crate::engine::Output;
use llguidance::Matcher;
use ridge_protocol::{NoToken, RequestId, SampleSpec, SamplingParams, TokenId, TokenOut};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Passes after which the matcher of a sequence that samples no longer is dropped.
const KEPT_PASSES: u64 = 16;

/// What one item of a pass may be answered with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Allowed {
    /// Nothing constrains it.
    Everything,
    /// A bit per token, the lowest of each word first.
    Only(Vec<u32>),
    /// There is no token.
    Nothing(NoToken),
}

impl Allowed {
    /// The bits, if it is constrained.
    pub fn mask(&self) -> Option<&[u32]> {
        match self {
            Self::Only(mask) => Some(mask),
            Self::Everything | Self::Nothing(_) => None,
        }
    }
}

/// Follows the constrained sequences of one engine.
#[derive(Debug)]
pub struct Constraints {
    grammars: Arc<Grammars>,
    live: BTreeMap<RequestId, Live>,
    pass: u64,
}

/// A matcher and what it has taken.
struct Live {
    matcher: Matcher,
    /// Of the sequence that it was made for; the pointer is compared.
    params: Arc<SamplingParams>,
    answer: Vec<TokenId>,
    last_pass: u64,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Live({} tokens, pass {})", self.answer.len(), self.last_pass)
    }
}

impl Constraints {
    /// Follows nobody yet.
    pub fn new(grammars: Arc<Grammars>) -> Self {
        Self { grammars, live: BTreeMap::new(), pass: 0 }
    }

    /// Runs `compute`, and beside it works out what each of `items` may be answered with, in their order.
    pub fn beside<T>(&mut self, items: &[(RequestId, &SampleSpec)], compute: impl FnOnce() -> T) -> (T, Vec<Allowed>) {
        self.pass += 1;
        let pass = self.pass;
        self.live.retain(|_, live| live.last_pass + KEPT_PASSES >= pass);
        if items.iter().all(|(_, spec)| spec.params.grammar.is_none()) {
            return (compute(), vec![Allowed::Everything; items.len()]);
        }
        std::thread::scope(|scope| {
            let work = || items.iter().map(|(request, spec)| self.allowed(*request, spec)).collect();
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES);
            let masks = thread.spawn_scoped(scope, work).expect("the system can start a thread");
            let computed = compute();
            (computed, masks.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    /// Takes the tokens that were drawn for `items`, and says which of them end their answers.
    pub fn take(
        &mut self,
        items: &[(RequestId, &SampleSpec)],
        allowed: Vec<Allowed>,
        tokens: Vec<TokenOut>,
    ) -> Vec<Output> {
        assert_eq!((items.len(), items.len()), (allowed.len(), tokens.len()), "a token and a mask for each item");
        let taken = items.iter().zip(allowed).zip(tokens).map(|(((request, spec), allowed), token)| {
            let token = match allowed {
                Allowed::Everything => Ok(token),
                Allowed::Nothing(reason) => Err(reason),
                Allowed::Only(mask) => self.accept(*request, spec, &mask, token),
            };
            Output { request: *request, token }
        });
        taken.collect()
    }

    fn allowed(&mut self, request: RequestId, spec: &SampleSpec) -> Allowed {
        let Some(grammar) = &spec.params.grammar else { return Allowed::Everything };
        let pass = self.pass;
        let answer = &spec.history[(spec.prompt_len as usize).min(spec.history.len())..];
        let vocab = self.grammars.vocab;
        let mask = guarded(|| {
            let known = self.live.remove(&request).filter(|live| {
                Arc::ptr_eq(&live.params, &spec.params) && answer.starts_with(&live.answer) && !live.matcher.is_error()
            });
            let mut live = match known {
                Some(live) => live,
                None => Live {
                    matcher: self.grammars.matcher(grammar)?,
                    params: spec.params.clone(),
                    answer: Vec::new(),
                    last_pass: pass,
                },
            };
            live.last_pass = pass;
            live.catch_up(answer)?;
            let mask = live.mask(vocab)?;
            self.live.insert(request, live);
            Ok(mask)
        });
        match mask {
            Ok(mask) => Allowed::Only(mask),
            Err(error) => Allowed::Nothing(no_token(&error)),
        }
    }

    /// Takes a token that was drawn from a mask.
    fn accept(
        &mut self,
        request: RequestId,
        spec: &SampleSpec,
        mask: &[u32],
        token: TokenOut,
    ) -> Result<TokenOut, NoToken> {
        if !is_set(mask, token.token) {
            let why = "the model gives no token that the grammar allows here a finite logit";
            return Err(no_token(&GrammarError(why.into())));
        }
        if spec.params.is_stop(token.token) {
            return Ok(token); // It ends the answer, and is not part of it.
        }
        let live = self.live.get_mut(&request).expect("whoever gave the mask is kept");
        let ends = guarded(|| live.take(token.token)).map_err(|error| no_token(&error))?;
        Ok(TokenOut { ends, ..token })
    }
}

impl Live {
    /// Takes what the answer has beyond what was taken already.
    fn catch_up(&mut self, answer: &[TokenId]) -> Result<(), GrammarError> {
        let missing = &answer[self.answer.len()..];
        self.matcher.consume_tokens(missing).map_err(|error| say(&error))?;
        self.answer.extend_from_slice(missing);
        Ok(())
    }

    /// Takes one token; true if nothing may follow it.
    fn take(&mut self, token: TokenId) -> Result<bool, GrammarError> {
        self.matcher.consume_token(token).map_err(|error| say(&error))?;
        self.answer.push(token);
        Ok(self.matcher.is_stopped())
    }

    /// A bit per token of `vocab`. Where the answer may end, the request's stop tokens are allowed, and only there.
    fn mask(&mut self, vocab: usize) -> Result<Vec<u32>, GrammarError> {
        let mut mask: Vec<u32> = self.matcher.compute_mask_or_eos().map_err(|error| say(&error))?.into();
        let ends = is_set(&mask, vocab as TokenId);
        mask.truncate(vocab.div_ceil(32));
        if !vocab.is_multiple_of(32)
            && let Some(last) = mask.last_mut()
        {
            *last &= (1 << (vocab % 32)) - 1;
        }
        let stops = self.params.stop_tokens.iter().filter(|token| ends && self.params.is_stop(**token));
        for token in stops.filter(|token| (**token as usize) < vocab) {
            mask[*token as usize / 32] |= 1 << (token % 32);
        }
        match mask.iter().any(|word| *word != 0) {
            true => Ok(mask),
            false => Err(GrammarError("the vocabulary has no token that may come next".into())),
        }
    }
}

fn is_set(mask: &[u32], token: TokenId) -> bool {
    mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

fn no_token(error: &GrammarError) -> NoToken {
    NoToken(format!("the answer cannot follow its grammar any further: {error}"))
}
