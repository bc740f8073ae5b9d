//! From logits to a token: penalties, biases, filters and one counter-based random draw.
//!
//! [`sample`] is a pure function of the logits and the [`SampleSpec`]: the random number is Philox4x32-10 keyed by
//! the request's seed and counted by the token's position, so a sequence that moves to another node, or is computed
//! twice, draws the same tokens. It knows nothing of text, stop conditions or scheduling.
//!
//! The order of operations:
//!
//! 1. log-probabilities, if asked for, of the model's own distribution: the raw logits;
//! 2. repetition penalty over prompt and answer (Hugging Face), presence and frequency penalties over the answer
//!    (OpenAI), then the logit biases;
//! 3. temperature 0 takes the largest logit, the lowest id among equals;
//! 4. otherwise temperature, top-k, top-p, min-p (vLLM's order), and a draw from what is left.
//!
//! A logit that is not finite counts as minus infinity. If that is true of all of them the answer is token 0.

use ridge_protocol::{SampleSpec, SamplingParams, TokenId, TokenOut};
use std::cmp::Ordering;

/// What a log-probability of minus infinity is reported as: JSON has no infinity, and OpenAI's API uses this number.
pub const LOWEST_LOGPROB: f32 = -9999.0;

/// Chooses the next token from `logits` (one row, `vocab` long), which is left in an unspecified state.
pub fn sample(logits: &mut [f32], spec: &SampleSpec) -> TokenOut {
    assert!(!logits.is_empty(), "sampling from an empty vocabulary");
    for logit in logits.iter_mut() {
        if !logit.is_finite() {
            *logit = f32::NEG_INFINITY;
        }
    }
    let params = &*spec.params;
    // Logits change below, so what the reported numbers need is kept before they do.
    let report = params.logprobs.map(|count| (log_sum_exp(logits), top(logits, usize::from(count))));
    let raw = report.is_some().then(|| logits.to_vec());

    penalize(logits, spec);
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    let token = if params.temperature == 0.0 { argmax(logits) } else { draw(logits, params, spec.position) };

    match (report, raw) {
        (Some((total, top)), Some(raw)) => TokenOut {
            token,
            logprob: Some(logprob(raw[token as usize], total)),
            top: top.into_iter().map(|id| (id, logprob(raw[id as usize], total))).collect(),
        },
        _ => TokenOut { token, logprob: None, top: Vec::new() },
    }
}

/// Applies the three penalties to every token seen so far.
fn penalize(logits: &mut [f32], spec: &SampleSpec) {
    let params = &*spec.params;
    if !params.needs_history() {
        return;
    }
    let prompt_len = (spec.prompt_len as usize).min(spec.history.len());
    // Sorted so that each distinct token is a run: repetition counts a token once, frequency counts the run.
    if params.repetition_penalty != 1.0 {
        for (token, _) in runs(&spec.history) {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit *= if *logit < 0.0 { params.repetition_penalty } else { params.repetition_penalty.recip() };
            }
        }
    }
    for (token, count) in runs(&spec.history[prompt_len..]) {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit -= params.presence_penalty + count as f32 * params.frequency_penalty;
        }
    }
}

/// The distinct tokens in ascending order, each with how often it occurs.
fn runs(tokens: &[TokenId]) -> Vec<(TokenId, u32)> {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    sorted.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u32)).collect()
}

/// The largest logit's token, the lowest id among equals.
fn argmax(logits: &[f32]) -> TokenId {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as TokenId
}

