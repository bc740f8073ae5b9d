//! Prints how long the sampling of a batch takes: 16 rows of 128256 logits, greedy and with the usual filters.
//!
//! ```text
//! cargo run --release -p ridge-model --example sampling_speed [THREADS]
//! ```

use ridge_kernels::Cpu;
use ridge_model::sampling::{sample_rows, uniform};
use ridge_protocol::{SampleSpec, SamplingParams};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const VOCAB: usize = 128_256;
const BATCH: usize = 16;
const ROUNDS: u32 = 30;

fn main() -> Result<(), Box<dyn Error>> {
    let available = std::thread::available_parallelism()?.get();
    let threads = std::env::args().nth(1).map_or(Ok(available), |text| text.parse())?;
    let cpu = Cpu::new(threads, None);
    let greedy = SamplingParams::greedy(1);
    let random = SamplingParams { temperature: 0.8, seed: 7, ..greedy.clone() };
    let settings = [
        ("greedy", greedy.clone()),
        ("greedy with logprobs 5", SamplingParams { logprobs: Some(5), ..greedy }),
        ("temperature 0.8", random.clone()),
        ("temperature 0.8, top-p 0.95", SamplingParams { top_p: 0.95, ..random.clone() }),
        ("temperature 0.8, top-k 50", SamplingParams { top_k: 50, ..random }),
    ];
    println!("{BATCH} rows of {VOCAB} logits, {threads} threads; best of {ROUNDS}");
    // A model that is sure of itself, and noise: where no token stands out a nucleus is thousands of tokens.
    for (name, logits) in [("peaked", peaked()), ("flat", noise(1.0))] {
        for (setting, params) in &settings {
            println!("{name:8} {setting:28} {:8.3} ms", best(&cpu, &logits, params).as_secs_f64() * 1e3);
        }
    }
    Ok(())
}

/// The quickest of several rounds at successive positions.
fn best(cpu: &Cpu, logits: &[f32], params: &SamplingParams) -> Duration {
    let params = Arc::new(params.clone());
    let round = |round| {
        let mut logits = logits.to_vec();
        let spec = |row| SampleSpec { params: params.clone(), history: vec![], prompt_len: 0, position: round + row };
        let specs: Vec<SampleSpec> = (0..BATCH as u32).map(spec).collect();
        let wanted: Vec<_> = specs.iter().map(|spec| (spec, None)).collect();
        let begin = Instant::now();
        assert_eq!(sample_rows(cpu.pool(), &mut logits, VOCAB, &wanted).len(), BATCH);
        begin.elapsed()
    };
    (0..ROUNDS).map(round).min().expect("at least one round")
}

/// Normal noise of this standard deviation.
fn noise(deviation: f64) -> Vec<f32> {
    let normal = |i: u32| {
        let (a, b) = (1.0 - uniform(1, i), uniform(2, i));
        deviation * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    };
    (0..(BATCH * VOCAB) as u32).map(|i| normal(i) as f32).collect()
}

/// Noise with ten tokens per row that stand out by 8 to 17.
fn peaked() -> Vec<f32> {
    let mut logits = noise(2.0);
    for (row, logits) in logits.chunks_exact_mut(VOCAB).enumerate() {
        for i in 0..10 {
            logits[(row * 7919 + i * 12_553) % VOCAB] = 17.0 - i as f32 * 0.9;
        }
    }
    logits
}
