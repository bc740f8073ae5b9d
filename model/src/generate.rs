//! Generation in one process, without scheduler or network: the oracle that the cluster's answers are compared with.
//!
//! It takes the first blocks of the engine's memory, in order, for its one sequence; nothing else may use the engine
//! meanwhile. It knows nothing of text: stop strings are the caller's, by returning `false` from `on_token`.

use crate::engine::Engine;
use ridge_protocol::{BatchPlan, BlockId, PlanItem, RequestId, SampleSpec, SamplingParams, TokenId, TokenOut};
use std::sync::Arc;

/// Why nothing was generated.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for a token.
    #[error("the prompt has {prompt} tokens, the model's context is {context}")]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// The model's context length.
        context: usize,
    },
    /// A token that the model does not have.
    #[error("token {token} of the prompt is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: TokenId,
        /// Tokens in the vocabulary.
        vocab: usize,
    },
    /// A parameter is out of range.
    #[error("{0}")]
    Params(String),
    /// The KV memory is too small for the prompt and the tokens asked for.
    #[error("the sequence needs {needed} KV blocks, the memory has {blocks}")]
    Blocks {
        /// Blocks of the longest sequence this call could produce.
        needed: usize,
        /// Blocks there are.
        blocks: usize,
    },
}

/// Continues `prompt` until a stop token, `max_tokens`, `max_model_len` tokens in all, or `on_token` returns `false`.
///
/// The prompt runs in chunks of `chunk` tokens, rounded down to whole blocks but at least one. The answer does not
/// depend on it. A stop token is part of the answer, as its last token.
pub fn generate(
    engine: &mut dyn Engine,
    prompt: &[TokenId],
    params: &SamplingParams,
    chunk: usize,
    max_model_len: usize,
    on_token: &mut dyn FnMut(&TokenOut) -> bool,
) -> Result<Vec<TokenOut>, GenerateError> {
    let (context, vocab) = (engine.spec().context.min(max_model_len), engine.spec().vocab);
    let (block_size, blocks) = (engine.kv().format().block_size, engine.kv().blocks());
    params.check().map_err(GenerateError::Params)?;
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    if let Some(token) = prompt.iter().find(|token| **token as usize >= vocab) {
        return Err(GenerateError::Token { token: *token, vocab });
    }
    if prompt.len() >= context {
        return Err(GenerateError::Context { prompt: prompt.len(), context });
    }
    let limit = (params.max_tokens as usize).min(context - prompt.len());
    // The last token drawn is never run, so it needs no place in the cache.
    let needed = (prompt.len() + limit - 1).div_ceil(block_size);
    if needed > blocks {
        return Err(GenerateError::Blocks { needed, blocks });
    }

    let mut sequence = Sequence {
        params: Arc::new(params.clone()),
        prompt_len: prompt.len(),
        tokens: prompt.to_vec(),
        computed: 0,
        block_size,
        step: 0,
    };
    let chunk = (chunk / block_size).max(1) * block_size;
    let mut out = Vec::new();
    while out.len() < limit {
        let plan = sequence.next_plan(chunk);
        // A chunk before the prompt's last yields no token.
        for output in engine.run(&plan, &mut |_| {}) {
            sequence.tokens.push(output.token.token);
            let stop = params.is_stop(output.token.token) || !on_token(&output.token);
            out.push(output.token);
            if stop {
                return Ok(out);
            }
        }
    }
    Ok(out)
}

/// The one sequence in flight.
struct Sequence {
    params: Arc<SamplingParams>,
    prompt_len: usize,
    /// Prompt and answer.
    tokens: Vec<TokenId>,
    /// Leading tokens whose KV is in the cache.
    computed: usize,
    block_size: usize,
    step: u64,
}

impl Sequence {
    /// The pass over the next tokens, at most `chunk` of them; it samples if it reaches the last.
    fn next_plan(&mut self, chunk: usize) -> BatchPlan {
        let start = self.computed;
        let end = (start + chunk).min(self.tokens.len());
        self.computed = end;
        self.step += 1;
        let sample = (end == self.tokens.len()).then(|| SampleSpec {
            params: self.params.clone(),
            history: if self.params.needs_history() { self.tokens.clone() } else { Vec::new() },
            prompt_len: self.prompt_len as u32,
            position: end as u32,
        });
        let item = PlanItem {
            request: RequestId(0),
            tokens: self.tokens[start..end].to_vec(),
            start: start as u32,
            block_table: (0..end.div_ceil(self.block_size) as u32).map(BlockId).collect(),
            sample,
        };
        BatchPlan { step: self.step, items: vec![item] }
    }
}