/// Temperature, top-k, top-p, min-p, then one draw.
fn draw(logits: &[f32], params: &SamplingParams, position: u32) -> TokenId {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return 0;
    }
    // Weights are relative to the likeliest token's, so its own is 1 and no exponential overflows.
    let temperature = f64::from(params.temperature);
    let weight = |logit: f32| ((f64::from(logit) - f64::from(largest)) / temperature).exp();

    let top_k = if params.top_k == 0 { logits.len() } else { (params.top_k as usize).min(logits.len()) };
    let mut kept: Vec<(TokenId, f64)>;
    if top_k == logits.len() && params.top_p >= 1.0 {
        kept = logits.iter().enumerate().map(|(id, logit)| (id as TokenId, weight(*logit))).collect();
    } else {
        let mut order: Vec<TokenId> = (0..logits.len() as TokenId).collect();
        keep_likeliest(&mut order, logits, top_k);
        kept = order.iter().map(|id| (*id, weight(logits[*id as usize]))).collect();
        if params.top_p < 1.0 {
            keep_nucleus(&mut kept, params.top_p);
        }
    }
    let floor = f64::from(params.min_p);
    // The likeliest token has weight 1, so at least that one stays.
    kept.retain(|(_, weight)| *weight > 0.0 && *weight >= floor);

    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let target = uniform(params.seed, position) * total;
    let mut sum = 0.0;
    for (id, weight) in &kept {
        sum += weight;
        if sum > target {
            return *id;
        }
    }
    // Unreachable but for rounding: `target` is below the same sum.
    kept.last().map_or(0, |(id, _)| *id)
}

/// Likelier first, the lower id among equals. Logits are never NaN here.
fn likelier(logits: &[f32], a: TokenId, b: TokenId) -> Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// Cuts `order` to its `count` likeliest tokens, in no particular order.
fn keep_likeliest(order: &mut Vec<TokenId>, logits: &[f32], count: usize) {
    if count < order.len() {
        order.select_nth_unstable_by(count, |a, b| likelier(logits, *a, *b));
        order.truncate(count);
        // Selection leaves an order that depends on the algorithm; the draw must not.
        order.sort_unstable();
    }
}

/// Cuts `kept` to the shortest prefix, likeliest first, that holds at least `top_p` of its mass.
fn keep_nucleus(kept: &mut Vec<(TokenId, f64)>, top_p: f32) {
    let order = |a: &(TokenId, f64), b: &(TokenId, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let needed = kept.iter().map(|(_, weight)| weight).sum::<f64>() * f64::from(top_p);
    // A nucleus is usually a few tokens of a vocabulary of a hundred thousand: sort a growing head of it.
    let mut head = 256;
    loop {
        let sorted = head.min(kept.len());
        if sorted < kept.len() {
            kept.select_nth_unstable_by(sorted, order);
        }
        kept[..sorted].sort_unstable_by(order);
        let mut sum = 0.0;
        for index in 0..sorted {
            sum += kept[index].1;
            if sum >= needed {
                kept.truncate(index + 1);
                return;
            }
        }
        if sorted == kept.len() {
            return;
        }
        head *= 8;
    }
}

/// The `count` largest logits' tokens, largest first.
fn top(logits: &[f32], count: usize) -> Vec<TokenId> {
    let mut order: Vec<TokenId> = (0..logits.len() as TokenId).collect();
    keep_likeliest(&mut order, logits, count);
    order.sort_unstable_by(|a, b| likelier(logits, *a, *b));
    order
}

/// Logarithm of the sum of exponentials, in f64; minus infinity if every logit is.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum::<f64>().ln()
}

fn logprob(logit: f32, log_sum_exp: f64) -> f32 {
    if logit == f32::NEG_INFINITY {
        return LOWEST_LOGPROB;
    }
    ((f64::from(logit) - log_sum_exp) as f32).max(LOWEST_LOGPROB)
}

/// A uniform number in [0, 1) with 53 random bits: a function of the seed and the position alone.
pub fn uniform(seed: u64, position: u32) -> f64 {
    let [a, b, _, _] = philox4x32_10([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Philox4x32 with ten rounds (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC11).
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    // The golden ratio and the square root of three less one.
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors that come with Random123 (`tests/kat_vectors`).
    #[test]
    fn philox_matches_the_published_vectors() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32_10([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32_10([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn uniform_stays_below_one() {
        for position in 0..10_000 {
            assert!((0.0..1.0).contains(&uniform(7, position)));
        }
    }
}
