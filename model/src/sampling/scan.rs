//! Passes over a whole vocabulary, shaped so that the compiler vectorises them: maxima, weights, cuts and the draw.
//!
//! Logits are cut into chunks of [`CHUNK`]; the chunks' maxima ([`peaks`]) let later passes skip most of them. Weights
//! are computed in f32 by [`exp`], which is the same on every machine, and summed lane by lane and then chunk by
//! chunk, in an order that depends on the vocabulary's size alone. It knows nothing of requests.

use ridge_protocol::TokenId;
use std::cmp::Ordering;

/// Logits per peak: one peak per candidate is enough for every usual top-k, and skipping one skips two cache lines.
pub(super) const CHUNK: usize = 128;
/// Sums side by side: four vectors of the smallest x86-64.
const LANES: usize = 16;
/// Steps of the nucleus histogram per factor e of weight.
const STEPS: f32 = 16.0;
/// Steps in all: they reach down to e^-64, and weights below e^-87 count as 0.
const BUCKETS: usize = 1024;

/// The least likely token that is still in the running; of equal logits, lower ids come first.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Cut {
    pub(super) logit: f32,
    pub(super) id: TokenId,
}

impl Cut {
    /// Everything is in the running.
    pub(super) const NONE: Cut = Cut { logit: f32::NEG_INFINITY, id: TokenId::MAX };

    /// The parts of chunk `index` that lie before and after the cut's own id, each with its least logit kept.
    fn parts<'a>(&self, index: usize, chunk: &'a [f32]) -> [(&'a [f32], f32); 2] {
        let begin = index * CHUNK;
        let upto = (self.id as usize + 1).saturating_sub(begin).min(chunk.len());
        let (before, after) = chunk.split_at(upto);
        [(before, self.logit), (after, self.logit.next_up())]
    }
}

/// Turns logits into weights relative to the largest, whose own is exactly 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weigher {
    largest: f32,
    per_degree: f32,
    floor: f32,
}

impl Weigher {
    /// Weights below `floor` count as 0. `temperature` is above 0.
    pub(super) fn new(largest: f32, temperature: f32, floor: f32) -> Self {
        // A reciprocal that overflows would make 0 · infinity of the largest logit itself.
        Self { largest, per_degree: temperature.recip().min(f32::MAX), floor }
    }

    /// How many factors of e less likely than the likeliest token.
    fn distance(&self, logit: f32) -> f32 {
        (self.largest - logit) * self.per_degree
    }

    /// The histogram's step that a logit falls into; likelier tokens never into a later one.
    fn bucket(&self, logit: f32) -> u32 {
        whole((self.distance(logit) * STEPS).min((BUCKETS - 1) as f32))
    }

    fn weight(&self, logit: f32, least: f32) -> f32 {
        let weight = exp(-self.distance(logit));
        // Not `||`, which is a branch.
        if (logit < least) | (weight < self.floor) { 0.0 } else { weight }
    }

    fn sum(&self, logits: &[f32], least: f32) -> f64 {
        let mut lanes = [0.0f32; LANES];
        let mut groups = logits.chunks_exact(LANES);
        for group in &mut groups {
            for (lane, logit) in lanes.iter_mut().zip(group) {
                *lane += self.weight(*logit, least);
            }
        }
        for (lane, logit) in lanes.iter_mut().zip(groups.remainder()) {
            *lane += self.weight(*logit, least);
        }
        lanes.iter().map(|lane| f64::from(*lane)).sum()
    }
}

/// The largest logit of each chunk. Logits that are not finite become minus infinity on the way.
pub(super) fn peaks(logits: &mut [f32]) -> Vec<f32> {
    logits.chunks_mut(CHUNK).map(peak).collect()
}

/// The largest logit's token, the lowest id among equals, in one pass. Logits that are not finite lose.
pub(super) fn argmax(logits: &mut [f32]) -> TokenId {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (index, chunk) in logits.chunks_mut(CHUNK).enumerate() {
        let peak = peak(chunk);
        if peak > largest {
            (best, largest) = (index, peak);
        }
    }
    let chunk = logits.chunks(CHUNK).nth(best).unwrap_or(&[]);
    (best * CHUNK + chunk.iter().position(|logit| *logit == largest).unwrap_or(0)) as TokenId
}

