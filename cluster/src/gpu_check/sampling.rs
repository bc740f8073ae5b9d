//! Sampling on the device beside the CPU's sampler: the very same tokens and log-probabilities.

use super::child::{Job, say};
use super::line::Line;
use ridge_kernels::cuda::Buffer;
use ridge_kernels::cuda::ops::sampling::Sampler;
use ridge_model::cuda::sampler::sample_rows;
use ridge_model::sampling::{sample, uniform};
use ridge_protocol::{SampleSpec, SamplingParams};
use std::sync::Arc;

/// Sequences of a batch.
const ROWS: usize = 6;

/// Checks batches of random rows and parameters.
pub fn run(job: &Job<'_>) -> anyhow::Result<()> {
    let device = job.device()?;
    let (vocab, rounds) = if job.is_small() { (700, 3) } else { (128_256, 30) };
    let mut sampler = Sampler::new(&device, vocab)?;
    let mut count = 0;
    let mut unit = || {
        count += 1;
        uniform(job.seed, count)
    };
    let mut failure = None;
    let mut cases = 0;
    for round in 0..rounds {
        if cases > 0 && job.is_late() {
            break;
        }
        let specs: Vec<SampleSpec> = (0..ROWS).map(|row| spec(&mut unit, round * ROWS + row, vocab)).collect();
        // About normal, and in some rounds rounded, so that many are equal.
        let mut value = || (0..4).map(|_| unit()).sum::<f64>() * 8.0 - 16.0;
        let logits: Vec<f32> =
            (0..ROWS * vocab).map(|_| if round % 3 == 2 { value().round() } else { value() } as f32).collect();
        // Every other row as an answer under a grammar would be: some tokens may follow, at least one.
        let mut mask = |row: usize| {
            let share = [0.5, 0.01, 0.0][row / 2 % 3];
            let mut words = vec![0u32; vocab.div_ceil(32)];
            for token in (0..vocab).filter(|token| *token == vocab / 2 || unit() < share).collect::<Vec<_>>() {
                words[token / 32] |= 1 << (token % 32);
            }
            words
        };
        let masks: Vec<Option<Vec<u32>>> = (0..ROWS).map(|row| (row % 2 == 1).then(|| mask(row))).collect();
        let wanted: Vec<_> = specs.iter().zip(masks.iter().map(Option::as_deref)).collect();
        let got = sample_rows(&mut sampler, &Buffer::of(&device, &logits)?, vocab, &wanted)?;
        let rows = wanted.iter().zip(logits.chunks(vocab)).zip(&got);
        for (((spec, mask), logits), got) in rows {
            let want = sample(&mut logits.to_vec(), spec, *mask);
            if want != *got && failure.is_none() {
                let (want, got) = (want.token, got.token);
                failure = Some(format!(
                    "token {got} instead of {want}, or other log-probabilities, in round {round}: {spec:?}"
                ));
            }
        }
        cases += 1;
        if failure.is_some() {
            break;
        }
    }
    say(&Line::Check { name: "sampling".into(), cases, error: None, failure });
    Ok(())
}

fn spec(unit: &mut impl FnMut() -> f64, number: usize, vocab: usize) -> SampleSpec {
    let mut params = SamplingParams::greedy(1);
    params.temperature = [0.0, 0.3, 1.0, 2.5][number % 4];
    params.top_k = [0, 1, 40, vocab as u32 / 2][number / 2 % 4];
    params.top_p = [1.0, 0.9, 0.5, 0.999][number / 3 % 4];
    params.min_p = [0.0, 0.05, 0.0, 0.5][number / 5 % 4];
    params.seed = (unit() * 1e15) as u64;
    params.logprobs = [None, Some(5), Some(20)][number % 3];
    if number.is_multiple_of(3) {
        (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) = (1.3, 0.7, 0.25);
    }
    let history: Vec<u32> = match params.needs_history() {
        true => (0..50).map(|_| (unit() * vocab as f64) as u32).collect(),
        false => Vec::new(),
    };
    let prompt_len = history.len() as u32 / 2;
    SampleSpec { params: Arc::new(params), prompt_len, history, position: (unit() * 1e5) as u32 }
}
