//! Generation in one process, without scheduler or network: the oracle that the cluster's answers are compared with.
//!
//! It takes the first blocks of the engine's memory, in order, for its one sequence; nothing else may use the engine
//! meanwhile. It knows nothing of text: stop strings are the caller's, by returning `false` from `on_token`.

use crate::engine::{Engine, cache_dtype};
use crate::kv::KvMemory;
use ridge_protocol::transfer::PageSource;
use ridge_protocol::{
    BatchPlan, BlockId, BlockShape, NoToken, PlanItem, RequestId, SampleSpec, SamplingParams, TokenId, TokenOut,
};
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
    /// The answer cannot follow its grammar.
    #[error(transparent)]
    NoToken(#[from] NoToken),
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
    let limit = check(engine, prompt, params, params.max_tokens, max_model_len)?;
    let mut sequence = Sequence::new(prompt, params);
    sequence.run(engine, limit, chunk, on_token)?;
    Ok(sequence.out)
}

/// As [`generate`], by two engines of one model that keep KV in other blocks, or in another type: `prefill` computes the
/// prompt and draws the first token, the prompt's KV is converted as it is on its way between two nodes, and `decode` goes on
/// from there. With one type on both sides the answer is that of [`generate`].
///
/// # Panics
///
/// If the engines' models differ, or the one's KV is not converted into the other's type.
pub fn generate_handed_over(
    prefill: &mut dyn Engine,
    decode: &mut dyn Engine,
    prompt: &[TokenId],
    params: &SamplingParams,
    chunk: usize,
    max_model_len: usize,
    on_token: &mut dyn FnMut(&TokenOut) -> bool,
) -> Result<Vec<TokenOut>, GenerateError> {
    let begin = Turn { at: 0, by: Computes::Prefill };
    generate_in_turns(prefill, decode, prompt, params, chunk, max_model_len, &[begin], on_token)
}

/// Who computes all that there is of a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Computes {
    /// The prefill engine, which draws the next token and hands over.
    Prefill,
    /// The decode engine by itself.
    Decode,
}

/// A point of an answer at which nothing is left of the sequence's KV.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turn {
    /// Tokens of the answer before it.
    pub at: usize,
    /// Prompt and answer so far are computed by this engine.
    pub by: Computes,
}

/// As [`generate_handed_over`], with KV that is lost and computed again at every turn but the first, which is at 0: an answer whose
/// nodes died. Where the engines keep KV in one type, turns change nothing.
///
/// # Panics
///
/// As there; if there is no turn at 0, or turns do not ascend.
#[expect(clippy::too_many_arguments, reason = "as many as a hand-over has, and the turns")]
pub fn generate_in_turns(
    prefill: &mut dyn Engine,
    decode: &mut dyn Engine,
    prompt: &[TokenId],
    params: &SamplingParams,
    chunk: usize,
    max_model_len: usize,
    turns: &[Turn],
    on_token: &mut dyn FnMut(&TokenOut) -> bool,
) -> Result<Vec<TokenOut>, GenerateError> {
    assert!(turns.first().is_some_and(|first| first.at == 0) && turns.is_sorted_by_key(|turn| turn.at), "{turns:?}");
    let drawn = turns.iter().filter(|turn| turn.by == Computes::Prefill).map(|turn| turn.at as u32 + 1).max();
    check(prefill, prompt, params, params.max_tokens.min(drawn.unwrap_or(0)), max_model_len)?;
    let limit = check(decode, prompt, params, params.max_tokens, max_model_len)?;
    let mut sequence = Sequence::new(prompt, params);
    for (turn, next) in turns.iter().zip(turns.iter().skip(1).map(Some).chain([None])) {
        let until = next.map_or(limit, |next| next.at.min(limit));
        sequence.computed = 0;
        if turn.by == Computes::Prefill && turn.at < until {
            if !sequence.run(prefill, turn.at + 1, chunk, on_token)? {
                break;
            }
            hand_over(prefill.kv(), decode.kv(), sequence.computed);
        }
        if !sequence.run(decode, until, chunk, on_token)? {
            break;
        }
    }
    Ok(sequence.out)
}

/// How many tokens can be generated, at most `max_tokens`.
fn check(
    engine: &dyn Engine,
    prompt: &[TokenId],
    params: &SamplingParams,
    max_tokens: u32,
    max_model_len: usize,
) -> Result<usize, GenerateError> {
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
    let limit = (max_tokens as usize).min(context - prompt.len());
    // The last token drawn is never run, so it needs no place in the cache.
    let needed = (prompt.len() + limit - 1).div_ceil(block_size);
    if needed > blocks {
        return Err(GenerateError::Blocks { needed, blocks });
    }
    Ok(limit)
}

/// Puts the KV of the first tokens into another memory, page by page.
fn hand_over(from: &KvMemory, to: &KvMemory, tokens: usize) {
    let (own, size) = (from.format().block_size, to.format().block_size);
    let table: Vec<BlockId> = (0..tokens.div_ceil(own) as u32).map(BlockId).collect();
    let mut page = Vec::new();
    let blocks = BlockShape::new(size as u32, cache_dtype(to.format().dtype)).expect("a block holds a token");
    for index in 0..tokens.div_ceil(size) as u32 {
        let source = PageSource::of(index, size as u32, tokens as u32, &table, own as u32);
        for layer in 0..from.layers() {
            from.page_in(blocks, layer, &source, &mut page);
            to.write(layer, BlockId(index)).copy_from_slice(&page);
        }
    }
}

/// The one sequence in flight.
struct Sequence {
    params: Arc<SamplingParams>,
    prompt_len: usize,
    /// Prompt and answer.
    tokens: Vec<TokenId>,
    /// Leading tokens whose KV is in the cache.
    computed: usize,
    step: u64,
    out: Vec<TokenOut>,
}

impl Sequence {
    fn new(prompt: &[TokenId], params: &SamplingParams) -> Self {
        let (params, tokens) = (Arc::new(params.clone()), prompt.to_vec());
        Self { params, prompt_len: prompt.len(), tokens, computed: 0, step: 0, out: Vec::new() }
    }

    /// Generates until there are `limit` tokens; false if the answer ended before.
    fn run(
        &mut self,
        engine: &mut dyn Engine,
        limit: usize,
        chunk: usize,
        on_token: &mut dyn FnMut(&TokenOut) -> bool,
    ) -> Result<bool, NoToken> {
        let block_size = engine.kv().format().block_size;
        let chunk = (chunk / block_size).max(1) * block_size;
        while self.out.len() < limit {
            let plan = self.next_plan(chunk, block_size);
            // A chunk before the prompt's last yields no token.
            for output in engine.run(&plan, &mut |_| {}) {
                let out = output.token?;
                self.tokens.push(out.token);
                let stop = self.params.is_stop(out.token) || !on_token(&out) || out.ends;
                self.out.push(out);
                if stop {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The pass over the next tokens, at most `chunk` of them; it samples if it reaches the last.
    fn next_plan(&mut self, chunk: usize, block_size: usize) -> BatchPlan {
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
            block_table: (0..end.div_ceil(block_size) as u32).map(BlockId).collect(),
            sample,
            reader: None,
        };
        BatchPlan { step: self.step, items: vec![item] }
    }
}
