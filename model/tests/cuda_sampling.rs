//! Sampling on a device draws the very tokens that the CPU's sampler draws, and reports the same log-probabilities. Run in the
//! emulator, in every order of threads; skipped where there is no C++ compiler.

use ridge_kernels::cuda::emulated::{Emulated, Order};
use ridge_kernels::cuda::ops::sampling::{Request, Sampler};
use ridge_kernels::cuda::{Buffer, Device};
use ridge_model::cuda::sampler::request;
use ridge_model::sampling::sample;
use ridge_protocol::{SampleSpec, SamplingParams, TokenOut};
use std::sync::Arc;

/// A small seeded generator (xorshift64*).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.bits() >> 33) as usize % limit
    }

    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 24) as f32
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Logits of several shapes: spread, peaked, all near each other, rounded so that many are equal, and with odd ones.
fn logits(random: &mut Random, vocab: usize) -> Vec<f32> {
    let shape = random.below(6);
    let width = random.pick(&[0.01, 1.0, 8.0, 40.0]);
    let mut logits: Vec<f32> = (0..vocab)
        .map(|_| {
            let normal = (0..4).map(|_| random.unit()).sum::<f32>() - 2.0;
            match shape {
                0 => normal * width,
                1 => (normal * 4.0).round(),
                2 => normal.powi(3) * width,
                3 => -10.0 - normal.abs() * width,
                _ => normal * 5.0,
            }
        })
        .collect();
    if shape == 4 {
        for _ in 0..5 {
            let at = random.below(vocab);
            logits[at] = random.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 60.0]);
        }
    }
    if shape == 5 && random.below(4) == 0 {
        logits.fill(random.pick(&[f32::NEG_INFINITY, 1.5, f32::NAN]));
    }
    logits
}

fn spec(random: &mut Random, vocab: usize) -> SampleSpec {
    let mut params = SamplingParams::greedy(1);
    params.temperature = random.pick(&[0.0, 0.3, 0.8, 1.0, 2.5, 1e-30]);
    params.top_k = random.pick(&[0, 0, 1, 7, 40, vocab as u32 / 2, vocab as u32 + 5]);
    params.top_p = random.pick(&[1.0, 0.9, 0.5, 0.999, 0.01, 1e-6]);
    params.min_p = random.pick(&[0.0, 0.0, 0.05, 0.5, 1.0]);
    params.seed = random.bits();
    params.logprobs = random.pick(&[None, None, Some(0), Some(5), Some(20)]);
    if random.below(3) == 0 {
        params.repetition_penalty = random.pick(&[1.0, 1.3, 0.8]);
        params.presence_penalty = random.pick(&[0.0, 0.7, -0.4]);
        params.frequency_penalty = random.pick(&[0.0, 0.25, f32::MAX]);
    }
    if random.below(3) == 0 {
        let mut biased: Vec<(u32, f32)> =
            (0..6).map(|_| (random.below(vocab + 3) as u32, random.pick(&[-100.0, 5.0, 0.5, f32::MAX]))).collect();
        biased.sort_by_key(|(token, _)| *token);
        params.logit_bias = biased;
    }
    let history: Vec<u32> = match params.needs_history() {
        true => (0..random.below(60)).map(|_| random.below(vocab.min(40)) as u32).collect(),
        false => Vec::new(),
    };
    let prompt_len = random.below(history.len() + 1) as u32;
    SampleSpec { params: Arc::new(params), prompt_len, history, position: random.below(100_000) as u32 }
}

/// The tokens by a sampler that may have served other batches before.
fn on_device(sampler: &mut Sampler, device: &Arc<dyn Device>, logits: &[f32], requests: &[Request]) -> Vec<TokenOut> {
    let memory = Buffer::of(device, logits).unwrap();
    sampler.prepare(requests).unwrap();
    // SAFETY: the logits are this buffer's, one row per request.
    unsafe { sampler.run(memory.address()).unwrap() };
    let sampled = sampler.read().unwrap();
    sampled.into_iter().map(|s| TokenOut { token: s.token, logprob: s.logprob, top: s.top, ends: false }).collect()
}

#[test]
fn cuda_sampling_draws_the_cpus_tokens() {
    let Some(emulated) = Emulated::for_tests() else { return };
    let device: Arc<dyn Device> = emulated.clone();
    let mut random = Random(0x9E37_79B9);
    let mut samplers: Vec<(usize, Sampler)> =
        [1, 3, 127, 128, 500, 1000, 2305].map(|vocab| (vocab, Sampler::new(&device, vocab).unwrap())).into();
    for round in 0..60 {
        emulated.set_order([Order::Forward, Order::Backward, Order::Shuffled(round)][round as usize % 3]);
        let (vocab, sampler) = &mut samplers[round as usize % 7];
        let vocab = *vocab;
        let specs: Vec<SampleSpec> = (0..=random.below(5)).map(|_| spec(&mut random, vocab)).collect();
        let rows: Vec<Vec<f32>> = specs.iter().map(|_| logits(&mut random, vocab)).collect();
        let requests: Vec<Request> = specs.iter().map(|spec| request(spec, None)).collect();
        let got = on_device(sampler, &device, &rows.concat(), &requests);
        for ((spec, row), got) in specs.iter().zip(&rows).zip(got) {
            let want = sample(&mut row.clone(), spec, None);
            assert_eq!(got, want, "round {round}, vocabulary {vocab}, {spec:?}");
        }
        device.synchronize().unwrap();
    }
}

#[test]
fn cuda_sampling_keeps_to_the_mask() {
    let Some(emulated) = Emulated::for_tests() else { return };
    let device: Arc<dyn Device> = emulated;
    let mut random = Random(77);
    for _ in 0..20 {
        let vocab = random.pick(&[31, 32, 33, 700]);
        let spec = spec(&mut random, vocab);
        let row = logits(&mut random, vocab);
        let mask: Vec<u32> = (0..vocab.div_ceil(32)).map(|_| random.bits() as u32 & random.bits() as u32).collect();
        let want = sample(&mut row.clone(), &spec, Some(&mask));
        let mut sampler = Sampler::new(&device, vocab).unwrap();
        let got = on_device(&mut sampler, &device, &row, &[request(&spec, Some(&mask))]);
        assert_eq!(got, [want]);
    }
}
