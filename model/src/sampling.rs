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
//! 3. a mask of the tokens that the answer's grammar allows, if it has one;
//! 4. temperature 0 takes the largest logit, the lowest id among equals;
//! 5. otherwise temperature, top-k, top-p, min-p (vLLM's order), and a draw from what is left.
//!
//! A logit that is not finite counts as minus infinity. If that is true of all of them the answer is token 0.
//! What step 5 leaves is drawn from in the order of token ids. No step sorts the vocabulary: see `scan`.

mod scan;

use ridge_kernels::sync::pool::ThreadPool;
use ridge_protocol::{SampleSpec, SamplingParams, TokenId, TokenOut};
use scan::{Cut, Weigher};
use std::sync::Mutex;

/// What a log-probability of minus infinity is reported as: JSON has no infinity, and OpenAI's API uses this number.
pub const LOWEST_LOGPROB: f32 = -9999.0;

/// [`sample`] for each row of `logits` `[wanted.len(), vocab]`, on the threads of `pool`.
pub fn sample_rows(
    pool: &ThreadPool,
    logits: &mut [f32],
    vocab: usize,
    wanted: &[(&SampleSpec, Option<&[u32]>)],
) -> Vec<TokenOut> {
    assert_eq!(logits.len(), wanted.len() * vocab);
    // Each task has a row of its own; the locks only prove it.
    let rows = logits.chunks_exact_mut(vocab).zip(wanted).map(|(row, wanted)| Mutex::new((row, *wanted, None)));
    let rows: Vec<_> = rows.collect();
    pool.run(rows.len(), &|row| {
        let (logits, (spec, mask), out) = &mut *rows[row].lock().expect("a row has one task");
        *out = Some(sample(logits, spec, *mask));
    });
    let out = |row: Mutex<(_, _, Option<TokenOut>)>| row.into_inner().expect("a panic would have gone on").2;
    rows.into_iter().map(|row| out(row).expect("every task ran")).collect()
}

/// Chooses the next token from `logits` (one row, `vocab` long), which is left in an unspecified state. Of `mask`, if there is
/// one, each token that may be chosen has its bit set, the lowest of each word first.
pub fn sample(logits: &mut [f32], spec: &SampleSpec, mask: Option<&[u32]>) -> TokenOut {
    assert!(!logits.is_empty(), "sampling from an empty vocabulary");
    let params = &*spec.params;
    let Some(count) = params.logprobs else {
        return TokenOut { token: choose(logits, spec, mask), logprob: None, top: Vec::new(), ends: false };
    };
    // What is reported is the model's own distribution, so it is computed before penalties change the logits.
    let peaks = scan::peaks(logits);
    let total = scan::log_sum_exp(logits, largest(&peaks));
    let top = scan::likeliest(logits, &peaks, usize::from(count));
    let raw = logits.to_vec();
    let token = choose(logits, spec, mask);
    TokenOut {
        token,
        logprob: Some(logprob(raw[token as usize], total)),
        top: top.into_iter().map(|(id, logit)| (id, logprob(logit, total))).collect(),
        ends: false,
    }
}

/// The token, after penalties, biases and the mask.
fn choose(logits: &mut [f32], spec: &SampleSpec, mask: Option<&[u32]>) -> TokenId {
    let params = &*spec.params;
    penalize(logits, spec);
    for &(token, bias) in &params.logit_bias {
        adjust(logits, token, |logit| logit + bias);
    }
    if let Some(mask) = mask {
        exclude(logits, mask);
    }
    if params.temperature == 0.0 { scan::argmax(logits) } else { draw(logits, params, spec.position) }
}

/// Changes one token's logit. One that is not finite stays out; a finite one stays finite.
fn adjust(logits: &mut [f32], token: TokenId, change: impl FnOnce(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token as usize).filter(|logit| logit.is_finite()) {
        *logit = change(*logit).clamp(f32::MIN, f32::MAX);
    }
}

/// Leaves out every token whose bit is not set.
fn exclude(logits: &mut [f32], mask: &[u32]) {
    assert_eq!(mask.len(), logits.len().div_ceil(32), "a bit per token");
    for (word, logits) in mask.iter().zip(logits.chunks_mut(32)) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Applies the three penalties to every token seen so far.
fn penalize(logits: &mut [f32], spec: &SampleSpec) {
    let params = &*spec.params;
    if !params.has_penalties() {
        return;
    }
    let prompt_len = (spec.prompt_len as usize).min(spec.history.len());
    // Sorted so that each distinct token is a run: repetition counts a token once, frequency counts the run.
    if params.repetition_penalty != 1.0 {
        for (token, _) in runs(&spec.history) {
            let penalty = params.repetition_penalty;
            adjust(logits, token, |logit| logit * if logit < 0.0 { penalty } else { penalty.recip() });
        }
    }
    for (token, count) in runs(&spec.history[prompt_len..]) {
        adjust(logits, token, |logit| logit - (params.presence_penalty + count as f32 * params.frequency_penalty));
    }
}

/// The distinct tokens in ascending order, each with how often it occurs.
fn runs(tokens: &[TokenId]) -> Vec<(TokenId, u32)> {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    sorted.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u32)).collect()
}

/// Temperature, top-k, top-p, min-p, then one draw.
fn draw(logits: &mut [f32], params: &SamplingParams, position: u32) -> TokenId {
    let peaks = scan::peaks(logits);
    let largest = largest(&peaks);
    if largest == f32::NEG_INFINITY {
        return 0;
    }
    let mut cut = Cut::NONE;
    if params.top_k > 0 && (params.top_k as usize) < logits.len() {
        let kept = scan::likeliest(logits, &peaks, params.top_k as usize);
        cut = kept.last().map_or(cut, |(id, logit)| Cut { logit: *logit, id: *id });
    }
    if params.top_p < 1.0 {
        // Min-p comes after top-p: it takes nothing from the mass that the nucleus is a share of.
        let weigher = Weigher::new(largest, params.temperature, 0.0);
        cut = scan::nucleus(logits, &peaks, &weigher, cut, params.top_p);
    }
    // The likeliest token has weight 1, so at least that one stays.
    let weigher = Weigher::new(largest, params.temperature, params.min_p);
    scan::at_fraction(logits, &peaks, &weigher, cut, uniform(params.seed, position))
}

fn largest(peaks: &[f32]) -> f32 {
    peaks.iter().copied().fold(f32::NEG_INFINITY, f32::max)
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