/// The largest of one chunk, which is made finite or minus infinity.
fn peak(chunk: &mut [f32]) -> f32 {
    const EXPONENT: u32 = 0x7f80_0000;
    let largest = |chunk: &[f32]| {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut odd = [0u32; LANES];
        let mut step = |group: &[f32]| {
            for ((lane, odd), logit) in lanes.iter_mut().zip(&mut odd).zip(group) {
                *lane = if *logit > *lane { *logit } else { *lane };
                *odd |= u32::from(logit.to_bits() & EXPONENT == EXPONENT);
            }
        };
        let mut groups = chunk.chunks_exact(LANES);
        (&mut groups).for_each(&mut step);
        step(groups.remainder());
        (lanes.into_iter().fold(f32::NEG_INFINITY, f32::max), odd.into_iter().any(|odd| odd != 0))
    };
    let (peak, odd) = largest(chunk);
    if !odd {
        return peak;
    }
    chunk.iter_mut().filter(|logit| !logit.is_finite()).for_each(|logit| *logit = f32::NEG_INFINITY);
    largest(chunk).0
}

/// Tokens whose logits lie in `least..=most`, in the order of their ids.
fn between(logits: &[f32], peaks: &[f32], least: f32, most: f32) -> Vec<(TokenId, f32)> {
    let mut found = Vec::new();
    for (index, (chunk, peak)) in logits.chunks(CHUNK).zip(peaks).enumerate() {
        if *peak >= least {
            for (i, logit) in chunk.iter().enumerate() {
                // Not `&&`: one branch that is rarely taken instead of one that is taken at random.
                if (*logit >= least) & (*logit <= most) {
                    found.push(((index * CHUNK + i) as TokenId, *logit));
                }
            }
        }
    }
    found
}

