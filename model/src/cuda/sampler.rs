//! Sampling on the device: its tokens are those of [`crate::sampling::sample`], without the logits on the way to the host.

#![allow(unsafe_code, reason = "the device's memory is addressed by numbers")]

use ridge_kernels::cuda::ops::sampling::{Request, Sampler};
use ridge_kernels::cuda::{Buffer, CudaError};
use ridge_protocol::{SampleSpec, TokenOut};

/// Chooses a token for each of `wanted` from its row of `logits` `[wanted.len(), vocab]`, which are left in an unspecified state.
/// Beside the parameters stands the mask of the tokens that are allowed, if not all are.
///
/// # Panics
///
/// If there are fewer rows.
pub fn sample_rows(
    sampler: &mut Sampler,
    logits: &Buffer,
    vocab: usize,
    wanted: &[(&SampleSpec, Option<&[u32]>)],
) -> Result<Vec<TokenOut>, CudaError> {
    let requests: Vec<Request> = wanted.iter().map(|(spec, mask)| request(spec, *mask)).collect();
    sampler.prepare(&requests)?;
    let rows = logits.at(0, wanted.len() * vocab * size_of::<f32>());
    // SAFETY: so many floats begin there, and the borrow lasts until the tokens have been read.
    unsafe { sampler.run(rows)? };
    let tokens = sampler.read()?;
    Ok(tokens.into_iter().map(|s| TokenOut { token: s.token, logprob: s.logprob, top: s.top, ends: false }).collect())
}

/// What the device is asked for an item's row. `mask` has a bit per token that is allowed, if not all are.
pub fn request(spec: &SampleSpec, mask: Option<&[u32]>) -> Request {
    let params = &*spec.params;
    let seen = if params.has_penalties() { seen(spec) } else { Vec::new() };
    Request {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        seed: params.seed,
        position: spec.position,
        repetition: params.repetition_penalty,
        presence: params.presence_penalty,
        frequency: params.frequency_penalty,
        seen,
        biases: params.logit_bias.clone(),
        mask: mask.map(<[u32]>::to_vec),
        logprobs: params.logprobs,
    }
}

/// Every token of prompt and answer once, with how often the answer has it.
fn seen(spec: &SampleSpec) -> Vec<(u32, u32)> {
    let mut tokens = spec.history.clone();
    tokens.sort_unstable();
    tokens.dedup();
    let mut counted: Vec<(u32, u32)> = tokens.into_iter().map(|token| (token, 0)).collect();
    for token in &spec.history[spec.prompt_len as usize..] {
        let at = counted
            .binary_search_by_key(token, |(token, _)| *token)
            .expect("the history has every token of the answer");
        counted[at].1 += 1;
    }
    counted
}