/// Likelier first, the lower id among equals. Logits are never NaN here.
fn likelier(a: &(TokenId, f32), b: &(TokenId, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The `count` likeliest tokens, likeliest first.
pub(super) fn likeliest(logits: &[f32], peaks: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    // As many chunks reach this threshold as tokens are wanted, so as many tokens do, and hardly more.
    let mut by_size = peaks.to_vec();
    let least = match count <= by_size.len() {
        true => *by_size.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1,
        false => f32::NEG_INFINITY,
    };
    let mut found = between(logits, peaks, least, f32::INFINITY);
    if count < found.len() {
        found.select_nth_unstable_by(count - 1, likelier);
        found.truncate(count);
    }
    found.sort_unstable_by(likelier);
    found
}

/// The cut after the shortest run of tokens, likeliest first, that holds at least `top_p` of the mass that `cut`
/// leaves.
///
/// In words: a histogram of mass over weight tells in which step the run ends; only that step's tokens are sorted.
pub(super) fn nucleus(logits: &[f32], peaks: &[f32], weigher: &Weigher, cut: Cut, top_p: f32) -> Cut {
    // Two histograms in turn, so that neighbours of one step do not wait for each other's sum.
    let mut mass = vec![[0.0f64; 2]; BUCKETS];
    for (index, chunk) in kept_chunks(logits, peaks, cut) {
        for (part, least) in cut.parts(index, chunk) {
            let mut weights = [0.0f32; CHUNK];
            let mut buckets = [0u32; CHUNK];
            for ((weight, bucket), logit) in weights.iter_mut().zip(&mut buckets).zip(part) {
                *weight = weigher.weight(*logit, least);
                *bucket = weigher.bucket(*logit);
            }
            for (i, (weight, bucket)) in weights.iter().zip(&buckets).take(part.len()).enumerate() {
                mass[*bucket as usize][i % 2] += f64::from(*weight);
            }
        }
    }
    let needed = mass.iter().map(|[a, b]| a + b).sum::<f64>() * f64::from(top_p);
    let mut sum = 0.0;
    let ends = mass.iter().position(|[a, b]| {
        sum += a + b;
        sum >= needed
    });
    // Reachable by rounding alone.
    let Some(ends) = ends else { return cut };
    let mut before: f64 = mass[..ends].iter().map(|[a, b]| a + b).sum();
    // A step too far on either side, so that rounding loses no token: the bucket decides.
    let edge = |step: usize| weigher.largest - step as f32 / STEPS / weigher.per_degree;
    let least = if ends + 1 < BUCKETS { edge(ends + 2) } else { f32::NEG_INFINITY };
    let mut last = between(logits, peaks, least, edge(ends.saturating_sub(1)));
    last.retain(|(id, logit)| {
        let kept = *logit > cut.logit || (*logit == cut.logit && *id <= cut.id);
        kept && weigher.bucket(*logit) as usize == ends
    });
    last.sort_unstable_by(likelier);
    for (id, logit) in &last {
        before += f64::from(weigher.weight(*logit, f32::NEG_INFINITY));
        if before >= needed {
            return Cut { logit: *logit, id: *id };
        }
    }
    last.last().map_or(cut, |(id, logit)| Cut { logit: *logit, id: *id })
}

/// The token at `fraction` of the mass that `cut` leaves, in the order of ids.
pub(super) fn at_fraction(logits: &[f32], peaks: &[f32], weigher: &Weigher, cut: Cut, fraction: f64) -> TokenId {
    let sums: Vec<(usize, &[f32], f64)> = kept_chunks(logits, peaks, cut)
        .map(|(index, chunk)| {
            let parts = cut.parts(index, chunk);
            (index, chunk, parts.into_iter().map(|(part, least)| weigher.sum(part, least)).sum())
        })
        .collect();
    let target = fraction * sums.iter().map(|(_, _, sum)| sum).sum::<f64>();
    // The chunk that the target falls into; the last one with any mass, should rounding put it past the end.
    let (mut below, mut found) = (0.0, None);
    for (index, chunk, mass) in sums.iter().filter(|(_, _, mass)| *mass > 0.0) {
        found = Some((*index, *chunk, below));
        if below + mass > target {
            break;
        }
        below += mass;
    }
    let Some((index, chunk, mut below)) = found else { return 0 };
    let mut last = 0;
    let parts = cut.parts(index, chunk);
    let weights = parts.into_iter().flat_map(|(part, least)| part.iter().map(move |l| weigher.weight(*l, least)));
    for (id, weight) in (index * CHUNK..).zip(weights).filter(|(_, weight)| *weight > 0.0) {
        last = id as TokenId;
        below += f64::from(weight);
        if below > target {
            break;
        }
    }
    // Single tokens and lanes may round apart at the chunk's end: then its last token it is.
    last
}

/// Logarithm of the sum of exponentials; minus infinity if every logit is.
pub(super) fn log_sum_exp(logits: &[f32], largest: f32) -> f64 {
    if largest == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let weigher = Weigher::new(largest, 1.0, 0.0);
    let sum: f64 = logits.chunks(CHUNK).map(|chunk| weigher.sum(chunk, f32::NEG_INFINITY)).sum();
    f64::from(largest) + sum.ln()
}

/// Chunks that hold a token which `cut` leaves, with their indices.
fn kept_chunks<'a>(logits: &'a [f32], peaks: &'a [f32], cut: Cut) -> impl Iterator<Item = (usize, &'a [f32])> {
    let chunks = logits.chunks(CHUNK).zip(peaks).enumerate();
    chunks.filter(move |(_, (_, peak))| **peak >= cut.logit).map(|(index, (chunk, _))| (index, chunk))
}

/// 1.5 · 2^23: adding it leaves a number's integer part in the lowest bits.
const SHIFTER: f32 = 12_582_912.0;

/// e^x for x of at most 0, to 2 units in the last place; exactly 1 at 0, and 0 below -87, where f32 ends.
fn exp(x: f32) -> f32 {
    // e^x = 2^n · e^r with n whole and |r| at most ln 2 / 2, where Taylor's seventh term no longer shows.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + SHIFTER;
    let n = shifted - SHIFTER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let series = 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = ((series * r) * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// x less a half, rounded, for x in `0..2^22`: a form that vectorises, where a cast checks for what cannot be here.
fn whole(x: f32) -> u32 {
    (x - 0.5 + SHIFTER).to_bits() & 0x3f_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_precise_and_monotone_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-87.1), exp(f32::NEG_INFINITY), exp(f32::MIN)), (0.0, 0.0, 0.0));
        let worst = (0..870_000).map(|i| {
            let x = i as f32 * -1e-4;
            (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs()
        });
        assert!(worst.fold(0.0, f64::max) < 2.5e-7);
    }

    #[test]
    fn the_likeliest_are_found_whatever_chunk_they_are_in() {
        let mut logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1009) as f32).collect();
        let peaks = peaks(&mut logits);
        let mut sorted: Vec<_> = logits.iter().enumerate().map(|(id, logit)| (id as TokenId, *logit)).collect();
        sorted.sort_by(likelier);
        for count in [0, 1, 5, 8, 9, 500, 1000, 2000] {
            assert_eq!(likeliest(&logits, &peaks, count), sorted[..count.min(1000)], "{count}");
        }
    }
}
